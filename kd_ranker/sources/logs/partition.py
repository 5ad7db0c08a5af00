"""The second pass over a log, which reads all its columns and sorts its rows into buckets on disk.

What is wrong with a row by itself is found here. The others are written to runs, files sorted by
bucket: a table of rows, one a candidate, and one of heads, which hold what belongs to a request.

A row has the columns `file`, `row` and `place` (where it was in the log), `request`, `time` (of the
request), `user` and `item` (keys), `moved` (whether its own time is another), `stage`, `position`
(NaN: none), `label_weight`, `label:<task>`, `teacher_weight`, `teacher:<task>` (NaN: none) and
`feature:<name>` of item and candidate. A head has `request`, `user`, and `feature:<name>` of user
and context. A feature is a number (NaN: none), a key, or a list of keys.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int64

from kd_ranker.batch import Stage
from kd_ranker.sources.logs import files, values
from kd_ranker.sources.logs.files import Log, Part
from kd_ranker.sources.logs.keys import MISSING, keys_of
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.merging import Merger
from kd_ranker.sources.logs.named_columns import (
    NamedColumns,
    Ragged,
    Run,
    concatenate,
    num_rows,
    places_of,
    starts_of,
    take_rows,
    write_run,
)
from kd_ranker.sources.logs.plan import BucketPlan, load_plan, look_up_requests
from kd_ranker.sources.logs.reasons import (
    Reason,
    Rejected,
    count_by_reason,
    rejected_records,
    save_rejected,
)

# Of a column: how many values were looked at, were missing, were no values, did not fit in.
FAULTS = ("values", "missing", "out_of_range", "cut_off")
# Beyond it, a number has no place in 32 bits.
_LARGEST = float(np.finfo(np.float32).max)


class Partitioned(NamedTuple):
    """What the second pass makes of some parts.

    Attributes:
      candidates: runs with a row a candidate, in the order of the log.
      requests: runs with the rows that hold what belongs to a request, likewise.
      rejected: the path of records of what was rejected.
      counts: how many candidates each reason has cost.
      faults: what the config names, such as `features.age` -> `FAULTS`.
      other_version: how many candidates have teacher values of a version that does not count.
      texts: `user`, `item` or `feature:<name>`, where these are texts -> a file with the texts and
        their keys.
    """

    candidates: list[Run]
    requests: list[Run]
    rejected: str
    counts: Int64[np.ndarray, "reasons"]
    faults: dict[str, Int64[np.ndarray, "4"]]
    other_version: int
    texts: dict[str, str]


@dataclasses.dataclass
class _Found:
    """What adds up while batches are read; the attributes are those of `Partitioned`."""

    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    faults: dict[str, Int64[np.ndarray, "4"]] = dataclasses.field(default_factory=dict)
    other_version: int = 0
    texts: dict[str, Merger[pa.Table]] = dataclasses.field(default_factory=dict)

    def add_faults(self, name: str, looked_at: int, *counts: int) -> None:
        numbers = np.array([looked_at, *counts, *[0] * (3 - len(counts))])
        self.faults[name] = self.faults.get(name, 0) + numbers

    def add_texts(self, name: str, texts: pa.Array | None, key: Int64[np.ndarray, "n"]) -> None:
        if texts is not None and len(texts):
            table = pa.table({"key": key, "text": texts})
            gathered = self.texts.setdefault(name, Merger(_distinct_texts, len))
            gathered.add(table)


class _Source(NamedTuple):
    """A batch, and where each candidate lies in it.

    Attributes:
      batch: the batch.
      parent: the row of each candidate.
      place: its place in the row's lists; None where a row is a candidate.
    """

    batch: pa.RecordBatch
    parent: Int64[np.ndarray, "n"]
    place: Int64[np.ndarray, "n"] | None

    def of_candidates(self, column: str) -> pa.Array:
        """A column's value for each candidate."""
        array = self.batch.column(column)
        if self.place is None:
            return array
        if not files.is_list(array.type):
            return array.take(pa.array(self.parent))
        start, _, valid, inner = values.lists_of(array)
        return values.take_values(inner, start[self.parent] + self.place, valid[self.parent])


def partition_parts(
    log: Log, layout: LogLayout, plan_folder: Path, parts: Sequence[Part], folder: Path, name: str
) -> Partitioned:
    """Partitions some parts; `name` tells what is written to `folder` from that of other parts."""
    plan = load_plan(plan_folder)
    columns = [wanted.column for wanted in files.wanted_columns(layout)]
    found = _Found()
    runs: dict[str, list[Run]] = {"candidates": [], "requests": []}
    waiting: dict[str, list[NamedColumns]] = {"candidates": [], "requests": []}

    def flush() -> None:
        for kind, tables in waiting.items():
            table = concatenate(tables)
            tables.clear()
            bucket = table.pop("bucket")
            path = folder / f"{kind}-{name}-{len(runs[kind])}.arrow"
            runs[kind].append(write_run(path, table, np.asarray(bucket)))

    for file, first_row, batch in files.read_parts(log, parts, columns):
        candidates, requests = _read_batch(layout, plan, file, first_row, batch, found)
        if num_rows(candidates):
            waiting["candidates"].append(candidates)
            waiting["requests"].append(requests)
        if sum(map(num_rows, waiting["candidates"])) >= layout.bucket_rows:
            flush()
    if waiting["candidates"]:
        flush()
    path = save_rejected(folder / f"rejected-{name}.npy", found.rejected)
    return Partitioned(
        candidates=runs["candidates"],
        requests=runs["requests"],
        rejected=path,
        counts=count_by_reason(np.load(path)),
        faults=found.faults,
        other_version=found.other_version,
        texts=_write_texts(found.texts, folder, name),
    )


def _read_batch(
    layout: LogLayout,
    plan: BucketPlan,
    file: int,
    first_row: int,
    batch: pa.RecordBatch,
    found: _Found,
) -> tuple[NamedColumns, NamedColumns]:
    """The rows and the heads of a batch, with their `bucket`; what is rejected goes to `found`."""
    columns = layout.columns
    source = _candidates(layout, file, first_row, batch, found)
    parent = source.parent

    request = keys_of(batch.column(columns["request"]))
    user = keys_of(batch.column(columns["user"]))
    item = keys_of(source.of_candidates(columns["item"]))
    time, timed = values.seconds_of(batch.column(columns["time"]), layout.units_per_second)
    for name, keys in (("request", request), ("user", user), ("item", item)):
        missing = int((keys.key == MISSING).sum())
        found.add_faults(f"columns.{name}", len(keys.key), missing - keys.num_bad, keys.num_bad)
    nulls = batch.column(columns["time"]).null_count
    found.add_faults("columns.time", len(time), nulls, int((~timed).sum()) - nulls)
    found.add_texts("user", user.texts, user.text_keys)
    found.add_texts("item", item.texts, item.text_keys)

    bucket, request_time = look_up_requests(plan, request.key)
    label = {task: _label(layout, source, task, found) for task in layout.tasks}
    teacher = _teacher(layout, source, found)
    position = _position(layout, source, found)
    stage, unknown_stage = _stage(layout, source, position, label, teacher, found)

    reason = np.zeros(len(parent), np.int8)
    for why, applies in (
        (Reason.REQUEST_TOO_LARGE, (bucket < 0)[parent]),
        (Reason.BAD_LABEL, np.any([column < -1 for column in label.values()], axis=0)),
        (Reason.UNKNOWN_STAGE, unknown_stage),
        (Reason.MISSING_ITEM, item.key == MISSING),
        (Reason.MISSING_USER, (user.key == MISSING)[parent]),
        (Reason.MISSING_TIME, ~timed[parent]),
        (Reason.MISSING_REQUEST, (request.key == MISSING)[parent]),
    ):
        # The last one to be written is the first of the enumeration.
        reason[applies] = why
    places = np.full(len(parent), -1) if source.place is None else source.place
    bad = np.flatnonzero(reason)
    found.rejected.append(
        rejected_records(file, first_row + parent[bad], places[bad], 1, reason[bad])
    )

    rows: NamedColumns = {
        "bucket": bucket[parent].astype(np.int32),
        "file": np.full(len(parent), file, np.int32),
        "row": first_row + parent,
        "place": places.astype(np.int32),
        "request": request.key[parent],
        "time": request_time[parent],
        "user": user.key[parent],
        "item": item.key,
        "moved": (time != request_time)[parent].astype(np.int8),
        "stage": stage,
        "position": position,
        "label_weight": _label_weight(layout, source, label, found),
        "teacher_weight": _teacher_weight(layout, source, teacher, found),
    }
    rows |= {f"label:{task}": column for task, column in label.items()}
    rows |= {f"teacher:{task}": column for task, column in teacher.items()}
    for feature in layout.of("item", "candidate"):
        array = source.of_candidates(feature.column)
        rows[f"feature:{feature.name}"] = _feature(feature, array, found)
    good = np.flatnonzero(reason == 0)
    rows = take_rows(rows, good)
    return rows, _request_rows(layout, batch, parent[good], rows, found)


def _candidates(
    layout: LogLayout, file: int, first_row: int, batch: pa.RecordBatch, found: _Found
) -> _Source:
    """Where the candidates of a batch lie; rows without any that can be told apart are rejected."""
    if not layout.by_request:
        return _Source(batch, np.arange(batch.num_rows), None)
    _, length, _, _ = values.lists_of(batch.column(layout.columns["item"]))
    reason = np.where(length == 0, Reason.NO_CANDIDATES, 0)
    for wanted in files.wanted_columns(layout):
        array = batch.column(wanted.column)
        if wanted.per_candidate and files.is_list(array.type):
            _, other, valid, _ = values.lists_of(array)
            reason[(reason == 0) & valid & (other != length)] = Reason.LISTS_DIFFER
    bad = np.flatnonzero(reason)
    found.rejected.append(
        rejected_records(file, first_row + bad, -1, np.maximum(length[bad], 1), reason[bad])
    )
    good = np.flatnonzero(reason == 0)
    return _Source(
        batch,
        np.repeat(good, length[good]),
        places_of(np.zeros(len(good), np.int64), length[good]),
    )


def _label(layout: LogLayout, source: _Source, task: str, found: _Found) -> np.ndarray:
    """int8: 0 or 1, -1 where there is none, -2 where it is no label."""
    number = values.numbers_of(source.of_candidates(layout.labels[task]))
    missing = np.isnan(number)
    bad = ~missing & (number != 0) & (number != 1)
    found.add_faults(f"labels.{task}", len(number), int(missing.sum()), int(bad.sum()))
    return np.where(missing, -1, np.where(bad, -2, np.where(bad | missing, 0, number))).astype(
        np.int8
    )


def _teacher(
    layout: LogLayout, source: _Source, found: _Found
) -> dict[str, Float32[np.ndarray, "n"]]:
    """What the log holds of the teacher: probabilities, or positions, as they are there."""
    highest = 1.0 if layout.teacher_signal == "probability" else _LARGEST
    columns = {}
    for task in layout.scored_tasks:
        number = values.numbers_of(source.of_candidates(layout.teacher[task]))
        missing = np.isnan(number)
        bad = (number < 0) | (number > highest)
        found.add_faults(f"teacher.{task}", len(number), int(missing.sum()), int(bad.sum()))
        # What is too large for 32 bits is infinite there, and as bad.
        with np.errstate(over="ignore"):
            columns[task] = number.astype(np.float32)
    return columns


def _position(layout: LogLayout, source: _Source, found: _Found) -> Float32[np.ndarray, "n"]:
    if "position" not in layout.columns:
        return np.full(len(source.parent), np.nan, np.float32)
    number = values.numbers_of(source.of_candidates(layout.columns["position"]))
    missing = np.isnan(number)
    bad = (number < 0) | (number > _LARGEST)
    found.add_faults("columns.position", len(number), int(missing.sum()), int(bad.sum()))
    return np.where(bad, np.nan, number).astype(np.float32)


def _stage(
    layout: LogLayout,
    source: _Source,
    position: Float32[np.ndarray, "n"],
    label: dict[str, np.ndarray],
    teacher: dict[str, Float32[np.ndarray, "n"]],
    found: _Found,
) -> tuple[np.ndarray, Bool[np.ndarray, "n"]]:
    """int8, the `Stage` of each candidate, and whether the log names none."""
    if "stage" in layout.columns:
        code = values.codes_of(source.of_candidates(layout.columns["stage"]), layout.stages)
        found.add_faults("columns.stage", len(code), int((code < 0).sum()), int((code == 0).sum()))
        return np.maximum(code, 0).astype(np.int8), code < 1
    none = np.zeros(len(source.parent), bool)
    shown = ~np.isnan(position) | np.any([column != -1 for column in label.values()], axis=0)
    passed = np.any([none, *(~np.isnan(column) for column in teacher.values())], axis=0)
    stage = np.where(shown, Stage.SHOWN, np.where(passed, Stage.PASSED, Stage.RETRIEVED))
    return stage.astype(np.int8), none


def _label_weight(
    layout: LogLayout, source: _Source, label: dict[str, np.ndarray], found: _Found
) -> Float32[np.ndarray, "n"]:
    """1 where the log names none; 0 where it names nonsense, or lacks a label."""
    labelled = np.all([column >= 0 for column in label.values()], axis=0)
    if "label_weight" not in layout.columns:
        return labelled.astype(np.float32)
    number = values.numbers_of(source.of_candidates(layout.columns["label_weight"]))
    missing = np.isnan(number)
    bad = (number < 0) | (number > _LARGEST)
    found.add_faults("columns.label_weight", len(number), int(missing.sum()), int(bad.sum()))
    return np.where(bad | ~labelled, 0, np.where(missing, 1, number)).astype(np.float32)


def _teacher_weight(
    layout: LogLayout,
    source: _Source,
    teacher: dict[str, Float32[np.ndarray, "n"]],
    found: _Found,
) -> Float32[np.ndarray, "n"]:
    """0 where the log says that nothing was written, and of another version than the one asked."""
    weight = np.ones(len(source.parent))
    if "teacher_weight" in layout.columns:
        number = values.numbers_of(source.of_candidates(layout.columns["teacher_weight"]))
        missing = np.isnan(number)
        bad = (number < 0) | (number > _LARGEST)
        found.add_faults("columns.teacher_weight", len(number), int(missing.sum()), int(bad.sum()))
        weight = np.where(bad | missing, 0, number)
    if "teacher_version" in layout.columns and layout.teacher_version and teacher:
        array = source.of_candidates(layout.columns["teacher_version"])
        other = values.codes_of(array, {layout.teacher_version: 1}) != 1
        written = np.any([~np.isnan(column) for column in teacher.values()], axis=0)
        found.other_version += int((other & written).sum())
        weight = np.where(other, 0, weight)
    return weight.astype(np.float32)


def _feature(feature: Feature, array: pa.Array, found: _Found) -> Any:
    """A feature as a column of a table."""
    name = f"features.{feature.name}"
    if feature.kind == "dense":
        number = values.numbers_of(array)
        missing = np.isnan(number)
        bad = np.abs(number) > _LARGEST
        found.add_faults(name, len(number), int(missing.sum()), int(bad.sum()))
        return _narrowed(np.where(bad, np.nan, number))
    if feature.kind == "category":
        keys = keys_of(array)
        missing = keys.key == MISSING
        found.add_faults(name, len(missing), int(missing.sum()) - keys.num_bad, keys.num_bad)
        if not feature.hashed:
            found.add_texts(f"feature:{feature.name}", keys.texts, keys.text_keys)
        return keys.key
    start, length, _, inner = values.lists_of(array)
    keys = keys_of(values.take_values(inner, places_of(start, length)))
    keep = keys.key != MISSING
    kept = np.diff(values.compacted(length, keep))
    # The most recent events stand last in a history; a bag has no order, so its first will do.
    fits = np.minimum(kept, feature.length)
    ends = starts_of(kept)
    first = ends[1:] - fits if feature.kind == "history" else ends[:-1]
    found.add_faults(
        name, len(length), int((kept == 0).sum()), int((~keep).sum()), int((kept - fits).sum())
    )
    if feature.kind == "bag" and not feature.hashed:
        found.add_texts(f"feature:{feature.name}", keys.texts, keys.text_keys)
    return Ragged(starts_of(fits), keys.key[keep][places_of(first, fits)])


def _narrowed(number: Float64[np.ndarray, "n"]) -> np.ndarray:
    """The same numbers in half the memory, where that holds them exactly."""
    narrow = number.astype(np.float32)
    return narrow if np.array_equal(narrow, number, equal_nan=True) else number


def _request_rows(
    layout: LogLayout,
    batch: pa.RecordBatch,
    parent: Int64[np.ndarray, "n"],
    rows: NamedColumns,
    found: _Found,
) -> NamedColumns:
    """What belongs to a request, wherever it is another one than in the row before."""
    scalars = {
        feature.name: _feature(feature, batch.column(feature.column), found)
        for feature in layout.of("user", "context")
        if feature.kind in ("dense", "category")
    }
    starts = np.zeros(len(parent), bool)
    starts[:1] = True
    for column in (rows["request"], rows["user"], *(of[parent] for of in scalars.values())):
        before, after = column[:-1], column[1:]  # type: ignore[index]
        # NaN, the missing number, is the same as NaN.
        starts[1:] |= (before != after) & ((before == before) | (after == after))
    chosen = np.flatnonzero(starts)
    heads = {name: rows[name][chosen] for name in ("bucket", "request", "user")}  # type: ignore[index]
    for feature in layout.of("user", "context"):
        if feature.name in scalars:
            column = scalars[feature.name][parent[chosen]]
        else:
            array = batch.column(feature.column).take(pa.array(parent[chosen]))
            column = _feature(feature, array, found)
        heads[f"feature:{feature.name}"] = column
    return heads


def _distinct_texts(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="permissive")
    _, first = np.unique(table["key"].to_numpy(), return_index=True)
    return table.take(pa.array(first)).combine_chunks()


def _write_texts(texts: dict[str, Merger[pa.Table]], folder: Path, name: str) -> dict[str, str]:
    paths = {}
    for number, (column, gathered) in enumerate(texts.items()):
        paths[column] = str(folder / f"texts-{name}-{number}.arrow")
        table = gathered.result()
        with pa.OSFile(paths[column], "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return paths
