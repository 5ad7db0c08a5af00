"""A stack of runs in the step: its train_spec, its numbers, its state.

The runs of a stack differ only in numbers: weights, rates, the seed of their parameters. Their
arrays are stacked, with a leading axis of runs.
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


class TrainSpec(NamedTuple):
    """The common part of a stack's runs, static when a step is compiled."""

    model: Model
    mode: Mode
    optimizer: optax.GradientTransformation  # a direction, to be scaled by minus the learning rate
    row_optimizer: RowOptimizer  # the same for embedding rows
    # (step, counted from 1; a run's number of steps) -> factor of the peak learning rates
    schedule: Callable[[Int[Array, ""], Float[Array, ""]], Float[Array, ""]]
    unshown_are_negatives: bool = False  # whether candidates that were not shown are labeled 0
    drops_near_shown: bool = False  # but for those that the teacher scores near the shown ones
    user_loss: str = "bce"  # one of `losses.USER_LOSSES`
    row_kernel: bool = False  # whether a TPU updates rows in a kernel, see `tpu_rows`


class OptimizerHyperparameters(NamedTuple):
    """The traced numbers of the update, float32; each is a key of `config.optimizer`.

    Rates are peaks that the schedule scales. Weight decay is decoupled from the gradient. `table_`
    is of the embedding rows; the others are of the dense parameters.
    """

    learning_rate: Float[Array, "runs"]
    table_learning_rate: Float[Array, "runs"]
    weight_decay: Float[Array, "runs"]
    table_weight_decay: Float[Array, "runs"]


class Hyperparameters(NamedTuple):
    """The numbers of a stack's runs, all float32 [runs]; the names in `terms` are static."""

    user_weight: Float[Array, "runs"]  # of the user loss
    distill_weight: Float[Array, "runs"]  # λ, of the distillation loss
    terms: tuple[Term, ...]  # of the distillation loss; empty for a mode without a teacher
    loss_numbers: LossNumbers  # those that losses read
    optimizer: OptimizerHyperparameters
    # To train, a whole number; after them the run's state stays as it is.
    steps: Float[Array, "runs"]
    unshown_weight: Float[Array, "runs"]  # label weight of an unshown candidate, if a negative
    unshown_margin: Float[Array, "runs"]  # how near is near, see `TrainSpec.drops_near_shown`


@flax.struct.dataclass
class TrainState:
    """The arrays that a stack carries from step to step.

    A checkpoint holds them and the loader's position. Every array has a leading axis of runs,
    except `step`, `unknown_ids` and `owners`, which runs share.

    A run diverged if its loss or dense gradient stopped being finite: it keeps the state from
    before that step. It also diverged if its parameters stopped being finite by the update: those
    are kept.
    """

    step: Int[Array, ""]  # steps taken by the stack; a run that finished earlier kept its state
    parameters: Parameters  # dense, and embedding tables with their optimizer's slots
    transform: Transform  # the mode's parameters
    optimizer_state: optax.OptState  # of the dense parameters and the transform
    non_finite_step: Int[Array, "runs"]  # 0, or the step at which it diverged
    stopped_after: Int[Array, "runs"]  # 0, or the step of this state, if the run was stopped there
    unknown_ids: dict[str, Int[Array, ""]]  # by table, the number of trained ids without a row
    owners: dict[str, Int[Array, "rows"]]  # by table, scratch memory of `find_occurrences`


_SHARED_BY_RUNS = {"step", "unknown_ids", "owners"}
RUNS_FIRST = {field.name for field in dataclasses.fields(TrainState)} - _SHARED_BY_RUNS
"""The fields of a state with a leading axis of runs in their arrays."""

States = tuple[TrainState, ...]
"""The states of a cohort, one per stack."""


class LiveTeacher(NamedTuple):
    """The teacher that scores, inside the step, the candidates of a funnel stage or a later one.

    `Constants` has its parameters.
    """

    model: Model
    stage: Stage


@flax.struct.dataclass
class Constants:
    """The arrays that a step only reads."""

    items: Items
    teacher: Parameters | None


def stack_runs(runs: Sequence[Any]) -> Any:
    """Stack pytrees of equal shapes along a leading axis of runs."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs)


def select_run(tree: Any, run: int) -> Any:
    """Return one run of a pytree; its leaves have a leading axis of runs."""
    return jax.tree.map(lambda leaf: leaf[run], tree)


def init_state(
    train_spec: TrainSpec, parameters: Parameters, tasks: int, affine: bool
) -> TrainState:
    """Return the state of a stack before its first step.

    `parameters` are the runs' initial ones, stacked; `affine` is `config.distill.affine`.
    """
    runs = jax.tree.leaves(parameters)[0].shape[0]
    transform = stack_runs([train_spec.mode.init_transform(tasks, affine)] * runs)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        transform=transform,
        optimizer_state=jax.vmap(train_spec.optimizer.init)((parameters.dense, transform)),
        non_finite_step=jnp.zeros(runs, jnp.int32),
        stopped_after=jnp.zeros(runs, jnp.int32),
        unknown_ids={name: jnp.zeros((), jnp.int32) for name in parameters.tables},
        owners={
            name: jnp.zeros(tables.shape[1], jnp.int32)
            for name, tables in parameters.tables.items()
        },
    )


def steps_of_runs(state: TrainState, numbers: Hyperparameters) -> Int[Array, "runs"]:
    """Return the last step that each run of a stack has taken before it finished or was stopped."""
    taken = jnp.minimum(state.step, numbers.steps.astype(jnp.int32))
    return jnp.where(state.stopped_after > 0, state.stopped_after, taken)
