"""The rankers that finished runs have left, whatever command they are of."""

import dataclasses
import functools
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.config import identity
from kd_ranker.config.identity import dataset_name
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Ranker
from kd_ranker.pipeline import runs, teachers
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.serving.score import TrainedRanker
from kd_ranker.sweep.sweep import Cohort, open_sweep
from kd_ranker.training import checkpoints
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import put
from kd_ranker.training.state import select_member

_RUNS = ("train_teacher", "train", "sweep")


def config_of(workdir: Path) -> ConfigDict:
    """The config of the run in a workdir.

    Raises:
      UserError: there is no run.
    """
    if not (workdir / workdirs.CONFIG_FILE).exists():
        raise UserError(
            f"no run at {workdir}: it holds no {workdirs.CONFIG_FILE}; name the --workdir of "
            f"experiments.{', .'.join(_RUNS)}"
        )
    return workdirs.read_config(workdir)


# For processes that score one piece after the other.
@functools.lru_cache(maxsize=1)
def opened(workdir: Path, data_dir: str, member: str) -> TrainedRanker:
    """`open_trained`, once a process."""
    return open_trained(workdir, data_dir, member)


def open_trained(workdir: Path, data_dir: str, member: str = "") -> TrainedRanker:
    """The ranker that the run in a workdir has left.

    A student needs no teacher any more: that need not be there.

    Args:
      workdir: of a teacher, a student or a sweep.
      data_dir: where its dataset lies.
      member: of a sweep; "" takes the best one, see `results.best_member`.

    Raises:
      UserError: there is no run or it is not finished, its dataset is not there or another one than
        was trained on, or there is no such member.
    """
    config = config_of(workdir)
    config.data.dir = data_dir
    dataset = teachers.dataset_of(config)
    command = workdirs.owner_of(workdir)
    if member and command != "sweep":
        raise UserError(f"{workdir} holds one ranker, and no {member!r}; leave --member out")
    if command == "train_teacher":
        config.teacher.workdir = str(workdir)
        teacher = teachers.load_teacher(config, dataset)
        name = f"the teacher at {workdir}"
        return TrainedRanker(name, "teacher", teacher.ranker, "user", teacher.version, dataset)
    if command == "train":
        # A mode without a choice does not look at the key.
        serves = MODES[config.distill.mode].serve
        serve = config.distill.serve if len(serves) > 1 else next(iter(serves))
        name = f"the student at {workdir}"
        return _student(name, serve, "", {"": config}, config, dataset, workdir)
    if command == "sweep":
        return _member(member, config, dataset, workdir)
    raise UserError(f"{workdir} is of experiments.{command}; name one of {', '.join(_RUNS)}")


def _member(member: str, config: ConfigDict, dataset: Dataset, workdir: Path) -> TrainedRanker:
    sweep = open_sweep(config, workdir)
    if member and member not in sweep.members:
        raise UserError(
            f"the sweep at {workdir} has no member {member!r}; it has: {', '.join(sweep.members)}"
        )
    if not sweep.is_complete():
        raise UserError(
            f"the sweep at {workdir} is not finished; finish it with: python -m experiments.sweep, "
            "with the flags that it was started with"
        )
    best = results.best_member(sweep.validation(), member)
    if best is None and not member:
        raise UserError(
            f"of the sweep at {workdir}, no student reaches what the best is chosen by on "
            f"validation; name one with --member: {', '.join(sweep.members)}"
        )
    # One that is named may be of no use, but is what is asked for.
    name, serve = best or (member, sweep.members[member].distill.serve)
    (index,) = (index for index, names in enumerate(sweep.plan) if name in names)
    how = "--member" if member else f"the best of {len(sweep.members)} on validation"
    title = f"member {name} of the sweep at {workdir} ({how})"
    return _student(title, serve, name, sweep.cohorts[index], config, dataset, sweep.folders[index])


def _student(
    title: str,
    serve: str,
    name: str,
    members: Cohort,
    config: ConfigDict,
    dataset: Dataset,
    folder: Path,
) -> TrainedRanker:
    """The student `name` of those that were trained together in a folder."""
    trained_under = checkpoints.recorded_identity(folder).get("teacher", "")
    version = "" if trained_under == identity.OF_THE_LOGS else trained_under
    trained_on = _trained_on(config, dataset, version)
    whose = identity.of_students(members, trained_on.identity, version)
    groups, step = runs.trained_students(trained_on, members, folder, whose)
    steps = max(member.train.steps for member in members.values())
    if step < steps:
        raise UserError(
            f"{title} stopped at step {step} of {steps}; finish it with the command and the flags "
            "that it was started with"
        )
    (group,) = (only for of in groups if (only := of.only((name,))).names)
    if group.non_finite_step[0]:
        raise UserError(f"{title} stopped being finite at step {group.non_finite_step[0]}")
    parameters = select_member(group.ranker.parameters, 0)
    return TrainedRanker(
        name=title,
        role="student",
        ranker=Ranker(group.ranker.serve, put(parameters)),
        serve=serve,
        version=teachers.digest_of(parameters),
        dataset=dataset,
    )


def _trained_on(config: ConfigDict, dataset: Dataset, version: str) -> Dataset:
    """The dataset under the name of the copy that students learned from, if they did from one."""
    if not (config.teacher.source == "logged" and config.teacher.workdir):
        return dataset
    directory = storage.directory_of(dataset_name(config, version), config.data.dir)
    spec = teachers.spec_of_scored(dataset.spec, version)
    return dataclasses.replace(dataset, directory=directory, spec=spec)
