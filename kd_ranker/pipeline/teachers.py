"""The teacher that students follow: finding it, and scoring a dataset with it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch
from kd_ranker.batches import cutting, loader
from kd_ranker.batches.columns import columns_of
from kd_ranker.config import identity
from kd_ranker.config.identity import dataset_name
from kd_ranker.distillation.losses import LOSSES, NEEDS_PROBABILITIES
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.errors import UserError
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.models.model import Model, Parameters
from kd_ranker.requests import storage
from kd_ranker.requests.request import Request
from kd_ranker.requests.storage import Dataset
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.step import select_member

_SAME_FLAGS = "with the same --config flags"
PREPARE_DATA = f"python -m experiments.prepare_data, {_SAME_FLAGS}"
TRAIN_TEACHER = f"python -m experiments.train_teacher, {_SAME_FLAGS}"
LOG_TEACHER = f"python -m experiments.log_teacher, {_SAME_FLAGS}"

# Batches that a shard of a scored copy has, unless a split then had more than so many shards: who
# reads it holds a file open for each.
_BATCHES = 64
_MOST_SHARDS = 256


class Teacher(NamedTuple):
    """A trained final ranker.

    Attributes:
      model: what is fixed about it.
      parameters: what it learned, on a device.
      ranker: the same as the evaluation sees it.
      version: a name for its exact weights.
      seed: the seed that it was trained with.
      step: its last step.
    """

    model: Model
    parameters: Parameters
    ranker: Ranker
    version: str
    seed: int
    step: int


def open_dataset(config: ConfigDict, teacher_version: str = "") -> Dataset:
    """The config's dataset, or the copy that a teacher has scored.

    Raises:
      UserError: it was not built.
    """
    return storage.open_dataset(
        dataset_name(config, teacher_version),
        config.data.dir,
        made_by=LOG_TEACHER if teacher_version else PREPARE_DATA,
    )


def teacher_and_dataset(config: ConfigDict) -> tuple[Teacher | None, Dataset]:
    """The teacher that a student follows, and the dataset that it learns from.

    With `teacher.source = "logged"` the probabilities come with the dataset: from the teacher in
    `teacher.workdir`, or, if that is empty, from the dataset's own logs, and then there is no
    teacher to return.

    Raises:
      UserError: the teacher or the dataset is missing, or the dataset holds no probabilities.
    """
    dataset = open_dataset(config)
    if config.teacher.source == "live" or config.teacher.workdir:
        teacher = load_teacher(config, dataset)
        logged = config.teacher.source == "logged"
        return teacher, open_dataset(config, teacher.version) if logged else dataset
    if not dataset.spec.teacher_version:
        raise UserError(
            f"{config.data.name} holds no teacher probabilities; name a teacher in teacher.workdir "
            f"and make them with: {LOG_TEACHER}"
        )
    return None, dataset


def check_losses(config: ConfigDict, dataset: Dataset, members: Iterable[ConfigDict]) -> None:
    """Raises UserError for a loss that a log of positions cannot serve.

    Args:
      config: what the members have in common.
      dataset: the one that they learn from.
      members: the configs of the students to train.
    """
    if config.teacher.source == "live" or dataset.spec.teacher_signal == "probability":
        return
    for member in members:
        loss, mode = member.distill.loss, MODES[member.distill.mode]
        if mode.teacher_logits is not None and loss in NEEDS_PROBABILITIES:
            others = sorted(LOSSES.keys() - NEEDS_PROBABILITIES)
            choices = [*(f"distill.loss={name}" for name in others), "distill.mode=none"]
            raise UserError(
                f"distill.loss={loss} needs the teacher's probabilities, and the log of "
                f"{config.data.name} holds its positions; choose one of: {', '.join(choices)}"
            )


def load_teacher(config: ConfigDict, dataset: Dataset) -> Teacher:
    """The trained teacher in `config.teacher.workdir`.

    Raises:
      UserError: there is none, it is not done, or it was trained for other tasks or other data, or
        by another config than lies beside it.
    """
    if not config.teacher.workdir:
        raise UserError(
            f"teacher.workdir is empty; make a teacher with: {TRAIN_TEACHER}, and name its workdir"
        )
    workdir = Path(config.teacher.workdir)
    if not (workdir / workdirs.CONFIG_FILE).exists():
        raise UserError(f"no teacher at {workdir}; make it with: {TRAIN_TEACHER}")
    trained = workdirs.read_config(workdir)
    there, here = dataset_name(trained), dataset_name(config)
    if there != here:
        raise UserError(
            f"the teacher at {workdir} was trained on {there} for {', '.join(trained.tasks)}, not "
            f"on {here} for {', '.join(config.tasks)}; make one with: {TRAIN_TEACHER}"
        )
    group = recipes.teacher_group(trained, dataset.spec)
    with checkpoints.open_manager(workdir) as manager:
        abstract = (jax.eval_shape(group.init),)
        (state,), step = checkpoints.restore(
            manager, abstract, None, identity.of_teacher(trained, dataset.identity)
        )
    if step < trained.teacher.train.steps:
        raise UserError(
            f"the teacher at {workdir} stopped at step {step} of {trained.teacher.train.steps}; "
            f"finish it with: {TRAIN_TEACHER}"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.parameters)):
        raise UserError(
            f"the teacher at {workdir} holds numbers that are not finite; train another one, with "
            "a smaller learning rate"
        )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state.parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    learned = select_member(state.parameters, 0)
    tables = without_slots(group.recipe.model.embedding, learned.tables)
    parameters = jax.device_put(learned.replace(tables=tables))
    return Teacher(
        model=group.recipe.model,
        parameters=parameters,
        ranker=Ranker(make_serve(group.recipe.model, MODES["none"]), parameters),
        version=digest.hexdigest()[:12],
        seed=trained.seed,
        step=step,
    )


def scored_requests(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Teacher,
    split: str,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Request]:
    """The requests of a split with the teacher's probabilities in place of the logged ones.

    Training requests get the probabilities of what `config.teacher.stage` names, test requests
    those of all candidates.

    Args:
      config: names the stage, and how many requests are scored at a time.
      dataset: the dataset.
      teacher: the teacher.
      split: "train" or "test".
      start: the number of the first request; if it is a multiple of `config.evaluation.requests`,
        requests are scored with the same ones beside them as in one pass over the split.
      stop: the number of the one behind the last; None for all.
    """
    everywhere = split == "test" or config.teacher.stage == "retrieved"
    ranker, items = teacher.ranker, jax.device_put(dataset.items)
    size = config.evaluation.requests
    records, decode = loader.read_split(dataset, split, with_true_probability=True)
    stop = len(records) if stop is None else stop
    for first in range(start, stop, size):
        chunk = [decode(records[number]) for number in range(first, min(first + size, stop))]
        # A last chunk of another size would compile once more.
        filled = chunk + [chunk[-1]] * (size - len(chunk))
        fields = cutting.full_fields(columns_of(filled, dataset.spec), config.funnel.retrieved)
        batch = CandidateBatch(**fields)
        served = ranker.serve(ranker.parameters, batch, items)
        (probability,) = served.probability.values()
        for request, scored in zip(chunk, np.asarray(probability), strict=False):
            number = len(request.item_id) if everywhere else request.num_passed
            yield dataclasses.replace(
                request,
                teacher_probability=scored[:number],
                teacher_weight=np.ones(number, np.float32),
                teacher_version=teacher.version,
            )


def scoring_shards(
    config: ConfigDict, dataset: Dataset, teacher: Teacher, processes: int, split: str
) -> list[Callable[[], Iterator[Request]]]:
    """`scored_requests` in parts, for `Source.shards`.

    How they are cut depends on the dataset and on `config.evaluation.requests` alone. With several
    processes, each opens the dataset and loads the teacher itself.
    """
    number = dataset.builder.info.splits[split].num_examples
    batch = config.evaluation.requests
    # Whole batches, so that the numbers are those of one pass, to the last bit.
    size = batch * max(_BATCHES, -(-number // (batch * _MOST_SHARDS)))
    score: Callable[..., Iterator[Request]] = (
        functools.partial(scored_requests, config, dataset, teacher)
        if processes == 1
        else functools.partial(scored_elsewhere, config.to_json(), teacher.version)
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
      split: "train" or "test".
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
    dataset = open_dataset(opened)
    return opened, dataset, load_teacher(opened, dataset)


def scoring_folder(config: ConfigDict, dataset: Dataset, teacher: Teacher) -> Path:
    """Where the shards of a scored copy are kept until it is whole, for `Source.resume`.

    Its name holds a hash over what decides their bytes: how they are cut, the files of the dataset
    (of which one that was made anew has younger ones), and the releases of what scores and writes.
    """
    made_of: Sequence[object] = (
        storage.FORMAT_VERSION,
        (config.evaluation.requests, _BATCHES, _MOST_SHARDS),
        sorted(
            (path.name, path.stat().st_size, path.stat().st_mtime_ns)
            for path in dataset.directory.iterdir()
        ),
        [metadata.version(package) for package in ("kd_ranker", "jax")],
    )
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]
    return Path(config.data.dir) / f".scoring-{dataset_name(config, teacher.version)}" / digest
