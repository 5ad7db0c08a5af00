"""A group of members in the step: its recipe, its numbers, its state.

The members of a group differ only in numbers: weights, rates, the seed of their parameters. Their
arrays are stacked, with a leading axis of members.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kd_ranker.batch import Items, Stage
from kd_ranker.distillation.losses import LossNumbers
from kd_ranker.distillation.modes import Mode, Transform
from kd_ranker.distillation.terms import Term
from kd_ranker.embedding.row_optimizers import RowOptimizer
from kd_ranker.models.model import Model, Parameters


class Recipe(NamedTuple):
    """The common part of a group's members, static when a step is compiled."""

    model: Model
    mode: Mode
    optimizer: optax.GradientTransformation  # a direction, to be scaled by minus the learning rate
    row_optimizer: RowOptimizer  # the same for embedding rows
    # (step, counted from 1; a member's number of steps) -> factor of the peak learning rates
    schedule: Callable[[Int[Array, ""], Float[Array, ""]], Float[Array, ""]]
    unshown_are_negatives: bool = False  # whether candidates that were not shown are labelled 0
    user_loss: str = "bce"  # one of `losses.USER_LOSSES`


class OptimizerNumbers(NamedTuple):
    """The traced numbers of the update, float32; each is a key of `config.optimizer`.

    Rates are peaks that the schedule scales. Weight decay is decoupled from the gradient. `table_`
    is of the embedding rows; the others are of the dense parameters.
    """

    learning_rate: Float[Array, "members"]
    table_learning_rate: Float[Array, "members"]
    weight_decay: Float[Array, "members"]
    table_weight_decay: Float[Array, "members"]


class Hyperparameters(NamedTuple):
    """The numbers of a group's members, all float32 [members]."""

    user_weight: Float[Array, "members"]  # of the user loss
    distill_weight: Float[Array, "members"]  # λ, of the distillation loss
    terms: tuple[Term, ...]  # of the distillation loss; empty for a mode without a teacher
    loss: LossNumbers
    optimizer: OptimizerNumbers
    steps: Float[Array, "members"]  # to train, an integer; after them the member is frozen
    unshown_weight: Float[Array, "members"]  # label weight of an unshown candidate, if a negative


@flax.struct.dataclass
class TrainState:
    """The arrays that a group carries from step to step.

    A checkpoint holds them and the loader's position. Every array has a leading axis of members,
    except `step`, `unknown_ids` and `owners`, which members share.

    A member with a loss that stopped being finite is frozen as it was before that step.
    """

    step: Int[Array, ""]  # steps taken; members that finished earlier were frozen in the last
    parameters: Parameters  # dense, and embedding tables with their optimiser's slots
    transform: Transform  # the mode's parameters
    optimizer_state: optax.OptState  # of the dense parameters and the transform
    non_finite_step: Int[Array, "members"]  # 0, or the step at which the loss was not finite
    unknown_ids: dict[str, Int[Array, ""]]  # by table, the number of trained ids without a row
    owners: dict[str, Int[Array, "rows"]]  # by table, scratch memory of `find_occurrences`


MEMBERS_FIRST = {field.name for field in dataclasses.fields(TrainState)} - {
    *("step", "unknown_ids", "owners")
}
"""The fields of a state with a leading axis of members in their arrays."""

States = tuple[TrainState, ...]
"""The states of a population, one per group."""


class LiveTeacher(NamedTuple):
    """The teacher that scores, inside the step, the candidates of a funnel stage or a later one.

    `Frozen` has its parameters.
    """

    model: Model
    stage: Stage


@flax.struct.dataclass
class Frozen:
    """The arrays that a step only reads."""

    items: Items
    teacher: Parameters | None


def stack_members(members: Sequence[Any]) -> Any:
    """Stack pytrees of equal shapes along a leading axis of members."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def select_member(tree: Any, member: int) -> Any:
    """Return one member of a pytree; its leaves have a leading axis of members."""
    return jax.tree.map(lambda leaf: leaf[member], tree)


def init_state(recipe: Recipe, parameters: Parameters, tasks: int, affine: bool) -> TrainState:
    """Return the state of a group before its first step.

    `parameters` are the members' initial ones, stacked; `affine` is `config.distill.affine`.
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


def steps_of_members(state: TrainState, numbers: Hyperparameters) -> Int[Array, "members"]:
    """Return the last step that each member of a group has taken before it finished."""
    return jnp.minimum(state.step, numbers.steps.astype(jnp.int32))
