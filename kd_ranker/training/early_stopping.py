"""Early stopping: a run stops when no evaluation has been better than its best for some steps.

Its state at its best evaluation is its result, whether it stopped early or took all its steps. All
runs follow this one rule, by the same criterion on the same validation requests.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.training.active_runs import runs_replaced, select_runs
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import States


class Best(NamedTuple):
    """The best evaluation of a run."""

    step: int
    criterion: float  # smaller is better


class BestStates:
    """The best evaluation of each run, with its state on the host."""

    def __init__(self, stacks: Sequence[Stack], patience: int):
        """Start without any evaluation.

        Args:
          stacks: those of all runs.
          patience: the steps since its best evaluation after which a run stops.
        """
        self._stacks = stacks
        self._patience = patience
        self._best: dict[str, Best] = {}  # by the name of a run
        # Of all runs, on the host; up to date for those in `_best`.
        self._states: States = ()

    def update(self, step: int, criteria: Mapping[str, float], states: States) -> None:
        """Keep the states of runs that are better than before.

        Args:
          step: the step of an evaluation.
          criteria: of the runs that still train, by name; those without one keep their best.
          states: of all runs, on the host.
        """
        better = {
            name: Best(step, criterion)
            for name, criterion in criteria.items()
            if name not in self._best or criterion < self._best[name].criterion
        }
        # A copy, as the next step may reuse the memory of the states.
        kept = self._states or jax.tree.map(np.array, states)
        self._states = self._replace(kept, [*better], states)
        self._best |= better

    def stopped(self, step: int) -> set[str]:
        """Return the runs that have stopped by a step."""
        return {name for name, best in self._best.items() if step - best.step >= self._patience}

    def results(self, states: States) -> States:
        """Return the states of all runs after the training: the best one of each.

        `stopped_after` has its step. A run that diverged keeps its state in `states`, and so does
        one that was never evaluated.

        Args:
          states: the last ones of all runs, on the host.
        """
        marked = []
        for stack, state in zip(self._stacks, self._states or states, strict=True):
            steps = [self._best[name].step if name in self._best else 0 for name in stack.names]
            marked.append(dataclasses.replace(state, stopped_after=jnp.asarray(steps)))
        kept = [
            name
            for stack, state in zip(self._stacks, states, strict=True)
            for name, diverged_at in zip(stack.names, state.non_finite_step, strict=True)
            if name in self._best and not diverged_at
        ]
        return self._replace(states, kept, tuple(marked))

    def saved(self) -> tuple[States, dict[str, Any]] | None:
        """Return what a checkpoint needs to continue: states, and a record for JSON.

        None before the first evaluation.
        """
        if not self._states:
            return None
        return self._states, {name: [*best] for name, best in self._best.items()}

    def restore(self, states: States, record: Mapping[str, Any]) -> None:
        """Continue from what `saved` returned."""
        self._states = jax.tree.map(np.asarray, states)
        self._best = {name: Best(*best) for name, best in record.items()}

    def _replace(self, states: States, names: Sequence[str], by: States) -> States:
        """Return states with those of some runs taken from others."""
        replaced = []
        for stack, state, other in zip(self._stacks, states, by, strict=True):
            indices = np.flatnonzero(np.isin(stack.names, names))
            if len(indices):
                fields = runs_replaced(state, indices, select_runs(other, indices))
                state = dataclasses.replace(state, **fields)
            replaced.append(state)
        return tuple(replaced)
