"""The program of a cohort: the stacks that it trains, their batches and devices, and its step."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int, Shaped

from kd_ranker.batches.cutting import PackedBatches, Span
from kd_ranker.batches.training import BatchIterator
from kd_ranker.training.mapping import DeviceMap, shared_evenly
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import Constants, Hyperparameters, LiveTeacher, States, TrainSpec
from kd_ranker.training.step import Step, Stepped, make_step, many_steps

_WithModel = TypeVar("_WithModel", TrainSpec, LiveTeacher)


class Program(NamedTuple):
    """A cohort ready to be trained, without its states.

    Its batches and constants are on the devices.
    """

    stacks: tuple[Stack, ...]
    teacher: LiveTeacher | None
    filled: tuple[Stack, ...]  # with their last run repeated until devices share them evenly
    batches: BatchIterator  # endless
    constants: Constants
    devices: DeviceMap
    take: Callable[..., Stepped]  # the mapped `step.many_steps`

    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]:
        """Those of the filled stacks."""
        return tuple(stack.hyperparameters for stack in self.filled)

    @property
    def steps(self) -> int:
        """The number of steps until the last run is finished."""
        return max(int(stack.hyperparameters.steps.max()) for stack in self.filled)


def make_program(
    stacks: Sequence[Stack],
    teacher: LiveTeacher | None,
    batches: BatchIterator,
    constants: Constants,
    devices: DeviceMap,
) -> Program:
    """Build a program, which is compiled at the first step.

    `constants` are on the host or on one device; their items will record how rows are sharded.
    """
    placed = devices.place(constants)
    placed = placed.replace(items=placed.items.replace(row_sharding=devices.row_sharding))
    filled = _filled(stacks, devices)
    take = _mapped_steps(filled, teacher, devices)
    return Program(tuple(stacks), teacher, filled, batches, placed, devices, take)


def program_of_runs(program: Program, indices: Sequence[Int[np.ndarray, "n"]]) -> Program:
    """Return the program of some runs of each stack, on the same batches and constants.

    A stack that keeps no run is left out.
    """
    stacks = tuple(
        stack.at(kept) for stack, kept in zip(program.stacks, indices, strict=True) if len(kept)
    )
    filled = _filled(stacks, program.devices)
    take = _mapped_steps(filled, program.teacher, program.devices)
    return program._replace(stacks=stacks, filled=filled, take=take)


def _filled(stacks: Sequence[Stack], devices: DeviceMap) -> tuple[Stack, ...]:
    return tuple(stack.at(shared_evenly(len(stack.names), devices.runs)) for stack in stacks)


def _mapped_steps(
    filled: Sequence[Stack], teacher: LiveTeacher | None, devices: DeviceMap
) -> Callable[..., Stepped]:
    steps = many_steps(step_for(filled, teacher, devices))
    return devices.map_step(steps, abstract_states(filled))


def step_for(stacks: Sequence[Stack], teacher: LiveTeacher | None, devices: DeviceMap) -> Step:
    """Build the step of stacks by `make_step`, for devices that may each hold a share of rows."""

    def sharded(owner: _WithModel) -> _WithModel:
        embedding = owner.model.embedding._replace(row_sharding=devices.row_sharding)
        return owner._replace(model=owner.model._replace(embedding=embedding))

    train_specs = [sharded(stack.train_spec) for stack in stacks]
    return make_step(train_specs, sharded(teacher) if teacher else None, devices.runs)


def abstract_states(stacks: Sequence[Stack]) -> States:
    """Return the abstract states before the first step."""
    return tuple(jax.eval_shape(stack.init) for stack in stacks)


def initial_states(program: Program) -> States:
    """Compute the states before the first step on the devices.

    Each stack has a program of its own: many are equal, and compiled once if programs are kept.
    """
    return tuple(
        program.devices.create(functools.partial(stack.init, None)) for stack in program.filled
    )


def take_steps(program: Program, states: States, batches: PackedBatches, span: Span) -> Stepped:
    """Return the states after a range of steps, and the metrics of the last; donates the states.

    The results are on the devices and may still be computing.
    """
    return program.take(states, batches, (span, program.hyperparameters), program.constants)


def compiled_steps(program: Program, states: States, batches: PackedBatches, span: Span) -> Any:
    """Return the compiled program of `take_steps`, which JAX has kept from a call of it."""
    take: Any = program.take
    arguments = (states, batches, (span, program.hyperparameters), program.constants)
    return take.lower(*arguments).compile()


def states_on_host(program: Program, states: States) -> States:
    """Return the states of the runs, without those repeated to fill stacks or rows.

    They have the shapes of `Stack.init` and are on the host or on one device.
    """

    def cut(leaf: Any, like: jax.ShapeDtypeStruct) -> Any:
        if leaf.shape == like.shape:
            return leaf
        return leaf[tuple(map(slice, like.shape))]

    return jax.tree.map(cut, program.devices.unreplicate(states), abstract_states(program.stacks))


def by_run(program: Program, arrays: Iterable[Shaped[Array, "runs"]]) -> dict[str, float]:
    """Return the number of each run by its name, from one array per stack."""
    on_host = program.devices.unreplicate(list(arrays))
    numbers: dict[str, float] = {}
    for stack, array in zip(program.stacks, on_host, strict=True):
        # Repeated runs follow the others.
        numbers |= zip(stack.names, np.asarray(array).tolist(), strict=False)
    return numbers
