"""Exports of the ranker of a finished run: its programs, example requests and description."""

from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import CandidateBatch, Items
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Ranker, Served
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.models.model import COMPUTE_DTYPES
from kd_ranker.pipeline.job import Job, Opened
from kd_ranker.pipeline.measure import Rankers, measure
from kd_ranker.pipeline.trained import Finished
from kd_ranker.serving.programs import (
    Exported,
    Servable,
    call,
    falls_into_parts,
    fields_of,
    make_programs,
)
from kd_ranker.serving.write import program_files, write_export
from kd_ranker.training.state import stack_members

_EXAMPLE_REQUESTS = 4


def _servable(finished: Finished) -> Servable:
    """The parts of a ranker that its programs are made from."""
    return Servable(
        model=finished.model,
        parameters=finished.parameters,
        spec=finished.dataset.spec,
        items=finished.dataset.items,
        probability=finished.mode.serve[finished.serve],
        value_weights=tuple(finished.config.value_weights),
        policy=finished.policy,
    )


def _check_choices(finished: Finished, items: str, formats: Collection[str]) -> None:
    """Raise UserError for item types and formats that the ranker cannot be exported with."""
    if items != "float32" and not falls_into_parts(_servable(finished)):
        raise UserError(
            f"--items={items!r}: this {finished.role} is one program, which has no item "
            "embeddings; leave --items out"
        )
    if "onnx" in formats and finished.policy:
        raise UserError("--policy: k is exported for JAX only; use --formats=jax")
    computes = finished.config[finished.role].compute_dtype
    if "onnx" in formats and COMPUTE_DTYPES[computes].dtype != jnp.float32:
        raise UserError(
            f"{finished.role}.compute_dtype={computes!r}: the converter to ONNX lacks {computes}; "
            "use --formats=jax"
        )


def export_ranker(
    finished: Finished, workdir: Path, folder: Path, items: str, formats: Sequence[str]
) -> None:
    """Write a ranker as a folder for a server.

    Args:
      finished: the ranker.
      workdir: of its run.
      folder: the folder to write, which must not exist.
      items: the type of its item embeddings.
      formats: of its programs.

    Raises:
      UserError: the ranker cannot be exported so.
    """
    _check_choices(finished, items, formats)
    of = _servable(finished)
    exported = make_programs(of, items)
    # First, because a format may lack an operation, and the rest takes long.
    files = program_files(exported, formats)
    about = _about(finished, workdir, exported, items) | {"formats": list(formats)}
    dataset = finished.dataset.directory
    write_export(exported, of, files, _example(finished), about, dataset, folder)


def _example(finished: Finished) -> CandidateBatch:
    """A few requests of the test split, with all their candidates."""
    batches = evaluation_batches(
        finished.dataset,
        "test",
        requests=_EXAMPLE_REQUESTS,
        candidates=finished.config.funnel.retrieved,
        limit=_EXAMPLE_REQUESTS,
    )
    return next(iter(batches)).batch


def _about(finished: Finished, workdir: Path, exported: Exported, items: str) -> dict[str, Any]:
    """The part of an export's description that is about the ranker."""
    packages = ("kd_ranker", "jax", "jaxlib", "flax", "numpy", "jax2onnx", "onnxruntime")
    return {
        "role": finished.role,
        "member": finished.member,
        "mode": finished.config.distill.mode if finished.role == "student" else "",
        "serve": finished.serve,
        "dataset": finished.dataset.identity["dataset"],
        "run": dict(finished.made_of),
        "versions": {name: _version(name) for name in packages if _version(name)},
        "results": _results(finished, workdir),
        "difference": _difference(finished, exported),
        "items": {"type": items, "cost": _cost_of_items(finished, exported, items)},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _results(finished: Finished, workdir: Path) -> dict[str, dict[str, float]]:
    """The numbers of its rows in `results.csv`, by split."""
    table = results.read_csv(workdir / results.FILE).fillna({"member": ""})
    rows = table[table["role"] == finished.role]
    if finished.role == "student":
        rows = rows[(rows["member"] == finished.member) & (rows["serve"] == finished.serve)]
    names = [str(name) for name in table if metric_of(str(name))]
    return {
        str(row["split"]): {name: row[name] for name in names if np.isfinite(row[name])}
        for row in rows.to_dict("records")
    }


def _difference(finished: Finished, exported: Exported) -> float:
    """The largest difference of the example's probabilities to those that were evaluated."""
    batch, serve = _example(finished), finished.serve
    evaluated, served = (
        ranker.serve(parameters, batch, finished.dataset.items).probability[serve]
        for ranker, parameters in (
            (finished.ranker, finished.parameters),
            (_as_ranker(exported, serve), exported.tables),
        )
    )
    return float(np.abs(np.asarray(evaluated - served))[np.asarray(batch.candidate_mask)].max())


def _as_ranker(exported: Exported, serve: str) -> Ranker:
    """The exported programs as the evaluation sees a ranker; its parameters are the tables."""

    @jax.jit
    def served(held: Mapping[str, Any], batch: CandidateBatch, items: Items) -> Served:
        del items
        answer = call(exported.programs, {**fields_of(batch), **held})
        return Served({serve: answer["probability"]}, {})

    return Ranker(served, stack_members([exported.tables]))


def _cost_of_items(finished: Finished, exported: Exported, items: str) -> dict[str, Any]:
    """The survival on the test split with embeddings of float32, and with those of this type."""
    if items == "float32":
        return {}
    whole = make_programs(_servable(finished), "float32")
    names, config = ("float32", items), finished.config
    # Both are measured under the teacher of the run.
    job = Job(config, dict.fromkeys(names, config), Opened(config))
    students = [
        Rankers((name,), _as_ranker(of, finished.serve), (0,), (0,))
        for name, of in zip(names, (whole, exported), strict=True)
    ]
    serves = dict.fromkeys(names, (finished.serve,))
    measured = measure(job, "test", students, serves=serves, costs=False)
    columns = [f"{name}@{k}" for name in ("survival", "value_captured") for k in job.report_at.ks]
    return {
        str(row["member"]): {name: row[name] for name in columns}
        for row in measured.rows
        if row["role"] == "student"
    }
