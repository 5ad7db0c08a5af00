"""The columns of a batch of a log as arrays, from any of the allowed types."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int, Int64

from kd_ranker.sources.logs.named_columns import starts_of

# Seconds since 1970 that NumPy and TFDS hold alike, some 30,000 years.
_LATEST = 10.0**12


def numbers_of(array: pa.Array) -> Float64[np.ndarray, "n"]:
    """Numbers, truth values or decimals; NaN where there is none."""
    if pa.types.is_null(array.type):
        return np.full(len(array), np.nan)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    # Not safe: a double holds nearly the numbers that it cannot hold exactly.
    numbers = pc.cast(array, pa.float64(), safe=False).fill_null(float("nan"))
    return numbers.to_numpy(zero_copy_only=False)


def seconds_of(
    array: pa.Array, units_per_second: int
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Seconds since 1970 (UTC), rounded down, and True where there is a time.

    Timestamps say their unit, and one without a time zone counts as UTC; dates begin at midnight;
    of numbers `units_per_second` is known.
    """
    type_ = array.type
    if pa.types.is_date(type_):
        array, type_ = array.cast(pa.timestamp("ms")), pa.timestamp("ms")
    if pa.types.is_timestamp(type_):
        units_per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[type_.unit]
        array = array.view(pa.int64())
    if pa.types.is_integer(array.type):
        # Not by way of floats, which would move nanoseconds.
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        units = array.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
        seconds = units // units_per_second
    else:
        numbers = numbers_of(array) / units_per_second
        valid = np.isfinite(numbers) & (np.abs(numbers) <= _LATEST)
        seconds = np.floor(np.where(valid, numbers, 0)).astype(np.int64)
    valid = valid & (np.abs(seconds) <= _LATEST)
    return np.where(valid, seconds, 0), valid


def codes_of(array: pa.Array, codes: dict[str, int]) -> Int64[np.ndarray, "n"]:
    """The code of each text, whole number or truth value; 0 for one without a code, -1 for null."""
    if pa.types.is_null(array.type):
        return np.full(len(array), -1)
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    code_of = [
        -1 if text is None else codes.get(_as_text(text), 0)
        for text in array.dictionary.to_pylist()
    ]
    indices = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.array([*code_of, -1])[indices]


def _as_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


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


def compacted(
    lengths: Int[np.ndarray, "n"], keep: Bool[np.ndarray, "all"]
) -> Int64[np.ndarray, "n+1"]:
    """The place where each list begins once only the values to keep are left."""
    kept = starts_of(keep.astype(np.int64))
    return kept[starts_of(lengths)]
