"""Train steps whose batches come from files against steps whose batches come from memory.

The cascade's student in mode shared at its default batch, teacher probabilities from the logs, 400
candidates a request of which 200 were passed. Some thousand requests are written again and again
until there are as many as are wanted: a request takes 10 KB, so a million of them 11 GB.

`cached` reads files that the system holds in memory, `cold` ones of a million requests that it has
dropped, in an order in which none is read twice. All take their steps in turns, in one process.
"""

import argparse
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import BLOCK, BatchIterator
from kd_ranker.configs import cascade
from kd_ranker.pipeline.job import open_job
from kd_ranker.requests import row_files
from kd_ranker.requests.records import Dataset
from kd_ranker.training.mapping import MAPPINGS
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program, training_batches

CACHED_BAR, COLD_BAR, START_BAR = 1.15, 1.6, 3.0
WRITTEN, FEW, MANY = 4_000, 100_000, 1_000_000
TURNS, BLOCKS = 12, 8


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times the three in turns; the ratios are those of the times of a step."""
    del arguments
    config = cascade()
    config.teacher.source = "logged"
    config.funnel.retrieved = 400
    config.data.train_requests = WRITTEN
    with tempfile.TemporaryDirectory() as folder:
        config.data.dir = folder
        api.prepare(config)
        dataset = open_job(config, {"": config}).dataset
        few, many = (repeated(dataset, number, Path(folder)) for number in (FEW, MANY))
        iterators, starts = {}, {}
        for name, repeats in {"memory": few, "cached": few, "cold": many}.items():
            if name == "cold":
                drop(many)
            iterators[name], starts[name] = started(config, repeats, resident=name == "memory")
        block, _ = iterators["memory"].take(BLOCK)
        batch = jax.device_get(jax.jit(unpack)(block, 0))
        program = Program({"": config}, dataset.spec, dataset.items, batch)
        sides = {name: steps_of(program, batches) for name, batches in iterators.items()}
        milliseconds = measuring.interleaved(sides, turns=TURNS, calls=1, warm=0)
    per_step = {
        side: {name: duration / (BLOCKS * BLOCK) for name, duration in times.items()}
        for side, times in milliseconds.items()
    }
    from_memory = per_step["memory"]["median"]
    cached = per_step["cached"]["median"] / from_memory
    cold = per_step["cold"]["median"] / from_memory
    seconds = max(starts[side]["seconds to the first batches"] for side in ("cached", "cold"))
    return {
        "ratio, cached": cached,
        "ratio, cold": cold,
        "bars": {"cached": CACHED_BAR, "cold": COLD_BAR, "seconds to the first batches": START_BAR},
        "passed": cached <= CACHED_BAR and cold <= COLD_BAR and seconds <= START_BAR,
        "ms a step": per_step,
        "start": starts,
    }


def repeated(dataset: Dataset, number: int, folder: Path) -> Dataset:
    """The dataset with its training requests again and again, in files of their own."""
    to = folder / str(number)
    to.mkdir()
    rows, counts = row_files.paths(dataset.directory, "train")
    all_rows, all_counts = row_files.paths(to, "train")
    written = np.load(counts)
    head = int(written[0, 0])
    body = np.fromfile(rows, np.int32)
    times, places = number // len(written), row_files.PLACES
    with all_rows.open("wb") as file:
        file.write(body[:head].tobytes())
        for _ in range(times):
            body[head:].tofile(file)
    whole = np.tile(written, (times, 1))
    whole[:, :places] += np.repeat(np.arange(times) * (len(body) - head), len(written))[:, None]
    np.save(all_counts, whole)
    opened = row_files.open_columns(to, dataset.spec, "train")
    return dataclasses.replace(dataset, directory=to, columns={"train": opened})


def drop(dataset: Dataset) -> None:
    """Has the system forget what it holds of the files in memory."""
    for path in row_files.paths(dataset.directory, "train"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def started(
    config: ConfigDict, dataset: Dataset, resident: bool
) -> tuple[BatchIterator, dict[str, float]]:
    """Batches from the first one on, and what it took until they were there."""
    before, start = own_memory(), time.perf_counter()
    opened = row_files.open_columns(dataset.directory, dataset.spec, "train")
    dataset = dataclasses.replace(dataset, columns={"train": opened})
    mapping = MAPPINGS["shard_map"](jax.devices()[:1])
    batches: Any = iter(training_batches(config, dataset, devices=mapping, resident=resident))
    jax.block_until_ready(batches.take(BLOCK))
    return batches, {
        "requests": len(opened),
        "seconds to the first batches": time.perf_counter() - start,
        "MiB more": (own_memory() - before) / 2**20,
    }


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    kilobytes = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes[1]) * 1024 if kilobytes else 0


def steps_of(program: Program, batches: BatchIterator) -> Callable[[], None]:
    """Takes some blocks of steps, each when the device is ready, as the training loop does."""

    def take() -> None:
        jax.block_until_ready([program.start_steps(*batches.take(BLOCK)) for _ in range(BLOCKS)])

    return take
