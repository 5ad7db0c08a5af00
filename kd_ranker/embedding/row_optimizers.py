"""Optimisers whose cost follows the rows touched, not the rows held.

Each is a pair of pure functions on rows. `update_tables` does what they share: it adds up the
gradients of duplicate ids, reads the touched rows and their slots, and writes them back in place
when the buffers are donated. No array of a table's size is ever made for a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Slots = dict[str, Float[Array, "rows ..."]]


class RowOptimizer(NamedTuple):
    """One optimiser.

    Attributes:
      init: table -> its slots, all zero.
      update: (rows, gradients, slots) -> the rows' steps, to be scaled by minus the learning rate,
        and the rows' new slots.
    """

    init: Callable[[Float[Array, "rows D"]], Slots]
    update: Callable[
        [Float[Array, "M D"], Float[Array, "M D"], Slots], tuple[Float[Array, "M D"], Slots]
    ]


class Occurrences(NamedTuple):
    """Which ids of a batch are equal: what every table with these ids needs to add up gradients.

    It depends on the ids alone, so the members of a population share one.

    Attributes:
      order: a permutation that sorts the ids; int32 [M].
      segment: for each id in that order, its place among the distinct ids; int32 [M].
      distinct: the distinct ids in ascending order, filled up to length M with the number of rows.
    """

    order: Int[Array, "M"]
    segment: Int[Array, "M"]
    distinct: Int[Array, "M"]


def find_occurrences(ids: Int[Array, "M"], rows: int) -> Occurrences:
    """Sorts ids in [0, rows]; `rows` itself, one past the end, stands for an id to ignore."""
    order = jnp.argsort(ids, stable=True)
    in_order = ids[order]
    first = jnp.concatenate([jnp.ones(1, bool), in_order[1:] != in_order[:-1]])
    segment = jnp.cumsum(first) - 1
    distinct = jnp.full_like(ids, rows).at[segment].set(in_order, indices_are_sorted=True)
    return Occurrences(order, segment, distinct)


def _update_rows(
    optimizer: RowOptimizer,
    tables: Float[Array, "all_rows D"],
    slots: Slots,
    occurrences: Occurrences,
    gradients: Float[Array, "M D"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
    may_change: Bool[Array, ""],
    first_row: Int[Array, ""],
    rows: int,
) -> tuple[Float[Array, "all_rows D"], Slots]:
    """Updates one table, which lies in `tables` from `first_row` on."""
    order, segment, distinct = occurrences

    def of_distinct(reduce: Callable, values: Array) -> Array:
        return reduce(values[order], segment, num_segments=order.shape[0], indices_are_sorted=True)

    summed = of_distinct(jax.ops.segment_sum, gradients)
    # A candidate that no label speaks of has no gradient, and must not move its row by decay or by
    # moments of old: else mode none would depend on how many such candidates fill a batch.
    touched = of_distinct(jax.ops.segment_max, jnp.any(gradients != 0, axis=-1)) & may_change
    place = jnp.where(touched & (distinct < rows), distinct + first_row, tables.shape[0])

    def read(array: Array) -> Array:
        return array.at[place].get(mode="fill", fill_value=0)

    def write(array: Array, values: Array) -> Array:
        return array.at[place].set(values, mode="drop")

    old = read(tables)
    step, new_slots = optimizer.update(old, summed, jax.tree.map(read, slots))
    new = old - learning_rate * (step + weight_decay * old)
    return write(tables, new), jax.tree.map(write, slots, new_slots)


def update_tables(
    optimizer: RowOptimizer,
    tables: Float[Array, "members rows D"],
    slots: Slots,
    occurrences: Occurrences,
    gradients: Float[Array, "members M D"],
    learning_rate: Float[Array, "members"],
    weight_decay: Float[Array, "members"],
    may_change: Bool[Array, "members"],
) -> tuple[Float[Array, "members rows D"], Slots]:
    """Updates the touched rows of each member's table; every other row and slot keeps its bits.

    A row is touched if an occurrence of its id has a gradient other than zero.

    The members' tables are one flat table here, and the program loops over members: on two CPU
    cores that took less than half the time of a `vmap` over stacked tables, and a third of that of
    one scatter for all (`scripts/bench.py layout`; no accelerator was measured). What one member
    reads and writes still fits the cache.

    Args:
      optimizer: one of `ROW_OPTIMIZERS`.
      tables: the members' tables.
      slots: `optimizer.init` of each, or what an earlier update returned; [members, rows, ...].
      occurrences: of the ids of the batch, which all members share.
      gradients: each member's gradient of each id, in the order of the ids.
      learning_rate: traced.
      weight_decay: traced; decoupled (Loshchilov and Hutter, 2019) and lazy: a row decays by
        `learning_rate * weight_decay * row` when it is touched.
      may_change: False leaves a member as it is.

    Returns:
      The new tables and slots.
    """
    members, rows = tables.shape[:2]

    def flat(array: Array) -> Array:
        return array.reshape(members * rows, *array.shape[2:])

    def update_member(member: Int[Array, ""], state: tuple[Array, Slots]) -> tuple[Array, Slots]:
        flat_tables, flat_slots = state
        return _update_rows(
            optimizer,
            flat_tables,
            flat_slots,
            occurrences,
            gradients[member],
            learning_rate[member],
            weight_decay[member],
            may_change[member],
            member * rows,
            rows,
        )

    state = (flat(tables), jax.tree.map(flat, slots))
    new = jax.lax.fori_loop(0, members, update_member, state)
    return jax.tree.map(lambda array, like: array.reshape(like.shape), new, (tables, slots))


def _sgd_update(
    rows: Float[Array, "M D"], gradients: Float[Array, "M D"], slots: Slots
) -> tuple[Float[Array, "M D"], Slots]:
    del rows
    return gradients, slots


def _adagrad_update(
    rows: Float[Array, "M D"], gradients: Float[Array, "M D"], slots: Slots
) -> tuple[Float[Array, "M D"], Slots]:
    del rows
    total = slots["square_sum"] + jnp.mean(jnp.square(gradients), axis=-1)
    return gradients / jnp.sqrt(total + ADAGRAD_EPSILON)[:, None], {"square_sum": total}


def _adam_update(
    rows: Float[Array, "M D"], gradients: Float[Array, "M D"], slots: Slots
) -> tuple[Float[Array, "M D"], Slots]:
    del rows
    count = slots["count"] + 1.0
    mean = ADAM_B1 * slots["mean"] + (1 - ADAM_B1) * gradients
    square = ADAM_B2 * slots["square"] + (1 - ADAM_B2) * jnp.square(gradients)
    corrected_mean = mean / (1 - ADAM_B1**count)[:, None]
    corrected_square = square / (1 - ADAM_B2**count)[:, None]
    step = corrected_mean / (jnp.sqrt(corrected_square) + ADAM_EPSILON)
    return step, {"count": count, "mean": mean, "square": square}


ADAGRAD_EPSILON = 1e-10
ADAM_B1, ADAM_B2, ADAM_EPSILON = 0.9, 0.999, 1e-8

sgd = RowOptimizer(init=lambda table: {}, update=_sgd_update)
"""Plain gradient descent: step = g."""

adagrad = RowOptimizer(
    init=lambda table: {"square_sum": jnp.zeros(table.shape[0], table.dtype)},
    update=_adagrad_update,
)
"""Row-wise Adagrad: one accumulator a row, s += mean(g²), step = g / sqrt(s + ε).

Duchi, Hazan and Singer, 2011, with the mean over the row in place of a sum an entry, which makes
the slot D times smaller than the row.
"""

adam = RowOptimizer(
    init=lambda table: {
        "count": jnp.zeros(table.shape[0], table.dtype),
        "mean": jnp.zeros_like(table),
        "square": jnp.zeros_like(table),
    },
    update=_adam_update,
)
"""Lazy Adam (Kingma and Ba, 2015): the moments of a row decay only when it is touched, and the bias
correction counts a row's own updates, not the steps of the run. For a row that every batch touches
it is Adam itself."""

ROW_OPTIMIZERS: dict[str, RowOptimizer] = {"adagrad": adagrad, "adam": adam, "sgd": sgd}
