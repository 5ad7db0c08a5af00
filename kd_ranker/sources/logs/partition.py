"""The second pass over a log, which reads all its columns and sorts its rows into buckets on disk.

Faults of a row by itself are detected here. The other rows are written to runs, files sorted by
bucket: tables of candidates, a row each, and tables of requests, with a row wherever a request
differs from the one in the row before.

A candidate has the columns `file`, `row` and `place` (where it was in the log), `request`, `time`
(of the request), `user` and `item` (keys), `moved` (1 if its own time is another), `stage`,
`position` (NaN: none), `label_weight`, `label:<task>`, `teacher_weight`, `teacher:<task>` (NaN:
none) and `feature:<name>` of item and candidate. A request has `request`, `user`, and
`feature:<name>` of user and context. A feature is a number (NaN: none), a key, or a list of keys.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int8, Int64

from kd_ranker.batch import Stage
from kd_ranker.sources.logs import files, values
from kd_ranker.sources.logs.files import Log, Part
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.merging import Merger
from kd_ranker.sources.logs.named_columns import (
    NamedColumns,
    Ragged,
    SortedRun,
    array_of,
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
from kd_ranker.sources.logs.value_keys import MISSING, Keys, column_keys

# Numbers of values of a column: all, the missing, the impossible, and those of lists too long.
FAULTS = ("values", "missing", "out_of_range", "cut_off")
# Beyond it, a number has no place in 32 bits.
_LARGEST = float(np.finfo(np.float32).max)


class Partitioned(NamedTuple):
    """Files and numbers that the second pass leaves of some parts of a log.

    Attributes:
      candidates: runs with a row a candidate, in the order of the log.
      requests: runs with the rows of requests, likewise.
      rejected: the path of records of the rejected rows.
      counts: how many candidates each reason has cost.
      faults: name in the config, such as `features.age` -> `FAULTS`.
      other_version: how many candidates have teacher values of a version that does not count.
      texts: `user`, `item` or `feature:<name>`, where these are texts -> a file with the texts and
        their keys.
    """

    candidates: list[SortedRun]
    requests: list[SortedRun]
    rejected: str
    counts: Int64[np.ndarray, "reasons"]
    faults: dict[str, Int64[np.ndarray, "4"]]
    other_version: int
    texts: dict[str, str]


@dataclasses.dataclass
class _Tally:
    """Sums over the batches that were read; the attributes are those of `Partitioned`."""

    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    faults: dict[str, Int64[np.ndarray, "4"]] = dataclasses.field(default_factory=dict)
    other_version: int = 0
    texts: dict[str, Merger[pa.Table]] = dataclasses.field(default_factory=dict)

    def add_faults(self, name: str, looked_at: int, *counts: int) -> None:
        numbers = np.array([looked_at, *counts, *[0] * (3 - len(counts))])
        self.faults[name] = self.faults.get(name, 0) + numbers

    def add_keys(self, name: str, keys: Keys) -> None:
        missing = int((keys.key == MISSING).sum())
        self.add_faults(name, len(keys.key), missing - keys.num_bad, keys.num_bad)

    def add_numbers(
        self, name: str, number: Float64[np.ndarray, "n"], bad: Bool[np.ndarray, "n"]
    ) -> None:
        self.add_faults(name, len(number), int(np.isnan(number).sum()), int(bad.sum()))

    def add_texts(self, name: str, keys: Keys) -> None:
        if keys.texts is not None and len(keys.texts):
            table = pa.table({"key": keys.text_keys, "text": keys.texts})
            self.texts.setdefault(name, Merger(_distinct_texts, len)).add(table)


class _Unfolded(NamedTuple):
    """A batch, and the place of each candidate in it.

    Attributes:
      batch: the batch.
      parent: the row of each candidate.
      place: its place in the row's lists; None where a row is a candidate.
    """

    batch: pa.RecordBatch
    parent: Int64[np.ndarray, "n"]
    place: Int64[np.ndarray, "n"] | None

    def column(self, name: str) -> pa.Array:
        """A column's value for each candidate."""
        array = self.batch.column(name)
        if self.place is None:
            return array
        if not files.is_list(array.type):
            return array.take(pa.array(self.parent))
        start, _, valid, inner = values.lists_of(array)
        return values.take_values(inner, start[self.parent] + self.place, valid[self.parent])


class _Ids(NamedTuple):
    """Keys of a batch; users, requests and times of its rows, items of its candidates."""

    request: Int64[np.ndarray, "rows"]
    user: Int64[np.ndarray, "rows"]
    item: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "rows"]
    has_time: Bool[np.ndarray, "rows"]


def partition_parts(
    log: Log, layout: LogLayout, plan_folder: Path, parts: Sequence[Part], folder: Path, name: str
) -> Partitioned:
    """Partitions some parts; `name` tells what is written to `folder` from that of other parts."""
    plan = load_plan(plan_folder)
    columns = [wanted.column for wanted in files.wanted_columns(layout)]
    tally = _Tally()
    runs: dict[str, list[SortedRun]] = {"candidates": [], "requests": []}
    waiting: dict[str, list[NamedColumns]] = {"candidates": [], "requests": []}

    def flush() -> None:
        for kind, tables in waiting.items():
            table = concatenate(tables)
            tables.clear()
            bucket = table.pop("bucket")
            path = folder / f"{kind}-{name}-{len(runs[kind])}.arrow"
            runs[kind].append(write_run(path, table, np.asarray(bucket)))

    for file, first_row, batch in files.read_parts(log, parts, columns):
        candidates, requests = _read_batch(layout, plan, file, first_row, batch, tally)
        if num_rows(candidates):
            waiting["candidates"].append(candidates)
            waiting["requests"].append(requests)
        if sum(map(num_rows, waiting["candidates"])) >= layout.bucket_rows:
            flush()
    if waiting["candidates"]:
        flush()
    path = save_rejected(folder / f"rejected-{name}.npy", tally.rejected)
    return Partitioned(
        candidates=runs["candidates"],
        requests=runs["requests"],
        rejected=path,
        counts=count_by_reason(np.load(path)),
        faults=tally.faults,
        other_version=tally.other_version,
        texts=_write_texts(tally.texts, folder, name),
    )


def _read_batch(
    layout: LogLayout,
    plan: BucketPlan,
    file: int,
    first_row: int,
    batch: pa.RecordBatch,
    tally: _Tally,
) -> tuple[NamedColumns, NamedColumns]:
    """Candidates and requests of a batch, with their `bucket`; rejected rows go to `tally`."""
    unfolded = _unfold(layout, file, first_row, batch, tally)
    parent = unfolded.parent
    ids = _read_ids(layout, unfolded, tally)
    bucket, request_time = look_up_requests(plan, ids.request)
    label = {task: _label(layout, unfolded, task, tally) for task in layout.tasks}
    teacher = _teacher(layout, unfolded, tally)
    position = _position(layout, unfolded, tally)
    stage, unknown_stage = _stage(layout, unfolded, position, label, teacher, tally)
    reason = _reasons(
        {
            Reason.MISSING_REQUEST: (ids.request == MISSING)[parent],
            Reason.MISSING_TIME: ~ids.has_time[parent],
            Reason.MISSING_USER: (ids.user == MISSING)[parent],
            Reason.MISSING_ITEM: ids.item == MISSING,
            Reason.UNKNOWN_STAGE: unknown_stage,
            Reason.BAD_LABEL: np.any([column < -1 for column in label.values()], axis=0),
            Reason.REQUEST_TOO_LARGE: (bucket < 0)[parent],
        }
    )
    place = np.full(len(parent), -1) if unfolded.place is None else unfolded.place
    bad = np.flatnonzero(reason)
    tally.rejected.append(
        rejected_records(file, first_row + parent[bad], place[bad], 1, reason[bad])
    )
    candidates: NamedColumns = {
        "bucket": bucket[parent].astype(np.int32),
        "file": np.full(len(parent), file, np.int32),
        "row": first_row + parent,
        "place": place.astype(np.int32),
        "request": ids.request[parent],
        "time": request_time[parent],
        "user": ids.user[parent],
        "item": ids.item,
        "moved": (ids.time != request_time)[parent].astype(np.int8),
        "stage": stage,
        "position": position,
        "label_weight": _label_weight(layout, unfolded, label, tally),
        "teacher_weight": _teacher_weight(layout, unfolded, teacher, tally),
    }
    candidates |= {f"label:{task}": column for task, column in label.items()}
    candidates |= {f"teacher:{task}": column for task, column in teacher.items()}
    for feature in layout.of("item", "candidate"):
        array = unfolded.column(feature.column)
        candidates[f"feature:{feature.name}"] = _feature(feature, array, tally)
    good = np.flatnonzero(reason == 0)
    candidates = take_rows(candidates, good)
    return candidates, _request_rows(layout, batch, parent[good], candidates, tally)


def _unfold(
    layout: LogLayout, file: int, first_row: int, batch: pa.RecordBatch, tally: _Tally
) -> _Unfolded:
    """Finds the candidates of a batch; rejects rows without any that can be told apart."""
    if not layout.by_request:
        return _Unfolded(batch, np.arange(batch.num_rows), None)
    _, length, _, _ = values.lists_of(batch.column(layout.columns["item"]))
    reason = np.where(length == 0, Reason.NO_CANDIDATES, 0)
    for wanted in files.wanted_columns(layout):
        array = batch.column(wanted.column)
        if wanted.per_candidate and files.is_list(array.type):
            _, other, valid, _ = values.lists_of(array)
            reason[(reason == 0) & valid & (other != length)] = Reason.LISTS_DIFFER
    bad = np.flatnonzero(reason)
    tally.rejected.append(
        rejected_records(file, first_row + bad, -1, np.maximum(length[bad], 1), reason[bad])
    )
    good = np.flatnonzero(reason == 0)
    return _Unfolded(
        batch,
        np.repeat(good, length[good]),
        places_of(np.zeros(len(good), np.int64), length[good]),
    )


def _read_ids(layout: LogLayout, unfolded: _Unfolded, tally: _Tally) -> _Ids:
    batch, columns = unfolded.batch, layout.columns
    request, user = (column_keys(batch.column(columns[name])) for name in ("request", "user"))
    item = column_keys(unfolded.column(columns["item"]))
    time, has_time = values.seconds_of(batch.column(columns["time"]), layout.units_per_second)
    for name, keys in (("request", request), ("user", user), ("item", item)):
        tally.add_keys(f"columns.{name}", keys)
    nulls = batch.column(columns["time"]).null_count
    tally.add_faults("columns.time", len(time), nulls, int((~has_time).sum()) - nulls)
    tally.add_texts("user", user)
    tally.add_texts("item", item)
    return _Ids(request.key, user.key, item.key, time, has_time)


def _reasons(applies: Mapping[Reason, Bool[np.ndarray, "n"]]) -> Int8[np.ndarray, "n"]:
    """The first reason of the enumeration that applies to each candidate, 0 if none does."""
    reason = np.zeros(len(next(iter(applies.values()))), np.int8)
    for why in sorted(applies, reverse=True):
        reason[applies[why]] = why
    return reason


def _label(layout: LogLayout, unfolded: _Unfolded, task: str, tally: _Tally) -> np.ndarray:
    """Labels, int8: 0 or 1, -1 where there is none, -2 where it is no label."""
    number = values.numbers_of(unfolded.column(layout.labels[task]))
    missing = np.isnan(number)
    bad = ~missing & (number != 0) & (number != 1)
    tally.add_numbers(f"labels.{task}", number, bad)
    return np.where(missing, -1, np.where(bad, -2, np.where(bad | missing, 0, number))).astype(
        np.int8
    )


def _teacher(
    layout: LogLayout, unfolded: _Unfolded, tally: _Tally
) -> dict[str, Float32[np.ndarray, "n"]]:
    """The teacher's probabilities, or positions, as they are in the log."""
    highest = 1.0 if layout.teacher_signal == "probability" else _LARGEST
    columns = {}
    for task in layout.scored_tasks:
        number = values.numbers_of(unfolded.column(layout.teacher[task]))
        tally.add_numbers(f"teacher.{task}", number, (number < 0) | (number > highest))
        # A number too large for 32 bits is infinite there, and as bad.
        with np.errstate(over="ignore"):
            columns[task] = number.astype(np.float32)
    return columns


def _position(layout: LogLayout, unfolded: _Unfolded, tally: _Tally) -> Float32[np.ndarray, "n"]:
    if "position" not in layout.columns:
        return np.full(len(unfolded.parent), np.nan, np.float32)
    number = values.numbers_of(unfolded.column(layout.columns["position"]))
    bad = (number < 0) | (number > _LARGEST)
    tally.add_numbers("columns.position", number, bad)
    return np.where(bad, np.nan, number).astype(np.float32)


def _stage(
    layout: LogLayout,
    unfolded: _Unfolded,
    position: Float32[np.ndarray, "n"],
    label: dict[str, np.ndarray],
    teacher: dict[str, Float32[np.ndarray, "n"]],
    tally: _Tally,
) -> tuple[np.ndarray, Bool[np.ndarray, "n"]]:
    """The `Stage` of each candidate, int8, and True where the log names none."""
    if "stage" in layout.columns:
        code = values.codes_of(unfolded.column(layout.columns["stage"]), layout.stages)
        tally.add_faults("columns.stage", len(code), int((code < 0).sum()), int((code == 0).sum()))
        return np.maximum(code, 0).astype(np.int8), code < 1
    none = np.zeros(len(unfolded.parent), bool)
    shown = ~np.isnan(position) | np.any([column != -1 for column in label.values()], axis=0)
    passed = np.any([none, *(~np.isnan(column) for column in teacher.values())], axis=0)
    stage = np.where(shown, Stage.SHOWN, np.where(passed, Stage.PASSED, Stage.RETRIEVED))
    return stage.astype(np.int8), none


def _label_weight(
    layout: LogLayout, unfolded: _Unfolded, label: dict[str, np.ndarray], tally: _Tally
) -> Float32[np.ndarray, "n"]:
    """1 where the log names none; 0 where it names nonsense, or lacks a label."""
    labelled = np.all([column >= 0 for column in label.values()], axis=0)
    if "label_weight" not in layout.columns:
        return labelled.astype(np.float32)
    number = values.numbers_of(unfolded.column(layout.columns["label_weight"]))
    missing = np.isnan(number)
    bad = (number < 0) | (number > _LARGEST)
    tally.add_numbers("columns.label_weight", number, bad)
    return np.where(bad | ~labelled, 0, np.where(missing, 1, number)).astype(np.float32)


def _teacher_weight(
    layout: LogLayout,
    unfolded: _Unfolded,
    teacher: dict[str, Float32[np.ndarray, "n"]],
    tally: _Tally,
) -> Float32[np.ndarray, "n"]:
    """1 or as the log says; 0 for nonsense, and for another version than the one that counts."""
    weight = np.ones(len(unfolded.parent))
    if "teacher_weight" in layout.columns:
        number = values.numbers_of(unfolded.column(layout.columns["teacher_weight"]))
        missing = np.isnan(number)
        bad = (number < 0) | (number > _LARGEST)
        tally.add_numbers("columns.teacher_weight", number, bad)
        weight = np.where(bad | missing, 0, number)
    if "teacher_version" in layout.columns and layout.teacher_version and teacher:
        array = unfolded.column(layout.columns["teacher_version"])
        other = values.codes_of(array, {layout.teacher_version: 1}) != 1
        written = np.any([~np.isnan(column) for column in teacher.values()], axis=0)
        tally.other_version += int((other & written).sum())
        weight = np.where(other, 0, weight)
    return weight.astype(np.float32)


def _feature(feature: Feature, array: pa.Array, tally: _Tally) -> Any:
    """A feature as a column of a table."""
    name = f"features.{feature.name}"
    if feature.kind == "dense":
        number = values.numbers_of(array)
        bad = np.abs(number) > _LARGEST
        tally.add_numbers(name, number, bad)
        return _narrowed(np.where(bad, np.nan, number))
    if feature.kind == "category":
        keys = column_keys(array)
        tally.add_keys(name, keys)
        if not feature.hashed:
            tally.add_texts(f"feature:{feature.name}", keys)
        return keys.key
    start, length, _, inner = values.lists_of(array)
    keys = column_keys(values.take_values(inner, places_of(start, length)))
    keep = keys.key != MISSING
    kept = np.diff(values.compacted(length, keep))
    # The most recent events stand last in a history; a bag has no order, so its first will do.
    fits = np.minimum(kept, feature.length)
    ends = starts_of(kept)
    first = ends[1:] - fits if feature.kind == "history" else ends[:-1]
    tally.add_faults(
        name, len(length), int((kept == 0).sum()), int((~keep).sum()), int((kept - fits).sum())
    )
    if feature.kind == "bag" and not feature.hashed:
        tally.add_texts(f"feature:{feature.name}", keys)
    return Ragged(starts_of(fits), keys.key[keep][places_of(first, fits)])


def _narrowed(number: Float64[np.ndarray, "n"]) -> np.ndarray:
    """The same numbers in half the memory, where that holds them exactly."""
    narrow = number.astype(np.float32)
    return narrow if np.array_equal(narrow, number, equal_nan=True) else number


def _request_rows(
    layout: LogLayout,
    batch: pa.RecordBatch,
    parent: Int64[np.ndarray, "n"],
    candidates: NamedColumns,
    tally: _Tally,
) -> NamedColumns:
    """A row with the features of a request, wherever it differs from that of the row before."""
    scalars = {
        feature.name: _feature(feature, batch.column(feature.column), tally)
        for feature in layout.of("user", "context")
        if feature.kind in ("dense", "category")
    }
    request, user = array_of(candidates, "request"), array_of(candidates, "user")
    starts = np.zeros(len(parent), bool)
    starts[:1] = True
    for column in (request, user, *(scalar[parent] for scalar in scalars.values())):
        before, after = column[:-1], column[1:]
        # NaN, the missing number, is the same as NaN.
        starts[1:] |= (before != after) & ((before == before) | (after == after))
    chosen = np.flatnonzero(starts)
    requests: NamedColumns = {
        name: array_of(candidates, name)[chosen] for name in ("bucket", "request", "user")
    }
    for feature in layout.of("user", "context"):
        if feature.name in scalars:
            column = scalars[feature.name][parent[chosen]]
        else:
            array = batch.column(feature.column).take(pa.array(parent[chosen]))
            column = _feature(feature, array, tally)
        requests[f"feature:{feature.name}"] = column
    return requests


def _distinct_texts(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables, promote_options="permissive")
    _, first = np.unique(table["key"].to_numpy(), return_index=True)
    return table.take(pa.array(first)).combine_chunks()


def _write_texts(texts: dict[str, Merger[pa.Table]], folder: Path, name: str) -> dict[str, str]:
    paths = {}
    for number, (column, merger) in enumerate(texts.items()):
        paths[column] = str(folder / f"texts-{name}-{number}.arrow")
        table = merger.result()
        with pa.OSFile(paths[column], "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return paths
