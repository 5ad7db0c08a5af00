"""Steps in which runs stopped being finite, kept in `nan/step_<N>/` of a workdir to take again.

batch.npz       the batch of all devices, by the fields of `CandidateBatch`, with the scores of
                a live teacher
run_<i>.npz     of each run, before the step: dense parameters, transform, state of the
                optimizer, and the rows that the batch looks up
findings.json   by run: its file, what was first not finite, and the remedy

A run whose parameters stopped being finite by the update itself has those from after the step.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_ranker.batch import WHOLE, CandidateBatch, Items
from kd_ranker.batches.cutting import unpack
from kd_ranker.embedding.lookup import Rows, row_numbers
from kd_ranker.errors import UserError
from kd_ranker.training.non_finite import (
    Finding,
    Learned,
    StepInputs,
    compute_step,
    first_non_finite,
    quantities_of,
)
from kd_ranker.training.program import Program, states_on_host
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import States, TrainState, select_run
from kd_ranker.training.step import with_live_teacher, with_targets
from kd_ranker.training.workdir import read_json, write_atomically

FOLDER = "nan"
_BATCH = "batch.npz"
_FINDINGS = "findings.json"


def folder_of(workdir: Path, step: int) -> Path:
    """Return the folder of a step that was kept in a workdir."""
    return workdir / FOLDER / f"step_{step}"


def keep(
    program: Program, states: States, workdir: Path, diverged: Mapping[str, int]
) -> dict[str, Finding]:
    """Keep the steps in which some runs stopped being finite; return what was first not finite.

    Args:
      program: the program that trains the runs.
      states: those of all its runs on the devices; a diverged run has that from before its step.
      workdir: gets the folders; those of several processes that train as one are the same.
      diverged: the step at which a run diverged, by its name.
    """
    on_host = jax.tree.map(np.asarray, states_on_host(program, states))
    constants = program.devices.unreplicate(program.constants)
    items = constants.items.replace(row_sharding=WHOLE)
    constants = constants.replace(items=items)
    # One program for all runs of a stack.
    compute = [
        jax.jit(functools.partial(compute_step, stack.train_spec)) for stack in program.stacks
    ]
    findings: dict[str, Finding] = {}
    for step in sorted(set(diverged.values())):
        batch = with_live_teacher(program.teacher, _batch_of_step(program, step), constants)
        batch = jax.device_get(batch)
        folder = folder_of(workdir, step)
        write_atomically(folder / _BATCH, _npz(vars(batch)))
        # A run that resumes meets those that diverged before.
        kept = findings_in(workdir, step) if (folder / _FINDINGS).exists() else {}
        for run in [name for name in diverged if diverged[name] == step]:
            if run not in kept:
                number, index = _find(program, run)
                stack = program.stacks[number]
                state = on_host[number]
                hyperparameters = select_run(stack.hyperparameters, index)
                learned = _learned(stack, state, index, batch, items)
                inputs = StepInputs(step, batch, learned)
                computed = jax.device_get(compute[number](hyperparameters, inputs, items))
                quantities = quantities_of(
                    stack.train_spec, hyperparameters, inputs, items, computed
                )
                found = first_non_finite(quantities, stack.tasks) or _bad_row(state, index)
                file = f"run_{len(kept)}.npz"
                write_atomically(folder / file, _npz(_by_name(learned)))
                kept[run] = {"file": file, "first": found.quantity, "remedy": found.remedy}
                write_atomically(folder / _FINDINGS, json.dumps(kept, indent=2))
            findings[run] = Finding(kept[run]["first"], kept[run]["remedy"])
    return findings


def _batch_of_step(program: Program, step: int) -> CandidateBatch:
    """Make the batch of a step once more, on the host; the loader ends where it was."""
    position = program.batches.get_state()
    program.batches.set_state({"taken": step - 1})
    packed, span = program.batches.take(1)
    program.batches.set_state(position)
    rows = program.devices.whole_batch(packed.rows[..., span.start, None, :])
    return unpack(dataclasses.replace(packed, rows=rows), 0)


def _find(program: Program, run: str) -> tuple[int, int]:
    """Return the number of the stack of a run, and the run's index in it."""
    for number, stack in enumerate(program.stacks):
        if run in stack.names:
            return number, stack.names.index(run)
    raise KeyError(run)


def _learned(
    stack: Stack, state: TrainState, index: int, batch: CandidateBatch, items: Items
) -> Learned:
    """Return what a run of a stack has learned, as far as a step on the batch reads it."""
    seen, _ = with_targets(stack.train_spec, stack.hyperparameters.terms, batch)
    embedding = stack.train_spec.model.embedding
    rows: Rows = {}
    for name, lookup in embedding.lookups.items():
        numbers = np.asarray(row_numbers(embedding, lookup, seen, items))
        rows[name] = state.parameters.tables[lookup.table][index][numbers, : embedding.width]
    return Learned(
        dense=select_run(state.parameters.dense, index),
        transform=select_run(state.transform, index),
        optimizer_state=select_run(state.optimizer_state, index),
        rows=rows,
    )


def _bad_row(state: TrainState, index: int) -> Finding:
    """Name a row that an update left not finite, and that no later step has looked up."""
    for name, table in state.parameters.tables.items():
        rows = np.flatnonzero(~np.isfinite(table[index]).all(axis=1))
        if len(rows):
            return Finding(f"row {rows[0]} of the table {name} after the update")
    return Finding("")


def _by_name(learned: Learned) -> dict[str, Any]:
    """Return the arrays by their names in the file of a run."""
    return {_name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(learned)}


def _name_of(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def steps_in(workdir: Path) -> list[int]:
    """Return the steps that a workdir keeps, in their order."""
    folders = (workdir / FOLDER).glob(f"step_*/{_FINDINGS}")
    return sorted(int(path.parent.name.removeprefix("step_")) for path in folders)


def findings_in(workdir: Path, step: int) -> dict[str, dict[str, str]]:
    """Return `findings.json` of a kept step."""
    return read_json(folder_of(workdir, step) / _FINDINGS, "train the run again")


def read(workdir: Path, step: int, run: str, stack: Stack) -> StepInputs:
    """Return what a run computed a step from.

    Args:
      workdir: the folder of the run, or of its cohort in a sweep.
      step: one of `steps_in`.
      run: its name in the stack.
      stack: that of the run.

    Raises:
      UserError: a file is damaged, or is of another model.
    """
    folder = folder_of(workdir, step)
    file = findings_in(workdir, step)[run]["file"]
    state = jax.eval_shape(stack.init)
    # Only the structure counts.
    rows: Any = dict.fromkeys(stack.train_spec.model.embedding.lookups, 0)
    learned = Learned(
        dense=state.parameters.dense,
        transform=state.transform,
        optimizer_state=state.optimizer_state,
        rows=rows,
    )
    paths, tree = jax.tree_util.tree_flatten_with_path(learned)
    try:
        with np.load(folder / _BATCH) as arrays:
            batch = CandidateBatch(**arrays)
        with np.load(folder / file) as arrays:
            learned = jax.tree.unflatten(tree, [arrays[_name_of(path)] for path, _ in paths])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged: {error}; train the run again") from error
    return StepInputs(step, batch, learned)
