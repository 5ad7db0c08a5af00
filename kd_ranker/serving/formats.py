"""The file formats of programs."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import export

from kd_ranker.errors import UserError
from kd_ranker.serving.programs import Program, abstract

PLATFORMS = ("cpu", "cuda", "tpu")


def to_jax(program: Program) -> bytes:
    """Return the program for `jax.export.deserialize`: StableHLO, for each of `PLATFORMS`."""
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(abstract(program.inputs)).serialize())


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
                list(abstract(program.inputs).values()),
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
