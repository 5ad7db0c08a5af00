"""Columns of equal length in memory, and on disk while a log is brought into order."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int64, Num


@dataclasses.dataclass(frozen=True)
class Ragged:
    """A column of lists: that of row i is `values[start[i] : start[i + 1]]`."""

    start: Int64[np.ndarray, "n+1"]
    values: Num[np.ndarray, "all"]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.start) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, "n"]:
        """The number of values of each row."""
        return np.diff(self.start)


ColumnValues = np.ndarray | Ragged
NamedColumns = dict[str, ColumnValues]


class SortedRun(NamedTuple):
    """A file of rows sorted by bucket.

    Attributes:
      path: an Arrow IPC file with one record batch a bucket.
      buckets: bucket -> the number of its record batch.
    """

    path: str
    buckets: dict[int, int]


def array_of(table: NamedColumns, name: str) -> np.ndarray:
    """A column that is not one of lists."""
    column = table[name]
    assert not isinstance(column, Ragged)
    return column


def starts_of(lengths: Int[np.ndarray, "n"]) -> Int64[np.ndarray, "n+1"]:
    """The place where each of several lists begins, laid end to end, and where the last one ends.

    >>> starts_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def places_of(
    start: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]
) -> Int64[np.ndarray, "all"]:
    """The places [start, start + length) of several lists, one list after the other.

    >>> places_of(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = starts_of(lengths)
    return np.repeat(start - ends[:-1], lengths) + np.arange(ends[-1])


def take(column: ColumnValues, places: Int[np.ndarray, "m"]) -> Any:
    """The rows at some places of a column."""
    if isinstance(column, Ragged):
        lengths = column.lengths[places]
        return Ragged(
            starts_of(lengths), column.values[places_of(column.start[:-1][places], lengths)]
        )
    return column[places]


def take_rows(table: NamedColumns, places: Int[np.ndarray, "m"]) -> NamedColumns:
    """The rows at some places of a table."""
    return {name: take(column, places) for name, column in table.items()}


def concatenate(tables: Sequence[NamedColumns]) -> NamedColumns:
    """The rows of several tables with the same columns, at least one table."""
    return {name: _end_to_end([table[name] for table in tables]) for name in tables[0]}


def _end_to_end(columns: Sequence[ColumnValues]) -> ColumnValues:
    if isinstance(columns[0], Ragged):
        lists = [column for column in columns if isinstance(column, Ragged)]
        return Ragged(
            starts_of(np.concatenate([column.lengths for column in lists])),
            np.concatenate([column.values for column in lists]),
        )
    return np.concatenate([column for column in columns if not isinstance(column, Ragged)])


def write_run(path: Path, table: NamedColumns, bucket: Int[np.ndarray, "n"]) -> SortedRun:
    """Writes rows sorted by bucket; those of a bucket keep their order."""
    order = np.argsort(bucket, kind="stable")
    batch = _to_arrow(take_rows(table, order))
    buckets, start = np.unique(bucket[order], return_index=True)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, batch.schema, options=options) as writer,
    ):
        for first, end in zip(start, [*start[1:], len(order)], strict=True):
            writer.write_batch(batch.slice(first, end - first))
    return SortedRun(str(path), {int(bucket): index for index, bucket in enumerate(buckets)})


def read_runs(runs: Sequence[tuple[str, int]]) -> NamedColumns:
    """The rows of some (path, number of the record batch), at least one of them."""
    tables = []
    for path, index in runs:
        with pa.OSFile(path) as file:
            tables.append(_from_arrow(pa.ipc.open_file(file).get_batch(index)))
    return concatenate(tables)


def write_columns(path: Path, table: NamedColumns) -> None:
    """Writes a table to a file of its own."""
    write_run(path, table, np.zeros(num_rows(table), np.int64))


def read_columns(path: Path) -> NamedColumns:
    """The inverse of `write_columns`."""
    return read_runs([(str(path), 0)])


def num_rows(table: NamedColumns) -> int:
    """The number of rows."""
    return len(next(iter(table.values())))


def _to_arrow(table: NamedColumns) -> pa.RecordBatch:
    def array(column: ColumnValues) -> pa.Array:
        if isinstance(column, Ragged):
            return pa.LargeListArray.from_arrays(column.start, pa.array(column.values))
        return pa.array(column)

    return pa.RecordBatch.from_pydict({name: array(column) for name, column in table.items()})


def _from_arrow(batch: pa.RecordBatch) -> NamedColumns:
    def column(array: Any) -> ColumnValues:
        if pa.types.is_large_list(array.type):
            start = array.offsets.to_numpy()
            values = array.values.to_numpy(zero_copy_only=False)
            return Ragged(start - start[0], values[start[0] : start[-1]])
        return array.to_numpy(zero_copy_only=False)

    return {name: column(batch.column(name)) for name in batch.schema.names}
