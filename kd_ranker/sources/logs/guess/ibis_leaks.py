"""Columns that tell nearly alone what a ranker is to foretell, and so may be known only later."""

from collections.abc import Mapping, Sequence

import ibis
import ibis.expr.types as ir
import numpy as np
from ibis import _

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.leaks import share_told

_COPIES_TEACHER = 0.95
_BINS, _FEW_VALUES = 20, 50
_LEAST_ANSWERS = 30


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


def number_of(value: ir.Value) -> ir.FloatingValue:
    """A number, or none: NaN is none."""
    if value.type().is_null():
        return ibis.null("float64")
    if value.type().is_boolean():
        value = value.cast("int8")
    number = value.cast("float64")
    return ibis.ifelse(number.isnan(), None, number) if value.type().is_floating() else number


def code_of(value: ir.Value, codes: Mapping[str, int]) -> ir.IntegerValue:
    """The code of a text, a whole number or a truth value; 0 for one without a code."""
    if value.type().is_boolean():
        value = ibis.ifelse(value, "True", "False")
    text = value.cast("string")
    return ibis.cases(*((text == of, code) for of, code in codes.items()), else_=0).cast("int8")
