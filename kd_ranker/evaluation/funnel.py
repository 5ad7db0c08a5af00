"""The funnel's yield when the student passes its top k, for every k = 1..N at once.

The funnel: N candidates retrieved, the student passes its top k, the teacher ranks those and shows
m. Axes: `R` requests, `N` candidates, `T` tasks; index `k - 1` of a curve belongs to k.

Equal values keep the order of the candidates in the request, for both student and teacher. That is
fair only if this order is independent of quality.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num


@flax.struct.dataclass
class FunnelCurves:
    """Curves over k = 1..N, and the top m, of each request or, without the leading axis, of one.

    The items shown are the m that the teacher chooses among the student's top k. The last entry of
    a curve is that of all retrieved: the denominator of a share.
    """

    score: Float[Array, "R N"]  # the student's value of its k-th candidate; on padding of the last
    survival: Float[Array, "R N"]  # share of the teacher's own top m in the student's top k
    value_captured: Float[Array, "R N"]  # summed teacher value of the items shown
    true_value_captured: Float[Array, "R N ..."]  # the same of `true_value`; NaN if unknown
    # Candidates in the top k that the logged funnel has shown; 0 where it has shown all or none,
    # which cannot distinguish students.
    shown_kept: Float[Array, "R N"]
    positives_kept: Float[Array, "R N T"]  # candidates in the top k with a positive label
    positives_shown: Float[Array, "R N T"]  # those among the items shown
    gain: Float[Array, "R m"]  # teacher value of the student's first m; 0 where it is not known
    ideal_gain: Float[Array, "R m"]  # the same in the teacher's own order
    counts: Bool[Array, "R"]  # False where the teacher knows no candidate; its curves are 0 there


def value(
    probability: Float[Array, "*shape T"], value_weights: Float[Array, "T"]
) -> Float[Array, "*shape"]:
    """The sum that a ranker sorts by: Σ over tasks of weight · probability, weights ≥ 0.

    A task of weight 0 may hold anything, NaN included. It is no matrix product: accelerators may
    round the inputs of that to fewer bits, which would make ties of candidates that differ.
    """
    xp = probability.__array_namespace__()
    return xp.where(value_weights > 0, probability * value_weights, 0.0).sum(axis=-1)


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
      teacher_value: the value that the teacher sorts by, non-negative. A candidate for which it is
        NaN takes a place in the student's top k, and the teacher never chooses it.
      candidate_mask: False on padding, which is ranked behind all and never chosen.
      shown: m, the number of items shown, at least 1. Fewer are shown where k, or the number of
        candidates that the teacher knows, is smaller.
      true_value: one or more values per candidate to sum over the shown; None if not known.
      was_shown: whether the logged funnel has shown it; None if not needed.
      positive: whether the user did it, per task; None if not needed.
    """
    if true_value is None:
        true_value = jnp.full_like(teacher_value, jnp.nan)
    if was_shown is None:
        was_shown = jnp.zeros_like(candidate_mask)
    if positive is None:
        positive = jnp.zeros((*candidate_mask.shape, 0), bool)
    return jax.vmap(functools.partial(_curves_of_request, shown=shown))(
        student_value, teacher_value, candidate_mask, true_value, was_shown, positive
    )


def top_values(
    value: Float[Array, "R N"],
    true_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    shown: int,
) -> tuple[Float[Array, "R"], Float[Array, "R"], Float[Array, "R"]]:
    """The value of a ranker's own top m: promised, true, and the most that any m have.

    A candidate with a value of NaN is never chosen, and a request with only these counts for
    nothing. Fewer than m are chosen where there are fewer. Sums are at least 0, or NaN where the
    dataset does not know a true value.
    """

    def top(of: Float[Array, "R N"]) -> tuple[Float[Array, "R m"], Int[Array, "R m"]]:
        known = candidate_mask & ~jnp.isnan(of)
        return lax.top_k(jnp.where(known, of, -jnp.inf), min(shown, of.shape[1]))

    (promised, chosen), (best, _) = top(value), top(true_value)
    found = jnp.take_along_axis(true_value, chosen, axis=1)
    is_chosen = jnp.isfinite(promised)
    counts = jnp.isfinite(best) & jnp.any(is_chosen, axis=1, keepdims=True)
    unknown = jnp.any(candidate_mask & jnp.isnan(true_value), axis=1)
    own, true, most = (
        jnp.where(unknown, jnp.nan, jnp.sum(of, axis=1, where=which))
        for of, which in ((promised, is_chosen), (found, is_chosen), (best, counts))
    )
    return own, true, most


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

    gain = jnp.where(known, teacher_value, 0.0)
    value = jnp.where(candidate_mask, student_value, jnp.inf)
    curves = {
        "score": jnp.where(candidate_mask.any(), lax.cummin(value[by_student]), 0.0),
        "survival": survival,
        "value_captured": summed(teacher_value),
        "true_value_captured": summed(true_value),
        "shown_kept": kept[:, 0],
        "positives_kept": kept[:, 1:],
        "positives_shown": summed(positive.astype(jnp.int32)),
        "gain": gain[by_student[:shown]],
    }
    diverged = jnp.any(known & jnp.isnan(student_value))
    return FunnelCurves(
        **{
            name: jnp.where(diverged, jnp.nan, of.astype(gain.dtype)) for name, of in curves.items()
        },
        ideal_gain=gain[by_teacher[:shown]],
        counts=own_top > 0,
    )


def _leaving_places(arriving: Int[Array, "N"], shown: int) -> Int[Array, "N"]:
    """The place that each newcomer evicts from the top m, maybe its own; N while there is room."""

    # Slot i of the sorted top keeps its place unless the newcomer's is smaller; then it takes the
    # larger of the newcomer's place and that of slot i - 1.
    def insert(
        best: Int[Array, "m"], newcomer: Int[Array, ""]
    ) -> tuple[Int[Array, "m"], Int[Array, ""]]:
        before = jnp.concatenate([jnp.full(1, -1, best.dtype), best[:-1]])
        leaves = jnp.maximum(best[-1], newcomer)
        return jnp.minimum(best, jnp.maximum(newcomer, before)), leaves

    empty = jnp.full(shown, arriving.size, arriving.dtype)
    return lax.scan(insert, empty, arriving)[1]


def passed_for(
    curve: Float[np.ndarray, "K *more"], ks: Int[np.ndarray, "K"], target: float
) -> Float[np.ndarray, "*more"]:
    """Return the smallest k at which a curve is at least a share, in (0, 1], of its last entry.

    The curve is summed over requests at increasing values of k. Between two of them it is
    interpolated linearly, and k is rounded up: on a grid of all k the result is exact. NaN where no
    k reaches the share, or the last entry is 0.

    >>> passed_for(np.array([5.0, 7.0, 8.0]), np.array([10, 20, 40]), 0.92)  # 7.36: 20 + 0.36 · 20
    array(28.)
    """
    share = curve / np.where(curve[-1] == 0, np.nan, curve[-1])
    reached = share >= target
    at = reached.argmax(axis=0)
    before = np.maximum(at - 1, 0)
    above, below = (np.take_along_axis(share, of[None], axis=0)[0] for of in (at, before))
    # No line leads to the first k.
    part = (target - below) / np.where(at == 0, 1.0, above - below)
    between = np.fmax(np.ceil(ks[before] + part * (ks[at] - ks[before])), ks[before] + 1)
    return np.where(reached.any(axis=0), np.where(at == 0, ks[0], between), np.nan)
