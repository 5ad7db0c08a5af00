"""Cohorts of a sweep: train each here or on a cluster, choose on validation, test and join."""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.config import checks, schema
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.errors import UserError
from kd_ranker.evaluation import policy, results
from kd_ranker.manifest import is_made_of as is_measured
from kd_ranker.pipeline import cluster, datasets, runs
from kd_ranker.pipeline.job import Job, open_job
from kd_ranker.pipeline.measure import measure, write_measured
from kd_ranker.pipeline.remote import Place, local_folder, owned
from kd_ranker.requests.lock import hold
from kd_ranker.sweep import TEST, Sweep, check_memory, cohort_size, open_sweep, read_plan
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.processes import on_first
from kd_ranker.training.state import States


def train_sweep(config: ConfigDict, workdir: Place, show: Callable[[str], None]) -> None:
    """Train the students of `config.sweep` cohort by cohort and join their results; or do one part.

    See `api.sweep`; the config is valid.
    """
    part = config.sweep.part
    if config.launcher == "ray" or part:
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
    if part.isdecimal():
        cohorts = train_part(config, Path(workdir), int(part))
        show(f"cohort {part} of {cohorts} is trained")
        return
    with owned(workdir) as folder:
        if not _train_all(config, folder):
            show(f"the sweep in {workdir} is complete; there is nothing to do")
        if part == PLAN:
            cohorts = len(read_plan(folder))
            show(f"cohorts: {cohorts}")
            show(f"numbers: 0-{cohorts - 1}")


def train_part(config: ConfigDict, workdir: Path, number: int, held: bool = False) -> int:
    """Train and measure one cohort of a planned sweep; return the number of cohorts.

    Only the folder of the cohort is held. On a cluster the sweep's own process has `held` it.
    """
    sweep, job = _open(config, workdir, unchanged=not held)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number}, and the sweep in {workdir} has {len(sweep.plan)} cohorts, "
            f"numbered from 0 to {len(sweep.plan) - 1}"
        )
    job, folder = job.of(sweep.cohorts[number]), sweep.folders[number]
    holding = contextlib.nullcontext() if held else owned(folder)
    with holding, runs.progress_bar(workdir.name, _check(job)) as bar:
        _train_cohort(job, folder, bar)
    return len(sweep.plan)


def _open(config: ConfigDict, workdir: Path, unchanged: bool = True) -> tuple[Sweep, Job]:
    """Open a sweep and its dataset; check that the workdir is free or holds the same sweep."""
    job = open_job(config, unchanged=unchanged)
    dataset, free = job.built.identity, schema.without_influence("report")
    if not config.sweep.extend:
        axes = {"sweep.ways", *(schema.axis_of(key.name) for key in schema.sweepable())}
        free = [name for name in free if name not in axes]
    # These change no more than how it is tested, joined and reported.
    free += ["costs", "report", "funnel.policies"]
    workdirs.check(workdir, "sweep", config, dataset, without=free)
    return open_sweep(config, workdir, dataset), job


def _train_all(config: ConfigDict, workdir: Path) -> bool:
    """Do what is left of a sweep; return False if it is complete."""
    sweep, job = _open(config, workdir)
    dataset, part = job.built, config.sweep.part
    if part == JOIN:
        sweep.check_planned()
    datasets.keep_data_report(dataset, workdir)
    if sweep.is_complete():
        return False
    name, first = next(iter(sweep.members.items()))
    read = job.of({name: first}).dataset
    checks.check_teacher_signals(read, sweep.members.values())
    checks.check_labels(read)
    # By the memory that is free: of several processes, one decides.
    size = on_first(lambda: cohort_size(config, sweep.members.values(), read.spec))
    sweep = sweep.planned(size)
    # Last, so that an extension counts once its cohorts are known.
    workdirs.write_config(workdir, "sweep", config, dataset.identity)
    if part == PLAN:
        return True
    with contextlib.ExitStack() as held:
        # Another run may hold only one of the folders.
        for folder in sweep.folders:
            on_first(functools.partial(held.enter_context, hold(folder)))
        if part != JOIN:
            _train_cohorts(config, sweep, job)
        elif untrained := _untrained(sweep, job):
            raise UserError(
                f"{workdir} lacks {len(untrained)} of its {len(sweep.plan)} cohorts: "
                f"{', '.join(map(str, untrained))}; train each by its number, as "
                f"sweep.part={untrained[0]}"
            )
        _test_and_join(sweep, job)
    return True


def _train_cohorts(config: ConfigDict, sweep: Sweep, job: Job) -> None:
    """Train the cohorts one after the other, or first on a cluster, as one task each."""
    # All are checked before the first one trains.
    steps = sum([_check(job.of(cohort)) for cohort in sweep.cohorts])
    if config.launcher == "ray":
        calls = [(config, sweep.workdir, number, True) for number in _untrained(sweep, job)]
        cluster.call_on_cluster(config, train_part, calls, "cohorts")
    with runs.progress_bar(sweep.workdir.name, steps) as bar:
        for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
            _train_cohort(job.of(cohort), folder, bar)


def _check(job: Job) -> int:
    """Check the memory and the signals that a cohort needs; return the number of its steps."""
    checks.check_teacher_signals(job.dataset, job.members.values())
    check_memory(job.config, job.groups, job.config.batch, job.dataset.spec)
    return job.config.train.steps


def _untrained(sweep: Sweep, job: Job) -> list[int]:
    """The numbers of the cohorts that are not trained and measured on validation."""
    jobs = [job.of(cohort) for cohort in sweep.cohorts]
    pairs = enumerate(zip(jobs, sweep.folders, strict=True))
    return [number for number, (of, folder) in pairs if not is_measured(folder, of.made_of)]


def _train_cohort(job: Job, folder: Path, bar: tqdm) -> None:
    """Train the members of a cohort and measure them on validation, if that is not done."""
    if is_measured(folder, job.made_of):
        bar.update(job.config.train.steps)
        return
    measured = measure(job, "validation", runs.fit(job, folder, bar))
    write_measured(job, folder, job.made_of, measured)


def _test_and_join(sweep: Sweep, job: Job) -> None:
    """Measure on test what validation chose, and write the tables of the whole sweep."""
    chosen = results.chosen(sweep.validation())
    tested = sweep.with_any(chosen)
    referred: set[str] = set()
    for cohort, folder in zip(sweep.cohorts, sweep.folders, strict=True):
        if folder in tested:
            job = job.of(cohort)
            serves = {name: chosen[name] for name in cohort if name in chosen}
            # Once per teacher, which is a final ranker of the references, too.
            _test_cohort(job, folder, serves, job.teacher_version not in referred)
            referred.add(job.teacher_version)
    sweep.join(tested)


def _test_cohort(
    job: Job, folder: Path, serves: Mapping[str, Collection[str]], with_references: bool
) -> None:
    """Measure the members that validation chose on the test split, if that is not done.

    `serves` are the chosen serving choices of each chosen member.
    """
    owner = {**job.made_of, "serves": json.dumps(serves), "references": str(with_references)}
    policies = job.config.funnel.policies
    if policies:
        owner[policy.FILE] = ",".join(policies)
    if is_measured(folder / TEST, owner):
        return
    students: States = ()
    if serves:
        students, step = job.restored(folder)
        if step < job.config.train.steps:  # the last checkpoint is damaged
            with runs.progress_bar(folder.name, job.config.train.steps) as bar:
                students = runs.fit(job, folder, bar)
    measured, fitted = [], {}
    if with_references:
        # Validation chooses among the references too.
        measured.append(measure(job, "validation", with_references=True))
    if policies and students:
        fitted = measure(job, "validation", students, serves=serves, keep=True, costs=False).each
    tested = measure(
        job, "test", students, serves=serves, with_references=with_references, fitted=fitted
    )
    write_measured(job, folder / TEST, owner, *measured, tested)
