"""Scores of trained rankers, added to the candidates of a dataset or of another log.

Both are written in shards, by several processes or machines, and resume after a kill.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.config import checks
from kd_ranker.errors import UserError
from kd_ranker.pipeline import cluster, trained
from kd_ranker.pipeline.datasets import LOG_TEACHER, candidates_line, dataset_name, dataset_of
from kd_ranker.pipeline.remote import Place, fetched, local_folder
from kd_ranker.pipeline.teachers import Teacher, load_teacher
from kd_ranker.requests import storage
from kd_ranker.requests.pool import Runner, open_pool
from kd_ranker.requests.records import Dataset, read_split
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.serving.score import probabilities, score_log
from kd_ranker.sources.logs import unseen
from kd_ranker.sources.logs.layout import read_layout
from kd_ranker.sources.logs.unseen import Unseen
from kd_ranker.sources.logs.write_back import Scored
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training.recipes import TEACHER_STAGES

# The number of batches in a shard, raised where a split would have more than the largest number of
# shards: a reader holds a file open for each.
_BATCHES = 64
_MOST_SHARDS = 256


class Logged(NamedTuple):
    """The files that `log_teacher` has written.

    Attributes:
      dataset: the folder of the copy of the dataset that holds the probabilities.
      log: the user's own log with the teacher's columns added; None for a dataset without one.
    """

    dataset: Path
    log: Scored | None

    def __str__(self) -> str:
        return "\n".join([f"dataset: {self.dataset}", *(log_lines(self.log) if self.log else ())])


def log_lines(scored: Scored) -> list[str]:
    """The lines on a log that was written with scores."""
    return [f"scored log: {scored.directory}", f"its new columns: {', '.join(scored.columns)}"]


def score_dataset(config: ConfigDict) -> Logged:
    """Write a copy of the dataset, and of its log, with the probabilities of a teacher.

    Args:
      config: a valid config; `config.teacher.workdir` names the teacher.

    Raises:
      UserError: dataset or teacher are missing, the dataset was not built from this log, or another
        process writes the same copy.
    """
    scorer = _open_scorer(config)
    dataset, version = scorer.dataset, scorer.teacher.version
    name = dataset_name(config, version)
    entry, log = SOURCES[config.data.name], None
    if entry.open_scored_log:
        # First, because it may refuse the log, and scoring takes long.
        log = entry.open_scored_log(
            config.data, config.tasks, config.funnel, dataset.directory, name
        )
    if (copy := storage.directory_of(name, config.data.dir)).exists():
        storage.check_whole(copy, LOG_TEACHER)
    splits = dataset.builder.info.splits
    spec = dataclasses.replace(dataset.spec, teacher_version=version, teacher_signal="probability")
    with _open_runner(config) as run:
        source = Source(
            spec=spec,
            item_features=dataset.item_features,
            item_category=dataset.item_category,
            requests=functools.partial(scored_requests, scorer),
            num_requests={split: splits[split].num_examples for split in SPLITS},
            shards=functools.partial(scoring_shards, scorer, _runs_elsewhere(config)),
            run=run,
            resume=scoring_folder(scorer, name),
            write_beside=log.write_beside if log else None,
        )
        directory = storage.build(source, name, config.data.dir)
    return Logged(directory, log.write() if log else None)


def score_unseen(
    config: ConfigDict,
    workdir: Place,
    member: str = "",
    output: Path | None = None,
    trust: bool = False,
) -> tuple[Scored, list[str]]:
    """Write the log at `config.data.path` with the scores of the ranker in a workdir.

    The log is read with the ids, means and deviations of the training log.

    Args:
      config: the run's own with another `data.path`, or one with the same features and tasks.
      workdir: of a teacher, a student or a sweep.
      member: of a sweep; "" takes the best one on validation.
      output: the folder to write to; None takes one below `config.data.dir`.
      trust: whether a file that the run's config names may be executed, see `trained.config_of`.

    Returns:
      The scored log, and lines on the ranker and the candidates.

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
        scored, read = score_log(
            *(log, layout, settled, ranker, reopen if _runs_elsewhere(config) else None),
            *(_open_runner(config), tuple(config.value_weights), config.evaluation.requests),
            output,
        )
    return scored, [trained.ranker_line(ranker.name, ranker.serve), *_unseen_lines(read)]


def _unseen_lines(read: Unseen) -> list[str]:
    """The lines on a scored log: its candidates, and how many have values unknown to training."""
    unknown = (
        f"{number:,} candidates ({number / read.used:.1%}) by their {name}"
        for name, number in read.new.items()
    )
    candidates = candidates_line(read.used, "scored", read.rejected)
    return [candidates, f"unknown to training: {', '.join(unknown)}"]


def _runs_elsewhere(config: ConfigDict) -> bool:
    """Test whether the runner of `_open_runner` calls functions in other processes."""
    return config.launcher == "ray" or config.data.processes > 1


def _open_runner(config: ConfigDict) -> contextlib.AbstractContextManager[Runner]:
    """Open the processes that score: a cluster, or `data.processes` on this machine."""
    if config.launcher == "ray":
        return cluster.open_cluster(config)
    return open_pool(config.data.processes)


class Scorer(NamedTuple):
    """A teacher that scores its dataset.

    Attributes:
      config: names the stage to score, and the number of requests in a batch.
      dataset: the dataset.
      teacher: the teacher, trained on it.
    """

    config: ConfigDict
    dataset: Dataset
    teacher: Teacher


def _open_scorer(config: ConfigDict) -> Scorer:
    dataset = dataset_of(config)
    return Scorer(config, dataset, load_teacher(config, dataset))


def scored_requests(
    scorer: Scorer, split: str, start: int = 0, stop: int | None = None
) -> Iterator[Request]:
    """The requests of a split with the teacher's probabilities in place of the logged ones.

    Training requests get those of the candidates of `config.teacher.stage`, all others those of
    every candidate.

    Args:
      scorer: the teacher and its dataset.
      split: one of `SPLITS`.
      start: the number of the first request. At a multiple of `config.evaluation.requests`, batches
        are those of one pass over the split.
      stop: the number behind the last one; None for all.
    """
    config, dataset, teacher = scorer
    items = jax.device_put(dataset.items)
    stage = TEACHER_STAGES[config.teacher.stage] if split == "train" else Stage.RETRIEVED
    number_of_requests, read = read_split(dataset, split)
    stop = number_of_requests if stop is None else stop
    requests, size = map(read, range(start, stop)), config.evaluation.requests
    for request, scored in probabilities(
        *(teacher.ranker, "user", requests, items, dataset.spec, size, config.funnel.retrieved)
    ):
        number = request.num_reached(stage)
        yield dataclasses.replace(
            request,
            teacher_probability=scored[:number],
            teacher_weight=np.ones(number, np.float32),
            teacher_version=teacher.version,
        )


def scoring_shards(
    scorer: Scorer, is_elsewhere: bool, split: str
) -> list[Callable[[], Iterator[Request]]]:
    """`scored_requests` in parts, for `Source.shards`.

    The parts depend only on the dataset and on `config.evaluation.requests`. Other processes open
    the dataset and load the teacher themselves.
    """
    number = scorer.dataset.builder.info.splits[split].num_examples
    batch = scorer.config.evaluation.requests
    # Whole batches, so that the numbers are those of one pass, to the last bit.
    size = batch * max(_BATCHES, -(-number // (batch * _MOST_SHARDS)))
    score: Callable[..., Iterator[Request]] = (
        functools.partial(scored_elsewhere, scorer.config.to_json(), scorer.teacher.version)
        if is_elsewhere
        else functools.partial(scored_requests, scorer)
    )
    return [
        functools.partial(score, split, start, min(start + size, number))
        for start in range(0, number, size)
    ]


def scored_elsewhere(
    config: str, version: str, split: str, start: int, stop: int
) -> Iterator[Request]:
    """`scored_requests` for another process than the one that has loaded the teacher.

    Args:
      config: the config as JSON.
      version: of the teacher that is expected.
      split: one of `SPLITS`.
      start: the number of the first request.
      stop: the number behind the last one.

    Raises:
      UserError: there is another teacher now.
    """
    scorer = _opened(config)
    if scorer.teacher.version != version:
        workdir = scorer.config.teacher.workdir
        raise UserError(f"the teacher at {workdir} has changed while it scored; run this again")
    return scored_requests(scorer, split, start, stop)


@functools.lru_cache(maxsize=1)
def _opened(text: str) -> Scorer:
    config = ConfigDict(json.loads(text))
    cluster.register(config.registered_by)
    return _open_scorer(config)


def scoring_folder(scorer: Scorer, name: str) -> Path:
    """The folder that keeps the shards of a scored copy until it is whole, for `Source.resume`.

    Its name holds a digest of all that determines their bytes: how they are cut, the files of the
    dataset, and the releases that score and write.
    """
    inputs: Sequence[object] = (
        storage.FORMAT_VERSION,
        (scorer.config.evaluation.requests, _BATCHES, _MOST_SHARDS),
        scorer.dataset.identity["dataset"],
        [metadata.version(package) for package in ("kd_ranker", "jax")],
    )
    digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
    return Path(scorer.config.data.dir) / f".scoring-{name}" / digest
