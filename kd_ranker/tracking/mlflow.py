"""MLflow: a sweep is a parent, and its runs are nested below it.

MLflow's own variables name the server (MLFLOW_TRACKING_URI) and the experiment. Without them it
keeps its store in the current folder, where `mlflow ui` looks for it: all runs of a project are
then on one page. It also keeps a database out of workdirs, which may be uploaded while it changes.
"""

import importlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_ranker.tracking.tracker import TrackerOfRuns

_EXPERIMENT = "kd_ranker"
_ID_TAG = "kd_ranker.id"
_STEP_TAG = "kd_ranker.step"
# Of one request to a server.
_MOST_PARAMS = 100
_MOST_METRICS = 1000
_NOT_IN_NAMES = re.compile(r"[^\w./ -]")


class MLflow(TrackerOfRuns):
    """A client with explicit run ids, which shares no state with other uses of MLflow."""

    package = "mlflow"

    def connect(self) -> None:
        """Find the experiment, or create it."""
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient()
        self._run_ids: dict[str, str] = {}  # of the open runs
        self._last_steps: dict[str, int] = {}  # that they had before
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment:
            self._experiment_id = experiment.experiment_id
        else:
            self._experiment_id = self._client.create_experiment(name)

    def open_run(self, run: str) -> None:
        """Continue the run with the tag of the same id, or create one; add its config."""
        found = self._find(run)
        if found:
            self._client.update_run(found.info.run_id, status="RUNNING")
        else:
            tags = {_ID_TAG: self.id_of(run), "kd_ranker.command": self.tracked.command}
            if run:
                tags["mlflow.parentRunId"] = self._run_ids.get("") or self._find("").info.run_id
            found = self._client.create_run(
                self._experiment_id, tags=tags, run_name=self.name_of(run)
            )
        run_id = found.info.run_id
        # A resumed run may have another `train.log_every`, and MLflow lets no parameter change.
        new = [
            self._mlflow.entities.Param(key, str(value))
            for key, value in self.config_of(run).items()
            if key not in found.data.params
        ]
        for first in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(run_id, params=new[first : first + _MOST_PARAMS])
        self._last_steps[run] = int(found.data.tags.get(_STEP_TAG, -1))
        self._run_ids[run] = run_id

    def write_run(self, run: str, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of a step, unless the run got that before it was killed."""
        if run not in self._run_ids:
            self.open_run(run)
        if step > self._last_steps[run]:
            self._log(run, step, scalars, tags=[self._mlflow.entities.RunTag(_STEP_TAG, str(step))])

    def finish_run(self, run: str, numbers: Mapping[str, float]) -> None:
        """Add the final numbers as metrics without a step."""
        if run not in self._run_ids:
            self.open_run(run)
        self._log(run, 0, numbers)

    def write_files(self, files: Sequence[Path]) -> None:
        """Add the files as artifacts."""
        for file in files:
            self._client.log_artifact(self._run_ids[""], str(file))

    def close(self, is_finished: bool) -> None:
        """Set the status of the open runs."""
        for run_id in self._run_ids.values():
            self._client.set_terminated(run_id, "FINISHED" if is_finished else "KILLED")

    def _find(self, run: str) -> Any:
        """Return the run with the tag of this id, or None."""
        has_id = f"tags.`{_ID_TAG}` = '{self.id_of(run)}'"
        found = self._client.search_runs([self._experiment_id], has_id, max_results=1)
        return found[0] if found else None

    def _log(
        self, run: str, step: int, scalars: Mapping[str, float], tags: Sequence[Any] = ()
    ) -> None:
        milliseconds = int(1000 * time.time())
        metrics = [
            self._mlflow.entities.Metric(metric_name(name), value, milliseconds, step)
            for name, value in scalars.items()
        ]
        for first in range(0, len(metrics), _MOST_METRICS):
            some = metrics[first : first + _MOST_METRICS]
            self._client.log_batch(self._run_ids[run], metrics=some, tags=tags)


def metric_name(name: str) -> str:
    """Return a name without the characters that MLflow refuses.

    >>> metric_name("eval/survival@200")
    'eval/survival_200'
    """
    return _NOT_IN_NAMES.sub("_", name)
