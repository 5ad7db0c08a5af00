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
from kd_ranker.batches.cutting import Span
from kd_ranker.config import checks
from kd_ranker.config.runs import Runs, sweep_runs
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import check_choice
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.pipeline import datasets, training
from kd_ranker.pipeline.job import TrainingJob
from kd_ranker.pipeline.trained import TrainedRanker, served
from kd_ranker.pipeline.trainees import Trainees
from kd_ranker.progress import Progress
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
        spec = source.spec
        requests = requests_in(source.blocks("train"))
    else:
        dataset = datasets.dataset_of(config)
        spec = dataset.spec
        requests = read_requests(dataset, "train")
    columns = columns_of(list(itertools.islice(requests, _SAMPLE)), spec, for_training=True)
    spec = dataclasses.replace(
        spec, num_users=users or spec.num_users, num_items=items or spec.num_items
    )
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
    """Return the job of a program on a sample, with shapes in place of the parameters of a teacher.

    The teacher is that of `teacher.workdir` if that exists, else of `config`.
    """
    trainees = Trainees(config, {}, sample, devices)
    runs = PROGRAMS[name](config)
    teacher = None
    if runs:
        trainees = trainees.of(runs)
    if runs and config.teacher.source == "live":
        folder = Path(config.teacher.workdir)
        exists = config.teacher.workdir and (folder / workdir.CONFIG_FILE).exists()
        trained = workdir.read_config(folder) if exists else config
        stack = specs.teacher_stack(trained, sample.spec)
        model = stack.train_spec.model
        (state,) = abstract_states([stack])
        learned = jax.eval_shape(
            lambda parameters: served(model, select_run(parameters, 0), devices[0].platform),
            state.parameters,
        )
        teacher = TrainedRanker(
            title="",
            trainees=Trainees(trained, {}, sample, devices),
            run="",
            serve="user",
            model=model,
            ranker=Ranker(make_serve(model, MODES["none"]), learned),
            version="",
            provenance={},
        )
    return TrainingJob(trainees, teacher, sample, Progress())


def _tables_and_sizes(held: Any) -> tuple[int, set[int]]:
    """Return the bytes of one device's tables, and the entries of arrays not to be copied."""
    tables: list[tuple[int, ...]] = []
    others: list[tuple[int, ...]] = []
    rows: set[int] = set()  # of the tables, and of the arrays of items
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        shape = leaf.sharding.shard_shape(leaf.shape)
        if is_of_tables(path):
            tables.append(shape)
            rows.add(shape[-2])
        else:
            others.append(shape)
            if names_of(path) & {"features", "category"}:
                rows.add(shape[-2])
    sizes: set[int] = set()
    for shape in tables:
        sizes.add(math.prod(shape))
        sizes.add(math.prod(shape[-2:]))  # of one run
    for shape in others:
        if rows & set(shape):
            sizes.add(math.prod(shape))
    num_bytes = 4 * sum(math.prod(shape) for shape in tables)  # float32
    return num_bytes, sizes - {0}


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
    packed, _ = program.batches.take(1)
    zero: Any = jnp.int32(0)  # an array, as within a compiled program
    span = Span(zero, zero)
    take: Any = program.take  # as JAX has made it, which can be lowered
    states = program.devices.place(abstract_states(program.filled))
    batches, same = jax.eval_shape(lambda: (packed, (span, program.hyperparameters)))
    lowered = take.lower(states, program.devices.shard(batches), same, program.constants)
    tables, entries = _tables_and_sizes((states, program.constants))
    finding = Finding(name, topology, len(devices), tables)
    try:
        executable = lowered.compile(dict(topology.options))
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        return finding._replace(refused=str(error).splitlines()[0])
    return finding._replace(compiled=read_compiled(executable, entries))


def findings_table(findings: Sequence[Finding], style: str = "simple") -> str:
    """Format findings as a table, in a style of `tabulate`, with MiB per device."""
    return tabulate(map(line_of, findings), headers="keys", tablefmt=style, disable_numparse=True)


def line_of(finding: Finding) -> dict[str, str]:
    """Return a line of the table by column."""

    def mib(number: int) -> str:
        return f"{number / 2**20:,.0f}"

    compiled = finding.compiled
    memory = mib(finding.topology.memory)
    line = {
        "program": finding.name,
        "devices": f"{finding.devices} of {finding.topology.name}",
        "fits": "yes" if finding.fits else "NO",
        "in all": f"> {memory}",
        "tables": mib(finding.tables),
        "temporary": "",
        "copies": "",
        "row loops": "",
        "exchanged": "",
        "million cycles": "",
    }
    if compiled is not None:
        line["in all"] = f"{mib(compiled.total)} of {memory}"
        line["temporary"] = mib(compiled.temporary)
        line["copies"] = str(len(compiled.copies))
        line["row loops"] = str(len(compiled.loops))
        line["exchanged"] = mib(compiled.exchanged)
        if compiled.cycles:
            line["million cycles"] = f"{compiled.cycles / 1e6:.2g}"
    return line
