"""Rankers that one program trains on the same dataset: the students of a cohort, or a teacher."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
from ml_collections import ConfigDict

from kd_ranker.cohorts.memory import spread
from kd_ranker.config import schema
from kd_ranker.config.runs import Runs, common
from kd_ranker.manifest import Provenance
from kd_ranker.pipeline import datasets
from kd_ranker.requests.records import Dataset
from kd_ranker.training import checkpoints, specs
from kd_ranker.training.mapping import DeviceMap, first_devices
from kd_ranker.training.program import abstract_states
from kd_ranker.training.specs import Stack
from kd_ranker.training.state import States


@dataclasses.dataclass(frozen=True)
class Trainees:
    """Rankers that train together, without their teacher.

    That suffices to restore, score and export trained ones.
    """

    config: ConfigDict  # the values that the runs have in common
    runs: Runs  # the configs of the students; none of a teacher
    dataset: Dataset  # as it was built, without the scores of a teacher
    devices: Sequence[jax.Device]  # of all processes

    def of(self, runs: Runs) -> "Trainees":
        """Return other students on the same dataset."""
        return dataclasses.replace(self, config=common(runs), runs=runs)

    @property
    def role(self) -> Literal["teacher", "student"]:
        """The role of the rankers in the results."""
        return "student" if self.runs else "teacher"

    @property
    def section(self) -> ConfigDict:
        """The section on batches, optimizer and steps: a teacher has its own."""
        return self.config if self.runs else self.config.teacher

    def steps_of(self, run: str) -> int:
        """Return the step of the checkpoint with the result of a run; a teacher has any name."""
        if not self.runs:
            return self.config.teacher.train.steps
        # With early stopping, the best states are put in place when no run trains on.
        names = self.runs if self.config.train.early_stopping else [run]
        return max(self.runs[name].train.steps for name in names)

    @functools.cached_property
    def stacks(self) -> list[Stack]:
        """The stacks that one program trains."""
        if self.runs:
            return specs.student_stacks(self.runs, self.dataset.spec)
        return [specs.teacher_stack(self.config, self.dataset.spec)]

    @functools.cached_property
    def device_map(self) -> DeviceMap:
        """The mapping of that program, and of the requests of its batches, over the devices."""
        sizes = [len(stack.names) for stack in self.stacks]
        return spread(self.config.parallel, self.devices, sizes, self.section.batch.requests)

    @property
    def provenance(self) -> Provenance:
        """The provenance of the rankers, without those of a teacher and its scores."""
        config = schema.digest_of(self.runs or {"": self.config}, self.role)
        return {"config": config, **self.dataset.provenance}

    def restored(self, workdir: Path, provenance: Provenance) -> tuple[States, int]:
        """Restore the newest checkpoint of this provenance that can be read.

        Return the states on the host and their step; abstract states and 0 without a checkpoint.
        """
        with checkpoints.open_in(workdir) as saved:
            return checkpoints.restore(saved, abstract_states(self.stacks), None, provenance)


def open_trainees(
    config: ConfigDict, runs: Runs | None = None, unchanged: bool = False
) -> Trainees:
    """Open the dataset of students that train together, or without runs of their teacher.

    With `unchanged`, it is a UserError if its raw files have changed since it was built.
    """
    return Trainees(
        config=common(runs) if runs else config,
        runs=runs or {},
        dataset=datasets.dataset_of(config, unchanged),
        devices=first_devices(config.parallel.devices),
    )
