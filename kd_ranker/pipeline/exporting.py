"""The folder of an export: programs in their formats, tables, a description, and an example."""

import datetime
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from kd_ranker import manifest
from kd_ranker.batch import CandidateBatch
from kd_ranker.batches.cutting import evaluation_batches
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.models.model import COMPUTE_DTYPES, score
from kd_ranker.pipeline.trained import TrainedRanker
from kd_ranker.requests.templates import templates_of
from kd_ranker.serving import check, programs
from kd_ranker.serving.programs import Exported, Servable
from kd_ranker.sources.logs.vocabulary import TRANSFORMS, VOCABULARIES_FOLDER

_REQUESTS, _ITEMS = 4, 32  # of the example


def export_ranker(finished: TrainedRanker, folder: Path, formats: Sequence[str]) -> None:
    """Write a trained ranker as a new folder for a server, see `api.export`."""
    config = finished.config
    dataset = finished.dataset
    role = finished.role
    mode = config.distill.mode if role == "student" else ""
    computes = config[role].compute_dtype
    if "onnx" in formats and COMPUTE_DTYPES[computes].dtype != jnp.float32:
        raise UserError(
            f"{role}.compute_dtype={computes!r}: the converter to ONNX lacks {computes}; use "
            "--formats=jax"
        )
    trained = Servable(
        model=finished.model,
        parameters=finished.ranker.parameters,
        spec=dataset.spec,
        items=dataset.items,
        probability=MODES[mode or "none"].serve[finished.serve],
        value_weights=tuple(config.value_weights),
    )
    sizes = {"requests": _REQUESTS, "candidates": config.funnel.retrieved}
    example = next(iter(evaluation_batches(dataset, "test", **sizes, limit=_REQUESTS))).batch
    about = {
        "role": role,
        "run": finished.run,
        "mode": mode,
        "serve": finished.serve,
        "provenance": dict(finished.provenance),
        "formats": list(formats),
    }
    write_export(trained, example, about, dataset.directory, folder)


def write_export(
    trained: Servable, batch: CandidateBatch, about: Mapping[str, Any], dataset: Path, folder: Path
) -> None:
    """Write the new folder of an export atomically; UserError if a format lacks an operation.

    Args:
      trained: the ranker.
      batch: the requests of the example.
      about: more entries of `export.json`: `formats`, some of `programs.FORMATS`; `run`, the
        provenance of the ranker; and others for the README.
      dataset: the folder with the vocabularies and transforms of a log, if there are any.
      folder: the folder to write.
    """
    exported = programs.make_programs(trained)
    example = _example(exported, trained, batch)
    # The probabilities of the ranker as it is evaluated.
    evaluate = jax.jit(lambda *arrays: trained.probability(score(trained.model, *arrays)))
    evaluated = np.asarray(evaluate(trained.parameters, batch, trained.items))
    differences = np.abs(evaluated - example["out.probability"])[np.asarray(batch.candidate_mask)]
    described = {
        **about,
        "jax": programs.jax_releases(datetime.datetime.now(datetime.UTC).date()),
        "difference": float(differences.max()),
        "tasks": list(trained.spec.tasks),
        "value_weights": list(trained.value_weights),
        "programs": {
            name: {"inputs": _types(program.inputs), "outputs": _types(program.outputs)}
            for name, program in exported.programs.items()
        },
        "tables": _types(exported.tables),
        "hashed_tables": [
            programs.name_of(name)
            for name, table in trained.model.embedding.tables.items()
            if table.hashed
        ],
        "features": json.loads(trained.spec.to_json()),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for program, name in itertools.product(exported.programs.values(), about["formats"]):
            (temporary / f"{program.name}.{name}").write_bytes(programs.FORMATS[name](program))
        contiguous = {name: np.ascontiguousarray(table) for name, table in exported.tables.items()}
        save_file(contiguous, temporary / "tables.safetensors")
        np.savez(temporary / "example.npz", **example)
        shutil.copy(check.__file__, temporary / "check.py")
        for name in (VOCABULARIES_FOLDER, TRANSFORMS):
            described[name.removesuffix(".json")] = (dataset / name).exists()
            if (dataset / name).exists():
                copy = shutil.copytree if (dataset / name).is_dir() else shutil.copy
                copy(dataset / name, temporary / name)
        (temporary / "export.json").write_text(json.dumps(described, indent=2))
        readme = templates_of("kd_ranker.serving").get_template("README.md")
        (temporary / "README.md").write_text(readme.render(described))
        manifest.write(temporary, about["provenance"])
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _example(exported: Exported, trained: Servable, batch: CandidateBatch) -> dict[str, Any]:
    """Return inputs of requests and of items under `in.`, and their results under `out.`."""
    parts = exported.programs
    tables = exported.tables
    needed = set[str]()
    for program in parts.values():
        needed.update(program.inputs)
    fields = programs.fields_of(batch)
    inputs = {name: np.asarray(array) for name, array in fields.items() if name in needed}
    outputs = jax.jit(lambda arrays: check.rank(parts, arrays))(inputs | tables)
    if "item" in parts:
        ids = np.arange(min(_ITEMS, trained.spec.num_items), dtype=np.int32)
        items = programs.inputs_of_items(trained, ids)
        outputs |= jax.jit(parts["item"])(tables | items)
        inputs |= {f"item.{name}": array for name, array in items.items()}
    named = {f"in.{name}": array for name, array in inputs.items()}
    return named | {f"out.{name}": np.asarray(array) for name, array in outputs.items()}


def _types(described: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes and dtypes of arrays, as JSON; a size may be a symbol."""
    return {
        name: {
            "shape": [size if isinstance(size, int) else str(size) for size in array.shape],
            "dtype": array.dtype.name,
        }
        for name, array in described.items()
    }
