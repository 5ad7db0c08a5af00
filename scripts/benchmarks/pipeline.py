"""Train steps with the loader against steps on a resident batch.

The cascade at its default batch, one student in mode shared, teacher probabilities from the logs: a
live teacher would take longer than the loader and hide it. Turns of a hundred steps, so that what
was prefetched while the other side ran does not count for much.

Batches are as the loader hands them out, packed, and a call takes the steps of a block. A batch
that every step sees again stays in the caches, and so do its rows of the tables. So the loader is
held against a block of resident batches as well: what is left of the difference then is the
loader's own. For comparison, a call a step: with the loader, and with a resident batch that is not
packed, an array a field.
"""

import argparse
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from kd_ranker import api
from kd_ranker.batches.cutting import Span, unpack
from kd_ranker.batches.training import BLOCK
from kd_ranker.configs import cascade
from kd_ranker.pipeline.job import open_job
from kd_ranker.training.mapping import MAPPINGS
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program, training_batches

BAR, STEPS, TURNS = 0.9, 2 * BLOCK, 30


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turn; `ratio` is that of steps a second."""
    del arguments
    config = cascade()
    config.teacher.source = "logged"
    with tempfile.TemporaryDirectory() as folder:
        config.data.dir = folder
        api.prepare(config)
        dataset = open_job(config, {"": config}).dataset
        mapping = MAPPINGS["shard_map"](jax.devices()[:1])
        start = time.perf_counter()
        batches = iter(training_batches(config, dataset, devices=mapping, resident=True))
        block, whole = jax.block_until_ready(batches.take(BLOCK))
        start_up = time.perf_counter() - start
        again = block.replace(rows=jnp.repeat(block.rows[:, :1], BLOCK, axis=1))
        unpacked = jax.jit(unpack)(block, 0)
        program = Program({"": config}, dataset.spec, dataset.items, jax.device_get(unpacked))

        def a_call_a_step() -> Any:
            packed, span = batches.take(BLOCK)
            return [program.start_steps(packed, Span(at, at + 1)) for at in range(*span)]

        turns = {
            "loader": lambda: take(lambda: program.start_steps(*batches.take(BLOCK))),
            "loader, a call a step": lambda: take(a_call_a_step),
            "resident": lambda: take(lambda: program.start_steps(again, whole)),
            "resident batches in turn": lambda: take(lambda: program.start_steps(block, whole)),
            "resident, an array a field": lambda: take(
                lambda: [program.start(program.batch) for _ in range(BLOCK)]
            ),
        }
        milliseconds = measuring.interleaved(turns, turns=TURNS, calls=1, warm=1)
        making = making_alone(config, dataset)
    per_step = _per_step(milliseconds, STEPS)
    ratio = per_step["resident"]["median"] / per_step["loader"]["median"]
    from_batches_in_turn, from_fields, from_calls = (
        per_step[side]["median"] / per_step["loader"]["median"]
        for side in (
            "resident batches in turn", "resident, an array a field", "loader, a call a step"
        )
    )  # fmt: skip
    ids = unpacked.item_id.size
    return {
        "ratio": ratio,
        "bar": BAR,
        "passed": ratio >= BAR,
        "ratio, resident batches in turn": from_batches_in_turn,
        "ratio, resident batch with an array a field": from_fields,
        "ratio, loader with a call a step": from_calls,
        "ms a step": per_step,
        "ms to make, alone": making,
        "seconds to the first batches": start_up,
        "floor": measuring.floor(
            program.flops, 2 * ids * program.row_bytes("item"), per_step["loader"]["median"]
        ),
    }


def take(start_block: Any) -> None:
    """Takes many steps, each as soon as the device is ready, as the training loop does."""
    jax.block_until_ready([start_block() for _ in range(STEPS // BLOCK)])


def making_alone(config: Any, dataset: Any) -> dict[str, dict[str, float]]:
    """Milliseconds to make a batch, with nothing else running."""
    sides = {}
    for name, resident in (("from memory", True), ("from files", False)):
        batches = iter(training_batches(config, dataset, resident=resident))
        sides[name] = lambda batches=batches: jax.block_until_ready(
            [next(batches)[0] for _ in range(BLOCK)]
        )
    return _per_step(measuring.interleaved(sides, turns=4, calls=1), BLOCK)


def _per_step(milliseconds: dict[str, dict[str, float]], steps: int) -> dict[str, dict[str, float]]:
    return {
        side: {name: time / steps for name, time in times.items()}
        for side, times in milliseconds.items()
    }
