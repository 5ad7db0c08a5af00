"""The training programs of a config, compiled for devices that are not here.

They are the programs of a run, lowered for shapes in place of arrays: no table is ever made.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from kd_ranker.ahead import hlo
from kd_ranker.ahead.hlo import Compiled
from kd_ranker.ahead.topologies import Topology
from kd_ranker.batch import FeatureSpec, abstract_items
from kd_ranker.batches.cutting import Span
from kd_ranker.config import checks
from kd_ranker.embedding.lookup import without_slots
from kd_ranker.embedding.row_optimizers import TPU_LANES
from kd_ranker.errors import check_choice
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline import datasets, runs
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset, read_requests
from kd_ranker.requests.request import SPLITS, Source
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep.members import sweep_members
from kd_ranker.training import recipes, workdir
from kd_ranker.training.loop import abstract_states, filled_for, hold, map_steps
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.placing import is_of_tables, names_of
from kd_ranker.training.recipes import TEACHER_STAGES, Group
from kd_ranker.training.state import Frozen, LiveTeacher, select_member

# Requests of the sample dataset.
_SAMPLE = 32


class Sizes(NamedTuple):
    """The sizes that a config's programs are compiled for.

    Attributes:
      spec: of the features.
      sample: a small dataset of the same requests; it determines how batches are packed.
    """

    spec: FeatureSpec
    sample: Dataset


class Finding(NamedTuple):
    """The outcome of compiling a program.

    Attributes:
      name: one of `PROGRAMS`.
      topology: the devices.
      devices: how many of them the program runs on.
      tables: bytes of the embedding tables on one device, without padding of the layout.
      flops: FLOPs of one step or batch on one device, as XLA counts before optimizing.
      compiled: facts about the program; None if it does not fit.
      refused: the compiler's message if it does not fit, else "".
    """

    name: str
    topology: Topology
    devices: int
    tables: int
    flops: float
    compiled: Compiled | None = None
    refused: str = ""

    @property
    def fits(self) -> bool:
        """Test if a device's memory holds it."""
        return self.compiled is not None and self.compiled.total <= self.topology.memory


def sizes_of(
    config: ConfigDict, folder: Path, users: int | None = None, items: int | None = None
) -> Sizes:
    """Return the sizes of a config's dataset, which must exist unless it is simulated.

    Args:
      config: names the dataset.
      folder: for a sample of the dataset.
      users: replaces the number of users.
      items: replaces the number of items.

    Raises:
      UserError: the dataset does not exist.
    """
    entry = SOURCES[config.data.name]
    exists = storage.directory_of(datasets.dataset_name(config), config.data.dir).exists()
    if entry.simulated and not exists:
        source = entry.open_source(config.data, config.tasks, config.funnel)
        spec, requests = source.spec, source.requests("train")
    else:
        dataset = datasets.dataset_of(config)
        spec, requests = dataset.spec, read_requests(dataset, "train")
    first = list(itertools.islice(requests, _SAMPLE))
    few = Source(
        spec=spec,
        item_features=np.zeros((1, spec.item_features), np.float32),
        item_category=np.zeros((1, spec.category_width("item")), np.int32),
        requests=lambda _: iter(first),
        num_requests=dict.fromkeys(SPLITS, len(first)),
    )
    storage.build(few, "sample", str(folder))
    sample = storage.open_dataset("sample", str(folder), made_by=datasets.PREPARE_DATA)
    users, items = users or spec.num_users, items or spec.num_items
    return Sizes(dataclasses.replace(spec, num_users=users, num_items=items), sample)


def _teacher_groups(config: ConfigDict, spec: FeatureSpec) -> list[Group]:
    return [recipes.teacher_group(config, spec)]


def _first_cohort(config: ConfigDict, spec: FeatureSpec) -> list[Group]:
    cohort = itertools.islice(sweep_members(config).items(), config.sweep.group_size or None)
    return recipes.student_groups(dict(cohort), spec)


PROGRAMS: dict[str, Callable[[ConfigDict, FeatureSpec], list[Group]]] = {
    "train": lambda config, spec: recipes.student_groups({"": config}, spec),
    "sweep": _first_cohort,
    "train_teacher": _teacher_groups,
}
"""The groups that a program trains, by the command that runs it; `sweep` has its first cohort."""


def _lower(
    name: str, config: ConfigDict, sizes: Sizes, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, Any]:
    """Lower the steps of a program, spread over devices; also return its states and frozen arrays.

    Both are abstract, with their placement.
    """
    section = config.teacher if name == "train_teacher" else config
    groups = PROGRAMS[name](config, sizes.spec)
    numbers = [len(group.names) for group in groups]
    mapping = runs.device_mapping(config, numbers, section.batch.requests, devices)
    filled = filled_for(groups, mapping)
    stage = TEACHER_STAGES[config.teacher.stage]
    teacher, learned = None, None
    is_live = name != "train_teacher" and config.teacher.source == "live"
    if is_live and "logged" in recipes.signals_of(filled):
        model, learned = _teacher(config, sizes.spec, devices[0].platform)
        teacher = LiveTeacher(model, stage)
    here = MAPPINGS["shard_map"](jax.devices("cpu")[:1])
    needs = recipes.needs(filled, teacher, stage)
    batches = runs.batches_of_run(config, sizes.sample, section.batch, here, needs)
    packed, _ = iter(batches).take(1)
    one: Any = jnp.int32(0)
    states = mapping.place(abstract_states(filled))
    frozen = hold(Frozen(abstract_items(sizes.spec), learned), mapping)
    same_on_all = (Span(one, one), tuple(group.numbers for group in filled))
    arguments = states, mapping.shard(_shapes(packed)), _shapes(same_on_all), frozen
    return map_steps(filled, teacher, mapping).lower(*arguments), (states, frozen)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _teacher(config: ConfigDict, spec: FeatureSpec, platform: str) -> tuple[Model, Parameters]:
    """The abstract teacher of `teacher.workdir` if that exists, else of `config`."""
    folder = Path(config.teacher.workdir)
    if config.teacher.workdir and (folder / workdir.CONFIG_FILE).exists():
        config = workdir.read_config(folder)
    group = recipes.teacher_group(config, spec)
    model, (state,) = group.recipe.model, abstract_states([group])
    lanes = TPU_LANES if platform == "tpu" else 1

    def served(parameters: Parameters) -> Parameters:
        learned = select_member(parameters, 0)
        return learned.replace(tables=without_slots(model.embedding, learned.tables, lanes))

    return model, jax.eval_shape(served, state.parameters)


def _tables_and_sizes(held: Any) -> tuple[int, set[int]]:
    """Bytes of the tables of one device, and the numbers of entries of arrays not to be copied.

    Those are tables, one member's table, and other arrays with an entry per item or row of a table.
    """
    tables, others = list[Any](), list[Any]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        shape = leaf.sharding.shard_shape(leaf.shape)
        (tables if is_of_tables(path) else others).append((path, shape, leaf.dtype))
    rows = {shape[-2] for _, shape, _ in tables} | {
        shape[0] for path, shape, _ in others if names_of(path) & {"features", "category"}
    }
    sizes = {math.prod(of) for _, shape, _ in tables for of in (shape, shape[-2:])}
    sizes |= {math.prod(shape) for _, shape, _ in others if rows & {*shape}}
    return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in tables), sizes - {0}


def compile_program(name: str, config: ConfigDict, sizes: Sizes, topology: Topology) -> Finding:
    """Compile a program for the devices of a topology.

    Args:
      name: one of `PROGRAMS`.
      config: that of the experiment; the first `parallel.devices` of the topology take part.
      sizes: of its dataset.
      topology: the devices.

    Raises:
      UserError: there is no such program, or the devices cannot share its batches.
    """
    check_choice("program", name, PROGRAMS)
    checks.validate(config, len(topology.devices))
    if name == "train":
        checks.check_single(config, len(topology.devices))
    number = config.parallel.devices or len(topology.devices)
    config = config.copy_and_resolve_references()
    # Of this, JAX makes `pmap` as well, which takes no abstract arrays.
    config.parallel.mapping = "shard_map"
    lowered, held = _lower(name, config, sizes, topology.devices[:number])
    tables, entries = _tables_and_sizes(held)
    # For one device's share, on a CPU, so that devices can be compared.
    for batch in (config.batch, config.teacher.batch):
        batch.requests //= number
    on_cpu, _ = _lower(name, config, sizes, jax.devices("cpu")[:1])
    counted: Any = on_cpu.cost_analysis()
    found = Finding(name, topology, number, tables, counted["flops"])
    try:
        made = lowered.compile(dict(topology.options))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found._replace(refused=str(error).splitlines()[0])
    return found._replace(compiled=hlo.read(made, entries))


def as_json(finding: Finding) -> dict[str, Any]:
    """Return a finding for a file."""
    topology, found = finding.topology, finding.compiled
    names = ("devices", "fits", "refused", "tables", "flops")
    return {
        "topology": topology.name,
        "memory": topology.memory,
        **{name: getattr(finding, name) for name in names},
        **(found._asdict() | {"exchanged": found.exchanged} if found else {}),
    }


def findings_table(findings: Sequence[Finding], style: str = "simple") -> str:
    """Format findings as a table, one line each, with MiB per device."""
    lines = [_line(finding) for finding in findings]
    return tabulate(lines, headers="keys", tablefmt=style, disable_numparse=True)


def _line(finding: Finding) -> dict[str, str]:
    found, memory = finding.compiled, finding.topology.memory

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
        "million cycles": f"{found.cycles / 1e6:.2g}" if found and found.cycles else "",
    }
