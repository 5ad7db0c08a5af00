"""Train rankers in one program, and measure them: the commands `train` and `train_teacher`."""

import contextlib
import functools
import io
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.cohorts.memory import check_memory, exhaustion_reported
from kd_ranker.config import checks, schema
from kd_ranker.config.runs import Runs
from kd_ranker.evaluation import results
from kd_ranker.evaluation.halving import runs_behind
from kd_ranker.evaluation.metrics.registry import metric_of
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.results import Row
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.job import TrainingJob, open_job
from kd_ranker.pipeline.measure import measure, write_measured
from kd_ranker.pipeline.remote import Place, owned
from kd_ranker.pipeline.tracked import track_results, tracked
from kd_ranker.pipeline.trained import served_head
from kd_ranker.pipeline.warm_start import warm_start
from kd_ranker.progress import Bar, Progress
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.training import specs
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import Evaluated, scalar_name
from kd_ranker.training.loop import fit as fit_program
from kd_ranker.training.mapping import DeviceMap, own_devices
from kd_ranker.training.processes import check_same, is_first, on_first
from kd_ranker.training.program import Program, make_program
from kd_ranker.training.specs import TEACHER_STAGES
from kd_ranker.training.state import Constants, LiveTeacher, States

# Choices are made on the first; the second is read for the report.
_SPLITS = ("validation", "test")


def train(command: str, config: ConfigDict, runs: Runs, place: Place, progress: Progress) -> None:
    """Train one student, or without runs the teacher, and measure it; see `api.train`.

    The results of a teacher hold the references as well: they show how much a final ranker leaves
    to gain, next to the oracle if known.
    """
    job = open_job(config, runs, unchanged=True, progress=progress)
    with owned(place) as folder:
        checks.check_labels(job.dataset)
        steps = check_job(job)
        free = schema.without_influence(job.trainees.role)
        workdirs.check(folder, command, config, job.dataset.provenance, without=free)
        workdirs.write_config(folder, command, config, job.dataset.provenance)
        if runs:
            datasets.keep_data_report(job.trainees.dataset, folder)
        with tracked(command, config, place, folder) as tracker:
            with training_bar(job.progress, steps) as bar:
                states = fit(job, folder, bar, tracker)
            with_scores = bool(runs) and workdirs.started_with_scores(folder, config)
            measured = [
                measure(
                    job,
                    split,
                    states,
                    with_references=not runs,
                    started_with_scores=with_scores,
                )
                for split in _SPLITS
            ]
            write_measured(job, folder, job.provenance, *measured)
            track_results(tracker, folder, job.trainees.role)


def check_job(job: TrainingJob) -> int:
    """Check the memory and the signals that a job needs; return the number of its steps."""
    trainees = job.trainees
    section = trainees.section
    if job.runs:
        checks.check_teacher_signals(job.dataset, job.runs.values())
    else:
        checks.check_teacher_log(job.config, job.dataset)
    check_memory(trainees.stacks, section.batch, job.dataset.spec, trainees.device_map)
    return section.train.steps


def training_bar(progress: Progress, steps: int) -> contextlib.AbstractContextManager[Bar]:
    """The bar of the steps of a run."""
    return progress.bar("training", steps, "step", hidden=not is_first())


def fit(job: TrainingJob, workdir: Path, bar: Bar, tracker: Tracker) -> States:
    """Train the rankers of a job in one program on the same batches; return their states.

    `workdir` gets checkpoints and metrics, `tracker` the metrics, and `bar` counts the steps of the
    ranker that takes the most. Memory that a device lacks becomes one line.
    """
    trainees = job.trainees
    train = trainees.section.train
    with exhaustion_reported(), job.progress.phase("training"):
        check_same("dataset", str(job.dataset.provenance))
        # Again for each cohort: free memory may differ from that at the start.
        check_memory(trainees.stacks, trainees.section.batch, job.dataset.spec, trainees.device_map)
        return fit_program(
            prepare_program(job),
            train,
            workdir,
            job.provenance,
            functools.partial(_evaluate, job),
            bar,
            tracker,
            functools.partial(warm_start, job, workdir) if train.warm_start else None,
            job.config.sweep.halving if job.runs else (),
        )


def _evaluate(job: TrainingJob, states: States, runs: Collection[str]) -> Evaluated:
    """Measure the rankers that still train on the first validation requests.

    Each student is measured by its head, and those that diverged have no scalars.
    """
    serves = {name: [served_head(config)] for name, config in job.runs.items() if name in runs}
    measured = {*serves} or {results.TEACHER}
    limit = job.trainees.section.train.eval_limit
    rows = [
        row
        for row in measure(job, "validation", states, serves=serves or None, limit=limit).rows
        if str(row["run"]) in measured  # not the teacher of students
    ]
    scalars = {}
    criteria = {}
    for row in rows:
        run = str(row["run"]) if job.runs else ""
        for column, value in row.items():
            if isinstance(value, float) and np.isfinite(value) and metric_of(column):
                scalars[scalar_name(f"eval/{column}", run)] = value
        criteria[run] = _criterion(job, row)
    # One process decides for all: their numbers may differ in the last digit.
    return on_first(
        lambda: Evaluated(
            scalars,
            {run: value for run, value in criteria.items() if np.isfinite(value)},
            _behind(job, rows),
        )
    )


def _criterion(job: TrainingJob, row: Row) -> float:
    """Return what early stopping compares: `CRITERION` of students, or a teacher's user loss."""
    columns = [CRITERION] if job.runs else [f"user_bce/{task}" for task in job.config.tasks]
    return float(np.mean([row.get(column, np.nan) for column in columns]))


def _behind(job: TrainingJob, rows: Sequence[Row]) -> set[str]:
    """Return the runs that halving would stop."""
    if not job.runs or not job.config.sweep.halving:
        return set()
    table = results.to_csv(rows, results.columns(job.config.tasks, job.report_at))
    return runs_behind(results.read_csv(io.StringIO(table)))


def prepare_program(job: TrainingJob, batches_on: DeviceMap | None = None) -> Program:
    """Build the program of a job: its stacks on their batches, spread over its devices.

    The items of its dataset and the parameters of its teacher may be only shapes. By default the
    devices make the batches too.
    """
    trainees = job.trainees
    stacks = trainees.stacks
    batches_on = batches_on or trainees.device_map
    # Students that learn nothing from a teacher do not pay for one.
    live = job.live_teacher if specs.learn_from_scores(stacks) else None
    stage = TEACHER_STAGES[job.config.teacher.stage]
    teacher = LiveTeacher(live.model, stage) if live else None
    constants = Constants(items=job.dataset.items, teacher=live.ranker.parameters if live else None)
    batches = training_batches(
        job.dataset,
        BatchConfig(**trainees.section.batch),
        specs.needs(stacks, teacher, stage),
        batches_on,
        # CPU devices hold their data in the memory of the host.
        copies=1 + _num_on_cpu(batches_on),
        # What samplers see. A live teacher's scores are not logged, so its stage hides none.
        scores_stage=stage if job.config.teacher.source == "logged" else Stage.RETRIEVED,
    )
    return make_program(stacks, teacher, batches, constants, trainees.device_map)


def _num_on_cpu(device_map: DeviceMap) -> int:
    """The number of this process' devices that are CPUs."""
    devices = own_devices(device_map.mesh.devices.flat)
    return sum(device.platform == "cpu" for device in devices)
