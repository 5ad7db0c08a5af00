"""How a student was trained, in words for tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kd_ranker.config import schema
from kd_ranker.distillation.terms import parse_terms
from kd_ranker.evaluation.saving import PLAIN
from kd_ranker.evaluation.setting_names import key_title, value_text

_SIGNALS = {"stage": "stages"}


def method_in_words(row: Mapping[Any, Any], varying: Sequence[str]) -> str:
    """Return how a student was trained: its mode, its losses, and the other keys that vary.

    `row` is one of `results.csv`; `varying` are the columns in which the settings differ.

    >>> row = {"mode": "aux", "distill_loss": "softmax + softmax:stage", "unshown_weight": 0.3}
    >>> method_in_words(row, ["distill_loss", "unshown_weight"])
    'aux, softmax on scores and stages, unshown negatives'
    >>> method_in_words(row | {"mode": "none", "train.unshown_margin": 0.2}, [])
    'none, softmax on scores and stages, unshown negatives not near the shown'
    """
    parts = [str(row["mode"])]
    if not pd.isna(row.get("distill_loss")):
        parts.append(_losses_in_words(str(row["distill_loss"])))
    if row.get("user_loss", PLAIN["user_loss"]) != PLAIN["user_loss"]:
        parts.append(f"{row['user_loss']} on labels")
    if row.get("unshown_weight", 0) > 0:
        negatives = "unshown negatives"
        if row.get("train.unshown_margin", 0) > 0:
            negatives += " not near the shown"
        parts.append(negatives)
    keys = {key.title: key for key in schema.setting_keys()}
    named_above = ("distill_loss", "user_loss", "unshown_weight")
    for column in varying:
        if column in named_above or keys[column].tuned or pd.isna(row[column]):
            continue
        parts.append(f"{key_title(column)} {value_text(row[column])}")
    return ", ".join(parts)


def _losses_in_words(losses: str) -> str:
    """Return distillation losses with the signals that they learn from.

    >>> _losses_in_words("topk:stage"), _losses_in_words("bce + topk:stage")
    ('topk on stages', 'bce on scores, topk on stages')
    """
    signals: dict[str, list[str]] = {}
    for term in parse_terms(losses):
        signals.setdefault(term.loss, []).append(_SIGNALS.get(term.signal, term.signal))
    return ", ".join(f"{loss} on {' and '.join(names)}" for loss, names in signals.items())
