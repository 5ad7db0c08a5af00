"""What a command trains: rankers, with the teacher that they follow.

A command makes its `TrainingJob`s from a config. The functions that train and measure take a job
instead of a config and values from it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from kd_ranker.config.runs import Runs
from kd_ranker.errors import UserError
from kd_ranker.evaluation.baselines import Lists, lists_of
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.metrics.target import TARGET
from kd_ranker.evaluation.request_files import spaced_ks
from kd_ranker.manifest import Provenance
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.trained import TrainedRanker, load_teacher
from kd_ranker.pipeline.trainees import Trainees, open_trainees
from kd_ranker.progress import Progress
from kd_ranker.requests.records import Dataset
from kd_ranker.training.state import States


class Teaching(NamedTuple):
    """What students learn from."""

    teacher: TrainedRanker | None  # None where the dataset's logs replace it
    dataset: Dataset  # with the scores of a logged teacher


class Teachers:
    """The teachers of a command's students. The last one stays open, as neighbors share it."""

    def __init__(self, dataset: Dataset):
        """Start with none open; `dataset` is as it was built."""
        self._dataset = dataset
        self._opened: dict[tuple[str, str], Teaching] = {}  # the last, by its workdir and stage

    def open(self, config: ConfigDict) -> Teaching:
        """Open the teacher of students with this config; UserError if it or its scores are missing.

        Only its section `teacher` matters, of which the students of a command share all but the
        workdir and the stage.
        """
        asked = (config.teacher.workdir, config.teacher.stage)
        if asked not in self._opened:
            self._opened = {asked: open_teaching(config, self._dataset)}
        return self._opened[asked]


def open_teaching(config: ConfigDict, dataset: Dataset) -> Teaching:
    """Open the teacher of students, and the dataset with its scores.

    A teacher that is missing, or has not scored the dataset, is a UserError.
    """
    if config.teacher.source == "live":
        return Teaching(load_teacher(config), dataset)
    if config.teacher.workdir:
        teacher = load_teacher(config)
        return Teaching(teacher, datasets.dataset_under(config, dataset, teacher.version))
    if not dataset.spec.teacher_version:
        raise UserError(
            "the dataset holds no teacher probabilities; name a teacher in teacher.workdir, and "
            f"make them with: {datasets.LOG_TEACHER}"
        )
    return Teaching(None, dataset)


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """Rankers that train together, and all that training and measuring them reads."""

    trainees: Trainees
    teacher: TrainedRanker | None  # of students; None where the dataset's logs replace it
    dataset: Dataset  # with the scores of a logged teacher
    progress: Progress

    @property
    def config(self) -> ConfigDict:
        """The values that its runs have in common."""
        return self.trainees.config

    @property
    def runs(self) -> Runs:
        """The configs of the students; none in the job of a teacher."""
        return self.trainees.runs

    @property
    def live_teacher(self) -> TrainedRanker | None:
        """The teacher if it scores the batches; None if the dataset holds its probabilities."""
        return self.teacher if self.config.teacher.source == "live" else None

    @functools.cached_property
    def provenance(self) -> Provenance:
        """The provenance of the trained rankers, which their checkpoints and tables record."""
        if not self.runs:
            return self.trainees.provenance
        teacher = self.teacher.version if self.teacher else "of the logs"
        return {**self.trainees.provenance, **self.dataset.provenance, "teacher": teacher}

    @functools.cached_property
    def report_at(self) -> ReportAt:
        """The points of curves in `results.csv`, with the funnel's own k and the main target.

        With as many passed as are shown, the final ranker has no choice: it may as well time out.
        """
        funnel = self.config.funnel
        return ReportAt(
            ks=sorted({*funnel.report_at, funnel.passed, funnel.shown}),
            targets=sorted({*funnel.targets, TARGET}),
        )

    @functools.cached_property
    def curve_ks(self) -> list[int]:
        """The k at which the curves of each test request are written."""
        return spaced_ks(self.config.funnel.retrieved, self.report_at.ks)

    @functools.cached_property
    def lists(self) -> Lists:
        """The lists of items from the training requests, which are references."""
        return lists_of(self.dataset, self.config.value_weights, self.config.funnel.shown)

    def restored(self, workdir: Path) -> tuple[States, int]:
        """Restore the newest checkpoint of exactly this job, see `Trainees.restored`."""
        return self.trainees.restored(workdir, self.provenance)


def make_job(trainees: Trainees, teachers: Teachers, progress: Progress) -> TrainingJob:
    """Give rankers the teacher that they follow; that of a teacher is none."""
    teaching = Teaching(None, trainees.dataset)
    if trainees.runs:
        teaching = teachers.open(trainees.config)
    return TrainingJob(trainees, teaching.teacher, teaching.dataset, progress)


def open_job(
    config: ConfigDict,
    runs: Runs | None = None,
    unchanged: bool = False,
    progress: Progress | None = None,
) -> TrainingJob:
    """Open students that train together with their teacher, or without runs a teacher.

    With `unchanged`, it is a UserError if the raw files of the dataset have changed since it was
    built. Without `progress` the job shows only bars.
    """
    trainees = open_trainees(config, runs, unchanged)
    return make_job(trainees, Teachers(trainees.dataset), progress or Progress())
