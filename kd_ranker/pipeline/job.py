"""The job of a command: rankers that train together, their dataset, their teacher, their settings.

A command makes it once from a config. The functions that train and measure take it instead of a
config and values from that. The teacher is opened at first use and stays open.
"""

import dataclasses
import functools

from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.errors import UserError
from kd_ranker.evaluation import policy
from kd_ranker.evaluation.metrics import TARGET, ReportAt
from kd_ranker.evaluation.results import spaced_ks
from kd_ranker.manifest import MadeOf
from kd_ranker.pipeline import datasets, trained
from kd_ranker.pipeline.trained import Finished
from kd_ranker.requests.records import Dataset
from kd_ranker.sweep import Members, common
from kd_ranker.training import recipes
from kd_ranker.training.recipes import Group


@dataclasses.dataclass(frozen=True)
class Job:
    """Rankers that train together, and all that training and measuring them reads.

    Attributes:
      config: what its members have in common.
      members: the configs of the students; none in the job of a teacher.
      built: the dataset as it was built.
      last_teacher: the teacher that was opened last, and the dataset with its scores, by its
        workdir and the stage of those. The jobs of a sweep share it, so those of one teacher should
        follow each other.
    """

    config: ConfigDict
    members: Members
    built: Dataset
    last_teacher: dict[tuple[str, str], tuple[Finished | None, Dataset]] = dataclasses.field(
        default_factory=dict
    )

    def of(self, members: Members) -> "Job":
        """The job of other students on the same dataset, which share batches and a teacher."""
        return dataclasses.replace(self, config=common(members), members=members)

    @functools.cached_property
    def _read(self) -> tuple[Finished | None, Dataset]:
        config, dataset, teacher = self.config, self.built, None
        live, key = config.teacher.source == "live", teacher_key(config)
        if self.members and key not in self.last_teacher:
            if live or config.teacher.workdir:
                teacher = trained.load_teacher(config, dataset)
                if not live:
                    dataset = datasets.dataset_under(config, dataset, teacher.version)
            elif not dataset.spec.teacher_version:
                raise UserError(
                    f"{config.data.name} holds no teacher probabilities; name a teacher in "
                    f"teacher.workdir and make them with: {datasets.LOG_TEACHER}"
                )
            self.last_teacher.clear()
            self.last_teacher[key] = teacher, dataset
        return self.last_teacher[key] if self.members else (None, dataset)

    @property
    def teacher(self) -> Finished | None:
        """The final ranker of the students; None where the dataset's logs replace it.

        Raises:
          UserError: it is missing, or with `teacher.source = "logged"` its scores are, or without a
            `teacher.workdir` the dataset holds no probabilities.
        """
        return self._read[0]

    @property
    def dataset(self) -> Dataset:
        """The dataset that its members learn from, with the scores of a logged teacher.

        It raises the same errors as `teacher`.
        """
        return self._read[1]

    @property
    def trainee(self) -> ConfigDict:
        """The section on batches, optimiser and steps: `config`, or in a teacher's job its own."""
        return self.config if self.members else self.config.teacher

    @property
    def live_teacher(self) -> Finished | None:
        """The teacher if it scores the batches; None if the dataset holds its probabilities."""
        return self.teacher if self.config.teacher.source == "live" else None

    @property
    def teacher_version(self) -> str:
        """The version of the teacher; "" where the dataset's logs replace it."""
        return self.teacher.version if self.teacher else ""

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The groups that one program trains."""
        # Without the teacher, which a trained student does not need.
        spec = self.built.spec
        if self.members:
            return recipes.student_groups(self.members, spec)
        return [recipes.teacher_group(self.config, spec)]

    @functools.cached_property
    def made_of(self) -> MadeOf:
        """The fingerprints of the trained rankers, which their checkpoints and tables record."""
        if not self.members:
            return trained.made_of_teacher(self.config, self.dataset)
        return {
            "config": schema.fingerprint(self.members, "student"),
            **self.dataset.identity,
            "teacher": self.teacher_version or "of the logs",
        }

    @functools.cached_property
    def report_at(self) -> ReportAt:
        """The points of curves in `results.csv`, with the funnel's own k and the main target."""
        funnel = self.config.funnel
        return ReportAt(
            ks=sorted({*funnel.report_at, funnel.passed}),
            targets=sorted({*funnel.targets, TARGET}),
            policies=policy.named(funnel.policies),
        )

    @functools.cached_property
    def kept_ks(self) -> list[int]:
        """The k at which the curves of each request are kept, and among which policies choose."""
        return spaced_ks(self.config.funnel.retrieved, self.report_at.ks)


def teacher_key(config: ConfigDict) -> tuple[str, str]:
    """The keys that decide the teacher of students and the scores that they read."""
    return config.teacher.workdir, config.teacher.stage


def open_job(config: ConfigDict, members: Members | None = None, unchanged: bool = False) -> Job:
    """Open the dataset of students that train together, or without members of their teacher.

    `unchanged` makes raw files that have changed an error.

    Raises:
      UserError: the dataset was not built, or its raw files have changed.
    """
    opens = datasets.current_dataset if unchanged else datasets.dataset_of
    return Job(common(members) if members else config, members or {}, opens(config))
