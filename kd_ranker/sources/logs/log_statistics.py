"""Sums over requests: counts of ids, moments of numbers, the last values of items.

Vocabularies and moments are those of training requests alone, and rejected rows count nowhere.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Num

from kd_ranker.batch import Stage
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.merging import (
    Counts,
    Merger,
    count_merger,
    counts_of,
)
from kd_ranker.sources.logs.named_columns import (
    ColumnValues,
    NamedColumns,
    Ragged,
    array_of,
    concatenate,
    num_rows,
    take_rows,
)
from kd_ranker.sources.logs.reasons import Rejected
from kd_ranker.sources.logs.value_keys import MISSING, mixed

# How finely the teacher's probabilities are compared with labels.
TEACHER_BINS = 20
_PLACE_OF_ITEM = ("time", "file", "row")


class BucketRequests(NamedTuple):
    """Requests of a bucket in the order of time, and then of their keys.

    Attributes:
      requests: a row a request: `request`, `time`, `user`, `split` (its place in `SPLITS`), `moved`
        (1 if its rows have several times), `feature:<name>`, and numbers of candidates:
        `candidates`, `passed`, `shown` and `scored` (those with a teacher's value or the lack of
        one).
      candidates: a row a candidate, request by request, shown before passed before retrieved, then
        by position, then by the item's key; the columns are those of `partition`.
      rejected: the rows that did not become candidates.
      num_several_users: requests that lost rows because these were another user's.
      varying: feature of user or context -> requests in which it has several values.
    """

    requests: NamedColumns
    candidates: NamedColumns
    rejected: Rejected
    num_several_users: int
    varying: dict[str, int]


class Moments(NamedTuple):
    """Moments of the numbers of training requests, missing ones left out."""

    number: int
    mean: float
    squares: float  # Σ (x − mean)²
    low: float
    high: float

    @property
    def deviation(self) -> float:
        """The standard deviation, √(squares / number)."""
        return float(np.sqrt(self.squares / self.number)) if self.number else 0.0


NO_MOMENTS = Moments(0, 0.0, 0.0, float("inf"), float("-inf"))


class Statistics(NamedTuple):
    """Sums over some buckets.

    Attributes:
      counts: `user`, `history`, or `feature:<name>` of a categorical feature of user, context or
        candidates that is not hashed -> the number of times that its values occur.
      moments: dense feature of user, context and candidates -> its moments.
      items: a row an item: `item`, `train` and `total` (how often it is a candidate), `time`,
        `file` and `row` (of its last row), `feature:<name>` (as of that row), `varies:<name>`
        (1 if a row before had another value).
      totals: further numbers of which sums make sense.
      first: the earliest time in each split.
      last: the latest.
    """

    counts: dict[str, Counts]
    moments: dict[str, Moments]
    items: NamedColumns
    totals: dict[str, Num[np.ndarray, "..."]]
    first: Int64[np.ndarray, "splits"]
    last: Int64[np.ndarray, "splits"]


def add_up_bucket(layout: LogLayout, bucket: BucketRequests) -> Statistics:
    """Adds up one bucket."""
    requests, candidates = bucket.requests, bucket.candidates
    split = array_of(requests, "split")
    split_of_row = np.repeat(split, array_of(requests, "candidates"))
    in_train, row_in_train = (of == SPLITS.index("train") for of in (split, split_of_row))
    counts = {"user": counts_of(array_of(requests, "user"), in_train)}
    moments = {}
    for feature in layout.of("user", "context", "candidate"):
        table, chosen = (requests, in_train) if feature.of_request else (candidates, row_in_train)
        column = table[f"feature:{feature.name}"]
        if feature.kind == "dense":
            moments[feature.name] = moments_of(array_of(table, f"feature:{feature.name}")[chosen])
        elif feature.kind == "history" or not feature.hashed:
            name = "history" if feature.kind == "history" else f"feature:{feature.name}"
            counts[name] = _category_counts(column, chosen)
    totals = _totals(layout, bucket, split, split_of_row)
    times = [array_of(requests, "time")[split == index] for index in range(len(SPLITS))]
    latest = np.iinfo(np.int64)
    return Statistics(
        counts=counts,
        moments=moments,
        items=merge_items([_item_rows(layout, candidates, row_in_train)]),
        totals=totals,
        first=np.array([time.min(initial=latest.max) for time in times]),
        last=np.array([time.max(initial=latest.min) for time in times]),
    )


def add_up_buckets(pieces: Iterable[Statistics]) -> Statistics:
    """Adds up buckets, in their order."""
    counts: dict[str, Merger[Counts]] = {}
    moments: dict[str, Moments] = {}
    items = Merger(merge_items, num_rows)
    totals: dict[str, np.ndarray] = {}
    first = last = None
    for piece in pieces:
        for name, counted in piece.counts.items():
            counts.setdefault(name, count_merger()).add(counted)
        for name, numbers in piece.moments.items():
            moments[name] = merge_moments(moments.get(name, NO_MOMENTS), numbers)
        items.add(piece.items)
        for name, total in piece.totals.items():
            totals[name] = totals.get(name, 0) + total
        first = piece.first if first is None else np.minimum(first, piece.first)
        last = piece.last if last is None else np.maximum(last, piece.last)
    assert first is not None
    assert last is not None
    return Statistics(
        {name: merger.result() for name, merger in counts.items()},
        moments,
        items.result(),
        totals,
        first,
        last,
    )


def without_item_features(layout: LogLayout, candidates: NamedColumns) -> NamedColumns:
    """The columns of candidates that are stored with their requests."""
    kept = {"item", "stage", "label_weight", "teacher_weight"}
    kept |= {f"feature:{feature.name}" for feature in layout.of("candidate")}
    return {
        name: column
        for name, column in candidates.items()
        if name in kept or name.startswith(("label:", "teacher:"))
    }


def moments_of(number: Num[np.ndarray, "n"]) -> Moments:
    """The moments of the numbers that are not NaN."""
    number = number[~np.isnan(number)].astype(np.float64)
    if not len(number):
        return NO_MOMENTS
    mean = float(number.mean())
    squares = float(np.square(number - mean).sum())
    return Moments(len(number), mean, squares, float(number.min()), float(number.max()))


def merge_moments(one: Moments, other: Moments) -> Moments:
    """The moments of both (Chan, Golub and LeVeque, 1979)."""
    if not (one.number and other.number):
        return one if one.number else other
    number = one.number + other.number
    distance = other.mean - one.mean
    return Moments(
        number,
        one.mean + distance * other.number / number,
        one.squares + other.squares + distance**2 * one.number * other.number / number,
        min(one.low, other.low),
        max(one.high, other.high),
    )


def merge_items(pieces: list[NamedColumns]) -> NamedColumns:
    """The items of all pieces: counts added up, the values of the last row."""
    rows = concatenate(pieces) if len(pieces) > 1 else pieces[0]
    item = array_of(rows, "item")
    features = [name.removeprefix("feature:") for name in rows if name.startswith("feature:")]
    # Without features, which row is the last one is of no interest.
    where = [array_of(rows, name) for name in reversed(_PLACE_OF_ITEM)] if features else []
    order = np.lexsort((*where, item))
    ends = np.flatnonzero(np.append(np.diff(item[order]) != 0, True)) if len(item) else order
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(item) else order
    merged = take_rows(rows, order[ends])
    for name in ("train", "total"):
        merged[name] = np.add.reduceat(array_of(rows, name)[order], starts) if len(item) else item
    index = np.repeat(np.arange(len(ends)), ends - starts + 1)
    for name in features:
        differs = _differs(rows[f"feature:{name}"], order, order[ends][index])
        differs |= array_of(rows, f"varies:{name}")[order] > 0
        varies = np.bincount(index[differs], minlength=len(ends)) > 0
        merged[f"varies:{name}"] = varies.astype(np.int8)
    return merged


def _differs(
    column: ColumnValues, places: Int[np.ndarray, "n"], others: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
    """True where the values at some places differ from those at others."""
    if isinstance(column, Ragged):
        # Bags have no order, so the sum of a hash of their values tells them apart.
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed(column.values))])
        values = sums[column.start[1:]] - sums[column.start[:-1]]
    else:
        values = column
    one, other = values[places], values[others]
    return (one != other) & ((one == one) | (other == other))


def _item_rows(
    layout: LogLayout, rows: NamedColumns, in_train: Bool[np.ndarray, "n"]
) -> NamedColumns:
    """Each candidate as if it were an item of its own."""
    number = num_rows(rows)
    table: NamedColumns = {"item": rows["item"]}
    table["train"] = in_train.astype(np.int64)
    table["total"] = np.ones(number, np.int64)
    features = layout.of("item")
    if features:
        table |= {name: rows[name] for name in _PLACE_OF_ITEM}
    for feature in features:
        table[f"feature:{feature.name}"] = rows[f"feature:{feature.name}"]
        table[f"varies:{feature.name}"] = np.zeros(number, np.int8)
    return table


def _category_counts(column: ColumnValues, in_train: Bool[np.ndarray, "n"]) -> Counts:
    if isinstance(column, Ragged):
        return counts_of(column.values, np.repeat(in_train, column.lengths))
    known = column != MISSING
    return counts_of(column[known], in_train[known])


def _totals(
    layout: LogLayout,
    bucket: BucketRequests,
    split: Int[np.ndarray, "requests"],
    split_of_row: Int[np.ndarray, "n"],
) -> dict[str, np.ndarray]:
    requests, candidates = bucket.requests, bucket.candidates
    stage = array_of(candidates, "stage")
    weight = array_of(candidates, "label_weight").astype(np.float64)
    shown = stage == Stage.SHOWN
    labelled = shown & (weight > 0)
    labels = np.stack([array_of(candidates, f"label:{task}") for task in layout.tasks], axis=1)
    size = array_of(requests, "candidates")

    def by_split(chosen: np.ndarray, of: np.ndarray) -> Float64[np.ndarray, "splits ..."]:
        return np.stack([chosen[of == index].sum(axis=0) for index in range(len(SPLITS))])

    totals = {
        "requests": by_split(np.ones(len(split), np.int64), split),
        "candidates": by_split(size, split),
        "stages": by_split(stage[:, None] == np.array([*Stage][1:]), split_of_row),
        "without_shown": by_split(array_of(requests, "shown") == 0, split),
        "several_times": np.array(array_of(requests, "moved").sum()),
        "several_users": np.array(bucket.num_several_users),
        "candidates_a_request": np.bincount(size, minlength=layout.retrieved + 1),
        "labelled": by_split(labelled, split_of_row),
        "positives": by_split(labelled[:, None] & (labels > 0), split_of_row),
        "label_weight": by_split(weight * labelled, split_of_row),
        "weighted_positives": by_split((weight * labelled)[:, None] * (labels > 0), split_of_row),
        "positives_not_shown": ((labels > 0) & ~shown[:, None]).sum(axis=0),
    }
    totals |= {f"varying/{name}": np.array(number) for name, number in bucket.varying.items()}
    scored = np.stack(
        [
            array_of(candidates, f"teacher:{task}")
            if task in layout.scored_tasks
            else np.full(len(stage), np.nan)
            for task in layout.tasks
        ],
        axis=1,
    )
    with np.errstate(invalid="ignore"):
        proper = (
            (scored >= 0) & (scored <= 1) & (array_of(candidates, "teacher_weight") > 0)[:, None]
        )
    stages = stage[:, None] == np.array([*Stage][1:])
    totals["teacher_proper"] = by_split(
        (proper[:, :, None] & stages[:, None, :]).astype(np.int32), split_of_row
    )
    totals["calibration"] = _calibration(scored, proper & labelled[:, None], labels, weight)
    return totals


def _calibration(
    probability: Float64[np.ndarray, "n T"],
    chosen: Bool[np.ndarray, "n T"],
    label: Int[np.ndarray, "n T"],
    weight: Float64[np.ndarray, "n"],
) -> Float64[np.ndarray, "T bins 3"]:
    """Σ w, Σ w p and Σ w y by bins of the probability p, for labels y of weight w."""
    sums = np.zeros((probability.shape[1], TEACHER_BINS, 3))
    for task in range(probability.shape[1]):
        rows = np.flatnonzero(chosen[:, task])
        p = probability[rows, task].astype(np.float64)
        place = np.minimum((p * TEACHER_BINS).astype(int), TEACHER_BINS - 1)
        for index, value in enumerate((1.0, p, label[rows, task])):
            sums[task, :, index] = np.bincount(
                place, weights=weight[rows] * value, minlength=TEACHER_BINS
            )
    return sums
