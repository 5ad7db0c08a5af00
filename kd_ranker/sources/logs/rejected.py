"""Writes the rejected rows of a log as they stand there, with the reason."""

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.requests.ragged import starts_of
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.lists import lists_of, take_values
from kd_ranker.sources.logs.reasons import Reason
from kd_ranker.sources.logs.typed import PREFIX

REJECTED_FOLDER = "rejected"


def write_rejected(
    engine: Engine, log: Log, layout: LogLayout, rejected: ir.Table, folder: Path
) -> int:
    """Writes the rows that were rejected, read once more from the log.

    A file of the log that has any gets a `rejected-<its number>.parquet` with all of its columns
    and `reason`, `file` and `row`, the row's number in that file from 0. Where a row is a request
    and only some of its candidates are rejected, each of these is a row whose lists hold it alone.

    Args:
      engine: what has read the log.
      log: the log.
      layout: of the log.
      rejected: see `Grouped`.
      folder: to write to; made if there is anything to write.

    Returns:
      How many candidates these are.
    """
    listed = {wanted.column for wanted in files.wanted_columns(layout) if wanted.per_candidate}
    of_files = engine.fetch(rejected.group_by("file").agg(entries=rejected.entries.sum()))
    # Each file as it is: a column may be of another type elsewhere.
    alike = collections.defaultdict(list)
    for file in sorted(of_files["file"].to_pylist()):
        folder.mkdir(exist_ok=True)
        alike[files.read_schema(log, file).remove_metadata()].append(file)
    for schema, numbers in alike.items():
        rows = engine.read(log, PREFIX, numbers).join(rejected, ["file", "row"])
        batches = engine.stream(rows.order_by("file", "row", "place"))
        for file, parts in itertools.groupby(_by_file(batches), _file_of):
            path, writer = folder / f"rejected-{file:05d}.parquet", None
            with contextlib.ExitStack() as stack:
                for part in parts:
                    table = _with_reasons(part, schema, log.files[file], listed)
                    writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
                    writer.write_table(table)
    return sum(map(int, of_files["entries"].to_pylist()))


def _by_file(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, cut where another file begins."""
    for batch in filter(len, batches):
        begins = np.flatnonzero(np.diff(batch["file"].to_numpy())) + 1
        for start, stop in itertools.pairwise([0, *begins, batch.num_rows]):
            yield batch.slice(start, stop - start)


def _file_of(batch: pa.RecordBatch) -> int:
    number: int = batch["file"][0].as_py()
    return number


def _with_reasons(
    batch: pa.RecordBatch, schema: pa.Schema, file: str, listed: set[str]
) -> pa.Table:
    row, place, reason = (batch[name].to_numpy() for name in ("row", "place", "reason"))
    columns = {}
    for field in schema:
        array = _as_in_the_log(batch[PREFIX + field.name], field.type)
        if field.name in listed and files.is_list(array.type) and (place >= 0).any():
            array = _cut(array, place)
        columns[field.name] = array
    texts = pa.array([reason.name.lower() if reason else "" for reason in [0, *Reason]])
    for name, column in (
        ("reason", texts.take(pa.array(reason))),
        ("file", pa.array([file] * len(row), pa.string())),
        ("row", pa.array(row)),
    ):
        # The log may have a column of that name.
        while name in columns:
            name += "_"
        columns[name] = column
    return pa.table(columns)


def _as_in_the_log(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """The array in the type that the log has, or as the engine gives what it cannot turn back."""
    try:
        return array.cast(type_)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a UUID is a text to DuckDB
        return array


def _cut(array: pa.Array, place: np.ndarray) -> pa.Array:
    """The lists: whole where `place` is -1, else the value at that place alone."""
    start, length, valid, inner = lists_of(array)
    whole = place < 0
    first = start + np.where(whole, 0, place)
    number = np.where(valid, np.where(whole, length, 1), 0)
    ends = starts_of(number)
    places = np.repeat(first - ends[:-1], number) + np.arange(ends[-1])
    offsets = pa.array(ends, mask=np.append(~valid, False))
    return pa.LargeListArray.from_arrays(offsets, take_values(inner, places)).cast(array.type)
