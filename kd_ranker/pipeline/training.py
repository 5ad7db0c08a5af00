"""Training runs: a teacher, a student, or the cohorts of a sweep, here or on a cluster."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.cohorts.memory import check_memory, cohort_size, exhaustion_reported
from kd_ranker.cohorts.plan import TEST, Sweep, open_sweep, read_plan
from kd_ranker.config import checks, schema
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.config.runs import Runs, common
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results, saving, setting_names
from kd_ranker.evaluation.metrics.registry import metric_of
from kd_ranker.manifest import has_provenance as is_measured
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import cluster, datasets
from kd_ranker.pipeline.job import TrainingJob, is_run, load_teacher, open_job, open_ranker
from kd_ranker.pipeline.measure import measure, write_measured
from kd_ranker.pipeline.remote import Place, local_folder, owned, place_of
from kd_ranker.progress import Bar, Progress, Show
from kd_ranker.requests.lock import hold
from kd_ranker.rivals import registry
from kd_ranker.rivals.registry import Rival
from kd_ranker.training import specs
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import fit as fit_program
from kd_ranker.training.loop import scalar_name
from kd_ranker.training.mapping import DeviceMap, own_devices
from kd_ranker.training.processes import check_same, is_first, on_first
from kd_ranker.training.program import Program, make_program
from kd_ranker.training.specs import TEACHER_STAGES, Stack
from kd_ranker.training.state import Constants, LiveTeacher, States

# Choices are made on the first; the second is read for the report.
_SPLITS = ("validation", "test")
_Jobs = Sequence[tuple[TrainingJob, Path]]  # the job of each cohort, and its folder


def train(command: str, config: ConfigDict, runs: Runs, place: Place, progress: Progress) -> None:
    """Train one student, or without runs the teacher, and measure it; see `api.train`.

    The results of a teacher hold the references as well: they show how much a final ranker leaves
    to gain, next to the oracle if known.
    """
    job = open_job(config, runs, unchanged=True, progress=progress)
    with owned(place) as folder:
        checks.check_labels(job.dataset)
        steps = _check(job)
        free = schema.without_influence(job.role)
        workdirs.check(folder, command, config, job.dataset.provenance, without=free)
        workdirs.write_config(folder, command, config, job.dataset.provenance)
        if runs:
            datasets.keep_data_report(job.built, folder)
        with training_bar(job, steps) as bar:
            states = fit(job, folder, bar)
        with_scores = bool(runs) and workdirs.started_with_scores(folder, config)
        measured = (
            measure(
                job,
                split,
                states,
                with_references=not runs,
                started_with_scores=with_scores,
            )
            for split in _SPLITS
        )
        write_measured(job, folder, job.provenance, *measured)


def train_sweep(config: ConfigDict, workdir: Place, show: Show, progress: Progress) -> None:
    """Train the students of `config.sweep` cohort by cohort and join their results; or do one part.

    See `api.sweep`; the config is valid.
    """
    part = config.sweep.part
    if config.launcher == "ray" or part:
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
    if part.isdecimal():
        cohorts = train_part(config, Path(workdir), int(part), progress=progress)
        show(f"cohort {part} of {cohorts} is trained")
        return
    with owned(workdir) as folder:
        if not _train_all(config, folder, progress):
            show(f"the sweep in {workdir} is complete; there is nothing to do")
        if part == PLAN:
            cohorts = len(read_plan(folder))
            show(f"cohorts: {cohorts}")
            show(f"numbers: 0-{cohorts - 1}")


def train_part(
    config: ConfigDict,
    workdir: Path,
    number: int,
    held: bool = False,
    progress: Progress | None = None,
) -> int:
    """Train and measure one cohort of a planned sweep; return the number of cohorts.

    Only the folder of the cohort is held. On a cluster the sweep's own process has `held` it.
    """
    sweep, job = _open(config, workdir, progress, unchanged=not held)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number}, and the sweep in {workdir} has {len(sweep.plan)} cohorts, "
            f"numbered from 0 to {len(sweep.plan) - 1}"
        )
    job, folder = job.of(sweep.cohorts[number]), sweep.folders[number]
    holding = contextlib.nullcontext() if held else owned(folder)
    with holding, training_bar(job, _check(job)) as bar:
        _train_cohort(job, folder, bar)
    return len(sweep.plan)


def _open(
    config: ConfigDict, workdir: Path, progress: Progress | None, unchanged: bool = True
) -> tuple[Sweep, TrainingJob]:
    """Open a sweep and its dataset; check that the workdir is free or holds the same sweep."""
    job = open_job(config, unchanged=unchanged, progress=progress)
    dataset, free = job.built.provenance, schema.without_influence("report")
    if not config.sweep.extend:
        axes = {"sweep.runs", *(schema.axis_of(key.name) for key in schema.sweepable())}
        free = [name for name in free if name not in axes]
    # These change no more than how it is tested, joined and reported.
    free += ["costs", "report", "sweep.rivals"]
    workdirs.check(workdir, "sweep", config, dataset, without=free)
    return open_sweep(config, workdir, dataset), job


def _train_all(config: ConfigDict, workdir: Path, progress: Progress) -> bool:
    """Do what is left of a sweep; return False if it is complete."""
    sweep, job = _open(config, workdir, progress)
    dataset, part = job.built, config.sweep.part
    if part == JOIN:
        sweep.check_planned()
    datasets.keep_data_report(dataset, workdir)
    if sweep.is_complete():
        _check_teachers(sweep)
        return False
    name, first = next(iter(sweep.runs.items()))
    read = job.of({name: first}).dataset
    checks.check_teacher_signals(read, sweep.runs.values())
    checks.check_labels(read)
    registry.check(read, config.sweep.rivals)
    # By the memory that is free: of several processes, one decides.
    size = on_first(lambda: cohort_size(config, sweep.runs.values(), read.spec, job.devices))
    sweep = sweep.planned(size)
    # Last, so that an extension counts once its cohorts are known.
    workdirs.write_config(workdir, "sweep", config, dataset.provenance)
    if part == PLAN:
        return True
    jobs = list(zip(map(job.of, sweep.cohorts), sweep.folders, strict=True))
    with contextlib.ExitStack() as held:
        # Another run may hold only one of the folders.
        for folder in sweep.folders:
            on_first(functools.partial(held.enter_context, hold(folder)))
        if part != JOIN:
            _train_cohorts(config, workdir, jobs)
        elif untrained := _untrained(jobs):
            raise UserError(
                f"{workdir} lacks {len(untrained)} of its {len(jobs)} cohorts: "
                f"{', '.join(map(str, untrained))}; train each by its number, as "
                f"sweep.part={untrained[0]}"
            )
        _test_and_join(sweep, jobs)
    return True


def _check_teachers(sweep: Sweep) -> None:
    """Raise UserError unless the teachers of a complete sweep are those that it was trained under.

    A teacher that is gone, or of the logs, is no other one.
    """
    versions: dict[str, str] = {}  # by workdir, as cohorts share teachers
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        config = common(cohort)
        workdir = config.teacher.workdir
        if not workdir:
            continue
        trained_under = manifest.read(folder, "start the sweep again")["provenance"]["teacher"]
        if workdir not in versions:
            found = is_run(place_of(workdir))
            versions[workdir] = load_teacher(config).version if found else trained_under
        if versions[workdir] != trained_under:
            raise UserError(
                f"{sweep.workdir} holds a sweep under the teacher {trained_under}, and {workdir} "
                f"holds {versions[workdir]}; name the first one in teacher.workdir, or use another "
                "--workdir"
            )


def _train_cohorts(config: ConfigDict, workdir: Path, jobs: _Jobs) -> None:
    """Train the cohorts one after the other, or first on a cluster, as one task each."""
    # All are checked before the first one trains.
    steps = sum([_check(job) for job, _ in jobs])
    if config.launcher == "ray":
        calls = [(config, workdir, number, True) for number in _untrained(jobs)]
        cluster.call_on_cluster(config, train_part, calls, "cohorts")
    with training_bar(jobs[0][0], steps) as bar:
        for number, (job, folder) in enumerate(jobs, start=1):
            job.progress.show(f"cohort {number} of {len(jobs)}")
            _train_cohort(job, folder, bar)


def _check(job: TrainingJob) -> int:
    """Check the memory and the signals that a job needs; return the number of its steps."""
    if job.runs:
        checks.check_teacher_signals(job.dataset, job.runs.values())
    else:
        checks.check_teacher_log(job.config, job.dataset)
    check_memory(job.stacks, job.trainee.batch, job.dataset.spec, job.device_map)
    return job.trainee.train.steps


def _untrained(jobs: _Jobs) -> list[int]:
    """The numbers of the cohorts that are not trained and measured on validation."""
    return [at for at, (job, folder) in enumerate(jobs) if not is_measured(folder, job.provenance)]


def _train_cohort(job: TrainingJob, folder: Path, bar: Bar) -> None:
    """Train the runs of a cohort and measure them on validation, if that is not done."""
    if is_measured(folder, job.provenance):
        bar.update(job.config.train.steps)
        return
    states = fit(job, folder, bar)
    with_scores = workdirs.started_with_scores(folder, job.config)
    measured = measure(job, "validation", states, started_with_scores=with_scores)
    write_measured(job, folder, job.provenance, measured)


def _test_and_join(sweep: Sweep, jobs: _Jobs) -> None:
    """Measure on test what validation chose, and write the tables of the whole sweep."""
    chosen = setting_names.chosen(sweep.validation())
    tested, teachers = sweep.with_any(chosen), set[str]()
    for job, folder in jobs:
        if folder in tested:
            serves = {name: chosen[name] for name in job.runs if name in chosen}
            # Once per teacher, which is a final ranker of the references, too.
            teacher = job.provenance["teacher"]
            _test_cohort(job, folder, serves, teacher not in teachers)
            teachers.add(teacher)
    sweep.join(tested)


def _test_cohort(
    job: TrainingJob, folder: Path, serves: Mapping[str, Collection[str]], with_references: bool
) -> None:
    """Measure the runs that validation chose on the test split, if that is not done.

    `serves` are the chosen heads of each chosen run.
    """
    owner = {**job.provenance, "serves": json.dumps(serves), "references": str(with_references)}
    names = job.config.sweep.rivals if with_references else ()
    if names:
        owner["rivals"] = ",".join(names)
    if is_measured(folder / TEST, owner):
        return
    students: States = ()
    if serves:
        students, step = job.restored(folder)
        if step < job.config.train.steps:  # the last checkpoint is damaged
            with training_bar(job, job.config.train.steps) as bar:
                students = fit(job, folder, bar)
    measured, rivals = [], list[Rival]()
    if with_references:
        # Validation chooses among the references too.
        rivals = fitted_rivals(job, names)
        measured.append(measure(job, "validation", with_references=True, rivals=rivals))
        best = saving.best_of_families(measured[0].rows)
        rivals = [rival for rival in rivals if rival.name in best]
    tested = measure(
        job,
        "test",
        students,
        serves=serves,
        with_references=with_references,
        rivals=rivals,
        started_with_scores=workdirs.started_with_scores(folder, job.config),
    )
    write_measured(job, folder / TEST, owner, *measured, tested)


def fitted_rivals(job: TrainingJob, names: Sequence[str]) -> list[Rival]:
    """Fit the rivals of a sweep to the training requests, with each of their settings."""
    if not names:
        return []
    config = job.config
    logged = config.teacher.source == "logged"
    task = registry.Task(
        job.dataset,
        config.value_weights,
        config.funnel.shown,
        scored=TEACHER_STAGES[config.teacher.stage] if logged else None,
    )
    with job.progress.phase("rivals"):
        return registry.fit(task, names)


def training_bar(job: TrainingJob, steps: int) -> contextlib.AbstractContextManager[Bar]:
    """The bar of the steps of a run."""
    return job.progress.bar("training", steps, "step", hidden=not is_first())


def fit(job: TrainingJob, workdir: Path, bar: Bar) -> States:
    """Train the rankers of a job in one program on the same batches; return their states.

    `workdir` gets checkpoints and metrics, and `bar` counts the steps of the ranker that takes the
    most. Memory that a device lacks becomes one line.
    """
    train = job.trainee.train

    def progress(states: States) -> dict[str, float]:
        measured = measure(job, "validation", states, limit=train.eval_limit)
        serves = {name: of.distill.serve for name, of in job.runs.items()}
        return {
            scalar_name(f"eval/{column}", name if job.runs else ""): value
            for row in measured.rows
            for name in [str(row["run"])]
            if (serves or {results.TEACHER: "user"}).get(name) == row["serve"]
            for column, value in row.items()
            if isinstance(value, float) and np.isfinite(value) and metric_of(column)
        }

    with exhaustion_reported(), job.progress.phase("training"):
        check_same("dataset", str(job.dataset.provenance))
        # Again for each cohort: free memory may differ from that at the start.
        check_memory(job.stacks, job.trainee.batch, job.dataset.spec, job.device_map)
        begin = functools.partial(warm_start, job, workdir) if train.warm_start else None
        return fit_program(
            prepare_program(job), train, workdir, job.provenance, progress, bar, begin
        )


def prepare_program(job: TrainingJob, batches_on: DeviceMap | None = None) -> Program:
    """The run of a job: its stacks on their batches, spread over its devices.

    The items of its dataset and the parameters of its teacher may be only shapes. By default the
    devices make the batches too.
    """
    dataset, stacks, batches_on = job.dataset, job.stacks, batches_on or job.device_map
    # Students that learn nothing from a teacher do not pay for one.
    live = job.live_teacher if specs.learn_from_scores(stacks) else None
    stage = TEACHER_STAGES[job.config.teacher.stage]
    teacher = LiveTeacher(live.model, stage) if live else None
    constants = Constants(items=dataset.items, teacher=live.ranker.parameters if live else None)
    needs = specs.needs(stacks, teacher, stage)
    batches = training_batches(
        dataset,
        BatchConfig(**job.trainee.batch),
        needs,
        batches_on,
        # CPU devices hold their data in the memory of the host.
        copies=1 + sum(of.platform == "cpu" for of in own_devices(batches_on.mesh.devices.flat)),
    )
    return make_program(stacks, teacher, batches, constants, job.device_map)


def warm_start(job: TrainingJob, folder: Path, states: States) -> States:
    """Start initial states from the run `train.warm_start`, and record it in the run's `folder`.

    The dataset is that of the earlier run, or one that extends it (`data.extends`), so known ids
    keep their rows. The parameters are those of that run, with the slots of embedding rows. Rows of
    new ids are as initialized. The step, the schedule and the optimizer of dense parameters start
    from zero. A run that is missing, unfinished, or of other ids or sizes, is a UserError.
    """
    workdir = job.trainee.train.warm_start
    try:
        before = open_ranker(place_of(workdir), with_slots=True)
    except UserError as error:
        raise UserError(f"train.warm_start={workdir}: {error}") from error
    if before.job.role != job.role:
        raise UserError(
            f"train.warm_start={workdir} is of a {before.job.role}, not of a {job.role}"
        )
    dataset, earlier = job.built, before.dataset.provenance["dataset"]
    if earlier not in (*dataset.earlier, dataset.provenance["dataset"]):
        raise UserError(
            f"train.warm_start={workdir} was trained on {earlier}, and its ids are not those of "
            f"{dataset.directory}; name a run on that dataset, or on one that it extends"
        )
    start = jax.tree.map(np.asarray, before.ranker.parameters)
    started = tuple(
        dataclasses.replace(
            state, parameters=_grown(job, before.model, start, stack, state.parameters)
        )
        for stack, state in zip(job.stacks, states, strict=True)
    )
    workdirs.write_start(folder, workdir, before.version, before.needs_scores)
    return started


def _grown(
    job: TrainingJob, model: Model, start: Parameters, stack: Stack, fresh: Parameters
) -> Parameters:
    """The parameters of a stack's runs, the same for each except in rows of new ids."""
    old, new = model.embedding.tables, stack.train_spec.model.embedding.tables

    def stacked(of: np.ndarray, like: np.ndarray) -> np.ndarray:
        if of.shape != like.shape[1:]:
            raise ValueError(f"an array of shape {of.shape}")
        return np.broadcast_to(of, like.shape)

    def grown(name: str) -> Any:
        before, now, rows = old[name], new[name], start.tables[name]
        table = np.array(fresh.tables[name])
        may_grow = before.size < now.size and not (before.hashed or now.hashed)
        if rows.shape[-1] != table.shape[-1] or not (before == now or may_grow):
            raise ValueError(f"a table {name} of another size")
        table[:, : before.size] = rows[: before.size]
        table[:, now.size] = rows[before.size]  # that of ids without a row
        return table

    try:
        dense = jax.tree.map(stacked, start.dense, fresh.dense)
        return Parameters(dense, {name: grown(name) for name in {**old, **new}})
    except (KeyError, ValueError) as error:
        raise UserError(
            f"train.warm_start={job.trainee.train.warm_start} has a model of other sizes, or rows "
            "of another optimizer, than the config; keep the keys of the model, distill.mode and "
            "optimizer.table_name of that run"
        ) from error
