"""A log in DuckDB: the view `log` of its rows, and tables that spill to disk."""

import contextlib
import functools
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather
from fsspec.implementations.local import LocalFileSystem

from kd_ranker.errors import UserError
from kd_ranker.requests.row_files import Flat
from kd_ranker.sources.logs.files import Log, line_of, register_store, register_stores
from kd_ranker.sources.logs.query import PREFIX, logged
from kd_ranker.sources.logs.sql import literal, quoted

# Bytes in memory of all tables that exist at a time, for a byte of the log on disk, about.
_BYTES_A_BYTE = 12
# Rows of a result that are handed over at a time.
ROWS_AT_A_TIME = 2**16

Shard = TypeVar("Shard")


class Database:
    """A connection to DuckDB."""

    def __init__(self, connection: Any, folder: Path, threads: int = 1) -> None:
        self.connection = connection
        self.folder = folder
        self.threads = threads

    def run(self, statements: Sequence[str]) -> None:
        """Run statements, one after the other."""
        with log_errors():
            for statement in statements:
                self.connection.execute(statement)

    def fetch(self, query: str) -> pa.Table:
        """Return the result of a query that fits in memory."""
        with log_errors():
            return self.connection.sql(query).to_arrow_table()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a small result."""
        return self.fetch(query).to_pylist()

    def number(self, query: str) -> int:
        """Return the only number of a result; 0 for NULL."""
        (row,) = self.rows(query)
        (number,) = row.values()
        return int(number or 0)

    def stream(self, query: str) -> pa.RecordBatchReader:
        """Return the result of a query in its order, some rows at a time."""
        with log_errors():
            return self.connection.sql(query).to_arrow_reader(ROWS_AT_A_TIME)

    def write_ordered(
        self, fields: str, order: str, piece: str, pieces: pa.Table
    ) -> list[Callable[[], pa.Table]]:
        """Write a view in its order, and return a reader of each piece.

        Args:
          fields: the name of the view.
          order: of the rows; pieces ascend in it.
          piece: the number of a row's piece, as SQL.
          pieces: the number of each `piece`, ascending, and the `size` of it in rows.
        """
        # In Arrow's own format: reading parts of Parquet takes ten times as long.
        path = self.folder / f"{fields}.arrow"
        batches = self.stream(f"SELECT * FROM {fields} ORDER BY {order}")
        with pa.ipc.new_file(path, batches.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        ends = pc.cumulative_sum(pieces["size"]).to_pylist()
        return [
            functools.partial(_read_rows, path, slice(start, end))
            for start, end in itertools.pairwise([0, *ends])
        ]

    def map(self, function: Callable[[Shard], Flat], shards: Iterable[Shard]) -> Iterator[Flat]:
        """Yield the packed requests of each shard, in order; threads are a few ahead."""
        pending: deque[Future[Flat]] = deque()
        with ThreadPoolExecutor(self.threads) as executor:
            for shard in shards:
                pending.append(executor.submit(function, shard))
                if len(pending) > 2 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def put(self, name: str, rows: pa.Table) -> None:
        """Make a table of rows."""
        self.connection.register(name, rows)

    def open_log(self, log: Log) -> None:
        """Make the view `log`.

        It has `file`, the number of the file, `row`, the number of the row in it from 0, and all
        columns of the log with `PREFIX` before their names.
        """
        source = self._source_of_select(log) if log.sql else self._source_of_files(log)
        names = ", ".join(f"{quoted(name)} AS {logged(name)}" for name in log.names)
        kind = "TABLE" if source.runs_once else "VIEW"
        with log_errors(log.name):
            self.connection.execute(f"SET preserve_insertion_order = {source.runs_once}")
            self.connection.execute(f"""
                CREATE {kind} log AS FROM (
                    SELECT {source.file}::BIGINT AS file, {source.row} AS "row", {names}
                    FROM {source.rows}) {source.join}""")
            self.connection.execute("SET preserve_insertion_order = false")

    def _source_of_select(self, log: Log) -> "_RowSource":
        register_stores(self.connection, log.sql)
        return _RowSource(
            rows=f"(\n{log.sql}\n)",
            file="0",
            row="row_number() OVER () - 1",
            # A row keeps its number, so the SELECT runs once and in the order of its files.
            runs_once=True,
        )

    def _source_of_files(self, log: Log) -> "_RowSource":
        join = ""
        if log.folder_columns.column_names:
            columns = {
                PREFIX + name: log.folder_columns[name] for name in log.folder_columns.column_names
            }
            self.put("folder_columns", pa.table({"file": range(len(log.files)), **columns}))
            join = "JOIN folder_columns USING (file)"
        # A name is a pattern to DuckDB.
        paths = [literal(re.sub(r"[*?\[]", r"[\g<0>]", path)) for path in self._paths(log)]
        options = "union_by_name = true, hive_partitioning = false"
        return _RowSource(
            rows=f"read_parquet([{', '.join(paths)}], {options})",
            file="file_index",
            row="file_row_number",
            join=join,
        )

    def _paths(self, log: Log) -> list[str]:
        """Return the paths of a log's files as DuckDB reads them."""
        system = log.system
        if isinstance(system, LocalFileSystem):
            return list(log.files)
        try:
            system.modified(log.files[0])
        except NotImplementedError:
            # DuckDB cannot read from such a system, for example an archive or a web server.
            copies = [str(self.folder / f"{number}.parquet") for number in range(len(log.files))]
            system.get(list(log.files), copies)
            return copies
        register_store(self.connection, system)
        return [system.unstrip_protocol(path) for path in log.files]


class _RowSource(NamedTuple):
    """The rows of a log as parts of a SELECT."""

    rows: str  # what follows FROM
    file: str  # the number of a row's file
    row: str  # the number of the row in it
    join: str = ""  # with further columns by file
    runs_once: bool = False


def _read_rows(path: Path, rows: slice) -> pa.Table:
    """Return some rows of a file; columns that are not used stay on disk."""
    return feather.read_table(path, memory_map=True)[rows]


@contextlib.contextmanager
def log_errors(fault: str = "the log cannot be read") -> Iterator[None]:
    """Turn what DuckDB raises about a log, not about a mistake here, into a UserError."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"reading takes more than data.memory allows: {line_of(error)}; raise data.memory"
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.DataError) as error:
        raise UserError(f"{fault}: {line_of(error)}") from error


@contextlib.contextmanager
def open_duckdb(memory: float, threads: int, folder: Path, size: int) -> Iterator[Database]:
    """Open DuckDB with at most `memory` GiB, and with a folder for tables that do not fit in it.

    The log has `size` bytes on disk; 0 if it is not known.
    """
    # A database in a file is compressed. That takes longer than to keep tables in memory, but half
    # as long as to spill them.
    fits = 0 < size * _BYTES_A_BYTE <= memory * 2**30
    connection = duckdb.connect(
        ":memory:" if fits else str(folder / "tables.duckdb"),
        config={
            "memory_limit": f"{memory * 1024:.0f}MiB",
            "threads": threads,
            "preserve_insertion_order": False,
            # It drops conditions that a Parquet file's bounds imply, and these ignore NaN.
            "disabled_optimizers": "statistics_propagation",
            # That file is never opened again.
            "wal_autocheckpoint": "1TB",
            "temp_directory": str(folder / "spilled"),
        },
    )
    with contextlib.closing(connection):
        connection.execute("SET TimeZone = 'UTC'")
        yield Database(connection, folder, threads)
