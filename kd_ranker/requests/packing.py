"""Pack many arrays of equal length into one, so that one read returns all fields of an entry.

A compiled program pays for each gather and for each array argument, however small: a wide row costs
about as much as a narrow one.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped


class Span(NamedTuple):
    """The place of an array: its first column, the shape of an entry, and the name of its type."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def columns(self) -> slice:
        """The columns of the array."""
        return slice(self.start, self.start + math.prod(self.shape))


Spans = tuple[Span, ...]


def pack(
    arrays: Mapping[str, Shaped[np.ndarray, "n ..."]], nothing: Mapping[str, float] | None = None
) -> tuple[Int[np.ndarray, "n W"], Spans]:
    """Pack at least one array of equal length into rows, 32 bits per number.

    Args:
      arrays: by name. Floats become float32, integers int32; booleans stay.
      nothing: if given, a padding row is added in front; the fill values other than 0, by name.

    Returns:
      The rows, and the place of each array in them.
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
    """Return the arrays of some rows by name; NumPy in and out, or JAX."""
    unpacked = {}
    for span in spans:
        entry = rows[..., span.columns].reshape(*rows.shape[:-1], *span.shape)
        is_float = span.dtype == "float32"
        unpacked[span.name] = as_floats(entry) if is_float else entry.astype(span.dtype)
    return unpacked


def as_bits(array: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Return the bits of 32-bit floats as integers, the inverse of `as_floats`."""
    if isinstance(array, jax.Array):
        return jax.lax.bitcast_convert_type(array, jnp.int32)
    return array.view(np.int32)


def as_floats(bits: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the 32-bit floats with these bits."""
    if isinstance(bits, jax.Array):
        return jax.lax.bitcast_convert_type(bits, jnp.float32)
    return bits.view(np.float32)
