"""Optimizers with a cost in proportion to the rows touched, not the rows held.

Each is a pure function on rows. They share `update_tables`, which adds up the gradients of
duplicate ids. It writes the touched rows back, in place if the buffers are donated. It never
allocates, clears or sorts an array of a table's size.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.embedding import cpu_rows, tpu_rows


class Adam(NamedTuple):
    """Adam's constants (Kingma and Ba, 2015), under the names that optax gives them."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


ADAM = Adam()
"""The constants for embedding rows and dense parameters."""


class RowOptimizer(NamedTuple):
    """One optimizer.

    Attributes:
      slots: D -> the number of values that it stores with each row, initially 0.
      update: (gradients, slots, counts) -> the rows' steps, to be scaled by minus the learning
        rate, and their new slots. A row's count is that of its updates, this one included.
    """

    slots: Callable[[int], int]
    update: Callable[
        [Float[Array, "M D"], Float[Array, "M S"], Float[Array, "M 1"]],
        tuple[Float[Array, "M D"], Float[Array, "M S"]],
    ]


class Occurrences(NamedTuple):
    """The duplicate ids of a batch, found once for all runs of a stack."""

    row: Int[Array, "M"]  # of each id
    position: Int[Array, "M"]  # for each id, the index that represents all ids of its row
    represents: Bool[Array, "M"]  # True for such an index, unless it is to be ignored


def find_occurrences(
    row: Int[Array, "M"], mask: Bool[Array, "M"], owner: Int[Array, "rows"]
) -> tuple[Occurrences, Int[Array, "rows"]]:
    """Find equal rows without sorting; return the owners for the next call, too.

    Each id writes its index into the owner of its row and then reads that owner: its own index, or
    that of an equal id. Owners may hold any values before, so no array of the table's size is ever
    cleared. Rows are in range; the mask is False for an id to ignore.
    """
    places = jnp.arange(row.shape[0], dtype=owner.dtype)
    owner = owner.at[jnp.where(mask, row, owner.shape[0])].set(places, mode="drop")
    position = jnp.where(mask, owner.at[row].get(mode="promise_in_bounds"), places)
    return Occurrences(row, position, mask & (position == places)), owner


def update_tables(
    optimizer: RowOptimizer,
    tables: Float[Array, "runs rows W"],
    occurrences: Occurrences,
    gradients: Float[Array, "runs M D"],
    learning_rate: Float[Array, "runs"],
    weight_decay: Float[Array, "runs"],
    may_change: Bool[Array, "runs"],
    *,
    kernel_on_tpu: bool = False,
) -> Float[Array, "runs rows W"]:
    """Update the touched rows of each run's table; every other row keeps its bits.

    `lookup` describes a row. One is touched if the gradients of its ids add up to something other
    than zero. Then it also decays by `learning_rate * weight_decay * row` (decoupled decay,
    Loshchilov and Hutter, 2019). A run that may not change keeps its table. Adam has a program of
    its own for a CPU, see `cpu_rows`, and on request for a TPU, see `tpu_rows`.
    """
    arguments = (*occurrences, gradients, learning_rate, weight_decay, may_change)
    by_xla = functools.partial(_update_each_run, optimizer, _rewrite_by_xla)
    by_platform: dict[str, Callable[..., Float[Array, "runs rows W"]]] = {}
    if optimizer is adam and cpu_rows.are_available():
        by_platform["cpu"] = functools.partial(cpu_rows.update_by_adam, **ADAM._asdict())
    if optimizer is adam and kernel_on_tpu:
        by_platform["tpu"] = functools.partial(_update_each_run, optimizer, tpu_rows.rewrite)
    if not by_platform:
        return by_xla(tables, *arguments)
    return jax.lax.platform_dependent(tables, *arguments, **by_platform, default=by_xla)


def _update_each_run(
    optimizer: RowOptimizer,
    rewrite: Callable[..., Float[Array, "all_rows W"]],
    tables: Float[Array, "runs rows W"],
    row: Int[Array, "M"],
    position: Int[Array, "M"],
    represents: Bool[Array, "M"],
    gradients: Float[Array, "runs M D"],
    learning_rate: Float[Array, "runs"],
    weight_decay: Float[Array, "runs"],
    may_change: Bool[Array, "runs"],
) -> Float[Array, "runs rows W"]:
    # One flat table and a loop over runs: on two CPU cores, for 16 runs, that was faster than
    # `vmap` over stacked tables or one scatter for all (`docs/benchmarks.md`).
    runs, length, columns = tables.shape

    def update_run(
        run: Int[Array, ""], flat: Float[Array, "all_rows W"]
    ) -> Float[Array, "all_rows W"]:
        gradient = gradients[run]
        summed = jnp.zeros_like(gradient)
        summed = summed.at[position].add(gradient, mode="promise_in_bounds")
        # A candidate without a label has no gradient, and neither decay nor old moments may move
        # its row: otherwise mode none would depend on how many such candidates fill a batch.
        touched = jnp.any(summed != 0, axis=1) & represents & may_change[run]
        return rewrite(
            functools.partial(new_rows, optimizer),
            flat,
            row + run * length,
            touched,
            summed,
            learning_rate[run],
            weight_decay[run],
        )

    flat = tables.reshape(runs * length, columns)
    return jax.lax.fori_loop(0, runs, update_run, flat).reshape(tables.shape)


def _rewrite_by_xla(
    change_rows: tpu_rows.ChangeRows,
    table: Float[Array, "rows W"],
    place: Int[Array, "M"],
    is_changed: Bool[Array, "M"],
    gradients: Float[Array, "M D"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> Float[Array, "rows W"]:
    """Do what `tpu_rows.rewrite` does, on any device."""
    before = table.at[place].get(mode="promise_in_bounds")
    rows = change_rows(before, gradients, learning_rate, weight_decay)
    place = jnp.where(is_changed, place, table.shape[0])
    # Otherwise a GPU would fuse the reads into the scatter, and copy the whole table for that.
    place, rows = jax.lax.optimization_barrier((place, rows))
    return table.at[place].set(rows, mode="drop", unique_indices=True)


def new_rows(
    optimizer: RowOptimizer,
    rows: Float[Array, "M W"],
    gradients: Float[Array, "M D"],
    learning_rate: Float[Array, ""],
    weight_decay: Float[Array, ""],
) -> Float[Array, "M W"]:
    """Return rows after one update by gradients that are summed by row."""
    width = gradients.shape[1]
    old, count, slots = jnp.split(rows, [width, width + 1], axis=1)
    step, slots = optimizer.update(gradients, slots, count + 1)
    new = old - learning_rate * (step + weight_decay * old)
    return jnp.concatenate([new, count + 1, slots], axis=1)


def _adagrad_update(
    gradients: Float[Array, "M D"], slots: Float[Array, "M 1"], counts: Float[Array, "M 1"]
) -> tuple[Float[Array, "M D"], Float[Array, "M 1"]]:
    total = slots + jnp.mean(jnp.square(gradients), axis=1, keepdims=True)
    return gradients / jnp.sqrt(total + ADAGRAD_EPSILON), total


def _adam_update(
    gradients: Float[Array, "M D"], slots: Float[Array, "M 2*D"], counts: Float[Array, "M 1"]
) -> tuple[Float[Array, "M D"], Float[Array, "M 2*D"]]:
    mean, square = jnp.split(slots, 2, axis=1)
    mean = ADAM.b1 * mean + (1 - ADAM.b1) * gradients
    square = ADAM.b2 * square + (1 - ADAM.b2) * jnp.square(gradients)
    corrected_mean = mean / one_minus_power(ADAM.b1, counts)
    corrected_square = square / one_minus_power(ADAM.b2, counts)
    step = corrected_mean / (jnp.sqrt(corrected_square) + ADAM.eps)
    return step, jnp.concatenate([mean, square], axis=1)


def one_minus_power(base: float, exponents: Float[Array, "M 1"]) -> Float[Array, "M 1"]:
    """Return `1 - base ** exponents`, without a loss of digits where the power is near 1.

    It is `-expm1(exponents * log(base))`, in operations that a kernel for a TPU has as well.
    """
    logs = exponents * math.log(base)
    # Taylor's series of expm1(x) / x; for -1/2 < x < 0, terms after x^8 are below float32's digits.
    series = jnp.ones_like(logs)
    for term in range(9, 1, -1):
        series = 1 + series * logs / term
    return jnp.where(logs > -0.5, -logs * series, 1 - jnp.exp(logs))


ADAGRAD_EPSILON = 1e-10

sgd = RowOptimizer(lambda width: 0, lambda gradients, slots, counts: (gradients, slots))
"""Plain gradient descent: step = g."""

adagrad = RowOptimizer(slots=lambda width: 1, update=_adagrad_update)
"""Row-wise Adagrad: one accumulator per row, s += mean(g²), step = g / sqrt(s + ε).

Duchi, Hazan and Singer, 2011, with the mean over the row in place of one sum per entry. The slot is
D times smaller than the row.
"""

adam = RowOptimizer(slots=lambda width: 2 * width, update=_adam_update)
"""Lazy Adam (Kingma and Ba, 2015): the moments of a row decay only when it is touched, and the bias
correction counts a row's own updates, not the steps of the run. For a row that every batch touches
it is Adam itself."""

ROW_OPTIMIZERS: dict[str, RowOptimizer] = {"adagrad": adagrad, "adam": adam, "sgd": sgd}

TPU_LANES = 128
"""A TPU pads each row to a multiple of this many numbers."""
