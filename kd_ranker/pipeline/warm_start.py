"""Start from a run that was trained before: `train.warm_start`."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd_ranker.errors import UserError
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline.job import TrainingJob
from kd_ranker.pipeline.remote import place_of
from kd_ranker.pipeline.trained import open_ranker
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import States


def warm_start(job: TrainingJob, folder: Path, states: States) -> States:
    """Start initial states from the run `train.warm_start`, and record it in the run's `folder`.

    The dataset is that of the earlier run, or one that extends it (`data.extends`), so known ids
    keep their rows. The parameters are those of that run, with the slots of embedding rows. Rows of
    new ids are as initialized. The step, the schedule and the optimizer of dense parameters start
    from zero. A run that is missing, unfinished, or of other ids or sizes, is a UserError.
    """
    trainees = job.trainees
    workdir = trainees.section.train.warm_start
    try:
        before = open_ranker(place_of(workdir), with_slots=True)
    except UserError as error:
        raise UserError(f"train.warm_start={workdir}: {error}") from error
    if before.role != trainees.role:
        raise UserError(
            f"train.warm_start={workdir} is of a {before.role}, not of a {trainees.role}; name the "
            f"workdir of a {trainees.role}"
        )
    dataset = trainees.dataset
    earlier = before.dataset.provenance["dataset"]
    if earlier not in (*dataset.earlier, dataset.provenance["dataset"]):
        raise UserError(
            f"train.warm_start={workdir} was trained on {earlier}, and its ids are not those of "
            f"{dataset.directory}; name a run on that dataset, or on one that it extends"
        )
    start = jax.tree.map(np.asarray, before.ranker.parameters)
    started = []
    for stack, state in zip(trainees.stacks, states, strict=True):
        try:
            parameters = _grown(before.model, start, stack, state.parameters)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"train.warm_start={workdir} has other model sizes, or rows of another optimizer, "
                "than the config; keep the model's keys, distill.mode and optimizer.table_name of "
                "that run"
            ) from error
        started.append(dataclasses.replace(state, parameters=parameters))
    workdirs.write_start(folder, workdir, before.version, before.needs_scores)
    return tuple(started)


def _grown(model: Model, start: Parameters, stack: Stack, fresh: Parameters) -> Parameters:
    """The parameters of a stack's runs, the same for each except in rows of new ids.

    `start` are those of one run of `model`, and `fresh` the stack's as initialized. A KeyError or
    ValueError if they are of other sizes.
    """
    tables_before = model.embedding.tables
    tables = stack.train_spec.model.embedding.tables
    dense = jax.tree.map(_for_each_run, start.dense, fresh.dense)
    grown: dict[str, Any] = {}
    for name in {**tables_before, **tables}:
        before = tables_before[name]
        rows = start.tables[name]
        table = np.array(fresh.tables[name])
        can_grow = before.size < tables[name].size and not (before.hashed or tables[name].hashed)
        if rows.shape[-1] != table.shape[-1] or not (before == tables[name] or can_grow):
            raise ValueError(f"a table {name} of another size")
        table[:, : before.size] = rows[: before.size]
        table[:, tables[name].size] = rows[before.size]  # that of ids without a row
        grown[name] = table
    return Parameters(dense, grown)


def _for_each_run(array: np.ndarray, stacked: np.ndarray) -> np.ndarray:
    """Repeat an array of one run for each run of a stack."""
    if array.shape != stacked.shape[1:]:
        raise ValueError(f"an array of shape {array.shape}")
    return np.broadcast_to(array, stacked.shape)
