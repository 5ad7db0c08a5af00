"""The training loop: next batch, one step, and now and then a line, an evaluation, a checkpoint."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.cutting import on_packed
from kd_ranker.errors import UserError
from kd_ranker.training import checkpoints
from kd_ranker.training.identity import Identity
from kd_ranker.training.mapping import DeviceMap
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import Frozen, LiveTeacher, States, TrainState
from kd_ranker.training.step import Losses, make_step
from kd_ranker.training.workdir import MetricsWriter

Evaluate = Callable[[States], tuple[dict[str, float], str]]


def fit(
    groups: Sequence[Group],
    teacher: LiveTeacher | None,
    batches: grain.IterDataset,
    frozen: Frozen,
    mapping: DeviceMap,
    train: ConfigDict,
    workdir: Path,
    identity: Identity,
    evaluate: Evaluate,
    bar: tqdm,
) -> States:
    """Trains until `train.steps`, from the newest checkpoint in `workdir` if there is one.

    A member whose loss stops being finite is frozen and reported, and the others go on; where none
    is left, the run ends early.

    Args:
      groups: the members to train; all in one program.
      teacher: the live teacher, or None.
      batches: endless packed batches, on the devices already.
      frozen: what the step reads and does not change, on all devices already.
      mapping: how the step is spread over devices.
      train: `config.train` or `config.teacher.train`.
      workdir: gets checkpoints and metrics.
      identity: what makes the members the ones that they are; kept in the checkpoints.
      evaluate: states -> scalars by name, and how the best member does, in a few words; called
        every `train.eval_every` steps.
      bar: shows the progress; `train.steps` are added to it.

    Returns:
      The state of each group after the last step, on the host.

    Raises:
      UserError: the loss of a single run stopped being finite, or the checkpoints in `workdir` have
        another identity.
    """
    iterator = iter(batches)
    with checkpoints.open_manager(workdir) as manager:
        abstract = tuple(jax.eval_shape(group.init) for group in groups)
        states, start = checkpoints.restore(manager, abstract, iterator, identity)
        skip_steps(bar, start)
        if start >= train.steps:
            return states
        writer = MetricsWriter(workdir, start)
        step = mapping.map_step(on_packed(make_step([group.recipe for group in groups], teacher)))
        numbers = tuple(group.numbers for group in groups)
        if start:
            states = mapping.replicate(states)
        else:
            states = mapping.create(lambda: tuple(group.init() for group in groups))
        diverged = _diverged_members(groups, mapping.unreplicate(_non_finite(states)))
        best = ""
        for done in range(start + 1, train.steps + 1):
            if len(diverged) == _number_of_members(groups):
                skip_steps(bar, train.steps - done + 1)
                break
            states, losses = step(states, next(iterator), numbers, frozen)
            bar.update()
            last = done == train.steps
            saves = last or done % train.checkpoint_every == 0
            scalars = {}
            if saves:
                states = _mark_lost(states, mapping)
            # A state is looked at before it is saved: a run could not go on from a NaN.
            if saves or done % train.log_every == 0:
                # Not of the whole states, which would be copied.
                diverged_now = _diverged_members(groups, mapping.unreplicate(_non_finite(states)))
                _report(diverged_now, diverged)
                diverged = diverged_now
                scalars = _scalars(groups, mapping.unreplicate(losses), diverged_now)
                scalars |= _unknown_ids(
                    mapping.unreplicate([state.unknown_ids for state in states])
                )
            if not last and train.eval_every and done % train.eval_every == 0:
                measured, best = evaluate(mapping.unreplicate(states))
                scalars |= measured
            if scalars:
                writer.write(done, scalars)
                bar.set_postfix_str(_progress(groups, scalars, diverged, best))
            if saves:
                checkpoints.save(manager, done, mapping.unreplicate(states), iterator, identity)
        writer.close()
        manager.wait_until_finished()
    return jax.tree.map(np.asarray, mapping.unreplicate(states))


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


def _non_finite(states: Sequence[TrainState]) -> list[Int[Array, "members"]]:
    return [state.non_finite_step for state in states]


def _diverged_members(
    groups: Sequence[Group], non_finite: Sequence[Int[Array, "members"]]
) -> dict[str, int]:
    """The members whose loss stopped being finite, with the step at which it did."""
    return {
        name: step
        for group, steps in zip(groups, non_finite, strict=True)
        for name, step in zip(group.names, np.asarray(steps).tolist(), strict=True)
        if step
    }


def _mark_lost(states: States, mapping: DeviceMap) -> States:
    """Marks the members that their last update left without finite parameters.

    The loss that it leads to would tell at the next step, but there may be none.
    """
    marked, any_lost = [], False
    for state in mapping.unreplicate(states):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.parameters)]
        finite = [np.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
        lost = (np.asarray(state.non_finite_step) == 0) & ~np.all(finite, axis=0)
        any_lost |= bool(lost.any())
        steps = jnp.where(lost, state.step, state.non_finite_step)
        marked.append(dataclasses.replace(state, non_finite_step=steps))
    # What is on the devices is put there anew only if it has to be.
    return mapping.replicate(tuple(marked)) if any_lost else states


def _unknown_ids(groups: Sequence[dict[str, Int[Array, ""]]]) -> dict[str, float]:
    """How many ids that a group trained on had no row of their own: of that which met the most.

    A group without a use for the teacher trains on fewer candidates of the same batches.
    """
    return {
        f"unknown_ids/{table}": max(int(numbers[table]) for numbers in groups)
        for table in groups[0]
    }


def _number_of_members(groups: Sequence[Group]) -> int:
    return sum(len(group.names) for group in groups)


def _report(diverged: dict[str, int], before: dict[str, int]) -> None:
    for name, step in diverged.items():
        finding = f"stopped being finite at step {step}"
        if not name:
            raise UserError(f"the loss {finding}; try a smaller learning rate or weight")
        if name not in before:
            # The warning must not land in the middle of the bar.
            with tqdm.external_write_mode():
                logging.warning("%s %s; it is frozen, and the others go on", name, finding)


def _scalars(
    groups: Sequence[Group], losses: Sequence[Losses], diverged: dict[str, int]
) -> dict[str, float]:
    return {
        scalar_name(scalar, name): value
        for group, of_group in zip(groups, losses, strict=True)
        for scalar, of_members in of_group.items()
        for name, value in zip(group.names, np.asarray(of_members).tolist(), strict=True)
        if name not in diverged
    }


def _progress(
    groups: Sequence[Group], scalars: dict[str, float], diverged: dict[str, int], best: str
) -> str:
    members = _number_of_members(groups)
    if groups[0].names == ("",):
        return f"loss={scalars['loss']:.4f}" if "loss" in scalars else ""
    alive = f"alive {members - len(diverged)}/{members}"
    return f"{alive}, {best}" if best else alive
