"""The engine that the passes over a log run on, which are said in Ibis alone."""

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa

from kd_ranker.sources.logs.files import Log

FILE, ROW = "__file", "file_row_number"
"""The columns of `Engine.rows_of` that say where a row lies."""

ROWS_AT_A_TIME = 2**16
"""Rows of a table that an engine hands over at a time."""


class Engine(abc.ABC):
    """A connection, and a folder for what does not fit in memory.

    Tables are made and fetched by the SQL that Ibis makes of an expression: its own ways of doing
    so do not work with all releases of the engines.
    """

    def __init__(self, backend: Any, folder: Path) -> None:
        self.backend, self.folder = backend, folder

    @abc.abstractmethod
    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """The same table, worked out once and for all."""

    @abc.abstractmethod
    def fetch(self, table: ir.Table) -> pa.Table:
        """A table that fits in memory."""

    @abc.abstractmethod
    def stream(self, table: ir.Table) -> pa.RecordBatchReader:
        """A table in its order, some rows at a time."""

    @abc.abstractmethod
    def put(self, name: str, rows: pa.Table) -> ir.Table:
        """A table of rows that are here."""

    @abc.abstractmethod
    def rows_of(self, log: Log, files: list[int]) -> ir.Table:
        """All rows of some files of a log, with the columns `FILE` and `ROW`."""

    @abc.abstractmethod
    def names_of(self, log: Log) -> list[str]:
        """The files of a log as `FILE` names them."""

    def count(self, table: ir.Table) -> int:
        """The number of rows."""
        return int(self.fetch(table.agg(number=table.count()))["number"][0].as_py())

    def read(self, log: Log, prefix: str = "", only: Sequence[int] | None = None) -> ir.Table:
        """All rows of a log, with `file` (the file's number) and `row` (in it, from 0).

        Its own columns have the prefix before their names. `only` these files are read.
        """
        files_read = [*range(len(log.files))] if only is None else [*only]
        rows, names = self.rows_of(log, files_read), self.names_of(log)
        files = pa.table({FILE: names, "file": range(len(names))})
        for name, column in zip(log.given.column_names, log.given.columns, strict=True):
            files = files.append_column(prefix + name, column)
        own = {prefix + name: name for name in rows.columns if name not in (FILE, ROW)}
        rows = rows.rename(own) if prefix else rows
        rows = rows.join(self.put("files", files), FILE)
        return rows.mutate(row=rows[ROW].cast("int64")).drop(FILE, ROW)
