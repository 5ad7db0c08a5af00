"""The runs of a cohort that still train: those that halving stopped are left behind."""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kd_ranker.training.program import Program, of_runs, states_on_host
from kd_ranker.training.state import RUNS_FIRST, States, TrainState


class ActiveRuns:
    """The runs that still train, and the states of all.

    Attributes:
      program: that of the runs that still train, on the same batches.
      states: their states on the devices.
    """

    def __init__(self, whole: Program, states: States):
        """Start with all runs of a program and their states on the devices."""
        self.program = whole
        self.states = states
        self._whole = whole
        # Per stack, the places of the active runs among all.
        self._indices = [np.arange(len(stack.names)) for stack in whole.stacks]
        self._all: States | None = None  # on the host; those of stopped runs are up to date

    @classmethod
    def resumed(cls, whole: Program, on_host: States) -> "ActiveRuns":
        """Continue from the states of all runs on the host, without those that were stopped."""
        if not any(np.any(state.stopped_after) for state in on_host):
            return cls(whole, whole.devices.place(on_host))
        active = cls(whole, ())
        active._leave_stopped(on_host)
        return active

    @property
    def names(self) -> set[str]:
        """The names of the active runs."""
        return {name for stack in self.program.stacks for name in stack.names}

    def on_host(self) -> States:
        """Copy the states of all runs to the host."""
        active = states_on_host(self.program, self.states)
        if self._all is None:
            return active
        remaining = iter(active)
        return tuple(
            _with_runs(state, next(remaining), indices) if len(indices) else state
            for state, indices in zip(self._all, self._indices, strict=True)
        )

    def stop(self, names: Collection[str], step: int) -> None:
        """Stop some of the runs after a step; the others go on in a program of their own."""
        stopped = []
        for state, stack in zip(self.on_host(), self._whole.stacks, strict=True):
            stops = np.isin(stack.names, [*names])
            stopped_after = jnp.where(stops, step, state.stopped_after)
            stopped.append(dataclasses.replace(state, stopped_after=stopped_after))
        self._leave_stopped(tuple(stopped))

    def _leave_stopped(self, on_host: States) -> None:
        self._all = on_host
        self._indices = [np.flatnonzero(np.asarray(state.stopped_after) == 0) for state in on_host]
        self.program = of_runs(self._whole, self._indices)
        self.states = self.program.devices.place(_of_runs(on_host, self._indices))


def _of_runs(states: States, indices: Sequence[Int[np.ndarray, "n"]]) -> States:
    """Return the states of some runs of each stack, without stacks that have none."""
    return tuple(
        dataclasses.replace(state, **_fields_of_runs(state, chosen))
        for state, chosen in zip(states, indices, strict=True)
        if len(chosen)
    )


def _fields_of_runs(state: TrainState, indices: Int[np.ndarray, "n"]) -> dict:
    return {
        name: jax.tree.map(lambda leaf: np.asarray(leaf)[indices], getattr(state, name))
        for name in RUNS_FIRST
    }


def _with_runs(state: TrainState, of_runs: TrainState, indices: Int[np.ndarray, "n"]) -> TrainState:
    """Return a state with some of its runs replaced, and what runs share."""

    def replaced(leaf: np.ndarray, of_runs: np.ndarray) -> np.ndarray:
        leaf = np.array(leaf)
        leaf[indices] = of_runs
        return leaf

    fields = {
        name: jax.tree.map(replaced, getattr(state, name), getattr(of_runs, name))
        for name in RUNS_FIRST
    }
    return dataclasses.replace(of_runs, **fields)
