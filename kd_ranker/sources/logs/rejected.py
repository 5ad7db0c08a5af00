"""Writes the rejected rows of a log as they stand there, with the reason."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.named_columns import starts_of
from kd_ranker.sources.logs.reasons import Reason, Rejected
from kd_ranker.sources.logs.values import lists_of, take_values

REJECTED_FOLDER = "rejected"


def write_rejected(log: Log, layout: LogLayout, paths: Sequence[str], folder: Path) -> int:
    """Writes the rows that were rejected, read once more from the log.

    A file of the log that has any gets a `rejected-<its number>.parquet` with all of its columns
    and `reason`, `file` and `row`, the row's number in that file from 0. Where a row is a request
    and only some of its candidates are rejected, each of these is a row whose lists hold it alone.

    Args:
      log: the log.
      layout: of the log.
      paths: of records that `reasons.save_rejected` wrote.
      folder: to write to; made if there is anything to write.

    Returns:
      How many candidates these are.
    """
    saved = [records for path in paths if len(records := np.load(path, mmap_mode="r"))]
    listed = {wanted.column for wanted in files.wanted_columns(layout) if wanted.per_candidate}
    written = 0
    for file in range(len(log.files)):
        of_file = [
            np.asarray(records[slice(*np.searchsorted(records["file"], [file, file + 1]))])
            for records in saved
        ]
        if not any(map(len, of_file)):
            continue
        records = np.concatenate(of_file)
        records = records[np.lexsort([records["place"], records["row"]])]
        folder.mkdir(exist_ok=True)
        _write_file(log, file, records, listed, folder / f"rejected-{file:05d}.parquet")
        written += int(records["entries"].sum())
    return written


def _write_file(log: Log, file: int, records: Rejected, listed: set[str], path: Path) -> None:
    writer = None
    try:
        for row, batch in _batches(log, file, records):
            first, end = np.searchsorted(records["row"], [row, row + batch.num_rows])
            if first == end:
                continue
            table = _with_reasons(batch, records[first:end], row, log.files[file], listed)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _batches(log: Log, file: int, records: Rejected) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The number of the first row and the batch, for all batches of the parts with records."""
    for part in log.parts:
        if part.file != file:
            continue
        first, end = np.searchsorted(records["row"], [part.first_row, part.first_row + part.rows])
        if first < end:
            for _, row, batch in files.read_parts(log, [part], None):
                yield row, batch


def _with_reasons(
    batch: pa.RecordBatch, records: Rejected, first_row: int, file: str, listed: set[str]
) -> pa.Table:
    rows = records["row"] - first_row
    columns = {}
    for name in batch.schema.names:
        array = batch.column(name)
        if name in listed and files.is_list(array.type) and (records["place"] >= 0).any():
            columns[name] = _cut(array, rows, records["place"])
        else:
            columns[name] = array.take(pa.array(rows))
    texts = pa.array([reason.name.lower() if reason else "" for reason in [0, *Reason]])
    for name, column in (
        ("reason", texts.take(pa.array(records["reason"]))),
        ("file", pa.array([file] * len(records), pa.string())),
        ("row", pa.array(records["row"])),
    ):
        # The log may have a column of that name.
        while name in columns:
            name += "_"
        columns[name] = column
    return pa.table(columns)


def _cut(array: pa.Array, rows: np.ndarray, place: np.ndarray) -> pa.Array:
    """The lists of some rows: whole where `place` is -1, else the value at that place alone."""
    start, length, valid, inner = lists_of(array)
    whole = place < 0
    first = start[rows] + np.where(whole, 0, place)
    number = np.where(valid[rows], np.where(whole, length[rows], 1), 0)
    ends = starts_of(number)
    places = np.repeat(first - ends[:-1], number) + np.arange(ends[-1])
    offsets = pa.array(ends, mask=np.append(~valid[rows], False))
    return pa.LargeListArray.from_arrays(offsets, take_values(inner, places)).cast(array.type)
