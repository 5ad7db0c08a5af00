"""Samplers: choices of the candidates that a training batch holds of each request.

A sampler is a pure function of one request

    sampler(counts, scores, batch, key) -> (places, factors)

which `config.batch.sampler` names. `batches.training` runs it on the host, ahead of the steps:

    counts      `Counts` of the request, each a single number
    scores      float32 [n], the teacher's scores of the n = `counts.retrieved` candidates: the mean
                over tasks of the stored probabilities, NaN for a candidate without any
    batch       `BatchConfig`, the numbers of `config.batch`
    key         float64 [4], uniform in [0, 1) and new in each epoch; for more random numbers, take
                `np.random.default_rng(key.view(np.uint64))`
    places      int [k], k ≤ `batch.candidates`: different numbers in [0, n), in any order
    factors     float [k]: the number of labels that the label of each represents; 0 leaves the
                label out. Of candidates that were not shown, which have no label, it has no effect.

The candidates of a request are in this order: `counts.positives` shown ones with a positive label,
the others of the first `counts.shown`, the others of the first `counts.passed`, and the rest. In
each of the four groups any consecutive places are spread evenly over the funnel's order.

If a sampler draws a labeled candidate with probability π and gives it the factor 1 / π, weighted
sums over labels keep their expectation (Horvitz and Thompson, 1952).

    funnel      all shown, then shares of the passed and of the rest
    uniform     all candidates with the same probability
    hard        all shown, then those that the teacher scores highest

To add a sampler, write such a function and add a `Sampler` with it to `SAMPLERS`.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from kd_ranker.batch import Stage
from kd_ranker.batches import sampling
from kd_ranker.batches.sampling import BatchConfig, Draw, Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Counts, counting, kept_kinds

# The kinds of drawn candidates, in the order in which a batch holds them.
_LABELED, _PASSED, _REST, _LEFT_OUT = range(4)

Places = Int[np.ndarray, "k"]
Factors = Float[np.ndarray, "k"]
Scores = Float32[np.ndarray, "n"]
Key = Float[np.ndarray, "4"]
SamplerFunction = Callable[[Counts, Scores, BatchConfig, Key], tuple[Places, Factors]]


class Sampler(NamedTuple):
    """An entry of `SAMPLERS`; the module's docstring has the contract of its function."""

    function: SamplerFunction
    needs_scores: bool = False  # if not, they are all NaN, which saves reading them


def funnel(counts: Counts, scores: Scores, batch: BatchConfig, key: Key) -> tuple[Places, Factors]:
    """Draw the shown, then shares of the passed and of the rest; see `sampling.kinds_of`.

    Training has a compiled form of this function with the same results.
    """
    del scores
    kinds, slots = sampling.kinds_of(counts, Stage.RETRIEVED, batch)
    drawn = sampling.choose_places(sampling.draw_starts(np.zeros((), np.int32), key, kinds), slots)
    places = np.asarray(drawn.indices.candidates)
    factors = np.zeros(len(places), np.float32)
    factors[: len(drawn.factor)] = drawn.factor
    return places[places >= 0], factors[places >= 0]


def uniform(counts: Counts, scores: Scores, batch: BatchConfig, key: Key) -> tuple[Places, Factors]:
    """Draw k = min(n, `batch.candidates`) of the n candidates, each with probability k / n.

    The shown, the passed and the rest have numbers of draws in proportion, see `evenly`. A label
    counts n / k times. `batch.passed_share` and `batch.negative_rate` are not used.
    """
    del scores
    number = min(batch.candidates, int(counts.retrieved))
    places = evenly(_groups(0, counts.shown, counts.passed, counts.retrieved), number, key)
    return places, np.full(number, counts.retrieved / max(number, 1))


def hard(counts: Counts, scores: Scores, batch: BatchConfig, key: Key) -> tuple[Places, Factors]:
    """Draw the shown, then the candidates not shown that the teacher scores highest.

    Labels are drawn as by `funnel`: all positives, and a share `batch.negative_rate` of the n
    negatives; each of the k drawn counts n / k times. Of the slots left, a share
    `batch.passed_share` holds the highest scores among the candidates that were not shown. The
    others are drawn from the remaining ones not shown, each with the same probability. Candidates
    without a score are never among the highest; if too few have one, random draws fill the slots.
    """
    positives, negatives = _groups(0, counts.positives, counts.shown)
    num_positives, num_negatives = sampling.labeled_numbers(
        counts.positives, counts.shown - counts.positives, batch.negative_rate, batch.candidates
    )
    drawn_positives = _consecutive(positives, int(num_positives), key[0])
    drawn_negatives = _consecutive(negatives, int(num_negatives), key[1])
    num_labeled = len(drawn_positives) + len(drawn_negatives)

    (unshown,) = _groups(counts.shown, counts.retrieved)
    slots = min(batch.candidates - num_labeled, len(unshown))
    scored = unshown[~np.isnan(scores[unshown])]
    by_score = scored[np.argsort(-scores[scored], kind="stable")]
    highest = by_score[: round(batch.passed_share * slots)]
    remaining = np.setdiff1d(unshown, highest, assume_unique=True)
    is_passed = remaining < counts.passed
    # The labels have used two of the four numbers of the key.
    uniform_numbers = np.random.default_rng(key.view(np.uint64)).random(3)
    others = evenly(
        [remaining[is_passed], remaining[~is_passed]], slots - len(highest), uniform_numbers
    )
    places = np.concatenate([drawn_positives, drawn_negatives, highest, others])
    factors = np.concatenate(
        [
            _factors(positives, drawn_positives),
            _factors(negatives, drawn_negatives),
            np.zeros(slots),
        ]
    )
    return places, factors


def _factors(group: Int[np.ndarray, "g"], drawn: Int[np.ndarray, "k"]) -> Factors:
    """Return for each drawn label how many labels of its group it represents."""
    return np.full(len(drawn), len(group) / max(len(drawn), 1))


def _groups(*ends: Any) -> list[Int[np.ndarray, "g"]]:
    """Return the places between each two of the ends."""
    return [np.arange(start, stop) for start, stop in pairwise(ends)]


def _consecutive(
    group: Int[np.ndarray, "g"], number: int, start: float
) -> Int[np.ndarray, "number"]:
    """Return consecutive places on the circle of a group's places.

    With `start` uniform in [0, 1), each place is equally likely.
    """
    return np.take(group, int(start * len(group)) + np.arange(number), mode="wrap")


def evenly(
    groups: Sequence[Int[np.ndarray, "g"]], number: int, key: Float[np.ndarray, "_"]
) -> Places:
    """Draw `number` of the places of some groups, each with the same probability; by group.

    Of n places in all, a group of g places gets `number` · g / n of the draws, rounded at random to
    one of the two nearest integers: systematic sampling over all places in a row (Madow and Madow,
    1944). The draws of a group are consecutive places from a random start on. `key` has a uniform
    number in [0, 1) for the rounding, and one per group.
    """
    ends = np.cumsum([0, *map(len, groups)])
    quotas = np.diff((int(key[0] * ends[-1]) + number * ends) // max(ends[-1], 1))
    starts = key[1 : 1 + len(groups)]
    drawn = [
        _consecutive(group, quota, start)
        for group, quota, start in zip(groups, quotas.tolist(), starts, strict=True)
    ]
    return np.concatenate(drawn)


SAMPLERS: dict[str, Sampler] = {
    "funnel": Sampler(funnel),
    "uniform": Sampler(uniform),
    "hard": Sampler(hard, needs_scores=True),
}
"""The samplers by name."""


def slots_of(counts: Counts, stage: Stage, batch: BatchConfig) -> Slots:
    """Return slots that suffice for any sampler, if candidates that reached `stage` count."""
    counted = np.minimum(counting(counts, stage), batch.candidates)
    beyond_passed = (counts.scored > counts.passed).any()
    num_scored = counted if beyond_passed else np.minimum(counted, counts.passed)
    num_labeled = np.minimum(counted, counts.shown)
    return Slots.for_all(candidates=counted, num_labeled=num_labeled, num_scored=num_scored)


def scores_of(columns: Columns, stage: Stage, request: int) -> Scores:
    """Return the teacher's stored scores of a request; see the module's docstring.

    Scores of candidates that did not reach `stage` are NaN.
    """
    counts = columns.counts.of(request)
    number = np.minimum(counts.scored, counts.reached(stage))[None]
    fields = columns.candidates.fields(np.array([request]), number)
    probability = fields["teacher_probability"]
    known = ~np.isnan(probability)
    total = np.where(known, probability, 0).sum(axis=1)
    scores = np.full(counts.retrieved, np.nan, np.float32)
    np.divide(total, known.sum(axis=1), out=scores[: len(total)], where=known.any(axis=1))
    return scores


class Inputs(NamedTuple):
    """What a sampler may see of the requests; it is the same whatever the runs need."""

    counts: Counts
    scores_of: Callable[[int], Scores]  # of a request


def inputs_of(columns: Columns, stage: Stage) -> Inputs:
    """Return the inputs of samplers, with the scores of candidates that reached `stage`."""
    counts = columns.counts
    scored = np.minimum(counts.scored, counts.reached(stage))
    return Inputs(counts._replace(scored=scored), functools.partial(scores_of, columns, stage))


def draw(
    counts: Counts,
    inputs: Inputs,
    batch: BatchConfig,
    stage: Stage,
    slots: Slots,
    request: Int[np.ndarray, "R steps"],
    key: Float[np.ndarray, "R steps 4"],
) -> Draw:
    """Draw the candidates of the batches of some steps, request by request.

    A sampler sees `inputs`, so what it draws does not depend on what the runs need. Then drawn
    candidates that no run needs are left out, by `stage` and by `counts`, which has only the scores
    that a run learns from; see `columns.kept_kinds`. Labeled ones come first, then the others that
    were passed, then the rest.

    Raises:
      UserError: the sampler breaks its contract.
    """
    sampler = SAMPLERS[batch.sampler]
    request_counts = counts.of(request)
    seen_counts = inputs.counts.of(request)
    place = np.full((*request.shape, batch.candidates), -1, np.int32)
    factor = np.zeros(place.shape, np.float32)
    for index in np.ndindex(request.shape):
        counts_of_one = seen_counts.of(index)
        if sampler.needs_scores:
            scores = inputs.scores_of(int(request[index]))
        else:
            scores = np.full(counts_of_one.retrieved, np.nan, np.float32)
        result = sampler.function(counts_of_one, scores, batch, key[index])
        places, factors = checked(result, counts_of_one, batch)
        place[index][: len(places)] = places
        factor[index][: len(places)] = factors

    # One axis more than the requests, for the candidates.
    wide = Counts(*(values[..., None] for values in request_counts))
    is_labeled = (place >= 0) & (place < wide.shown) & (factor > 0)
    is_passed = place < wide.passed
    kept = kept_kinds(wide, stage)
    is_kept = np.where(is_passed, kept.others, kept.rest) & (place >= 0)
    kind = np.select(
        [is_labeled, is_kept & is_passed, is_kept],
        [_LABELED, _PASSED, _REST],
        _LEFT_OUT,
    )
    place = np.where(kind < _LEFT_OUT, place, np.int32(-1))
    factor = np.where(is_labeled, factor, np.float32(0))
    order = np.argsort(kind.astype(np.int8), axis=-1, kind="stable")[..., : slots.candidates]
    place = np.take_along_axis(place, order, axis=-1)
    factor = np.take_along_axis(factor, order, axis=-1)[..., : slots.num_labeled]
    return sampling.draw_of(
        request.astype(np.int32),
        place,
        factor,
        request_counts.passed.astype(np.int32),
        request_counts.shown.astype(np.int32),
    )


def checked(result: Any, counts: Counts, batch: BatchConfig) -> tuple[Places, Factors]:
    """Return the arrays of a sampler's result; raise UserError if it breaks its contract."""
    with contextlib.suppress(TypeError, ValueError):  # not a pair, or not of arrays
        places, factors = map(np.asarray, result)
        # The default type of an empty array is float.
        if (
            places.shape == factors.shape == (len(np.unique(places)),)
            and len(places) <= batch.candidates
            and (places.dtype.kind in "iu" or not places.size)
            and places.min(initial=0) >= 0
            and places.max(initial=-1) < counts.retrieved
            and ((factors >= 0) & (factors <= np.finfo(np.float32).max)).all()
        ):
            return places, factors
    raise UserError(
        f"sampler {batch.sampler}, request {int(counts.request_id)}: return at most "
        f"{batch.candidates} different places, integers from 0 to {int(counts.retrieved) - 1}, and "
        "as many factors, finite and at least 0; see docs/extending.md"
    )
