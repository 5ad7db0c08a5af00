"""A column of a sample: its distinct values, and which of them each row holds."""

import dataclasses
import functools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float64, Int32, Int64

from kd_ranker.sources.hashing import splitmix64
from kd_ranker.sources.logs.files import is_list

_EPOCHS = {"s": 1.0, "ms": 1e3, "us": 1e6}
_EARLIEST, _LATEST = 9.5e8, 2.5e9  # 2000 and 2049, in seconds since 1970


def kind_of(of: pa.DataType) -> str:
    """The kind of a column of this type, see `Column`; "" for types that cannot be read."""
    tests = {
        "bool": pa.types.is_boolean,
        "integer": pa.types.is_integer,
        "float": lambda of: pa.types.is_floating(of) or pa.types.is_decimal(of),
        "string": lambda of: pa.types.is_string(of) or pa.types.is_binary(of),
        "time": lambda of: pa.types.is_timestamp(of) or pa.types.is_date(of),
        "list": is_list,
    }
    return next((kind for kind, test in tests.items() if test(of)), "")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a sample.

    Attributes:
      name: its name in the files.
      kind: "bool", "integer", "float", "string", "time" or "list".
      code: of each row, its place in `values`; -1 for null.
      values: the distinct values; lists among them.
    """

    name: str
    kind: str
    code: Int32[np.ndarray, "rows"]
    values: pa.Array

    @property
    def known(self) -> Bool[np.ndarray, "rows"]:
        """True for rows that hold a value."""
        return self.code >= 0

    @property
    def distinct(self) -> int:
        """The number of distinct values."""
        return len(self.values)

    @functools.cached_property
    def value_numbers(self) -> Float64[np.ndarray, "distinct"]:
        """The distinct values as numbers; NaN for those that are none. Times are whole numbers."""
        values = self.values
        if self.kind == "time":
            values = values.cast(pa.int32() if pa.types.is_date32(values.type) else pa.int64())
        elif self.kind not in ("bool", "integer", "float"):
            return np.full(len(values), np.nan)
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return np.asarray(numbers, np.float64)

    @property
    def numbers(self) -> Float64[np.ndarray, "rows"]:
        """The values as numbers, NaN where there is none."""
        return np.append(self.value_numbers, np.nan)[self.code]

    @functools.cached_property
    def is_whole(self) -> bool:
        """True if the values are whole numbers, or floats as pandas makes of these beside nulls."""
        if self.kind in ("bool", "integer"):
            return True
        finite = self.value_numbers[np.isfinite(self.value_numbers)]
        is_close = bool(len(finite)) and bool(np.all(np.abs(finite) < 2**53))
        return self.kind == "float" and is_close and bool(np.all(finite == np.rint(finite)))

    @functools.cached_property
    def element_lengths(self) -> Int64[np.ndarray, "distinct"]:
        """The lengths of the distinct lists."""
        return np.asarray(pc.list_value_length(self.values).to_numpy(zero_copy_only=False))

    @functools.cached_property
    def element_kind(self) -> str:
        """The kind of the elements of lists; "" for a column that holds none."""
        return kind_of(self.values.type.value_type) if self.kind == "list" else ""

    def taken(self, rows: np.ndarray) -> "Column":
        """The column at some rows; values that no longer occur are kept."""
        return dataclasses.replace(self, code=self.code[rows])


def encode(chunked: pa.ChunkedArray) -> tuple[Int32[np.ndarray, "rows"], pa.Array]:
    """The code of each row, and the distinct values."""
    array = chunked.combine_chunks()
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    if is_list(array.type):
        return _encode_lists(array)
    if pa.types.is_floating(array.type):
        # NaN is how some writers say null.
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    encoded = array.dictionary_encode()
    return _filled(encoded.indices), encoded.dictionary


def _filled(indices: pa.Array) -> Int32[np.ndarray, "rows"]:
    return np.asarray(pc.fill_null(indices, -1).to_numpy(zero_copy_only=False), np.int32)


def _encode_lists(array: pa.Array) -> tuple[Int32[np.ndarray, "rows"], pa.Array]:
    """Equal lists get equal codes, by a hash of 64 bits: Σ over places of mix(element, place)."""
    length = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    length = np.asarray(length, np.int64)
    flat = array.flatten()
    # Of lists of lists, only the lengths are looked at, so inner lists need no codes.
    element = (
        np.zeros(len(flat), np.int32)
        if not kind_of(flat.type) or is_list(flat.type)
        else encode(pa.chunked_array([flat]))[0]
    )
    start = np.cumsum(length) - length
    place = np.arange(len(flat), dtype=np.uint64) - np.repeat(start, length).astype(np.uint64)
    mixed = splitmix64(splitmix64(element.astype(np.int64).astype(np.uint64)) + place)
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    key = splitmix64(total[start + length] - total[start] + length.astype(np.uint64))
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(key[~is_null], return_index=True, return_inverse=True)
    code = np.full(len(array), -1, np.int32)
    code[~is_null] = inverse
    return code, array.take(pa.array(np.flatnonzero(~is_null)[first]))


def time_unit_of(column: Column) -> str:
    """The unit in which whole numbers count from 1970 to a day of this century; "" if in none."""
    if column.kind not in ("integer", "float") or not column.is_whole:
        return ""
    lowest, highest = np.nanquantile(column.numbers, [0.01, 0.99])
    for unit, per_second in _EPOCHS.items():
        if _EARLIEST * per_second <= lowest and highest <= _LATEST * per_second:
            return unit
    return ""


def may_be_time(column: Column) -> bool:
    """True if a column holds times: by its type, or as numbers of this century's days."""
    return column.kind == "time" or bool(time_unit_of(column))


def value_text(column: Column, code: int) -> str:
    """A value as text, as `config.data.stages` writes it."""
    value = column.values[code].as_py()
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def is_binary(column: Column, nonsense: float = 0.01) -> bool:
    """True if values are 0 and 1, or truth values, but for a share of nonsense, as logs hold it."""
    if column.kind not in ("bool", "integer", "float"):
        return False
    is_one = np.isin(column.value_numbers, (0.0, 1.0))
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    return bool(is_one.any()) and float(counts[is_one].sum()) >= (1 - nonsense) * float(
        counts.sum()
    )


def positives_of(column: Column) -> Bool[np.ndarray, "rows"]:
    """True for rows in which a binary column is 1."""
    return column.numbers == 1


def distinct_in_rows(column: Column) -> int:
    """The number of distinct values that rows hold, null aside."""
    return int(np.count_nonzero(np.bincount(column.code[column.known])))


def is_known_where(column: Column, mask: Bool[np.ndarray, "rows"]) -> bool:
    """True if a column is known nearly only in `mask`, and often there."""
    outside = column.known[~mask].mean() if (~mask).any() else 0.0
    return outside <= 0.01 and column.known[mask].mean() >= 0.5


def as_type(ids: pa.Array, of: pa.DataType) -> pa.Array | None:
    """Ids as another type of whole numbers or of texts; None if one is numbers, the other texts."""
    for is_kind in (pa.types.is_integer, pa.types.is_string):
        if is_kind(ids.type) and is_kind(of):
            return ids.cast(of, safe=False)
    return None


def share_of_values(lists: Column, column: Column) -> float:
    """The share of the elements of lists that are values of another column, too."""
    if not lists.element_kind or not len(lists.values):
        return 0.0
    elements = lists.values.flatten().drop_null()
    values = as_type(column.values, elements.type)
    if values is None:
        return 0.0
    is_value = pc.is_in(elements, value_set=values)
    return float(pc.mean(is_value.cast(pa.int8())).as_py() or 0.0)
