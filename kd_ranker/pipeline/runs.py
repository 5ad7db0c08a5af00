"""Training runs: what teacher, single student and sweep have in common."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batches.training import (
    BatchConfig,
    Needs,
    TrainingBatches,
    training_batches,
)
from kd_ranker.config import identity, schema
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.evaluation.results import Row
from kd_ranker.pipeline.measure import Students, measure, own_reference, reference
from kd_ranker.pipeline.teachers import Teacher, version_of
from kd_ranker.requests.records import Dataset
from kd_ranker.sweep.memory import check_memory, exhaustion_reported
from kd_ranker.training import checkpoints, recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.loop import Evaluate, fit, scalar_name
from kd_ranker.training.mapping import MAPPINGS, DeviceMap, members_axis
from kd_ranker.training.placing import first_devices, own_devices
from kd_ranker.training.processes import check_same, is_first
from kd_ranker.training.recipes import TEACHER_STAGES, Group
from kd_ranker.training.run import Run, abstract_states, make_run, padding_of
from kd_ranker.training.state import (
    Frozen,
    LiveTeacher,
    States,
    select_member,
    steps_of_members,
)


def device_mapping(
    config: ConfigDict,
    sizes: Sequence[int],
    requests: int,
    devices: Sequence[jax.Device] | None = None,
) -> DeviceMap:
    """The mapping of `config.parallel` over its devices.

    Args:
      config: the config.
      sizes: the number of members of each group.
      requests: of a batch.
      devices: the devices; None takes those that the config asks for.
    """
    parallel = config.parallel
    devices = first_devices(parallel.devices) if devices is None else devices
    members = devices_of_members(config, sizes, requests, len(devices))
    sharded = parallel.tables == "sharded"
    return MAPPINGS[parallel.mapping](devices, members, parallel.deterministic, sharded)


def devices_of_members(
    config: ConfigDict, sizes: Sequence[int], requests: int, devices: int
) -> int:
    """The number of so many devices to spread members over; see `device_mapping`."""
    parallel = config.parallel
    # Members on devices of their own would leave fewer to deal rows to.
    if parallel.mapping == "pmap" or (parallel.tables == "sharded" and not parallel.members):
        return 1
    if parallel.members and sum(sizes) > 1:
        return parallel.members
    return members_axis(devices, sizes, requests)


def batches_of_run(
    config: ConfigDict,
    dataset: Dataset,
    batch: ConfigDict,
    mapping: DeviceMap,
    needs: Needs,
) -> TrainingBatches:
    """The training batches of a run, on the devices.

    `batch` is `config.batch` or `config.teacher.batch`.
    """
    return training_batches(
        dataset,
        BatchConfig(**batch),
        needs,
        mapping.share,
        devices=mapping,
        # Devices that are the host's own hold the data in its memory as well.
        copies=1 + sum(device.platform == "cpu" for device in own_devices(config.parallel.devices)),
    )


def progress_bar(name: str, steps: int) -> tqdm:
    """The one bar of a run; absent where the output is no terminal."""
    hidden = None if is_first() else True
    return tqdm(total=steps, desc=name, unit="step", disable=hidden, dynamic_ncols=True)


def fit_teacher(config: ConfigDict, dataset: Dataset, workdir: Path) -> tuple[Ranker, int]:
    """Trains the teacher of `config` on user labels; returns it and its last step."""
    free = schema.without_influence("teacher")
    workdirs.claim(workdir, "train_teacher", config, dataset.identity, without=free)
    group = recipes.teacher_group(config, dataset.spec)
    serve = make_serve(group.recipe.model, group.recipe.mode)
    section = config.teacher

    def ranker(states: States) -> Ranker:
        return Ranker(serve, select_member(states[0].parameters, 0))

    def progress(states: States) -> tuple[dict[str, float], str]:
        teacher = own_reference(config, dataset, ranker(states), int(states[0].step))
        limit = section.train.eval_limit
        measured = measure(config, dataset, "validation", teacher, {}, [], limit=limit, costs=False)
        return _evaluation_scalars(measured.rows[0], ""), ""

    with progress_bar(workdir.name, section.train.steps) as bar:
        whose = identity.of_teacher(config, dataset.identity)
        states = _fit(config, dataset, section, [group], None, workdir, whose, progress, bar)
    return ranker(states), int(states[0].step)


def fit_students(
    config: ConfigDict,
    dataset: Dataset,
    teacher: Teacher | None,
    members: Mapping[str, ConfigDict],
    workdir: Path,
    bar: tqdm,
) -> list[Students]:
    """Trains the students of `members`, by name, in one program on the same batches.

    `config` says what they have in common; `bar` gets the steps of the one that takes most.
    """
    groups = recipes.student_groups(members, dataset.spec)
    # A population that learns nothing from a teacher does not pay for one.
    hears_it = "logged" in recipes.signals_of(groups)
    live = teacher if hears_it and config.teacher.source == "live" else None
    known = reference(config, dataset, teacher)
    students = _students_of(groups)

    def progress(states: States) -> tuple[dict[str, float], str]:
        trained, limit = students(states), config.train.eval_limit
        measured = measure(
            config, dataset, "validation", known, members, trained, limit=limit, costs=False
        )
        return _progress_of_students(config, members, measured.rows)

    whose = students_identity(members, dataset, teacher)
    return students(_fit(config, dataset, config, groups, live, workdir, whose, progress, bar))


def _students_of(groups: Sequence[Group]) -> Callable[[States], list[Students]]:
    """Builds the function from the states of groups to how their members rank."""
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
    dataset: Dataset, members: Mapping[str, ConfigDict], workdir: Path, whose: Identity
) -> tuple[list[Students], int]:
    """The students that `fit_students` has trained in `workdir`, and the last step of any.

    They are those of the newest checkpoint that can be read; none at step 0 if there is none.
    """
    groups = recipes.student_groups(members, dataset.spec)
    abstract = abstract_states(groups)
    with checkpoints.open_in(workdir) as saved:
        states, step = checkpoints.restore(saved, abstract, None, whose)
    return (_students_of(groups)(states) if step else []), step


def students_identity(
    members: Mapping[str, ConfigDict], dataset: Dataset, teacher: Teacher | None
) -> Identity:
    """The identity of what `fit_students` trains."""
    return identity.of_students(members, dataset.identity, version_of(teacher))


def _progress_of_students(
    config: ConfigDict, members: Mapping[str, ConfigDict], rows: Sequence[Row]
) -> tuple[dict[str, float], str]:
    """The scalars of an evaluation on the way, and which member does best."""
    column = f"value_captured@{config.funnel.passed}"
    scalars: dict[str, float] = {}
    best, best_value = "", -np.inf
    for row in rows:
        name = str(row["member"])
        if name not in members or row["serve"] != members[name].distill.serve:
            continue
        scalars |= _evaluation_scalars(row, name)
        value = row.get(column)
        if isinstance(value, float) and value > best_value:
            best, best_value = name, value
    return scalars, f"best {best} {best_value:.3f}" if best else ""


def _evaluation_scalars(row: Row, member: str) -> dict[str, float]:
    """The numbers of an evaluation under the names of `metrics.jsonl`."""
    return {
        scalar_name(f"eval/{column}", member): value
        for column, value in row.items()
        if isinstance(value, float) and np.isfinite(value) and metric_of(column)
    }


def _fit(
    config: ConfigDict,
    dataset: Dataset,
    section: ConfigDict,
    groups: Sequence[Group],
    live: Teacher | None,
    workdir: Path,
    whose: Identity,
    progress: Evaluate,
    bar: tqdm,
) -> States:
    """`fit` with what `section` (`config`, or `config.teacher`) says of batches and steps."""
    with exhaustion_reported():
        run = prepare_run(config, dataset, section, groups, live)
        return fit(run, section.train, workdir, whose, progress, bar)


def prepare_run(
    config: ConfigDict,
    dataset: Dataset,
    section: ConfigDict,
    groups: Sequence[Group],
    live: Teacher | None,
) -> Run:
    """The run of these groups on the batches of `section`: `config`, or `config.teacher`."""
    check_same("dataset", str(dataset.identity))
    check_memory(config, groups, section.batch, dataset.spec)
    sizes = [len(group.names) for group in groups]
    mapping = device_mapping(config, sizes, section.batch.requests)
    if jax.devices()[0].platform == "tpu":
        for line in padding_of(groups):
            logging.warning("%s", line)
    stage = TEACHER_STAGES[config.teacher.stage]
    teacher = LiveTeacher(live.model, stage) if live else None
    needs = recipes.needs(groups, teacher, stage)
    batches = batches_of_run(config, dataset, section.batch, mapping, needs)
    frozen = Frozen(
        items=jax.tree.map(jnp.asarray, dataset.items),
        teacher=live.parameters if live else None,
    )
    return make_run(groups, teacher, batches, frozen, mapping)
