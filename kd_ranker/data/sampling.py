"""From a request on disk to the fixed number of candidates that a batch holds.

Host side, NumPy, one request at a time. The results are the fields of `CandidateBatch` without
their request axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8

from kd_ranker.batch import FeatureSpec, Stage
from kd_ranker.data.request import Request

Fields = dict[str, Any]

# The fields of `CandidateBatch` with an axis of candidates.
PER_CANDIDATE = (
    "item_id",
    "candidate_features",
    "stage",
    "user_label",
    "label_weight",
    "teacher_probability",
    "teacher_weight",
)


def proper_teacher_weight(request: Request, version: str) -> Float32[np.ndarray, "L T"]:
    """1 where a teacher probability was logged properly, else 0.

    Proper is what the log says was written, by the right model version, as a number in [0, 1].
    """
    probability = request.teacher_probability
    if not version or request.teacher_version != version:
        return np.zeros_like(probability)
    # A comparison with NaN is False, so NaN needs no test of its own.
    in_range = (probability >= 0) & (probability <= 1)
    return (in_range & (request.teacher_weight > 0)[:, None]).astype(np.float32)


def stages(request: Request) -> Int8[np.ndarray, "N"]:
    """How far each candidate of a request came; they lie in funnel order."""
    stage = np.full(len(request.item_id), Stage.RETRIEVED, np.int8)
    stage[: request.num_passed] = Stage.PASSED
    stage[: len(request.user_label)] = Stage.SHOWN
    return stage


def choose_labelled(
    positive: Bool[np.ndarray, "S"],
    negative_rate: float,
    slots: int,
    generator: np.random.Generator,
) -> tuple[Int[np.ndarray, "S"], Float32[np.ndarray, "S"]]:
    """Which shown candidates a batch keeps with their labels, and how much more each then weighs.

    All positives stay; of the n negatives a share `negative_rate` is drawn without replacement, k
    in number, and each of those counts n / k times, so that weighted sums over the labels keep
    their expectation. What would not fit into `slots` is thinned and reweighted the same way.

    Returns:
      positions in [0, S), positives first, and the factor on the label weight of each.
    """
    groups = [np.flatnonzero(positive), np.flatnonzero(~positive)]
    wanted = [len(groups[0]), min(max(round(negative_rate * len(groups[1])), 1), len(groups[1]))]
    if sum(wanted) > slots:
        # Both are thinned in proportion, and neither to nothing; a single slot goes to a positive.
        reserved = min(wanted[1], 1) if slots > 1 else 0
        share = round(slots * wanted[0] / sum(wanted))
        wanted[0] = min(max(share, 1), max(slots - reserved, 0), wanted[0])
        wanted[1] = min(slots - wanted[0], wanted[1])
    kept, factors = [], []
    for candidates, number in zip(groups, wanted, strict=True):
        if number:
            drawn = candidates
            if number < len(candidates):
                drawn = generator.choice(candidates, number, replace=False, shuffle=False)
            kept.append(drawn)
            factors.append(np.full(number, len(candidates) / number, np.float32))
    if not kept:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(kept), np.concatenate(factors)


def choose_unlabelled(
    passed: Int[np.ndarray, "A"],
    retrieved: Int[np.ndarray, "B"],
    passed_share: float,
    slots: int,
    generator: np.random.Generator,
) -> Int[np.ndarray, "at_most_slots"]:
    """Fills the slots that are left: a share from the passed, the others from the rest.

    Where one of the two runs out the other fills up.
    """
    slots = min(slots, len(passed) + len(retrieved))
    number = min(round(passed_share * slots), len(passed))
    number = max(number, slots - len(retrieved))
    return np.concatenate(
        [
            generator.choice(passed, number, replace=False, shuffle=False),
            generator.choice(retrieved, slots - number, replace=False, shuffle=False),
        ]
    )


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """`array` filled up with zeros to `length` along its first axis."""
    result = np.zeros((length, *array.shape[1:]), array.dtype)
    result[: len(array)] = array
    return result


def _prefix(array: np.ndarray, positions: Int[np.ndarray, "M"]) -> np.ndarray:
    """`array[positions]` where a column is known for a prefix only; zeros beyond it."""
    result = np.zeros((len(positions), *array.shape[1:]), array.dtype)
    known = positions < len(array)
    result[known] = array[positions[known]]
    return result


def batch_fields(
    request: Request,
    spec: FeatureSpec,
    positions: Int[np.ndarray, "M"],
    label_weight: Float32[np.ndarray, "M"],
    candidates: int,
) -> Fields:
    """The fields of `CandidateBatch` for the chosen candidates of one request.

    Args:
      request: the request.
      spec: the sizes of its dataset.
      positions: which candidates, in the order of the batch.
      label_weight: the weight of each one's user labels.
      candidates: the number N to fill up to.
    """
    history = min(len(request.history_id), spec.history_length)
    chosen = {
        "item_id": request.item_id[positions],
        "candidate_features": request.candidate_features[positions],
        "stage": stages(request)[positions],
        "user_label": _prefix(request.user_label, positions).astype(np.float32),
        "label_weight": label_weight,
        "teacher_probability": _prefix(request.teacher_probability, positions),
        "teacher_weight": _prefix(proper_teacher_weight(request, spec.teacher_version), positions),
    }
    return {
        "user_id": np.int32(request.user_id),
        "user_features": request.user_features,
        "context": request.context,
        # The most recent events are the last ones.
        "history_id": _padded(
            request.history_id[-history:] if history else request.history_id, spec.history_length
        ),
        "history_features": _padded(
            request.history_features[-history:] if history else request.history_features,
            spec.history_length,
        ),
        "history_mask": np.arange(spec.history_length) < history,
        **{name: _padded(array, candidates) for name, array in chosen.items()},
    }


def training_fields(
    request: Request,
    spec: FeatureSpec,
    candidates: int,
    passed_share: float,
    negative_rate: float,
    generator: np.random.Generator,
) -> Fields:
    """A training sample of one request: shown candidates first, then others to fill up.

    Args:
      request: the request.
      spec: the sizes of its dataset.
      candidates: `config.batch.candidates`.
      passed_share: the share of the slots left after the shown that the passed fill.
      negative_rate: the share of the shown candidates without any positive label to keep.
      generator: the source of all randomness.

    Returns:
      The fields of `CandidateBatch`; shown candidates whose labels were not drawn may come back
      among the others, with label weight 0.
    """
    shown = len(request.user_label)
    labelled, factors = choose_labelled(
        np.asarray(request.user_label.any(axis=-1)), negative_rate, candidates, generator
    )
    others = np.setdiff1d(np.arange(request.num_passed), labelled, assume_unique=True)
    rest = np.arange(max(request.num_passed, shown), len(request.item_id))
    unlabelled = choose_unlabelled(
        others, rest, passed_share, candidates - len(labelled), generator
    )
    return batch_fields(
        request,
        spec,
        positions=np.concatenate([labelled, unlabelled]),
        label_weight=_padded(
            request.label_weight[labelled] * factors, len(labelled) + len(unlabelled)
        ),
        candidates=candidates,
    )


def full_fields(request: Request, spec: FeatureSpec, candidates: int) -> Fields:
    """All candidates of a request in their stored order, filled up to `candidates`."""
    number = len(request.item_id)
    return batch_fields(
        request,
        spec,
        positions=np.arange(number),
        label_weight=_padded(request.label_weight, number),
        candidates=candidates,
    )


def stack(rows: Sequence[Fields]) -> Fields:
    """The fields of several requests as those of a batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
