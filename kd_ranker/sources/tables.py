"""Tables of public datasets: DuckDB for as long as they are read, and columns as arrays."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from ibis.backends.sql.datatypes import DuckDBType
from pyarrow import dataset

from kd_ranker.sources.logs.database import log_errors
from kd_ranker.sources.logs.query import quoted

# GiB that DuckDB holds before it spills to disk.
_MEMORY = 4


class Engine:
    """A connection to DuckDB, and a folder for tables that do not fit in memory.

    Tables are made and fetched by the SQL that Ibis makes of an expression. The ways of Ibis itself
    do not work with all releases of DuckDB.

    Attributes:
      backend: the connection by Ibis.
      folder: where DuckDB spills.
    """

    def __init__(self, backend: Any, folder: Path) -> None:
        self.backend, self.folder = backend, folder

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """Computes a table once, under a name."""
        types = DuckDBType.to_string
        columns = (f"{quoted(of)} {types(type_)}" for of, type_ in table.schema().items())
        with log_errors():
            self.backend.con.execute(f"CREATE TABLE {quoted(name)} ({', '.join(columns)})")
            self.backend.con.execute(f"INSERT INTO {quoted(name)} {self.backend.compile(table)}")
        kept: ir.Table = self.backend.table(name)
        return kept

    def fetch(self, table: ir.Table) -> pa.Table:
        """Computes a table that fits in memory."""
        with log_errors():
            return self.backend.con.sql(self.backend.compile(table)).to_arrow_table()

    def put(self, name: str, rows: pa.Table | dataset.Dataset) -> ir.Table:
        """Names rows in memory, or in files that pyarrow reads, as a table."""
        self.backend.con.register(name, rows)
        table: ir.Table = self.backend.table(name)
        return table

    def count(self, table: ir.Table) -> int:
        """Returns the number of rows."""
        return int(self.fetch(table.agg(number=table.count()))["number"][0].as_py())


@contextlib.contextmanager
def open_tables(directory: str | Path = "") -> Iterator[Engine]:
    """Opens an engine that keeps the order of the rows of a file.

    Args:
      directory: for tables that do not fit in memory; "" takes the folder of the system.
    """
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tables-", dir=directory or None) as folder:
        backend = ibis.duckdb.connect(
            memory_limit=f"{_MEMORY}GiB",
            threads=1,
            preserve_insertion_order=True,
            # It drops conditions that a Parquet file's bounds imply, and these ignore NaN.
            disabled_optimizers="statistics_propagation",
        )
        backend.con.execute("SET temp_directory = ?", [str(Path(folder) / "spilled")])
        try:
            yield Engine(backend, Path(folder))
        finally:
            backend.disconnect()


def numbered(table: ir.Table, key: str) -> ir.Table:
    """Adds `id`, the rank from 0 of each value of `key`, which are all different."""
    return table.mutate(id=ibis.row_number().over(order_by=key))


def fetch_columns(engine: Engine, table: ir.Table) -> list[np.ndarray]:
    """Returns the columns of a table without nulls, in its order."""
    return [column.to_numpy() for column in engine.fetch(table).columns]
