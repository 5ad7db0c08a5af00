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
from kd_ranker.sources.logs.typed import number_of

SHOWN = "shown"
# Shares of the uncertainty of what was shown, and of a label, that no honest feature tells. What
# ranked the candidates may be known before, and tells much of what was shown.
TELLS_SHOWN, TELLS_LABEL = 0.9, 0.5
# Least rank correlation of a copy of a teacher's score. Scores of earlier stages agree less.
_COPIES_TEACHER = 0.95
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

    A feature in the order of a teacher's score has that teacher, with the rank correlation.

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
    teachers = {f"teacher of {task}": f"teacher:{task}" for task in layout.scored_tasks}
    kept = (*features.values(), *answers, "number", *teachers.values())
    rows = engine.keep("some_candidates", rows.select(*kept))
    cells = cells_of(rows, list(features.values()), *answers)
    told = shares_told(engine, rows, cells, list(features.values()), list(answers))
    limit = {name: TELLS_SHOWN if name == SHOWN else TELLS_LABEL for name in answers}
    dense = [f"feature:{of.name}" for of in layout.of(*OWNERS, kind="dense") if of.place is None]
    copies = copies_of_teachers(engine, rows, "number", dense, teachers)
    return {
        name: {answer: share for answer, share in told[column].items() if share >= limit[answer]}
        | copies.get(column, {})
        for name, column in features.items()
    }


def copies_of_teachers(
    engine: Engine,
    rows: ir.Table,
    request: str,
    columns: Sequence[str],
    teachers: Mapping[str, str],
) -> dict[str, dict[str, float]]:
    """Column -> teacher whose score has the same order -> Spearman's correlation within requests.

    Args:
      engine: the engine of the rows.
      rows: candidates; they are fetched.
      request: the column that is the same in all candidates of a request.
      columns: columns of numbers.
      teachers: name -> column of scores, null where a candidate was not scored.
    """
    if not columns or not teachers:
        return {}
    numbers = {name: number_of(rows[name]) for name in (*columns, *teachers.values())}
    table = engine.fetch(rows.select(rows[request], **numbers)).to_pandas()
    copies: dict[str, dict[str, float]] = {}
    for teacher, score in teachers.items():
        scored = table[table[score].notna()]
        ranks = scored.groupby(request).rank()
        ranks -= ranks.groupby(scored[request]).transform("mean")
        enough = ranks.columns[ranks.notna().sum() >= _LEAST_ANSWERS]
        found = ranks[enough.intersection(columns)].corrwith(ranks[score]).abs()
        for column, correlation in found[found >= _COPIES_TEACHER].items():
            copies.setdefault(str(column), {})[teacher] = float(correlation)
    return copies


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
    sentences = []
    for name, share in told.items():
        what = f"tells {share:.0%} of the uncertainty of the {name}"
        if name == SHOWN:
            what = f"tells {share:.0%} of the uncertainty which candidates were shown"
        elif name.startswith("teacher"):
            what = f"orders candidates like the {name} (rank correlation {share:.2f})"
        sentences.append(f"Feature {feature!r} {what}: is it known before they are ranked?")
    return sentences
