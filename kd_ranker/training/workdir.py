"""The files of a run, apart from its checkpoints: its config and its metrics."""

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.training.processes import is_first, on_first

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"
ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("kd_ranker", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is whole or absent, whenever the process dies; text as UTF-8.

    Of several processes that train as one, the first writes it, and then all go on.
    """
    on_first(lambda: _write(path, content))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


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


def check(workdir: Path, command: str, config: ConfigDict, without: Sequence[str] = ()) -> None:
    """Checks that `workdir` is free or holds a run of this command and config.

    Args:
      workdir: the folder of the run.
      command: the entry point that it belongs to.
      config: its config.
      without: keys, or sections, that do not matter to the run and may differ.

    Raises:
      UserError: the workdir belongs to another command, or to another config; then the message
        names the keys that differ. Or what it holds has lost the config that it was made by.
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
    there, here = (values_by_key(text, without) for text in (path.read_text(), as_json(config)))
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


def claim(workdir: Path, command: str, config: ConfigDict, without: Sequence[str] = ()) -> None:
    """Makes `workdir` this run's own: `check`, and `write_config`.

    The config is written anew, as it may differ in keys that matter to what is measured alone.
    """
    check(workdir, command, config, without)
    write_config(workdir, command, config)


def owner_of(workdir: Path) -> str | None:
    """The entry point whose run a workdir holds; None where it does not say."""
    path = workdir / ENVIRONMENT_FILE
    return json.loads(path.read_text()).get("command") if path.exists() else None


def write_config(workdir: Path, command: str, config: ConfigDict) -> None:
    """Writes `config.json`, and beside it what the run was started with: `environment.json`."""
    devices = jax.devices()
    environment = {
        "command": command,
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    # In this order: `check` takes the second without the first for a config that was removed.
    write_atomically(workdir / CONFIG_FILE, as_json(config))
    write_atomically(workdir / ENVIRONMENT_FILE, json.dumps(environment, indent=2))


def as_json(config: ConfigDict) -> str:
    """A config as the text of `config.json`."""
    return config.to_json(indent=2, sort_keys=True)


def read_config(workdir: Path) -> ConfigDict:
    """The config that a run in `workdir` was started with."""
    return ConfigDict(_with_tuples(json.loads((workdir / CONFIG_FILE).read_text())))


def _with_tuples(value: Any) -> Any:
    """Puts tuples in place of the lists of JSON: no flag could set these."""
    if isinstance(value, dict):
        return {key: _with_tuples(of) for key, of in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


class MetricsWriter:
    """Writes scalars to `metrics.jsonl` and to TensorBoard event files.

    A resumed run takes back what an earlier one wrote after the step that it resumes from.
    """

    def __init__(self, workdir: Path, start: int):
        """Opens both files for a run that resumes after step `start`."""
        self._path = workdir / METRICS_FILE
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        # The last line of a killed run may be cut short.
        whole = (line for line in lines if line.endswith("}"))
        kept = (f"{line}\n" for line in whole if json.loads(line)["step"] <= start)
        write_atomically(self._path, "".join(kept))
        self._events = (
            tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1) if is_first() else None
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one line with the scalars of a step, in one write; process 0 does so for all."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._events is not None:
            self._events.close()
