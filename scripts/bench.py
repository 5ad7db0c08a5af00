"""Benchmarks, each measuring what it compares in the same run on the same machine.

    python scripts/bench.py sweep  [--json FILE] [--members 16] [--steps N]
    python scripts/bench.py layout [--json FILE]

`sweep` is 16 members under a live teacher as one sweep against as many runs of `experiments.train`,
each a process of its own, start-up and compilation included. `layout` is ways of updating the
members' tables within one program.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs import cascade  # noqa: E402
from kd_ranker import teachers  # noqa: E402
from kd_ranker.data import loader  # noqa: E402
from kd_ranker.embedding.row_optimizers import (  # noqa: E402
    ROW_OPTIMIZERS,
    find_occurrences,
    update_tables,
)
from kd_ranker.training import recipes  # noqa: E402
from kd_ranker.training.mapping import MAPPINGS  # noqa: E402
from kd_ranker.training.step import Frozen, LiveTeacher, make_step  # noqa: E402

CASCADE = "--config=configs/cascade.py"


def main() -> None:
    """Runs one benchmark, prints what it found, and writes it where `--json` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, help="sweep: instead of the config's train.steps")
    arguments = parser.parse_args()
    result = {
        "name": arguments.name,
        **BENCHMARKS[arguments.name](arguments),
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("kd_ranker", "jax", "jaxlib")}
        | {"python": platform.python_version()},
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def bench_sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall time of one sweep over that of its members trained one by one."""
    config = cascade.get_config()
    weights = np.geomspace(0.1, 10, arguments.members).round(3).tolist()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config.data.dir={folder}/datasets"]
        if arguments.steps:
            flags.append(f"--config.train.steps={arguments.steps}")
            config.train.steps = arguments.steps
        entry_point("prepare_data", flags)
        entry_point("train_teacher", [*flags, f"--workdir={folder}/teacher"])
        flags.append(f"--config.teacher.workdir={folder}/teacher")
        config.data.dir, config.teacher.workdir = f"{folder}/datasets", f"{folder}/teacher"

        def train(weight: float) -> float:
            workdir = f"--workdir={folder}/train-{weight}"
            return entry_point("train", [*flags, workdir, f"--config.distill.weight={weight}"])

        half = len(weights) // 2
        first = [train(weight) for weight in weights[:half]]
        sweep = entry_point("sweep", [
            *flags, f"--workdir={folder}/sweep", "--config.sweep.modes=('shared',)",
            f"--config.sweep.weights={tuple(weights)}",
        ])  # fmt: skip
        # Around the sweep, so that a machine that slows down slows both.
        runs = [*first, *(train(weight) for weight in weights[half:])]
        floor = sweep_floor(config, arguments.members)
    ratio = sweep / sum(runs)
    return {
        "ratio": ratio,
        "bar": 0.25,
        "passed": ratio <= 0.25,
        "seconds": {
            "sweep": sweep,
            "runs": sum(runs),
            "one run": {"median": statistics.median(runs), "min": min(runs), "max": max(runs)},
        },
        "steps": config.train.steps,
        "members": arguments.members,
        "floor": floor,
    }


def sweep_floor(config: Any, members: int) -> dict[str, Any]:
    """What a step would take if it ran at the machine's matrix rate, and what it does take.

    `ratio` is that of the operations: one teacher pass and the members' updates over as many
    teacher passes and updates. Bytes are those of what the members' item tables and slots must
    have read and written: a row an id, once each way. XLA counts the body of the loop that updates
    tables once, so the few operations in there are left out.
    """
    teacher, dataset = teachers.teacher_and_dataset(config)
    assert teacher is not None
    mapping = MAPPINGS["shard_map"](jax.devices()[:1])
    stage = recipes.TEACHER_STAGES[config.teacher.stage]
    names = {str(member): config for member in range(members)}
    batch = jax.device_put(sample_batch(config, dataset))
    items = jnp.asarray(dataset.item_features)

    def measured(names: dict[str, Any], live: bool) -> tuple[float, float]:
        """FLOPs of the compiled step, and its median seconds."""
        groups = recipes.student_groups(names, dataset.spec)
        step = mapping.map_step(
            make_step(
                [group.recipe for group in groups],
                LiveTeacher(teacher.model, stage) if live else None,
            )
        )
        states = mapping.replicate(tuple(group.state for group in groups))
        numbers = tuple(group.numbers for group in groups)
        frozen = mapping.replicate(Frozen(items, teacher.parameters if live else None))
        flops = step.lower(states, batch, numbers, frozen).compile().cost_analysis()["flops"]
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            states, _ = jax.block_until_ready(step(states, batch, numbers, frozen))
            seconds.append(time.perf_counter() - start)
        return flops, statistics.median(seconds[3:])

    one = dict(list(names.items())[:1])
    (flops_alone, seconds_alone), (flops_one, seconds_one) = (
        measured(one, False),
        measured(one, True),
    )
    flops_all, seconds_all = measured(names, True)
    rate, copy_rate = matrix_rate(), copy_bytes_rate()
    row_bytes = sum(
        leaf.nbytes / leaf.shape[1]
        for leaf in jax.tree.leaves(table_and_slots(config, dataset, "item"))
    )
    ids = config.batch.requests * config.batch.candidates
    update_bytes = members * ids * row_bytes * 2
    floor_seconds = flops_all / rate + update_bytes / copy_rate
    return {
        "ratio": flops_all / (members * flops_one),
        "ratio of steps": seconds_all / (members * seconds_one),
        "step of all members": {
            "flops": flops_all,
            "update bytes": update_bytes,
            "floor ms": 1e3 * floor_seconds,
            "ms": 1e3 * seconds_all,
            "times the floor": seconds_all / floor_seconds,
        },
        "step of one member": {
            "ms": 1e3 * seconds_one,
            "ms without teacher": 1e3 * seconds_alone,
            "flops": flops_one,
            "flops without teacher": flops_alone,
        },
        "matrix rate, flops/s": rate,
        "copy rate, bytes/s": copy_rate,
    }


def table_and_slots(config: Any, dataset: Any, name: str) -> Any:
    """A member's table and its optimiser slots, with a leading axis of one member."""
    (group,) = recipes.student_groups({"": config}, dataset.spec)
    return group.state.parameters.tables[name], group.state.table_slots[name]


def sample_batch(config: Any, dataset: Any) -> Any:
    """The first training batch."""
    return next(
        iter(
            loader.training_batches(
                dataset,
                requests=config.batch.requests,
                candidates=config.batch.candidates,
                passed_share=config.batch.passed_share,
                negative_rate=config.batch.negative_rate,
                seed=config.batch.seed,
            )
        )
    )


def bench_layout(arguments: argparse.Namespace) -> dict[str, Any]:
    """Three ways of updating the members' tables, at the cascade's sizes with Adam.

    `loop` is the project's: one flat table, and a loop over members in the program. `flat` is one
    gather and one scatter over all members' rows, at ids with an offset a member. `vmap` maps the
    update of one member over stacked tables.
    """
    members, rows, width, ids_of_batch = arguments.members, 8_192, 32, 4_096
    generator = np.random.default_rng(0)
    optimizer = ROW_OPTIMIZERS["adam"]
    ids = jnp.asarray(generator.integers(0, rows, ids_of_batch), jnp.int32)
    gradients = jnp.asarray(generator.normal(size=(members, ids_of_batch, width)), jnp.float32)
    rate, decay, change = jnp.full(members, 0.01), jnp.full(members, 0.1), jnp.ones(members, bool)

    def loop(tables: Any, slots: Any, ids: Any, gradients: Any) -> Any:
        occurrences = find_occurrences(ids, rows)
        return update_tables(optimizer, tables, slots, occurrences, gradients, rate, decay, change)

    def vmap(tables: Any, slots: Any, ids: Any, gradients: Any) -> Any:
        occurrences = find_occurrences(ids, rows)

        def one(*arguments: Any) -> Any:
            table, slots, gradient, rate, decay, change = jax.tree.map(lambda a: a[None], arguments)
            new = update_tables(optimizer, table, slots, occurrences, gradient, rate, decay, change)
            return jax.tree.map(lambda array: array[0], new)

        return jax.vmap(one)(tables, slots, gradients, rate, decay, change)

    def flat(tables: Any, slots: Any, ids: Any, gradients: Any) -> Any:
        offset = (jnp.arange(members) * rows)[:, None]
        occurrences = find_occurrences((ids + offset).reshape(-1), members * rows)
        flattened = jax.tree.map(
            lambda array: array.reshape(1, members * rows, *array.shape[2:]), (tables, slots)
        )
        new = update_tables(
            optimizer, *flattened, occurrences, gradients.reshape(1, -1, width),
            rate[:1], decay[:1], change[:1],
        )  # fmt: skip
        return jax.tree.map(lambda array, like: array.reshape(like.shape), new, (tables, slots))

    tables = jnp.asarray(generator.normal(size=(members, rows, width)), jnp.float32)
    start = (tables, jax.vmap(optimizer.init)(tables))
    ways = {"loop": loop, "flat": flat, "vmap": vmap}
    milliseconds = interleaved(
        {name: donated(way, start, ids, gradients) for name, way in ways.items()}
    )
    best_other = min(milliseconds["flat"]["median"], milliseconds["vmap"]["median"])
    ratio = milliseconds["loop"]["median"] / best_other
    row_bytes = sum(leaf.nbytes / (members * rows) for leaf in jax.tree.leaves(start))
    floor = members * ids_of_batch * row_bytes * 2 / copy_bytes_rate() * 1e3
    return {
        "ratio": ratio,
        "bar": 1.0,
        "passed": ratio <= 1.0,
        "ms": milliseconds,
        "floor": {"ms": floor, "times the floor": milliseconds["loop"]["median"] / floor},
        "sizes": {"members": members, "rows": rows, "width": width, "ids": ids_of_batch},
    }


def entry_point(name: str, flags: Sequence[str]) -> float:
    """Runs an entry point; the seconds it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"experiments.{name}", CASCADE, *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    return seconds


def donated(way: Callable, start: Any, *inputs: Any) -> Callable[[], None]:
    """A function that takes a step each time it is called, in place."""
    step = jax.jit(way, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, start)]

    def call() -> None:
        held[0] = jax.block_until_ready(step(*held[0], *inputs))

    return call


def interleaved(
    sides: dict[str, Callable[[], None]], repeats: int = 30, warm: int = 3
) -> dict[str, dict[str, float]]:
    """Milliseconds of each side, one after the other in turn, so that noise meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warm + repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: spread(milliseconds[warm:]) for name, milliseconds in times.items()}


def spread(numbers: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(numbers, n=4)
    return {"median": median, "lower quartile": low, "upper quartile": high}


@functools.cache
def matrix_rate() -> float:
    """FLOPs a second of a large matrix product in float32."""
    size = 2048
    matrix = jnp.ones((size, size))
    product = jax.jit(lambda matrix: matrix @ matrix)
    return 2 * size**3 / best_seconds(lambda: jax.block_until_ready(product(matrix)))


@functools.cache
def copy_bytes_rate() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    array = jnp.ones(32 * 2**20)
    # In place: fresh memory would be paid for page by page.
    call = donated(lambda array, _: (array + 1, _), (array, jnp.zeros(())))
    return 2 * array.nbytes / best_seconds(call)


def best_seconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The shortest of several calls: a rate is what the machine can do."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


BENCHMARKS = {"sweep": bench_sweep, "layout": bench_layout}

if __name__ == "__main__":
    main()
