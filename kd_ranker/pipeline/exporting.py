"""Exports of the ranker of a finished run: its programs, example requests and description."""

import contextlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import CandidateBatch
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import metric_of
from kd_ranker.models.model import COMPUTE_DTYPES
from kd_ranker.pipeline.trained import Finished
from kd_ranker.serving.programs import Exported, Servable, call, fields_of, make_programs
from kd_ranker.serving.write import write_export

_EXAMPLE_REQUESTS = 4


def _check_formats(finished: Finished, formats: Sequence[str]) -> None:
    """Raise UserError for formats that the ranker cannot be exported in."""
    if "onnx" in formats and finished.policy:
        raise UserError("--policy: k is exported for JAX only; use --formats=jax")
    computes = finished.config[finished.role].compute_dtype
    if "onnx" in formats and COMPUTE_DTYPES[computes].dtype != jnp.float32:
        raise UserError(
            f"{finished.role}.compute_dtype={computes!r}: the converter to ONNX lacks {computes}; "
            "use --formats=jax"
        )


def export_ranker(finished: Finished, workdir: Path, folder: Path, formats: Sequence[str]) -> None:
    """Write the ranker of a run as a new folder for a server, see `api.export`."""
    _check_formats(finished, formats)
    of = Servable(
        model=finished.model,
        parameters=finished.parameters,
        spec=finished.dataset.spec,
        items=finished.dataset.items,
        probability=finished.mode.serve[finished.serve],
        value_weights=tuple(finished.config.value_weights),
        policy=finished.policy,
    )
    exported = make_programs(of)
    about = _about(finished, workdir, exported) | {"formats": list(formats)}
    write_export(exported, of, _example(finished), about, finished.dataset.directory, folder)


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


def _about(finished: Finished, workdir: Path, exported: Exported) -> dict[str, Any]:
    """The part of an export's description that is about the ranker."""
    versions = {}
    for name in ("kd_ranker", "jax", "jaxlib", "flax", "numpy", "jax2onnx", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "role": finished.role,
        "member": finished.member,
        "mode": finished.config.distill.mode if finished.role == "student" else "",
        "serve": finished.serve,
        "dataset": finished.dataset.identity["dataset"],
        "run": dict(finished.made_of),
        "versions": versions,
        "results": _results(finished, workdir),
        "difference": _difference(finished, exported),
    }


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
    batch = _example(finished)
    arrays = fields_of(batch) | exported.tables
    measured = finished.ranker.serve(finished.parameters, batch, finished.dataset.items)
    served = jax.jit(lambda given: call(exported.programs, given)["probability"])(arrays)
    differences = np.abs(np.asarray(measured.probability[finished.serve] - served))
    return float(differences[np.asarray(batch.candidate_mask)].max())
