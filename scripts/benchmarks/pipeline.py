"""Train steps with the loader against steps on a resident batch.

The cascade at its default batch, one student in mode shared, teacher probabilities from the logs: a
live teacher would take longer than the loader and hide it. Turns of a hundred steps, so that what
was prefetched while the other side ran does not count for much.

A batch that every step sees again stays in the caches, and so do its rows of the tables. So the
loader is held against many resident batches in turn as well: what is left of the difference then is
the loader's own.
"""

import argparse
import itertools
import tempfile
import time
from typing import Any

import jax

from configs import cascade
from kd_ranker import commands, teachers
from kd_ranker.batch import Stage
from kd_ranker.data import loader
from kd_ranker.data.cutting import unpack
from kd_ranker.training.mapping import MAPPINGS
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program, training_batches

BAR, STEPS, TURNS, RESIDENT = 0.9, 100, 30, loader.BLOCK


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
        batches = iter(training_batches(config, dataset, stage=Stage.SHOWN, devices=mapping))
        few = [next(batches) for _ in range(RESIDENT)]
        start_up = time.perf_counter() - start
        whole = [jax.device_get(jax.jit(unpack)(batch)) for batch in few]
        program = Program({"": config}, dataset.spec, dataset.items, whole[0])
        fresh = itertools.cycle([mapping.shard(batch) for batch in whole])
        turns = {
            "loader": lambda: take(program, lambda: next(batches)),
            "resident": lambda: take(program, lambda: program.batch),
            "resident batches in turn": lambda: take(program, lambda: next(fresh)),
        }
        milliseconds = measuring.interleaved(turns, turns=TURNS, calls=1, warm=0)
        cutting = cutting_alone(config, dataset)
    per_step = {
        side: {name: time / STEPS for name, time in times.items()}
        for side, times in milliseconds.items()
    }
    ratio = per_step["resident"]["median"] / per_step["loader"]["median"]
    in_turn = per_step["resident batches in turn"]["median"] / per_step["loader"]["median"]
    ids = whole[0].item_id.size
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio >= BAR,
        "ratio, resident batches in turn": in_turn,
        "ms a step": per_step,
        "ms to make, alone": cutting,
        "seconds to read the training split": start_up,
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


def cutting_alone(config: Any, dataset: Any) -> dict[str, dict[str, float]]:
    """Milliseconds to make a draw, or a batch from the files, with nothing else running."""
    sides = {}
    for name, resident in (("draw", True), ("batch, from files", False)):
        batches = iter(training_batches(config, dataset, stage=Stage.SHOWN, resident=resident))
        sides[name] = lambda batches=batches: next(batches)
    return measuring.interleaved(sides, turns=4, calls=20)
