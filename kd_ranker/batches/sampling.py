"""Sampling: the candidates of each request that a training batch holds.

Only a few integers per request are drawn at random (`Starts`). Arithmetic turns them into
candidates (`Draw`), for the batches of many steps at once. It is the same on NumPy arrays on the
host and, compiled, on a device. `cutting` makes batches of them.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Int8

from kd_ranker.batch import Stage
from kd_ranker.requests.columns import Counts, Parts, what_counts

# The kinds of candidates that a batch holds, in the order in which it holds them.
POSITIVES, NEGATIVES, OTHERS, REST = range(KINDS := 4)

Starts = Int[Array, "*R steps columns"]
"""The random part of the batches of a few consecutive steps, see `draw`."""


class BatchConfig(NamedTuple):
    """The sizes and the order of batches: the keys of `config.batch` or `config.teacher.batch`."""

    requests: int  # over all processes
    candidates: int  # the most to draw of a request
    passed_share: float  # see `samplers.funnel` and `samplers.hard`
    negative_rate: float  # share of the shown candidates without a positive label to keep
    seed: int  # of the order and of the draws
    order: str = "shuffled"  # one of `training.ORDERS`
    sampler: str = "funnel"  # one of `samplers.SAMPLERS`


class Slots(NamedTuple):
    """The numbers of a request's first slots in a batch that can hold each kind of entry."""

    candidates: int  # N, a candidate that counts
    labelled: int  # a user label that counts
    judged: int  # a teacher probability, or a candidate that was passed


class Draw(NamedTuple):
    """The entries that batches hold: of R requests, for each of a few steps.

    Attributes:
      rows: the request [*R], and the places in it of the candidates [*R, N] and of the labels
        [*R, labelled], -1 for padding; or the rows themselves, int32 [*R, Q], [*R, N, C] and
        [*R, labelled, L].
      stage: the stage that each candidate reached.
      factor: on the weight of each label; 0 if the label is not a training target.
    """

    rows: Parts
    stage: Int8[Array, "*R N"]
    factor: Float[Array, "*R labelled"]


def kinds_of(
    counts: Counts, stage: Stage, batch: BatchConfig
) -> tuple[Int[np.ndarray, "*n columns"], Slots]:
    """Decide how many candidates of each kind a batch holds for each request.

    The kinds are: shown with a positive label; shown without one; the others that were passed; and
    the rest of the retrieved. A shown candidate that is not drawn with its labels counts as passed.

    Shown candidates come first: all positives, and a share `negative_rate` of the n negatives. Each
    of these k negatives then counts n / k times, so weighted sums over the labels keep their
    expectation. If they do not fit, they are thinned and reweighted in the same way. The passed get
    a share `passed_share` of the remaining slots, and the rest get the others; if either runs out,
    the other takes its slots. A slot for a candidate that does not count at `stage` is left out.
    Those that count are drawn as if it were kept.

    Returns:
      int32: for each request the number of candidates of each kind, and the number of each that a
      batch holds. And the slots that suffice for all of the requests.
    """
    positives, negatives = counts.positives, counts.shown - counts.positives
    kept_positives, kept_negatives = labelled_numbers(
        positives, negatives, batch.negative_rate, batch.candidates
    )
    labelled = kept_positives + kept_negatives
    others, rest = counts.passed - labelled, counts.retrieved - counts.passed
    slots = np.minimum(batch.candidates - labelled, others + rest)
    from_others = np.minimum(np.rint(batch.passed_share * slots).astype(np.int64), others)
    from_others = np.maximum(from_others, slots - rest)
    passed_count, rest_counts = what_counts(counts, stage)
    wanted_others = np.where(passed_count, from_others, 0)
    wanted_rest = np.where(rest_counts, slots - from_others, 0)
    numbers = (positives, negatives, others, rest)
    wanted = (kept_positives, kept_negatives, wanted_others, wanted_rest)
    kinds = np.stack((*numbers, *wanted), axis=-1).astype(np.int32)
    judged = labelled + wanted_others
    total = judged + wanted_rest
    if (counts.scored > counts.passed).any():
        judged = total
    most = [max(int(of.max()), 1) for of in (total, labelled, judged)]
    return kinds, Slots(*most)


def labelled_numbers(
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
    share = np.rint(slots * positives / np.maximum(total, 1)).astype(np.int64)
    fewer = np.minimum(np.minimum(np.maximum(share, 1), np.maximum(slots - reserved, 0)), positives)
    thinned = total > slots
    kept = np.where(thinned, fewer, positives)
    return kept, np.where(thinned, np.minimum(slots - kept, wanted), wanted)


def draw(
    request: Int[np.ndarray, "R steps"],
    start: Float[np.ndarray, "R steps kinds"],
    kinds: Int[np.ndarray, "R steps columns"],
) -> Starts:
    """Draw the random offsets of requests from uniform numbers in [0, 1).

    Returns:
      int32: the `kinds_of` these requests; their numbers; and the place at which the sample of each
      kind starts, in [0, number of that kind), 0 for an empty kind. All are in one array, for one
      transfer. A run of places from a uniform start draws each place with the same probability and
      at most once: systematic sampling (Madow and Madow, 1944).
    """
    number = kinds[..., :KINDS]
    # A product with a number next to 1 may be rounded up.
    offset = np.minimum((start * number).astype(np.int32), np.maximum(number - 1, 0))
    columns = (kinds, request[..., None], offset)
    return np.concatenate(columns, axis=-1, dtype=np.int32)  # type: ignore[return-value]


def chosen(starts: Starts, slots: Slots) -> Draw:
    """Return the candidates that `starts` select: shown candidates first, padding last.

    Takes arrays of NumPy or of JAX.
    """
    xp = starts.__array_namespace__()  # type: ignore[attr-defined]
    numbers, wanted, request, offset = xp.split(starts, np.cumsum([KINDS, KINDS, 1]), axis=-1)
    place, factor = _places(numbers, wanted, offset, slots.candidates)
    shown = numbers[..., POSITIVES] + numbers[..., NEGATIVES]
    passed = wanted[..., POSITIVES] + wanted[..., NEGATIVES] + numbers[..., OTHERS]
    return draw_of(request[..., 0], place, factor[..., : slots.labelled], passed, shown)


def draw_of(request: Any, place: Any, factor: Any, passed: Any, shown: Any) -> Draw:
    """Return the draw of places in the candidates of each request.

    Args:
      request: int [*R], the numbers of the requests.
      place: int [*R, N], the candidates of each, in the order of the batch; -1 for none.
      factor: float32 [*R, labelled], on the label weight of the first of them.
      passed: int [*R], the number of leading candidates of each request that were passed.
      shown: int [*R], the number that were shown.
    """
    xp = place.__array_namespace__()
    passed, shown = passed[..., None], shown[..., None]
    stage = xp.where(place < passed, xp.int8(Stage.PASSED), xp.int8(Stage.RETRIEVED))
    stage = xp.where(place < shown, xp.int8(Stage.SHOWN), stage)
    first = place[..., : factor.shape[-1]]
    return Draw(
        rows=Parts(request, place, xp.where(first < shown, first, -1)),
        stage=xp.where(place >= 0, stage, xp.int8(Stage.PADDING)),
        factor=factor,
    )


def _places(
    numbers: Int[Array, "*R kinds"],
    wanted: Int[Array, "*R kinds"],
    offset: Int[Array, "*R kinds"],
    candidates: int,
) -> tuple[Int[Array, "*R N"], Float[Array, "*R N"]]:
    """Return the drawn places of each request, -1 for padding, and the factor on each label."""
    xp = offset.__array_namespace__()  # type: ignore[attr-defined]
    slot = xp.arange(candidates, dtype=offset.dtype)
    # Sums of four, one by one: a compiled scan over so few costs more.
    ends = [wanted[..., [POSITIVES]]]
    for kind in (NEGATIVES, OTHERS, REST):
        ends.append(ends[-1] + wanted[..., [kind]])

    def pick(of_kinds: Any) -> Int[Array, "*R N"]:
        """The number of each slot's kind: a choice among four costs less than a gather."""
        picked = of_kinds[REST]
        for kind in (OTHERS, NEGATIVES, POSITIVES):
            picked = xp.where(slot < ends[kind], of_kinds[kind], picked)
        return picked

    def of_kind(array: Int[Array, "*R kinds"]) -> Int[Array, "*R N"]:
        return pick([array[..., [kind]] for kind in range(KINDS)])

    def around(index: Int[Array, "..."], number: Int[Array, "..."]) -> Int[Array, "..."]:
        """`index`, in [0, 2 · number), on a circle of `number` places."""
        return index - number * (index >= number)

    # A sample is a run of places on the circle of its kind; the places left out follow it there.
    number, k, begin = of_kind(numbers), of_kind(wanted), pick([0 * ends[0], *ends[:-1]])
    sampled = around(of_kind(offset) + slot - begin, number)

    # Among the others, shown candidates that were not drawn come first: positives, negatives.
    positives, negatives = numbers[..., [POSITIVES]], numbers[..., [NEGATIVES]]
    drawn_positives, drawn_negatives = wanted[..., [POSITIVES]], wanted[..., [NEGATIVES]]
    after_positives = sampled - (positives - drawn_positives)
    left_positive = around(offset[..., [POSITIVES]] + drawn_positives + sampled, positives)
    left_negative = around(offset[..., [NEGATIVES]] + drawn_negatives + after_positives, negatives)
    after_negatives = after_positives - (negatives - drawn_negatives)
    other = xp.where(after_positives < 0, left_positive, positives + left_negative)
    other = xp.where(after_negatives < 0, other, positives + negatives + after_negatives)
    passed = numbers[..., [OTHERS]] + drawn_positives + drawn_negatives
    place = pick([sampled, positives + sampled, other, passed + sampled])
    stands_for = number.astype(xp.float32) / xp.maximum(k, 1).astype(xp.float32)
    factor = xp.where(slot < ends[NEGATIVES], stands_for, xp.float32(0))
    return xp.where(slot < ends[REST], place, -1), factor
