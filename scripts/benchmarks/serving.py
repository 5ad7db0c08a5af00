"""One request of 2,000 candidates, as servers would have the default student score it.

From ids and features to the probabilities that rank: by the project's own compiled scoring, by the
exported programs as JAX and as ONNX; and the teacher, by the first.
Then an export of a million items is opened, as by a server that starts.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from jax import export
from ml_collections import ConfigDict

from kd_ranker.batch import IN_BATCH, CandidateBatch, FeatureSpec, Items, empty_batch
from kd_ranker.configs import cascade
from kd_ranker.distillation.modes import MODES
from kd_ranker.evaluation.evaluate import make_serve
from kd_ranker.models.model import Model, Parameters
from kd_ranker.pipeline.exporting import write_export
from kd_ranker.serving import check
from kd_ranker.serving.programs import Exported, Servable, make_programs, to_jax, to_onnx
from kd_ranker.sources.cascade import open_source
from kd_ranker.training import specs
from scripts.benchmarks.scoring import CALLS, percentiles

BAR_OWN, BAR_TEACHER, BAR_LOAD = 1.2, 0.10, 1.0
ITEMS_TO_LOAD = 1_000_000
# What an export says of its run, of which there is none here.
ABOUT = {
    "role": "student",
    "run": "",
    "mode": "none",
    "serve": "user",
    "provenance": {},
    "formats": ["onnx"],
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times each in turn, twice; the better p50 and the better rate of each count."""
    del arguments
    config = cascade()
    spec = open_source(config.data, config.tasks, config.funnel).spec
    batch, items = request(spec, config.funnel.retrieved)
    student, teacher = (
        trained(*make(config, spec)) for make in (specs.student_model, specs.teacher_model)
    )
    exported = make_programs(servable(student, spec, items))
    fields = {field.name: np.asarray(getattr(batch, field.name)) for field in IN_BATCH}
    arrays = fields | exported.tables
    ways = {
        "own": own_scoring(*student, batch, items),
        "jax": in_turn(exported, as_jax, jax.device_put(arrays)),
        "onnx": in_turn(exported, as_onnx, arrays),
        "teacher": own_scoring(*teacher, batch, items),
    }
    expected = np.asarray(ways["own"]())
    differences = {
        name: float(np.abs(np.asarray(way()) - expected).max())
        for name, way in ways.items()
        if name != "teacher"
    }
    best: dict[str, dict[str, float]] = {}
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(2):
        for name, way in ways.items():
            milliseconds = percentiles(way)
            if name not in best or milliseconds["p50"] < best[name]["p50"]:
                best[name] = milliseconds
            rates[name] = max(rates[name], per_second(way))
    loaded = load(config, dataclasses.replace(spec, num_items=ITEMS_TO_LOAD))
    ratio_own = best["onnx"]["p50"] / best["own"]["p50"]
    ratio_teacher = best["onnx"]["p50"] / best["teacher"]["p50"]
    return {
        "ratio_own": ratio_own,
        "ratio_teacher": ratio_teacher,
        "bar": {"ratio_own": BAR_OWN, "ratio_teacher": BAR_TEACHER, "load": BAR_LOAD},
        "passed": bool(
            ratio_own <= BAR_OWN and ratio_teacher <= BAR_TEACHER and loaded["answered"] <= BAR_LOAD
        ),
        "ms": best,
        "requests a second": rates,
        "load": loaded,
        "largest difference": differences,
        "candidates": config.funnel.retrieved,
        "onnxruntime": onnxruntime.__version__,
    }


def per_second(call: Callable[[], Any]) -> float:
    """Calls a second, from as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        start = time.perf_counter()
        for done in [threads.submit(call) for _ in range(CALLS)]:
            done.result()
        return CALLS / (time.perf_counter() - start)


def load(config: ConfigDict, spec: FeatureSpec) -> dict[str, float]:
    """Seconds until an export is open, and until it has answered its first request."""
    batch, items = request(spec, config.funnel.retrieved)
    student = servable(trained(*specs.student_model(config, spec)), spec, items)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        write_export(student, batch, ABOUT, Path(scratch), folder)
        fields = {field.name: np.asarray(getattr(batch, field.name)) for field in IN_BATCH}
        start = time.perf_counter()
        programs, held = check.open_programs(folder, "onnx"), check.read_tables(folder)
        opened = time.perf_counter() - start
        check.rank(programs, held | fields)
        return {
            "items": spec.num_items,
            "bytes": (folder / "tables.safetensors").stat().st_size,
            "opened": opened,
            "answered": time.perf_counter() - start,
        }


def servable(student: tuple[Model, Parameters], spec: FeatureSpec, items: Items) -> Servable:
    """The student of mode `none` as an export sees it."""
    weights = tuple(cascade().value_weights)
    return Servable(*student, spec, items, MODES["none"].serve["user"], weights)


def request(spec: FeatureSpec, candidates: int) -> tuple[CandidateBatch, Items]:
    """A request, and the items that it is about, on the host."""
    generator = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return generator.integers(0, spec.num_items, shape).astype(np.int32)

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    batch = empty_batch(spec, 1, candidates)
    fields: dict[str, Any] = dict(
        user_features=normal(1, spec.user_features),
        context=normal(1, spec.context_features),
        item_id=ids(1, candidates),
        candidate_features=normal(1, candidates, spec.candidate_features),
        history_id=ids(1, spec.history_length),
        history_mask=np.ones_like(batch.history_mask),
        stage=np.ones_like(batch.stage),
    )
    batch = dataclasses.replace(batch, **fields)
    features = normal(spec.num_items, spec.item_features)
    return batch, Items(jnp.asarray(features), jnp.zeros((spec.num_items, 0), jnp.int32))


def trained(model: Model, init: Callable) -> tuple[Model, Parameters]:
    """A model as if training had met every id."""
    parameters = jax.jit(lambda: init(jax.random.key(0), 0))()
    width = model.embedding.width
    met = {name: table.at[:, width].set(1) for name, table in parameters.tables.items()}
    return model, parameters.replace(tables=met)


def own_scoring(
    model: Model, parameters: Parameters, batch: CandidateBatch, items: Items
) -> Callable[[], Any]:
    """The way in which the project scores a batch, from what is on the device."""
    serve = make_serve(model, MODES["none"])
    probability = jax.jit(lambda *arguments: serve(*arguments).probability["user"])
    on_device = jax.device_put((parameters, batch, items))
    return lambda: jax.block_until_ready(probability(*on_device))


def as_jax(program: Any) -> Callable[[dict], dict]:
    """A program that was written down and read again."""
    return jax.jit(export.deserialize(bytearray(to_jax(program))).call)


def as_onnx(program: Any) -> Callable[[dict], dict]:
    """The same in ONNX Runtime, on one thread: so little work is not worth waking another for."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(program), options)
    names = list(program.outputs)
    return lambda arrays: dict(zip(names, session.run(names, arrays), strict=True))


def in_turn(exported: Exported, opened: Callable, arrays: dict[str, Any]) -> Callable[[], Any]:
    """`user`, then `score`, as a server calls them."""
    user, _, score = exported.programs.values()
    run_user, run_score = opened(user), opened(score)

    def call() -> Any:
        of_user = run_user({name: arrays[name] for name in user.inputs})
        known = arrays | of_user
        answer = run_score({name: known[name] for name in score.inputs})
        return jax.block_until_ready(answer["probability"])

    return call
