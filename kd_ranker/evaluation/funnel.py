"""The funnel's yield when the student passes its top k, for every k = 1..N at once.

The funnel: N candidates retrieved, the student passes its top k, the teacher ranks those and shows
m. Axes: `R` requests, `N` candidates, `T` tasks; index `k - 1` of a curve belongs to k.

Ties: equal values keep the order of the candidates in the request, for both student and teacher.
That is fair only if this order is independent of quality: it decides the rank of a student that
gives every candidate the same value.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num


@flax.struct.dataclass
class FunnelCurves:
    """Curves over k = 1..N, and the top m, of each request or, without the leading axis, of one.

    Attributes:
      survival: share, in [0, 1], of the teacher's own top m that the student's top k keeps.
      value_captured: summed teacher value of the m items shown when the teacher ranks only the
        student's top k. Its last entry is the same when the teacher ranks all retrieved, and so
        the denominator of the design's `value_captured@k`.
      true_value_captured: summed true value of the same items, with the columns of `true_value`;
        its last entry is again the denominator. NaN where the true values are not known.
      shown_kept: how many of the candidates that the logged funnel has shown the student's top k
        keeps; 0 where that funnel has shown all of them or none, which cannot
        distinguish students.
      positives_kept: how many of the candidates with a positive label of a task the student's top k
        keeps; its last entry is their number.
      positives_shown: how many of them are among the m items shown when the teacher ranks only the
        student's top k.
      gain: teacher value of the m candidates that the student ranks first, in its order; 0 where it
        is not known.
      ideal_gain: the same in the teacher's own order.
      counts: False where the teacher knows no candidate of the request; all curves of
        the teacher's choice are 0 there.
    """

    survival: Float[Array, "R N"]
    value_captured: Float[Array, "R N"]
    true_value_captured: Float[Array, "R N ..."]
    shown_kept: Float[Array, "R N"]
    positives_kept: Float[Array, "R N T"]
    positives_shown: Float[Array, "R N T"]
    gain: Float[Array, "R m"]
    ideal_gain: Float[Array, "R m"]
    counts: Bool[Array, "R"]


def value(
    probability: Float[Array, "*shape T"], value_weights: Float[Array, "T"]
) -> Float[Array, "*shape"]:
    """The sum that a ranker sorts by: Σ over tasks of weight · probability, weights ≥ 0.

    A task of weight 0 may hold anything, NaN included.

    A product and a sum, not a matrix product: accelerators may round the inputs of the latter to
    fewer bits, which would make ties out of candidates that differ.
    """
    return jnp.where(value_weights > 0, probability * value_weights, 0.0).sum(axis=-1)


def funnel_curves(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    shown: int,
    true_value: Float[Array, "R N ..."] | None = None,
    was_shown: Bool[Array, "R N"] | None = None,
    positive: Bool[Array, "R N T"] | None = None,
) -> FunnelCurves:
    """Return the curves of each request.

    Args:
      student_value: the value that the student sorts by; finite. If it is NaN on a candidate that
        the teacher knows, the student has diverged and the curves of that request are NaN.
      teacher_value: the value that the teacher sorts by, non-negative; NaN if it is not known. A
        candidate without it takes a place in the student's top k, and the teacher never chooses
        it.
      candidate_mask: False on padding, which is ranked behind all and never chosen.
      shown: m, the number of items shown, at least 1. Fewer are shown where k, or the number of
        candidates that the teacher knows, is smaller.
      true_value: the true value of each candidate, or several values that are summed in the same
        way; None if the dataset does not know it.
      was_shown: whether the logged funnel has shown it; None if it is not needed.
      positive: for each task, whether the user is known to have done it; None if it is not needed.
    """
    if shown < 1:
        raise ValueError(f"shown={shown} must be at least 1")
    if true_value is None:
        true_value = jnp.full_like(teacher_value, jnp.nan)
    if was_shown is None:
        was_shown = jnp.zeros_like(candidate_mask)
    if positive is None:
        positive = jnp.zeros((*candidate_mask.shape, 0), bool)
    of_request = jax.vmap(_curves_of_request, in_axes=(0, 0, 0, 0, 0, 0, None))
    return of_request(
        student_value, teacher_value, candidate_mask, true_value, was_shown, positive, shown
    )


def top_values(
    value: Float[Array, "R N"],
    true_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    shown: int,
) -> tuple[Float[Array, "R"], Float[Array, "R"], Float[Array, "R"]]:
    """The value of a ranker's own top m: promised, true, and the most that any m have.

    Args:
      value: what the ranker sorts by; a candidate for which it is NaN is not chosen, and a request
        in which all are NaN counts for nothing.
      true_value: of each candidate, non-negative; NaN where the dataset does not know it.
      candidate_mask: False on padding, which is not chosen.
      shown: m; fewer are chosen where there are fewer.

    Returns:
      Σ value and Σ true value over the m candidates of highest value, and Σ true value over the m
      of highest true value; each is at least 0, or NaN where the truth is not known.
    """

    def top(of: Float[Array, "R N"]) -> tuple[Float[Array, "R m"], Int[Array, "R m"]]:
        there = candidate_mask & ~jnp.isnan(of)
        return lax.top_k(jnp.where(there, of, -jnp.inf), min(shown, of.shape[1]))

    promised, chosen = top(value)
    found = jnp.take_along_axis(true_value, chosen, axis=1)
    best, _ = top(true_value)
    unknown = jnp.any(candidate_mask & jnp.isnan(true_value), axis=1)
    is_chosen = jnp.isfinite(promised)

    def summed(of: Float[Array, "R m"], which: Bool[Array, "R m"]) -> Float[Array, "R"]:
        return jnp.where(unknown, jnp.nan, jnp.sum(of, axis=1, where=which))

    counts = jnp.isfinite(best) & jnp.any(is_chosen, axis=1, keepdims=True)
    return summed(promised, is_chosen), summed(found, is_chosen), summed(best, counts)


def ascending(values: Float[Array, "N"]) -> Int[Array, "N"]:
    """Return `jnp.argsort(values)` of float32 values, three times as fast on CPU.

    XLA sorts a single unsigned operand on CPU much faster than a key with its index. Read as
    integers, the bits have the same order as the values. They are sorted in two halves, the low
    half first (a radix sort), each with the place of its candidate in the other half of a word.
    """
    if values.size > 1 << 16:
        return jnp.argsort(values)
    # Adding 0 turns −0 into 0; every NaN comes last.
    bits = lax.bitcast_convert_type(jnp.where(jnp.isnan(values), jnp.nan, values + 0.0), jnp.uint32)
    bits = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    place = jnp.arange(values.size, dtype=jnp.uint32)
    low = (jnp.sort(bits << 16 | place) & 0xFFFF).astype(jnp.int32)
    high = (jnp.sort(bits[low] >> 16 << 16 | place) & 0xFFFF).astype(jnp.int32)
    return low[high]


def _curves_of_request(
    student_value: Float[Array, "N"],
    teacher_value: Float[Array, "N"],
    candidate_mask: Bool[Array, "N"],
    true_value: Float[Array, "N ..."],
    was_shown: Bool[Array, "N"],
    positive: Bool[Array, "N T"],
    shown: int,
) -> FunnelCurves:
    known = candidate_mask & ~jnp.isnan(teacher_value)
    # The teacher's order: place 0 is its favourite. Those that it cannot choose come last, and are
    # worth 0 below, so that whether one of them fills an empty slot makes no difference.
    by_teacher = ascending(jnp.where(known, -teacher_value, jnp.inf))
    place = jnp.zeros_like(by_teacher).at[by_teacher].set(jnp.arange(by_teacher.size))
    # What has no value comes behind all that has one, and before the padding.
    last = jnp.finfo(student_value.dtype).max
    key = jnp.where(jnp.isnan(student_value), last, -student_value)
    by_student = ascending(jnp.where(candidate_mask, key, jnp.inf))
    arriving = place[by_student]  # places in the teacher's order, as the student lets them pass

    own_top = jnp.minimum(shown, known.sum())
    survival = jnp.cumsum(arriving < own_top) / jnp.maximum(own_top, 1)

    was_shown = candidate_mask & was_shown
    differs = was_shown.sum() < candidate_mask.sum()
    positive = candidate_mask[:, None] & positive
    flags = jnp.concatenate([(was_shown & differs)[:, None], positive], axis=1)
    kept = jnp.cumsum(flags[by_student].astype(jnp.int32), axis=0)

    leaving = _leaving_places(arriving, shown)

    def summed(values: Num[Array, "N ..."]) -> Num[Array, "N ..."]:
        # Place N is an empty slot with value 0.
        of_known = jnp.where(jnp.expand_dims(known, range(1, values.ndim)), values, 0)
        by_place = jnp.append(of_known[by_teacher], jnp.zeros_like(values[:1]), axis=0)
        return jnp.cumsum(by_place[arriving] - by_place[leaving], axis=0)

    positives_shown = summed(positive.astype(jnp.int32))
    gain = jnp.where(known, teacher_value, 0.0)
    diverged = jnp.any(known & jnp.isnan(student_value))

    def or_nan(curve: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.where(diverged, jnp.nan, curve.astype(teacher_value.dtype))

    return FunnelCurves(
        survival=or_nan(survival),
        value_captured=or_nan(summed(teacher_value)),
        true_value_captured=or_nan(summed(true_value)),
        shown_kept=or_nan(kept[:, 0]),
        positives_kept=or_nan(kept[:, 1:]),
        positives_shown=or_nan(positives_shown),
        gain=or_nan(gain[by_student[:shown]]),
        ideal_gain=gain[by_teacher[:shown]],
        counts=own_top > 0,
    )


def _leaving_places(arriving: Int[Array, "N"], shown: int) -> Int[Array, "N"]:
    """The candidate that each arriving one evicts from the current top m; N while there is room.

    It is the newcomer itself if that is not among the m best. Each newcomer is inserted into the
    sorted slots: slot i keeps its place unless the newcomer's is smaller; then it takes the larger
    of the newcomer's place and that of slot i - 1.
    """

    def insert(
        best: Int[Array, "m"], newcomer: Int[Array, ""]
    ) -> tuple[Int[Array, "m"], Int[Array, ""]]:
        before = jnp.concatenate([jnp.full(1, -1, best.dtype), best[:-1]])
        leaves = jnp.maximum(best[-1], newcomer)
        return jnp.minimum(best, jnp.maximum(newcomer, before)), leaves

    empty = jnp.full(shown, arriving.size, arriving.dtype)
    return lax.scan(insert, empty, arriving)[1]


def captured_share(captured: Float[np.ndarray, "N *more"]) -> Float[np.ndarray, "N *more"]:
    """Divide a captured curve, summed over requests, by its last entry: 1 where nothing is lost.

    This is the ratio of the sums over requests, not the mean of their ratios. It is the share of
    the value of the whole feed, so a request with little value counts little. NaN if the total is
    0. For `shown_kept` it is the recall of the shown items.
    """
    total = captured[-1]
    return captured / np.where(total == 0, np.nan, total)


def passed_for(share: Float[np.ndarray, "N *more"], target: float) -> Float[np.ndarray, "*more"]:
    """Return the smallest k with a share of value captured of at least the target, else NaN.

    >>> passed_for(np.array([0.5, 0.98, 0.995, 1.0]), 0.99)
    array(3.)
    """
    enough = share >= target
    return np.where(enough.any(axis=0), enough.argmax(axis=0) + 1.0, np.nan)
