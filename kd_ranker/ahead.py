"""The training programs of a config, compiled for chips that are not here.

They are the programs of a run, lowered for shapes in place of arrays: no table is ever made. They
go through the real compiler of TPUs or H100s, which `scripts/test_compilers.sh` installs. The
result can be read (bytes, copies, cycles), but not run.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from ml_collections import ConfigDict
from tabulate import tabulate

from kd_ranker.batch import abstract_items
from kd_ranker.config import checks
from kd_ranker.config.runs import Runs, sweep_runs
from kd_ranker.distillation.modes import MODES
from kd_ranker.embedding.deal import RARELY
from kd_ranker.errors import UserError, check_choice
from kd_ranker.evaluation.evaluate import Ranker, make_serve
from kd_ranker.pipeline import datasets, training
from kd_ranker.pipeline.job import Finished, Job, served
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset, read_requests
from kd_ranker.requests.row_files import columns_of
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training import recipes, workdir
from kd_ranker.training.loop import abstract_states
from kd_ranker.training.mapping import MAPPINGS, is_of_tables, names_of
from kd_ranker.training.state import select_member

_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")

CHIPS: dict[str, tuple[int, tuple[str, ...]]] = {
    "v5e": (int(15.75 * _GIB), _FLAT),
    "v6e": (int(31.25 * _GIB), _FLAT),
    "v5p": (int(95.74 * _GIB), _CUBES),
    "h100": (84_942_979_072, ("1", "2", "4", "8")),
}
"""For each chip, the bytes that its compiler gives to a program, and the arrangements of chips.

An H100 is the SXM card, and its arrangements are the cards of one host.
"""

# The description of a card that XLA requires. Its names for the numbers are those of CUDA's device
# properties, for compute capability 9.0; see NVIDIA's Hopper tuning guide.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 1 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Libtpu reads these when it is loaded: there is no metadata server, and no TPU to lock.
_NO_TPU_HOST = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """Devices for the compiler only, such as "v5e:4x4".

    A program may use `memory` bytes on one device. `options` are for `jax.stages.Lowered.compile`.
    """

    name: str
    memory: int
    devices: tuple[jax.Device, ...]
    options: Mapping[str, Any]


def topology_names() -> list[str]:
    """Return the names of all topologies."""
    return [f"{name}:{shape}" for name, (_, shapes) in CHIPS.items() for shape in shapes]


def missing_packages(topology: str) -> str:
    """Return the packages that a topology's compiler needs and that are not installed."""
    of_cuda = ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    needed = of_cuda if topology.startswith("h100") else ("libtpu",)
    return ", ".join(name for name in needed if not [*metadata.distributions(name=name)])


def open_topology(name: str) -> Topology:
    """Return the devices of a topology, one of `topology_names`.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    check_choice("topology", name, topology_names())
    if missing := missing_packages(name):
        setup = "./scripts/test_compilers.sh --setup"
        raise UserError(f"topology={name} needs the packages {missing}; install them with: {setup}")
    kind, _, shape = name.partition(":")
    options: dict[str, Any] = {}
    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=kind, target_config=_H100, topology=f"1x1x{shape}"
        )
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
        (toolkit, *_) = (found and found.submodule_search_locations) or [""]
        # No card is there to time kernels on.
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        options["xla_gpu_cuda_data_dir"] = toolkit
    else:
        for variable, value in _NO_TPU_HOST.items():
            os.environ.setdefault(variable, value)
        rows, columns, depth = map(int, f"{shape}x1".split("x")[:3])
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{rows}x{columns}x{depth}",
            chips_per_host_bounds=(min(rows, 2), min(columns, 2), 1),
        )
    # A v5p has one device per chip, as JAX sees it.
    return Topology(name, CHIPS[kind][0], tuple(described.devices), options)


_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_ON_CHIP = "S(1)"  # the memory space in a TPU's layouts
_COPIES = ("copy", "transpose", "convert")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Compiled(NamedTuple):
    """Facts about a compiled program, for one device; memory and exchanges in bytes.

    `temporary` are arrays other than arguments and results; in `total`, a result in the place of an
    argument counts once. `cycles` are 0 where the compiler has no estimate, as for GPUs. `copies`
    copy, transpose or convert one of the given arrays. `loops` read or write one row per iteration.
    """

    temporary: int
    total: int
    cycles: int
    copies: tuple[str, ...]
    loops: tuple[str, ...]
    exchanged: int


def read_compiled(compiled: jax.stages.Compiled, sizes: Collection[int]) -> Compiled:
    """Read a program and its text; copies count for arrays with one of these entry counts."""
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    arrays = list(_moved(text))
    given, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Compiled(
        temporary=temporary,
        total=given + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        cycles=cycles_of(text),
        copies=tuple(f"{op} {of}" for op, of, size, _ in arrays if op in _COPIES and size in sizes),
        loops=loops_of(text),
        exchanged=sum(nbytes for op, *_, nbytes in arrays if op in _COLLECTIVES),
    )


def _moved(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Find the arrays that a program copies, and those that devices exchange or reduce.

    Copies into a TPU memory on the chip do not count: only small arrays fit there. Yields the
    operation without "-start", the type of the array, its entries, and its bytes.

    >>> list(_moved("%r = (f32[3]{0}, s32[2,2]{1,0}) all-reduce-start(%a, %b)"))[1]
    ('all-reduce', 's32[2,2]', 4, 16)
    """
    names = "|".join(_COPIES + _COLLECTIVES)
    pattern = rf"^[^=\n]* = ([^\n]*?) ({names})(?:-start)?\("
    for returned, operation in re.findall(pattern, text, re.MULTILINE):
        if operation in _COPIES and _ON_CHIP in returned:
            continue
        for dtype, sizes in _SHAPE.findall(returned):
            size = math.prod(map(int, filter(None, sizes.split(","))))
            bits = re.sub(r"^\D+", "", dtype)
            yield operation, f"{dtype}[{sizes}]", size, size * int(bits or 8) // 8


def cycles_of(text: str) -> int:
    """Sum the cycles that a TPU's compiler expects of a program's operations.

    The body of a loop counts once per iteration where their number is known, else once. The loop
    over steps counts once. Operations without an estimate count 0, as do those done `RARELY`.
    """
    pattern = r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}"
    bodies = {
        entry.strip() or name: body
        for entry, name, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    }

    def iterations(condition: str) -> int:
        """Return those of a loop that counts from 0 to a constant; 1 of any other."""
        body = bodies.get(condition, "")
        bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", body)
        return int(bounds[0]) if "direction=LT" in body and len(bounds) == 1 else 1

    def total(name: str) -> int:
        cycles = 0
        for line in bodies.get(name, "").splitlines():
            if inner := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
                cycles += 0 if RARELY in line else iterations(inner[1]) * total(inner[2])
            elif number := re.search(r'"estimated_cycles":"?(\d+)', line):
                cycles += int(number[1])
        return cycles

    return total("ENTRY")


def loops_of(text: str) -> tuple[str, ...]:
    """Find the loops that the compiler added to those of the source, by their operations.

    A compiler without a better way to read or write scattered rows does it in a loop. It keeps the
    name of the operation.

    >>> loops_of('%w = (s32[]) while(%t), body=%b, metadata={op_name="jit(f)/gather"}')
    ('jit(f)/gather',)
    """
    named = re.findall(r'^.* while\((?:.*op_name="([^"]*)")?.*$', text, re.MULTILINE)
    return tuple(name for name in named if name.rpartition("/")[2] != "while")


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
        spec, requests = source.spec, source.requests("train")
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
        itertools.islice(sweep_runs(config).items(), config.sweep.group_size or None)
    ),
    "train_teacher": lambda config: {},
}
"""The students that a program trains, by its command: of a sweep its first cohort."""


def _job_of_shapes(
    name: str, config: ConfigDict, sample: Dataset, devices: Sequence[jax.Device]
) -> Job:
    """The job of a program on a sample, with shapes in place of the parameters of a teacher.

    The teacher is that of `teacher.workdir` if that exists, else of `config`.
    """
    job, members = Job(config, {}, sample, devices), PROGRAMS[name](config)
    if not members:
        return job
    finished = None
    if config.teacher.source == "live":
        folder = Path(config.teacher.workdir)
        exists = config.teacher.workdir and (folder / workdir.CONFIG_FILE).exists()
        trained = workdir.read_config(folder) if exists else config
        group = recipes.teacher_group(trained, sample.spec)
        model, (state,) = group.recipe.model, abstract_states([group])
        learned = jax.eval_shape(
            lambda of: served(model, select_member(of, 0), devices[0].platform), state.parameters
        )
        ranker = Ranker(make_serve(model, MODES["none"]), learned)
        own = Job(trained, {}, sample, devices)
        finished = Finished("", own, "", "user", model, ranker, "", {})
    of_teacher = next(iter(members.values())).teacher
    job.last_teacher[of_teacher.workdir, of_teacher.stage] = finished, sample
    return job.of(members)


def _tables_and_sizes(held: Any) -> tuple[int, set[int]]:
    """Return the bytes of one device's tables, and the entries of arrays not to be copied."""
    # Those are tables, one member's table, and others with an entry per item or row of a table.
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
    run = training.prepare_run(job, MAPPINGS["shard_map"](jax.devices("cpu")[:1]))
    (packed, _), one = run.batches.take(1), jnp.int32(0)
    take: Any = run.take  # as JAX has made it, which can be lowered
    states = run.devices.place(abstract_states(run.filled))
    batches, same = jax.eval_shape(lambda: (packed, ((one, one), run.numbers)))
    lowered = take.lower(states, run.devices.shard(batches), same, run.frozen)
    tables, entries = _tables_and_sizes((states, run.frozen))
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
