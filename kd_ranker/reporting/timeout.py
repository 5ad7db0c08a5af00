"""What is left if the final ranker times out: users get the early ranker's own first candidates.

With m shown, the final ranker has no choice among the first m of an early ranker, so
`value_captured@m` is the value of these: no measure of its own is needed.
"""

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics.registry import metric_of, title_of
from kd_ranker.evaluation.saving import of_split
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval
from kd_ranker.reporting.study import Study
from kd_ranker.reporting.tables import Table, mean_text, number, percents


def timeout_value(study: Study) -> str:
    """Return the column of the final value that a ranker's own first m hold."""
    return f"value_captured@{study.config.funnel.shown}"


def timeout_users(study: Study) -> str:
    """Return the column of what these are worth to users.

    It is the true value where that is known. Where more candidates have labels than are shown, it
    is NDCG by the ranker's own order. Else it is the value of the labels among the candidates that
    the logged funnel passed.
    """
    shown = study.config.funnel.shown
    if study.knows_truth:
        return f"true_value_captured@{shown}"
    if study.has_labels_beyond_shown:
        return "user_ndcg"
    return f"covered_user_value@{shown}"


def timeout_sentence(study: Study, estimates: Estimates) -> str:
    """Return the value at timeout with the scores, without, and today; "" if it is not known."""
    rankers = {
        "with the scores": study.best_with_scores,
        "without the scores": study.baseline,
        "with today's ranker": study.incumbent,
    }
    shares: list[str] = []
    named: set[str] = set()
    for words, setting in rankers.items():
        if setting is None or setting in named:
            continue
        named.add(setting)
        share = _share_text(estimates.of(setting, timeout_value(study)), with_interval=not shares)
        if share:
            shares.append(f"{share} {words}")
    if not shares:
        return ""
    condition = "If the final ranker times out"
    if estimates.are_partly_scored:
        condition += ", and unscored candidates are worthless"
    shown = study.config.funnel.shown
    sentence = (
        f"{condition}, users get the early ranker's own top {shown}. Its share of the final value: "
        f"{', '.join(shares)}."
    )
    if study.best_with_scores is None or study.baseline is None:
        return sentence
    gap = estimates.gap(study.best_with_scores, study.baseline, timeout_value(study)).scaled(100)
    if not np.isfinite(gap.low):
        return sentence
    low, high = (number(end, 1, signed=True) for end in (gap.low, gap.high))
    return f"{sentence} The scores change it by {low} to {high} points."


def _share_text(share: Interval, with_interval: bool) -> str:
    mean, low, high = percents(share)
    if not mean:
        return ""
    return f"{mean}% (95% interval {low} to {high}%)" if with_interval and low else f"{mean}%"


def timeout_table(study: Study, estimates: Estimates) -> Table | None:
    """Return what each ranker's own first m hold, the most first; None if it is not known.

    Beside it is the value with the final ranker, if `funnel.passed` candidates pass.
    """
    value = timeout_value(study)
    users = timeout_users(study)
    with_final_ranker = f"value_captured@{study.passed}"
    rows = pd.concat([study.tested, of_split(study.references, "test"), study.teachers])
    settings = [str(setting) for setting in rows["setting"].unique()]
    held = pd.Series({setting: estimates.of(setting, value).mean for setting in settings})
    held = held.dropna().sort_values(ascending=False, kind="stable")
    if held.empty:
        return None
    columns = {
        "value at timeout": value,
        f"{_title_without_k(users)} at timeout": users,
        title_of(with_final_ranker): with_final_ranker,
    }
    cells: dict[str, list[str]] = {"": list(held.index)}
    for title, measure in columns.items():
        texts = [mean_text(estimates.of(setting, measure), 4) for setting in held.index]
        if any(texts):
            cells[title] = texts
    notes = [
        f"If the final ranker times out, users get a ranker's own first {study.config.funnel.shown}"
        f" of all retrieved. Their value at timeout is {value}: as many as are shown pass, so the "
        f"final ranker has no choice. {title_of(with_final_ranker)} is with the final ranker. ± is "
        "half the 95% interval."
    ]
    if users.startswith("covered_user_value"):
        notes.append(
            "The value of users is of labels among the candidates that the logged funnel passed; "
            "agreement with the final ranker raises it, so a gain by it is no evidence."
        )
    if estimates.are_partly_scored:
        notes.append("Candidates without a score of the final ranker count as worth nothing.")
    return Table(f"{study.dataset}: if the final ranker times out", pd.DataFrame(cells), notes)


def _title_without_k(measure: str) -> str:
    metric = metric_of(measure)
    assert metric is not None
    return metric.title or metric.name.replace("_", " ")
