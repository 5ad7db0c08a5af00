"""The train step: one pure function, the same for teacher and student, for one member or many.

    gather rows → logits → user loss + λ · distillation loss → gradients → update

A population is a sequence of groups, and a group is one or more members that differ in numbers
alone: weights, rates, the seed that drew their parameters. One step reads one batch, has the live
teacher score it once, and updates every member of every group. A single run is a population of one.
What differs between the members of a group is a traced value, so a step compiles once however many
values are tried.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kd_ranker.batch import CandidateBatch, Items, Stage
from kd_ranker.batches.cutting import PackedBatch, unpack
from kd_ranker.distillation.losses import Loss, LossNumbers, bce
from kd_ranker.distillation.modes import Mode, Transform
from kd_ranker.embedding.lookup import (
    EmbeddingSpec,
    Rows,
    embeddings,
    gather,
    ids_of_table,
    is_known,
    rows_of_ids,
    rows_of_table,
)
from kd_ranker.embedding.row_optimizers import (
    Occurrences,
    RowOptimizer,
    find_occurrences,
    update_tables,
)
from kd_ranker.models.model import Model, Parameters, apply_model, score

AXIS = "devices"


@flax.struct.dataclass
class Hyperparameters:
    """The numbers of a group's members, all float32 [members].

    `learning_rate` drives the dense parameters and `table_learning_rate` the embedding rows; both
    are peaks that the schedule scales. The decays are decoupled from the gradient.
    """

    distill_weight: Float[Array, "members"]
    temperature: Float[Array, "members"]
    top_k: Float[Array, "members"]
    learning_rate: Float[Array, "members"]
    table_learning_rate: Float[Array, "members"]
    weight_decay: Float[Array, "members"]
    table_weight_decay: Float[Array, "members"]


@flax.struct.dataclass
class TrainState:
    """What a group carries from step to step; a checkpoint holds it beside the loader's position.

    Every array has a leading axis of members, but for `step`, `unknown_ids` and `owners`, which
    members share.

    Attributes:
      step: how many steps were taken.
      parameters: dense parameters, and embedding tables with their optimiser's slots.
      transform: the mode's own parameters.
      optimizer_state: of the dense parameters and the transform.
      non_finite_step: 0, or the step at which a member's loss stopped being finite; such a member
        is frozen as it was before that step.
      unknown_ids: for each table, how many ids that were trained on had no row of their own.
      owners: for each table, what `find_occurrences` works with; it means nothing between steps.
    """

    step: Int[Array, ""]
    parameters: Parameters
    transform: Transform
    optimizer_state: optax.OptState
    non_finite_step: Int[Array, "members"]
    unknown_ids: dict[str, Int[Array, ""]]
    owners: dict[str, Int[Array, "rows"]]


@flax.struct.dataclass
class Frozen:
    """What a step reads and never changes.

    Attributes:
      items: what is known of each item.
      teacher: the live teacher, or None.
    """

    items: Items
    teacher: Parameters | None


class Recipe(NamedTuple):
    """What the members of a group have in common, fixed while a step is compiled.

    Attributes:
      model: the model to train.
      mode: how it meets the labels.
      distill_loss: the loss against the teacher.
      optimizer: a direction for the dense parameters, to be scaled by minus the learning rate.
      row_optimizer: the same for embedding rows.
      schedule: step -> factor of the peak learning rates.
    """

    model: Model
    mode: Mode
    distill_loss: Loss
    optimizer: optax.GradientTransformation
    row_optimizer: RowOptimizer
    schedule: Callable[[Int[Array, ""]], Float[Array, ""]]


class LiveTeacher(NamedTuple):
    """The teacher that scores the batches inside the step.

    Attributes:
      model: what is fixed about it; its parameters come with `Frozen`.
      stage: a candidate that came at least so far in the funnel meets the teacher.
    """

    model: Model
    stage: Stage


def stack_members(members: Sequence[Any]) -> Any:
    """Pytrees of equal shapes as one, with a leading axis of members."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def select_member(tree: Any, member: int) -> Any:
    """One member of a pytree whose leaves have a leading axis of members."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def init_state(
    recipe: Recipe,
    parameters: Parameters,
    tasks: int,
    affine: bool,
) -> TrainState:
    """The state of a group before its first step.

    Args:
      recipe: the group's recipe.
      parameters: the members' initial parameters, stacked.
      tasks: the number of tasks.
      affine: `config.distill.affine`.
    """
    members = jax.tree.leaves(parameters)[0].shape[0]
    transform = stack_members([recipe.mode.init_transform(tasks, affine)] * members)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        transform=transform,
        optimizer_state=jax.vmap(recipe.optimizer.init)((parameters.dense, transform)),
        non_finite_step=jnp.zeros(members, jnp.int32),
        unknown_ids={name: jnp.zeros((), jnp.int32) for name in parameters.tables},
        owners={
            name: jnp.zeros(tables.shape[1], jnp.int32)
            for name, tables in parameters.tables.items()
        },
    )


def with_live_teacher(
    teacher: LiveTeacher | None, batch: CandidateBatch, frozen: Frozen
) -> CandidateBatch:
    """The batch with the teacher's own probabilities in place of the logged ones."""
    if teacher is None:
        return batch
    assert frozen.teacher is not None, "a live teacher needs its parameters"
    # Scoring is most of such a step, so what will not meet the teacher is not scored.
    meets = batch.first(batch.judged) if teacher.stage >= Stage.PASSED else batch
    logits = score(teacher.model, frozen.teacher, meets, frozen.items)
    scored = meets.stage >= teacher.stage
    return dataclasses.replace(
        batch,
        teacher_probability=jax.lax.stop_gradient(jax.nn.sigmoid(logits)),
        teacher_weight=jnp.broadcast_to(scored[..., None], logits.shape).astype(jnp.float32),
    )


Losses = dict[str, Float[Array, "members"]]
Step = Callable[
    [Sequence[TrainState], CandidateBatch | PackedBatch, Sequence[Hyperparameters], Frozen],
    tuple[tuple[TrainState, ...], tuple[Losses, ...]],
]


def make_step(recipes: Sequence[Recipe], teacher: LiveTeacher | None = None) -> Step:
    """Builds the function that one device runs under a mapped axis named `AXIS`.

    The batch holds this device's requests, packed or not; the states are the same
    on all devices before and after. Losses are weighted means over what counts on all devices
    (entries, or as the loss has it pairs or requests), and then over tasks: numerators and
    denominators are summed over the axis first and divided afterwards, so the same global batch
    gives the same update on any number of devices.

    Args:
      recipes: one a group; their models look up the same ids.
      teacher: the live teacher; None where probabilities come with the batch.

    Returns:
      step(states, batch, hyperparameters, frozen) -> (states, losses), all but the batch and
      `frozen` one a group. `losses` holds `loss`, `user_loss` and `distill_loss`, equal on all
      devices.
    """

    def step(
        states: Sequence[TrainState],
        batch: CandidateBatch | PackedBatch,
        hyperparameters: Sequence[Hyperparameters],
        frozen: Frozen,
    ) -> tuple[tuple[TrainState, ...], tuple[Losses, ...]]:
        whole = unpack(batch) if isinstance(batch, PackedBatch) else batch
        whole = with_live_teacher(teacher, whole, frozen)
        updated = [
            _update_group(recipe, state, whole, numbers, frozen.items)
            for recipe, state, numbers in zip(recipes, states, hyperparameters, strict=True)
        ]
        return tuple(state for state, _ in updated), tuple(losses for _, losses in updated)

    return step


def _find_occurrences(
    spec: EmbeddingSpec,
    batch: CandidateBatch,
    items: Items,
    name: str,
    owner: Int[Array, "rows"],
) -> tuple[Occurrences, Int[Array, "rows"], Int[Array, ""]]:
    """Which rows of a table the ids of all devices share, and how many ids have none."""
    table = spec.tables[name]
    ids, mask = ids_of_table(spec, batch, items, name)
    unknown = jax.lax.psum(jnp.sum(mask & ~is_known(table, ids), dtype=jnp.int32), AXIS)
    ids, mask = _of_all_devices((ids, mask), axis=0)
    return *find_occurrences(rows_of_ids(table, ids), mask, owner), unknown


def _mean_over_devices(
    numerator: Float[Array, "T"], denominator: Float[Array, "T"]
) -> Float[Array, ""]:
    """This device's share of the global mean: the shares of all devices add up to it."""
    total = jax.lax.psum(denominator, AXIS)
    return jnp.mean(numerator / jnp.where(total > 0, total, 1.0))


def _losses(
    recipe: Recipe,
    dense: Any,
    transform: Transform,
    embedded: Rows,
    numbers: Hyperparameters,
    batch: CandidateBatch,
    items: Items,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """This device's share of a member's losses."""
    logits = apply_model(recipe.model, dense, embedded, batch, items)
    user_logits = recipe.mode.user_logits(logits[:, : batch.labelled], transform)
    label_weight = jnp.broadcast_to(batch.label_weight[..., None], user_logits.shape)
    user_loss = _mean_over_devices(*bce(user_logits, batch.user_label, label_weight))
    if recipe.mode.teacher_logits is None:
        distill_loss = jnp.zeros(())
    else:
        distill_loss = _mean_over_devices(
            *recipe.distill_loss(
                recipe.mode.teacher_logits(logits[:, : batch.judged], transform),
                batch.teacher_probability,
                batch.teacher_weight,
                LossNumbers(numbers.temperature, numbers.top_k),
            )
        )
    loss = user_loss + numbers.distill_weight * distill_loss
    return loss, {"loss": loss, "user_loss": user_loss, "distill_loss": distill_loss}


def _update_group(
    recipe: Recipe,
    state: TrainState,
    batch: CandidateBatch,
    numbers: Hyperparameters,
    items: Items,
) -> tuple[TrainState, Losses]:
    """One step of all members of a group."""
    spec = recipe.model.embedding
    # What meets neither a label nor the teacher would only cost time.
    judged = 0 if recipe.mode.teacher_logits is None else batch.judged
    batch = batch.first(max(batch.labelled, judged))
    # What a lone member on a lone device has read need not be read again. Of several members that
    # would be more than a cache holds, and other devices read rows of their own.
    rows_are_reused = len(state.non_finite_step) == 1 and jax.lax.axis_size(AXIS) == 1

    def member_gradients(
        parameters: Parameters, transform: Transform, numbers: Hyperparameters
    ) -> tuple[tuple[Any, Transform, Rows], dict[str, Float[Array, ""]], Rows]:
        rows = gather(spec, parameters.tables, batch, items, whole_rows=rows_are_reused)
        gradients, losses = jax.grad(_losses, argnums=(1, 2, 3), has_aux=True)(
            recipe,
            parameters.dense,
            transform,
            embeddings(spec, rows),
            numbers,
            batch,
            items,
        )
        return gradients, losses, rows

    (*dense_gradients, row_gradients), losses, rows = jax.vmap(member_gradients)(
        state.parameters, state.transform, numbers
    )
    dense_gradients, losses = jax.lax.psum((tuple(dense_gradients), losses), AXIS)

    step = state.step + 1
    fails = (state.non_finite_step == 0) & ~jnp.isfinite(losses["loss"])
    non_finite_step = jnp.where(fails, step, state.non_finite_step)
    healthy = non_finite_step == 0
    # Counted from 1: a factor of 0 at the first step would waste a batch.
    factor = recipe.schedule(step)

    def update_dense(
        parameters: tuple[Any, Transform],
        gradients: tuple[Any, Transform],
        optimizer_state: optax.OptState,
        numbers: Hyperparameters,
        healthy: Array,
    ) -> tuple[tuple[Any, Transform], optax.OptState]:
        direction, new_state = recipe.optimizer.update(gradients, optimizer_state, parameters)
        learning_rate = factor * numbers.learning_rate
        dense, transform = jax.tree.map(
            lambda value, step: value - learning_rate * step, parameters, direction
        )
        dense = jax.tree.map(
            lambda new, old: new - learning_rate * numbers.weight_decay * old, dense, parameters[0]
        )
        return jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old),
            ((dense, transform), new_state),
            (parameters, optimizer_state),
        )

    (dense, transform), optimizer_state = jax.vmap(update_dense)(
        (state.parameters.dense, state.transform),
        dense_gradients,
        state.optimizer_state,
        numbers,
        healthy,
    )
    tables, owners, unknown_ids = {}, {}, {}
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
            _of_all_devices(rows_of_table(spec, row_gradients, name), axis=1),
            factor * numbers.table_learning_rate,
            numbers.table_weight_decay,
            healthy,
            rows_of_table(spec, rows, name)[0] if rows_are_reused else None,
        )
    return (
        dataclasses.replace(
            state,
            step=step,
            parameters=Parameters(dense, tables),
            transform=transform,
            optimizer_state=optimizer_state,
            non_finite_step=non_finite_step,
            unknown_ids=unknown_ids,
            owners=owners,
        ),
        losses,
    )


def _of_all_devices(arrays: Any, axis: int) -> Any:
    """The arrays of all devices, joined."""
    # Among one, XLA would copy them.
    if jax.lax.axis_size(AXIS) == 1:
        return arrays
    return jax.lax.all_gather(arrays, AXIS, axis=axis, tiled=True)
