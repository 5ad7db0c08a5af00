"""The funnel's yield when the student passes its top k, for every k = 1..N at once.

The funnel: N candidates retrieved, the student passes its top k, the teacher ranks those and shows
m. Axes: `R` requests, `N` candidates, `T` tasks; index `k - 1` of a curve belongs to k.

Equal values keep the order of the candidates in the request, for both student and teacher. That is
fair only if this order is independent of quality.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num

# Numbers of each candidate by name.
_Numbers = Mapping[str, Num[Array, "R N ..."] | Bool[Array, "R N ..."]]


class FunnelCurves(NamedTuple):
    """The curves over k = 1..N of each request, by name, and the top m of both rankers.

    The last entry of a curve is that of all retrieved: the denominator of a share. The curve
    `survival` is the share of the teacher's own top m in the student's top k.
    """

    curves: dict[str, Float[Array, "R N ..."]]
    first: Int[Array, "R m"]  # places of the student's first m candidates
    gain: Float[Array, "R m"]  # teacher value of these; 0 where it is not known
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
    of_passed: _Numbers | None = None,
    of_shown: _Numbers | None = None,
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
      of_passed: numbers to sum over the student's top k, 0 on padding.
      of_shown: numbers to sum over the items shown: the m that the teacher chooses of these.
    """
    # Booleans become counts.
    passed_numbers = {name: 1 * numbers for name, numbers in (of_passed or {}).items()}
    shown_numbers = {name: 1 * numbers for name, numbers in (of_shown or {}).items()}
    curves_of_request = jax.vmap(functools.partial(_curves_of_request, shown))
    return curves_of_request(
        student_value, teacher_value, candidate_mask, passed_numbers, shown_numbers
    )


def list_sums(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    numbers: Float[Array, "R N"],
    slot_weights: Float[Array, "R m"],
) -> Float[Array, "R N"]:
    """Return Σ slot weight · number over the list that the teacher makes of the student's top k.

    The list has the m candidates with the best teacher values, the best one in the first slot, for
    k = 1..N. The sums of a request are NaN if the student has diverged. See `funnel_curves` for the
    other arguments.
    """
    return jax.vmap(_list_sums_of_request)(
        student_value, teacher_value, candidate_mask, numbers, slot_weights
    )


def _list_sums_of_request(
    student_value: Float[Array, "N"],
    teacher_value: Float[Array, "N"],
    candidate_mask: Bool[Array, "N"],
    numbers: Float[Array, "N"],
    slot_weights: Float[Array, "m"],
) -> Float[Array, "N"]:
    known = candidate_mask & ~jnp.isnan(teacher_value)
    by_teacher, place = _teacher_order(teacher_value, known)
    # Place N is an empty slot.
    number_at = jnp.append(jnp.where(known, numbers, 0.0)[by_teacher], 0.0)
    by_student = _student_order(student_value, candidate_mask)
    arriving = jnp.where(known, place, place.size)[by_student]

    def pass_one(
        slots: Int[Array, "m"], newcomer: Int[Array, ""]
    ) -> tuple[Int[Array, "m"], Float[Array, ""]]:
        slots = _with_newcomer(slots, newcomer)
        return slots, jnp.sum(number_at[slots] * slot_weights)

    empty = jnp.full(slot_weights.size, place.size, place.dtype)
    _, sums = lax.scan(pass_one, empty, arriving)
    diverged = jnp.any(known & jnp.isnan(student_value))
    return jnp.where(diverged, jnp.nan, sums)


def slots_of_part(shown: int, part: Int[Array, "R"], whole: Int[Array, "R"]) -> Float[Array, "R m"]:
    """Return the weight of each of m slots for a part of a request's candidates.

    If the part was drawn at random, each of its candidates represents whole / part of them, and
    the best m of the whole are the best m · part / whole of the part. The last of these slots
    counts for the fraction that is left.
    """
    slots = shown * part / jnp.maximum(whole, 1)
    return jnp.clip(slots[:, None] - jnp.arange(shown), 0.0, 1.0)


def share_of_pairs(
    student_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    chosen: Bool[Array, "R N"],
) -> Float[Array, "R"]:
    """Return the share of the pairs of a chosen and another candidate with the chosen one first.

    It is the area under the ROC curve, but that equal values keep the order of the candidates. NaN
    where all candidates are chosen, or none.
    """
    order = jax.vmap(_student_order)(student_value, candidate_mask)
    is_chosen = jnp.take_along_axis(chosen, order, axis=1)
    num_chosen = chosen.sum(axis=1)
    num_others = candidate_mask.sum(axis=1) - num_chosen
    # Padding comes last, so that it is before no chosen candidate.
    others_before = jnp.cumsum(~is_chosen, axis=1)
    wrong_pairs = jnp.sum(others_before, axis=1, where=is_chosen)
    pairs = num_chosen * num_others
    return jnp.where(pairs > 0, 1 - wrong_pairs / jnp.maximum(pairs, 1), jnp.nan)


def _teacher_order(
    teacher_value: Float[Array, "N"], known: Bool[Array, "N"]
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The candidates in the teacher's order, its favorite first, and the place of each in it.

    Those that it does not know come last.
    """
    by_teacher = ascending(jnp.where(known, -teacher_value, jnp.inf))
    place = jnp.zeros_like(by_teacher).at[by_teacher].set(jnp.arange(by_teacher.size))
    return by_teacher, place


def _student_order(
    student_value: Float[Array, "N"], candidate_mask: Bool[Array, "N"]
) -> Int[Array, "N"]:
    """The places of the candidates, the student's favorite first."""
    # What has no value comes behind all that has one, and before the padding.
    last = jnp.finfo(student_value.dtype).max
    key = jnp.where(jnp.isnan(student_value), last, -student_value)
    return ascending(jnp.where(candidate_mask, key, jnp.inf))


def ascending(values: Float[Array, "N"]) -> Int[Array, "N"]:
    """Return `jnp.argsort(values)` of float32 values, three times as fast on CPU.

    XLA sorts a single unsigned operand on CPU much faster than a key with its index. Read as
    integers, the bits have the same order as the values. They are sorted in two halves, the low
    half first (a radix sort), each with the place of its candidate in the other half of a word.
    """
    if values.size > 1 << 16:
        return jnp.argsort(values)
    # −0 is equal to 0, and every NaN comes last. XLA leaves out an addition of 0.
    plain = jnp.where(jnp.isnan(values), jnp.nan, jnp.where(values == 0, 0.0, values))
    bits = lax.bitcast_convert_type(plain, jnp.uint32)
    bits = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    place = jnp.arange(values.size, dtype=jnp.uint32)
    low = (jnp.sort(bits << 16 | place) & 0xFFFF).astype(jnp.int32)
    high = (jnp.sort(bits[low] >> 16 << 16 | place) & 0xFFFF).astype(jnp.int32)
    return low[high]


def _curves_of_request(
    shown: int,
    student_value: Float[Array, "N"],
    teacher_value: Float[Array, "N"],
    candidate_mask: Bool[Array, "N"],
    of_passed: _Numbers,
    of_shown: _Numbers,
) -> FunnelCurves:
    known = candidate_mask & ~jnp.isnan(teacher_value)
    by_teacher, place = _teacher_order(teacher_value, known)
    by_student = _student_order(student_value, candidate_mask)
    # Places in the teacher's order: of the candidate that the student passes k-th, and of the one
    # that it then drives out of the top m (N if that has room).
    arriving = place[by_student]
    leaving = _leaving_places(arriving, shown)
    own_top = jnp.minimum(shown, known.sum())

    def sum_over_passed(numbers: Num[Array, "N ..."]) -> Num[Array, "N ..."]:
        return jnp.cumsum(numbers[by_student], axis=0)

    def sum_over_shown(numbers: Num[Array, "N ..."]) -> Num[Array, "N ..."]:
        # Those that the teacher cannot choose are worth 0, like an empty slot: whether one of them
        # fills it makes no difference.
        known_numbers = jnp.where(jnp.expand_dims(known, range(1, numbers.ndim)), numbers, 0)
        # Place N is an empty slot.
        by_place = jnp.append(known_numbers[by_teacher], jnp.zeros_like(numbers[:1]), axis=0)
        return jnp.cumsum(by_place[arriving] - by_place[leaving], axis=0)

    gain = jnp.where(known, teacher_value, 0.0)
    curves = {"survival": jnp.cumsum(arriving < own_top) / jnp.maximum(own_top, 1)}
    for name, numbers in of_passed.items():
        curves[name] = sum_over_passed(numbers)
    for name, numbers in of_shown.items():
        curves[name] = sum_over_shown(numbers)
    diverged = jnp.any(known & jnp.isnan(student_value))

    def unless_diverged(values: Num[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(diverged, jnp.nan, values.astype(gain.dtype))

    return FunnelCurves(
        {name: unless_diverged(curve) for name, curve in curves.items()},
        first=by_student[:shown],
        gain=unless_diverged(gain[by_student[:shown]]),
        ideal_gain=gain[by_teacher[:shown]],
        counts=own_top > 0,
    )


def _leaving_places(arriving: Int[Array, "N"], shown: int) -> Int[Array, "N"]:
    """The place that each newcomer evicts from the top m, maybe its own; N while there is room."""

    def pass_one(
        slots: Int[Array, "m"], newcomer: Int[Array, ""]
    ) -> tuple[Int[Array, "m"], Int[Array, ""]]:
        leaves = jnp.maximum(slots[-1], newcomer)
        return _with_newcomer(slots, newcomer), leaves

    empty = jnp.full(shown, arriving.size, arriving.dtype)
    _, leaving = lax.scan(pass_one, empty, arriving)
    return leaving


def _with_newcomer(slots: Int[Array, "m"], newcomer: Int[Array, ""]) -> Int[Array, "m"]:
    """Insert a place into the sorted best m; the last one, or the newcomer itself, drops out.

    A slot keeps its place unless the newcomer's is smaller; then it takes the larger of the
    newcomer's place and that of the slot before.
    """
    before = jnp.concatenate([jnp.full(1, -1, slots.dtype), slots[:-1]])
    return jnp.minimum(slots, jnp.maximum(newcomer, before))
