"""Training runs: start, devices, batches and evaluations of a teacher, a student or a cohort."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.config import checks, schema
from kd_ranker.embedding.lookup import TableSpec
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.job import Job, open_finished, open_job
from kd_ranker.pipeline.measure import measure, write_measured
from kd_ranker.pipeline.remote import Place, owned, place_of
from kd_ranker.sweep import Members, check_memory, exhaustion_reported
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import Begin, Run, make_run, scalar_name
from kd_ranker.training.loop import fit as fit_run
from kd_ranker.training.mapping import (
    MAPPINGS,
    DeviceMap,
    first_devices,
    members_axis,
    own_devices,
)
from kd_ranker.training.processes import check_same, is_first
from kd_ranker.training.recipes import TEACHER_STAGES, Group
from kd_ranker.training.state import Frozen, LiveTeacher, States

# Choices are made on the first; the second is read for the report.
_SPLITS = ("validation", "test")


def train(command: str, config: ConfigDict, members: Members, place: Place) -> None:
    """Train one student, or without members the teacher, and measure it; see `api.train`.

    The results of a teacher hold the references as well: they show how much a final ranker leaves
    to gain, next to the oracle if known.
    """
    job = open_job(config, members, unchanged=True)
    with owned(place) as folder:
        if members:
            checks.check_teacher_signals(job.dataset, members.values())
        else:
            checks.check_teacher_log(config, job.dataset)
        checks.check_labels(job.dataset)
        free = schema.without_influence("student" if members else "teacher")
        workdirs.check(folder, command, config, job.dataset.identity, without=free)
        workdirs.write_config(folder, command, config, job.dataset.identity)
        if members:
            datasets.keep_data_report(job.built, folder)
        with progress_bar(folder.name, job.trainee.train.steps) as bar:
            states = fit(job, folder, bar)
        measured = (measure(job, of, states, with_references=not members) for of in _SPLITS)
        write_measured(job, folder, job.made_of, *measured)


def progress_bar(name: str, steps: int) -> tqdm:
    """The progress bar of a run, hidden where the output is not a terminal."""
    hidden = None if is_first() else True
    return tqdm(total=steps, desc=name, unit="step", disable=hidden, dynamic_ncols=True)


def fit(job: Job, workdir: Path, bar: tqdm) -> States:
    """Train the rankers of a job in one program on the same batches; return their states.

    `workdir` gets checkpoints and metrics, and `bar` counts the steps of the ranker that takes the
    most. Memory that a device lacks becomes one line.
    """
    train = job.trainee.train

    def progress(states: States) -> dict[str, float]:
        limit = train.eval_limit
        measured = measure(job, "validation", states, limit=limit, costs=False)
        serves = {name: of.distill.serve for name, of in job.members.items()}
        return {
            scalar_name(f"eval/{column}", name if job.members else ""): value
            for row in measured.rows
            for name in [str(row["member"])]
            if (serves or {results.TEACHER: "user"}).get(name) == row["serve"]
            for column, value in row.items()
            if isinstance(value, float) and np.isfinite(value) and metric_of(column)
        }

    with exhaustion_reported():
        check_same("dataset", str(job.dataset.identity))
        check_memory(job.config, job.groups, job.trainee.batch, job.dataset.spec)
        made_of, begin = job.made_of, warm_start(job)
        return fit_run(prepare_run(job), train, workdir, made_of, progress, bar, begin)


def prepare_run(
    job: Job, devices: Sequence[jax.Device] | None = None, batches_on: DeviceMap | None = None
) -> Run:
    """The run of a job: its groups on their batches, spread over devices.

    The items of its dataset and the parameters of its teacher may be only shapes. Without
    `devices` they are the first `parallel.devices`, which by default make the batches too.
    """
    config, dataset, groups, batch = job.config, job.dataset, job.groups, job.trainee.batch
    parallel = config.parallel
    devices = first_devices(parallel.devices) if devices is None else devices
    mapping = _device_map(job, devices)
    # Students that learn nothing from a teacher do not pay for one.
    live = job.live_teacher if "logged" in recipes.signals_of(groups) else None
    stage = TEACHER_STAGES[config.teacher.stage]
    teacher = LiveTeacher(live.model, stage) if live else None
    frozen = Frozen(items=dataset.items, teacher=live.parameters if live else None)
    batches_on = batches_on or mapping
    batches = training_batches(
        dataset,
        BatchConfig(**batch),
        recipes.needs(groups, teacher, stage),
        batches_on,
        # CPU devices hold their data in the memory of the host.
        copies=1 + sum(device.platform == "cpu" for device in own_devices(parallel.devices)),
    )
    return make_run(groups, teacher, batches, frozen, mapping)


def _device_map(job: Job, devices: Sequence[jax.Device]) -> DeviceMap:
    """The mapping of `config.parallel` over devices for the groups of a job."""
    parallel, sizes = job.config.parallel, [len(group.names) for group in job.groups]
    sharded = parallel.tables == "sharded"
    # Spreading members would leave fewer devices to share the rows of tables.
    if parallel.mapping == "pmap" or (sharded and not parallel.members):
        members = 1
    elif parallel.members and sum(sizes) > 1:
        members = parallel.members
    else:
        members = members_axis(len(devices), sizes, job.trainee.batch.requests)
    return MAPPINGS[parallel.mapping](devices, members, parallel.deterministic, sharded)


def warm_start(job: Job) -> Begin | None:
    """Return a function that starts initial states from `train.warm_start`; None if that is "".

    The dataset is that of the earlier run, or one that extends it (`data.extends`), so known ids
    keep their rows. The parameters are those of that run, with the slots of embedding rows. Rows of
    new ids are as initialized. The step, the schedule and the optimizer of dense parameters start
    from zero. A run that is missing, unfinished, or of other ids or sizes, is a UserError.
    """

    def begin(states: States) -> States:
        model, start = _model_to_start_from(job)
        return tuple(
            dataclasses.replace(
                state, parameters=_grown(job, model, start, group, state.parameters)
            )
            for group, state in zip(job.groups, states, strict=True)
        )

    return begin if job.trainee.train.warm_start else None


def _model_to_start_from(job: Job) -> tuple[Model, Parameters]:
    """Return the model to start from, and its parameters on the host."""
    workdir = job.trainee.train.warm_start
    try:
        ranker = open_finished(place_of(workdir), with_slots=True)
    except UserError as error:
        raise UserError(f"train.warm_start={workdir}: {error}") from error
    role = "student" if job.members else "teacher"
    if ranker.role != role:
        raise UserError(f"train.warm_start={workdir} is of a {ranker.role}, not of a {role}")
    dataset, before = job.built, ranker.dataset.identity["dataset"]
    if before not in (*dataset.earlier, dataset.identity["dataset"]):
        raise UserError(
            f"train.warm_start={workdir} was trained on {before}, and its ids are not those of "
            f"{dataset.directory}; name a run on that dataset, or on one that it extends"
        )
    return ranker.model, jax.tree.map(np.asarray, ranker.parameters)


def _grown(
    job: Job, model: Model, start: Parameters, group: Group, fresh: Parameters
) -> Parameters:
    """The parameters of a group's members, the same for each except in rows of new ids."""
    old, new = model.embedding.tables, group.recipe.model.embedding.tables

    def sizes(of: Parameters, tables: Mapping[str, TableSpec], members: int) -> tuple:
        leaves, structure = jax.tree.flatten(of.dense)
        # Only a table that is not hashed may grow.
        by_table = {
            name: (of.tables[name].shape[-1], table.hashed and table.size)
            for name, table in tables.items()
        }
        return structure, [leaf.shape[members:] for leaf in leaves], by_table

    grows = all(old[name].size <= of.size for name, of in new.items() if name in old)
    if not grows or sizes(start, old, 0) != sizes(fresh, new, 1):
        raise UserError(
            f"train.warm_start={job.trainee.train.warm_start} has a model of other sizes, or rows "
            "of another optimizer, than the config; keep the keys of the model, distill.mode and "
            "optimizer.table_name of that run"
        )
    tables: dict[str, Any] = {}
    for name, rows in start.tables.items():
        table = np.array(fresh.tables[name])
        known = old[name].size
        table[:, :known] = rows[:known]
        table[:, new[name].size] = rows[known]  # that of ids without a row
        tables[name] = table
    dense = jax.tree.map(lambda of, like: np.broadcast_to(of, like.shape), start.dense, fresh.dense)
    return Parameters(dense, tables)
