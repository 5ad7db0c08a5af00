"""DuckDB as engine, in this process."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import fsspec
import ibis
import ibis.expr.types as ir
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from ibis.backends.sql.datatypes import DuckDBType

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import FILE, ROWS_AT_A_TIME, Engine
from kd_ranker.sources.logs.files import Log

# Of a candidate in all tables that are kept at a time, about.
_BYTES_A_CANDIDATE = 300


class DuckDb(Engine):
    """A connection to DuckDB, which spills to disk what does not fit in memory."""

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """The same table, worked out once and for all."""
        columns = (f"{_quoted(of)} {_type(type_)}" for of, type_ in table.schema().items())
        with _told():
            self.backend.con.execute(f"CREATE TABLE {_quoted(name)} ({', '.join(columns)})")
            self.backend.con.execute(f"INSERT INTO {_quoted(name)} {self._sql(table)}")
        kept: ir.Table = self.backend.table(name)
        return kept

    def fetch(self, table: ir.Table) -> pa.Table:
        """A table that fits in memory."""
        with _told():
            return self.backend.con.sql(self._sql(table)).to_arrow_table()

    def stream(self, table: ir.Table) -> pa.RecordBatchReader:
        """A table in its order, some rows at a time."""
        with _told():
            return self.backend.con.sql(self._sql(table)).to_arrow_reader(ROWS_AT_A_TIME)

    def put(self, name: str, rows: pa.Table) -> ir.Table:
        """A table of rows that are here."""
        self.backend.con.register(name, rows)
        put: ir.Table = self.backend.table(name)
        return put

    def rows_of(self, log: Log, files: list[int]) -> ir.Table:
        """All rows of some files of a log, with the columns `FILE` and `ROW`."""
        names = self.names_of(log)
        # A name is a pattern to DuckDB.
        paths = [re.sub(r"[*?\[]", r"[\g<0>]", names[file]) for file in files]
        # Ibis' read_parquet would download an extension for s3:// and http://.
        rows = ibis.util.gen_name("rows")
        with _told():
            self.backend.con.execute(
                f"CREATE VIEW {rows} AS FROM read_parquet([{', '.join(map(_literal, paths))}], "
                f"filename = '{FILE}', file_row_number = true, union_by_name = true, "
                "hive_partitioning = false)"
            )
        view: ir.Table = self.backend.table(rows)
        return view

    def names_of(self, log: Log) -> list[str]:
        """The files of a log as `FILE` names them."""
        system, _ = fsspec.core.url_to_fs(log.url)
        if isinstance(system, LocalFileSystem):
            return list(log.files)
        try:
            system.modified(log.files[0])
        except NotImplementedError:
            # The engine cannot read from such a system, for example an archive or a web server.
            digests = [hashlib.sha256(file.encode()).hexdigest() for file in log.files]
            copies = {self.folder / of: file for of, file in zip(digests, log.files, strict=True)}
            if missing := [copy for copy in copies if not copy.exists()]:
                system.get([copies[copy] for copy in missing], [str(copy) for copy in missing])
            return [str(copy) for copy in copies]
        names = [system.protocol] if isinstance(system.protocol, str) else system.protocol
        if not {*names} & {*self.backend.con.list_filesystems()}:
            self.backend.con.register_filesystem(system)
        return [system.unstrip_protocol(path) for path in log.files]

    def _sql(self, table: ir.Table) -> str:
        sql: str = self.backend.compile(table)
        return sql


_type = DuckDBType.to_string


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what the engine raises of a log, not of a mistake here, into a UserError."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(f"reading takes more than data.memory allows: {error}") from error
    except (
        duckdb.IOException,
        duckdb.InvalidInputException,
        duckdb.ConversionException,
        duckdb.OutOfRangeException,
    ) as error:
        raise UserError(f"the log cannot be read: {error}") from error


@contextlib.contextmanager
def open_duckdb(memory: float, threads: int, folder: Path, candidates: int = 0) -> Iterator[Engine]:
    """Opens DuckDB.

    Args:
      memory: GiB that it holds at most.
      threads: how many it works with.
      folder: for what does not fit in memory.
      candidates: about how many it is to keep.
    """
    # A database in a file is compressed. That takes longer than to keep tables in memory, but half
    # as long as to spill them.
    fits = candidates * _BYTES_A_CANDIDATE <= memory * 2**30
    backend = ibis.duckdb.connect(
        ":memory:" if fits else folder / "tables.duckdb",
        memory_limit=f"{memory * 1024:.0f}MiB",
        threads=threads,
        preserve_insertion_order=False,
        # It drops conditions that a Parquet file's bounds imply, and these bounds ignore NaN.
        disabled_optimizers="statistics_propagation",
        # Nobody opens that file again, so its log need not be worked off.
        wal_autocheckpoint="1TB",
    )
    backend.con.execute("SET temp_directory = ?", [str(folder / "spilled")])
    try:
        yield DuckDb(backend, folder)
    finally:
        backend.disconnect()
