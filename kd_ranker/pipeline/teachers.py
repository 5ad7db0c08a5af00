"""Trained teachers, and the datasets that students learn from under them."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.distillation.modes import MODES, Mode
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import UserError
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.policy import Policy
from kd_ranker.manifest import MadeOf
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline.datasets import LOG_TEACHER, SAME_FLAGS, dataset_name, dataset_under
from kd_ranker.pipeline.remote import fetched, place_of
from kd_ranker.requests.records import Dataset
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import put
from kd_ranker.training.recipes import Group
from kd_ranker.training.state import TrainState, select_member

TRAIN_TEACHER = f"python -m experiments.train_teacher, {SAME_FLAGS}"


class Finished(NamedTuple):
    """The ranker of a finished run.

    Attributes:
      title: a description for people.
      role: "teacher" or "student".
      member: its name in a sweep; "" elsewhere.
      config: that of its run.
      serve: which of its probabilities it ranks by.
      model: its fixed part.
      ranker: as the evaluation calls it.
      version: a name for its exact weights.
      dataset: the dataset that has its ids, means and deviations.
      made_of: the fingerprints that its checkpoint records.
      policy: chooses how many candidates it passes per request; None if none is named.
    """

    title: str
    role: str
    member: str
    config: ConfigDict
    serve: str
    model: Model
    ranker: Ranker
    version: str
    dataset: Dataset
    made_of: MadeOf
    policy: Policy | None = None

    @property
    def parameters(self) -> Parameters:
        """Its trained parameters, on a device."""
        return self.ranker.parameters

    @property
    def mode(self) -> Mode:
        """The mode that it was trained with; that of a teacher is `none`."""
        return MODES[self.config.distill.mode if self.role == "student" else "none"]


def teacher_and_dataset(config: ConfigDict, dataset: Dataset) -> tuple[Finished | None, Dataset]:
    """Open the teacher that a student follows, and the dataset that it learns from.

    With `teacher.source = "logged"` the probabilities come with the dataset: from the teacher in
    `teacher.workdir`, or, if that is empty, from the dataset's own logs, and then the teacher is
    None.

    Args:
      config: the config.
      dataset: its dataset, without a teacher's scores.

    Raises:
      UserError: the teacher or its scores are missing, or the dataset holds no probabilities.
    """
    if config.teacher.source == "live" or config.teacher.workdir:
        teacher = load_teacher(config, dataset)
        if config.teacher.source == "live":
            return teacher, dataset
        return teacher, dataset_under(config, dataset, teacher.version)
    if not dataset.spec.teacher_version:
        raise UserError(
            f"{config.data.name} holds no teacher probabilities; name a teacher in teacher.workdir "
            f"and make them with: {LOG_TEACHER}"
        )
    return None, dataset


def made_of(config: ConfigDict, dataset: Dataset) -> MadeOf:
    """The fingerprints of the teacher that a config trains on a dataset."""
    return {"config": schema.fingerprint({"": config}, "teacher"), **dataset.identity}


def load_teacher(config: ConfigDict, dataset: Dataset) -> Finished:
    """Load the trained teacher in `config.teacher.workdir`.

    Raises:
      UserError: it is missing or not finished, or it was trained for other tasks, on other data
        or with another config than that in its workdir.
    """
    if not config.teacher.workdir:
        raise UserError(
            f"teacher.workdir is empty; make a teacher with: {TRAIN_TEACHER}, and name its workdir"
        )
    with fetched(place_of(config.teacher.workdir)) as workdir:
        return _load_teacher(config, dataset, workdir)


def _load_teacher(config: ConfigDict, dataset: Dataset, workdir: Path) -> Finished:
    if not (workdir / workdirs.CONFIG_FILE).exists():
        raise UserError(f"no teacher at {workdir}; make it with: {TRAIN_TEACHER}")
    owner = workdirs.owner_of(workdir)
    if owner not in (None, "train_teacher"):
        raise UserError(
            f"{workdir} holds a run of {owner}, not a teacher; make one with: {TRAIN_TEACHER}"
        )
    trained = workdirs.read_config(workdir)
    other, own = dataset_name(trained), dataset_name(config)
    if other != own:
        raise UserError(
            f"the teacher at {workdir} was trained on {other} for {', '.join(trained.tasks)}, not "
            f"on {own} for {', '.join(config.tasks)}; make one with: {TRAIN_TEACHER}"
        )
    workdirs.check_dataset(workdir, dataset.identity)
    group, state, step = restored(trained, dataset, workdir)
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
    model, version = group.recipe.model, digest_of(state.parameters)
    parameters = put(served(model, state.parameters, jax.default_backend()))
    return Finished(
        title=f"the teacher at {config.teacher.workdir}",
        role="teacher",
        member="",
        config=trained,
        serve="user",
        model=model,
        ranker=Ranker(make_serve(model, MODES["none"]), parameters),
        version=version,
        dataset=dataset,
        made_of={**made_of(trained, dataset), "version": version},
    )


def restored(config: ConfigDict, dataset: Dataset, workdir: Path) -> tuple[Group, TrainState, int]:
    """Restore the newest checkpoint of a teacher in the folder of its run.

    Args:
      config: of the run.
      dataset: of the run.
      workdir: its folder.

    Returns:
      The teacher as a group of one, its state on the host, and its step.
    """
    group = recipes.teacher_group(config, dataset.spec)
    with checkpoints.open_in(workdir) as saved:
        abstract = (jax.eval_shape(group.init),)
        (state,), step = checkpoints.restore(saved, abstract, None, made_of(config, dataset))
    return group, state, step


def served(model: Model, parameters: Parameters, platform: str) -> Parameters:
    """The parameters of a trained model without the slots of its optimiser, for a platform."""
    learned = select_member(parameters, 0)
    # A TPU would copy narrow rows to read them, and saves no memory with these.
    lanes = TPU_LANES if platform == "tpu" else 1
    return learned.replace(tables=without_slots(model.embedding, learned.tables, lanes))


def digest_of(parameters: Parameters) -> str:
    """A name for exact weights: twelve hex digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(parameters):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:12]
