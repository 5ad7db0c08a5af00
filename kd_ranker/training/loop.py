"""The training loop: a call of some steps, then a line of metrics, an evaluation, a checkpoint.

A `Run` is the input of the loop: the members that one program trains, their batches and devices.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.cutting import PackedBatches, Span
from kd_ranker.batches.training import BatchIterator
from kd_ranker.errors import UserError
from kd_ranker.manifest import MadeOf
from kd_ranker.progress import Bar
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import deferred
from kd_ranker.training.mapping import DeviceMap, shared_evenly
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    States,
    TrainState,
    steps_of_members,
)
from kd_ranker.training.step import Losses, Step, Stepped, in_turn, make_step
from kd_ranker.training.workdir import MetricsWriter

Evaluate = Callable[[States], dict[str, float]]
Begin = Callable[[States], States]

# Seconds that the steps of one call may take: a signal is noticed between two calls.
_LONGEST_CALL = 2.0


class Run(NamedTuple):
    """The parts of a run, without its states. Its batches and frozen arrays are on the devices."""

    groups: tuple[Group, ...]  # the members to train, all in one program
    filled: tuple[Group, ...]  # with their last member repeated until devices share them evenly
    batches: BatchIterator  # endless
    frozen: Frozen
    devices: DeviceMap
    take: Callable[..., Stepped]  # the mapped `step.in_turn`

    @property
    def numbers(self) -> tuple[Hyperparameters, ...]:
        """The numbers of the filled groups."""
        return tuple(group.numbers for group in self.filled)

    @property
    def steps(self) -> int:
        """The number of steps until the last member is finished."""
        return max(int(numbers.steps.max()) for numbers in self.numbers)


def make_run(
    groups: Sequence[Group],
    teacher: LiveTeacher | None,
    batches: BatchIterator,
    frozen: Frozen,
    devices: DeviceMap,
) -> Run:
    """Build a run; its program is compiled at the first step.

    `frozen` is on the host or on one device; its items will record how their rows are dealt.
    """
    filled = tuple(group.at(shared_evenly(len(group.names), devices.members)) for group in groups)
    take = devices.map_step(in_turn(step_for(filled, teacher, devices)), abstract_states(filled))
    held = devices.place(frozen)
    held = held.replace(items=held.items.replace(deal=devices.deal))
    return Run(tuple(groups), filled, batches, held, devices, take)


def step_for(groups: Sequence[Group], teacher: LiveTeacher | None, devices: DeviceMap) -> Step:
    """Build the step of groups by `make_step`, for devices that may each hold a share of rows."""

    def dealt(of: Any) -> Any:
        embedding = of.model.embedding._replace(deal=devices.deal)
        return of._replace(model=of.model._replace(embedding=embedding))

    recipes = [dealt(group.recipe) for group in groups]
    return make_step(recipes, teacher and dealt(teacher), devices.members)


def abstract_states(groups: Sequence[Group]) -> States:
    """Return the abstract states before the first step."""
    return tuple(jax.eval_shape(group.init) for group in groups)


def initial_states(run: Run) -> States:
    """Compute the states before the first step on the devices."""
    return run.devices.create(lambda deal: tuple(group.init(deal=deal) for group in run.filled))


def take_steps(run: Run, states: States, batches: PackedBatches, span: Span) -> Stepped:
    """Return the states after a range of steps and the losses of the last; donates the states.

    The results are on the devices and may still be computing.
    """
    return run.take(states, batches, (span, run.numbers), run.frozen)


def states_on_host(run: Run, states: States) -> States:
    """Return the states of the run's members, without those repeated to fill groups or rows.

    They have the shapes of `Group.init` and are on the host or on one device.
    """

    def cut(leaf: Any, like: jax.ShapeDtypeStruct) -> Any:
        return leaf if leaf.shape == like.shape else leaf[tuple(map(slice, like.shape))]

    return jax.tree.map(cut, run.devices.unreplicate(states), abstract_states(run.groups))


def fit(
    run: Run,
    train: ConfigDict,
    workdir: Path,
    made_of: MadeOf,
    evaluate: Evaluate,
    bar: Bar,
    begin: Begin | None = None,
) -> States:
    """Train until the last member is done, from the newest checkpoint in `workdir` if any.

    If the loss of a member stops being finite, that member is frozen and reported. The others
    continue; the run ends early if no member is left. A signal to end the process is handled after
    the checkpoint of the last step is complete.

    Args:
      run: the members, their batches and devices.
      train: `config.train` or `config.teacher.train`; its `…_every` count here.
      workdir: gets checkpoints and metrics.
      made_of: the fingerprints of the members, for the checkpoints.
      evaluate: states -> scalars by name; called every `train.eval_every` steps.
      bar: `run.steps` are added to it. Its progress gets the phase "compiling": all until the first
        step of this process is done.
      begin: initial states on the host -> those to begin with, if there is no checkpoint yet.

    Returns:
      The state of each group after the last step, on the host.

    Raises:
      UserError: the loss of a single run stopped being finite, the checkpoints in `workdir` have
        other fingerprints, or one cannot be written.
    """
    with deferred() as stop:
        with (
            checkpoints.open_in(workdir, to_write=True) as saved,
            contextlib.ExitStack() as opened,
            contextlib.ExitStack() as compiling,
        ):
            abstract = abstract_states(run.groups)
            states, step = checkpoints.restore(saved, abstract, run.batches, made_of)
            bar.update(step)
            if step >= run.steps:
                return states
            bar.progress.show("compiling the step, once for all steps")
            compiling.callback(bar.restart_clock)
            compiling.enter_context(bar.progress.phase("compiling"))
            states = run.devices.place(states) if step else initial_states(run)
            if begin and not step:
                states = run.devices.place(begin(states_on_host(run, states)))
            writer = opened.enter_context(contextlib.closing(MetricsWriter(workdir, step)))
            lengths = _by_name(run, [group.numbers.steps for group in run.groups])
            diverged, longest, stopping = _diverged_members(run, states, before=()), 1, False
            whole: States = ()
            while step < run.steps and not stopping:
                training = {name for name, last in lengths.items() if step < last}
                if training <= diverged.keys():
                    bar.update(run.steps - step)
                    break
                since, wanted = time.monotonic(), _next_stop(step, lengths.values(), train) - step
                packed, span = run.batches.take(min(wanted, longest))
                states, losses = take_steps(run, states, packed, span)
                if longest < wanted:
                    jax.block_until_ready(losses)
                    room = _LONGEST_CALL / _agreed(time.monotonic() - since)
                    longest = max(1, int(longest * min(room, 2)))
                compiling.close()  # after the first call
                taken = span.stop - span.start
                step += taken
                bar.update(taken)
                stopping = bool(_agreed(stop()))
                saving = step == run.steps or _is_due(step, train.checkpoint_every)
                logs = saving or _is_due(step, train.log_every)
                # The last states are measured in full after the run.
                evaluates = step < run.steps and _is_due(step, train.eval_every)
                saving = saving or stopping
                if saving:
                    states = _mark_diverged(run, states)
                # A state is checked before it is saved: a run could not resume from a NaN.
                if logs or saving:
                    diverged = _diverged_members(run, states, before=diverged)
                # It may be a copy of whole tables.
                whole = states_on_host(run, states) if saving or evaluates else ()
                scalars = _scalars(run, states, losses, training - diverged.keys()) if logs else {}
                scalars |= evaluate(whole) if evaluates else {}
                if scalars:
                    writer.write(step, scalars)
                    bar.set_postfix(_progress(run, scalars, diverged))
                if saving:
                    checkpoints.save(saved, step, whole, run.batches, made_of)
        if stopping and not stop():
            raise UserError(
                f"another process ended this run after step {step}; start all of them again"
            )
        return jax.tree.map(np.asarray, whole or states_on_host(run, states))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _next_stop(step: int, lengths: Iterable[float], train: ConfigDict) -> int:
    """Return the first later step that has an output, or that is the last of a member."""
    every = (train.log_every, train.checkpoint_every, train.eval_every)
    outputs = [(step // steps + 1) * steps for steps in every if steps]
    return min(*outputs, *(int(last) for last in lengths if last > step))


def _agreed(number: float) -> float:
    """Return the largest number of all processes, which have to take the same steps."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())


def scalar_name(scalar: str, member: str) -> str:
    """Return the name of a member's scalar in `metrics.jsonl`: `loss/<member>`, or `loss`."""
    return f"{scalar}/{member}" if member else scalar


def _by_name(run: Run, of_groups: Iterable[Shaped[Array, "members"]]) -> dict[str, float]:
    """Return the number of each member by its name, from one array per group."""
    on_one = run.devices.unreplicate(list(of_groups))
    return {
        name: number
        for group, of_members in zip(run.groups, on_one, strict=True)
        # Repeated members follow the others.
        for name, number in zip(group.names, np.asarray(of_members).tolist(), strict=False)
    }


def _diverged_members(run: Run, states: States, before: Collection[str]) -> dict[str, int]:
    """Return the step at which the loss stopped being finite, by diverged member.

    Warn of members that are not in `before`; raise in a single run.
    """
    steps = _by_name(run, (state.non_finite_step for state in states))
    diverged = {name: int(step) for name, step in steps.items() if step}
    for name, step in diverged.items():
        finding = f"stopped being finite at step {step}"
        if not name:
            raise UserError(f"the loss {finding}; try a smaller learning rate or weight")
        if name not in before:
            # The warning must not land in the middle of the bar.
            with tqdm.external_write_mode():
                logging.warning("%s %s; it is frozen, and the others continue", name, finding)
    return diverged


def _mark_diverged(run: Run, states: States) -> States:
    """Mark the members with parameters that are not finite after the last update.

    The loss of the next step would show it, but there may be no next step.
    """

    def marked(state: TrainState, numbers: Hyperparameters) -> Int[Array, "members"]:
        leaves = jax.tree.leaves(state.parameters)
        finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
        new = (state.non_finite_step == 0) & ~jnp.stack(finite).all(axis=0)
        return jnp.where(new, steps_of_members(state, numbers), state.non_finite_step)

    places = [state.non_finite_step.sharding for state in states]
    mark = jax.jit(lambda *of_groups: list(map(marked, *of_groups)), out_shardings=places)
    return tuple(
        dataclasses.replace(state, non_finite_step=at)
        for state, at in zip(states, mark(states, run.numbers), strict=True)
    )


def _scalars(
    run: Run, states: States, losses: Sequence[Losses], members: Collection[str]
) -> dict[str, float]:
    """Return the losses of some members, and the number of trained ids without a row, by table."""
    scalars = {
        scalar_name(scalar, name): value
        for scalar in losses[0]
        for name, value in _by_name(run, (of[scalar] for of in losses)).items()
        if name in members
    }
    for tables in run.devices.unreplicate([state.unknown_ids for state in states]):
        for table, number in tables.items():
            name = f"unknown_ids/{table}"
            # A group without a use for the teacher trains on fewer candidates of the same batches.
            scalars[name] = max(int(number), scalars.get(name, 0))
    return scalars


def _progress(run: Run, scalars: dict[str, float], diverged: dict[str, int]) -> str:
    """Return a short text for the end of the bar."""
    members = sum(len(group.names) for group in run.groups)
    if run.groups[0].names == ("",):
        return f"loss={scalars['loss']:.4f}" if "loss" in scalars else ""
    return f"alive {members - len(diverged)}/{members}"
