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
from kd_ranker.embedding.row_optimizers import RowOptimizer
from kd_ranker.models.model import Model, Parameters


class Term(NamedTuple):
    """A term of the distillation loss: names of `losses.LOSSES` and `teacher_signal.SIGNALS`."""

    loss: str
    signal: str


class Recipe(NamedTuple):
    """The common part of a group's members, static when a step is compiled.

    Attributes:
      model: the model to train.
      mode: which logits learn from which labels.
      terms: those of the distillation loss; empty for a mode without a teacher.
      optimizer: a direction for the dense parameters, to be scaled by minus the learning rate.
      row_optimizer: the same for embedding rows.
      schedule: (step, counted from 1; the members' numbers of steps) -> the factors of their peak
        learning rates.
      unshown_are_negatives: whether candidates that were not shown get user labels of 0.
      user_loss: one of `losses.USER_LOSSES`.
    """

    model: Model
    mode: Mode
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    row_optimizer: RowOptimizer
    schedule: Callable[[Int[Array, ""], Float[Array, "members"]], Float[Array, "members"]]
    unshown_are_negatives: bool = False
    user_loss: str = "bce"


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
    """The numbers of a group's members, all float32 [members].

    Attributes:
      user_weight: of the user loss.
      distill_weight: λ, of the distillation loss.
      term_weights: of each term of the distillation loss.
      loss: of the losses.
      optimizer: of the update.
      steps: the number of steps to train, an integer; after them the member is frozen.
      unshown_weight: the label weight of a candidate that was not shown, if it is a negative.
    """

    user_weight: Float[Array, "members"]
    distill_weight: Float[Array, "members"]
    term_weights: tuple[Float[Array, "members"], ...]
    loss: LossNumbers
    optimizer: OptimizerNumbers
    steps: Float[Array, "members"]
    unshown_weight: Float[Array, "members"]


@flax.struct.dataclass
class TrainState:
    """The arrays that a group carries from step to step.

    A checkpoint holds them and the loader's position. Every array has a leading axis of members,
    except `step`, `unknown_ids` and `owners`, which members share.

    Attributes:
      step: the number of steps taken; members that finished earlier were frozen in the last.
      parameters: dense parameters, and embedding tables with their optimiser's slots.
      transform: the mode's own parameters.
      optimizer_state: of the dense parameters and the transform.
      non_finite_step: 0, or the step at which a member's loss stopped being finite; such a member
        is frozen as it was before that step.
      unknown_ids: for each table, the number of trained ids without a row.
      owners: for each table, scratch memory of `find_occurrences`; arbitrary between steps.
    """

    step: Int[Array, ""]
    parameters: Parameters
    transform: Transform
    optimizer_state: optax.OptState
    non_finite_step: Int[Array, "members"]
    unknown_ids: dict[str, Int[Array, ""]]
    owners: dict[str, Int[Array, "rows"]]


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
