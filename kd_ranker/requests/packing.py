"""Many arrays of equal length as one, so that all that is known of an entry is one read.

A compiled program pays for each gather and for each array that it is handed, however little it
brings: a wide row costs about as much as a narrow one.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


class Span(NamedTuple):
    """The place of an array: its first column, the shape of an entry, and the type by name."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def columns(self) -> slice:
        """The columns that hold it."""
        return slice(self.start, self.start + math.prod(self.shape))


Spans = tuple[Span, ...]


def pack(
    arrays: Mapping[str, Shaped[np.ndarray, "n ..."]], nothing: Mapping[str, float] | None = None
) -> tuple[Int[np.ndarray, "n W"], Spans]:
    """Puts arrays of equal length side by side, 32 bits a number; at least one array.

    Args:
      arrays: by name. Floats become float32, whole numbers int32; truth values stay.
      nothing: if given, a first row is added that stands for nothing; by name, what it holds in
        place of 0.

    Returns:
      The rows, and where in them each array lies.
    """
    parts, spans, width = [], [], 0
    for name, array in arrays.items():
        kind = {"f": "float32", "b": "bool"}.get(array.dtype.kind, "int32")
        if nothing is not None:
            first = np.full((1, *array.shape[1:]), nothing.get(name, 0), array.dtype)
            array = np.concatenate([first, array])
        stored = array.astype(np.float32).view(np.int32) if kind == "float32" else array
        columns = math.prod(array.shape[1:])
        parts.append(stored.reshape(len(array), columns))
        spans.append(Span(name, width, array.shape[1:], kind))
        width += columns
    return np.concatenate(parts, axis=1, dtype=np.int32, casting="unsafe"), tuple(spans)


def unpack_rows(rows: Int[Array, "*shape W"], spans: Spans) -> dict[str, Shaped[Array, "..."]]:
    """The arrays of some rows, by their names; NumPy in and out, or JAX."""
    unpacked = {}
    for span in spans:
        entry = rows[..., span.columns].reshape(*rows.shape[:-1], *span.shape)
        is_float = span.dtype == "float32"
        unpacked[span.name] = as_floats(entry) if is_float else entry.astype(span.dtype)
    return unpacked


def as_bits(array: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Floats of 32 bits as whole numbers, the inverse of `as_floats`."""
    if isinstance(array, jax.Array):
        return jax.lax.bitcast_convert_type(array, jnp.int32)
    return array.view(np.int32)


def as_floats(bits: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The floats of 32 bits that whole numbers stand for."""
    if isinstance(bits, jax.Array):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return bits.view(np.float32)
