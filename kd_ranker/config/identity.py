"""Names that tell apart what configs make: a dataset by all that decides its contents."""

import hashlib
import json

from ml_collections import ConfigDict

from kd_ranker.config.schema import without_influence
from kd_ranker.sources.registry import SOURCES


def dataset_name(config: ConfigDict, teacher_version: str = "") -> str:
    """The name of a config's dataset, or of the copy that a teacher trained here has scored.

    Args:
      config: the config.
      teacher_version: `Teacher.version`; "" names the dataset itself, with whatever teacher
        probabilities it was logged with.

    Returns:
      `data.name` and eight hex digits that differ where the contents would; of a scored copy, the
      teacher and the stage that it has scored as well.
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
