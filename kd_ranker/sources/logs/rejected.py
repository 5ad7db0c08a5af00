"""Rejected rows: the reasons, and a file that holds some of the rows."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.files import SQL, Log, is_list, wanted_columns
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.query import logged, quoted

REJECTED_FOLDER = "rejected"
# The columns next to those of the log, and the most rows per reason.
_ADDED, MOST_ROWS = ("reason", "file", "row"), 100_000
# Reason -> its meaning. A row has the first reason that applies.
REASONS = {
    "lists_differ": "its lists differ in length",
    "no_candidates": "its list of items is empty or missing",
    "missing_request": "the id of the request is missing or invalid",
    "missing_time": "the time is missing or invalid",
    "missing_user": "the id of the user is missing or invalid",
    "missing_item": "the id of the item is missing or invalid",
    "unknown_stage": "the stage is missing or not in data.stages",
    "bad_label": "a label is neither 0 nor 1",
    "several_hours": "its request is longer than data.longest_request: two requests with one id?",
    "several_users": "most rows of its request belong to another user",
    "duplicate_item": "an earlier row of the request has the item, and all positive labels",
    "beyond_retrieved": "its request has more candidates than funnel.retrieved",
}


def count_rejected(database: Database) -> dict[str, int]:
    """Return the number of rejected candidates by reason, in the order of `REASONS`."""
    query = "SELECT why, sum(entries)::BIGINT AS entries FROM rejected GROUP BY why"
    counts = {row["why"]: row["entries"] for row in database.rows(query)}
    return {reason: counts[reason] for reason in REASONS if reason in counts}


def write_rejected(
    database: Database, log: Log, layout: LogLayout, types: Mapping[str, pa.DataType], folder: Path
) -> None:
    """Write the rejected rows to `rejected.parquet`, at most 100,000 per reason.

    It has `reason`, `file` and `row`, the row's number in that file from 0, and all columns of the
    log. If a row is a request and only some of its candidates are rejected, each of these has a row
    with only its values in the lists.

    The folder is made if any row was rejected. `types` are those of the columns of the log.
    """
    listed = {wanted.column for wanted in wanted_columns(layout) if wanted.per_candidate}
    columns = []
    for name, type_ in types.items():
        value = column = logged(name)
        if name in listed and is_list(type_):
            is_whole = f"place < 0 OR {column} IS NULL"
            value = f"CASE WHEN {is_whole} THEN {column} ELSE {column}[place + 1:place + 1] END"
        columns.append(f"{value} AS {quoted(f'{name}_' if name in _ADDED else name)}")
    batches = database.stream(f"""
        SELECT why AS reason, file, "row", {", ".join(columns)}
        FROM log JOIN (SELECT *, row_number() OVER (PARTITION BY why ORDER BY file, "row") AS turn
            FROM rejected) AS counted USING (file, "row")
        WHERE turn <= {MOST_ROWS} ORDER BY file, "row", place""")
    paths, writer = pa.array(log.files or [SQL]), None
    with contextlib.ExitStack() as stack:
        for batch in filter(len, batches):
            rows = pa.Table.from_batches([batch]).set_column(1, "file", paths.take(batch["file"]))
            if writer is None:
                folder.mkdir()
                path = folder / "rejected.parquet"
                writer = stack.enter_context(pq.ParquetWriter(path, rows.schema))
            writer.write_table(rows)
