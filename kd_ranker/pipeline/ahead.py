"""Programs of a config, compiled ahead of time for devices that are not here.

They are the very programs of a run, handed shapes in place of arrays: nothing of a table's size is
ever made. So a config can be tried on a pod of TPUs, or on H100s, before either is paid for.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict
from tabulate import tabulate

from kd_ranker.batch import (
    WHOLE,
    EvaluationBatch,
    FeatureSpec,
    Request,
    abstract_items,
    empty_batch,
)
from kd_ranker.batches.cutting import Span
from kd_ranker.batches.training import Needs
from kd_ranker.config import checks
from kd_ranker.config.identity import dataset_name
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import check_choice
from kd_ranker.evaluation.evaluate import Ranker, lower_for_group, make_serve
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import compiled, runs, teachers
from kd_ranker.pipeline.compiled import Compiled
from kd_ranker.pipeline.remote import fetched, place_of
from kd_ranker.pipeline.topologies import Topology
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset, read_requests
from kd_ranker.requests.request import SPLITS, Source
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import recipes
from kd_ranker.training import workdir as workdirs
from kd_ranker.training.mapping import shard_map
from kd_ranker.training.placing import abstract, is_of_tables, places
from kd_ranker.training.recipes import TEACHER_STAGES, Group
from kd_ranker.training.run import abstract_states, filled_for, map_steps, padding_of
from kd_ranker.training.state import Frozen, LiveTeacher, select_member

# The requests of a dataset that are looked at to see how batches are packed.
_SAMPLE = 32


class Sizes(NamedTuple):
    """The sizes that a config's programs are compiled for.

    Attributes:
      spec: of the features.
      sample: a small dataset of the same requests, which says how a batch is packed.
    """

    spec: FeatureSpec
    sample: Dataset


class Program(NamedTuple):
    """A program, lowered for devices of any kind.

    Attributes:
      lowered: the program.
      tables: bytes of its embedding tables, on a device.
      sizes: the numbers of entries of its tables, all members' together and each one's.
      others: those of the other arrays with an entry an item, or a row of a table.
    """

    lowered: jax.stages.Lowered
    tables: int
    sizes: frozenset[int]
    others: frozenset[int]


class Finding(NamedTuple):
    """The outcome of compiling a program.

    Attributes:
      name: one of `PROGRAMS`.
      topology: the devices.
      devices: how many of them the program runs on.
      tables: bytes of its embedding tables, on a device, without what the layout adds.
      flops: FLOPs of a step, or of a batch, on a device, as XLA counts them before it optimises.
      compiled: what the compiler says; None where it does not fit.
      refused: the compiler's words where it does not fit; "" elsewhere.
      text: of the optimised program; None where it does not fit.
    """

    name: str
    topology: Topology
    devices: int
    tables: int
    flops: float
    compiled: Compiled | None
    refused: str
    text: str | None

    @property
    def fits(self) -> bool:
        """Tests if a device's memory holds it."""
        return self.compiled is not None and self.compiled.total <= self.topology.chip.memory


def sizes_of(
    config: ConfigDict, folder: Path, users: int | None = None, items: int | None = None
) -> Sizes:
    """The sizes of a config's dataset, of one that is built or, if it is simulated, is not.

    Args:
      config: names the dataset.
      folder: where to write a sample of it.
      users: takes the place of the number of users.
      items: the same of items.

    Raises:
      UserError: the dataset is not built.
    """
    spec, requests = _head(config)
    few = Source(
        spec=spec,
        item_features=np.zeros((1, spec.item_features), np.float32),
        item_category=np.zeros((1, spec.category_width("item")), np.int32),
        requests=lambda _: iter(requests),
        num_requests=dict.fromkeys(SPLITS, len(requests)),
    )
    storage.build(few, "sample", str(folder))
    sample = storage.open_dataset("sample", str(folder), made_by=teachers.PREPARE_DATA)
    numbers = (users or spec.num_users, items or spec.num_items)
    return Sizes(dataclasses.replace(spec, num_users=numbers[0], num_items=numbers[1]), sample)


def _head(config: ConfigDict) -> tuple[FeatureSpec, list[Request]]:
    """The sizes of a dataset and its first requests."""
    entry = SOURCES[config.data.name]
    directory = storage.directory_of(dataset_name(config), config.data.dir)
    if entry.simulated and not directory.exists():
        source = entry.open_source(config.data, config.tasks, config.funnel)
        return source.spec, list(itertools.islice(source.requests("train"), _SAMPLE))
    dataset = teachers.dataset_of(config)
    return dataset.spec, list(itertools.islice(read_requests(dataset, "train"), _SAMPLE))


def _train(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """The steps of `experiments.train`."""
    return _steps(config, sizes, trained_by("train", config, sizes.spec), devices)


def _sweep(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """The steps of a cohort of `experiments.sweep`."""
    return _steps(config, sizes, trained_by("sweep", config, sizes.spec), devices)


def _train_teacher(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """The steps of `experiments.train_teacher`."""
    return _steps(config, sizes, trained_by("train_teacher", config, sizes.spec), devices)


def _evaluate(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """A batch on which a student is measured."""
    return _measuring(config, sizes, _student(config, sizes.spec), devices)


def _evaluate_sweep(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """A batch on which the first group of a cohort is measured."""
    return _measuring(config, sizes, _cohort(config, sizes.spec), devices)


def _score(config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]) -> Program:
    """A batch that the teacher scores, for `experiments.log_teacher` or to be measured against."""
    model, learned = _teacher(config, sizes.spec, devices[0].platform)
    parameters, items, batch = _on(
        devices[0], learned, abstract_items(sizes.spec), _seen(config, sizes.spec).batch
    )
    serve: Any = make_serve(model, MODES["none"])
    return _program(serve.lower(parameters, batch, items), parameters, items)


PROGRAMS: dict[str, Callable[[ConfigDict, Sizes, Sequence[jax.Device]], Program]] = {
    "train": _train,
    "sweep": _sweep,
    "train_teacher": _train_teacher,
    "evaluate": _evaluate,
    "evaluate_sweep": _evaluate_sweep,
    "score": _score,
}
"""The programs of a config, by name; those that train are spread over all devices."""

TRAINING = ("train", "sweep", "train_teacher")


class Trained(NamedTuple):
    """The training of a program.

    Attributes:
      section: of the config with its batches and steps: the config itself, or `config.teacher`.
      groups: the groups that train.
      teacher: the live teacher whom they hear, and its parameters by their shapes, for the platform
        of a device; None where they hear none.
    """

    section: ConfigDict
    groups: Sequence[Group]
    teacher: Callable[[str], tuple[Model, Parameters]] | None


def trained_by(name: str, config: ConfigDict, spec: FeatureSpec) -> Trained:
    """The training of one of `TRAINING`."""
    if name == "train_teacher":
        return Trained(config.teacher, [recipes.teacher_group(config, spec)], None)
    groups = _student(config, spec) if name == "train" else _cohort(config, spec)
    hears = config.teacher.source == "live" and "logged" in recipes.signals_of(groups)
    return Trained(config, groups, functools.partial(_teacher, config, spec) if hears else None)


def programs_of(config: ConfigDict) -> list[str]:
    """The programs that a single student needs, and its teacher, where one is trained here."""
    trains_one = config.teacher.source == "live" or bool(config.teacher.workdir)
    return ["train", "evaluate", *(("train_teacher", "score") if trains_one else ())]


def _student(config: ConfigDict, spec: FeatureSpec) -> list[Group]:
    return recipes.student_groups({"": config}, spec)


def _cohort(config: ConfigDict, spec: FeatureSpec) -> list[Group]:
    """The first `sweep.group_size` members of a sweep, or all of them."""
    members = sweep_members(config).items()
    cohort = itertools.islice(members, config.sweep.group_size or None)
    return recipes.student_groups(dict(cohort), spec)


def _steps(
    config: ConfigDict, sizes: Sizes, trained: Trained, devices: Sequence[jax.Device]
) -> Program:
    """The steps of groups on their batches."""
    section, groups = trained.section, trained.groups
    sizes_of_groups = [len(group.names) for group in groups]
    mapping = runs.device_mapping(config, sizes_of_groups, section.batch.requests, devices)
    groups = filled_for(groups, mapping)
    stage = TEACHER_STAGES[config.teacher.stage]
    teacher, learned = None, None
    if trained.teacher:
        model, learned = trained.teacher(devices[0].platform)
        teacher = LiveTeacher(model, stage)
    needs = recipes.needs(groups, teacher, stage)
    states = abstract_states(groups)
    frozen = Frozen(items=abstract_items(sizes.spec), teacher=learned)
    one = jnp.int32(0)
    numbers: Any = (Span(one, one), tuple(group.numbers for group in groups))  # type: ignore[arg-type]
    placed, held = mapping.abstract_place(states), mapping.abstract_hold(frozen)
    lowered = map_steps(groups, teacher, mapping).lower(
        placed,
        mapping.abstract_shard(_batches(config, sizes, section.batch, needs)),
        _shapes(numbers),
        held,
    )
    if mapping.members == 1 and mapping.deal == WHOLE:
        return _program(lowered, states, frozen)
    return _program(lowered, *(jax.tree.map(_of_a_device, tree) for tree in (placed, held)))


def _batches(config: ConfigDict, sizes: Sizes, batch: ConfigDict, needs: Needs) -> Any:
    """The packed batches of a few steps, as a run on `sizes.sample` would make its first."""
    here = shard_map(jax.devices("cpu")[:1])
    made, _ = iter(runs.batches_of_run(config, sizes.sample, batch, here, needs)).take(1)
    return _shapes(made)


def _of_a_device(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The part of an array that one of its devices holds, by its shape."""
    assert leaf.sharding is not None
    return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _measuring(
    config: ConfigDict, sizes: Sizes, groups: Sequence[Group], devices: Sequence[jax.Device]
) -> Program:
    """A batch on which the first of these groups is measured, on one device."""
    recipe, spec = groups[0].recipe, sizes.spec
    (state, *_) = abstract_states(groups)
    parameters, items, batch = _on(
        devices[0], state.parameters, abstract_items(spec), _seen(config, spec)
    )
    ranker = Ranker(make_serve(recipe.model, recipe.mode), parameters)
    lowered = lower_for_group(ranker, batch, items)
    return _program(lowered, parameters, items)


def _seen(config: ConfigDict, spec: FeatureSpec) -> EvaluationBatch:
    """A batch of the evaluation."""
    requests, candidates = config.evaluation.requests, config.funnel.retrieved
    batch: Any = empty_batch(spec, requests, candidates)
    truth: Any = np.zeros((requests, candidates, len(spec.tasks)), np.float32)
    present: Any = np.zeros(requests, bool)
    return EvaluationBatch(batch, truth, truth[..., 0], truth[..., 0], present)


def _on(device: jax.Device, *trees: Any) -> list[Any]:
    """Pytrees by their shapes, as they lie on one device."""
    return [abstract(tree, places(tree, SingleDeviceSharding(device))) for tree in trees]


def _teacher(config: ConfigDict, spec: FeatureSpec, platform: str) -> tuple[Model, Parameters]:
    """The teacher by its shapes: that of `teacher.workdir`, if it is there, or of `config`."""
    if config.teacher.workdir:
        with fetched(place_of(config.teacher.workdir), with_checkpoints=False) as workdir:
            if (workdir / workdirs.CONFIG_FILE).exists():
                config = workdirs.read_config(workdir)
    group = recipes.teacher_group(config, spec)
    model, (state,) = group.recipe.model, abstract_states([group])
    lanes = TPU_LANES if platform == "tpu" else 1

    def served(parameters: Parameters) -> Parameters:
        learned = select_member(parameters, 0)
        tables = without_slots(model.embedding, learned.tables, lanes)
        return learned.replace(tables=tables)

    return model, jax.eval_shape(served, state.parameters)


def _program(lowered: jax.stages.Lowered, *held: Any) -> Program:
    """A program that is handed these pytrees, and batches beside them."""
    leaves = jax.tree_util.tree_leaves_with_path(held)
    tables = [leaf for path, leaf in leaves if is_of_tables(path)]
    items = [leaf for path, leaf in leaves if _is_of_items(path)]
    rows = {table.shape[-2] for table in tables} | {leaf.shape[0] for leaf in items}
    others = [leaf.size for path, leaf in leaves if not is_of_tables(path) and rows & {*leaf.shape}]
    return Program(
        lowered,
        sum(table.size * table.dtype.itemsize for table in tables),
        frozenset(size for table in tables for size in (table.size, math.prod(table.shape[-2:]))),
        frozenset(size for size in others if size),
    )


def _is_of_items(path: jax.tree_util.KeyPath) -> bool:
    return getattr(path[-1], "name", None) in ("features", "category")


def compile_program(name: str, config: ConfigDict, sizes: Sizes, topology: Topology) -> Finding:
    """Compiles a program for the devices of a topology.

    Args:
      name: one of `PROGRAMS`.
      config: that of the experiment; `parallel.devices` of the topology's take part.
      sizes: of its dataset.
      topology: the devices.

    Raises:
      UserError: there is no such program, or its batch cannot be shared by the devices.
    """
    check_choice("program", name, PROGRAMS)
    checks.validate(config, len(topology.devices))
    if name == "train":
        checks.check_alone(config, len(topology.devices))
    number = (config.parallel.devices or len(topology.devices)) if name in TRAINING else 1
    program = PROGRAMS[name](config, sizes, topology.devices[:number])
    # Of a device's share, and as XLA counts on a CPU, so that devices can be compared.
    share = _share(config, number)
    counted: Any = PROGRAMS[name](share, sizes, jax.devices("cpu")[:1]).lowered.cost_analysis()
    found = Finding(name, topology, number, program.tables, counted["flops"], None, "", None)
    try:
        made = program.lowered.compile(dict(topology.options))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found._replace(refused=str(error).splitlines()[0])
    return found._replace(
        compiled=compiled.read(made, program.sizes, program.others), text=made.as_text()
    )


def _share(config: ConfigDict, devices: int) -> ConfigDict:
    """The config of one device that has its share of each batch."""
    share = config.copy_and_resolve_references()
    share.parallel.mapping = "shard_map"
    for batch in (share.batch, share.teacher.batch):
        batch.requests //= devices
    return share


def limit_of(finding: Finding) -> str:
    """The words for what limits a program: memory, or the kind of work with the most cycles."""
    found = finding.compiled
    if found is None:
        return finding.refused
    if not finding.fits:
        return "memory, for the tables" if 2 * finding.tables > found.total else "memory"
    if not found.cycles:
        least = finding.flops / finding.topology.chip.arithmetic
        return f"not told; products take {1e3 * least:.2g} ms at least"
    total = sum(found.cycles.values())
    kind, most = max(found.cycles.items(), key=lambda item: item[1])
    return f"{kind}, {most / total:.0%} of {total / 1e6:.2g} M cycles"


def advice(config: ConfigDict, sizes: Sizes, topology: Topology) -> list[str]:
    """Lines on what a config could have otherwise on these devices."""
    if topology.devices[0].platform != "tpu":
        return []
    spec = sizes.spec
    return padding_of([*_student(config, spec), recipes.teacher_group(config, spec)])


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding without the program's text, for a file."""
    found = finding.compiled
    return {
        "topology": finding.topology.name,
        "devices": finding.devices,
        "fits": finding.fits,
        "refused": finding.refused,
        "memory": finding.topology.chip.memory,
        "tables": finding.tables,
        "flops": finding.flops,
        **(found._asdict() | {"exchanged": found.exchanged} if found else {}),
    }


def findings_table(findings: Sequence[Finding], style: str = "simple") -> str:
    """A table of findings, a line each, memory in MiB of a device."""
    return tabulate(
        [_line(finding) for finding in findings],
        headers="keys",
        tablefmt=style,
        disable_numparse=True,
    )


def _line(finding: Finding) -> dict[str, str]:
    found, memory = finding.compiled, finding.topology.chip.memory

    def mib(number: int) -> str:
        return f"{number / 2**20:,.0f}"

    return {
        "program": finding.name,
        "devices": f"{finding.devices} of {finding.topology.name}",
        "fits": "yes" if finding.fits else "NO",
        "in all": f"{mib(found.total)} of {mib(memory)}" if found else f"> {mib(memory)}",
        "tables": mib(finding.tables),
        "temporary": mib(found.temporary) if found else "",
        "copies": str(len(found.copies)) if found else "",
        "row loops": str(len(found.loops)) if found else "",
        "exchanged": mib(found.exchanged) if found else "",
        "GFLOP": f"{finding.flops / 1e9:.3g}",
        "limit": limit_of(finding),
    }
