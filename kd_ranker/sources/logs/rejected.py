"""Rejected rows: the reasons, and files that hold the rows as they are in the log."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.query import PREFIX, quoted

REJECTED_FOLDER = "rejected"
# Reason -> its meaning. The first that applies to a row counts.
REASONS = {
    "lists_differ": "its lists differ in length",
    "no_candidates": "its list of items is empty or missing",
    "missing_request": "the request's id is missing or is no id",
    "missing_time": "the time is missing or is no time",
    "missing_user": "the user's id is missing or is no id",
    "missing_item": "the item's id is missing or is no id",
    "unknown_stage": "the stage is missing or not in data.stages",
    "bad_label": "a label is neither 0 nor 1",
    "several_hours": "its request is longer than data.longest_request: one id of two",
    "several_users": "its request is another user's, by most of its rows",
    "duplicate_item": "the request has the item in a row before, where its positives count",
    "beyond_retrieved": "its request has more candidates than funnel.retrieved",
}


def count_rejected(database: Database) -> dict[str, int]:
    """Reason -> how many candidates are rejected for it, in the order of `REASONS`."""
    query = "SELECT why, sum(entries)::BIGINT AS entries FROM rejected GROUP BY why"
    counts = {row["why"]: row["entries"] for row in database.rows(query)}
    return {reason: counts[reason] for reason in REASONS if reason in counts}


def write_rejected(
    database: Database, log: Log, layout: LogLayout, types: Mapping[str, pa.DataType], folder: Path
) -> None:
    """Writes the rows that were rejected, read once more from the log.

    A file of the log that has any gets a `rejected-<its number>.parquet` with all of its columns
    and `reason`, `file` and `row`, the row's number in that file from 0. Where a row is a request
    and only some of its candidates are rejected, each of these is a row with only it in the lists.

    Args:
      database: holds the table `rejected`.
      log: the log.
      layout: of the log.
      types: column of the log -> its type.
      folder: to write to; made if there is anything to write.
    """
    listed = {wanted.column for wanted in files.wanted_columns(layout) if wanted.per_candidate}
    columns = []
    for name, type_ in types.items():
        value = column = quoted(PREFIX + name)
        if name in listed and files.is_list(type_):
            is_whole = f"place < 0 OR {column} IS NULL"
            value = f"CASE WHEN {is_whole} THEN {column} ELSE [{column}[place + 1]] END"
        columns.append(f"{value} AS {column}")
    query = (
        f'SELECT file, "row", why, {", ".join(columns)} FROM log JOIN rejected USING (file, "row") '
        'ORDER BY file, "row", place'
    )
    for file, parts in itertools.groupby(_by_file(database.stream(query)), _file_of):
        folder.mkdir(exist_ok=True)
        schema = files.read_schema(log, file) if log.files else pa.schema(types.items())
        path, writer = folder / f"rejected-{file:05d}.parquet", None
        with contextlib.ExitStack() as stack:
            for part in parts:
                table = _as_logged(part, schema, log.files[file] if log.files else "data.sql")
                writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
                writer.write_table(table)


def _by_file(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches, cut where another file begins."""
    for batch in filter(len, batches):
        begins = np.flatnonzero(np.diff(batch["file"].to_numpy())) + 1
        for start, stop in itertools.pairwise([0, *begins, batch.num_rows]):
            yield batch.slice(start, stop - start)


def _file_of(batch: pa.RecordBatch) -> int:
    number: int = batch["file"][0].as_py()
    return number


def _as_logged(batch: pa.RecordBatch, schema: pa.Schema, file: str) -> pa.Table:
    """The columns of a file in its own types, and why each row is rejected."""
    columns = {of.name: _cast(batch[PREFIX + of.name], of.type) for of in schema}
    for name, column in (
        ("reason", batch["why"]),
        ("file", pa.array([file] * batch.num_rows, pa.string())),
        ("row", batch["row"]),
    ):
        # The log may have a column of that name.
        while name in columns:
            name += "_"
        columns[name] = column
    return pa.table(columns)


def _cast(array: pa.Array, type_: pa.DataType) -> pa.Array:
    """The array in the type that the log has, or as DuckDB returns what cannot be cast back."""
    try:
        return array.cast(type_)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # a UUID is a text to DuckDB
        return array
