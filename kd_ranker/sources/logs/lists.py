"""Columns of lists as arrays, however they are laid out."""

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, Int64


def lists_of(
    array: pa.Array,
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Bool[np.ndarray, "n"], pa.Array]:
    """A column of lists: starts, lengths (0 if null), True where there is a list, and values.

    The values are those of all rows, and may hold more than the lists do.
    """
    if pa.types.is_null(array.type):
        none = np.zeros(len(array), np.int64)
        return none, none, np.zeros(len(array), bool), pa.nulls(0)
    if pa.types.is_fixed_size_list(array.type) or "view" in str(array.type):
        array = array.cast(pa.large_list(array.type.value_type))
    offsets = array.offsets.to_numpy().astype(np.int64)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return offsets[:-1], np.where(valid, np.diff(offsets), 0), valid, array.values


def take_values(
    values: pa.Array, places: Int[np.ndarray, "m"], valid: Bool[np.ndarray, "m"] | None = None
) -> pa.Array:
    """The values at some places, null where not `valid`."""
    if valid is None or valid.all():
        return values.take(pa.array(places))
    return values.take(pa.array(places, mask=~valid))
