"""A run: the members that one program trains, their batches and devices, ready to take steps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from kd_ranker.batches.cutting import PackedBatches, Span
from kd_ranker.batches.training import TrainingBatches
from kd_ranker.embedding.row_optimizers import tpu_row, tpu_widths
from kd_ranker.models.model import with_deal
from kd_ranker.training.mapping import DeviceMap, shared_evenly
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import Frozen, Hyperparameters, LiveTeacher, States
from kd_ranker.training.step import Losses, Step, in_turn, make_step

# The share of a row that may be padding without a warning.
_LITTLE_PADDING = 0.05


class Run(NamedTuple):
    """The parts of a run, without its states.

    Attributes:
      groups: the members to train, all in one program.
      filled: the groups with their last member repeated until devices share them evenly.
      batches: endless, on the devices.
      frozen: the arrays that the step only reads, on the devices.
      devices: the mapping over devices.
      take: the mapped `step.in_turn`.
    """

    groups: tuple[Group, ...]
    filled: tuple[Group, ...]
    batches: TrainingBatches
    frozen: Frozen
    devices: DeviceMap
    take: Callable[..., tuple[States, tuple[Losses, ...]]]

    @property
    def numbers(self) -> tuple[Hyperparameters, ...]:
        """The members' numbers, one entry per group."""
        return tuple(group.numbers for group in self.groups)

    @property
    def steps(self) -> int:
        """The number of steps until the last member is finished."""
        return max(int(numbers.steps.max()) for numbers in self.numbers)


def make_run(
    groups: Sequence[Group],
    teacher: LiveTeacher | None,
    batches: TrainingBatches,
    frozen: Frozen,
    devices: DeviceMap,
) -> Run:
    """Build a run; its program is compiled at the first step.

    Args:
      groups: the members to train, all in one program.
      teacher: the live teacher, or None.
      batches: endless, on the devices.
      frozen: the arrays that the step only reads, on the host or on one device.
      devices: the mapping over devices.
    """
    filled = filled_for(groups, devices)
    mapped, held = map_steps(filled, teacher, devices), hold(frozen, devices)
    return Run(tuple(groups), filled, batches, held, devices, mapped)


def hold(frozen: Frozen, devices: DeviceMap) -> Frozen:
    """Place the arrays that a step only reads; their items record how their rows are dealt."""
    held = devices.place(frozen)
    return held.replace(items=held.items.replace(deal=devices.deal))


def filled_for(groups: Sequence[Group], devices: DeviceMap) -> tuple[Group, ...]:
    """Repeat the last member of each group until the devices share its members evenly."""

    def filled(group: Group) -> Group:
        places = shared_evenly(len(group.names), devices.members)
        return group if len(places) == len(group.names) else group.at(places)

    return tuple(map(filled, groups))


def map_steps(groups: Sequence[Group], teacher: LiveTeacher | None, devices: DeviceMap) -> Any:
    """Map `step.in_turn` for groups that the devices share evenly."""
    step = step_for(groups, teacher, devices)
    return devices.map_step(in_turn(step), abstract_states(groups))


def step_for(groups: Sequence[Group], teacher: LiveTeacher | None, devices: DeviceMap) -> Step:
    """Build the step of groups by `make_step`, for devices that may each hold a share of rows."""

    def dealt(of: Any) -> Any:
        return of._replace(model=with_deal(of.model, devices.deal))

    recipes = [dealt(group.recipe) for group in groups]
    return make_step(recipes, teacher and dealt(teacher), devices.members)


def abstract_states(groups: Sequence[Group]) -> States:
    """Return the abstract states before the first step."""
    return tuple(jax.eval_shape(group.init) for group in groups)


def padding_of(groups: Sequence[Group]) -> list[str]:
    """Return one line per embedding width for which a TPU stores much padding."""
    lines = {}
    for group in groups:
        width, optimizer = group.recipe.model.embedding.width, group.recipe.row_optimizer
        numbers, room = tpu_row(width, optimizer)
        if numbers < (1 - _LITTLE_PADDING) * room:
            better = " or ".join(map(str, tpu_widths(width, optimizer)))
            lines[width] = (
                f"with embeddings of width {width} and the optimizer's slots a row has {numbers} "
                f"numbers; a TPU stores {room}, {1 - numbers / room:.0%} of it padding; use a "
                f"width of {better} to avoid that"
            )
    return list(lines.values())


def initial_states(run: Run) -> States:
    """Compute the states before the first step on the devices."""
    return run.devices.create(lambda deal: tuple(group.init(deal=deal) for group in run.filled))


def take_steps(
    run: Run, states: States, batches: PackedBatches, span: Span
) -> tuple[States, tuple[Losses, ...]]:
    """Return the states after a range of steps and the losses of the last; donates the states.

    The results are on the devices and may still be computing.
    """
    numbers = tuple(group.numbers for group in run.filled)
    return run.take(states, batches, (span, numbers), run.frozen)


def states_on_host(run: Run, states: States) -> States:
    """Return the states of the run's members with the shapes of `Group.init`.

    They are on the host or on one device.
    """

    def without_padding(leaf: Any, like: jax.ShapeDtypeStruct) -> Any:
        return leaf if leaf.shape == like.shape else leaf[tuple(map(slice, like.shape))]

    return jax.tree.map(without_padding, on_host(run, states), abstract_states(run.groups))


def on_host(run: Run, of_groups: Sequence[Any]) -> tuple[Any, ...]:
    """Return each group's pytree without repeated members, on the host or on one device."""
    return tuple(
        run.devices.unreplicate(of_group, len(group.names))
        for group, of_group in zip(run.groups, of_groups, strict=True)
    )
