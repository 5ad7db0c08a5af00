"""The training programs of a config, compiled for a topology.

They are the programs of a run, lowered for shapes in place of arrays: no table is ever made. They
go through the real compiler of the chips. The result can be read, but not run.
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

from kd_ranker.batch import abstract_items
from kd_ranker.config import checks
from kd_ranker.config.runs import Runs, sweep_runs
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import check_choice
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.pipeline import datasets, training
from kd_ranker.pipeline.job import TrainedRanker, TrainingJob, served
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset, read_requests
from kd_ranker.requests.request import requests_in
from kd_ranker.requests.row_files import columns_of
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training import specs, workdir
from kd_ranker.training.mapping import MAPPINGS, is_of_tables, names_of
from kd_ranker.training.program import abstract_states
from kd_ranker.training.state import select_run
from scripts.aot.compiled import Compiled, read_compiled
from scripts.aot.topologies import Topology

# Requests of the sample dataset.
_SAMPLE = 32


class Finding(NamedTuple):
    """The outcome of compiling one of `PROGRAMS` for a number of devices of a topology.

    `tables` are bytes of embedding tables on one device, without padding of the layout. If the
    program does not fit, `compiled` is None and `refused` is the compiler's message.
    """

    name: str
    topology: Topology
    devices: int
    tables: int
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
        spec, requests = source.spec, requests_in(source.blocks("train"))
    else:
        dataset = datasets.dataset_of(config)
        spec, requests = dataset.spec, read_requests(dataset, "train")
    columns = columns_of(list(itertools.islice(requests, _SAMPLE)), spec, for_training=True)
    users, items = users or spec.num_users, items or spec.num_items
    spec = dataclasses.replace(spec, num_users=users, num_items=items)
    return Dataset(Path(), {}, spec, abstract_items(spec), {"train": columns})


PROGRAMS: dict[str, Callable[[ConfigDict], Runs]] = {
    "train": lambda config: {"": config},
    "sweep": lambda config: dict(
        itertools.islice(sweep_runs(config).items(), config.sweep.cohort_size or None)
    ),
    "train_teacher": lambda config: {},
}
"""The students that a program trains, by its command: of a sweep its first cohort."""


def _job_of_shapes(
    name: str, config: ConfigDict, sample: Dataset, devices: Sequence[jax.Device]
) -> TrainingJob:
    """The job of a program on a sample, with shapes in place of the parameters of a teacher.

    The teacher is that of `teacher.workdir` if that exists, else of `config`.
    """
    job, runs = TrainingJob(config, {}, sample, devices), PROGRAMS[name](config)
    if not runs:
        return job
    finished = None
    if config.teacher.source == "live":
        folder = Path(config.teacher.workdir)
        exists = config.teacher.workdir and (folder / workdir.CONFIG_FILE).exists()
        trained = workdir.read_config(folder) if exists else config
        stack = specs.teacher_stack(trained, sample.spec)
        model, (state,) = stack.train_spec.model, abstract_states([stack])
        learned = jax.eval_shape(
            lambda of: served(model, select_run(of, 0), devices[0].platform), state.parameters
        )
        ranker = Ranker(make_serve(model, MODES["none"]), learned)
        own = TrainingJob(trained, {}, sample, devices)
        finished = TrainedRanker("", own, "", "user", model, ranker, "", {})
    of_teacher = next(iter(runs.values())).teacher
    job.last_teacher[of_teacher.workdir, of_teacher.stage] = finished, sample
    return job.of(runs)


def _tables_and_sizes(held: Any) -> tuple[int, set[int]]:
    """Return the bytes of one device's tables, and the entries of arrays not to be copied."""
    # Those are tables, one run's table, and others with an entry per item or row of a table.
    tables, others, rows = list[tuple[int, ...]](), list[tuple[int, ...]](), set[int]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        shape = leaf.sharding.shard_shape(leaf.shape)
        (tables if is_of_tables(path) else others).append(shape)
        if is_of_tables(path) or names_of(path) & {"features", "category"}:
            rows.add(shape[-2])
    sizes = {math.prod(of) for shape in tables for of in (shape, shape[-2:])}
    sizes |= {math.prod(shape) for shape in others if rows & {*shape}}
    return 4 * sum(map(math.prod, tables)), sizes - {0}  # float32


def compile_program(name: str, config: ConfigDict, sample: Dataset, topology: Topology) -> Finding:
    """Compile one of `PROGRAMS` for the first `parallel.devices` of a topology.

    `sample` is the result of `sample_of`.

    Raises:
      UserError: there is no such program, or the devices cannot share its batches.
    """
    check_choice("program", name, PROGRAMS)
    checks.validate(config, len(topology.devices), single=name == "train")
    devices = topology.devices[: config.parallel.devices or None]
    config = config.copy_and_resolve_references()
    # Of this, JAX makes `pmap` as well, which takes no abstract arrays.
    config.parallel.mapping = "shard_map"
    job = _job_of_shapes(name, config, sample, devices)
    program = training.prepare_program(job, MAPPINGS["shard_map"](jax.devices("cpu")[:1]))
    (packed, _), one = program.batches.take(1), jnp.int32(0)
    take: Any = program.take  # as JAX has made it, which can be lowered
    states = program.devices.place(abstract_states(program.filled))
    batches, same = jax.eval_shape(lambda: (packed, ((one, one), program.hyperparameters)))
    lowered = take.lower(states, program.devices.shard(batches), same, program.constants)
    tables, entries = _tables_and_sizes((states, program.constants))
    found = Finding(name, topology, len(devices), tables)
    try:
        made = lowered.compile(dict(topology.options))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return found._replace(refused=str(error).splitlines()[0])
    return found._replace(compiled=read_compiled(made, entries))


def findings_table(findings: Sequence[Finding], style: str = "simple") -> str:
    """Format findings as a table, in a style of `tabulate`, with MiB per device."""
    return tabulate(map(line_of, findings), headers="keys", tablefmt=style, disable_numparse=True)


def line_of(finding: Finding) -> dict[str, str]:
    """Return a line of the table by column."""
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
        "million cycles": f"{found.cycles / 1e6:.2g}" if found and found.cycles else "",
    }
