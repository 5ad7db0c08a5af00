"""Tracking a command: what its tracker is told at the start, and the results at the end."""

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_ranker.config.runs import Runs
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics.registry import metric_of
from kd_ranker.manifest import write_whole
from kd_ranker.pipeline.remote import Place
from kd_ranker.tracking.registry import TRACKERS, make_tracker
from kd_ranker.tracking.tracker import Tracked, Tracker
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.processes import is_first

# Holds the id under which a tracker that keeps its data elsewhere knows the run.
FILE = "tracked.json"


@contextlib.contextmanager
def tracked(
    command: str,
    config: ConfigDict,
    place: Place,
    workdir: Path,
    runs: Runs = MappingProxyType({}),
    is_part: bool = False,
) -> Iterator[Tracker]:
    """Start the tracker of `config.tracker`, and end it whatever happens; process 0 has one.

    Args:
      command: that which trains.
      config: its config.
      place: its workdir as its owner names it.
      workdir: the same as a folder, which at a URL is a copy.
      runs: of a sweep, those that this process trains.
      is_part: whether other processes train further ones.
    """
    if not is_first():
        yield Tracker()
        return
    tracker = make_tracker(config.tracker)
    has_id = TRACKERS[config.tracker].in_background
    tracker.start(
        Tracked(
            command=command,
            name=str(place),
            id=_id_of(workdir) if has_id else "",
            config=workdirs.values_by_key(config),
            # A run has its own values in place of the lists of a sweep.
            runs={name: workdirs.values_by_key(run, ["sweep"]) for name, run in runs.items()},
            is_part=is_part,
        )
    )
    is_finished = False
    try:
        yield tracker
        is_finished = True
    finally:
        tracker.close(is_finished)


def _id_of(workdir: Path) -> str:
    """Return the id of a workdir: another folder in its place later is another run."""
    path = workdir / FILE
    if not path.exists():
        write_whole(path, json.dumps({"id": uuid.uuid4().hex[:12]}))
    remedy = "remove it: the tracker then begins another run"
    return str(workdirs.read_json(path, remedy).get("id"))


def track_results(tracker: Tracker, workdir: Path, role: Literal["teacher", "student"]) -> None:
    """Give a tracker the tables of a finished workdir, and the numbers of its rankers.

    A number is called after its split, head and column: `test/user/value_captured@200`.
    """
    table = results.read_csv(workdir / results.FILE)
    numbers: dict[str, dict[str, float]] = {}
    for row in table[table["role"] == role].to_dict("records"):
        # The only student of a command has no name, and its teacher needs none.
        run = "" if role == "teacher" or pd.isna(row["run"]) else str(row["run"])
        for column, value in row.items():
            if metric_of(str(column)) and isinstance(value, (int, float)) and np.isfinite(value):
                name = f"{row['split']}/{row['serve']}/{column}"
                numbers.setdefault(run, {})[name] = float(value)
    tracker.finish(numbers, [workdir / workdirs.CONFIG_FILE, workdir / results.FILE])
