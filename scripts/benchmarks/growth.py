"""How the time and the memory of a step, and the time of an evaluation, grow with each size.

An exponent is the slope between the least and the greatest size in logarithms: 1 means twice the
time for twice the size.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import EvaluationBatch
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation.evaluate import Plan, Ranker, evaluate, make_serve
from kd_ranker.training.state import select_run
from scripts.benchmarks import measuring
from scripts.benchmarks.programs import Program
from scripts.benchmarks.sizes import Sizes

BAR = 1.1
# About those of the cascade.
BASE = Sizes(users=4_000, items=8_000, width=32)
RANKED = dataclasses.replace(BASE, requests=16, candidates=2_000)
MEMBERS = (1, 4, 16, 64)
SIZES: dict[str, Sequence[int]] = {
    "candidates": (64, 256, 1_024, 4_096),
    "tasks": (1, 2, 4, 8),
    "items": (100_000, 1_000_000, 10_000_000),
}
REQUESTS = (64, 256, 1_024)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one axis after the other."""
    del arguments
    tables = {"members": [(number, *_step(BASE, number)) for number in MEMBERS]}
    for axis, values in SIZES.items():
        tables[axis] = [
            (value, *_step(dataclasses.replace(BASE, **{axis: value}))) for value in values
        ]
    evaluated = _evaluation()
    tables["test requests"] = [(number, evaluated(number), math.nan) for number in REQUESTS]
    exponents = {
        axis: {"time": _exponent(lines, 1), "memory": _exponent(lines, 2)}
        for axis, lines in tables.items()
    }
    steepest = max(exponent["time"] for exponent in exponents.values())
    return {
        "ratio": steepest,
        "bar": BAR,
        "passed": steepest <= BAR,
        "exponents": exponents,
        "size, ms, MB": tables,
    }


def _step(sizes: Sizes, members: int = 1) -> tuple[float, float]:
    """The milliseconds of a step, and the MB that its program and its states take."""
    config = sizes.config()
    names = {str(member): config for member in range(members)}
    program = Program(names, sizes.spec(), sizes.random_items(), sizes.batch())
    taken = measuring.interleaved({"step": program.step}, turns=3, calls=6)
    states = sum(leaf.nbytes for leaf in jax.tree.leaves(program.states))
    return taken["step"]["median"], (states + program.temporary) / 1e6


def _evaluation() -> Callable[[int], float]:
    """A function from a number of requests to the milliseconds that measure a student on them."""
    spec, items, batch = RANKED.spec(), RANKED.random_items(), RANKED.batch()
    program = Program({"": RANKED.config()}, spec, items, batch)
    (stack,) = program.program.stacks
    (state,) = program.states
    serve = make_serve(stack.train_spec.model, MODES["shared"])
    ranker = Ranker(serve, select_run(state.parameters, 0))
    unknown = np.full(batch.stage.shape, np.nan, np.float32)
    truth = np.full((*batch.stage.shape, RANKED.tasks), np.nan, np.float32)
    requests = np.ones(RANKED.requests, bool)
    facts = EvaluationBatch(batch, *map(jnp.asarray, (truth, unknown, unknown, requests)))
    plan = Plan((1.0,) * RANKED.tasks, shown=10)

    def milliseconds(number: int) -> float:
        batches = [facts] * (number // RANKED.requests)

        def measure() -> None:
            evaluate(None, [ranker], batches, items, plan)

        return measuring.interleaved({"pass": measure}, turns=1, calls=3, warm=1)["pass"]["median"]

    return milliseconds


def _exponent(lines: Sequence[tuple[float, ...]], column: int) -> float:
    """The slope of a column over the size in logarithms, from the first line to the last."""
    first, last = lines[0], lines[-1]
    return math.log(last[column] / first[column]) / math.log(last[0] / first[0])
