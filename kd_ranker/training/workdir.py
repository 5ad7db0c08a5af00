"""The files of a run, apart from its checkpoints: its config and its metrics."""

import json
import os
import platform
import time
import zlib
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

# The names of members, and digests of all that made them: of configs, dataset, teacher.
Identity = Mapping[str, str]

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
_CRC32 = "crc32"  # of all else in a JSON object, as its last key
_AGAIN = "start the command that made it again, with its flags, which writes it anew"
REMOVE_ENVIRONMENT = "remove it: it only tells what the run was started with"
_PACKAGES = ("kd_ranker", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is whole or absent, whenever the process dies; text as UTF-8.

    Of several processes that train as one, the first writes it, and then all go on.
    """
    on_first(lambda: write_whole(path, content))


def write_whole(path: Path, content: str | bytes) -> None:
    """`write_atomically` by this process, whatever the others do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def values_by_key(text: str, without: Sequence[str] = ()) -> dict[str, object]:
    """The values of a config by keys like `train.steps`.

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
    """Checks that `workdir` is free or holds a run of this command, config and dataset.

    Args:
      workdir: the folder of the run.
      command: the entry point that it belongs to.
      config: its config.
      dataset: the identity of its dataset.
      without: keys, or sections, that do not matter to the run and may differ.

    Raises:
      UserError: the workdir belongs to another command, config or dataset, and the message names
        the difference; or it has lost its config.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        if any((workdir / file).exists() for file in (ENVIRONMENT_FILE, METRICS_FILE)):
            raise UserError(
                f"{workdir} holds a run, and {CONFIG_FILE}, which says of what, is gone; put that "
                "back, or use another --workdir"
            )
        return
    owner = owner_of(workdir)
    if owner not in (None, command):
        raise UserError(f"{workdir} belongs to a run of {owner}; use another --workdir")
    try:
        text = _config_text(workdir)
    except UserError as error:
        # Checkpoints and tables have identities of their own.
        logging.warning("%s", str(error).replace(_AGAIN, "it is written anew"))
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
    """Checks that the run in `workdir` is one on the dataset of this identity.

    Raises:
      UserError: it is one on another dataset, or on other content under the same name.
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
    """Claims `workdir` for this run: `check`, and `write_config`.

    Replaces the config, which may differ in keys that only matter to what is measured.
    """
    check(workdir, command, config, dataset, without)
    write_config(workdir, command, config, dataset)


def owner_of(workdir: Path) -> str | None:
    """The entry point whose run a workdir holds; None where it does not say."""
    return _environment(workdir).get("command")


def _environment(workdir: Path) -> dict[str, Any]:
    path = workdir / ENVIRONMENT_FILE
    return read_json(path, REMOVE_ENVIRONMENT) if path.exists() else {}


def _config_text(workdir: Path) -> str:
    """The text of `config.json`; UserError unless it is as it was written."""
    path = workdir / CONFIG_FILE
    # Absent if environment.json was removed.
    expected = _environment(workdir).get("config_crc32")
    content = path.read_bytes()
    if expected is None:
        _parsed(content, path, _AGAIN)
    elif zlib.crc32(content) != expected:
        raise UserError(f"{path} is not as it was written; {_AGAIN}")
    return content.decode()


def with_checksum(content: Mapping[str, Any]) -> str:
    """The text of a JSON file that `read_json` can tell from a damaged one."""
    return json.dumps({**content, _CRC32: _crc32(content)}, indent=2)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The content of a JSON file, whether or not it was written `with_checksum`.

    Raises:
      UserError: it is damaged; the message ends with `remedy`.
    """
    content = _parsed(path.read_bytes(), path, remedy)
    if content.pop(_CRC32, None) not in (None, _crc32(content)):
        raise UserError(f"{path} is not as it was written; {remedy}")
    return content


def _parsed(content: bytes, path: Path, remedy: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
        if not isinstance(parsed, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from error
    return parsed


def _crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def write_config(workdir: Path, command: str, config: ConfigDict, dataset: Identity) -> None:
    """Writes `config.json`, and in `environment.json` what the run was started with."""
    devices = jax.devices()
    environment = {
        "command": command,
        "dataset": dataset["dataset"],
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "config_crc32": zlib.crc32(as_json(config).encode()),
    }
    # In this order: `check` takes the second without the first for a config that was removed.
    write_atomically(workdir / CONFIG_FILE, as_json(config))
    write_atomically(workdir / ENVIRONMENT_FILE, with_checksum(environment))


def as_json(config: ConfigDict) -> str:
    """A config as the text of `config.json`."""
    return config.to_json(indent=2, sort_keys=True)


def read_config(workdir: Path) -> ConfigDict:
    """The config that a run in `workdir` was started with.

    Raises:
      UserError: the file is damaged.
    """
    return ConfigDict(_with_tuples(json.loads(_config_text(workdir))))


def _with_tuples(value: Any) -> Any:
    """Puts tuples in place of the lists of JSON: no flag could set these."""
    if isinstance(value, dict):
        return {key: _with_tuples(of) for key, of in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The scalars of each line of a `metrics.jsonl`, with its `step`.

    The last line may be cut short, where a run was killed; of others that are damaged it warns.
    """
    scalars, damaged = [], []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            of_line = json.loads(line)
            if of_line.pop(_CRC32, None) not in (None, _crc32(of_line)):
                raise ValueError("the sum of the line is another")
            int(of_line["step"])
            scalars.append(of_line)
        except (ValueError, KeyError, TypeError, AttributeError):
            if number < len(lines) or line.endswith("}"):
                damaged.append(str(number))
    if damaged:
        logging.warning("%s: left out the damaged lines %s", path, ", ".join(damaged))
    return scalars


def _line(scalars: Mapping[str, float]) -> str:
    return json.dumps({**scalars, _CRC32: _crc32(scalars)}) + "\n"


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files.

    A resumed run takes back what an earlier one wrote after the step that it resumes from.
    """

    def __init__(self, workdir: Path, start: int):
        """Opens both files for a run that resumes after step `start`."""
        self._path = workdir / METRICS_FILE
        lines = read_metrics(self._path) if self._path.exists() else []
        kept = (_line(scalars) for scalars in lines if scalars["step"] <= start)
        write_atomically(self._path, "".join(kept))
        # Without the thread of a `SummaryWriter`: on a full disk that would die with a trace, and
        # its queue would fill up.
        self._events = EventsWriter(str(workdir / "events")) if is_first() else None
        if self._events is not None:
            # What another one wrote from this step on is not shown.
            session = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=start + 1, session_log=session))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one line with the scalars of a step, in one write; process 0 does so for all."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(_line({"step": step, **scalars}))
        for name, value in scalars.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._events is not None:
            self._events.close()
