"""The files of a run, apart from its checkpoints: its config and its metrics."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from kd_ranker.errors import UserError
from kd_ranker.training.processes import is_first, on_first

# The names of members, and digests of their configs, dataset and teacher.
Identity = Mapping[str, str]

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
_AGAIN = "start the command that made it again, with its flags, which rewrites it"
REMOVE_ENVIRONMENT = "remove it: it only records how the run was started"
_PACKAGES = ("kd_ranker", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, even if the process dies; text as UTF-8.

    If several processes train as one, the first writes the file and the others wait for it.
    """
    on_first(lambda: write_whole(path, content))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically from this process, without waiting for the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def values_by_key(text: str, without: Sequence[str] = ()) -> dict[str, object]:
    """Return the values of a config by keys like `train.steps`.

    Args:
      text: the config as JSON.
      without: keys, or sections, to leave out.
    """
    return {
        key: value
        for key, value in flatten_dict(json.loads(text), sep=".").items()
        if not any(f"{key}.".startswith(f"{other}.") for other in without)
    }


def check(
    workdir: Path, command: str, config: ConfigDict, dataset: Identity, without: Sequence[str] = ()
) -> None:
    """Check that `workdir` is free or contains a run of this command, config and dataset.

    Args:
      workdir: the folder of the run.
      command: the entry point that it belongs to.
      config: its config.
      dataset: the identity of its dataset.
      without: keys, or sections, that do not matter to the run and may differ.

    Raises:
      UserError: the workdir belongs to another command, config or dataset, which the message names;
        or its config is missing.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        if any((workdir / file).exists() for file in (ENVIRONMENT_FILE, METRICS_FILE)):
            raise UserError(
                f"{workdir} contains a run but {CONFIG_FILE} is missing; restore it, or use "
                "another --workdir"
            )
        return
    owner = owner_of(workdir)
    if owner not in (None, command):
        raise UserError(f"{workdir} belongs to a run of {owner}; use another --workdir")
    try:
        text = _config_text(workdir)
    except UserError as error:
        # Checkpoints and tables have their own identities.
        logging.warning("%s", str(error).replace(_AGAIN, "it is rewritten"))
        text = as_json(config)
    there, here = (values_by_key(of, without) for of in (text, as_json(config)))
    differing = [
        f"{key} ({there.get(key)!r} there, {here.get(key)!r} now)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir or set back: "
            + ", ".join(differing)
        )
    check_dataset(workdir, dataset)


def check_dataset(workdir: Path, dataset: Identity) -> None:
    """Check that the run in `workdir` uses the dataset of this identity.

    Raises:
      UserError: it uses another dataset, or other content under the same name.
    """
    here = dataset["dataset"]
    there = _environment(workdir).get("dataset", here)
    if there != here:
        raise UserError(
            f"{workdir} holds a run on the dataset {there}, and data.dir holds {here}, which has "
            "other content; name the data.dir of the first one, or use another --workdir"
        )


def claim(
    workdir: Path, command: str, config: ConfigDict, dataset: Identity, without: Sequence[str] = ()
) -> None:
    """Claim `workdir` for this run: `check`, then `write_config`.

    This replaces the config, which may differ in keys that affect only measurements.
    """
    check(workdir, command, config, dataset, without)
    write_config(workdir, command, config, dataset)


def owner_of(workdir: Path) -> str | None:
    """Return the entry point of the run in a workdir; None if it is not recorded."""
    return _environment(workdir).get("command")


def _environment(workdir: Path) -> dict[str, Any]:
    path = workdir / ENVIRONMENT_FILE
    return read_json(path, REMOVE_ENVIRONMENT) if path.exists() else {}


def _config_text(workdir: Path) -> str:
    """Return the text of `config.json`; UserError unless it is a JSON object."""
    path = workdir / CONFIG_FILE
    content = path.read_bytes()
    _parsed(content, path, _AGAIN)
    return content.decode()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
      UserError: it is damaged; the message ends with `remedy`.
    """
    return _parsed(path.read_bytes(), path, remedy)


def _parsed(content: bytes, path: Path, remedy: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
        if not isinstance(parsed, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error
    return parsed


def write_config(workdir: Path, command: str, config: ConfigDict, dataset: Identity) -> None:
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
    # In this order: `check` reports a removed config if only the second exists.
    write_atomically(workdir / CONFIG_FILE, as_json(config))
    write_atomically(workdir / ENVIRONMENT_FILE, json.dumps(environment, indent=2))


def as_json(config: ConfigDict) -> str:
    """Return a config as the text of `config.json`."""
    return config.to_json(indent=2, sort_keys=True)


def read_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`.

    Raises:
      UserError: the file is damaged.
    """
    return ConfigDict(_with_tuples(json.loads(_config_text(workdir))))


def _with_tuples(value: Any) -> Any:
    """Replace lists of JSON by tuples, because flags cannot set lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(of) for key, of in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the scalars of each line of a `metrics.jsonl`, with its `step`.

    The last line may be cut short if a run was killed. Other damaged lines cause a warning.
    """
    scalars, damaged = [], []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            of_line = json.loads(line)
            int(of_line["step"])
            scalars.append(of_line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines) or line.endswith("}"):
                damaged.append(str(number))
    if damaged:
        logging.warning("%s: left out the damaged lines %s", path, ", ".join(damaged))
    return scalars


def _line(scalars: Mapping[str, float]) -> str:
    return json.dumps(scalars) + "\n"


class MetricsWriter:
    """Writer of scalars to `metrics.jsonl` and to TensorBoard event files.

    A resumed run discards lines that an earlier one wrote after the step of the checkpoint.
    """

    def __init__(self, workdir: Path, start: int):
        """Open both files for a run that resumes after step `start`."""
        self._path = workdir / METRICS_FILE
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = (_line(scalars) for scalars in lines if scalars["step"] <= start)
        write_atomically(self._path, "".join(kept))
        # Without the thread of a `SummaryWriter`: on a full disk that would die with a trace, and
        # its queue would fill up.
        self._events = EventsWriter(str(workdir / "events")) if is_first() else None
        if self._events is not None:
            # TensorBoard then hides events that an earlier run wrote from this step.
            session = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=start + 1, session_log=session))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one line with the scalars of a step, in one write, on process 0 only."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(_line({"step": step, **scalars}))
        for name, value in scalars.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        if self._events is not None:
            self._events.close()
