"""One request of 2,000 candidates, scored by the default student and by the teacher.

Compiled, one request at a time, as a funnel would call them: from ids and features on the device to
the probabilities that rank.
"""

import argparse
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import Items, empty_batch
from kd_ranker.configs import cascade
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.evaluate import make_serve
from kd_ranker.sources.cascade import open_source
from kd_ranker.training import specs
from scripts.benchmarks import measuring

BAR_FLOPS, BAR_WALL, CALLS = 0.05, 0.10, 400


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both in turn; the ratios are those of the student over the teacher."""
    del arguments
    config = cascade()
    spec = open_source(config.data, config.tasks, config.funnel).spec
    generator = np.random.default_rng(0)
    batch = empty_batch(spec, 1, config.funnel.retrieved)
    item_id = generator.integers(0, spec.num_items, batch.item_id.shape)
    history_id = generator.integers(0, spec.num_items, batch.history_id.shape)
    fields: dict[str, Any] = dict(
        item_id=item_id.astype(np.int32),
        history_id=history_id.astype(np.int32),
        history_mask=np.ones_like(batch.history_mask),
        stage=np.ones_like(batch.stage),
    )
    batch = jax.device_put(dataclasses.replace(batch, **fields))
    features = generator.normal(size=(spec.num_items, spec.item_features)).astype(np.float32)
    items = Items(jnp.asarray(features), jnp.zeros((spec.num_items, 0), jnp.int32))
    calls, flops = {}, {}
    for name, make in (("student", specs.student_model), ("teacher", specs.teacher_model)):
        model, init = make(config, spec)
        parameters = jax.jit(lambda init=init: init(jax.random.key(0), 0))()
        serve = make_serve(model, MODES["none"])
        probability = jax.jit(lambda *arguments, serve=serve: serve(*arguments).probability)
        flops[name] = saving.flops(probability, parameters, batch, items) / config.funnel.retrieved
        calls[name] = lambda probability=probability, parameters=parameters: jax.block_until_ready(
            probability(parameters, batch, items)
        )
    milliseconds = {name: percentiles(call) for name, call in calls.items()}
    ratio_flops = flops["student"] / flops["teacher"]
    ratio_wall = milliseconds["student"]["p50"] / milliseconds["teacher"]["p50"]
    retrieved = config.funnel.retrieved
    # A row of the item table, the item's features and a candidate's own, each read once.
    row = config.student.width + spec.item_features + spec.candidate_features
    return {
        "ratio_flops": ratio_flops,
        "ratio_wall": ratio_wall,
        "bar": {"ratio_flops": BAR_FLOPS, "ratio_wall": BAR_WALL},
        "passed": bool(ratio_flops <= BAR_FLOPS and ratio_wall <= BAR_WALL),
        "flops per candidate": flops,
        "ms": milliseconds,
        "floor": {
            name: measuring.floor(
                flops[name] * retrieved, 4 * row * retrieved, milliseconds[name]["p50"]
            )
            for name in calls
        },
        "candidates": retrieved,
    }


def percentiles(call: Any) -> dict[str, float]:
    """Milliseconds of a call, many in a row."""
    for _ in range(20):
        call()
    milliseconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    p25, p50, p75, p99 = np.percentile(milliseconds, [25, 50, 75, 99]).tolist()
    return {"p50": p50, "p99": p99, "lower quartile": p25, "upper quartile": p75}
