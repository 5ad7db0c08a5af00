"""A train step at ten million table rows against the same step at a hundred thousand.

Every step reads another batch, so that a small table's rows are no more in a cache than they would
be in a real run. Peak memory is that of the process from its start to the end of the steps, and the
large table is trained alone in a process of its own for it.
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
from typing import Any

import jax

from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program
from scripts.benchmarks.sizes import Sizes

SMALL, LARGE = Sizes(), Sizes(items=10_000_000)
BAR, BATCHES = 1.2, 20


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turn, after the memory was measured."""
    del arguments
    # Spawned: it must not start with what this process holds.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(train_large)
    programs = {"small": program_of(SMALL), "large": program_of(LARGE)}
    milliseconds = measuring.interleaved(
        {name: steps_of(program, sizes) for (name, program), sizes in zip(
            programs.items(), (SMALL, LARGE), strict=True)},
    )  # fmt: skip
    ratio = milliseconds["large"]["median"] / milliseconds["small"]["median"]
    large, ids = programs["large"], LARGE.requests * LARGE.candidates
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio <= BAR and memory["passed"],
        "ms": milliseconds,
        "memory": memory,
        "floor": measuring.floor(
            large.flops, 2 * ids * large.row_bytes("item"), milliseconds["large"]["median"]
        ),
        "rows": {"small": SMALL.items, "large": LARGE.items},
        "sizes": vars(LARGE),
    }


def program_of(sizes: Sizes) -> Program:
    """The step, with one column of item features: their matrix is data, not a table."""
    return Program({"": sizes.config()}, sizes.spec(), sizes.random_items(), sizes.batch())


def steps_of(program: Program, sizes: Sizes) -> Any:
    """A function that takes a step on the next of several batches."""
    batches = itertools.cycle(
        [program.program.devices.shard(sizes.batch(seed)) for seed in range(BATCHES)]
    )
    return lambda: jax.block_until_ready(program.start(next(batches)))


def train_large() -> dict[str, Any]:
    """Takes some steps at the large size; the peak of the process, in bytes."""
    program = program_of(LARGE)
    for _ in range(BATCHES):
        program.step()
    tables = sum(
        leaf.nbytes for state in program.states for leaf in state.parameters.tables.values()
    )
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    bar = 1.15 * tables + 2**30
    return {"peak": peak, "tables and slots": tables, "bar": bar, "passed": peak <= bar}
