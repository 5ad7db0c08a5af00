"""The work of the entry points: one function each, from a config and a workdir to files.

A command holds the workdir that it writes to for as long as it runs, and a second one is refused.
A workdir is a folder or a URL, see `remote`.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.config import checks, identity, schema
from kd_ranker.config.identity import dataset_name
from kd_ranker.config.keys import JOIN, PLAN
from kd_ranker.errors import UserError, check_choice
from kd_ranker.evaluation import references, results
from kd_ranker.evaluation.measured import is_measured
from kd_ranker.evaluation.results import Row
from kd_ranker.pipeline import cluster, exporting, runs, scoring, supervision, teachers, trained
from kd_ranker.pipeline import data_lines as of_data
from kd_ranker.pipeline.data_lines import keep_data_report
from kd_ranker.pipeline.measure import (
    Students,
    measure,
    own_reference,
    reference,
    write_measured,
)
from kd_ranker.pipeline.remote import Place, below, fetched, local_folder, owned, place_of
from kd_ranker.pipeline.teachers import Teacher
from kd_ranker.report import tables, write
from kd_ranker.requests import storage
from kd_ranker.requests.lock import hold
from kd_ranker.requests.pool import Runner, open_pool
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, Source
from kd_ranker.serving.formats import FORMATS
from kd_ranker.serving.programs import make_programs
from kd_ranker.serving.score import score_log
from kd_ranker.serving.tables import ITEM_TYPES
from kd_ranker.serving.write import program_files, write_export
from kd_ranker.sources.logs import findings, unseen
from kd_ranker.sources.logs.data_report import read_data_report
from kd_ranker.sources.logs.guess.first_config import FirstConfig, write_first_config
from kd_ranker.sources.logs.layout import read_layout
from kd_ranker.sources.logs.write_back import Scored
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep.members import common, repeats, sweep_members
from kd_ranker.sweep.memory import check_memory, cohort_size
from kd_ranker.sweep.sweep import TEST, Cohort, Sweep, open_sweep, read_plan
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.loop import skip_steps
from kd_ranker.training.processes import on_first
from kd_ranker.training.recipes import student_groups

# What is chosen is chosen on the first; the second is read for what is reported.
MEASURED_SPLITS = ("validation", "test")


def prepare_data(config: ConfigDict, thorough: bool = False) -> Path:
    """Builds the dataset of `config.data`; one that is there already is left alone.

    Args:
      config: the config.
      thorough: whether to check all bytes of one that is there, which takes a while where these are
        many gigabytes.

    Returns:
      The dataset's folder.

    Raises:
      UserError: the config or the raw files are at fault, or a dataset is there already that is
        damaged, or was made of other raw files, or of a log with faults that the config does not
        allow.
    """
    checks.validate(config)
    name = dataset_name(config)
    directory = storage.directory_of(name, config.data.dir)
    entry = SOURCES[config.data.name]
    if not directory.exists():
        # Before the raw files are read, which may take long.
        with storage.building(name, config.data.dir):
            source = entry.open_source(config.data, config.tasks, config.funnel)
            with contextlib.closing(source):
                storage.write(source, directory)
    else:
        storage.check_whole(directory, teachers.PREPARE_DATA, thorough)
        entry.check_unchanged(config.data, directory)
        if report := read_data_report(directory):
            findings.check_allowed(report, config.data.allow, str(directory))
    return directory


def data_lines(config: ConfigDict) -> list[str]:
    """The lines that tell of the config's dataset: its log's remarks, and the epochs of training.

    Raises:
      UserError: the dataset was not built.
    """
    return of_data.data_lines(config, teachers.dataset_of(config))


def first_config(config: ConfigDict, folder: Place) -> FirstConfig:
    """Writes a config to edit for the log at `config.data.path`, with what it guessed and why.

    Returns:
      The file, below `folder`, and what to run next.
    """
    return write_first_config(config, local_folder("--workdir", folder))


def train_teacher(config: ConfigDict, workdir: Place) -> list[Row]:
    """Trains the final ranker on user labels and measures it.

    Returns:
      Its row of `results.csv` on the test split; that has the references as well.
    """
    checks.validate(config)
    with owned(workdir) as folder:
        dataset = teachers.current_dataset(config)
        supervision.check_log(config, dataset)
        supervision.check_labels(config, dataset)
        ranker, step = runs.fit_teacher(config, dataset, folder)
        teacher = own_reference(config, dataset, ranker, step)
        # Beside the oracle, where the truth is known: how much a final ranker leaves to be had.
        statistics = references.train_statistics(
            dataset, config.value_weights, config.funnel.shown, seed=0
        )
        measured = [
            measure(config, dataset, split, teacher, {}, [], statistics=statistics)
            for split in MEASURED_SPLITS
        ]
        whose = identity.of_teacher(config, dataset.identity)
        write_measured(config, folder, whose, *measured)
    return measured[-1].rows[:1]


def results_text(workdir: Place) -> str:
    """The table of a run's results as text, and where they lie."""
    with fetched(workdir, with_checkpoints=False) as folder:
        passed = workdirs.read_config(folder).funnel.passed
        text = tables.results_text(folder, passed)
    return text.replace(str(folder), str(workdir))


class Logged(NamedTuple):
    """The files that `log_teacher` has written.

    Attributes:
      dataset: the folder of the copy of the dataset that holds the probabilities.
      log: the user's own log with the teacher's columns added; None for a dataset without one.
    """

    dataset: Path
    log: Scored | None


def log_teacher(config: ConfigDict) -> Logged:
    """Scores the dataset of `config.data` with the teacher in `config.teacher.workdir`.

    The result is a copy of the dataset, and, with `data.name = "parquet"`, a copy of the log. A run
    that was killed goes on where it stopped.

    Raises:
      UserError: dataset or teacher are missing, the log is not what the dataset was built of, or
        another run does the same.
    """
    checks.validate(config)
    dataset = teachers.dataset_of(config)
    teacher = teachers.load_teacher(config, dataset)
    name = dataset_name(config, teacher.version)
    entry, log = SOURCES[config.data.name], None
    if entry.open_scored_log:
        # Before the long work, as it may find fault with the log.
        log = entry.open_scored_log(
            config.data, config.tasks, config.funnel, dataset.directory, name
        )
    if (there := storage.directory_of(name, config.data.dir)).exists():
        storage.check_whole(there, teachers.LOG_TEACHER)
    splits = dataset.builder.info.splits
    with _open_runner(config) as run:
        source = Source(
            spec=dataclasses.replace(
                dataset.spec, teacher_version=teacher.version, teacher_signal="probability"
            ),
            item_features=dataset.item_features,
            item_category=dataset.item_category,
            requests=functools.partial(scoring.scored_requests, config, dataset, teacher),
            num_requests={split: splits[split].num_examples for split in SPLITS},
            shards=functools.partial(
                scoring.scoring_shards, config, dataset, teacher, _runs_elsewhere(config)
            ),
            run=run,
            resume=scoring.scoring_folder(config, dataset, teacher),
            write_beside=log.write_beside if log else None,
        )
        directory = storage.build(source, name, config.data.dir)
    return Logged(directory, log.write() if log else None)


def _runs_elsewhere(config: ConfigDict) -> bool:
    """True if the runner of `_open_runner` calls functions in other processes than this one."""
    return config.launcher == "ray" or config.data.processes > 1


def _open_runner(config: ConfigDict) -> contextlib.AbstractContextManager[Runner]:
    """Opens what scores: a cluster, or `data.processes` of this machine."""
    if config.launcher == "ray":
        return cluster.open_cluster(config)
    return open_pool(config.data.processes)


def score(
    config: ConfigDict, workdir: Place, member: str = "", output: Path | None = None
) -> tuple[Scored, list[str]]:
    """Writes the log at `config.data.path` with the scores of the ranker in a workdir.

    That log is read in the terms of the one that was trained on; what is known only after a request
    is not. A run that was killed goes on where it stopped.

    Args:
      config: that of the run with another `data.path`, or one of the same features and tasks.
      workdir: of a teacher, a student or a sweep.
      member: of a sweep; "" takes the best one on validation.
      output: the folder to write to; None takes one below `config.data.dir`.

    Returns:
      Where the result lies, and lines on who has scored what.

    Raises:
      UserError: the workdir holds no such ranker, finished and trained on a log, its dataset is
        gone, or the log lacks what it was trained on.
    """
    if config.launcher == "ray":
        workdir = local_folder("--workdir", workdir, "is read by all machines of launcher='ray'")
    with fetched(workdir) as folder:
        run = trained.config_of(folder)
        for name in (run.data.name, config.data.name):
            if name != "parquet":
                raise UserError(
                    f"{workdir} and the config have to be of a log (data.name='parquet'), and one "
                    f"is of {name}; experiments.log_teacher scores the requests of every dataset"
                )
        # One device scores, whatever devices have trained.
        devices = config.parallel.devices or config.parallel.members or 1
        checks.validate(config, devices)
        layout, settled_layout = (read_layout(of.data, of.tasks, of.funnel) for of in (config, run))
        log, layout = unseen.open_unseen(layout, settled_layout)
        open_again = functools.partial(trained.ranker_again, folder, str(config.data.dir), member)
        ranker = trained.ranker_of(*open_again.args)
        ranker = ranker._replace(name=ranker.name.replace(str(folder), str(workdir)))
        dataset = ranker.dataset
        settled = unseen.settled_by(settled_layout, dataset.spec, dataset.directory)
        weights, requests = tuple(config.value_weights), config.evaluation.requests
        again = open_again if _runs_elsewhere(config) else None
        runner = _open_runner(config)
        scored, read = score_log(
            *(log, layout, settled, ranker, again, runner), weights, requests, output
        )
    return scored, [trained.told(ranker.name, ranker.serve), *of_data.score_lines(read)]


def train(config: ConfigDict, workdir: Place) -> list[Row]:
    """Trains one student and measures it.

    Returns:
      Its rows of `results.csv` on the test split, one a serving choice; that has the teacher's as
      well.
    """
    checks.validate(config)
    checks.check_alone(config)
    members = {"": config}
    supervision.check_students(members.values())
    with owned(workdir) as folder:
        teacher, dataset = teachers.teacher_and_dataset(config, teachers.current_dataset(config))
        shared = common(members)
        supervision.check_signals(config, dataset, members.values())
        supervision.check_labels(config, dataset)
        free = schema.without_influence("student")
        workdirs.claim(folder, "train", config, dataset.identity, without=free)
        keep_data_report(config, folder)
        with runs.progress_bar(folder.name, config.train.steps) as bar:
            students = runs.fit_students(shared, dataset, teacher, members, folder, bar)
        known = reference(shared, dataset, teacher)
        measured = [
            measure(shared, dataset, split, known, members, students) for split in MEASURED_SPLITS
        ]
        whose = runs.students_identity(members, dataset, teacher)
        write_measured(config, folder, whose, *measured)
    return [row for row in measured[-1].rows if row["role"] == "student"]


def sweep(config: ConfigDict, workdir: Place) -> bool:
    """Trains the students of `config.sweep`, cohort by cohort, and joins their results.

    A sweep that was killed goes on where it stopped. One whose config has changed is refused; with
    `config.sweep.extend`, `config.sweep` may name more members than the sweep has so far, and only
    those are trained. With `config.sweep.part` it does that part alone.

    Returns:
      True if there was anything to do; False for a sweep that is complete.

    Raises:
      UserError: beside what is wrong with the config or another run, there is no such cohort, or
        one that is to be joined was not trained.
    """
    checks.validate(config)
    supervision.check_students(sweep_members(config).values())
    if config.launcher == "ray" or config.sweep.part:
        workdir = local_folder("--workdir", workdir, "is shared by all that train cohorts")
        if config.sweep.part.isdecimal():
            return _sweep_cohort(config, workdir, int(config.sweep.part))
    with owned(workdir) as folder:
        return _sweep(config, folder)


def sweep_lines(config: ConfigDict, workdir: Place) -> list[str]:
    """The lines on a sweep, or on the part of it, that was done."""
    part = config.sweep.part
    if part in ("", JOIN):
        return [results_text(workdir)]
    cohorts = len(read_plan(Path(workdir))[1])
    if part == PLAN:
        return [f"cohorts: {cohorts}", f"numbers: 0-{cohorts - 1}"]
    return [f"cohort {part} of {cohorts} is trained"]


def _sweep_cohort(config: ConfigDict, workdir: Path, number: int) -> bool:
    """Trains one cohort of a sweep that is planned, and holds its folder alone."""
    dataset = _dataset_of_sweep(config, workdir)
    sweep = open_sweep(config, workdir, dataset.identity)
    sweep.check_planned()
    if number >= len(sweep.plan):
        raise UserError(
            f"sweep.part={number}, and the sweep in {workdir} has {len(sweep.plan)} cohorts, "
            f"numbered from 0 to {len(sweep.plan) - 1}"
        )
    with owned(sweep.folders[number]):
        return _train_alone(config, dataset, sweep, number)


def _dataset_of_sweep(config: ConfigDict, workdir: Path) -> Dataset:
    """Opens the dataset of a sweep.

    Raises:
      UserError: it was not built, or its raw files have changed since, or the workdir holds a run
        of another command, config or dataset.
    """
    dataset = teachers.current_dataset(config)
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
        dataset = teachers.dataset_of(config)
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


def report(sweeps: Sequence[Place], output: Place) -> tuple[list[str], Place]:
    """Writes tables, figures and a page of what sweeps have found.

    Args:
      sweeps: their workdirs; those of the same dataset are joined.
      output: the folder to write below.

    Returns:
      A sentence a dataset on what distillation saves, and the page.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(owned(output, with_checkpoints=False))
        folders = [
            folder if sweep == output else stack.enter_context(fetched(sweep, False))
            for sweep in sweeps
        ]
        names = {str(of): str(sweep) for of, sweep in zip(folders, sweeps, strict=True)}
        answers = write.write_report(folders, folder, names)
    return answers, below(output, write.PAGE)


def export(
    workdir: Place, folder: Path, member: str = "", serve: str = "", items: str = "float32",
    formats: Sequence[str] = tuple(FORMATS),
) -> str:  # fmt: skip
    """Writes the ranker of a finished run as a folder that a server can use without this project.

    Args:
      workdir: of `train`, `sweep` or `train_teacher`; only read.
      folder: the folder to write; it must not exist.
      member: the student's name in a sweep; "" takes the best one on validation.
      serve: its serving choice; "" is that of its config, of a sweep the best.
      items: the type of item embeddings, one of `serving.tables.ITEM_TYPES`.
      formats: those of the programs, some of `serving.formats.FORMATS`.

    Returns:
      A line on the ranker.

    Raises:
      UserError: there is no such ranker, the folder exists, or a format lacks an operation.
    """
    check_choice("--items", items, ITEM_TYPES)
    for name in formats:
        check_choice("--formats", name, FORMATS)
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that does not as --out")
    with fetched(workdir) as run:
        finished = trained.open_finished(run, member, serve)
        exporting.check_choices(finished, items, formats)
        servable = exporting.servable(finished)
        exported = make_programs(servable, items)
        # Before what takes long, since a format may lack an operation.
        files = program_files(exported, formats)
        about = exporting.about(finished, run, exported, items) | {"formats": list(formats)}
        batch, beside = exporting.example(finished), finished.dataset.directory
        write_export(exported, servable, files, batch, about, beside, folder)
    return trained.told(finished.title.replace(str(run), str(workdir)), finished.serve)


class Made(NamedTuple):
    """The folders and the answer of the main job.

    Attributes:
      teacher: the workdir of the teacher; None where the dataset's own log speaks for it.
      students: the workdir of the sweep.
      answers: a sentence a dataset on what distillation saves.
      page: of the report.
    """

    teacher: Place | None
    students: Place
    answers: list[str]
    page: Place


def run(config: ConfigDict, workdir: Place, say: Callable[[str], None] = lambda _: None) -> Made:
    """Does the main job: the dataset, a teacher, a sweep under that teacher, the report.

    No teacher is trained where the students learn from the dataset's own log: with
    `teacher.source = "logged"`, and no `teacher.workdir`. What is done already is left alone.

    Args:
      config: that of the sweep. Where a teacher is trained, it is in `teacher.workdir`, or if that
        is empty below `workdir`; with `sweep.whole_repeats` there is one for each seed.
      workdir: the folder to write below.
      say: is told the name of each step as it begins, and the lines on the dataset.
    """
    checks.validate(config)
    supervision.check_students(sweep_members(config).values())
    config = config.copy_and_resolve_references()
    logged = config.teacher.source == "logged"
    teacher, students = None, below(workdir, "sweep")
    say("prepare_data")
    prepare_data(config)
    for line in data_lines(config):
        say(line)
    if not logged or config.teacher.workdir:
        teacher = place_of(config.teacher.workdir or below(workdir, "teacher"))
        config.teacher.workdir = str(teacher)
        for repeat in repeats(config):
            say("train_teacher")
            train_teacher(repeat, place_of(repeat.teacher.workdir))
            if logged:
                say("log_teacher")
                log_teacher(repeat)
    say("sweep")
    sweep(config, students)
    say("report")
    answers, page = report([students], below(workdir, "report"))
    return Made(teacher, students, answers, page)
