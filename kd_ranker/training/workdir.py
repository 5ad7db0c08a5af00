"""The files of a run, apart from its checkpoints: its config and its metrics."""

import contextlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.errors import UserError
from kd_ranker.manifest import Provenance, write_whole
from kd_ranker.tracking.tracker import Tracker
from kd_ranker.training.processes import is_first, on_first

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SPEED_FILE = "speed.jsonl"
ENVIRONMENT_FILE = "environment.json"
START_FILE = "warm_start.json"
_PACKAGES = ("kd_ranker", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, even if the process dies; text as UTF-8.

    If several processes train as one, the first writes the file and the others wait for it.
    """
    on_first(lambda: write_whole(path, content))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the object in a JSON file; UserError, which ends with `remedy`, if it is damaged."""
    try:
        parsed = json.loads(path.read_bytes())
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, IsADirectoryError) as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error
    return parsed


def read_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`; raise UserError if the file is damaged."""
    remedy = "restore it, or use another --workdir"
    return ConfigDict(_with_tuples(read_json(workdir / CONFIG_FILE, remedy)))


def _with_tuples(value: Any) -> Any:
    """Replace lists of JSON by tuples, because flags cannot set lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(element) for key, element in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def values_by_key(config: ConfigDict, without: Sequence[str] = ()) -> dict[str, object]:
    """Return the values of a config, as JSON, by keys such as `train.steps`.

    Keys and sections in `without` are left out.
    """
    left_out = tuple(f"{other}." for other in without)
    values = flatten_dict(json.loads(config.to_json()), sep=".")
    return {key: value for key, value in values.items() if not f"{key}.".startswith(left_out)}


def read_environment(workdir: Path) -> dict[str, Any]:
    """Return the content of `environment.json`; empty without one."""
    path = workdir / ENVIRONMENT_FILE
    remedy = "remove it: it only records how the run was started"
    return read_json(path, remedy) if path.exists() else {}


def check(
    workdir: Path,
    command: str,
    config: ConfigDict,
    dataset: Provenance,
    without: Sequence[str] = (),
) -> None:
    """Check that `workdir` is free or holds a run of this command, config and dataset.

    Keys and sections in `without` may differ.

    Raises:
      UserError: it holds a run of another one, which the message names, or a file is damaged.
    """
    if not (workdir / CONFIG_FILE).exists():
        return
    owner = read_environment(workdir).get("command", command)
    if owner != command:
        raise UserError(f"{workdir} belongs to a run of {owner}; use another --workdir")
    before = values_by_key(read_config(workdir), without)
    now = values_by_key(config, without)
    if differing := manifest.differences(before, now):
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir or set back: "
            f"{differing}"
        )
    check_dataset(workdir, dataset)


def check_dataset(workdir: Path, dataset: Provenance) -> None:
    """Raise UserError if the run in `workdir` uses a dataset of another digest."""
    present = dataset["dataset"]
    recorded = read_environment(workdir).get("dataset", present)
    if recorded != present:
        raise UserError(
            f"{workdir} holds a run on the dataset {recorded}, and data.dir holds {present}, which "
            "has other content; name the data.dir of the first one, or use another --workdir"
        )


def write_config(workdir: Path, command: str, config: ConfigDict, dataset: Provenance) -> None:
    """Write `config.json`, and the environment of the run to `environment.json`."""
    devices = jax.devices()
    environment = {
        "command": command,
        "dataset": dataset["dataset"],
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    write_atomically(workdir / CONFIG_FILE, config.to_json(indent=2, sort_keys=True))
    write_atomically(workdir / ENVIRONMENT_FILE, json.dumps(environment, indent=2))


def write_start(workdir: Path, before: str, version: str, needs_scores: bool) -> None:
    """Record the ranker that the training in `workdir` starts from.

    Args:
      workdir: the folder of the run.
      before: the workdir of that ranker.
      version: its exact weights.
      needs_scores: whether these need the final ranker's scores.
    """
    content = {"workdir": before, "version": version, "needs_scores": needs_scores}
    write_atomically(workdir / START_FILE, json.dumps(content, indent=2))


def started_with_scores(workdir: Path, config: ConfigDict) -> bool:
    """Return True if the training in `workdir` started from a ranker that needs scores.

    True as well if it started from one and did not record it, as in an earlier release: then it is
    no baseline without scores.
    """
    if not config.train.warm_start:
        return False
    path = workdir / START_FILE
    if not path.exists():
        return True
    start = read_json(path, "remove it: its students then count as trained with scores")
    return bool(start.get("needs_scores", True))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the scalars of each line of a `metrics.jsonl`, except those of a line cut short."""
    scalars = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            scalars.append(json.loads(line))
    return scalars


class MetricsWriter:
    """Writer of scalars to files of lines and to a tracker, on process 0 only.

    `metrics.jsonl` has those that depend on the run alone: the same seed gives the same file.
    `speed.jsonl` has those that depend on the machine and its hour.
    """

    def __init__(self, workdir: Path, start: int, tracker: Tracker):
        """Open the files for a run that resumes after step `start`, and discard later lines."""
        self._path = workdir / METRICS_FILE
        self._speed = workdir / SPEED_FILE
        for path in (self._path, self._speed):
            lines = read_metrics(path) if path.exists() else []
            earlier = [f"{json.dumps(scalars)}\n" for scalars in lines if scalars["step"] <= start]
            write_atomically(path, "".join(earlier))
        self._tracker = tracker
        tracker.begin(workdir, start)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append a line with the scalars of a step to `metrics.jsonl`."""
        self._append(self._path, step, scalars)

    def write_speed(self, step: int, scalars: dict[str, float]) -> None:
        """Append a line with the scalars of the time until a step to `speed.jsonl`."""
        self._append(self._speed, step, scalars)

    def _append(self, path: Path, step: int, scalars: dict[str, float]) -> None:
        if not is_first() or not scalars:
            return
        with path.open("a") as file:
            file.write(f"{json.dumps({'step': step, **scalars})}\n")
        self._tracker.write(step, scalars)

    def close(self) -> None:
        """Tell the tracker that no further scalars come from this folder."""
        self._tracker.end()
