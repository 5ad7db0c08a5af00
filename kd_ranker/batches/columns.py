"""Many requests as a few arrays, from which a batch is cut without a loop over its requests."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from kd_ranker.batch import FeatureSpec, Stage
from kd_ranker.requests.request import Request

_OF_CANDIDATES = ("item_id", "candidate_features", "candidate_category")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Requests side by side, on the host; n of them.

    What a request has many of lies in one array for all requests: those of request i from
    `start[i]` to `start[i + 1]`. Candidates stand in funnel order, so labels and teacher
    probabilities are known for a prefix of them, see `Request`. The candidates themselves may be a
    prefix of all that were retrieved, see `only_counting`.
    """

    user_id: Int[np.ndarray, "n"]
    user_features: Float[np.ndarray, "n U"]
    context: Float[np.ndarray, "n C"]
    history_id: Int[np.ndarray, "n H"]  # most recent last, padded at the end
    history_features: Float[np.ndarray, "n H E"]
    history_mask: Bool[np.ndarray, "n H"]
    request_category: Int[np.ndarray, "n K"]
    num_passed: Int[np.ndarray, "n"]
    num_retrieved: Int[np.ndarray, "n"]
    candidate_start: Int[np.ndarray, "n+1"]
    item_id: Int[np.ndarray, "candidates"]
    candidate_features: Float[np.ndarray, "candidates X"]
    candidate_category: Int[np.ndarray, "candidates L"]
    shown_start: Int[np.ndarray, "n+1"]
    user_label: Int[np.ndarray, "shown T"]
    label_weight: Float[np.ndarray, "shown"]
    scored_start: Int[np.ndarray, "n+1"]
    teacher_probability: Float[np.ndarray, "scored T"]  # NaN where it was not logged properly

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.user_id)

    @property
    def num_shown(self) -> Int[np.ndarray, "n"]:
        """How many candidates of each request were shown."""
        return lengths(self.shown_start)

    @property
    def num_scored(self) -> Int[np.ndarray, "n"]:
        """How many candidates of each request the teacher has scored."""
        return lengths(self.scored_start)


def columns_of(requests: Sequence[Request], spec: FeatureSpec) -> Columns:
    """The columns of some requests, at least one, on the host."""
    history = [_recent(request, spec) for request in requests]
    fields: dict[str, Any] = dict(
        user_id=np.array([request.user_id for request in requests], np.int32),
        user_features=np.stack([request.user_features for request in requests]),
        context=np.stack([request.context for request in requests]),
        history_id=np.stack([of_request[0] for of_request in history]),
        history_features=np.stack([of_request[1] for of_request in history]),
        history_mask=np.stack([of_request[2] for of_request in history]),
        request_category=np.stack([_or_none(request.request_category) for request in requests]),
        num_passed=np.array([request.num_passed for request in requests], np.int64),
        num_retrieved=np.array([len(request.item_id) for request in requests], np.int64),
        candidate_start=_starts(len(request.item_id) for request in requests),
        item_id=np.concatenate([request.item_id for request in requests]),
        candidate_features=np.concatenate([request.candidate_features for request in requests]),
        candidate_category=np.concatenate(
            [_or_none(request.candidate_category, len(request.item_id)) for request in requests]
        ),
        shown_start=_starts(len(request.user_label) for request in requests),
        user_label=np.concatenate([request.user_label for request in requests]),
        label_weight=np.concatenate([request.label_weight for request in requests]),
        scored_start=_starts(len(request.teacher_probability) for request in requests),
        teacher_probability=np.concatenate(
            [proper_probability(request, spec.teacher_version) for request in requests]
        ),
    )
    return Columns(**fields)


def _or_none(category: np.ndarray | None, *number: int) -> Int[np.ndarray, "..."]:
    """Category ids; an array of width 0 in a dataset that has none."""
    return np.zeros((*number, 0), np.int32) if category is None else category


def proper_probability(request: Request, version: str) -> Float[np.ndarray, "L T"]:
    """The teacher's probabilities, NaN where they were not logged properly.

    Proper is what the log says was written, by the right model version, as a number in [0, 1].
    """
    probability = request.teacher_probability
    if not version or request.teacher_version != version:
        return np.full_like(probability, np.nan)
    # A comparison with NaN is False, so NaN needs no test of its own.
    in_range = (probability >= 0) & (probability <= 1)
    written = (request.teacher_weight > 0)[:, None]
    return np.where(in_range & written, probability, np.float32(np.nan))


def joined(parts: Sequence[Columns]) -> Columns:
    """The requests of all parts, in their order, on the host."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Columns):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name.endswith("_start"):
            fields[field.name] = _starts(np.concatenate([np.diff(array) for array in arrays]))
        else:
            fields[field.name] = np.concatenate(arrays)
    return Columns(**fields)


def only_counting(columns: Columns, stage: Stage, logged: bool) -> Columns:
    """The same requests without the candidates that cannot count in training.

    Those that were shown always count, for they may have labels. Whether the others that were
    passed count is decided for all of a request at once, and so for the rest.

    Args:
      columns: the requests, with all that is known of them.
      stage: what came so far in the funnel counts.
      logged: whether what the teacher has scored counts; if not, its probabilities are left out.
    """

    def first(numbers: Int[np.ndarray, "n"], start: str, *names: str) -> dict[str, Any]:
        """The first so many of what each request has."""
        old = getattr(columns, start)[:-1]
        new = _starts(numbers)
        index = np.arange(new[-1]) + np.repeat(old - new[:-1], numbers)
        return {start: new} | {name: getattr(columns, name)[index] for name in names}

    scored = columns.num_scored * logged
    counting = dataclasses.replace(columns, **first(scored, "scored_start", "teacher_probability"))
    passed_count, rest_counts = what_counts(counting, stage)
    candidates = np.where(passed_count, passed_of(columns), columns.num_shown)
    candidates = np.where(rest_counts, columns.num_retrieved, candidates)
    return dataclasses.replace(counting, **first(candidates, "candidate_start", *_OF_CANDIDATES))


def what_counts(
    columns: Columns, stage: Stage
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Of each request of `only_counting`, whether all that were passed count, and whether the rest.

    Those that were shown count as passed, beside what they count for by their labels.
    """
    return (
        (columns.num_scored > 0) | (stage <= Stage.PASSED),
        (columns.num_scored > passed_of(columns)) | (stage <= Stage.RETRIEVED),
    )


def passed_of(columns: Columns) -> Int[np.ndarray, "n"]:
    """How many candidates of each request were passed, those that were shown included."""
    return np.clip(columns.num_passed, columns.num_shown, columns.num_retrieved)


def without_history(columns: Columns) -> Columns:
    """The same requests, their histories of length 0."""
    fields = ("history_id", "history_features", "history_mask")
    return dataclasses.replace(columns, **{name: getattr(columns, name)[:, :0] for name in fields})


# The golden ratio's fractional part.
_GOLDEN = (5**0.5 - 1) / 2


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """An order of n places in which every run, wherever it begins, is spread evenly over all.

    The j-th is the rank of j · φ mod 1 among those of all n, with the golden ratio φ: any run of a
    Kronecker sequence is spread so (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def in_sampling_order(columns: Columns) -> tuple[Columns, Int[np.ndarray, "n"]]:
    """The same requests, their candidates in an order from which runs are good samples.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest; each of these four in `spread_order`.

    Returns:
      The columns, and how many candidates of each request have a positive label.
    """
    shown = columns.num_shown
    request = np.repeat(np.arange(len(columns)), shown)
    positive = columns.user_label.any(axis=1)
    positives = np.bincount(request[positive], minlength=len(columns))
    candidates = lengths(columns.candidate_start)
    passed = np.clip(columns.num_passed, shown, candidates)
    # Of the shown: positives, then negatives, as they stood.
    by_label = np.argsort(2 * request + ~positive, kind="stable") - columns.shown_start[request]

    def order_of(index: int) -> Int[np.ndarray, "N"]:
        """The places of a request's candidates in the new order."""
        ends = [0, positives[index], shown[index], passed[index], candidates[index]]
        order = np.concatenate([at + spread_order(int(to - at)) for at, to in pairwise(ends)])
        first = slice(*columns.shown_start[[index, index + 1]])
        order[: shown[index]] = by_label[first][order[: shown[index]]]
        return order

    orders = [order_of(index) for index in range(len(columns))]

    def moved(array: Shaped[np.ndarray, "..."], start: Int[np.ndarray, "n+1"]) -> np.ndarray:
        """What each request has, in the new order; it has it of a prefix of its candidates."""
        places = [
            at + order[:of] for at, order, of in zip(start, orders, np.diff(start), strict=False)
        ]
        return array[np.concatenate(places)]

    starts = (
        (columns.candidate_start, _OF_CANDIDATES),
        (columns.shown_start, ("user_label", "label_weight")),
        (columns.scored_start, ("teacher_probability",)),
    )
    changed = {
        name: moved(getattr(columns, name), start) for start, names in starts for name in names
    }
    return dataclasses.replace(columns, **changed), positives


def lengths(start: Int[np.ndarray, "n+1"]) -> Int[np.ndarray, "n"]:
    """How many entries each request has."""
    return np.diff(start)


def _starts(numbers: Iterable[int]) -> Int[np.ndarray, "n+1"]:
    return np.concatenate([[0], np.cumsum(list(numbers), dtype=np.int64)])


def _recent(request: Request, spec: FeatureSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, features and mask of the most recent events, which are the last ones."""
    length = spec.history_length
    events = min(len(request.history_id), length)
    ids = np.zeros(length, np.int32)
    features = np.zeros((length, spec.history_features), np.float32)
    if events:
        ids[:events] = request.history_id[-events:]
        features[:events] = request.history_features[-events:]
    return ids, features, np.arange(length) < events
