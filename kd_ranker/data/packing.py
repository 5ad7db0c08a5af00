"""Many arrays of equal length as one, so that all that is known of an entry is one read.

A compiled program pays for each gather, however little it brings: one of a wide row costs about as
much as one of a narrow one.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


class Field(NamedTuple):
    """Where an array lies: from which column on, the shape of an entry, and the type by name."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str


@flax.struct.dataclass
class Packed:
    """Arrays side by side, 32 bits a number, and a last row that stands for nothing."""

    rows: Int[Array, "n+1 W"]
    fields: tuple[Field, ...] = flax.struct.field(pytree_node=False)

    @property
    def nothing(self) -> int:
        """The index of the last row."""
        return self.rows.shape[0] - 1


def pack(
    arrays: Mapping[str, Shaped[np.ndarray, "n ..."]], nothing: Mapping[str, float] | None = None
) -> Packed:
    """Packs arrays of equal length, at least one array.

    Args:
      arrays: by name. Floats become float32, whole numbers int32; truth values stay.
      nothing: by name, what the last row holds in place of 0.
    """
    parts, fields, width = [], [], 0
    for name, array in arrays.items():
        kind = {"f": "float32", "b": "bool"}.get(array.dtype.kind, "int32")
        of_nothing = np.full((1, *array.shape[1:]), (nothing or {}).get(name, 0), array.dtype)
        whole = np.concatenate([array, of_nothing])
        stored = whole.astype(np.float32).view(np.int32) if kind == "float32" else whole
        columns = math.prod(array.shape[1:])
        parts.append(stored.reshape(len(whole), columns))
        fields.append(Field(name, width, array.shape[1:], kind))
        width += columns
    rows = np.concatenate(parts, axis=1, dtype=np.int32, casting="unsafe")
    return Packed(rows, tuple(fields))  # type: ignore[arg-type]


def take(packed: Packed, index: Int[Array, "*shape"]) -> dict[str, Shaped[Array, "..."]]:
    """The entries at some indices, by the names of the arrays; NumPy in and out, or JAX."""
    on_device = isinstance(packed.rows, jax.Array)
    rows = packed.rows.at[index].get(mode="promise_in_bounds") if on_device else packed.rows[index]
    taken = {}
    for name, start, shape, dtype in packed.fields:
        entry = rows[..., start : start + math.prod(shape)].reshape(*index.shape, *shape)
        if dtype == "float32" and on_device:
            entry = jax.lax.bitcast_convert_type(entry, jnp.float32)
        elif dtype == "float32":
            entry = entry.view(np.float32)
        taken[name] = entry.astype(dtype)
    return taken
