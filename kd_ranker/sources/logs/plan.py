"""Buckets of requests, which follow each other in time and are bounded in rows.

Memory: 24 bytes a request, on disk, which the processes share.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.named_columns import starts_of
from kd_ranker.sources.logs.scan import Times
from kd_ranker.sources.searching import look_up


class BucketPlan(NamedTuple):
    """The bucket of each request; the requests are sorted by their keys.

    Attributes:
      request: their keys.
      time: their times.
      bucket: in the order of time; -1 for a request too large for any.
    """

    request: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]
    bucket: Int64[np.ndarray, "n"]


def plan_buckets(times: Times, layout: LogLayout) -> BucketPlan:
    """Cuts the requests, in the order of time, into buckets of `layout.bucket_rows` at most."""
    order = np.lexsort((times.request, times.time))
    fits = times.entries[order] <= layout.bucket_rows
    order = order[fits]
    ends = starts_of(times.entries[order])
    firsts = [0]
    while firsts[-1] < len(order):
        limit = ends[firsts[-1]] + layout.bucket_rows
        firsts.append(int(np.searchsorted(ends, limit, side="right")) - 1)
    bucket = np.full(len(times.request), -1)
    bucket[order] = np.repeat(np.arange(len(firsts) - 1), np.diff(firsts))
    return BucketPlan(times.request, times.time, bucket)


def save_plan(plan: BucketPlan, folder: Path) -> None:
    """Writes a plan for `load_plan`."""
    folder.mkdir()
    for name, array in plan._asdict().items():
        np.save(folder / f"{name}.npy", array)


def load_plan(folder: Path) -> BucketPlan:
    """The inverse of `save_plan`; processes share its memory."""
    return BucketPlan(
        *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in BucketPlan._fields)
    )


def look_up_requests(
    plan: BucketPlan, request: Int64[np.ndarray, "n"]
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """The bucket of each request, -1 for one without a time or too large, and its time."""
    if not len(plan.request):
        return np.full(len(request), -1), np.zeros(len(request), np.int64)
    place, known = look_up(plan.request, request)
    return np.where(known, plan.bucket[place], -1), np.where(known, plan.time[place], 0)


class Cutoffs(NamedTuple):
    """The earliest times of a validation and of a test request."""

    validation: int
    test: int


def time_cutoffs(
    time: Int64[np.ndarray, "n"], validation_share: float, test_share: float
) -> Cutoffs | None:
    """The times that end training and validation; None if there are less than three seconds.

    The test begins with the first of the last `test_share` requests, the validation with the first
    of the last `validation_share` + `test_share`. Requests of the same second stand on the same
    side, so the shares are met as nearly as seconds allow, and each split has at least a second.

    >>> time_cutoffs(np.array([5, 1, 2, 3, 4]), 0.2, 0.4)
    Cutoffs(validation=3, test=4)
    """
    ordered = np.sort(time)
    seconds = np.unique(ordered)
    if len(seconds) < len(SPLITS):
        return None

    def first_of_last(share: float) -> int:
        return int(ordered[min(len(ordered) - 1, len(ordered) - round(share * len(ordered)))])

    test = max(first_of_last(test_share), int(seconds[2]))
    last_before = int(seconds[np.searchsorted(seconds, test) - 1])
    validation = max(first_of_last(validation_share + test_share), int(seconds[1]))
    return Cutoffs(min(validation, last_before), test)
