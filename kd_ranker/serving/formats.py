"""The formats in which a program is written down."""

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
    """The program for `jax.export.deserialize`: StableHLO, for each of `PLATFORMS`."""
    exported = export.export(jax.jit(program.function), platforms=PLATFORMS)
    return bytes(exported(abstract(program.inputs)).serialize())


def to_onnx(program: Program) -> bytes:
    """The program as an ONNX model, with the names of inputs and outputs.

    Raises:
      UserError: jax2onnx is not installed, or ONNX lacks an operation of the program.
    """
    try:
        with _quiet():
            import jax2onnx
    except ImportError as error:
        raise UserError(
            "ONNX needs the extra `onnx`: pip install 'kd_ranker[onnx]'; or name "
            "--formats=jax alone"
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
    # Whatever the converter of an operation raises.
    except Exception as error:
        raise UserError(
            f"the program {program.name!r} cannot be written as ONNX: {error}; name --formats=jax "
            "alone"
        ) from error
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the converter says of other packages and of its own intermediates."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS: dict[str, Callable[[Program], bytes]] = {"jax": to_jax, "onnx": to_onnx}
"""By the ending of its files, how a program is written."""
