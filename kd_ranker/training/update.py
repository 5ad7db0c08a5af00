"""The update of a group: from the gradients of its members to their next state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.distillation.modes import Transform
from kd_ranker.embedding.deal import with_own
from kd_ranker.embedding.lookup import (
    Rows,
    ids_of_table,
    is_known,
    rows_of_ids,
    rows_of_table,
)
from kd_ranker.embedding.row_optimizers import find_occurrences, update_tables
from kd_ranker.models.model import Parameters
from kd_ranker.training.mapping import join_over_devices
from kd_ranker.training.placing import AXIS
from kd_ranker.training.state import Hyperparameters, OptimizerNumbers, Recipe, TrainState


class Gradients(NamedTuple):
    """The gradients of a group's members, stacked.

    Attributes:
      dense: of the dense parameters, summed over devices.
      transform: of the mode's own parameters, summed over devices.
      rows: of the embeddings that this device has looked up, by lookup name.
    """

    dense: Any
    transform: Transform
    rows: Rows


def update_group(
    recipe: Recipe,
    state: TrainState,
    batch: CandidateBatch,
    items: Items,
    numbers: Hyperparameters,
    gradients: Gradients,
    finite: Bool[Array, "members"],
    gathered: Rows | None,
) -> TrainState:
    """The state after one step.

    Args:
      recipe: the group's recipe.
      state: the state before the step.
      batch: the batch that the gradients are of.
      items: the features and categories of each item.
      numbers: the members' numbers.
      gradients: the members' gradients.
      finite: False for a member whose loss is not finite, which stays as it is from now on.
      gathered: the whole rows of the tables that the batch looks up, [1, ...], or None to read
        them.
    """
    # Counted from 1: a factor of 0 at the first step would waste a batch.
    step = state.step + 1
    takes_part = (state.non_finite_step == 0) & (step <= numbers.steps)
    may_change = takes_part & finite
    non_finite_step = jnp.where(takes_part & ~finite, step, state.non_finite_step)
    factor = recipe.schedule(step, numbers.steps)
    rates = numbers.optimizer._replace(
        learning_rate=factor * numbers.optimizer.learning_rate,
        table_learning_rate=factor * numbers.optimizer.table_learning_rate,
    )
    dense, transform, optimizer_state = _update_dense(
        recipe.optimizer, state, gradients, rates, may_change
    )
    tables, owners, unknown_ids = {}, {}, {}
    for name in state.parameters.tables:
        tables[name], owners[name], unknown_ids[name] = _update_table(
            name, recipe, state, batch, items, gradients.rows, gathered, rates, may_change
        )
    return dataclasses.replace(
        state,
        step=step,
        parameters=Parameters(dense, tables),
        transform=transform,
        optimizer_state=optimizer_state,
        non_finite_step=non_finite_step,
        unknown_ids=unknown_ids,
        owners=owners,
    )


def _update_dense(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: Gradients,
    rates: OptimizerNumbers,
    may_change: Bool[Array, "members"],
) -> tuple[Any, Transform, optax.OptState]:
    """Dense parameters, transform and the optimiser's state after a step; only the first decay."""

    def update_member(
        old: tuple[Any, Transform],
        gradients: tuple[Any, Transform],
        optimizer_state: optax.OptState,
        rate: Float[Array, ""],
        decay: Float[Array, ""],
        may_change: Bool[Array, ""],
    ) -> tuple[Any, Transform, optax.OptState]:
        direction, new_state = optimizer.update(gradients, optimizer_state, old)
        dense, transform = jax.tree.map(lambda value, step: value - rate * step, old, direction)
        dense = jax.tree.map(lambda new, old: new - rate * decay * old, dense, old[0])
        return jax.tree.map(
            lambda new, old: jnp.where(may_change, new, old),
            (dense, transform, new_state),
            (*old, optimizer_state),
        )

    return jax.vmap(update_member)(
        (state.parameters.dense, state.transform),
        (gradients.dense, gradients.transform),
        state.optimizer_state,
        rates.learning_rate,
        rates.weight_decay,
        may_change,
    )


def _update_table(
    name: str,
    recipe: Recipe,
    state: TrainState,
    batch: CandidateBatch,
    items: Items,
    gradients: Rows,
    gathered: Rows | None,
    rates: OptimizerNumbers,
    may_change: Bool[Array, "members"],
) -> tuple[Float[Array, "members rows W"], Int[Array, "rows"], Int[Array, ""]]:
    """A table, its owners and its number of unknown ids after a step.

    Ids and the gradients of their rows travel between devices, never an array of a table's size.
    """
    spec = recipe.model.embedding
    table = spec.tables[name]
    ids, mask = ids_of_table(spec, batch, items, name)
    unknown = jax.lax.psum(jnp.sum(mask & ~is_known(table, ids), dtype=jnp.int32), AXIS)
    ids, mask = join_over_devices((ids, mask), axis=0)

    def update(
        before: tuple[Float[Array, "members rows W"], Int[Array, "rows"]],
        row: Int[Array, "m"],
        mask: Bool[Array, "m"],
        gradients: Float[Array, "members m D"],
    ) -> tuple[Float[Array, "members rows W"], Int[Array, "rows"]]:
        tables, owner = before
        occurrences, owner = find_occurrences(row, mask, owner)
        updated = update_tables(
            recipe.row_optimizer,
            tables,
            occurrences,
            gradients,
            rates.table_learning_rate,
            rates.table_weight_decay,
            may_change,
            rows_of_table(spec, gathered, name)[0] if gathered else None,
        )
        return updated, owner

    of_ids = join_over_devices(rows_of_table(spec, gradients, name), axis=1)
    before, row = (state.parameters.tables[name], state.owners[name]), rows_of_ids(table, ids)
    updated, owner = with_own(spec.deal, update, before, row, mask, of_ids)
    return updated, owner, state.unknown_ids[name] + unknown
