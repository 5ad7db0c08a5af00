"""Cohorts of a sweep: train each here or on a cluster, choose on validation, test and join."""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.config import checks, schema
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.errors import UserError
from kd_ranker.evaluation import policy, results
from kd_ranker.evaluation.evaluate import Each
from kd_ranker.evaluation.results import Who
from kd_ranker.manifest import is_made_of as is_measured
from kd_ranker.pipeline import cluster, datasets, runs, trained
from kd_ranker.pipeline.job import Job, open_job
from kd_ranker.pipeline.measure import measure, train_statistics, write_measured
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
        cohorts = _train_part(config, Path(workdir), int(part))
        show(f"cohort {part} of {cohorts} is trained")
        return
    with owned(workdir) as folder:
        if not _train_all(config, folder):
            show(f"the sweep in {workdir} is complete; there is nothing to do")
        if part == PLAN:
            cohorts = len(read_plan(folder))
            show(f"cohorts: {cohorts}")
            show(f"numbers: 0-{cohorts - 1}")


def _train_part(config: ConfigDict, workdir: Path, number: int) -> int:
    """Train one cohort of a planned sweep, holding only its folder; return how many there are."""
    sweep, job = _open(config, workdir)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number}, and the sweep in {workdir} has {len(sweep.plan)} cohorts, "
            f"numbered from 0 to {len(sweep.plan) - 1}"
        )
    with owned(sweep.folders[number]):
        _train_planned(sweep, job, number)
    return len(sweep.plan)


def train_cohort(workdir: Path, number: int) -> None:
    """Train one cohort of a planned sweep and measure it, in a process of a cluster.

    Only the sweep's own process, which holds the workdir, may start it.
    """
    config = workdirs.read_config(workdir)
    try:
        job = open_job(config)
        sweep = open_sweep(config, workdir, job.built.identity)
        _train_planned(sweep, job, number)
    except UserError as error:
        raise UserError(f"cohort {number}: {error}") from error


def _train_planned(sweep: Sweep, job: Job, number: int) -> None:
    """Train one cohort; its folder is held already."""
    job = job.of(sweep.cohorts[number])
    with runs.progress_bar(sweep.workdir.name, _check(job)) as bar:
        _train_cohort(job, sweep.folders[number], bar)


def _open(config: ConfigDict, workdir: Path) -> tuple[Sweep, Job]:
    """Open a sweep and its dataset; check that the workdir is free or holds the same sweep."""
    job = open_job(config, unchanged=True)
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
        if len(sweep.plan) == 1:
            logging.warning(
                "the sweep is one cohort, so one task; set sweep.group_size to the members of a "
                "cohort"
            )
        calls = [(sweep.workdir, number) for number in _untrained(sweep, job)]
        cluster.call_on_cluster(config, train_cohort, calls, "cohorts")
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
    cohorts = enumerate(zip(sweep.cohorts, sweep.folders, strict=True))
    return [
        number
        for number, (cohort, folder) in cohorts
        if not is_measured(folder, job.of(cohort).made_of)
    ]


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
    students = _restored(job, folder) if serves else ()
    statistics, measured = None, []
    fitted: Mapping[Who, Each] = {}
    if with_references:
        statistics = train_statistics(job)
        # Validation chooses among the references too.
        measured.append(measure(job, "validation", statistics=statistics))
    if policies and students:
        fitted = measure(job, "validation", students, serves=serves, keep=True, costs=False).each
    tested = measure(job, "test", students, serves=serves, statistics=statistics, fitted=fitted)
    write_measured(job, folder / TEST, owner, *measured, tested)


def _restored(job: Job, folder: Path) -> States:
    """The trained students of a cohort; those of a damaged checkpoint are trained again."""
    states, step = trained.restored(job.groups, folder, job.made_of)
    if step == job.config.train.steps:
        return states
    with runs.progress_bar(folder.name, job.config.train.steps) as bar:
        return runs.fit(job, folder, bar)
