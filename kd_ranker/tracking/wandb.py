"""Weights & Biases: a sweep is a group, with a run for each of its runs and one for itself.

Its own variables name the project and the folder, and choose the offline mode: WANDB_PROJECT,
WANDB_DIR, WANDB_MODE=offline.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from kd_ranker.errors import UserError
from kd_ranker.tracking.tracker import TrackerOfRuns

_PROJECT = "kd_ranker"
# W&B ends its service at the end of the process, and waits that long for a server that is down.
_SECONDS_TO_ANSWER = 30.0


class WandB(TrackerOfRuns):
    """Several runs in one process."""

    package = "wandb"

    def connect(self) -> None:
        """Import the package, and look for a key; a run connects when it is opened."""
        self._wandb = importlib.import_module("wandb")
        self._runs: dict[str, Any] = {}
        # Else `init` asks at the terminal, in the middle of the progress bar.
        mode = self._wandb.setup().settings.mode
        if mode in ("online", "shared") and not self._wandb.login(prompt=False):
            raise UserError("there is no key: run `wandb login`, or set WANDB_MODE=offline")

    def open_run(self, run: str) -> None:
        """Open a run, and continue the one of the same id."""
        tracked = self.tracked
        group = f"{tracked.name} {tracked.id}" if tracked.command == "sweep" else None
        settings = self._wandb.Settings(
            console="off",  # the output is that of all runs
            silent=True,
            init_timeout=_SECONDS_TO_ANSWER,
            finish_timeout=_SECONDS_TO_ANSWER,
            x_disable_stats=bool(run),  # of the machine: once for all runs
        )
        self._runs[run] = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=self.id_of(run),
            name=self.name_of(run),
            group=group,
            job_type="run" if run else tracked.command,
            config=unflatten_dict(dict(self.config_of(run)), sep="."),
            allow_val_change=True,  # a resumed run may have another `train.log_every`
            resume="allow",
            reinit="create_new",
            settings=settings,
        )

    def write_run(self, run: str, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of a step, unless the server knows that the run got later ones."""
        if run not in self._runs:
            self.open_run(run)
        if step >= self._runs[run].starting_step:
            self._runs[run].log(dict(scalars), step=step)

    def finish_run(self, run: str, numbers: Mapping[str, float]) -> None:
        """Add the final numbers to the summary."""
        if run not in self._runs:
            self.open_run(run)
        self._runs[run].summary.update(dict(numbers))

    def write_files(self, files: Sequence[Path]) -> None:
        """Add the files as an artifact, which copies them."""
        artifact = self._wandb.Artifact(f"results-{self.tracked.id}", type="results")
        for file in files:
            artifact.add_file(str(file))
        self._runs[""].log_artifact(artifact)

    def close(self, is_finished: bool) -> None:
        """Finish the open runs, so that the last scalars are written."""
        for run in self._runs.values():
            run.finish(exit_code=0 if is_finished else 1)
