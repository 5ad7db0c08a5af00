"""The folder of an export: programs in their formats, tables, a description, and an example."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from kd_ranker import manifest
from kd_ranker.batch import CandidateBatch
from kd_ranker.errors import UserError
from kd_ranker.evaluation.saving import flops
from kd_ranker.requests.templates import templates_of
from kd_ranker.serving import check
from kd_ranker.serving.programs import (
    Exported,
    Program,
    Servable,
    call,
    fields_of,
    inputs_of_items,
    name_of,
)
from kd_ranker.sources.logs.vocabulary import TRANSFORMS, VOCABULARIES_FOLDER

PLATFORMS = ("cpu", "cuda", "tpu")
_EXAMPLE_ITEMS = 32


def to_jax(program: Program) -> bytes:
    """Return the program for `jax.export.deserialize`: StableHLO, for each of `PLATFORMS`."""
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(program.inputs).serialize())


def to_onnx(program: Program) -> bytes:
    """Return the program as an ONNX model, with the names of inputs and outputs.

    Raises:
      UserError: jax2onnx is not installed, or ONNX lacks an operation of the program.
    """
    try:
        with _quiet():
            import jax2onnx
    except ImportError as error:
        raise UserError(
            "ONNX needs the extra `onnx`: pip install 'kd_ranker[onnx]'; or use only --formats=jax"
        ) from error
    names, outputs = list(program.inputs), list(program.outputs)

    def positional(*arrays: Any) -> Any:
        results = program.function(dict(zip(names, arrays, strict=True)))
        return tuple(results[name] for name in outputs)

    try:
        with _quiet():
            model = jax2onnx.to_onnx(
                positional,
                list(program.inputs.values()),
                model_name=program.name,
                input_names=names,
                output_names=outputs,
            )
    # The converter of an operation may raise any exception.
    except Exception as error:
        raise UserError(
            f"the program {program.name!r} cannot be written as ONNX: {error}; use only "
            "--formats=jax"
        ) from error
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's logs and warnings on other packages and its intermediate results."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS: dict[str, Callable[[Program], bytes]] = {"jax": to_jax, "onnx": to_onnx}
"""The functions that write a program, by the suffix of the files."""


def write_export(
    exported: Exported,
    trained: Servable,
    batch: CandidateBatch,
    about: Mapping[str, Any],
    dataset: Path,
    folder: Path,
) -> None:
    """Write the folder atomically.

    Args:
      exported: the programs and tables to write.
      trained: the ranker from which they were made.
      batch: the requests of the example.
      about: more entries of `export.json`: `formats`, some of `FORMATS`; `run`, the fingerprints of
        the ranker; and others for the README.
      dataset: the folder with the vocabularies and transforms of a log; it may be absent.
      folder: the folder to write, which must not exist.

    Raises:
      UserError: a format lacks an operation; nothing is written then.
    """
    described = _description(exported, trained, batch.item_id.shape[1], about)
    measures = dict.fromkeys(name for of in described["results"].values() for name in of)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for program, name in itertools.product(exported.programs, about["formats"]):
            (temporary / f"{program.name}.{name}").write_bytes(FORMATS[name](program))
        contiguous = {name: np.ascontiguousarray(of) for name, of in exported.tables.items()}
        save_file(contiguous, temporary / "tables.safetensors")
        np.savez(temporary / "example.npz", **_example(exported, trained, batch))
        shutil.copy(check.__file__, temporary / "check.py")
        for name in (VOCABULARIES_FOLDER, TRANSFORMS):
            described[name.removesuffix(".json")] = (dataset / name).exists()
            if (dataset / name).exists():
                copy = shutil.copytree if (dataset / name).is_dir() else shutil.copy
                copy(dataset / name, temporary / name)
        (temporary / "export.json").write_text(json.dumps(described, indent=2))
        readme = templates_of("kd_ranker.serving").get_template("README.md")
        (temporary / "README.md").write_text(readme.render(described, measures=list(measures)))
        manifest.write(temporary, about["run"])
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _example(exported: Exported, trained: Servable, batch: CandidateBatch) -> dict[str, Any]:
    """Return inputs of requests and of items under `in.`, and their results under `out.`."""
    needed = {name for program in exported.programs for name in program.inputs}
    inputs = {name: np.asarray(of) for name, of in fields_of(batch).items() if name in needed}
    found = jax.jit(lambda arrays: call(exported.programs, arrays))(inputs | exported.tables)
    for program in exported.programs:
        if program.name == "item":
            ids = np.arange(min(_EXAMPLE_ITEMS, trained.spec.num_items), dtype=np.int32)
            items = inputs_of_items(trained, ids)
            found |= jax.jit(program.function)(exported.tables | items)
            inputs |= {f"item.{name}": array for name, array in items.items()}
    named = {f"in.{name}": array for name, array in inputs.items()}
    return named | {f"out.{name}": np.asarray(array) for name, array in found.items()}


def _description(
    exported: Exported, trained: Servable, candidates: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    embedding = trained.model.embedding
    return {
        **about,
        "tasks": list(trained.spec.tasks),
        "value_weights": list(trained.value_weights),
        "policy": trained.policy.name if trained.policy else "",
        "programs": {
            program.name: {
                "inputs": _types(program.inputs),
                "outputs": _types(program.outputs),
                "flops": _flops(program, candidates),
            }
            for program in exported.programs
        },
        "flops_of": {"requests": 1, "candidates": candidates, "items": 1},
        "tables": _types(exported.tables),
        "hashed_tables": [name_of(name) for name, of in embedding.tables.items() if of.hashed],
        "features": json.loads(trained.spec.to_json()),
    }


def _types(described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {
            "shape": [size if isinstance(size, int) else str(size) for size in of.shape],
            "dtype": of.dtype.name,
        }
        for name, of in described.items()
    }


def _flops(program: Program, candidates: int) -> float:
    """Return the FLOPs of one call: of one request with n candidates, or of one item."""
    sizes = {"requests": 1, "items": 1, "candidates": candidates, "rows": 1}
    inputs = {
        name: jax.ShapeDtypeStruct(
            [of if isinstance(of, int) else sizes[str(of)] for of in described.shape],
            described.dtype,
        )
        for name, described in program.inputs.items()
    }
    return flops(program.function, inputs)
