"""The first pass over a log: the time of each request, and the number of its candidates.

Memory: 24 bytes a request, and up to twice that on the way.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from kd_ranker.sources.logs import files, values
from kd_ranker.sources.logs.files import Log, Part
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.merging import Merger
from kd_ranker.sources.logs.value_keys import MISSING, column_keys


class Times(NamedTuple):
    """The requests of some rows; `request` is sorted and distinct."""

    request: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]  # the earliest of its rows
    entries: Int64[np.ndarray, "n"]  # how many candidates its rows hold, before any is rejected


NO_TIMES = Times(*(np.zeros(0, np.int64) for _ in range(3)))


class Scan(NamedTuple):
    """Findings of the first pass.

    Attributes:
      times: of the requests that have an id and a time.
      rows: of the log.
      entries: candidates of the log; a row without any counts as one.
      steps_back: how many rows have an earlier time than the row before.
      first: the time of the first row that has one; None if none has.
      last: that of the last.
    """

    times: Times
    rows: int
    entries: int
    steps_back: int
    first: int | None
    last: int | None


def scan_parts(log: Log, layout: LogLayout, parts: Sequence[Part]) -> Scan:
    """Scans some parts."""
    columns = [layout.columns["request"], layout.columns["time"]]
    if layout.by_request:
        columns.append(layout.columns["item"])
    times = time_merger()
    rows = entries = steps_back = 0
    first = last = None
    for _, _, batch in files.read_parts(log, parts, columns):
        key = column_keys(batch.column(layout.columns["request"])).key
        time, valid = values.seconds_of(
            batch.column(layout.columns["time"]), layout.units_per_second
        )
        number = np.ones(len(key), np.int64)
        if layout.by_request:
            number = np.maximum(values.lists_of(batch.column(layout.columns["item"]))[1], 1)
        rows += len(key)
        entries += int(number.sum())
        timed = time[valid]
        if len(timed):
            before = timed[0] if last is None else last
            steps_back += int((np.diff(timed, prepend=before) < 0).sum())
            first = int(timed[0]) if first is None else first
            last = int(timed[-1])
        valid &= key != MISSING
        times.add(_distinct(key[valid], time[valid], number[valid]))
    return Scan(times.result(), rows, entries, steps_back, first, last)


def merge_scans(scans: Sequence[Scan], times: Merger[Times]) -> Scan:
    """The scan of all parts, from those of chunks in their order; `times` has the times."""
    timed = [scan for scan in scans if scan.first is not None]
    between = sum(
        int(after.first < before.last)  # type: ignore[operator, misc]
        for before, after in itertools.pairwise(timed)
    )
    return Scan(
        times.result(),
        sum(scan.rows for scan in scans),
        sum(scan.entries for scan in scans),
        sum(scan.steps_back for scan in scans) + between,
        timed[0].first if timed else None,
        timed[-1].last if timed else None,
    )


def time_merger() -> Merger[Times]:
    """A merger of the times of requests."""
    return Merger(_merge_times, lambda times: len(times.request))


def _distinct(
    key: Int64[np.ndarray, "n"], time: Int64[np.ndarray, "n"], number: Int64[np.ndarray, "n"]
) -> Times:
    # Most logs have the rows of a request side by side, and runs are cheap to find.
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1)) if len(key) else np.zeros(0, int)
    if len(starts):
        number, time = np.add.reduceat(number, starts), np.minimum.reduceat(time, starts)
    return _merge_times([Times(key[starts], time[: len(starts)], number[: len(starts)])])


def _merge_times(pieces: list[Times]) -> Times:
    key, time, number = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(key, kind="stable")
    key, time, number = key[order], time[order], number[order]
    first = np.flatnonzero(np.diff(key, prepend=key[:1] - 1)) if len(key) else np.zeros(0, int)
    if not len(first):
        return Times(key, time, number)
    return Times(key[first], np.minimum.reduceat(time, first), np.add.reduceat(number, first))
