"""The training loop: some steps, and then a line, an evaluation, a checkpoint."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Int, Shaped
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.training import checkpoints
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.interruption import deferred
from kd_ranker.training.run import (
    Run,
    abstract_states,
    initial_states,
    on_host,
    states_on_host,
    take_steps,
)
from kd_ranker.training.state import States, steps_of_members
from kd_ranker.training.step import Losses
from kd_ranker.training.workdir import MetricsWriter

Evaluate = Callable[[States], tuple[dict[str, float], str]]

# Seconds that the steps of one call may take: between two calls it is seen if training is to end.
_LONGEST_CALL = 2.0


def fit(
    run: Run, train: ConfigDict, workdir: Path, identity: Identity, evaluate: Evaluate, bar: tqdm
) -> States:
    """Trains until the last member is done, from the newest checkpoint in `workdir` if any.

    A member whose loss stops being finite is frozen and reported, and the others go on; where none
    is left, the run ends early. An exception that interrupts the wait for it, as KeyboardInterrupt,
    is raised once a checkpoint of the last step is whole.

    Args:
      run: the members, their batches and devices.
      train: `config.train` or `config.teacher.train`; its `…_every` count here.
      workdir: gets checkpoints and metrics.
      identity: the identity of the members, which the checkpoints keep.
      evaluate: states -> scalars by name, and in a few words how well the best member does; called
        every `train.eval_every` steps.
      bar: shows the progress; `run.steps` are added to it.

    Returns:
      The state of each group after the last step, on the host.

    Raises:
      UserError: the loss of a single run stopped being finite, the checkpoints in `workdir` have
        another identity, or the disk has no room for the next one.
    """
    with deferred() as stop:
        return _fit(run, train, workdir, identity, evaluate, bar, stop)


def _fit(
    run: Run,
    train: ConfigDict,
    workdir: Path,
    identity: Identity,
    evaluate: Evaluate,
    bar: tqdm,
    stop: Callable[[], bool],
) -> States:
    """`fit`, which ends with a checkpoint soon after `stop` says so."""
    lengths = _by_name(run, [numbers.steps for numbers in run.numbers])
    batches = iter(run.batches)
    with checkpoints.open_in(workdir, to_write=True) as saved:
        states, start = checkpoints.restore(saved, abstract_states(run.groups), batches, identity)
        skip_steps(bar, start)
        if start >= run.steps:
            return states
        states = run.devices.place(states) if start else initial_states(run)
        diverged, best = _diverged_members(run, states), ""
        with contextlib.closing(MetricsWriter(workdir, start)) as writer:
            step, most, stopping = start, 1, 0.0
            while step < run.steps and not stopping:
                training = {name for name, last in lengths.items() if step < last}
                if training <= diverged.keys():
                    skip_steps(bar, run.steps - step)
                    break
                wanted, since = _next_stop(step, lengths.values(), train) - step, time.monotonic()
                packed, span = batches.take(min(wanted, most))
                states, losses = take_steps(run, states, packed, span)
                if most < wanted:
                    jax.block_until_ready(losses)
                    most = _next_most(most, _agreed(time.monotonic() - since))
                step += span.stop - span.start
                bar.update(span.stop - span.start)
                due, scalars, stopping = _due_after(step, run.steps, train), {}, _agreed(stop())
                saving = due.saving or stopping
                whole = states_on_host(run, states) if saving or due.evaluation else ()
                if saving:
                    states, whole = _mark_diverged(run, states, whole)
                # A state is looked at before it is saved: a run could not go on from a NaN.
                if due.logging or saving:
                    diverged = _report(_diverged_members(run, states), before=diverged)
                if due.logging:
                    scalars = _scalars(run, states, losses, training - diverged.keys())
                if due.evaluation:
                    measured, best = evaluate(whole)
                    scalars |= measured
                if scalars:
                    writer.write(step, scalars)
                    bar.set_postfix_str(_progress(run, scalars, diverged, best))
                if saving:
                    checkpoints.save(saved, step, whole, batches, identity)
                # It may be a copy of whole tables, for which the next steps need no room.
                del whole
    if stopping and not stop():
        raise UserError(f"another process has ended this run after step {step}; start all anew")
    return jax.tree.map(np.asarray, states_on_host(run, states))


def _next_stop(step: int, lengths: Iterable[float], train: ConfigDict) -> int:
    """The first step after `step` that a chore may follow, or that is the last of a member."""
    every = (train.log_every, train.checkpoint_every, train.eval_every)
    chores = [(step // steps + 1) * steps for steps in every if steps]
    return min(*chores, *(int(last) for last in lengths if last > step))


def _next_most(most: int, seconds: float) -> int:
    """The most steps of the next call, after one of at most `most` that took so many seconds."""
    if seconds > _LONGEST_CALL:
        return max(1, most // 2)
    return 2 * most if seconds < _LONGEST_CALL / 2 else most


def _agreed(number: float) -> float:
    """The largest of the numbers of all processes, which have to take the same steps."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())


class _Due(NamedTuple):
    logging: bool
    evaluation: bool
    saving: bool


def _due_after(step: int, steps: int, train: ConfigDict) -> _Due:
    """The chores after a step, by how often `train` wants them and by what the last step needs."""
    last = step == steps
    saving = last or step % train.checkpoint_every == 0
    return _Due(
        logging=saving or step % train.log_every == 0,
        # The last states are measured in full once the run is over.
        evaluation=not last and train.eval_every and step % train.eval_every == 0,
        saving=saving,
    )


def skip_steps(bar: tqdm, steps: int) -> None:
    """Moves a bar over steps that need not be taken, which say nothing of the pace to come."""
    if bar.disable:
        return
    # `update` would take them for the work of an instant.
    bar.initial += steps
    bar.n += steps
    bar.last_print_n = bar.n
    bar.refresh()


def scalar_name(scalar: str, member: str) -> str:
    """The name of a member's scalar in `metrics.jsonl`: `loss/<member>`, `loss` in a single run."""
    return f"{scalar}/{member}" if member else scalar


def _by_name(run: Run, of_groups: Sequence[Shaped[Array, "members"]]) -> dict[str, float]:
    """The number of each member by its name, from an array a group."""
    return {
        name: number
        for group, of_members in zip(run.groups, of_groups, strict=True)
        for name, number in zip(group.names, np.asarray(of_members).tolist(), strict=True)
    }


def _diverged_members(run: Run, states: States) -> dict[str, int]:
    """The members whose loss stopped being finite, with the step at which it did."""
    # Not of the whole states, which would be copied.
    at = on_host(run, [state.non_finite_step for state in states])
    return {name: int(step) for name, step in _by_name(run, at).items() if step}


def _mark_diverged(run: Run, states: States, whole: States) -> tuple[States, States]:
    """Marks the members that their last update left without finite parameters.

    The loss that it leads to would tell at the next step, but there may be none.

    Args:
      run: the run.
      states: its states on the devices.
      whole: the same, of `states_on_host`.

    Returns:
      Both, marked.
    """
    marked, any_new = [], False
    for state, numbers in zip(whole, run.numbers, strict=True):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.parameters)]
        finite = [np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
        new = (np.asarray(state.non_finite_step) == 0) & ~np.all(finite, axis=0)
        any_new |= bool(new.any())
        steps = jnp.where(new, steps_of_members(state, numbers), state.non_finite_step)
        marked.append(dataclasses.replace(state, non_finite_step=steps))
    # The states on the devices are put there anew only if they have to be.
    return run.devices.place(tuple(marked)) if any_new else states, tuple(marked)


def _report(diverged: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """Warns of members that were not among those `before`; an error in a single run."""
    for name, step in diverged.items():
        finding = f"stopped being finite at step {step}"
        if not name:
            raise UserError(f"the loss {finding}; try a smaller learning rate or weight")
        if name not in before:
            # The warning must not land in the middle of the bar.
            with tqdm.external_write_mode():
                logging.warning("%s %s; it is frozen, and the others go on", name, finding)
    return diverged


def _scalars(
    run: Run, states: States, losses: Sequence[Losses], members: Collection[str]
) -> dict[str, float]:
    """The losses of some members, and the unknown ids that training has met so far."""
    scalars = {
        scalar_name(scalar, name): value
        for group, of_group in zip(run.groups, on_host(run, losses), strict=True)
        for scalar, of_members in of_group.items()
        for name, value in zip(group.names, np.asarray(of_members).tolist(), strict=True)
        if name in members
    }
    return scalars | _unknown_ids(on_host(run, [state.unknown_ids for state in states]))


def _unknown_ids(groups: Sequence[dict[str, Int[Array, ""]]]) -> dict[str, float]:
    """The number of trained ids without a row of their own, by table: the largest of all groups.

    A group without a use for the teacher trains on fewer candidates of the same batches.
    """
    largest: dict[str, float] = {}
    for tables in groups:
        for table, number in tables.items():
            name = f"unknown_ids/{table}"
            largest[name] = max(int(number), largest.get(name, 0))
    return largest


def _progress(run: Run, scalars: dict[str, float], diverged: dict[str, int], best: str) -> str:
    """A few words for the end of the bar."""
    members = sum(len(group.names) for group in run.groups)
    if run.groups[0].names == ("",):
        return f"loss={scalars['loss']:.4f}" if "loss" in scalars else ""
    alive = f"alive {members - len(diverged)}/{members}"
    return f"{alive}, {best}" if best else alive
