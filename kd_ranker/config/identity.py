"""Names and identities of the datasets, teachers and students that configs make."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from kd_ranker.config.key import Influence
from kd_ranker.config.schema import without_influence
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.workdir import as_json, values_by_key

# The dataset and the teacher have separate parts in an identity.
_NAMED_APART = ("data", "teacher.workdir")
# Replaces a teacher's version if the logs are the teacher.
OF_THE_LOGS = "of the logs"


def dataset_name(config: ConfigDict, teacher_version: str = "") -> str:
    """The name of a config's dataset, or of the scores of a teacher that was trained on it.

    Args:
      config: the config.
      teacher_version: `Teacher.version`; "" names the dataset itself, with the teacher
        probabilities that were logged with it, if any.

    Returns:
      `data.name` and eight hex digits that differ where the contents would differ. The name of
      scores also contains the teacher and the stage that it has scored.
    """
    free = set(without_influence("dataset"))
    of_data, of_funnel = (
        {key: value for key, value in config[section].items() if f"{section}.{key}" not in free}
        for section in ("data", "funnel")
    )
    version = SOURCES[config.data.name].version
    text = json.dumps(
        [of_data, list(config.tasks), of_funnel, version], sort_keys=True, default=str
    )
    name = f"{config.data.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    scored_by = f"{teacher_version}-{config.teacher.stage}"
    return f"{name}-teacher-{scored_by}" if teacher_version else name


def of_teacher(config: ConfigDict, dataset: Identity) -> Identity:
    """The identity of the teacher of `config` on the dataset of this identity."""
    return {"config": _digest([config], "teacher"), **dataset}


def of_members(members: Mapping[str, ConfigDict]) -> Identity:
    """The part of the identity of students that their names and configs determine."""
    names = ", ".join(members)
    return {"members": names, "config": _digest(list(members.values()), "student")}


def of_students(members: Mapping[str, ConfigDict], dataset: Identity, teacher: str) -> Identity:
    """The identity of students, by name.

    Args:
      members: their configs, in the order in which they are trained.
      dataset: the identity of the dataset that they learn from, with the scores of a teacher.
      teacher: the version of the teacher that they are trained and measured under; "" if the
        dataset's own logs are the teacher.
    """
    return {**of_members(members), **dataset, "teacher": teacher or OF_THE_LOGS}


def _digest(configs: Sequence[ConfigDict], made: Influence) -> str:
    without = (*without_influence(made), *_NAMED_APART)
    values = [values_by_key(as_json(config), without) for config in configs]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
