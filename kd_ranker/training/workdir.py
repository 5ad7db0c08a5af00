"""What a run leaves on disk, apart from checkpoints: its config and its metrics."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import tensorboardX
from ml_collections import ConfigDict

from kd_ranker.errors import UserError

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is whole or absent, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def claim(workdir: Path, config: ConfigDict, without: Sequence[str] = ()) -> None:
    """Makes `workdir` this config's own: writes `config.json`, or checks the one that is there.

    Args:
      workdir: the folder of the run.
      config: its config.
      without: keys, or sections, that do not matter to the run and may differ.

    Raises:
      UserError: the workdir belongs to another config; the message names the keys that differ.
    """
    path = workdir / CONFIG_FILE
    text = config.to_json(indent=2, sort_keys=True)
    if not path.exists():
        write_atomically(path, text)
        return
    there, here = _flat(json.loads(path.read_text())), _flat(json.loads(text))
    differing = [
        f"{key} ({there.get(key)!r} there, {here.get(key)!r} now)"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
        and not any(f"{key}.".startswith(f"{other}.") for other in without)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir or set back: "
            + ", ".join(differing)
        )


def read_config(workdir: Path) -> ConfigDict:
    """The config that a run in `workdir` was started with."""
    return ConfigDict(json.loads((workdir / CONFIG_FILE).read_text()))


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
        self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=start + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends one line with the scalars of a step, in one write."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._events.close()
