"""Many requests as a few arrays, from which a batch is cut without a loop over its requests."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

from kd_ranker.batch import FeatureSpec
from kd_ranker.data.request import Request


@dataclasses.dataclass(frozen=True)
class Columns:
    """Requests side by side; n of them.

    What a request has many of lies in one array for all requests: those of request i from
    `start[i]` to `start[i + 1]`. Candidates stand in funnel order, so labels and teacher
    probabilities are known for a prefix of them, see `Request`.
    """

    user_id: Int32[np.ndarray, "n"]
    user_features: Float32[np.ndarray, "n U"]
    context: Float32[np.ndarray, "n C"]
    history_id: Int32[np.ndarray, "n H"]  # most recent last, padded at the end
    history_features: Float32[np.ndarray, "n H E"]
    history_mask: Bool[np.ndarray, "n H"]
    num_passed: Int[np.ndarray, "n"]
    candidate_start: Int[np.ndarray, "n+1"]
    item_id: Int32[np.ndarray, "candidates"]
    candidate_features: Float32[np.ndarray, "candidates X"]
    request_category: Int32[np.ndarray, "n K"]
    candidate_category: Int32[np.ndarray, "candidates L"]
    shown_start: Int[np.ndarray, "n+1"]
    user_label: UInt8[np.ndarray, "shown T"]
    label_weight: Float32[np.ndarray, "shown"]
    scored_start: Int[np.ndarray, "n+1"]
    teacher_probability: Float32[np.ndarray, "scored T"]
    teacher_proper: Bool[np.ndarray, "scored T"]  # whether it was logged properly

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.user_id)


def columns_of(requests: Sequence[Request], spec: FeatureSpec) -> Columns:
    """The columns of some requests, at least one."""
    history = [_recent(request, spec) for request in requests]
    probability = np.concatenate([request.teacher_probability for request in requests])
    return Columns(
        user_id=np.array([request.user_id for request in requests], np.int32),
        user_features=np.stack([request.user_features for request in requests]),
        context=np.stack([request.context for request in requests]),
        history_id=np.stack([of_request[0] for of_request in history]),
        history_features=np.stack([of_request[1] for of_request in history]),
        history_mask=np.stack([of_request[2] for of_request in history]),
        num_passed=np.array([request.num_passed for request in requests], np.int64),
        candidate_start=_starts(len(request.item_id) for request in requests),
        item_id=np.concatenate([request.item_id for request in requests]),
        candidate_features=np.concatenate([request.candidate_features for request in requests]),
        request_category=np.stack(
            [_or_none(request.request_category, (0,)) for request in requests]
        ),
        candidate_category=np.concatenate(
            [_or_none(r.candidate_category, (len(r.item_id), 0)) for r in requests]
        ),
        shown_start=_starts(len(request.user_label) for request in requests),
        user_label=np.concatenate([request.user_label for request in requests]),
        label_weight=np.concatenate([request.label_weight for request in requests]),
        scored_start=_starts(len(request.teacher_probability) for request in requests),
        teacher_probability=probability,
        teacher_proper=np.concatenate(
            [proper_teacher_values(request, spec.teacher_version) for request in requests]
        ),
    )


def _or_none(category: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The category ids, an array of width 0 where the dataset has none."""
    return np.zeros(shape, np.int32) if category is None else category


def proper_teacher_values(request: Request, version: str) -> Bool[np.ndarray, "L T"]:
    """Whether each teacher probability was logged properly.

    Proper is what the log says was written, by the right model version, as a number in [0, 1].
    """
    probability = request.teacher_probability
    if not version or request.teacher_version != version:
        return np.zeros(probability.shape, bool)
    # A comparison with NaN is False, so NaN needs no test of its own.
    in_range = (probability >= 0) & (probability <= 1)
    return in_range & (request.teacher_weight > 0)[:, None]


def joined(parts: Sequence[Columns]) -> Columns:
    """The requests of all parts, in their order."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Columns):
        arrays = [getattr(part, field.name) for part in parts]
        if field.name.endswith("_start"):
            fields[field.name] = _starts(np.concatenate([np.diff(array) for array in arrays]))
        else:
            fields[field.name] = np.concatenate(arrays)
    return Columns(**fields)


def _starts(lengths: Iterable[int]) -> Int[np.ndarray, "n+1"]:
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)])


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
