"""Scores of trained rankers for a dataset (`log_teacher`) or for another log (`score`)."""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.config import checks
from kd_ranker.errors import UserError
from kd_ranker.pipeline import cluster, trained
from kd_ranker.pipeline.datasets import (
    SCORES_FOLDER,
    candidates_line,
    current_dataset,
    dataset_of,
    scores_folder,
)
from kd_ranker.pipeline.remote import Place, fetched, local_folder
from kd_ranker.pipeline.teachers import load_teacher
from kd_ranker.requests.columns import columns_of_block
from kd_ranker.requests.pool import Runner, open_pool
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.teacher_scores import write_column
from kd_ranker.serving import score
from kd_ranker.serving.score import How, Part, Requests, TrainedRanker
from kd_ranker.sources.logs import unseen
from kd_ranker.sources.logs.encode import encode_requests
from kd_ranker.sources.logs.files import SQL, Log
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.ordered import Piece
from kd_ranker.sources.logs.source import MANIFEST
from kd_ranker.sources.logs.unseen import Settled, Unseen
from kd_ranker.sources.logs.vocabulary import read_requests_of, read_vocabulary, requests_of_piece
from kd_ranker.training.recipes import TEACHER_STAGES

# The number of batches in a part of a dataset, raised where a split would have more than the
# largest number of parts.
_BATCHES = 64
_MOST_PARTS = 256


class Scored(NamedTuple):
    """The scores of a ranker as a table in Parquet files, see `serving.score`.

    Attributes:
      directory: the folder of the files.
      columns: the names of the columns.
    """

    directory: Path
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"scores: {self.directory}\ntheir columns: {', '.join(self.columns)}"


def score_dataset(config: ConfigDict) -> Scored:
    """Write the probabilities of a teacher for the candidates of its dataset.

    Training requests get those of the candidates of `config.teacher.stage`, all others those of
    every candidate. They are written as a table, and as the column that students learn from.

    Args:
      config: a valid config; `config.teacher.workdir` names the teacher.

    Raises:
      UserError: dataset or teacher are missing, the dataset was not built from this log, or another
        process writes the same scores.
    """
    dataset = current_dataset(config)
    ranker = _teacher_of(config, dataset)
    output = scores_folder(config, ranker.version)
    requests = _of_dataset(config, dataset)
    reopen = functools.partial(_teacher_elsewhere, config.to_json())
    names = [f"probability_{task}" for task in dataset.spec.tasks]

    def write_columns(paths: Sequence[Path]) -> None:
        for split in SPLITS:
            parts = zip(paths, requests.parts, strict=True)
            tables = (pq.read_table(path) for path, (name, *_) in parts if name == split)
            of_split = (np.stack([table[name] for name in names], axis=1) for table in tables)
            columns = dataset.columns[split]
            scored = columns.counts.reached(_stage(config.teacher.stage, split))
            write_column(output, split, columns, scored, of_split)

    score.score(
        ranker,
        lambda work: requests,
        _how(config, reopen),
        output,
        [config.teacher.stage, _BATCHES, _MOST_PARTS],
        write_columns,
        replaces=True,  # with other value weights, for example
    )
    return Scored(output, tuple(score.columns_of(ranker)))


def _teacher_of(config: ConfigDict, dataset: Dataset) -> TrainedRanker:
    teacher = load_teacher(config, dataset)
    name = f"the teacher at {config.teacher.workdir}"
    return TrainedRanker(name, "teacher", teacher.ranker, "user", teacher.version, dataset)


@functools.lru_cache(maxsize=1)
def _teacher_elsewhere(text: str) -> TrainedRanker:
    """Open a teacher and its dataset once per process; `text` is the config as JSON."""
    config = ConfigDict(json.loads(text))
    cluster.register(config.registered_by)
    return _teacher_of(config, dataset_of(config))


def _stage(name: str, split: str) -> Stage:
    """Return the stage of the candidates of a split that a teacher scores."""
    return TEACHER_STAGES[name] if split == "train" else Stage.RETRIEVED


def _of_dataset(config: ConfigDict, dataset: Dataset) -> Requests:
    """Return the requests of a dataset, in parts that do not depend on the machine."""
    numbers = {split: len(dataset.columns[split]) for split in SPLITS}
    manifest = dataset.directory / MANIFEST
    files: Sequence[str] = SPLITS
    if manifest.exists():
        files = list(json.loads(manifest.read_text()))
    most = max(int(dataset.columns[split].counts.retrieved.max()) for split in SPLITS)
    return Requests(
        parts=[
            (split, *span)
            for split, number in numbers.items()
            for span in spans_of(number, config.evaluation.requests)
        ],
        read=functools.partial(_read_dataset, config.teacher.stage),
        files=_names_like([SQL] if SQL in files else files),
        candidates=most,
    )


def _names_like(files: Sequence[str]) -> list[str]:
    """Return the name of the scores of each file of a log, or of each split: its number and name.

    >>> _names_like(["s3://logs/day=1/a.parquet", "s3://logs/day=2/a.parquet"])
    ['00000-a.parquet', '00001-a.parquet']
    """
    return [f"{number:05d}-{Path(file).stem}.parquet" for number, file in enumerate(files)]


def spans_of(number: int, batch: int) -> list[tuple[int, int]]:
    """Cut a number of requests into spans of whole batches: those of one pass over all."""
    size = batch * max(_BATCHES, -(-number // (batch * _MOST_PARTS)))
    return [(start, min(start + size, number)) for start in range(0, number, size)]


def _read_dataset(stage: str, ranker: TrainedRanker, split: str, start: int, stop: int) -> Part:
    dataset, numbers = ranker.dataset, np.arange(start, stop)
    columns = dataset.columns[split]
    counts = columns.counts.of(slice(start, stop))
    request = pa.array(counts.request_id)
    file = np.full(len(numbers), SPLITS.index(split), np.int32)
    item_names = None
    if (dataset.directory / MANIFEST).exists():
        names = read_requests_of(dataset.directory, split)
        request = names["request"].combine_chunks()[start:stop]
        file = names["file"].to_numpy()[start:stop]
        item_names = read_vocabulary(dataset.directory, "item")
    scored = counts.reached(_stage(stage, split))
    return Part(columns, numbers, scored, request, file, item_names, dataset.items)


def score_unseen(
    config: ConfigDict,
    workdir: Place,
    member: str = "",
    output: Path | None = None,
    trust: bool = False,
) -> tuple[Scored, list[str]]:
    """Write the scores of the ranker in a workdir for the log at `config.data.path`.

    The log is read with the ids, means and deviations of the training log.

    Args:
      config: the run's own with another `data.path`, or one with the same features and tasks.
      workdir: of a teacher, a student or a sweep.
      member: of a sweep; "" takes the best one on validation.
      output: the folder to write to; None takes one below `config.data.dir`.
      trust: whether a file that the run's config names may be executed, see `trained.config_of`.

    Returns:
      The scores, and lines on the ranker and the candidates.

    Raises:
      UserError: the workdir holds no finished ranker that was trained on a log, its dataset is
        gone, or the log lacks a column that training had.
    """
    if config.launcher == "ray":
        workdir = local_folder("--workdir", workdir, "is read by all machines of launcher='ray'")
    with fetched(workdir) as folder:
        run = trained.config_of(folder, trust)
        for name in (run.data.name, config.data.name):
            if name != "parquet":
                raise UserError(
                    f"{workdir} and the config have to be of a log (data.name='parquet'), and one "
                    f"is of {name}; experiments.log_teacher scores the requests of every dataset"
                )
        # One device scores, however many were used for training.
        devices = config.parallel.devices or config.parallel.members or 1
        checks.validate(config, devices)
        layout, run_layout = (read_layout(of.data, of.tasks, of.funnel) for of in (config, run))
        log, layout = unseen.open_unseen(layout, run_layout)
        reopen = functools.partial(
            trained.cached_ranker_of, folder, str(config.data.dir), member, trust
        )
        ranker = trained.ranker_of(*reopen.args)
        ranker = ranker._replace(name=ranker.name.replace(str(folder), str(workdir)))
        dataset = ranker.dataset
        settled = unseen.settled_by(run_layout, dataset.spec, dataset.directory)
        how, inputs = _how(config, reopen), _inputs_of(log, layout)
        output = output or _usual_output(config, ranker, how, inputs)
        if output.resolve().is_relative_to(Path(layout.path).resolve()):
            raise UserError(
                f"{output} is inside the log and would become a part of it; give another --out"
            )
        counts = score.score(
            ranker,
            functools.partial(_of_log, log, layout, settled, dataset),
            how,
            output,
            inputs,
        )
    scored = Scored(output, tuple(score.columns_of(ranker)))
    lines = [trained.ranker_line(ranker.name, ranker.serve), *_unseen_lines(Unseen([], *counts))]
    return scored, lines


def _inputs_of(log: Log, layout: LogLayout) -> list[Any]:
    """Return all that the requests of a log depend on."""
    return [
        *(log.manifest, repr(layout.features), layout.columns),
        *(layout.by_request, layout.units_per_second, layout.retrieved),
    ]


def _usual_output(config: ConfigDict, ranker: TrainedRanker, how: How, inputs: Any) -> Path:
    digest = score.made_of_scores(ranker, how, inputs)["scores"]
    name = f"{ranker.dataset.directory.parent.name}-{ranker.role}-{ranker.version}-{digest}"
    return Path(config.data.dir) / SCORES_FOLDER / name


def _of_log(
    log: Log, layout: LogLayout, settled: Settled, dataset: Dataset, work: Path
) -> Requests:
    """Read a log as requests into a folder, unless an earlier run has done so."""
    folder, unfinished = work / "read", work / "unfinished"
    if not folder.exists():
        unfinished.mkdir(parents=True)
        unseen.read_unseen(log, layout, settled, dataset.items, unfinished)
        unfinished.rename(folder)
    read = unseen.load_unseen(folder)
    return Requests(
        parts=[(piece,) for piece in read.pieces],
        read=functools.partial(_read_log, layout, folder),
        files=_names_like(log.files or [SQL]),
        candidates=read.largest,
        counts=read[1:],
    )


def _read_log(layout: LogLayout, folder: Path, ranker: TrainedRanker, piece: Piece) -> Part:
    (block,) = encode_requests(layout, folder, piece)
    columns = columns_of_block(block, ranker.dataset.spec)
    names = requests_of_piece(folder, piece)
    return Part(
        columns=columns,
        numbers=np.arange(len(columns)),
        scored=columns.counts.retrieved,
        request=names["request"].combine_chunks(),
        file=names["file"].to_numpy(),
        item_names=unseen.load_item_names(folder),
        items=unseen.load_items(folder),
    )


def _unseen_lines(read: Unseen) -> list[str]:
    """The lines on a scored log: its candidates, and how many have values unknown to training."""
    unknown = (
        f"{number:,} candidates ({number / read.used:.1%}) by their {name}"
        for name, number in read.new.items()
    )
    candidates = candidates_line(read.used, "scored", read.rejected)
    return [candidates, f"unknown to training: {', '.join(unknown)}"]


def _how(config: ConfigDict, reopen: Any) -> How:
    """Return the way to score: here, in `data.processes` of this machine, or on a cluster."""
    runner: contextlib.AbstractContextManager[Runner]
    if config.launcher == "ray":
        runner = cluster.open_cluster(config)
    else:
        runner = open_pool(config.data.processes)
    elsewhere = config.launcher == "ray" or config.data.processes > 1
    weights, requests = tuple(config.value_weights), config.evaluation.requests
    return How(weights, requests, runner, reopen if elsewhere else None)
