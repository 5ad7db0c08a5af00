"""The rows of a log as the config names them: a row a candidate, each value of its type or none.

A candidate has `file`, `row` and `place` (where it was in the log; -1 for the place where a row is
a candidate), `request`, `user` and `item` (ids), `time` (seconds), `stage` (0: none that the config
names), `position`, `label:<task>` (-1: none, -2: no label), `label_weight`, `teacher:<task>`,
`teacher_weight`, and of each feature the value as the log has it. Where the log has them, it also
has `incumbent` (a score, higher first) and `propensity` (any number). With a split by a column it
has `logged_split`, the place in `SPLITS` (-1: none of them).
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from kd_ranker.batch import Stage
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LARGEST, Feature, LogLayout
from kd_ranker.sources.logs.reasons import Reason

# Before the names of the log's columns on the engine.
PREFIX = "log:"
# Beyond these, a float is not the whole number that was meant.
_EXACT = {dt.Float32: 2.0**24, dt.Float64: 2.0**53, dt.Float16: 2.0**11}
# What ids and categories may be, in words.
NUMBERS, TEXTS = "whole numbers", "texts"
# Seconds since 1970 that NumPy and TFDS hold alike, some 30,000 years.
_LATEST = 10**12


def id_of(value: ir.Value) -> ir.Value:
    """An id, or none: whole numbers, truth values and texts are ids; "" is none."""
    kind = value.type()
    if kind.is_string():
        return value.nullif("")
    if kind.is_binary():
        return value.cast("string").nullif("")
    if kind.is_boolean():
        return value.cast("int64")
    if kind.is_floating():
        # DuckDB's `floor` fails on NaN, which it sorts above all numbers, and on large numbers.
        value = ibis.ifelse(value.abs() <= _EXACT[type(kind)], value, None)
        return ibis.ifelse(value.floor() == value, value, None).cast("int64")
    # As which Spark reads numbers of 64 bits without a sign.
    return value if kind == dt.uint64 or kind.is_decimal() else value.cast("int64")


def kind_of(type_: dt.DataType) -> str:
    """A name for the ids that a type, or lists of it, hold: `NUMBERS`, `TEXTS`, "" if unknown."""
    while type_.is_array():
        type_ = type_.value_type
    if type_.is_null():
        return ""
    return TEXTS if type_.is_string() or type_.is_binary() else NUMBERS


def number_of(value: ir.Value) -> ir.FloatingValue:
    """A number, or none: NaN is none."""
    if value.type().is_null():
        return ibis.null("float64")
    if value.type().is_boolean():
        value = value.cast("int8")
    number = value.cast("float64")
    return ibis.ifelse(number.isnan(), None, number) if value.type().is_floating() else number


def seconds_of(value: ir.Value, units_per_second: int) -> ir.IntegerValue:
    """Seconds since 1970 (UTC), rounded down, or none."""
    kind = value.type()
    if kind.is_date() or kind.is_timestamp():
        seconds = value.cast("timestamp").truncate("s").epoch_seconds().cast("int64")
    elif kind.is_integer():
        # Not by way of floats, which would move nanoseconds.
        units = value.cast("int64")
        left = (units % units_per_second + units_per_second) % units_per_second
        seconds = ((units - left) / units_per_second).cast("int64")
    else:
        number = number_of(value) / units_per_second
        seconds = ibis.ifelse(number.abs() <= _LATEST, number, None).floor().cast("int64")
    return ibis.ifelse(seconds.abs() <= _LATEST, seconds, None)


def code_of(value: ir.Value, codes: Mapping[str, int]) -> ir.IntegerValue:
    """The code of a text, a whole number or a truth value; 0 for one without a code."""
    if value.type().is_boolean():
        value = ibis.ifelse(value, "True", "False")
    text = value.cast("string")
    return ibis.cases(*((text == of, code) for of, code in codes.items()), else_=0).cast("int8")


def features_of(
    table: ir.Table,
    features: Sequence[Feature],
    column: Callable[[Feature], str] = operator.attrgetter("column"),
) -> dict[str, ir.Value]:
    """`feature:<name>` -> the value: a number, an id, or a list of ids, cut to its length.

    Args:
      table: holds the features as the log has them.
      features: which.
      column: gives the name of a feature's column in the table; by default that of the log.
    """
    return {f"feature:{of.name}": _feature(of, table[column(of)]) for of in features}


def raw_name(feature: Feature) -> str:
    """The name of a feature's column of the log beside what has names of its own."""
    return f"raw:{feature.column}"


def _feature(feature: Feature, value: ir.Value) -> ir.Value:
    if feature.kind == "dense":
        if feature.place is not None:
            value = ibis.ifelse(value.length() == feature.length, value[feature.place], None)
        number = number_of(value)
        return ibis.ifelse(number.abs() <= LARGEST, number, None)
    if feature.kind == "category":
        return id_of(value)
    ids = value.map(id_of).filter(lambda each: each.notnull())
    # The most recent events stand last in a history; a bag has no order, so its first will do.
    return ids[-feature.length :] if feature.kind == "history" else ids[: feature.length]


def _any(conditions: Iterable[ir.BooleanValue]) -> ir.BooleanValue:
    """True where any holds; what is unknown does not."""
    return reduce(operator.or_, (of.fill_null(False) for of in conditions), ibis.literal(False))


def open_rows(
    engine: Engine, log: Log, layout: LogLayout
) -> tuple[LogLayout, ir.Table, ir.Table, ir.Table | None]:
    """The layout with the names of columns on the engine, all rows of a log, and `unfold` of these.

    Raises:
      UserError: a file is damaged.
    """
    if layout.engine == "duckdb":  # Spark looks itself
        files.check_pages(log, {of.column for of in files.wanted_columns(layout)}, layout.processes)
    # So that no column of the log has the name of one that is made here.
    rows, own = engine.view("log", engine.read(log, PREFIX)), layout.with_prefix(PREFIX)
    unfolded, without_any = unfold(rows, own)
    return own, rows, engine.view("unfolded", unfolded), without_any


def unfold(log: ir.Table, layout: LogLayout) -> tuple[ir.Table, ir.Table | None]:
    """The columns of a log that the config names, a row a candidate, and the rows without any.

    Returns:
      The candidates: `file`, `row`, `place`, and columns by their names in the log. And `file`,
      `row`, `entries` and `reason` of rows whose candidates cannot be told; None where each row is
      a candidate.
    """
    wanted = files.wanted_columns(layout)
    names = list(dict.fromkeys(of.column for of in wanted))
    if not layout.by_request:
        return log.select("file", "row", *names, place=ibis.literal(-1, "int64")), None
    item = layout.columns["item"]
    candidates = {of.column for of in wanted if of.per_candidate and of.column != item}
    listed = [name for name in names if name in candidates and log[name].type().is_array()]
    length = ibis.coalesce(log[item].length(), 0)
    reason = ibis.cases(
        (length == 0, int(Reason.NO_CANDIDATES)),
        (_any(log[name].length() != length for name in listed), int(Reason.LISTS_DIFFER)),
        else_=0,
    )
    rows = log.select("file", "row", *names, entries=length, reason=reason.cast("int8"))
    bad = rows.filter(rows.reason > 0)
    bad = bad.select("file", "row", "reason", entries=ibis.greatest(bad.entries, 1))
    good = rows.filter(rows.reason == 0)
    # A list that is missing is one of missing values, which a shorter list is filled up with.
    empty = {name: ibis.literal([], type=good[name].type()) for name in listed}
    lists = [good[item], *(good[name].fill_null(empty[name]) for name in listed)]
    each = ibis.range(good.entries).zip(*lists).unnest()
    scalars = [name for name in names if name not in (item, *listed)]
    unfolded = good.select("file", "row", *scalars, each=each)
    fields = enumerate(("place", item, *listed), 1)
    values = {name: unfolded.each[f"f{number}"] for number, name in fields}
    return unfolded.mutate(**values).drop("each"), bad


def typed(unfolded: ir.Table, layout: LogLayout) -> ir.Table:
    """The candidates of `unfold`, each value of its type, and the `reason` of those to reject."""
    of = {name: unfolded[column] for name, column in layout.columns.items()}
    labels = {
        f"label:{task}": _label(unfolded[layout.labels[task]])
        if task in layout.labels
        else ibis.literal(-1, "int8")
        for task in layout.tasks
    }
    time = seconds_of(of["time"], layout.units_per_second) if "time" in of else ibis.literal(0)
    teacher = {
        f"teacher:{task}": number_of(unfolded[layout.teacher[task]]) for task in layout.scored_tasks
    }
    position = _within(number_of(of["position"]), 0) if "position" in of else ibis.null("float64")
    rows = unfolded.select(
        *("file", "row", "place"),
        **features_of(unfolded, layout.of("candidate")),
        request=id_of(of["request"]),
        # Without users, all requests are of one.
        user=id_of(of["user"]) if "user" in of else ibis.literal(0, "int64"),
        item=id_of(of["item"]),
        time=time.cast("int64"),
        position=position.cast("float32"),
        **labels,
        **{name: _in_32_bits(value) for name, value in teacher.items()},
        label_weight=_label_weight(of),
        teacher_weight=_teacher_weight(layout, of, teacher.values()),
        stage=_stage(layout, of, position, labels.values(), teacher.values()),
        **_facts(layout, of),
        **({"logged_split": _logged_split(of["split"])} if "split" in of else {}),
    )
    faults = {
        Reason.MISSING_REQUEST: rows.request.isnull(),
        Reason.MISSING_TIME: rows.time.isnull(),
        Reason.MISSING_USER: rows.user.isnull(),
        Reason.MISSING_ITEM: rows.item.isnull(),
        Reason.UNKNOWN_STAGE: rows.stage == 0,
        Reason.BAD_LABEL: _any(rows[name] < -1 for name in labels),
    }
    cases = ((fault, int(reason)) for reason, fault in sorted(faults.items()))
    return rows.mutate(reason=ibis.cases(*cases, else_=0).cast("int8"))


def _within(number: ir.FloatingValue, low: float) -> ir.FloatingValue:
    """A number if it lies in [low, the largest of 32 bits], else none."""
    return ibis.ifelse((number >= low) & (number <= LARGEST), number, None)


def _label(value: ir.Value) -> ir.IntegerValue:
    number = number_of(value)
    label = ibis.cases((number.isnull(), -1), (number == 0, 0), (number == 1, 1), else_=-2)
    return label.cast("int8")


def _stage(
    layout: LogLayout,
    of: Mapping[str, ir.Value],
    position: ir.FloatingValue,
    labels: Iterable[ir.IntegerValue],
    teacher: Iterable[ir.FloatingValue],
) -> ir.IntegerValue:
    if "stage" in of:
        return ibis.coalesce(code_of(of["stage"], layout.stages), 0).cast("int8")
    shown = position.notnull() | _any(label != -1 for label in labels)
    passed = _any(value.notnull() for value in teacher)
    stage = ibis.cases(
        (shown, int(Stage.SHOWN)), (passed, int(Stage.PASSED)), else_=int(Stage.RETRIEVED)
    )
    return stage.cast("int8")


def _facts(layout: LogLayout, of: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """The columns for the evaluation that the log has."""
    facts: dict[str, ir.Value] = {}
    if "incumbent" in of:
        number = number_of(of["incumbent"])
        by_rank = layout.incumbent_signal == "rank"
        number = -_within(number, 0) if by_rank else _within(number, -LARGEST)
        facts["incumbent"] = number.cast("float32")
    if "propensity" in of:
        facts["propensity"] = _in_32_bits(number_of(of["propensity"]))
    return facts


def _logged_split(value: ir.Value) -> ir.IntegerValue:
    codes = {split: place for place, split in enumerate(SPLITS, start=1)}
    return (ibis.coalesce(code_of(value, codes), 0) - 1).cast("int8")


def _label_weight(of: Mapping[str, ir.Value]) -> ir.FloatingValue:
    """1 where the log names none; 0 where it names nonsense."""
    weight: ir.Value = ibis.literal(1.0)
    if "label_weight" in of:
        number = number_of(of["label_weight"])
        weight = ibis.ifelse(number.isnull(), 1.0, ibis.coalesce(_within(number, 0), 0.0))
    return weight.cast("float32")


def weight_of_labels(rows: ir.Table, layout: LogLayout) -> ir.FloatingValue:
    """The label weight of rows of `typed`; 0 where a label is lacking."""
    lacks = _any(rows[f"label:{task}"] < 0 for task in layout.labels)
    return ibis.ifelse(lacks, 0.0, rows.label_weight).cast("float32")


def _teacher_weight(
    layout: LogLayout, of: Mapping[str, ir.Value], teacher: Iterable[ir.FloatingValue]
) -> ir.FloatingValue:
    """1 or as the log says; 0 for nonsense, and for another version than the one that counts."""
    weight: ir.Value = ibis.literal(1.0)
    if "teacher_weight" in of:
        weight = ibis.coalesce(_within(number_of(of["teacher_weight"]), 0), 0.0)
    if layout.teacher_version and "teacher_version" in of and layout.teacher:
        weight = ibis.ifelse(is_other_version(layout, of["teacher_version"]), 0.0, weight)
    return weight.cast("float32")


def is_other_version(layout: LogLayout, version: ir.Value) -> ir.BooleanValue:
    """True for a version of the teacher that does not count."""
    return (code_of(version, {layout.teacher_version: 1}) != 1).fill_null(True)


def _in_32_bits(number: ir.FloatingValue) -> ir.FloatingValue:
    """A number in half the memory; one too large for it is infinite there."""
    infinite = ibis.ifelse(number > 0, float("inf"), float("-inf"))
    return ibis.ifelse(number.abs() > LARGEST, infinite, number).cast("float32")
