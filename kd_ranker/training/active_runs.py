"""The runs of a cohort that still train: those that were stopped are left behind."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kd_ranker.training.program import Program, program_of_runs, states_on_host
from kd_ranker.training.state import RUNS_FIRST, States, TrainState


class ActiveRuns:
    """The runs that still train, and the states of all runs.

    Attributes:
      program: the program that trains the active runs.
      states: their states on the devices, for the stacks of `program`.
    """

    def __init__(self, whole: Program, states: States):
        """Start with all runs of a program and their states on the devices."""
        self.program = whole
        self.states = states
        self._whole = whole
        # Per stack of the whole program, the indices of the active runs.
        self._indices = [np.arange(len(stack.names)) for stack in whole.stacks]
        # The states of all runs on the host, once some have stopped. Only those of stopped runs
        # are up to date.
        self._all_states: States | None = None

    @classmethod
    def resumed(cls, whole: Program, on_host: States) -> "ActiveRuns":
        """Continue from the states of all runs on the host, without those that were stopped."""
        if not any(np.any(state.stopped_after) for state in on_host):
            return cls(whole, whole.devices.place(on_host))
        active = cls(whole, ())
        active._continue_without_stopped(on_host)
        return active

    @property
    def names(self) -> set[str]:
        """The names of the active runs."""
        return {name for stack in self.program.stacks for name in stack.names}

    def on_host(self) -> States:
        """Copy the states of all runs to the host."""
        active_states = states_on_host(self.program, self.states)
        if self._all_states is None:
            return active_states
        merged = []
        unused = list(active_states)  # a stack without active runs has none
        for state, indices in zip(self._all_states, self._indices, strict=True):
            if len(indices):
                newer = unused.pop(0)
                # What runs share is up to date in the newer one.
                state = dataclasses.replace(newer, **runs_replaced(state, indices, newer))
            merged.append(state)
        return tuple(merged)

    def stop(self, names: Collection[str], step: int) -> None:
        """Stop some of the runs after a step; the others go on in a program of their own."""
        stopped = []
        for state, stack in zip(self.on_host(), self._whole.stacks, strict=True):
            stops = np.isin(stack.names, [*names])
            stopped_after = jnp.where(stops, step, state.stopped_after)
            stopped.append(dataclasses.replace(state, stopped_after=stopped_after))
        self._continue_without_stopped(tuple(stopped))

    def _continue_without_stopped(self, on_host: States) -> None:
        self._all_states = on_host
        self._indices = [np.flatnonzero(np.asarray(state.stopped_after) == 0) for state in on_host]
        self.program = program_of_runs(self._whole, self._indices)
        active_states = tuple(
            select_runs(state, indices)
            for state, indices in zip(on_host, self._indices, strict=True)
            if len(indices)
        )
        self.states = self.program.devices.place(active_states)


def select_runs(state: TrainState, indices: Int[np.ndarray, "n"]) -> TrainState:
    """Return the state of some runs of a stack."""

    def select(leaf: Any) -> np.ndarray:
        return np.asarray(leaf)[indices]

    selected = {name: jax.tree.map(select, getattr(state, name)) for name in RUNS_FIRST}
    return dataclasses.replace(state, **selected)


def runs_replaced(
    state: TrainState, indices: Int[np.ndarray, "n"], of_runs: TrainState
) -> dict[str, Any]:
    """Return the fields of a stack's state with some runs taken from a state of only these runs.

    The fields that all runs share are left out.
    """

    def replace(leaf: Any, replacement: Any) -> np.ndarray:
        leaf = np.array(leaf)
        leaf[indices] = replacement
        return leaf

    return {
        name: jax.tree.map(replace, getattr(state, name), getattr(of_runs, name))
        for name in RUNS_FIRST
    }
