"""The update of a group: from the gradients of its members to their next state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.distillation.modes import Transform
from kd_ranker.embedding.lookup import (
    EmbeddingSpec,
    Rows,
    ids_of_table,
    is_known,
    rows_of_ids,
    rows_of_table,
)
from kd_ranker.embedding.row_optimizers import Occurrences, find_occurrences, update_tables
from kd_ranker.models.model import Parameters
from kd_ranker.training.mapping import AXIS, join_over_devices
from kd_ranker.training.state import Hyperparameters, Recipe, TrainState


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
    step = state.step + 1
    fails = (state.non_finite_step == 0) & ~finite
    non_finite_step = jnp.where(fails, step, state.non_finite_step)
    may_change = non_finite_step == 0
    # Counted from 1: a factor of 0 at the first step would waste a batch.
    factor = recipe.schedule(step)
    dense, transform, optimizer_state = _update_dense(
        recipe.optimizer,
        state,
        gradients,
        factor * numbers.learning_rate,
        numbers.weight_decay,
        may_change,
    )
    tables, owners, unknown_ids = {}, {}, {}
    spec = recipe.model.embedding
    for name, table in state.parameters.tables.items():
        occurrences, owners[name], unknown = _find_occurrences(
            spec, batch, items, name, state.owners[name]
        )
        unknown_ids[name] = state.unknown_ids[name] + unknown
        # Ids and the gradients of their rows travel between devices, never one of a table's size.
        tables[name] = update_tables(
            recipe.row_optimizer,
            table,
            occurrences,
            join_over_devices(rows_of_table(spec, gradients.rows, name), axis=1),
            factor * numbers.table_learning_rate,
            numbers.table_weight_decay,
            may_change,
            rows_of_table(spec, gathered, name)[0] if gathered else None,
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
    learning_rate: Float[Array, "members"],
    weight_decay: Float[Array, "members"],
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
        learning_rate,
        weight_decay,
        may_change,
    )


def _find_occurrences(
    spec: EmbeddingSpec,
    batch: CandidateBatch,
    items: Items,
    name: str,
    owner: Int[Array, "rows"],
) -> tuple[Occurrences, Int[Array, "rows"], Int[Array, ""]]:
    """Equal rows of a table among the ids of all devices, and the number of ids without a row."""
    table = spec.tables[name]
    ids, mask = ids_of_table(spec, batch, items, name)
    unknown = jax.lax.psum(jnp.sum(mask & ~is_known(table, ids), dtype=jnp.int32), AXIS)
    ids, mask = join_over_devices((ids, mask), axis=0)
    return *find_occurrences(rows_of_ids(table, ids), mask, owner), unknown
