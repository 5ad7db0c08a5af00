"""Runs with a loss or parameters that stopped being finite: they diverged.

The step keeps the state of a diverged run as it was; the other runs continue.
"""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Int
from tqdm import tqdm

from kd_ranker.errors import UserError, short
from kd_ranker.training import kept_steps
from kd_ranker.training.program import Program, by_run
from kd_ranker.training.state import Hyperparameters, States, TrainState, steps_of_runs


def diverged_runs(program: Program, states: States) -> dict[str, int]:
    """Return the step at which a run stopped being finite, by the name of each that did."""
    steps = by_run(program, (state.non_finite_step for state in states))
    return {name: int(step) for name, step in steps.items() if step}


def report_diverged(
    program: Program, states: States, workdir: Path, before: Collection[str]
) -> dict[str, int]:
    """Return `diverged_runs`; keep the steps of those that are not in `before`, and warn of them.

    Raises:
      UserError: a single run diverged.
    """
    diverged = diverged_runs(program, states)
    new = {name: step for name, step in diverged.items() if name not in before}
    if not new:
        return diverged
    try:
        findings = kept_steps.keep(program, states, workdir, new)
        failure = ""
    # A full disk or device must not end the runs that train on.
    except (OSError, UserError, jax.errors.JaxRuntimeError) as error:
        findings = {}
        failure = short(error)
    for name, step in new.items():
        text = f"stopped being finite at step {step}"
        if name in findings:
            text += f": {findings[name]}; that step is in nan/step_{step}, for kd.debug.replay"
        else:
            text += f"; that step could not be kept ({failure}); try a smaller learning rate"
        if not name:
            raise UserError(f"the loss {text}")
        # The warning must not land in the middle of the bar.
        with tqdm.external_write_mode():
            logging.warning("%s %s. The others continue", name, text)
    return diverged


def mark_diverged(program: Program, states: States) -> States:
    """Mark the runs with parameters that are not finite after the last update.

    The loss of the next step would show it, but there may be no next step.
    """

    def marked(state: TrainState, hyperparameters: Hyperparameters) -> Int[Array, "runs"]:
        leaves = jax.tree.leaves((state.parameters, state.transform))
        is_finite = [jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
        is_new = (state.non_finite_step == 0) & ~jnp.stack(is_finite).all(axis=0)
        return jnp.where(is_new, steps_of_runs(state, hyperparameters), state.non_finite_step)

    shardings = [state.non_finite_step.sharding for state in states]

    def mark_all(
        states: States, hyperparameters: Sequence[Hyperparameters]
    ) -> list[Int[Array, "runs"]]:
        return list(map(marked, states, hyperparameters))

    steps = jax.jit(mark_all, out_shardings=shardings)(states, program.hyperparameters)
    return tuple(
        dataclasses.replace(state, non_finite_step=non_finite_step)
        for state, non_finite_step in zip(states, steps, strict=True)
    )
