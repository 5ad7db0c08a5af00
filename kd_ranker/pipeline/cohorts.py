"""Cohorts of a sweep: train each here or on a cluster, choose on validation, test and join."""

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.config import schema
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.errors import UserError
from kd_ranker.evaluation import references, results
from kd_ranker.evaluation.measured import is_measured
from kd_ranker.pipeline import cluster, datasets, runs, supervision, teachers
from kd_ranker.pipeline.datasets import keep_data_report
from kd_ranker.pipeline.measure import Students, measure, reference, write_measured
from kd_ranker.pipeline.remote import Place, local_folder, owned
from kd_ranker.pipeline.teachers import Teacher
from kd_ranker.requests.lock import hold
from kd_ranker.requests.records import Dataset
from kd_ranker.sweep.members import common
from kd_ranker.sweep.memory import check_memory, cohort_size
from kd_ranker.sweep.sweep import TEST, Cohort, Sweep, open_sweep, read_plan
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import skip_steps
from kd_ranker.training.processes import on_first
from kd_ranker.training.recipes import student_groups


def train_sweep(config: ConfigDict, workdir: Place, say: Callable[[str], None]) -> None:
    """Train the students of `config.sweep` cohort by cohort and join their results.

    Args:
      config: a valid config; `config.sweep.part` selects one part of the work.
      workdir: of the sweep.
      say: called with each line on the part that was done, or if there was nothing to do.

    Raises:
      UserError: the workdir holds another run, there is no such cohort, or one that is to be
        joined was not trained.
    """
    part = config.sweep.part
    if config.launcher == "ray" or part:
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
    if part.isdecimal():
        cohorts = _sweep_cohort(config, Path(workdir), int(part))
        say(f"cohort {part} of {cohorts} is trained")
        return
    with owned(workdir) as folder:
        if not _sweep(config, folder):
            say(f"the sweep in {workdir} is complete; there is nothing to do")
        if part == PLAN:
            cohorts = len(read_plan(folder)[1])
            say(f"cohorts: {cohorts}")
            say(f"numbers: 0-{cohorts - 1}")


def _sweep_cohort(config: ConfigDict, workdir: Path, number: int) -> int:
    """Train one cohort of a planned sweep, holding only its folder; returns how many there are."""
    dataset = _dataset_of_sweep(config, workdir)
    sweep = open_sweep(config, workdir, dataset.identity)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number}, and the sweep in {workdir} has {len(sweep.plan)} cohorts, "
            f"numbered from 0 to {len(sweep.plan) - 1}"
        )
    with owned(sweep.folders[number]):
        _train_alone(config, dataset, sweep, number)
    return len(sweep.plan)


def _dataset_of_sweep(config: ConfigDict, workdir: Path) -> Dataset:
    """Opens the dataset of a sweep.

    Raises:
      UserError: it was not built, or its raw files have changed since, or the workdir holds a run
        of another command, config or dataset.
    """
    dataset = datasets.current_dataset(config)
    free = _free_of_a_sweep(config.sweep.extend)
    workdirs.check(workdir, "sweep", config, dataset.identity, without=free)
    return dataset


def _sweep(config: ConfigDict, workdir: Path) -> bool:
    dataset = _dataset_of_sweep(config, workdir)
    part = config.sweep.part
    sweep = open_sweep(config, workdir, dataset.identity)
    if part == JOIN:
        sweep.check_planned()
    keep_data_report(config, workdir)
    if sweep.is_complete():
        return False
    open_teacher = teachers.opener(config, dataset)
    _, dataset = open_teacher(next(iter(sweep.members.values())))
    supervision.check_signals(config, dataset, sweep.members.values())
    supervision.check_labels(config, dataset)
    # By the memory that is free: of several processes, one decides.
    size = on_first(lambda: cohort_size(config, sweep.members.values(), dataset.spec))
    # A workdir with cohorts has a config; that of an extension counts once its cohorts are known.
    if not sweep.plan:
        workdirs.write_config(workdir, "sweep", config, dataset.identity)
    sweep = sweep.planned(size, lambda member: teachers.version_of(open_teacher(member)[0]))
    workdirs.write_config(workdir, "sweep", config, dataset.identity)
    if part == PLAN:
        return True
    with _held_by_first(sweep.folders):
        if part == JOIN:
            _check_trained(sweep, open_teacher)
        else:
            _train_cohorts(config, sweep, open_teacher)
        _test_and_join(config, sweep, open_teacher)
    return True


@contextlib.contextmanager
def _held_by_first(folders: Sequence[Path]) -> Iterator[None]:
    """Holds folders below one that is held: other runs may hold one of them without that."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            on_first(functools.partial(stack.enter_context, hold(folder)))
        yield


def _train_cohorts(config: ConfigDict, sweep: Sweep, open_teacher: teachers.Opener) -> None:
    """Trains the cohorts one after the other, or on a cluster."""
    spec = open_teacher(next(iter(sweep.members.values())))[1].spec
    shared = [common(cohort) for cohort in sweep.cohorts]
    for cohort, each in zip(sweep.cohorts, shared, strict=True):
        check_memory(each, student_groups(cohort, spec), each.batch, spec)
    if config.launcher == "ray":
        _train_elsewhere(config, sweep, open_teacher)
    with runs.progress_bar(sweep.workdir.name, sum(each.train.steps for each in shared)) as bar:
        for cohort, folder, each in zip(sweep.cohorts, sweep.folders, shared, strict=True):
            _train_cohort(each, *open_teacher(each), cohort, folder, bar)


def _test_and_join(config: ConfigDict, sweep: Sweep, open_teacher: teachers.Opener) -> None:
    """Measures on test what validation chose, and writes the tables of the whole sweep."""
    chosen = results.chosen(sweep.validation())
    tested = sweep.with_any(chosen)
    referred: set[str] = set()
    for index, (cohort, folder) in enumerate(zip(sweep.cohorts, sweep.folders, strict=True)):
        if folder in tested:
            # Once a teacher, since it is the final ranker of theirs as well.
            with_references = sweep.teachers[index] not in referred
            referred.add(sweep.teachers[index])
            each = common(cohort)
            _test_cohort(each, *open_teacher(each), cohort, folder, chosen, with_references)
    sweep.join(tested)


def _untrained(sweep: Sweep, open_teacher: teachers.Opener) -> list[int]:
    """The numbers of the cohorts that are not trained and measured on validation."""
    left = []
    for number, (cohort, folder) in enumerate(zip(sweep.cohorts, sweep.folders, strict=True)):
        teacher, dataset = open_teacher(common(cohort))
        if not is_measured(folder, runs.students_identity(cohort, dataset, teacher)):
            left.append(number)
    return left


def _check_trained(sweep: Sweep, open_teacher: teachers.Opener) -> None:
    """Raises UserError unless all cohorts are there to be joined."""
    if left := _untrained(sweep, open_teacher):
        raise UserError(
            f"{sweep.workdir} lacks {len(left)} of its {len(sweep.plan)} cohorts: "
            f"{', '.join(map(str, left))}; train each by its number, as sweep.part={left[0]}"
        )


def _train_elsewhere(config: ConfigDict, sweep: Sweep, open_teacher: teachers.Opener) -> None:
    """Trains the cohorts that are not done on a cluster, a task each."""
    left = _untrained(sweep, open_teacher)
    if len(sweep.plan) == 1:
        logging.warning(
            "the sweep is one cohort, so one task; sweep.group_size says how many members one has"
        )
    with cluster.open_cluster(config) as run:
        for _ in run(train_cohort, [(sweep.workdir, number) for number in left], "cohorts"):
            pass


def train_cohort(workdir: Path, number: int) -> None:
    """Trains one cohort of a sweep that is planned, and measures it; for a process of its own.

    Nothing but the sweep's own process, which holds the workdir, may call it.

    Raises:
      UserError: as `sweep`, with the number of the cohort.
    """
    config = workdirs.read_config(workdir)
    try:
        dataset = datasets.dataset_of(config)
        _train_alone(config, dataset, open_sweep(config, workdir, dataset.identity), number)
    except UserError as error:
        raise UserError(f"cohort {number}: {error}") from error


def _train_alone(config: ConfigDict, dataset: Dataset, sweep: Sweep, number: int) -> bool:
    """Trains one cohort, whose folder is held; False if that is done."""
    cohort, folder = sweep.cohorts[number], sweep.folders[number]
    shared = common(cohort)
    teacher, dataset = teachers.opener(config, dataset)(shared)
    sweep.check_teacher(number, teachers.version_of(teacher))
    supervision.check_signals(config, dataset, cohort.values())
    with runs.progress_bar(sweep.workdir.name, shared.train.steps) as bar:
        return _train_cohort(shared, teacher, dataset, cohort, folder, bar)


def _train_cohort(
    config: ConfigDict, teacher: Teacher | None, dataset: Dataset, cohort: Cohort, folder: Path,
    bar: tqdm,
) -> bool:  # fmt: skip
    """Trains the members of a cohort and measures them on validation; False if that is done."""
    whose = runs.students_identity(cohort, dataset, teacher)
    if is_measured(folder, whose):
        skip_steps(bar, config.train.steps)
        return False
    students = runs.fit_students(config, dataset, teacher, cohort, folder, bar)
    known = reference(config, dataset, teacher)
    measured = measure(config, dataset, "validation", known, cohort, students)
    write_measured(config, folder, whose, measured)
    return True


def _test_cohort(
    config: ConfigDict, teacher: Teacher | None, dataset: Dataset, cohort: Cohort, folder: Path,
    chosen: Mapping[str, Collection[str]], with_references: bool,
) -> None:  # fmt: skip
    """Measures the members of a cohort that validation chose on the test split, if not done."""
    serves = {name: chosen[name] for name in cohort if name in chosen}
    whose = runs.students_identity(cohort, dataset, teacher)
    tested = {**whose, "serves": json.dumps(serves), "references": str(with_references)}
    if is_measured(folder / TEST, tested):
        return
    groups = _students_again(config, dataset, teacher, cohort, folder) if serves else []
    students = [group.only(serves) for group in groups]
    known = reference(config, dataset, teacher)
    statistics = None
    measured = []
    if with_references:
        statistics = references.train_statistics(
            dataset, config.value_weights, config.funnel.shown, seed=0
        )
        # Validation chooses among the references too.
        measured.append(
            measure(config, dataset, "validation", known, {}, [], statistics=statistics)
        )
    of_test = measure(
        *(config, dataset, "test", known, cohort), [of for of in students if of.names],
        serves=serves, statistics=statistics,
    )  # fmt: skip
    write_measured(config, folder / TEST, tested, *measured, of_test)


def _students_again(
    config: ConfigDict, dataset: Dataset, teacher: Teacher | None, cohort: Cohort, folder: Path
) -> list[Students]:
    """The students of a cohort that was trained; what a damaged checkpoint lost is made again."""
    whose = runs.students_identity(cohort, dataset, teacher)
    trained, step = runs.trained_students(dataset, cohort, folder, whose)
    if step == config.train.steps:
        return trained
    with runs.progress_bar(folder.name, config.train.steps) as bar:
        return runs.fit_students(config, dataset, teacher, cohort, folder, bar)


def _free_of_a_sweep(extends: bool) -> list[str]:
    """The keys in which a sweep may differ from the one that its workdir holds."""
    free = schema.without_influence("report")
    axes = {"sweep.ways", *(schema.axis_of(key.name) for key in schema.sweepable())}
    # Both change no more than how its results are joined and reported.
    return ["costs", "report", *(name for name in free if extends or name not in axes)]
