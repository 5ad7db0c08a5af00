"""Counts of values that are missing, or none that their columns can hold.

A feature of an item is counted once an item, one of a user or the context once a request, as it is
used; all else once a row of the log, or once a candidate.
"""

import operator
from collections.abc import Callable, Sequence

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import LARGEST, Feature, LogLayout
from kd_ranker.sources.logs.numbered import Numbered
from kd_ranker.sources.logs.typed import (
    code_of,
    id_of,
    is_other_version,
    number_of,
    raw_name,
    seconds_of,
)

# Numbers of values of a column: all, the missing, the impossible, and those of lists too long.
FAULTS = ("values", "missing", "out_of_range", "cut_off")
OTHER_VERSION = "other_version"


Counts = dict[str, ir.Value]
"""Of a column: the numbers of `FAULTS` that it can have."""


def count_faults(
    engine: Engine,
    layout: LogLayout,
    log: ir.Table,
    unfolded: ir.Table,
    numbered: Numbered | None,
) -> tuple[dict[str, dict[str, int]], int]:
    """The faults by the names of columns in the config, and how many are of another version.

    The latter are candidates with values of a teacher that does not count.

    Args:
      engine: what has read the log.
      layout: of the log.
      log: its rows.
      unfolded: its candidates.
      numbered: its items and requests; None if none are used: their features are not counted.
    """
    of_rows, of_candidates = _of_rows(layout, log), _of_candidates(layout, unfolded)
    if layout.by_request:
        found = _worked_out(engine, log, of_rows)
        found |= _worked_out(engine, unfolded, of_candidates)
    else:
        # One pass for both: they are the same rows.
        found = _worked_out(engine, unfolded, _of_rows(layout, unfolded) | of_candidates)
    for table, owners in (
        ((numbered.items, ("item",)), (numbered.requests, ("user", "context"))) if numbered else ()
    ):
        found |= _worked_out(engine, table, _of_features(layout.of(*owners), table, raw_name))
    other_version = found.pop(OTHER_VERSION, {OTHER_VERSION: 0})[OTHER_VERSION]
    faults = {name: {of: counts.get(of, 0) for of in FAULTS} for name, counts in found.items()}
    return faults, other_version


def _worked_out(
    engine: Engine, table: ir.Table, asked: dict[str, Counts]
) -> dict[str, dict[str, int]]:
    """The counts of all columns, from one pass over a table."""
    if not asked:
        return {}
    flat = {(name, fault): of for name, counts in asked.items() for fault, of in counts.items()}
    (row,) = engine.fetch(table.agg(**{"/".join(key): of for key, of in flat.items()})).to_pylist()
    found: dict[str, dict[str, int]] = {name: {} for name in asked}
    for name, fault in flat:
        found[name][fault] = int(row[f"{name}/{fault}"] or 0)
    return found


def _of_rows(layout: LogLayout, log: ir.Table) -> dict[str, Counts]:
    """The columns that have a value a row of the log."""
    columns = layout.columns
    time = log[columns["time"]]
    seconds = seconds_of(time, layout.units_per_second)
    ids = {of: _ids(log[columns[of]]) for of in ("request", "user") if of in columns}
    return {
        **{f"columns.{of}": counts for of, counts in ids.items()},
        "columns.time": _counts(time, time, seconds.isnull() & time.notnull()),
    }


def _of_candidates(layout: LogLayout, unfolded: ir.Table) -> dict[str, Counts]:
    """The columns that have a value a candidate."""
    of = {use: unfolded[column] for use, column in layout.columns.items()}
    asked = {"columns.item": _ids(of["item"])}
    if "stage" in of:
        unknown = code_of(of["stage"], layout.stages) == 0
        asked["columns.stage"] = _counts(of["stage"], of["stage"], unknown)
    ranges = dict.fromkeys(("position", "label_weight", "teacher_weight"), (0.0, LARGEST))
    ranges["incumbent"] = (0.0 if layout.incumbent_signal == "rank" else -LARGEST, LARGEST)
    # Only those of shown candidates are read, and source.py judges them.
    ranges["propensity"] = (-LARGEST, LARGEST)
    for use, (low, high) in ranges.items():
        if use in of:
            asked[f"columns.{use}"] = _numbers(of[use], low, high)
    for task, name in layout.labels.items():
        number = number_of(unfolded[name])
        asked[f"labels.{task}"] = _counts(unfolded[name], number, ~number.isin((0, 1)))
    for task in layout.scored_tasks:
        teacher = unfolded[layout.teacher[task]]
        asked[f"teacher.{task}"] = _numbers(teacher, 0, layout.highest_teacher_value)
    asked |= _of_features(layout.of("candidate"), unfolded, operator.attrgetter("column"))
    return asked | _of_versions(layout, unfolded)


def _of_features(
    features: Sequence[Feature], table: ir.Table, column: Callable[[Feature], str]
) -> dict[str, Counts]:
    counts = {}
    for feature in features:
        value = table[column(feature)]
        if feature.place is not None:
            of = _vectors(value, feature.length)
        elif feature.kind == "dense":
            of = _numbers(value, -LARGEST, LARGEST)
        else:
            of = _ids(value) if feature.kind == "category" else _lists(value, feature.length)
        counts[f"features.{feature.key}"] = of
    return counts


def _of_versions(layout: LogLayout, unfolded: ir.Table) -> dict[str, Counts]:
    """The candidates with values of another teacher than the one that counts."""
    column = layout.columns.get("teacher_version")
    if not (column and layout.teacher_version and layout.teacher):
        return {}
    written = [number_of(unfolded[name]).notnull() for name in layout.teacher.values()]
    other = is_other_version(layout, unfolded[column]) & ibis.or_(*written)
    return {OTHER_VERSION: {OTHER_VERSION: other.sum()}}


def _counts(value: ir.Value, known: ir.Value, bad: ir.BooleanValue | None = None) -> Counts:
    """Counts values that are missing, and those that are there and none that a column can hold."""
    if bad is None:
        return {"values": value.isnull().count(), "missing": known.isnull().sum()}
    bad = bad.fill_null(False)
    missing = (known.isnull() & ~bad).sum()
    return {"values": value.isnull().count(), "missing": missing, "out_of_range": bad.sum()}


def _ids(value: ir.Value) -> Counts:
    known = id_of(value)
    if not value.type().is_floating():
        return _counts(value, known)
    return _counts(value, known, known.isnull() & value.notnull() & ~value.isnan())


def _numbers(value: ir.Value, low: float, high: float) -> Counts:
    number = number_of(value)
    return _counts(value, number, (number < low) | (number > high))


def _vectors(vectors: ir.ArrayValue, length: int) -> Counts:
    return _counts(vectors, vectors, vectors.length() != length)


def _lists(lists: ir.ArrayValue, length: int) -> Counts:
    known = lists.map(id_of).filter(lambda value: value.notnull())
    kept = ibis.coalesce(known.length(), 0)
    return {
        "values": lists.isnull().count(),
        "missing": (kept == 0).sum(),
        "out_of_range": (ibis.coalesce(lists.length(), 0) - kept).sum(),
        "cut_off": ibis.greatest(kept - length, 0).sum(),
    }
