"""Training runs: devices, batches and evaluations of a teacher, a student or a cohort."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.evaluation.results import Row
from kd_ranker.manifest import MadeOf
from kd_ranker.pipeline.job import Job
from kd_ranker.pipeline.measure import Judge, Students, measure
from kd_ranker.sweep.memory import check_memory, exhaustion_reported
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training.loop import (
    Begin,
    Evaluate,
    Run,
    abstract_states,
    fit,
    make_run,
    scalar_name,
)
from kd_ranker.training.mapping import (
    MAPPINGS,
    DeviceMap,
    first_devices,
    members_axis,
    own_devices,
)
from kd_ranker.training.processes import check_same, is_first
from kd_ranker.training.recipes import TEACHER_STAGES, Group
from kd_ranker.training.state import (
    Frozen,
    LiveTeacher,
    States,
    select_member,
    steps_of_members,
)


def _device_map(
    parallel: ConfigDict, sizes: Sequence[int], requests: int, devices: Sequence[jax.Device]
) -> DeviceMap:
    """The mapping of `config.parallel` over devices.

    Args:
      parallel: this section.
      sizes: the number of members of each group.
      requests: of a batch.
      devices: the devices.
    """
    sharded = parallel.tables == "sharded"
    # Spreading members would leave fewer devices to share the rows of tables.
    if parallel.mapping == "pmap" or (sharded and not parallel.members):
        members = 1
    elif parallel.members and sum(sizes) > 1:
        members = parallel.members
    else:
        members = members_axis(len(devices), sizes, requests)
    return MAPPINGS[parallel.mapping](devices, members, parallel.deterministic, sharded)


def progress_bar(name: str, steps: int) -> tqdm:
    """The progress bar of a run, hidden where the output is not a terminal."""
    hidden = None if is_first() else True
    return tqdm(total=steps, desc=name, unit="step", disable=hidden, dynamic_ncols=True)


def fit_teacher(job: Job, workdir: Path, begin: Begin | None = None) -> Judge:
    """Train the teacher of a job on user labels; return it as measurements take it.

    `begin` is as of `loop.fit`.
    """
    (recipe,) = (group.recipe for group in job.groups)
    serve = make_serve(recipe.model, recipe.mode)

    def judge(states: States) -> Judge:
        ranker = Ranker(serve, select_member(states[0].parameters, 0))
        return Judge(ranker, "probability", job.config.seed, int(states[0].step))

    def progress(states: States) -> dict[str, float]:
        limit = job.trainee.train.eval_limit
        measured = measure(job, "validation", judge=judge(states), limit=limit, costs=False)
        return _evaluation_scalars(measured.rows[0], "")

    with progress_bar(workdir.name, job.trainee.train.steps) as bar:
        return judge(_fit(job, workdir, progress, bar, begin))


def fit_students(job: Job, workdir: Path, bar: tqdm, begin: Begin | None = None) -> list[Students]:
    """Train the students of a job in one program on the same batches.

    `bar` counts the steps of the student that takes the most; `begin` is as of `loop.fit`.
    """
    students = _students_of(job.groups)

    def progress(states: States) -> dict[str, float]:
        trained, limit = students(states), job.trainee.train.eval_limit
        measured = measure(job, "validation", trained, limit=limit, costs=False)
        scalars: dict[str, float] = {}
        for row in measured.rows:
            member = job.members.get(str(row["member"]))
            if member is not None and row["serve"] == member.distill.serve:
                scalars |= _evaluation_scalars(row, str(row["member"]))
        return scalars

    return students(_fit(job, workdir, progress, bar, begin))


def _students_of(groups: Sequence[Group]) -> Callable[[States], list[Students]]:
    """Return the function from the states of groups to their trained students."""
    serves = [make_serve(group.recipe.model, group.recipe.mode) for group in groups]

    def students(states: States) -> list[Students]:
        return [
            Students(
                names=group.names,
                ranker=Ranker(serve, state.parameters),
                steps=tuple(np.asarray(steps_of_members(state, group.numbers)).tolist()),
                non_finite_step=tuple(np.asarray(state.non_finite_step).tolist()),
            )
            for group, serve, state in zip(groups, serves, states, strict=True)
        ]

    return students


def trained_students(
    job: Job, workdir: Path, made_of: MadeOf | None = None
) -> tuple[list[Students], int]:
    """Restore the students that `fit_students` has trained, and the last step of any.

    The newest checkpoint that can be read counts; without any, the result is ([], 0).

    Args:
      job: their job.
      workdir: the folder that they were trained in.
      made_of: the fingerprints of their checkpoints; None takes those of the job.
    """
    with checkpoints.open_in(workdir) as saved:
        abstract = abstract_states(job.groups)
        states, step = checkpoints.restore(saved, abstract, None, made_of or job.made_of)
    return (_students_of(job.groups)(states) if step else []), step


def _evaluation_scalars(row: Row, member: str) -> dict[str, float]:
    """The numbers of an evaluation under the names of `metrics.jsonl`."""
    return {
        scalar_name(f"eval/{column}", member): value
        for column, value in row.items()
        if isinstance(value, float) and np.isfinite(value) and metric_of(column)
    }


def _fit(job: Job, workdir: Path, progress: Evaluate, bar: tqdm, begin: Begin | None) -> States:
    """Train the groups of a job; memory that a device lacks becomes one line."""
    with exhaustion_reported():
        check_same("dataset", str(job.dataset.identity))
        check_memory(job.config, job.groups, job.trainee.batch, job.dataset.spec)
        run = prepare_run(job)
        return fit(run, job.trainee.train, workdir, job.made_of, progress, bar, begin)


def prepare_run(
    job: Job, devices: Sequence[jax.Device] | None = None, batches_on: DeviceMap | None = None
) -> Run:
    """The run of a job: its groups on their batches, spread over devices.

    Args:
      job: the job; its dataset may have only the shapes of items, and its teacher only those of
        parameters.
      devices: the devices; None takes the first `parallel.devices`.
      batches_on: the devices that make the batches; None takes the same.
    """
    config, dataset, groups, batch = job.config, job.dataset, job.groups, job.trainee.batch
    parallel, sizes = config.parallel, [len(group.names) for group in groups]
    devices = first_devices(parallel.devices) if devices is None else devices
    mapping = _device_map(parallel, sizes, batch.requests, devices)
    # Students that learn nothing from a teacher do not pay for one.
    live = job.live_teacher if "logged" in recipes.signals_of(groups) else None
    stage = TEACHER_STAGES[config.teacher.stage]
    teacher = LiveTeacher(live.model, stage) if live else None
    frozen = Frozen(items=dataset.items, teacher=live.parameters if live else None)
    batches_on = batches_on or mapping
    batches = training_batches(
        dataset,
        BatchConfig(**batch),
        recipes.needs(groups, teacher, stage),
        batches_on,
        # CPU devices hold their data in the memory of the host.
        copies=1 + sum(device.platform == "cpu" for device in own_devices(parallel.devices)),
    )
    return make_run(groups, teacher, batches, frozen, mapping)
