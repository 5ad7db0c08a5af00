"""Sampling: the candidates of each request that a training batch holds.

Only a few integers per request are drawn at random (`Starts`). Arithmetic turns them into
candidates (`Draw`), for the batches of many steps at once. It is the same on NumPy arrays on the
host and, compiled, on a device. `cutting` makes batches of them.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Int8

from kd_ranker.batch import Stage
from kd_ranker.requests.columns import Counts, Parts, kept_kinds

# The kinds of candidates that a batch holds, in the order in which it holds them.
KINDS = 4
POSITIVES, NEGATIVES, OTHERS, REST = range(KINDS)

Starts = Int[Array, "*R steps columns"]
"""The random part of the batches of a few consecutive steps, see `draw_starts`."""


class BatchConfig(NamedTuple):
    """The sizes and the order of batches: the keys of `config.batch` or `config.teacher.batch`."""

    requests: int  # over all processes
    candidates: int  # the most to draw of a request
    passed_share: float  # see `samplers.funnel` and `samplers.hard`
    negative_rate: float  # share of the shown candidates without a positive label to keep
    seed: int  # of the order and of the draws
    order: str = "shuffled"  # one of `batches.training.ORDERS`
    sampler: str = "funnel"  # one of `samplers.SAMPLERS`


class Slots(NamedTuple):
    """The numbers of a request's first slots in a batch that can hold each kind of entry."""

    candidates: int  # N, a candidate that counts
    num_labeled: int  # a user label that counts
    num_scored: int  # a teacher probability, or a candidate that was passed

    @classmethod
    def for_all(
        cls,
        candidates: Int[np.ndarray, "n"],
        num_labeled: Int[np.ndarray, "n"],
        num_scored: Int[np.ndarray, "n"],
    ) -> "Slots":
        """Return slots that suffice for these numbers of all requests, at least one of each."""
        return cls(
            candidates=max(int(candidates.max()), 1),
            num_labeled=max(int(num_labeled.max()), 1),
            num_scored=max(int(num_scored.max()), 1),
        )


class Draw(NamedTuple):
    """The entries that batches hold: of R requests, for each of a few steps.

    Attributes:
      indices: the request [*R], and the indices in it of the candidates [*R, N] and of the labels
        [*R, num_labeled], -1 for padding.
      stage: the stage that each candidate reached.
      factor: on the weight of each label; 0 if the label is not a training target.
    """

    indices: Parts
    stage: Int8[Array, "*R N"]
    factor: Float[Array, "*R labeled"]


class Gathered(NamedTuple):
    """A draw with the rows in place of the indices.

    Attributes:
      rows: of the requests, the candidates and the labels, int32 [*R, Q], [*R, N, C] and
        [*R, num_labeled, L]; see `kd_ranker.requests.row_files`.
      stage: see `Draw`.
      factor: see `Draw`.
    """

    rows: Parts
    stage: Int8[Array, "*R N"]
    factor: Float[Array, "*R labeled"]


def kinds_of(
    counts: Counts, stage: Stage, batch: BatchConfig
) -> tuple[Int[np.ndarray, "*n columns"], Slots]:
    """Decide how many candidates of each kind a batch holds for each request.

    The kinds are: shown with a positive label; shown without one; the others that were passed; and
    the rest of the retrieved. A shown candidate that is not drawn with
    its label is one of the others that were passed.

    Shown candidates come first: all positives, and a share `negative_rate` of the n negatives. Each
    of these k negatives then counts n / k times, so weighted sums over the labels keep their
    expectation. If they do not fit, they are thinned and reweighted in the same way. The passed get
    a share `passed_share` of the remaining slots, and the rest get the others; if either runs out,
    the other takes its slots. Last, kinds that no run needs are left out, see `kept_kinds`. That
    changes nothing in the draw of the others.

    Returns:
      int32: for each request the number of candidates of each kind, and the number of each that a
      batch holds. And the slots that suffice for all of the requests.
    """
    positives = counts.positives
    negatives = counts.shown - counts.positives
    drawn_positives, drawn_negatives = labeled_numbers(
        positives, negatives, batch.negative_rate, batch.candidates
    )
    num_labeled = drawn_positives + drawn_negatives
    others = counts.passed - num_labeled
    rest = counts.retrieved - counts.passed
    slots = np.minimum(batch.candidates - num_labeled, others + rest)
    slots_of_others = np.minimum(np.rint(batch.passed_share * slots).astype(np.int64), others)
    slots_of_others = np.maximum(slots_of_others, slots - rest)
    kept = kept_kinds(counts, stage)
    drawn_others = np.where(kept.others, slots_of_others, 0)
    drawn_rest = np.where(kept.rest, slots - slots_of_others, 0)
    numbers = [positives, negatives, others, rest]
    drawn = [drawn_positives, drawn_negatives, drawn_others, drawn_rest]
    kinds = np.stack([*numbers, *drawn], axis=-1).astype(np.int32)
    num_scored = num_labeled + drawn_others
    total = num_scored + drawn_rest
    if (counts.scored > counts.passed).any():
        num_scored = total
    return kinds, Slots.for_all(candidates=total, num_labeled=num_labeled, num_scored=num_scored)


def labeled_numbers(
    positives: Int[np.ndarray, "*n"],
    negatives: Int[np.ndarray, "*n"],
    negative_rate: float,
    slots: int,
) -> tuple[Int[np.ndarray, "*n"], Int[np.ndarray, "*n"]]:
    """Return the numbers of positives and of negatives that a batch keeps with their labels."""
    wanted = np.rint(negative_rate * negatives).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), negatives)
    total = positives + wanted
    # If they do not fit, both are thinned in proportion, and neither to zero; a single slot goes to
    # a positive.
    reserved = np.minimum(wanted, 1) if slots > 1 else np.zeros_like(wanted)
    fewer = np.rint(slots * positives / np.maximum(total, 1)).astype(np.int64)
    fewer = np.maximum(fewer, 1)
    fewer = np.minimum(fewer, np.maximum(slots - reserved, 0))
    fewer = np.minimum(fewer, positives)
    does_not_fit = total > slots
    num_positives = np.where(does_not_fit, fewer, positives)
    num_negatives = np.where(does_not_fit, np.minimum(slots - num_positives, wanted), wanted)
    return num_positives, num_negatives


def draw_starts(
    request: Int[np.ndarray, "R steps"],
    start: Float[np.ndarray, "R steps kinds"],
    kinds: Int[np.ndarray, "R steps columns"],
) -> Starts:
    """Draw the random offsets of requests from uniform numbers in [0, 1).

    Returns:
      int32: the result of `kinds_of` for these requests; the numbers of the requests; and the place
      at which the sample of each kind starts, in [0, number of that kind), 0 for an empty kind. All
      are in one array, for one transfer. Consecutive places from a uniform start draw each place
      with the same probability and at most once: systematic sampling (Madow and Madow, 1944).
    """
    number = kinds[..., :KINDS]
    # A product with a number next to 1 may be rounded up.
    offset = np.minimum((start * number).astype(np.int32), np.maximum(number - 1, 0))
    columns = (kinds, request[..., None], offset)
    return np.concatenate(columns, axis=-1, dtype=np.int32)  # type: ignore[return-value]


def choose_places(starts: Starts, slots: Slots) -> Draw:
    """Return the candidates that `starts` select: those with labels first, padding last.

    Takes arrays of NumPy or of JAX.
    """
    xp = starts.__array_namespace__()  # type: ignore[attr-defined]
    # Of each kind, [*R, 1]: its number of candidates, how many to draw, and where the draw starts.
    number = [starts[..., [kind]] for kind in range(KINDS)]
    k = [starts[..., [KINDS + kind]] for kind in range(KINDS)]
    request = starts[..., 2 * KINDS]
    start = [starts[..., [2 * KINDS + 1 + kind]] for kind in range(KINDS)]

    shown = number[POSITIVES] + number[NEGATIVES]
    num_labeled = k[POSITIVES] + k[NEGATIVES]  # the shown that are drawn with their labels
    passed = num_labeled + number[OTHERS]

    # The candidates of a kind lie on a circle. Its sample is a stretch of the circle, from its
    # start; the candidates that are left out follow the sample.
    def around(index: Any, number: Any) -> Any:
        """Return the place on a circle of `number` places of an index in [0, 2 · number)."""
        return index - number * (index >= number)

    def place_of_other(index: Any) -> Any:
        """Return the place of one of the others that were passed, as `kinds_of` counts them.

        Their circle begins with the shown candidates that are not drawn with their labels: first
        the positives left out, then the negatives left out. The candidates that were passed and
        not shown follow.
        """
        positives_left_out = number[POSITIVES] - k[POSITIVES]
        shown_left_out = shown - num_labeled
        positive = around(start[POSITIVES] + k[POSITIVES] + index, number[POSITIVES])
        index_of_negative = start[NEGATIVES] + k[NEGATIVES] + index - positives_left_out
        negative = number[POSITIVES] + around(index_of_negative, number[NEGATIVES])
        not_shown = shown + index - shown_left_out
        left_out = xp.where(index < positives_left_out, positive, negative)
        return xp.where(index < shown_left_out, left_out, not_shown)

    slot: Any = xp.arange(slots.candidates, dtype=starts.dtype)
    place: Any = xp.zeros_like(slot)
    end: Any = 0
    # Kinds are written in their order. Each overwrites all slots from its first one on, so what a
    # kind writes into the slots of later ones does not matter.
    for kind in range(KINDS):
        index = around(start[kind] + slot - end, number[kind])
        if kind == POSITIVES:
            place_of_index = index
        elif kind == NEGATIVES:
            place_of_index = number[POSITIVES] + index
        elif kind == OTHERS:
            place_of_index = place_of_other(index)
        else:
            place_of_index = passed + index
        place = xp.where(slot >= end, place_of_index, place)
        end = end + k[kind]

    def factor_of(kind: int) -> Any:
        return number[kind].astype(xp.float32) / xp.maximum(k[kind], 1).astype(xp.float32)

    label_slot = slot[: slots.num_labeled]
    factor = xp.where(label_slot < k[POSITIVES], factor_of(POSITIVES), factor_of(NEGATIVES))
    factor = xp.where(label_slot < num_labeled, factor, xp.float32(0))
    place = xp.where(slot < end, place, -1)
    return draw_of(request, place, factor, passed[..., 0], shown[..., 0])


def draw_of(request: Any, place: Any, factor: Any, passed: Any, shown: Any) -> Draw:
    """Return the draw of places in the candidates of each request.

    Args:
      request: int [*R], the numbers of the requests.
      place: int [*R, N], the candidates of each, in the order of the batch; -1 for none.
      factor: float32 [*R, num_labeled], on the label weight of the first of them.
      passed: int [*R], the number of leading candidates of each request that were passed.
      shown: int [*R], the number that were shown.
    """
    xp = place.__array_namespace__()
    is_passed = place < passed[..., None]
    is_shown = place < shown[..., None]
    stage = xp.where(is_passed, xp.int8(Stage.PASSED), xp.int8(Stage.RETRIEVED))
    stage = xp.where(is_shown, xp.int8(Stage.SHOWN), stage)
    num_labeled = factor.shape[-1]
    label_place = xp.where(is_shown[..., :num_labeled], place[..., :num_labeled], -1)
    return Draw(
        indices=Parts(requests=request, candidates=place, labels=label_place),
        stage=xp.where(place >= 0, stage, xp.int8(Stage.PADDING)),
        factor=factor,
    )
