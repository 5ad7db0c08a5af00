"""Columns that tell nearly alone what a ranker is to foretell, and so may be known only later."""

from collections.abc import Mapping, Sequence

import ibis
import ibis.expr.types as ir
import numpy as np
import scipy.stats
from ibis import _
from jaxtyping import Float64

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.cells import cells_of
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.grouped import Grouped
from kd_ranker.sources.logs.layout import OWNERS, LogLayout
from kd_ranker.sources.logs.numbered import Numbered

SHOWN = "shown"
# Shares of the uncertainty of what was shown, and of a label, that no honest feature tells. What
# ranked the candidates may be known before, and tells much of what was shown.
TELLS_SHOWN, TELLS_LABEL = 0.9, 0.5
# Candidates that are enough to see it.
_SOME = 100_000
_KINDS = ("dense", "category")
_BINS, _FEW_VALUES = 20, 50
_LEAST_ANSWERS = 30
_LEVEL = 1e-3


def tell_tales(
    engine: Engine, layout: LogLayout, grouped: Grouped, numbered: Numbered
) -> dict[str, dict[str, float]]:
    """Feature -> label, or "shown", of which it tells too much -> the share that it tells.

    Goes over some 100,000 candidates of whole requests.
    """
    features = {
        of.name: f"feature:{of.name}"
        for of in layout.of(*OWNERS)
        if of.kind in _KINDS and of.place is None
    }
    if not features:
        return {}
    every = -(-engine.count(grouped.candidates) // _SOME)
    rows = grouped.candidates.filter(grouped.candidates.number % every == 0)
    shown = rows.stage == int(Stage.SHOWN)
    answers = {SHOWN: shown.cast("int8")}
    for task in layout.tasks:
        label = rows[f"label:{task}"]
        answers[f"label of {task}"] = ibis.ifelse(shown & (label >= 0), label, None)
    lacking = [column for column in features.values() if column not in rows.columns]
    rows = rows.mutate(**answers)
    for table, key in (
        (numbered.requests, "number"),
        (numbered.items.rename(item="value"), "item"),
    ):
        there = [column for column in lacking if column in table.columns]
        rows = rows.join(table.select(key, *there), key)
    rows = engine.keep("some_candidates", rows.select(*features.values(), *answers))
    cells = cells_of(rows, list(features.values()), *answers)
    told = shares_told(engine, rows, cells, list(features.values()), list(answers))
    limit = {name: TELLS_SHOWN if name == SHOWN else TELLS_LABEL for name in answers}
    return {
        name: {answer: share for answer, share in told[column].items() if share >= limit[answer]}
        for name, column in features.items()
    }


def shares_told(
    engine: Engine,
    rows: ir.Table,
    cells: ir.Table,
    names: Sequence[str],
    answers: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Column -> answer -> the share of its uncertainty that the column tells, as `share_told`.

    Numbers are put into 20 bins of about as many rows, unless they have at most 50 values; texts of
    more values tell nothing here: their information could not be told from chance.

    Args:
      engine: what the rows are on.
      rows: of the answers.
      cells: of the columns that may tell something, with the answers beside each; see `cells`.
      names: of these columns, in the order of their places.
      answers: columns of 1, 0, and none where there is no answer.
    """
    sums = _sums(cells, answers)
    values = cells.group_by("column", "code").agg(rows=_.count(), number=_.number.min(), **sums)
    of_column = ibis.window(group_by="column")
    up_to = ibis.cumulative_window(group_by="column", order_by=["number", "code"])
    values = values.mutate(
        kinds=_.count().over(of_column),
        total=_.rows.sum().over(of_column),
        up_to=_.rows.sum().over(up_to),
        place=ibis.row_number().over(group_by="column", order_by="code"),
    )
    is_few = values.kinds <= _FEW_VALUES
    place = (_BINS * (values.up_to - values.rows / 2) / values.total).floor().cast("int64")
    bins = values.mutate(bin=ibis.ifelse(is_few, values.place, place))
    bins = bins.filter(is_few | bins.number.notnull())
    binned = bins.group_by("column", "bin").agg(**{name: bins[name].sum() for name in sums})
    found = engine.fetch(binned.order_by("column", "bin")).to_pandas().astype(float)
    (whole,) = engine.fetch(rows.agg(**_sums(rows, answers))).to_pylist()
    told: dict[str, dict[str, float]] = {name: {} for name in names}
    for column, counts in found.groupby("column"):
        # Where the column is missing is a bin of its own.
        counts = {
            name: np.append(counts[name], float(whole[name] or 0) - counts[name].sum())
            for name in sums
        }
        told[names[int(column)]] = {
            name: share_told(counts[f"all {name}"], counts[f"yes {name}"]) for name in answers
        }
    return told


def _sums(table: ir.Table, answers: Sequence[str]) -> dict[str, ir.Value]:
    """The number of answers, and how many of them are yes."""
    sums = {f"all {name}": table[name].count() for name in answers}
    return sums | {f"yes {name}": table[name].sum() for name in answers}


def share_told(all_: Float64[np.ndarray, "bins"], yes: Float64[np.ndarray, "bins"]) -> float:
    """The share of the uncertainty of a yes or no that a column tells: I(bin; answer) / H(answer).

    I is the estimate from counts, less its bias of about (bins − 1) / 2n (Miller, 1955). 0 where a
    G-test at the level of 0.001 does not tell it from chance, and with fewer than 30 answers of a
    kind.

    Args:
      all_: the number of answers in each bin of the column.
      yes: how many of these are yes.

    >>> round(share_told(np.array([100.0, 100.0]), np.array([0.0, 100.0])), 2)
    1.0
    >>> share_told(np.array([100.0, 100.0]), np.array([50.0, 50.0]))
    0.0
    """
    counts = np.stack([all_ - yes, yes], axis=1)[all_ > 0]
    number, answer = counts.sum(), counts.sum(axis=0)
    if not len(counts) or answer.min() < _LEAST_ANSWERS:
        return 0.0
    independent = counts.sum(axis=1, keepdims=True) * answer / number
    held = counts > 0
    shared = float((counts[held] * np.log(counts[held] / independent[held])).sum())
    freedom = len(counts) - 1
    if not freedom or scipy.stats.chi2.sf(2 * shared, freedom) > _LEVEL:
        return 0.0
    entropy = -float((answer * np.log(answer / number)).sum())
    return max(shared - freedom / 2, 0.0) / entropy


def remarks_of(told: Mapping[str, float], feature: str) -> list[str]:
    """A sentence on each answer that a feature tells too much of."""
    return [
        f"Feature {feature!r} tells {share:.0%} of the uncertainty "
        + ("which candidates were shown" if name == SHOWN else f"of the {name}")
        + ": is it known before they are ranked?"
        for name, share in told.items()
    ]
