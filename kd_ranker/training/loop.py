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
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.cutting import PackedBatches, Span
from kd_ranker.batches.training import BatchIterator
from kd_ranker.errors import UserError
from kd_ranker.manifest import MadeOf
from kd_ranker.models.model import with_deal
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import deferred
from kd_ranker.training.mapping import DeviceMap, shared_evenly
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import (
    Frozen,
    Hyperparameters,
    LiveTeacher,
    States,
    steps_of_members,
)
from kd_ranker.training.step import Losses, Step, in_turn, make_step
from kd_ranker.training.workdir import MetricsWriter

Evaluate = Callable[[States], dict[str, float]]
Begin = Callable[[States], States]

# Seconds that the steps of one call may take: a signal is noticed between two calls.
_LONGEST_CALL = 2.0


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
    batches: BatchIterator
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
    batches: BatchIterator,
    frozen: Frozen,
    devices: DeviceMap,
) -> Run:
    """Build a run; its program is compiled at the first step.

    Args:
      groups: the members to train, all in one program.
      teacher: the live teacher, or None.
      batches: endless, on the devices.
      frozen: the arrays that the step only reads, on the host or on one device; their items will
        record how their rows are dealt.
      devices: the mapping over devices.
    """

    def filled(group: Group) -> Group:
        places = shared_evenly(len(group.names), devices.members)
        return group if len(places) == len(group.names) else group.at(places)

    evenly = tuple(map(filled, groups))
    take = devices.map_step(in_turn(step_for(evenly, teacher, devices)), abstract_states(evenly))
    held = devices.place(frozen)
    held = held.replace(items=held.items.replace(deal=devices.deal))
    return Run(tuple(groups), evenly, batches, held, devices, take)


def step_for(groups: Sequence[Group], teacher: LiveTeacher | None, devices: DeviceMap) -> Step:
    """Build the step of groups by `make_step`, for devices that may each hold a share of rows."""

    def dealt(of: Any) -> Any:
        return of._replace(model=with_deal(of.model, devices.deal))

    recipes = [dealt(group.recipe) for group in groups]
    return make_step(recipes, teacher and dealt(teacher), devices.members)


def abstract_states(groups: Sequence[Group]) -> States:
    """Return the abstract states before the first step."""
    return tuple(jax.eval_shape(group.init) for group in groups)


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


def fit(
    run: Run,
    train: ConfigDict,
    workdir: Path,
    made_of: MadeOf,
    evaluate: Evaluate,
    bar: tqdm,
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
      made_of: the fingerprints of the members, which the checkpoints record.
      evaluate: states -> scalars by name; called every `train.eval_every` steps.
      bar: shows the progress; `run.steps` are added to it.
      begin: initial states on the host -> those to begin with, if there is no checkpoint yet.

    Returns:
      The state of each group after the last step, on the host.

    Raises:
      UserError: the loss of a single run stopped being finite, the checkpoints in `workdir` have
        other fingerprints, or one cannot be written.
    """
    with deferred() as stop:
        return _fit(run, train, workdir, made_of, evaluate, bar, begin, stop)


def _beginning(run: Run, begin: Begin | None) -> States:
    """Return the states before the first step on the devices."""
    states = initial_states(run)
    return run.devices.place(begin(states_on_host(run, states))) if begin else states


class _Outputs(NamedTuple):
    """The outputs of a run between two calls of steps, and the batches that checkpoints record."""

    saved: ocp.CheckpointManager
    made_of: MadeOf
    batches: BatchIterator
    writer: MetricsWriter
    evaluate: Evaluate
    bar: tqdm


def _fit(
    run: Run,
    train: ConfigDict,
    workdir: Path,
    made_of: MadeOf,
    evaluate: Evaluate,
    bar: tqdm,
    begin: Begin | None,
    stop: Callable[[], bool],
) -> States:
    """Do the work of `fit`; ends with a checkpoint soon after `stop` returns True."""
    lengths = _by_name(run, [numbers.steps for numbers in run.numbers])
    batches = run.batches
    with checkpoints.open_in(workdir, to_write=True) as saved:
        states, start = checkpoints.restore(saved, abstract_states(run.groups), batches, made_of)
        skip_steps(bar, start)
        if start >= run.steps:
            return states
        states = run.devices.place(states) if start else _beginning(run, begin)
        diverged = _diverged_members(run, states)
        with contextlib.closing(MetricsWriter(workdir, start)) as writer:
            outputs = _Outputs(saved, made_of, batches, writer, evaluate, bar)
            step, longest, stopping = start, 1, 0.0
            while step < run.steps and not stopping:
                training = {name for name, last in lengths.items() if step < last}
                if training <= diverged.keys():
                    skip_steps(bar, run.steps - step)
                    break
                wanted, since = _next_stop(step, lengths.values(), train) - step, time.monotonic()
                packed, span = batches.take(min(wanted, longest))
                states, losses = take_steps(run, states, packed, span)
                if longest < wanted:
                    jax.block_until_ready(losses)
                    longest = _next_longest(longest, _agreed(time.monotonic() - since))
                step += span.stop - span.start
                bar.update(span.stop - span.start)
                due, stopping = _due_after(step, run.steps, train), _agreed(stop())
                due = due._replace(saving=due.saving or bool(stopping))
                states, diverged = _do_chores(
                    run, states, losses, step, due, training, diverged, outputs
                )
    if stopping and not stop():
        raise UserError(
            f"another process ended this run after step {step}; start all of them again"
        )
    return jax.tree.map(np.asarray, states_on_host(run, states))


def _do_chores(
    run: Run,
    states: States,
    losses: Sequence[Losses],
    step: int,
    due: "_Due",
    training: Collection[str],
    diverged: dict[str, int],
    outputs: _Outputs,
) -> tuple[States, dict[str, int]]:
    """Log, evaluate and save as is due after a step.

    Returns:
      The states, with diverged members marked, and the diverged members by name.
    """
    # It may be a copy of whole tables.
    whole = states_on_host(run, states) if due.saving or due.evaluation else ()
    if due.saving:
        states, whole = _mark_diverged(run, states, whole)
    # A state is checked before it is saved: a run could not resume from a NaN.
    if due.logging or due.saving:
        diverged = _report(_diverged_members(run, states), before=diverged)
    scalars = {}
    if due.logging:
        scalars = _scalars(run, states, losses, {*training} - diverged.keys())
    if due.evaluation:
        scalars |= outputs.evaluate(whole)
    if scalars:
        outputs.writer.write(step, scalars)
        outputs.bar.set_postfix_str(_progress(run, scalars, diverged))
    if due.saving:
        checkpoints.save(outputs.saved, step, whole, outputs.batches, outputs.made_of)
    return states, diverged


def _next_stop(step: int, lengths: Iterable[float], train: ConfigDict) -> int:
    """Return the first later step that a chore may follow, or that is the last of a member."""
    every = (train.log_every, train.checkpoint_every, train.eval_every)
    chores = [(step // steps + 1) * steps for steps in every if steps]
    return min(*chores, *(int(last) for last in lengths if last > step))


def _next_longest(longest: int, seconds: float) -> int:
    """Return the limit of steps of the next call, after one of `longest` that took `seconds`."""
    if seconds > _LONGEST_CALL:
        return max(1, longest // 2)
    return 2 * longest if seconds < _LONGEST_CALL / 2 else longest


def _agreed(number: float) -> float:
    """Return the largest number of all processes, which have to take the same steps."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())


class _Due(NamedTuple):
    logging: bool
    evaluation: bool
    saving: bool


def _due_after(step: int, steps: int, train: ConfigDict) -> _Due:
    """Return the chores after a step; the last step is always logged and saved."""
    last = step == steps
    saving = last or step % train.checkpoint_every == 0
    return _Due(
        logging=saving or step % train.log_every == 0,
        # The last states are measured in full after the run.
        evaluation=not last and train.eval_every and step % train.eval_every == 0,
        saving=saving,
    )


def skip_steps(bar: tqdm, steps: int) -> None:
    """Move a bar over steps that are skipped, without counting them in its pace."""
    if bar.disable:
        return
    # `update` would count them as very fast steps.
    bar.initial += steps
    bar.n += steps
    bar.last_print_n = bar.n
    bar.refresh()


def scalar_name(scalar: str, member: str) -> str:
    """Return the name of a member's scalar in `metrics.jsonl`: `loss/<member>`, or `loss`."""
    return f"{scalar}/{member}" if member else scalar


def _by_name(run: Run, of_groups: Sequence[Shaped[Array, "members"]]) -> dict[str, float]:
    """Return the number of each member by its name, from one array per group."""
    return {
        name: number
        for group, of_members in zip(run.groups, of_groups, strict=True)
        for name, number in zip(group.names, np.asarray(of_members).tolist(), strict=True)
    }


def _diverged_members(run: Run, states: States) -> dict[str, int]:
    """Return the step at which the loss stopped being finite, by diverged member."""
    # Copy only this field to the host, not the whole states.
    at = on_host(run, [state.non_finite_step for state in states])
    return {name: int(step) for name, step in _by_name(run, at).items() if step}


def _mark_diverged(run: Run, states: States, whole: States) -> tuple[States, States]:
    """Mark the members with parameters that are not finite after the last update.

    The loss of the next step would show it, but there may be no next step.

    Args:
      run: the run.
      states: its states on the devices.
      whole: the same states from `states_on_host`.

    Returns:
      `states` and `whole` with these members marked.
    """
    marked, any_new = [], False
    for state, numbers in zip(whole, run.numbers, strict=True):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.parameters)]
        finite = [np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
        new = (np.asarray(state.non_finite_step) == 0) & ~np.all(finite, axis=0)
        any_new |= bool(new.any())
        steps = jnp.where(new, steps_of_members(state, numbers), state.non_finite_step)
        marked.append(dataclasses.replace(state, non_finite_step=steps))
    # Place the states on the devices again only if any changed.
    return run.devices.place(tuple(marked)) if any_new else states, tuple(marked)


def _report(diverged: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Warn of members that are not in `before`; raise in a single run."""
    for name, step in diverged.items():
        finding = f"stopped being finite at step {step}"
        if not name:
            raise UserError(f"the loss {finding}; try a smaller learning rate or weight")
        if name not in before:
            # The warning must not land in the middle of the bar.
            with tqdm.external_write_mode():
                logging.warning("%s %s; it is frozen, and the others continue", name, finding)
    return diverged


def _scalars(
    run: Run, states: States, losses: Sequence[Losses], members: Collection[str]
) -> dict[str, float]:
    """Return the losses of some members, and the number of unknown ids so far."""
    scalars = {
        scalar_name(scalar, name): value
        for group, of_group in zip(run.groups, on_host(run, losses), strict=True)
        for scalar, of_members in of_group.items()
        for name, value in zip(group.names, np.asarray(of_members).tolist(), strict=True)
        if name in members
    }
    return scalars | _unknown_ids(on_host(run, [state.unknown_ids for state in states]))


def _unknown_ids(groups: Sequence[dict[str, Int[Array, ""]]]) -> dict[str, float]:
    """Return the number of trained ids without a row, by table: the largest of all groups.

    A group without a use for the teacher trains on fewer candidates of the same batches.
    """
    largest: dict[str, float] = {}
    for tables in groups:
        for table, number in tables.items():
            name = f"unknown_ids/{table}"
            largest[name] = max(int(number), largest.get(name, 0))
    return largest


def _progress(run: Run, scalars: dict[str, float], diverged: dict[str, int]) -> str:
    """Return a short text for the end of the bar."""
    members = sum(len(group.names) for group in run.groups)
    if run.groups[0].names == ("",):
        return f"loss={scalars['loss']:.4f}" if "loss" in scalars else ""
    return f"alive {members - len(diverged)}/{members}"
