"""The time for which a checkpoint keeps a training waiting, against that until it is whole.

The state is that of a student with 1.3 million items. Steps are timed while nothing is written, and
while a checkpoint is: on a CPU, the thread that writes takes cores from them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from kd_ranker.training import checkpoints
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program
from scripts.benchmarks.sizes import Sizes

SIZES, CHECKPOINTS = Sizes(items=1_300_000), 6


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Saves several checkpoints, and takes steps beside each until it is whole."""
    del arguments
    program = Program({"": SIZES.config()}, SIZES.spec(), SIZES.random_items(), SIZES.batch())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(program.states))
    waited, whole, beside = [], [], []
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        checkpoints.open_in(Path(folder)) as saved,
    ):
        for number in range(CHECKPOINTS):
            start = time.perf_counter()
            checkpoints.save(saved, number, program.states, None, {})
            waited.append(time.perf_counter() - start)
            while saved.is_saving_in_progress():
                beside.append(milliseconds_of(program))
            whole.append(time.perf_counter() - start)
    alone = [milliseconds_of(program) for _ in range(len(beside))]
    return {
        "ratio": statistics.median(waited) / statistics.median(whole),
        "GB": size / 1e9,
        "seconds of waiting": measuring.spread(waited),
        "seconds until whole": measuring.spread(whole),
        "seconds of waiting a GB": 1e9 * statistics.median(waited) / size,
        "ms of a step": {
            "alone": measuring.spread(alone),
            "beside": measuring.spread(beside),
        },
        "sizes": vars(SIZES),
    }


def milliseconds_of(program: Program) -> float:
    """The time of a step on the resident batch."""
    start = time.perf_counter()
    program.step()
    return 1e3 * (time.perf_counter() - start)
