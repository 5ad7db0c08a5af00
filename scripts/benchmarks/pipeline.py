"""Train steps with the loader against steps on a resident batch.

The cascade at its default batch, one student in mode shared, teacher probabilities from the logs: a
live teacher would take longer than the loader and hide it. Turns of a hundred steps, so that what
was prefetched while the other side ran does not count for much.

All sides take batches as the loader hands them out, packed. A batch that every step sees again
stays in the caches, and so do its rows of the tables. So the loader is held against many resident
batches in turn as well: what is left of the difference then is the loader's own. A resident batch
that is not packed, an array a field, is there for comparison.
"""

import argparse
import itertools
import tempfile
import time
from typing import Any

import jax

from configs import cascade
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import BLOCK
from kd_ranker.pipeline import commands, teachers
from kd_ranker.training.mapping import MAPPINGS
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program, training_batches

BAR, STEPS, TURNS, RESIDENT = 0.9, 100, 30, BLOCK


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turn; `ratio` is that of steps a second."""
    del arguments
    config = cascade.get_config()
    config.teacher.source = "logged"
    with tempfile.TemporaryDirectory() as folder:
        config.data.dir = folder
        commands.prepare_data(config)
        _, dataset = teachers.teacher_and_dataset(config)
        mapping = MAPPINGS["shard_map"](jax.devices()[:1])
        start = time.perf_counter()
        batches = iter(training_batches(config, dataset, devices=mapping, resident=True))
        few = [next(batches) for _ in range(RESIDENT)]
        start_up = time.perf_counter() - start
        program = Program({"": config}, dataset.spec, dataset.items, jax.device_get(few[0]))
        in_turn, unpacked = itertools.cycle(few), mapping.shard(jax.jit(unpack)(few[0]))
        turns = {
            "loader": lambda: take(program, lambda: next(batches)),
            "resident": lambda: take(program, lambda: few[0]),
            "resident batches in turn": lambda: take(program, lambda: next(in_turn)),
            "resident, an array a field": lambda: take(program, lambda: unpacked),
        }
        milliseconds = measuring.interleaved(turns, turns=TURNS, calls=1, warm=1)
        making = making_alone(config, dataset)
    per_step = _per_step(milliseconds, STEPS)
    ratio = per_step["resident"]["median"] / per_step["loader"]["median"]
    from_batches_in_turn, from_fields = (
        per_step[side]["median"] / per_step["loader"]["median"]
        for side in ("resident batches in turn", "resident, an array a field")
    )
    ids = unpacked.item_id.size
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio >= BAR,
        "ratio, resident batches in turn": from_batches_in_turn,
        "ratio, resident batch with an array a field": from_fields,
        "ms a step": per_step,
        "ms to make, alone": making,
        "seconds to the first batches": start_up,
        "floor": measuring.floor(
            program.flops, 2 * ids * program.row_bytes("item"), per_step["loader"]["median"]
        ),
    }


def take(program: Program, next_batch: Any) -> None:
    """Takes many steps, each as soon as the device is ready, as the training loop does."""
    losses = None
    for _ in range(STEPS):
        losses = program.start(next_batch())
    jax.block_until_ready(losses)


def making_alone(config: Any, dataset: Any) -> dict[str, dict[str, float]]:
    """Milliseconds to make a batch, with nothing else running."""
    sides = {}
    for name, resident in (("from memory", True), ("from files", False)):
        batches = iter(training_batches(config, dataset, resident=resident))
        sides[name] = lambda batches=batches: jax.block_until_ready(
            [next(batches) for _ in range(BLOCK)]
        )
    return _per_step(measuring.interleaved(sides, turns=4, calls=1), BLOCK)


def _per_step(milliseconds: dict[str, dict[str, float]], steps: int) -> dict[str, dict[str, float]]:
    return {
        side: {name: time / steps for name, time in times.items()}
        for side, times in milliseconds.items()
    }
