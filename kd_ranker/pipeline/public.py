"""The public face of the package, `import kd_ranker as kd`, for notebooks and programs.

Each function does the work of the entry point of its name, and gives an object that shows itself.
"""

import dataclasses
import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pandas as pd
from absl import logging
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.config import checks, defaults, schema
from kd_ranker.evaluation import results
from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import with_home
from kd_ranker.pipeline.remote import Place, fetched, local_folder, place_of
from kd_ranker.pipeline.trained import config_of
from kd_ranker.sources import given, given_rows

Folder = str | PathLike[str]


class Dataset(NamedTuple):
    """Requests that a program has handed over, as a dataset.

    Attributes:
      directory: the folder that keeps them.
      config: a config for them, to change and to `prepare`.
    """

    directory: Path
    config: ConfigDict

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
        columns: given_rows.Columns | None = None,
    ) -> "Dataset":
        """Makes a dataset of requests in memory.

        Args:
          requests: each a mapping from the fields of `kd.Request`, or that itself; or a DataFrame
            of these fields, a row a request; or, with `columns`, one of a row a candidate. All but
            `user_id`, `item_id` and `user_label` may be left out: then all candidates were passed,
            labels weigh 1, and there is nothing of the rest. They are split by time; or by a
            mapping, from train, validation and test to theirs.
          spec: the sizes of their features; each width but those of categories is at least 1.
          item_features: float32 [num_items, F]; None: zeros.
          item_category: int32 [num_items, I], the category ids of each item; None: there are none.
          config: rankers, training and funnel to start from; None: the defaults, and a funnel of
            the sizes that the requests have.
          directory: the folder of datasets.
          validation_share: share of the requests before those of the test.
          test_share: share of the last requests.
          columns: where a row is a candidate, the columns of the DataFrame: field -> the one that
            holds it, or those whose numbers stand side by side, `{"request_id": "session",
            "user_label": ["click", "buy"], …}`. Of the fields of `kd.Request`, `request_id`,
            `user_id`, `item_id` and `user_label` are needed; `stage` (`shown`, `passed` or
            `retrieved`) stands for `num_passed`, and without it rows with a label were shown and
            all others passed; `item_features` and `item_category` may be among them. What belongs
            to the request, or to the item, is the same in all of its rows.

        Raises:
          UserError: a field is none, is missing, has another shape than `spec` says or an id out of
            range, or a split is left without requests; rows of a request differ in what belongs to
            it.
        """
        spec = dataclasses.replace(spec, dataset=given.NAME)
        splits = dict(requests) if isinstance(requests, Mapping) else {"": requests}
        if columns is not None:
            items = given_rows.items_of(splits.values(), columns, spec)
            item_features = items.get("item_features", item_features)
            item_category = items.get("item_category", item_category)
        numbers = itertools.count()
        made = {
            split: [
                given.request_of(each, next(numbers), spec) for each in _each(of_split, columns)
            ]
            for split, of_split in splits.items()
        }
        if "" in made:
            made = given.splits_of(made[""], validation_share, test_share)
        path = given.keep(made, spec, item_features, item_category, str(directory))
        own = defaults.get_config(given.NAME)
        if config is None:
            own.funnel.update(given.funnel_of(itertools.chain(*made.values())))
        else:
            own.update({name: of for name, of in config.items() if name != "data"})
        own.data.path, own.data.dir = str(path), str(directory)
        own.data.labels = {task: task for task in spec.tasks}
        if tuple(own.tasks) != spec.tasks:
            own.tasks, own.value_weights = spec.tasks, (1.0,) * len(spec.tasks)
        return cls(path, own)


def _each(requests: Any, columns: given_rows.Columns | None) -> Iterable[Any]:
    if columns is not None:
        return given_rows.requests_of(requests, columns)
    return requests.to_dict("records") if isinstance(requests, pd.DataFrame) else requests


class Prepared(NamedTuple):
    """A dataset on disk.

    Attributes:
      directory: its folder.
      lines: what there is to know of it: of an own log, candidates used and rejected, remarks;
        epochs of training.
    """

    directory: Path
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"dataset: {self.directory}", *self.lines])

    def _repr_html_(self) -> str:
        return _as_html(str(self))


class Trained(NamedTuple):
    """The rankers that a run has trained: a teacher, a student, or the students of a sweep.

    Attributes:
      workdir: the folder of the run, or its URL.
    """

    workdir: Place

    @property
    def results(self) -> pd.DataFrame:
        """Its `results.csv`: a row a ranker, serving choice and split; see docs/concepts.md."""
        with fetched(self.workdir, with_checkpoints=False) as folder:
            return results.read_csv(folder / results.FILE)

    def __str__(self) -> str:
        return commands.results_text(self.workdir)

    def _repr_html_(self) -> str:
        return _as_html(str(self))


class Report(NamedTuple):
    """A report on disk, which a notebook shows.

    Attributes:
      answers: a sentence a dataset on what distillation saves.
      page: its page, with all figures and tables.
    """

    answers: tuple[str, ...]
    page: Place

    def __str__(self) -> str:
        return "\n".join([*self.answers, f"report: {self.page}"])

    def _repr_html_(self) -> str:
        # A page of its own, so that its styles stay within it.
        with fsspec.open(str(self.page), "rt", encoding="utf-8") as file:
            page = html.escape(file.read(), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="800" style="border: 0"></iframe>'


def _as_html(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def prepare(config: ConfigDict) -> Prepared:
    """Builds the dataset of `config.data`; one that is there already is checked and left alone.

    Raises:
      UserError: the config or the raw files are at fault.
    """
    config = _own(config)
    directory = commands.prepare_data(config)
    lines = tuple(commands.data_lines(config))
    for line in lines:
        if line.startswith("remark:"):
            logging.warning("%s", line)
    return Prepared(directory, lines)


def train_teacher(config: ConfigDict, workdir: Folder) -> Trained:
    """Trains the final ranker of `config.teacher` on user labels and measures it.

    Raises:
      UserError: the config is at fault, its dataset was not prepared, or the folder holds another
        run.
    """
    place = place_of(workdir)
    commands.train_teacher(_own(config), place)
    return Trained(place)


def log_teacher(config: ConfigDict, teacher: Trained | Folder) -> commands.Logged:
    """Scores the dataset with a teacher and writes it back with the teacher's probabilities."""
    return commands.log_teacher(_own(config, teacher))


def train(config: ConfigDict, workdir: Folder, teacher: Trained | Folder | None = None) -> Trained:
    """Trains one student and measures it.

    Args:
      config: with the way of distilling in `config.distill`.
      workdir: the folder of the run; one that was killed goes on where it stopped.
      teacher: a teacher, or the folder of its run; None for that of `config.teacher.workdir`.

    Raises:
      UserError: the config is at fault, dataset or teacher are missing, or the folder holds another
        run.
    """
    place = place_of(workdir)
    commands.train(_own(config, teacher), place)
    return Trained(place)


def sweep(
    config: ConfigDict,
    workdir: Folder,
    teacher: Trained | Folder | None = None,
    modes: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> Trained:
    """Trains a student for each combination of what is swept, and measures all of them.

    Args:
      config: what all students have in common, and what to sweep where the arguments are None.
      workdir: the folder of the run; one that was killed goes on where it stopped.
      teacher: a teacher, or the folder of its run; None for that of `config.teacher.workdir`.
      modes: values of `distill.mode`.
      weights: values of `distill.weight`.
      seeds: values of `seed`.
      axes: values of any other key that a sweep may vary, by its name:
        `{"distill.loss": ("bce", "topk")}`.

    Raises:
      UserError: as for `train`, or an axis is none.
    """
    config = _own(config, teacher)
    named = {"distill.mode": modes, "distill.weight": weights, "seed": seeds, **(axes or {})}
    for key, values in named.items():
        if values is not None:
            axis = schema.axis_of(key)
            checks.check_key(config, axis)
            schema.set_value(config, axis, values)
    place = place_of(workdir)
    commands.sweep(config, place)
    return Trained(place)


def report(*sweeps: Trained | Folder, output: Folder | None = None) -> Report:
    """Writes tables, figures and a page of what sweeps have found.

    Args:
      *sweeps: these, or the folders of their runs.
      output: the folder to write to; None for that of the first sweep.

    Raises:
      UserError: a sweep is missing or not complete, or two are too different for one report.
    """
    workdirs = [_folder(sweep) for sweep in sweeps]
    answers, page = commands.report(workdirs, place_of(output) if output else workdirs[0])
    return Report(tuple(answers), page)


def score(
    ranker: Trained | Folder,
    path: Folder,
    output: Folder | None = None,
    member: str = "",
    config: ConfigDict | None = None,
) -> Path:
    """Writes a log that training never saw with the scores of a ranker that was trained on one.

    Args:
      ranker: a teacher, a student or a sweep, or the folder of its run.
      path: of the log.
      output: the folder to write to; None takes one below `config.data.dir`.
      member: the student of a sweep; "" takes the best one on validation.
      config: how to read the log; None reads it as that of the run.

    Returns:
      The folder of the log with its new columns.

    Raises:
      UserError: the run holds no such ranker, or the log lacks what that was trained on.
    """
    workdir = _folder(ranker)
    own = _own(config or config_of(workdir))
    own.data.path = str(path)
    folder = local_folder("output", output) if output else None
    scored, lines = commands.score(own, workdir, member, folder)
    for line in lines:
        logging.info("%s", line)
    return scored.directory


def export(
    ranker: Trained | Folder,
    output: Folder,
    member: str = "",
    serve: str = "",
    items: str = "float32",
    formats: Sequence[str] = ("jax", "onnx"),
) -> Path:
    """Writes a ranker as a folder that a server can use without this package.

    Args:
      ranker: a teacher, a student or a sweep, or the folder of its run.
      output: the folder to write; it must not exist.
      member: the student of a sweep; "" takes the best one on validation.
      serve: its serving choice; "" is that of its config, of a sweep the best.
      items: the type of item embeddings: float32, bfloat16 or int8.
      formats: of the programs.

    Raises:
      UserError: the run holds no such ranker, the folder exists, or a format lacks an operation.
    """
    folder = local_folder("output", output)
    commands.export(_folder(ranker), folder, member, serve, items, formats)
    return folder


def run(config: ConfigDict, workdir: Folder) -> Report:
    """Does the main job: the dataset, a teacher where the log has none, a sweep, the report."""
    made = commands.run(_own(config), place_of(workdir))
    return Report(tuple(made.answers), made.page)


def _own(config: ConfigDict, teacher: Trained | Folder | None = None) -> ConfigDict:
    """A copy of a config, so that nobody's is changed, with a teacher."""
    own = with_home(config.copy_and_resolve_references())
    if teacher is not None:
        own.teacher.workdir = str(_folder(teacher))
    return own


def _folder(of: Trained | Folder) -> Place:
    return of.workdir if isinstance(of, Trained) else place_of(of)
