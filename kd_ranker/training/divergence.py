"""Runs with a loss or parameters that stopped being finite: they diverged.

The step keeps the state of a diverged run as it was; the other runs continue.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Int
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.training.program import Program, by_run
from kd_ranker.training.state import Hyperparameters, States, TrainState, steps_of_runs


def diverged_runs(program: Program, states: States, before: Collection[str]) -> dict[str, int]:
    """Return the step at which the loss stopped being finite, by the name of a diverged run.

    Runs that are not in `before` are logged as warnings.

    Raises:
      UserError: a single run diverged.
    """
    steps = by_run(program, (state.non_finite_step for state in states))
    diverged = {name: int(step) for name, step in steps.items() if step}
    for name, step in diverged.items():
        finding = f"stopped being finite at step {step}"
        if not name:
            raise UserError(f"the loss {finding}; try a smaller learning rate or weight")
        if name not in before:
            # The warning must not land in the middle of the bar.
            with tqdm.external_write_mode():
                logging.warning("%s %s; it stops here, and the others continue", name, finding)
    return diverged


def mark_diverged(program: Program, states: States) -> States:
    """Mark the runs with parameters that are not finite after the last update.

    The loss of the next step would show it, but there may be no next step.
    """

    def marked(state: TrainState, hyperparameters: Hyperparameters) -> Int[Array, "runs"]:
        leaves = jax.tree.leaves(state.parameters)
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
