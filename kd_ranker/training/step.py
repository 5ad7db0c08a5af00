"""The train step: one pure function, the same for teacher and student, on one device or many.

    gather rows → logits → user loss + λ · distillation loss → gradients → update

Whatever changes from one run of a sweep to the next is a traced value in `Hyperparameters`, so a
step compiles once however many values are tried.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kd_ranker.batch import CandidateBatch, Stage
from kd_ranker.distillation.losses import Loss, bce
from kd_ranker.distillation.modes import Mode, Transform
from kd_ranker.embedding.lookup import Rows, gather, touched
from kd_ranker.embedding.row_optimizers import RowOptimizer, Slots, update_table
from kd_ranker.models.model import Model, Parameters, apply_model, score

AXIS = "devices"


@flax.struct.dataclass
class Hyperparameters:
    """The numbers of a run, all float32 scalars.

    `learning_rate` drives the dense parameters and `table_learning_rate` the embedding rows; both
    are peaks that the schedule scales. The decays are decoupled from the gradient.
    """

    distill_weight: Float[Array, ""]
    temperature: Float[Array, ""]
    learning_rate: Float[Array, ""]
    table_learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    table_weight_decay: Float[Array, ""]


@flax.struct.dataclass
class TrainState:
    """What a run carries from step to step; a checkpoint holds it beside the loader's position.

    `key` is the run's random state, for models that draw while they train; those built in do not.
    """

    step: Int[Array, ""]
    parameters: Parameters
    transform: Transform
    optimizer_state: optax.OptState
    table_slots: dict[str, Slots]
    key: PRNGKeyArray


@flax.struct.dataclass
class Frozen:
    """What a step reads and never changes: item features, and the live teacher or None."""

    item_features: Float[Array, "items F"]
    teacher: Parameters | None


class Recipe(NamedTuple):
    """What is fixed while a step is compiled.

    Attributes:
      model: the model to train.
      mode: how it meets the labels.
      distill_loss: the loss against the teacher's probabilities.
      optimizer: a direction for the dense parameters, to be scaled by minus the learning rate.
      row_optimizer: the same for embedding rows.
      schedule: step -> factor of the peak learning rates.
      teacher: the live teacher's model; None where probabilities come with the batch.
      teacher_stage: a candidate that came at least so far in the funnel meets the live teacher.
    """

    model: Model
    mode: Mode
    distill_loss: Loss
    optimizer: optax.GradientTransformation
    row_optimizer: RowOptimizer
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]
    teacher: Model | None
    teacher_stage: Stage


def init_state(
    recipe: Recipe, parameters: Parameters, tasks: int, affine: bool, key: PRNGKeyArray
) -> TrainState:
    """The state before the first step; `affine` is `config.distill.affine`."""
    transform = recipe.mode.init_transform(tasks, affine)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        transform=transform,
        optimizer_state=recipe.optimizer.init((parameters.dense, transform)),
        table_slots={
            name: recipe.row_optimizer.init(table) for name, table in parameters.tables.items()
        },
        key=key,
    )


def with_live_teacher(recipe: Recipe, batch: CandidateBatch, frozen: Frozen) -> CandidateBatch:
    """The batch with the teacher's own probabilities in place of the logged ones."""
    if recipe.teacher is None:
        return batch
    assert frozen.teacher is not None, "a live teacher needs its parameters"
    logits = score(recipe.teacher, frozen.teacher, batch, frozen.item_features)
    scored = batch.stage >= recipe.teacher_stage
    return dataclasses.replace(
        batch,
        teacher_probability=jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
        teacher_weight=jnp.broadcast_to(scored[..., None], logits.shape).astype(jnp.float32),
    )


def make_step(
    recipe: Recipe,
) -> Callable[
    [TrainState, CandidateBatch, Hyperparameters, Frozen],
    tuple[TrainState, dict[str, Float[Array, ""]]],
]:
    """Builds the function that one device runs under a mapped axis named `AXIS`.

    The batch holds this device's requests; the state is the same on all devices before and after.
    Losses are weighted means over the valid entries of all devices, a mean over tasks of means over
    entries: numerators and denominators are summed over the axis first and divided afterwards, so
    the same global batch gives the same update on any number of devices.

    Returns:
      step(state, batch, hyperparameters, frozen) -> (state, losses), with `losses` holding the
      scalars `loss`, `user_loss` and `distill_loss`, equal on all devices.
    """

    def mean_over_devices(
        numerator: Float[Array, "T"], denominator: Float[Array, "T"]
    ) -> Float[Array, ""]:
        """This device's share of the global mean: the shares of all devices add up to it."""
        total = jax.lax.psum(denominator, AXIS)
        return jnp.mean(numerator / jnp.where(total > 0, total, 1.0))

    def losses(
        dense: Any,
        transform: Transform,
        rows: Rows,
        batch: CandidateBatch,
        hyperparameters: Hyperparameters,
        frozen: Frozen,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        logits = apply_model(recipe.model, dense, rows, batch, frozen.item_features)
        user_logits = recipe.mode.user_logits(logits, transform)
        label_weight = jnp.broadcast_to(batch.label_weight[..., None], user_logits.shape)
        user_loss = mean_over_devices(*bce(user_logits, batch.user_label, label_weight))
        if recipe.mode.teacher_logits is None:
            distill_loss = jnp.zeros(())
        else:
            distill_loss = mean_over_devices(
                *recipe.distill_loss(
                    recipe.mode.teacher_logits(logits, transform),
                    batch.teacher_probability,
                    batch.teacher_weight,
                    hyperparameters.temperature,
                )
            )
        loss = user_loss + hyperparameters.distill_weight * distill_loss
        return loss, {"loss": loss, "user_loss": user_loss, "distill_loss": distill_loss}

    def step(
        state: TrainState,
        batch: CandidateBatch,
        hyperparameters: Hyperparameters,
        frozen: Frozen,
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        batch = with_live_teacher(recipe, batch, frozen)
        parameters = state.parameters
        rows = gather(parameters.tables, recipe.model.lookups, batch)
        gradients, scalars = jax.grad(losses, argnums=(0, 1, 2), has_aux=True)(
            parameters.dense, state.transform, rows, batch, hyperparameters, frozen
        )
        scalars = jax.lax.psum(scalars, AXIS)
        *dense_gradients, row_gradients = gradients
        dense_gradients = tuple(jax.lax.psum(dense_gradients, AXIS))
        # Counted from 1: a factor of 0 at the first step would waste a batch.
        factor = recipe.schedule(state.step + 1)

        dense_parameters = (parameters.dense, state.transform)
        direction, optimizer_state = recipe.optimizer.update(
            dense_gradients, state.optimizer_state, dense_parameters
        )
        learning_rate = factor * hyperparameters.learning_rate
        dense, transform = jax.tree.map(
            lambda value, step: value - learning_rate * step, dense_parameters, direction
        )
        dense = jax.tree.map(
            lambda new, old: new - learning_rate * hyperparameters.weight_decay * old,
            dense,
            parameters.dense,
        )
        tables, table_slots = {}, {}
        for name, table in parameters.tables.items():
            ids, id_gradients = touched(
                row_gradients, recipe.model.lookups, batch, name, table.shape[0]
            )
            # Ids and rows travel between devices, never a gradient of the table's size.
            ids, id_gradients = jax.lax.all_gather((ids, id_gradients), AXIS, tiled=True)
            tables[name], table_slots[name] = update_table(
                recipe.row_optimizer,
                table,
                state.table_slots[name],
                ids,
                id_gradients,
                factor * hyperparameters.table_learning_rate,
                hyperparameters.table_weight_decay,
            )
        return (
            dataclasses.replace(
                state,
                step=state.step + 1,
                parameters=Parameters(dense, tables),
                transform=transform,
                optimizer_state=optimizer_state,
                table_slots=table_slots,
            ),
            scalars,
        )

    return step
