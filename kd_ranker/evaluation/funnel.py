"""The funnel's yield when the student passes its top k, for every k = 1..N at once.

The funnel: N candidates retrieved, the student passes its top k, the teacher ranks those and shows
m. Axes: `R` requests, `N` candidates, `T` tasks; index `k - 1` of a curve belongs to k.

Equal values keep the order of the candidates in the request, for both student and teacher. That is
fair only if this order is independent of quality.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, Num

from kd_ranker.evaluation import cpu_curves

# Numbers of each candidate by name.
_Numbers = Mapping[str, Num[Array, "R N ..."] | Bool[Array, "R N ..."]]


class Orders(NamedTuple):
    """The indices of each request's candidates as both rankers order them, favorites first."""

    student: Int[Array, "R N"]  # padding comes last
    teacher: Int[Array, "R N"]  # the candidates that it does not know come last


class FunnelCurves(NamedTuple):
    """The curves over k = 1..N of each request, by name, and the top m of both rankers.

    The last entry of a curve is that of all retrieved: the denominator of a share. The curve
    `survival` is the share of the teacher's own top m in the student's top k.
    """

    curves: dict[str, Float[Array, "R N ..."]]
    first: Int[Array, "R m"]  # indices of the student's first m candidates
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


def favorites_first(
    value: Float[Array, "*shape N"], candidate_mask: Bool[Array, "*shape N"]
) -> Int[Array, "*shape N"]:
    """Return the indices of the candidates in the order of a ranker's value, the highest first.

    Equal values keep their order. A candidate with NaN comes behind those with a value, and before
    the padding. No value may be −∞, which would be mixed with the padding.
    """
    return jnp.argsort(_sort_key(value, candidate_mask, jnp), axis=-1, stable=True)


def favorites_first_on_host(
    value: Float[np.ndarray, "*shape N"], candidate_mask: Bool[np.ndarray, "*shape N"]
) -> Int32[np.ndarray, "*shape N"]:
    """Return `favorites_first` of float32 values; on a CPU it takes an eighth of the time.

    NumPy sorts integers with vector instructions. Each integer has the key of a candidate in its
    upper half and the candidate's index in its lower half. So the sort is stable, and the lower
    halves of its result are the order.
    """
    key = _sort_key(value, candidate_mask, np).astype(np.float32)
    key += np.float32(0)  # −0 becomes 0
    # Read as integers, negative floats are in the wrong order: all their bits but the sign turn.
    bits = key.view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    bits_and_index = bits.astype(np.int64) << 32
    bits_and_index |= np.arange(key.shape[-1])
    bits_and_index.sort(axis=-1)
    return bits_and_index.astype(np.int32)  # the lower halves


def _sort_key(value: Any, candidate_mask: Any, xp: Any) -> Any:
    """Return a number for each candidate, the favorite's the lowest."""
    after_all_values = np.finfo(np.float32).max
    key = xp.where(xp.isnan(value), after_all_values, -value)
    return xp.where(candidate_mask, key, np.inf)


def first_of(which: Bool[Array, "R N"]) -> Int[Array, "R N"]:
    """Return the indices of some candidates, in their order, and then those of the others.

    It is `jnp.argsort(~which, stable=True)`, without a sort.
    """

    def of_request(which: Bool[Array, "N"]) -> Int[Array, "N"]:
        index = jnp.arange(which.size, dtype=jnp.int32)
        chosen_so_far = _running_sums({"chosen": which.astype(jnp.int32)})["chosen"]
        others_so_far = index + 1 - chosen_so_far
        num_chosen = chosen_so_far[-1]
        place = jnp.where(which, chosen_so_far - 1, num_chosen + others_so_far - 1)
        return jnp.zeros_like(index).at[place].set(index, unique_indices=True)

    return jax.vmap(of_request)(which)


def funnel_curves(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    shown: int,
    of_passed: _Numbers | None = None,
    of_shown: _Numbers | None = None,
    orders: Orders | None = None,
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
      orders: those of both rankers, if they are known already, as `Ranked.orders`.
    """
    known = candidate_mask & ~jnp.isnan(teacher_value)
    if orders is None:
        orders = orders_of(student_value, teacher_value, candidate_mask)
    # Booleans become counts.
    passed_numbers = {name: 1 * numbers for name, numbers in (of_passed or {}).items()}
    shown_numbers = {name: 1 * numbers for name, numbers in (of_shown or {}).items()}
    curves_of_request = jax.vmap(functools.partial(_curves_of_request, shown))
    return curves_of_request(
        student_value, teacher_value, known, orders, passed_numbers, shown_numbers
    )


def orders_of(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
) -> Orders:
    """Return the orders of both rankers. The teacher's value is NaN where it is not known."""
    known = candidate_mask & ~jnp.isnan(teacher_value)
    return Orders(
        student=favorites_first(student_value, candidate_mask),
        teacher=favorites_first(teacher_value, known),
    )


def list_sums(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
    numbers: Float[Array, "R N"],
    slot_weights: Float[Array, "R m"],
    orders: Orders | None = None,
) -> Float[Array, "R N"]:
    """Return Σ slot weight · number over the list that the teacher makes of the student's top k.

    The list has the m candidates with the best teacher values, the best one in the first slot, for
    k = 1..N. The sums of a request are NaN if the student has diverged. See `funnel_curves` for the
    other arguments. The teacher's order may be that of all candidates that it knows, even if
    `teacher_value` leaves some out.
    """
    known = candidate_mask & ~jnp.isnan(teacher_value)
    if orders is None:
        orders = orders_of(student_value, teacher_value, candidate_mask)
    return jax.vmap(_list_sums_of_request)(student_value, known, orders, numbers, slot_weights)


def _list_sums_of_request(
    student_value: Float[Array, "N"],
    known: Bool[Array, "N"],
    orders: Orders,
    numbers: Float[Array, "N"],
    slot_weights: Float[Array, "m"],
) -> Float[Array, "N"]:
    place = _places(orders.teacher)
    # Place N is an empty slot.
    number_at = jnp.append(jnp.where(known, numbers, 0.0)[orders.teacher], 0.0)
    arriving = jnp.where(known, place, place.size)[orders.student]

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
    order = favorites_first(student_value, candidate_mask)
    is_chosen = jnp.take_along_axis(chosen, order, axis=1)
    num_chosen = chosen.sum(axis=1)
    num_others = candidate_mask.sum(axis=1) - num_chosen
    # Padding comes last, so that it is before no chosen candidate.
    others_before = jnp.cumsum(~is_chosen, axis=1)
    wrong_pairs = jnp.sum(others_before, axis=1, where=is_chosen)
    pairs = num_chosen * num_others
    return jnp.where(pairs > 0, 1 - wrong_pairs / jnp.maximum(pairs, 1), jnp.nan)


def _places(order: Int[Array, "N"]) -> Int[Array, "N"]:
    """Return the place of each candidate in an order."""
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))


def _curves_of_request(
    shown: int,
    student_value: Float[Array, "N"],
    teacher_value: Float[Array, "N"],
    known: Bool[Array, "N"],
    orders: Orders,
    of_passed: _Numbers,
    of_shown: _Numbers,
) -> FunnelCurves:
    place = _places(orders.teacher)
    # Places in the teacher's order: of the candidate that the student passes k-th, and of the one
    # that it then drives out of the top m (N if that has room).
    arriving = place[orders.student]
    leaving = _leaving_places(arriving, shown)
    own_top = jnp.minimum(shown, known.sum())

    def change_of_shown(numbers: Num[Array, "N ..."]) -> Num[Array, "N ..."]:
        # Those that the teacher cannot choose are worth 0, like an empty slot: whether one of them
        # fills it makes no difference.
        known_numbers = jnp.where(jnp.expand_dims(known, range(1, numbers.ndim)), numbers, 0)
        # Place N is an empty slot.
        by_place = jnp.append(known_numbers[orders.teacher], jnp.zeros_like(numbers[:1]), axis=0)
        return by_place[arriving] - by_place[leaving]

    # What each candidate adds as it arrives.
    added = {"survival": (arriving < own_top).astype(jnp.int32)}
    added |= {name: numbers[orders.student] for name, numbers in of_passed.items()}
    added |= {name: change_of_shown(numbers) for name, numbers in of_shown.items()}
    curves = _running_sums(added)
    curves["survival"] = curves["survival"] / jnp.maximum(own_top, 1)
    gain = jnp.where(known, teacher_value, 0.0)
    diverged = jnp.any(known & jnp.isnan(student_value))

    def unless_diverged(values: Num[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(diverged, jnp.nan, values.astype(gain.dtype))

    return FunnelCurves(
        {name: unless_diverged(curve) for name, curve in curves.items()},
        first=orders.student[:shown],
        gain=unless_diverged(gain[orders.student[:shown]]),
        ideal_gain=gain[orders.teacher[:shown]],
        counts=own_top > 0,
    )


def _running_sums(numbers: dict[str, Num[Array, "N ..."]]) -> dict[str, Num[Array, "N ..."]]:
    """Return the sums over the first k entries of each array, k = 1..N.

    On a CPU that has no C++ compiler, all arrays are added up in one loop: that takes a fifth of
    the time of XLA's own cumulative sums, which other devices compute faster.
    """

    def by_loop(numbers: dict[str, Num[Array, "N ..."]]) -> dict[str, Num[Array, "N ..."]]:
        def add_one(sums: Any, entries: Any) -> tuple[Any, Any]:
            sums = jax.tree.map(jnp.add, sums, entries)
            return sums, sums

        zeros = jax.tree.map(lambda array: jnp.zeros_like(array[0]), numbers)
        _, running = lax.scan(add_one, zeros, numbers)
        return running

    def in_one_pass(numbers: dict[str, Num[Array, "N ..."]]) -> dict[str, Num[Array, "N ..."]]:
        return {name: cpu_curves.running_sums(array) for name, array in numbers.items()}

    def at_once(numbers: dict[str, Num[Array, "N ..."]]) -> dict[str, Num[Array, "N ..."]]:
        return {name: jnp.cumsum(array, axis=0) for name, array in numbers.items()}

    on_cpu = in_one_pass if cpu_curves.are_available() else by_loop
    sums: dict[str, Num[Array, "N ..."]] = lax.platform_dependent(
        numbers, cpu=on_cpu, default=at_once
    )
    return sums


def _leaving_places(arriving: Int[Array, "N"], shown: int) -> Int[Array, "N"]:
    """The place that each newcomer evicts from the top m, maybe its own; N while there is room."""

    def by_loop(arriving: Int[Array, "N"]) -> Int[Array, "N"]:
        def pass_one(
            slots: Int[Array, "m"], newcomer: Int[Array, ""]
        ) -> tuple[Int[Array, "m"], Int[Array, ""]]:
            leaves = jnp.maximum(slots[-1], newcomer)
            return _with_newcomer(slots, newcomer), leaves

        empty = jnp.full(shown, arriving.size, arriving.dtype)
        _, leaving = lax.scan(pass_one, empty, arriving)
        return leaving

    if not cpu_curves.are_available():
        return by_loop(arriving)
    in_one_pass = functools.partial(cpu_curves.leaving_places, shown=shown)
    leaving: Int[Array, "N"] = lax.platform_dependent(arriving, cpu=in_one_pass, default=by_loop)
    return leaving


def _with_newcomer(slots: Int[Array, "m"], newcomer: Int[Array, ""]) -> Int[Array, "m"]:
    """Insert a place into the sorted best m; the last one, or the newcomer itself, drops out.

    A slot keeps its place unless the newcomer's is smaller; then it takes the larger of the
    newcomer's place and that of the slot before.
    """
    before = jnp.concatenate([jnp.full(1, -1, slots.dtype), slots[:-1]])
    return jnp.minimum(slots, jnp.maximum(newcomer, before))
