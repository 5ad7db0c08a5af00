"""What a tracker is: a class with the methods of `Tracker`, each of which may do nothing.

The files of a workdir hold all that a tracker gets: it is for people who look at many runs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Values = Mapping[str, object]
"""The values of a config by key, such as `train.steps`."""


class Tracked(NamedTuple):
    """What a tracker is told of a command before it begins."""

    command: str  # as "train" or "sweep"
    name: str  # the place of the workdir, for people
    id: str  # a random name of the workdir, which stays when its run resumes
    config: Values
    runs: Mapping[str, Values]  # of a sweep: the config of each run that this process trains
    is_part: bool  # whether other processes train other runs of the same sweep


class Tracker:
    """A place for scalars, config and files of a run; this one keeps nothing."""

    package = ""
    """The package that it imports, which is also the name of the extra; "" for none."""

    in_background = True
    """Whether it is called by a thread, so that no run waits for it or ends by its errors."""

    def start(self, tracked: Tracked) -> None:
        """Open the tracker's run; continue the one of the same `tracked.id` if there is one."""

    def begin(self, folder: Path, step: int) -> None:
        """Training in `folder` begins, or resumes after `step`; a sweep does so in each cohort."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of a step, under the names of `metrics.jsonl` and `speed.jsonl`."""

    def end(self) -> None:
        """Training in that folder ends, or is stopped."""

    def finish(self, results: Mapping[str, Mapping[str, float]], files: Sequence[Path]) -> None:
        """Add final numbers by run ("" without a sweep) and name, and the files of all runs."""

    def close(self, is_finished: bool) -> None:
        """End the command; False if it was stopped or failed, so that it may resume."""


class TrackerOfRuns(Tracker):
    """A tracker in which each run of a sweep has a page of its own below that of the sweep.

    A subclass has the `…_run` methods. The run "" is the command itself: a sweep, or its only run.
    """

    def start(self, tracked: Tracked) -> None:
        """Open the page of the command; those of a sweep's runs are opened with their scalars."""
        self.tracked = tracked
        self.connect()
        if not tracked.is_part:
            self.open_run("")

    def begin(self, folder: Path, step: int) -> None:
        """Forget which runs of an earlier cohort had scalars."""
        self._running: Sequence[str] = () if self.tracked.runs else ("",)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add each scalar to its run, under its plain name.

        The scalars of no run, such as the steps per second, are of the program that trains the runs
        together: they go to each run that had a scalar in the last line.
        """
        scalars_by_run: dict[str, dict[str, float]] = {}
        for name, value in scalars.items():
            plain_name, run = split_name(name, self.tracked.runs)
            scalars_by_run.setdefault(run, {})[plain_name] = value
        shared = scalars_by_run.pop("", {})
        self._running = list(scalars_by_run) or self._running
        for run in self._running:
            self.write_run(run, step, scalars_by_run.get(run, {}) | shared)

    def finish(self, results: Mapping[str, Mapping[str, float]], files: Sequence[Path]) -> None:
        """Add the final numbers to each run, and the files to the page of the command."""
        for run, numbers in results.items():
            self.finish_run(run, numbers)
        self.write_files(files)

    def config_of(self, run: str) -> Values:
        """Return the config of a run."""
        return self.tracked.runs[run] if run else self.tracked.config

    def id_of(self, run: str) -> str:
        """Return an id that a run keeps when it resumes, without characters that W&B refuses."""
        digest = hashlib.sha256(run.encode()).hexdigest()[:8]
        return f"{self.tracked.id}-{digest}" if run else self.tracked.id

    def name_of(self, run: str) -> str:
        """Return the name of a run for people."""
        return run or self.tracked.name

    def connect(self) -> None:
        """Import the package, and connect to what it names."""

    def open_run(self, run: str) -> None:
        """Open the page of a run, and continue an existing one."""

    def write_run(self, run: str, step: int, scalars: Mapping[str, float]) -> None:
        """Add the scalars of a step to a run, which may not be open yet."""

    def finish_run(self, run: str, numbers: Mapping[str, float]) -> None:
        """Add final numbers to a run."""

    def write_files(self, files: Sequence[Path]) -> None:
        """Add files to the page of the command."""


def split_name(name: str, runs: Mapping[str, object]) -> tuple[str, str]:
    """Split the name of a scalar into its plain name and that of its run; "" for none.

    Both may contain slashes.

    >>> split_name("loss/aux-seed0", {"aux-seed0": {}}), split_name("loss/user", {"aux-seed0": {}})
    (('loss', 'aux-seed0'), ('loss/user', ''))
    """
    plain_name, slash, run = name.partition("/")
    while slash and run not in runs:
        part, slash, run = run.partition("/")
        plain_name = f"{plain_name}/{part}"
    return plain_name, run
