"""Training runs: devices, batches and evaluations of a teacher, a student or a cohort."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.config import checks, schema
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.job import Job, Members, Opened
from kd_ranker.pipeline.measure import measure, train_statistics, write_measured
from kd_ranker.pipeline.remote import Place, owned
from kd_ranker.pipeline.warm import warm_start
from kd_ranker.sweep.memory import check_memory, exhaustion_reported
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import Run, make_run, scalar_name
from kd_ranker.training.loop import fit as fit_run
from kd_ranker.training.mapping import (
    MAPPINGS,
    DeviceMap,
    first_devices,
    members_axis,
    own_devices,
)
from kd_ranker.training.processes import check_same, is_first
from kd_ranker.training.recipes import TEACHER_STAGES
from kd_ranker.training.state import Frozen, LiveTeacher, States

# Choices are made on the first; the second is read for the report.
_MEASURED_SPLITS = ("validation", "test")


def train(command: str, config: ConfigDict, members: Members, place: Place) -> None:
    """Train one student, or without members the teacher, and measure it; see `api.train`.

    The results of a teacher hold the references as well: they show how much a final ranker leaves
    to gain, next to the oracle if known.
    """
    job = Opened(config, unchanged=True).job(members)
    with owned(place) as folder:
        if members:
            checks.check_teacher_signals(job.dataset, members.values())
        else:
            checks.check_teacher_log(config, job.dataset)
        checks.check_labels(job.dataset)
        free = schema.without_influence("student" if members else "teacher")
        workdirs.claim(folder, command, config, job.dataset.identity, without=free)
        if members:
            datasets.keep_data_report(job.opened.dataset, folder)
        with progress_bar(folder.name, job.trainee.train.steps) as bar:
            states = fit(job, folder, bar)
        statistics = None if members else train_statistics(job)
        measured = (measure(job, of, states, statistics=statistics) for of in _MEASURED_SPLITS)
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

    Args:
      job: the job; its dataset may have only the shapes of items, and its teacher only those of
        parameters.
      devices: the devices; None takes the first `parallel.devices`.
      batches_on: the devices that make the batches; None takes the same.
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
