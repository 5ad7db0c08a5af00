"""Train steps that measure norms of gradients and updates against the same without them.

The cascade's batches and students that learn from its log: one in mode shared, and a sweep of 21
runs in three stacks. A call takes the steps of a block, as the training loop does. The sides take
turns on the same batches; the overhead is the median of the turns' ratios, and its 95% interval is
by bootstrap over turns.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.training import BLOCK
from kd_ranker.config.runs import sweep_runs
from kd_ranker.configs import cascade
from kd_ranker.pipeline.job import open_job
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.program import abstract_states, initial_states, step_for
from kd_ranker.training.step import Step
from scripts.benchmarks.programs import Program, training_batches

BAR, TURNS, WARM = 1.03, 60, 5
# The calls of a turn: about as long for one run as for a sweep.
BLOCKS = {"one run": 8, "sweep": 1}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turns; `ratio` is the time of a step of one run over that without metrics."""
    del arguments
    config = cascade()
    config.teacher.source = "logged"
    sweep = cascade()
    sweep.update(config)
    sweep.sweep.update(modes=("none", "aux", "shared"), weights=(0.3, 1.0, 3.0), seeds=(0, 1, 2))
    with tempfile.TemporaryDirectory() as folder:
        config.data.dir = sweep.data.dir = folder
        api.prepare(config)
        sides = {"one run": {"": config}, "sweep": sweep_runs(sweep)}
        measured = {name: overhead(runs, BLOCKS[name]) for name, runs in sides.items()}
    ratio = measured["one run"]["ratio"]
    return {"ratio": ratio, "bar": BAR, "passed": ratio <= BAR, **measured}


def overhead(runs: Mapping[str, ConfigDict], blocks: int) -> dict[str, Any]:
    """The ratio of both times of a step, and each in milliseconds."""
    config = next(iter(runs.values()))
    dataset = open_job(config, {"": config}).dataset
    mapping = MAPPINGS["shard_map"](jax.devices()[:1])
    batches = iter(training_batches(config, dataset, devices=mapping, resident=True))
    block, span = jax.block_until_ready(batches.take(BLOCK))
    first = jax.device_get(jax.jit(unpack)(block, 0))
    with_metrics = Program(runs, dataset.spec, dataset.items, first).program
    devices = with_metrics.devices
    plain_steps = steps_without_metrics(step_for(with_metrics.filled, None, devices))
    plain = with_metrics._replace(
        take=devices.map_step(plain_steps, abstract_states(with_metrics.filled))
    )
    programs = (with_metrics, plain)
    states = [initial_states(program) for program in programs]

    def take(side: int) -> float:
        program = programs[side]
        arguments = (block, (span, program.hyperparameters), program.constants)
        start = time.perf_counter()
        for _ in range(blocks):
            states[side], _ = program.take(states[side], *arguments)
        jax.block_until_ready(states[side])
        return time.perf_counter() - start

    # In both orders, so that neither is always the first.
    turns = [(take(0), take(1), take(1), take(0)) for _ in range(WARM + TURNS)]
    seconds = np.array(turns[WARM:])
    measured = np.stack([seconds[:, [0, 3]].sum(1), seconds[:, [1, 2]].sum(1)], axis=1)
    ratios = measured[:, 0] / measured[:, 1]
    draws = np.random.default_rng(0).choice(ratios, (2_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    per_step = 1e3 * np.median(measured, axis=0) / (2 * blocks * BLOCK)
    return {
        "ratio": float(np.median(ratios)),
        "95% interval": [float(low), float(high)],
        "ms a step": {"with": float(per_step[0]), "without": float(per_step[1])},
        "runs": len(runs),
        "stacks": len(with_metrics.stacks),
    }


def steps_without_metrics(step: Step) -> Callable[..., Any]:
    """`kd_ranker.training.step.many_steps`, whose loop carries states and losses alone."""
    take_once = jax.jit(step.take)

    def steps(
        states: Sequence[Any], batches: Any, span_and_hyperparameters: Any, constants: Any
    ) -> Any:
        span, hyperparameters = span_and_hyperparameters

        def take(index: Any, carried: Any) -> Any:
            stacks = take_once(carried[0], unpack(batches, index), hyperparameters, constants)
            return [stack.state for stack in stacks], [stack.losses for stack in stacks]

        _, losses = jax.eval_shape(lambda: take(span.start, (states, None)))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), losses)
        taken, losses = jax.lax.fori_loop(span.start, span.stop, take, ([*states], zeros))
        return tuple(taken), tuple(losses)

    return steps
