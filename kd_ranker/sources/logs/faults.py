"""Counts of values that are missing, or none that their columns can hold: a pass over the log."""

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.typed import (
    LARGEST,
    code_of,
    id_of,
    is_other_version,
    number_of,
    seconds_of,
)

# Numbers of values of a column: all, the missing, the impossible, and those of lists too long.
FAULTS = ("values", "missing", "out_of_range", "cut_off")
OTHER_VERSION = "other_version"


def count_faults(
    engine: Engine, layout: LogLayout, log: ir.Table, unfolded: ir.Table
) -> tuple[dict[str, dict[str, int]], int]:
    """The faults by the names of columns in the config, and how many are of another version.

    The latter are candidates with values of a teacher that does not count.
    """
    asked: dict[str, dict[str, ir.Value]] = {"log": {}, "unfolded": {}}

    def ask(
        of: str, name: str, value: ir.Value, known: ir.Value, bad: ir.BooleanValue | None = None
    ) -> None:
        """Counts values that are missing, and those that are there and none that it can hold."""
        missing = known.isnull() if bad is None else known.isnull() & ~bad
        numbers = {"values": value.isnull().count(), "missing": missing.sum()}
        if bad is not None:
            numbers["out_of_range"] = bad.sum()
        asked[of] |= {f"{name}/{fault}": number for fault, number in numbers.items()}

    def ask_ids(of: str, name: str, value: ir.Value) -> None:
        known = id_of(value)
        floats = value.type().is_floating()
        bad = known.isnull() & value.notnull() & ~value.isnan() if floats else None
        ask(of, name, value, known, bad)

    def ask_numbers(of: str, name: str, value: ir.Value, low: float, high: float) -> None:
        number = number_of(value)
        ask(of, name, value, number, ((number < low) | (number > high)).fill_null(False))

    columns = layout.columns
    for use in ("request", "user"):
        ask_ids("log", f"columns.{use}", log[columns[use]])
    seconds = seconds_of(log[columns["time"]], layout.units_per_second)
    time = log[columns["time"]]
    ask("log", "columns.time", time, time, seconds.isnull() & time.notnull())
    ask_ids("unfolded", "columns.item", unfolded[columns["item"]])
    if "stage" in columns:
        stage = unfolded[columns["stage"]]
        ask("unfolded", "columns.stage", stage, stage, code_of(stage, layout.stages) == 0)
    for use in ("position", "label_weight", "teacher_weight"):
        if use in columns:
            ask_numbers("unfolded", f"columns.{use}", unfolded[columns[use]], 0, LARGEST)
    for task, name in layout.labels.items():
        number = number_of(unfolded[name])
        bad = ((number != 0) & (number != 1)).fill_null(False)
        ask("unfolded", f"labels.{task}", unfolded[name], number, bad)
    highest = 1.0 if layout.teacher_signal == "probability" else LARGEST
    for task in layout.scored_tasks:
        ask_numbers("unfolded", f"teacher.{task}", unfolded[layout.teacher[task]], 0, highest)
    for feature in layout.features:
        of, table = ("log", log) if feature.of_request else ("unfolded", unfolded)
        name, value = f"features.{feature.name}", table[feature.column]
        if feature.kind == "dense":
            ask_numbers(of, name, value, -LARGEST, LARGEST)
        elif feature.kind == "category":
            ask_ids(of, name, value)
        else:
            asked[of] |= _of_lists(feature, name, value)
    if "teacher_version" in columns and layout.teacher_version and layout.teacher:
        written = [number_of(unfolded[layout.teacher[task]]).notnull() for task in layout.teacher]
        other = is_other_version(layout, unfolded[columns["teacher_version"]])
        asked["unfolded"][OTHER_VERSION] = (other & ibis.or_(*written)).sum()
    found: dict[str, int] = {}
    for of, table in (("log", log), ("unfolded", unfolded)):
        if asked[of]:
            (row,) = engine.fetch(table.agg(**asked[of])).to_pylist()
            found |= {name: int(number or 0) for name, number in row.items()}
    other_version = found.pop(OTHER_VERSION, 0)
    names = dict.fromkeys(name.rpartition("/")[0] for name in found)
    return {
        name: {fault: found.get(f"{name}/{fault}", 0) for fault in FAULTS} for name in names
    }, other_version


def _of_lists(feature: Feature, name: str, lists: ir.ArrayValue) -> dict[str, ir.Value]:
    known = lists.map(id_of).filter(lambda value: value.notnull())
    kept = ibis.coalesce(known.length(), 0)
    return {
        f"{name}/values": lists.isnull().count(),
        f"{name}/missing": (kept == 0).sum(),
        f"{name}/out_of_range": (ibis.coalesce(lists.length(), 0) - kept).sum(),
        f"{name}/cut_off": ibis.greatest(kept - feature.length, 0).sum(),
    }
