"""Optimisers whose cost follows the rows touched, not the rows held.

Each is a pair of pure functions on rows. `update_table` does what they share: it adds up the
gradients of duplicate ids, reads the touched rows and their slots, and writes them back in place
when the buffers are donated. No array of a table's size is ever made for a gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def combine_duplicates(
    ids: Int[Array, "M"], gradients: Float[Array, "M D"], rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """Adds up the gradients of equal ids.

    Returns:
      ids in ascending order without duplicates, filled up to length M with `rows` (one past the
      end, so that a scatter drops them), and the summed gradient of each.
    """
    order = jnp.argsort(ids, stable=True)
    in_order = ids[order]
    first = jnp.concatenate([jnp.ones(1, bool), in_order[1:] != in_order[:-1]])
    segment = jnp.cumsum(first) - 1
    summed = jax.ops.segment_sum(
        gradients[order], segment, num_segments=ids.shape[0], indices_are_sorted=True
    )
    unique = jnp.full_like(ids, rows).at[segment].set(in_order, indices_are_sorted=True)
    return unique, summed


def update_table(
    optimizer: RowOptimizer,
    table: Float[Array, "rows D"],
    slots: Slots,
    ids: Int[Array, "M"],
    gradients: Float[Array, "M D"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> tuple[Float[Array, "rows D"], Slots]:
    """Updates the rows that occur in `ids`; every other row and slot stays as it is.

    Args:
      optimizer: one of `ROW_OPTIMIZERS`.
      table: the table.
      slots: what `optimizer.init(table)` made, or an earlier update returned.
      ids: ids in [0, rows), duplicates allowed; an id of `rows` is ignored.
      gradients: the gradient of each occurrence.
      learning_rate: a traced scalar.
      weight_decay: a traced scalar; decoupled (Loshchilov and Hutter, 2019) and lazy: a row decays
        by `learning_rate * weight_decay * row` when it is touched.

    Returns:
      The new table and slots.
    """
    rows = table.shape[0]
    unique, summed = combine_duplicates(ids, gradients, rows)

    def read(array: Array) -> Array:
        return array.at[unique].get(mode="fill", fill_value=0, indices_are_sorted=True)

    def write(array: Array, values: Array) -> Array:
        return array.at[unique].set(values, mode="drop", indices_are_sorted=True)

    old = read(table)
    step, new_slots = optimizer.update(old, summed, jax.tree.map(read, slots))
    new = old - learning_rate * (step + weight_decay * old)
    return write(table, new), jax.tree.map(write, slots, new_slots)


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
