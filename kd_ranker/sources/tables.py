"""Tables of public datasets: an engine for as long as they are read, and columns as arrays."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from pyarrow import dataset

from kd_ranker.sources.logs.duckdb_engine import open_duckdb
from kd_ranker.sources.logs.engine import Engine

# GiB that the engine holds before it goes on on disk.
_MEMORY = 4.0


@contextlib.contextmanager
def open_tables(directory: str | Path = "") -> Iterator[Engine]:
    """Opens an engine that keeps the order of the rows of a file.

    Args:
      directory: where it keeps what does not fit in memory; "" takes the system's own.
    """
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".tables-", dir=directory or None) as folder,
        open_duckdb(_MEMORY, 1, Path(folder)) as engine,
    ):
        engine.backend.con.execute("SET preserve_insertion_order = true")
        yield engine


def numbered(table: ir.Table, key: str) -> ir.Table:
    """The table with `id`, the place of each value of `key`, which are all different, in order."""
    return table.mutate(id=ibis.row_number().over(order_by=key))


def fetch_columns(engine: Engine, table: ir.Table) -> list[np.ndarray]:
    """The columns of a table without gaps, in its order."""
    return [column.to_numpy() for column in engine.fetch(table).columns]


def put(engine: Engine, name: str, rows: pa.Table | dataset.Dataset) -> ir.Table:
    """Rows that are here, or in files that pyarrow reads, as a table of the engine."""
    engine.backend.con.register(name, rows)
    table: ir.Table = engine.backend.table(name)
    return table
