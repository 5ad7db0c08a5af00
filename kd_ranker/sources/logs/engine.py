"""The engine that the passes over a log run on: DuckDB, in this process.

All that is asked of it is said in Ibis, so that another engine can be asked the same.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout

_FILE, _ROW = "__file", "file_row_number"
# Rows that the engine hands over at a time.
_ROWS = 2**16


class Engine(NamedTuple):
    """A connection, and a folder for what does not fit in memory."""

    backend: Any
    folder: Path

    def read(self, log: Log) -> ir.Table:
        """All rows of a log, with `file` (the file's number) and `row` (in it, from 0)."""
        paths = self._paths(log)
        rows = self.backend.read_parquet(
            paths, table_name="log", filename=_FILE, file_row_number=True, union_by_name=True
        )
        number = ibis.literal(0)
        if len(paths) > 1:
            numbers = ibis.memtable({_FILE: paths, "file": list(range(len(paths)))})
            rows = rows.join(numbers, _FILE)
            number = rows.file
        placed = rows.mutate(file=number.cast("int64"), row=rows[_ROW].cast("int64"))
        return placed.drop(_FILE, _ROW)

    def read_file(self, log: Log, file: int, row: str) -> ir.Table:
        """All rows of a file of a log, with their numbers in it as a column of this name."""
        rows = self.backend.read_parquet(self._paths(log)[file], file_row_number=True)
        return rows.rename({row: _ROW})

    def _paths(self, log: Log) -> list[str]:
        """The files of a log as the engine opens them."""
        system, _ = fsspec.core.url_to_fs(log.url)
        if isinstance(system, LocalFileSystem):
            return list(log.files)
        try:
            system.modified(log.files[0])
        except NotImplementedError:
            # An archive, say, which the engine cannot read from.
            copies = [self.folder / f"copied-{number}" for number in range(len(log.files))]
            if not copies[-1].exists():
                system.get(list(log.files), [str(copy) for copy in copies])
            return [str(copy) for copy in copies]
        names = [system.protocol] if isinstance(system.protocol, str) else system.protocol
        if not {*names} & {*self.backend.con.list_filesystems()}:
            self.backend.con.register_filesystem(system)
        return [system.unstrip_protocol(path) for path in log.files]

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """The same table, worked out once and for all."""
        return self.backend.create_table(name, table, temp=True)

    def fetch(self, table: ir.Table) -> pa.Table:
        """A table that fits in memory."""
        return self.backend.con.sql(str(ibis.to_sql(table))).to_arrow_table()

    def count(self, table: ir.Table) -> int:
        """The number of rows."""
        return int(self.fetch(table.agg(number=table.count()))["number"][0].as_py())

    def stream(self, table: ir.Table) -> pa.RecordBatchReader:
        """A table in its order, some rows at a time."""
        return self.backend.con.sql(str(ibis.to_sql(table))).to_arrow_reader(_ROWS)

    def write(self, table: ir.Table, name: str) -> Path:
        """Writes a table, in its order, to a Parquet file of the folder."""
        path, batches = self.folder / f"{name}.parquet", self.stream(table)
        with pq.ParquetWriter(path, batches.schema, compression="lz4") as writer:
            for batch in batches:
                writer.write_batch(batch)
        return path


@contextlib.contextmanager
def open_engine(layout: LogLayout, folder: Path) -> Iterator[Engine]:
    """Opens DuckDB with the memory and the threads that the config gives it."""
    backend = ibis.duckdb.connect(
        memory_limit=f"{layout.memory * 1024:.0f}MiB",
        threads=layout.processes,
        temp_directory=str(folder / "spilled"),
        preserve_insertion_order=False,
    )
    try:
        yield Engine(backend, folder)
    finally:
        backend.disconnect()
