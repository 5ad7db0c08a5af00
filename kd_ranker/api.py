"""The work of the package, one function per command: what `import kd_ranker as kd` offers.

The command line in `main` calls the same functions. Each returns an object that describes its
result as text. A function that writes to a workdir holds it until it returns, and a second process
is refused. A workdir is a folder or a URL, see `pipeline.remote`.
"""

import contextlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.cohorts.plan import FOLDER
from kd_ranker.compiled import keep_programs
from kd_ranker.config import asking, checks, defaults, schema
from kd_ranker.config.runs import list_runs, repeats, sweep_runs
from kd_ranker.configs import parquet
from kd_ranker.errors import UserError, check_choice, listed
from kd_ranker.evaluation import results
from kd_ranker.pipeline import datasets, scoring, searching, sweeping, training
from kd_ranker.pipeline.exporting import export_ranker
from kd_ranker.pipeline.remote import Place, fetched, local_folder, owned, place_of
from kd_ranker.pipeline.scores import Scored
from kd_ranker.pipeline.trained import check_select, config_of, open_ranker
from kd_ranker.progress import Progress, Show
from kd_ranker.reporting import tables, write
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import read_studies
from kd_ranker.reporting.summary import WIDTH, summary
from kd_ranker.requests.request import SPLITS
from kd_ranker.serving.programs import FORMATS
from kd_ranker.sources import in_memory
from kd_ranker.sources.logs.data_report import PAGE
from kd_ranker.sources.logs.infer import FirstConfig, write_first_config
from kd_ranker.sources.logs.layout import split_at_commas
from kd_ranker.tracking.registry import check_installed as check_tracker
from kd_ranker.training import workdir as workdirs

Folder = str | PathLike[str]

# Keys that hold the path of a folder; `data.path` may hold several.
_PATHS = (("data", "dir"), ("data", "extends"), ("teacher", "workdir"), ("train", "warm_start"))


class Dataset(NamedTuple):
    """A dataset of requests that a program has in memory."""

    directory: Path
    config: ConfigDict  # a config for it, to change and to `prepare`

    @classmethod
    def from_log(cls, table: Any, config: ConfigDict, directory: Folder = "datasets") -> "Dataset":
        """Make a table in memory a log, which is read as one of Parquet files.

        Args:
          table: a DataFrame of pandas or polars, or an Arrow table, as `config.data` describes it.
            The index of pandas is not a column.
          config: its roles, labels and features, as `configs.parquet` or the file of `infer` has
            them; `data.path` and `data.dir` are set on a copy.
          directory: the folder of datasets, in which the table is kept as a Parquet file.

        Raises:
          UserError: it is not a table, or a column holds values of several types.
        """
        config = config.copy_and_resolve_references()
        config.data.dir = os.path.expanduser(directory)
        config.data.path = datasets.path_of(table, config.data.dir)
        config.data.sql = ""
        return cls(Path(config.data.path), config)

    @classmethod
    def from_requests(
        cls,
        requests: Iterable[Any] | Mapping[str, Iterable[Any]],
        spec: FeatureSpec,
        item_features: Any = None,
        item_category: Any = None,
        config: ConfigDict | None = None,
        directory: Folder = "datasets",
        validation_share: float = 0.1,
        test_share: float = 0.1,
    ) -> "Dataset":
        """Make a dataset of requests in memory.

        Args:
          requests: `kd.Request` objects, or mappings with its fields, or a table of these fields
            with one row per request. All fields but `user_id`, `item_id` and `user_label` are
            optional: by default all candidates were passed, labels weigh 1, and other features are
            absent. Requests are split by time, unless a mapping gives those of train, validation
            and test.
          spec: the sizes of their features; each width is at least 1, except those of categories.
          item_features: float32 [num_items, F]; None takes zeros.
          item_category: int32 [num_items, I], the category ids of each item; None for none.
          config: rankers, training and funnel to start from; None takes the defaults, and a funnel
            with the sizes of the requests.
          directory: the folder of datasets.
          validation_share: share of the requests, in [0, 1), before those of the test.
          test_share: share of the last requests, in [0, 1).

        Raises:
          UserError: a field is unknown or missing, differs from the shapes of `spec`, has an id out
            of range or a weight below 0; two requests have one id, or a request has an item twice;
            or a split has no requests.
        """
        splits = dict(requests) if isinstance(requests, Mapping) else {"": requests}
        if not splits or {*splits} - {"", *SPLITS}:
            keys = listed(map(str, splits)) or "none"
            raise UserError(f"requests have the keys {keys}; {in_memory.GIVE_REQUESTS}")
        dataset_config = defaults.get_config(in_memory.NAME)
        dataset_config.data.dir = os.path.expanduser(directory)
        path, tasks, funnel = in_memory.write_requests(
            splits,
            spec,
            item_features,
            item_category,
            dataset_config.data,
            (validation_share, test_share),
        )
        if config is None:
            dataset_config.funnel.update(funnel)
        else:
            others = {name: section for name, section in config.items() if name != "data"}
            dataset_config.update(others)
        if tuple(dataset_config.tasks) != tasks:
            dataset_config.tasks = tasks
            dataset_config.value_weights = (1.0,) * len(tasks)
        return cls(path, dataset_config)


class Prepared(NamedTuple):
    """A dataset on disk."""

    directory: Path
    # An own log's candidates, used and rejected, and remarks; epochs of training.
    lines: tuple[str, ...]

    def __repr__(self) -> str:
        page = self.directory / PAGE
        report = [f"data report: {page}"] if page.exists() else []
        return "\n".join([f"dataset: {self.directory}", *report, *self.lines])


class Trained(NamedTuple):
    """The rankers that a run has trained: a teacher, a student, or the students of a sweep."""

    workdir: Place  # a folder, or a URL

    @property
    def results(self) -> pd.DataFrame:
        """Its `results.csv`: one row per ranker, head and split; see docs/measures.md."""
        with fetched(self.workdir, with_checkpoints=False) as folder:
            return results.read_csv(folder / results.FILE)

    def table(self, wide: bool = False) -> str:
        """Return its results for a terminal, in at most 100 columns, or with `wide` all measures.

        A sweep has a line per method, with the saving of the chosen setting and its value for
        users; the numbers are those of the report.
        """
        with fetched(self.workdir, with_checkpoints=False) as folder:
            if not wide and (folder / FOLDER).is_dir():
                (study,) = read_studies([folder])
                text = f"{summary(study, Estimates(study))}\n\nresults: {folder / results.FILE}"
            else:
                text = _measures(folder, None if wide else WIDTH)
        return text.replace(str(folder), str(self.workdir))

    def __repr__(self) -> str:
        # A notebook or debugger shows a value unasked: nothing is read from a URL for that, and
        # there are no draws of the requests.
        if isinstance(self.workdir, Path) and (self.workdir / results.FILE).is_file():
            return _measures(self.workdir, WIDTH)
        return f"{type(self).__name__}(workdir={str(self.workdir)!r})"

    def __str__(self) -> str:
        return self.table()


def _measures(folder: Path, width: int | None) -> str:
    """Return the main measures of a run's rankers, see `tables.results_text`."""
    return tables.results_text(folder, workdirs.read_config(folder).funnel.passed, width)


class Report(NamedTuple):
    """A report on disk, which a notebook shows; that of `run` names the rankers, too."""

    answers: tuple[str, ...]  # per dataset, at most four sentences on the saving
    page: Place  # with all figures and tables
    tables: tuple[str, ...] = ()  # per dataset, its methods in at most 100 columns
    teacher: Trained | None = None  # None where the students learn from the dataset's own log
    students: Trained | None = None

    def __str__(self) -> str:
        lines = list(self.answers)
        if self.teacher:
            lines.append(f"teacher: {self.teacher.workdir}")
        if self.students:
            lines.append(f"students: {self.students.workdir}")
        return "\n".join([*lines, f"report: {self.page}"])

    def _repr_html_(self) -> str | None:
        # Nothing is read from a URL unasked.
        if not isinstance(self.page, Path):
            return None
        # A separate document, so that its styles stay within it.
        page = html.escape(self.page.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="800" style="border: 0"></iframe>'


def prepare(
    config: ConfigDict, thorough: bool = False, progress: Progress | None = None
) -> Prepared:
    """Build the dataset of `config.data`; check one that exists and leave it unchanged.

    Args:
      config: the config.
      thorough: whether to check all bytes of an existing dataset, about a second per gigabyte.
      progress: times the phase; None shows only bars, on a terminal.

    Raises:
      UserError: the config or the raw files are at fault, or the existing dataset is damaged or
        was built from other raw files.
    """
    config = _copied(config)
    checks.validate(config)
    with (progress or Progress()).phase("dataset"):
        directory = datasets.build_dataset(config, thorough)
    return Prepared(directory, tuple(datasets.data_lines(config, datasets.dataset_of(config))))


def infer(log: Any, folder: Folder = ".", named: Mapping[str, Any] | None = None) -> FirstConfig:
    """Write a first config to edit for a log.

    A role that only values point at is proposed below a CHECK. One that names and values leave in
    doubt stays open, with the two likeliest columns.

    Args:
      log: a file, directory or URL as in `data.path`, or a table of pandas, polars or Arrow, which
        is kept in `folder` as a Parquet file; "" for the SELECT that `named` has for `data.sql`.
      folder: the folder of the new file, which is called after the log.
      named: key of the config -> its value, as `{"data.columns.user": "uid"}`: taken as given.

    Returns:
      The file, how many of its lines to confirm or to edit, how many columns became features or
      were left out, and the commands to run next. Printed, it says so.

    Raises:
      UserError: the file exists, the log cannot be read, it lacks named columns, one of them has
        two roles, or the config lacks a named key.
    """
    template = parquet()
    for key in named or {}:
        if not key.startswith(("data.labels.", "data.teacher.", "data.features.")):
            checks.check_key(template, key)
    folder = local_folder("--workdir", folder)
    path = datasets.path_of(log, str(folder))
    name = "" if isinstance(log, (str, os.PathLike)) else "log"
    return write_first_config(path, folder, named or {}, name)


def train_teacher(config: ConfigDict, workdir: Folder, progress: Progress | None = None) -> Trained:
    """Train the final ranker of `config.teacher` on user labels and measure it.

    Its results hold the references as well.

    Args:
      config: the config.
      workdir: the folder of the run; a run that was killed resumes.
      progress: times the phases; None shows only bars, on a terminal.

    Raises:
      UserError: the config is at fault, its dataset was not prepared, or the folder holds another
        run.
    """
    config = _copied(config)
    place = place_of(workdir)
    checks.validate(config)
    _check_installed(config)
    keep_programs(config.compilation_cache)
    training.train("train_teacher", config, {}, place, progress or Progress())
    return Trained(place)


def log_teacher(config: ConfigDict, teacher: Trained | Folder | None = None) -> Scored:
    """Score the dataset with a teacher.

    The scores are a table next to the dataset, which its owner joins by request and item, and a
    column that students learn from. A run that was killed resumes.

    Args:
      config: the config.
      teacher: a teacher, or the folder of its run; None takes that of `config.teacher.workdir`.

    Raises:
      UserError: dataset or teacher are missing, the dataset was not built from this log, or another
        process writes the same scores.
    """
    config = _copied(config, teacher)
    checks.validate(config)
    keep_programs(config.compilation_cache)
    return scoring.score_dataset(config)


def train(
    config: ConfigDict,
    workdir: Folder,
    teacher: Trained | Folder | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train one student and measure it.

    Args:
      config: with the method in `config.distill`.
      workdir: the folder of the run; a run that was killed resumes.
      teacher: a teacher, or the folder of its run; None takes that of `config.teacher.workdir`.
      progress: times the phases; None shows only bars, on a terminal.

    Raises:
      UserError: the config is at fault, dataset or teacher are missing, or the folder holds another
        run.
    """
    config = _copied(config, teacher)
    place = place_of(workdir)
    checks.validate(config, single=True)
    checks.check_students([config])
    _check_installed(config)
    keep_programs(config.compilation_cache)
    training.train("train", config, {"": config}, place, progress or Progress())
    return Trained(place)


def sweep(
    config: ConfigDict,
    workdir: Folder,
    teacher: Trained | Folder | None = None,
    modes: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    axes: Mapping[str, Sequence[Any]] | None = None,
    runs: Iterable[Mapping[str, Any]] | None = None,
    show: Show = logging.info,
    progress: Progress | None = None,
) -> Trained:
    """Train the students of a list of runs, and measure all of them.

    Each run occurs once for each combination of the other swept values. A sweep that was killed
    resumes, and is refused if its config has changed. With `config.sweep.extend` it may name more
    runs than before, and only those are trained.

    Args:
      config: the common part of all students, and what to sweep where arguments are None.
      workdir: the folder of the run.
      teacher: a teacher, or the folder of its run; None takes that of `config.teacher.workdir`.
      modes: values of `distill.mode`.
      weights: values of `distill.weight`.
      seeds: values of `seed`.
      axes: values of any other key that a sweep may vary, by its name:
        `{"distill.loss": ("bce", "topk")}`.
      runs: the values that each run changes, by key:
        `[{"distill.mode": "none"}, {"distill.mode": "aux", "distill.loss": "softmax"}]`. Without
        any there is one run for each mode.
      show: called with each line on the part of the sweep that was done.
      progress: times the phases; None shows only bars, on a terminal.

    Raises:
      UserError: as for `train`, or a key of `axes` cannot be swept, or with `config.sweep.part`
        there is no such cohort or one to be joined was not trained.
    """
    config = _copied(config, teacher)
    place = place_of(workdir)
    swept = {"distill.mode": modes, "distill.weight": weights, "seed": seeds, **(axes or {})}
    for key, values in swept.items():
        if values is not None:
            axis = schema.axis_of(key)
            checks.check_key(config, axis)
            config.update_from_flattened_dict({axis: tuple(values)})
    if runs is not None:
        config.sweep.runs = list_runs(runs)
    checks.validate(config)
    checks.check_students(sweep_runs(config).values())
    _check_installed(config)
    keep_programs(config.compilation_cache)
    if config.sweep.search == "optuna":
        searching.train_search(config, place, show, progress or Progress())
    else:
        sweeping.train_sweep(config, place, show, progress or Progress())
    return Trained(place)


def report(*sweeps: Trained | Folder, output: Folder | None = None) -> Report:
    """Write tables, figures and a page from the results of sweeps.

    Args:
      *sweeps: these, or the folders of their runs; those of the same dataset are joined.
      output: the folder to write to; None takes that of the first sweep.

    Raises:
      UserError: a sweep is missing or not complete, or two are too different for one report.
    """
    places = [_folder(sweep) for sweep in sweeps]
    target = place_of(output) if output else places[0]
    with contextlib.ExitStack() as stack:
        target_folder = stack.enter_context(owned(target, with_checkpoints=False))
        folders = []
        for place in places:
            if place == target:
                folders.append(target_folder)
            else:
                folders.append(stack.enter_context(fetched(place, with_checkpoints=False)))
        names = {str(folder): str(place) for folder, place in zip(folders, places, strict=True)}
        sections = write.write_report(folders, target_folder, names)
    return Report(
        answers=tuple(section.answer.text for section in sections),
        page=place_of(f"{target}/{write.PAGE}"),
        tables=tuple(section.summary for section in sections),
    )


def score(
    ranker: Trained | Folder,
    path: Any,
    output: Folder | None = None,
    run: str = "",
    config: ConfigDict | None = None,
    trust: bool = False,
    show: Show = logging.info,
) -> Path:
    """Score a log that training never read with a ranker that was trained on another one.

    A run that was killed resumes.

    Args:
      ranker: a teacher, a student or a sweep, or the folder of its run.
      path: of the log; or a table of pandas, polars or Arrow.
      output: the folder to write to; None takes one below `config.data.dir`.
      run: the student of a sweep; "" takes the best one on validation.
      config: how to read the log; None reads it as that of the run.
      trust: whether to execute the config file of the run where that registers what the run uses,
        and the SELECT of its `data.sql`.
      show: called with each line on the ranker and the candidates.

    Returns:
      The folder of the scores: Parquet files with `request`, `item` and the ranker's numbers.

    Raises:
      UserError: the run holds no such ranker, its config file or its SELECT is needed and not
        trusted, or the log lacks what the ranker was trained on.
    """
    workdir = _folder(ranker)
    trained = config_of(workdir, trust)
    if config is None:
        check_select(trained, workdir, trust)
    config = _copied(config or trained)
    config.data.path = datasets.path_of(path, config.data.dir)
    folder = local_folder("--out", output) if output else None
    keep_programs(config.compilation_cache)
    scored, lines = scoring.score_unseen(config, workdir, run, folder, trained)
    for line in (*lines, *str(scored).splitlines()):
        show(line)
    return scored.directory


def export(
    ranker: Trained | Folder,
    output: Folder,
    run: str = "",
    serve: str = "",
    formats: Sequence[str] = ("jax", "onnx"),
    trust: bool = False,
    show: Show = logging.info,
) -> Path:
    """Write a ranker as a folder that a server can use without this package.

    Args:
      ranker: a teacher, a student or a sweep, or the folder of its run.
      output: the folder to write; it must not exist.
      run: the student of a sweep; "" takes the best one on validation.
      serve: its head; "" takes that of its config, of a sweep the best.
      formats: of the programs, some of jax and onnx.
      trust: whether to execute the config file of the run where that registers what the run uses.
      show: called with a line on the ranker.

    Raises:
      UserError: the run holds no such ranker, its config file is needed and not trusted, the folder
        exists, or a format lacks an operation.
    """
    workdir = _folder(ranker)
    folder = local_folder("--out", output)
    for name in formats:
        check_choice("--formats", name, FORMATS)
    if folder.exists():
        raise UserError(f"{folder} exists; give a folder that does not exist with --out")
    config = config_of(workdir, trust)
    keep_programs(config.compilation_cache)
    trained = open_ranker(workdir, run, serve, config)
    export_ranker(trained, folder, formats)
    show(str(trained))
    return folder


def run(config: ConfigDict, workdir: Folder, show: Show = logging.info) -> Report:
    """Do the main job: the dataset, a teacher where the log has none, a sweep, the report.

    No teacher is trained where the students learn from the dataset's own log: with
    `teacher.source = "logged"` and no `teacher.workdir`. Steps that are finished are not repeated.

    Args:
      config: that of the sweep. A teacher is trained in `teacher.workdir`, or if that is empty
        below `workdir`; with `sweep.whole_repeats` there is one per seed.
      workdir: the folder to write below.
      show: called with the name of each step as it begins, the lines on the dataset, the seconds
        of each phase, and at the end with those of all.
    """
    config = _copied(config)
    place = place_of(workdir)
    progress = Progress(show)
    checks.validate(config)
    checks.check_students(sweep_runs(config).values())
    _check_installed(config)
    is_logged = config.teacher.source == "logged"
    show("prepare")
    for line in prepare(config, progress=progress).lines:
        show(line)
    teacher = None
    if not is_logged or config.teacher.workdir:
        teacher = Trained(place_of(config.teacher.workdir or f"{place}/teacher"))
        config.teacher.workdir = str(teacher.workdir)
        for repeat in repeats(config):
            show("train_teacher")
            train_teacher(repeat, repeat.teacher.workdir, progress)
            if is_logged:
                show("log_teacher")
                with progress.phase("log_teacher"):
                    log_teacher(repeat)
    show("sweep")
    students = sweep(config, place_of(f"{place}/sweep"), progress=progress)
    show("report")
    with progress.phase("report"):
        written = report(students, output=place_of(f"{place}/report"))
    show(f"time: {progress}")
    return written._replace(teacher=teacher, students=students)


def _check_installed(config: ConfigDict) -> None:
    """Raise UserError if a config needs an extra that is not installed."""
    check_tracker(config.tracker)
    if config.sweep.search == "optuna":
        asking.check_installed()


def _copied(config: ConfigDict, teacher: Trained | Folder | None = None) -> ConfigDict:
    """Copy a config, with a teacher, and with the home folder in place of ~ in its paths."""
    copy = config.copy_and_resolve_references()
    # No shell expands ~ after a =.
    copy.data.path = ",".join(os.path.expanduser(path) for path in split_at_commas(copy.data.path))
    for section, name in _PATHS:
        if name in copy[section]:
            copy[section][name] = os.path.expanduser(copy[section][name])
    if teacher is not None:
        copy.teacher.workdir = str(_folder(teacher))
    return copy


def _folder(ranker: Trained | Folder) -> Place:
    return ranker.workdir if isinstance(ranker, Trained) else place_of(ranker)
