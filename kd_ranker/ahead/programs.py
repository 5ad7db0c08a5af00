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
from ml_collections import ConfigDict
from tabulate import tabulate

from kd_ranker.ahead import hlo
from kd_ranker.ahead.hlo import Compiled
from kd_ranker.ahead.topologies import Topology
from kd_ranker.batch import abstract_items
from kd_ranker.batches.cutting import Span
from kd_ranker.config import checks
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import check_choice
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.pipeline import datasets, runs
from kd_ranker.pipeline.job import Job
from kd_ranker.pipeline.trained import Finished, served
from kd_ranker.requests import storage
from kd_ranker.requests.columns import columns_of
from kd_ranker.requests.records import Dataset, read_requests
from kd_ranker.sources.registry import SOURCES
from kd_ranker.sweep import Members, sweep_members
from kd_ranker.training import recipes, workdir
from kd_ranker.training.loop import abstract_states
from kd_ranker.training.mapping import MAPPINGS, is_of_tables, names_of

# Requests of the sample dataset.
_SAMPLE = 32


class Finding(NamedTuple):
    """The outcome of compiling one of `PROGRAMS` for a number of devices of a topology.

    `tables` are bytes of embedding tables on one device, without padding of the layout. `flops` are
    of one step or batch on one device, as XLA counts before optimizing. If the program does not
    fit, `compiled` is None and `refused` is the compiler's message.
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
        """True if a device's memory holds it."""
        return self.compiled is not None and self.compiled.total <= self.topology.memory


def sample_of(config: ConfigDict, users: int | None = None, items: int | None = None) -> Dataset:
    """Return the sizes of a config's dataset and its first requests, which determine batches.

    Raises:
      UserError: the dataset, which is not simulated, does not exist.
    """
    entry = SOURCES[config.data.name]
    exists = storage.directory_of(datasets.dataset_name(config), config.data.dir).exists()
    if entry.simulated and not exists:
        source = entry.open_source(config.data, config.tasks, config.funnel)
        spec, requests = source.spec, source.requests("train")
    else:
        dataset = datasets.dataset_of(config)
        spec, requests = dataset.spec, read_requests(dataset, "train")
    columns = columns_of(list(itertools.islice(requests, _SAMPLE)), spec)
    users, items = users or spec.num_users, items or spec.num_items
    spec = dataclasses.replace(spec, num_users=users, num_items=items)
    shapes: Any = abstract_items(spec)
    return Dataset(
        directory=Path(),
        identity={},
        made_by=datasets.PREPARE_DATA,
        spec=spec,
        item_features=shapes.features,
        item_category=shapes.category,
        columns={"train": columns},
    )


def _job_of_shapes(name: str, config: ConfigDict, sample: Dataset, platform: str) -> Job:
    """The job of a program on a sample, with shapes in place of the parameters of a teacher.

    The teacher is that of `teacher.workdir` if that exists, else of `config`.
    """
    job, members = Job(config, {}, sample), PROGRAMS[name](config)
    if not members:
        return job
    finished = None
    if config.teacher.source == "live":
        folder = Path(config.teacher.workdir)
        exists = config.teacher.workdir and (folder / workdir.CONFIG_FILE).exists()
        trained = workdir.read_config(folder) if exists else config
        group = recipes.teacher_group(trained, sample.spec)
        model, (state,) = group.recipe.model, abstract_states([group])
        learned = jax.eval_shape(lambda of: served(model, of, platform), state.parameters)
        ranker = Ranker(make_serve(model, MODES["none"]), learned)
        finished = Finished("", "teacher", "", trained, "user", model, ranker, "", sample, {})
    job.last_teacher[next(iter(members.values())).teacher.workdir] = finished, sample
    return job.of(members)


PROGRAMS: dict[str, Callable[[ConfigDict], Members]] = {
    "train": lambda config: {"": config},
    "sweep": lambda config: dict(
        itertools.islice(sweep_members(config).items(), config.sweep.group_size or None)
    ),
    "train_teacher": lambda config: {},
}
"""The students that a program trains, by its command: of a sweep its first cohort."""


def _lower(
    name: str, config: ConfigDict, sample: Dataset, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, Any]:
    """Lower the steps of a program; also return its abstract states and frozen arrays, placed."""
    job = _job_of_shapes(name, config, sample, devices[0].platform)
    run = runs.prepare_run(job, devices, MAPPINGS["shard_map"](jax.devices("cpu")[:1]))
    packed, _ = run.batches.take(1)
    one: Any = jnp.int32(0)
    take: Any = run.take  # as JAX has made it, which can be lowered
    states = run.devices.place(abstract_states(run.filled))
    same_on_all = (Span(one, one), tuple(group.numbers for group in run.filled))
    batches, same = jax.eval_shape(lambda: (packed, same_on_all))
    lowered = take.lower(states, run.devices.shard(batches), same, run.frozen)
    return lowered, (states, run.frozen)


def _tables_and_sizes(held: Any) -> tuple[int, set[int]]:
    """Return the bytes of one device's tables, and the entries of arrays not to be copied."""
    # Those are tables, one member's table, and others with an entry per item or row of a table.
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


def compile_program(name: str, config: ConfigDict, sample: Dataset, topology: Topology) -> Finding:
    """Compile one of `PROGRAMS` for the first `parallel.devices` of a topology.

    `sample` is the result of `sample_of`.

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
    lowered, held = _lower(name, config, sample, topology.devices[:number])
    tables, entries = _tables_and_sizes(held)
    # For one device's share, on a CPU, so that devices can be compared.
    for batch in (config.batch, config.teacher.batch):
        batch.requests //= number
    on_cpu, _ = _lower(name, config, sample, jax.devices("cpu")[:1])
    counted: Any = on_cpu.cost_analysis()
    found = Finding(name, topology, number, tables, counted["flops"])
    try:
        made = lowered.compile(dict(topology.options))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found._replace(refused=str(error).splitlines()[0])
    return found._replace(compiled=hlo.read(made, entries))


def findings_table(findings: Sequence[Finding], style: str = "simple") -> str:
    """Format findings as a table, in a style of `tabulate`."""
    return tabulate(map(line_of, findings), headers="keys", tablefmt=style, disable_numparse=True)


def line_of(finding: Finding) -> dict[str, str]:
    """Return a line of the table, with MiB per device."""
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
