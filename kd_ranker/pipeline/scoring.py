"""Scoring a dataset with a teacher: in shards, by several processes, resumably."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.config.identity import dataset_name
from kd_ranker.config.registered import register
from kd_ranker.errors import UserError
from kd_ranker.pipeline.teachers import Teacher, dataset_of, load_teacher
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset, read_split
from kd_ranker.requests.request import Request
from kd_ranker.serving.score import probabilities
from kd_ranker.training.recipes import TEACHER_STAGES

# Batches that a shard of a scored copy has, unless a split then had more than so many shards: who
# reads it holds a file open for each.
_BATCHES = 64
_MOST_SHARDS = 256


def scored_requests(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Teacher,
    split: str,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Request]:
    """The requests of a split with the teacher's probabilities in place of the logged ones.

    Training requests get the probabilities of what `config.teacher.stage` names, those that models
    are measured on the ones of all candidates.

    Args:
      config: names the stage, and how many requests are scored at a time.
      dataset: the dataset.
      teacher: the teacher.
      split: one of `SPLITS`.
      start: the number of the first request; if it is a multiple of `config.evaluation.requests`,
        requests are scored with the same ones beside them as in one pass over the split.
      stop: the number of the one behind the last; None for all.
    """
    stage = TEACHER_STAGES[config.teacher.stage] if split == "train" else Stage.RETRIEVED
    ranker, items = teacher.ranker, jax.device_put(dataset.items)
    size = config.evaluation.requests
    number_of_requests, read = read_split(dataset, split)
    stop = number_of_requests if stop is None else stop
    requests = map(read, range(start, stop))
    for request, scored in probabilities(
        *(ranker, "user", requests, items, dataset.spec, size, config.funnel.retrieved)
    ):
        number = request.num_reached(stage)
        yield dataclasses.replace(
            request,
            teacher_probability=scored[:number],
            teacher_weight=np.ones(number, np.float32),
            teacher_version=teacher.version,
        )


def scoring_shards(
    config: ConfigDict, dataset: Dataset, teacher: Teacher, is_elsewhere: bool, split: str
) -> list[Callable[[], Iterator[Request]]]:
    """`scored_requests` in parts, for `Source.shards`.

    How they are cut depends on the dataset and on `config.evaluation.requests` alone. Those
    that are scored elsewhere, in other processes, open the dataset and load the teacher there.
    """
    number = dataset.builder.info.splits[split].num_examples
    batch = config.evaluation.requests
    # Whole batches, so that the numbers are those of one pass, to the last bit.
    size = batch * max(_BATCHES, -(-number // (batch * _MOST_SHARDS)))
    score: Callable[..., Iterator[Request]] = (
        functools.partial(scored_elsewhere, config.to_json(), teacher.version)
        if is_elsewhere
        else functools.partial(scored_requests, config, dataset, teacher)
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
      stop: the number of the one behind the last.

    Raises:
      UserError: there is another teacher now.
    """
    opened, dataset, teacher = _opened(config)
    if teacher.version != version:
        raise UserError(
            f"the teacher at {opened.teacher.workdir} has changed while it scored; run this again"
        )
    return scored_requests(opened, dataset, teacher, split, start, stop)


@functools.lru_cache(maxsize=1)
def _opened(config: str) -> tuple[ConfigDict, Dataset, Teacher]:
    opened = ConfigDict(json.loads(config))
    register(opened.registered_by)
    dataset = dataset_of(opened)
    return opened, dataset, load_teacher(opened, dataset)


def scoring_folder(config: ConfigDict, dataset: Dataset, teacher: Teacher) -> Path:
    """The folder that keeps the shards of a scored copy until it is whole, for `Source.resume`.

    Its name holds a digest of all that decides their bytes: how they are cut, the files of the
    dataset, and the releases that score and write.
    """
    made_of: Sequence[object] = (
        storage.FORMAT_VERSION,
        (config.evaluation.requests, _BATCHES, _MOST_SHARDS),
        dataset.identity["dataset"],
        [metadata.version(package) for package in ("kd_ranker", "jax")],
    )
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    return Path(config.data.dir) / f".scoring-{dataset_name(config, teacher.version)}" / digest
