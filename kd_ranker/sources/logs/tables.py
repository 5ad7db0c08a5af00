"""A log in an engine, DuckDB or Spark, with the tables that `log.sql` makes of it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from kd_ranker.errors import UserError
from kd_ranker.sources.logs import vocabulary
from kd_ranker.sources.logs.columns import check_types, is_text, wanted_columns
from kd_ranker.sources.logs.database import Database, open_duckdb
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.pages import check_pages
from kd_ranker.sources.logs.query import PREFIX, Query, logged

# Values of a column that are enough to guess what they are.
_SOME_VALUES = 1000


class Tables(NamedTuple):
    """A log in an engine, with the tables of `log.sql`."""

    log: Log
    layout: LogLayout
    database: Database
    query: Query

    def some_numbers(self, column: str) -> Float64[np.ndarray, "n"]:
        """Return some finite numbers of a column; none of one that holds something else."""
        if not self.query.is_number(column):
            return np.zeros(0)
        number = self.query.number(column)
        table = self.database.fetch(
            f"SELECT {number} AS number FROM unfolded WHERE {number} IS NOT NULL "
            f'ORDER BY file, "row" LIMIT {_SOME_VALUES}'
        )
        numbers = table["number"].to_numpy()
        return numbers[np.isfinite(numbers)]

    def some_texts(self, column: str) -> list[str]:
        """Return some texts of a column; none of one that holds something else."""
        if not is_text(self.query.types[column]):
            return []
        text = f"nullif(trim({logged(column)}::VARCHAR), '')"
        table = self.database.fetch(
            f"SELECT {text} AS text FROM unfolded WHERE {text} IS NOT NULL "
            f'ORDER BY file, "row" LIMIT {_SOME_VALUES}'
        )
        return table["text"].to_pylist()


@contextlib.contextmanager
def open_tables(
    log: Log,
    layout: LogLayout,
    folder: Path,
    known: Encoding | None = None,
    has_new_values: bool = True,
) -> Iterator[Tables]:
    """Read a log into the tables of `log.sql`, in the engine that the config names.

    Args:
      log: what to read.
      layout: the use of its columns.
      folder: for tables that do not fit in memory.
      known: the ids of a dataset; new users and items get the ids after these.
      has_new_values: whether new values of features get ids too.

    Raises:
      UserError: a file is damaged, a column has a type that does not fit its use, the engine is not
        installed or does not start, or the log has ids of another type than `known`.
    """
    with contextlib.ExitStack() as stack:
        database = _enter_engine(stack, log, layout, folder)
        database.open_log(log)
        types = {
            field.name.removeprefix(PREFIX): field.type
            for field in database.fetch("FROM log LIMIT 0").schema
            if field.name.startswith(PREFIX)
        }
        check_types(layout, types)
        sizes = {}
        if known:
            vocabulary.check_kinds(layout, types, known)
            for name in known.vocabularies if has_new_values else (USER, ITEM):
                database.put(f"known_{name}", known.vocabularies[name])
                sizes[f"known_{name}"] = len(known.vocabularies[name])
        query = Query(layout, types, sizes)
        database.run(query.statements("log.sql"))
        yield Tables(log, layout, database, query)


def _enter_engine(
    stack: contextlib.ExitStack, log: Log, layout: LogLayout, folder: Path
) -> Database:
    if layout.engine == "duckdb":
        columns = {wanted.column for wanted in wanted_columns(layout)}
        check_pages(log, columns, layout.processes)  # Spark checks pages itself
        return stack.enter_context(open_duckdb(layout.memory, layout.processes, folder, log.size))
    try:
        from kd_ranker.sources.logs.spark_engine import open_spark

        session = open_spark(layout.spark_master, layout.spark_options, folder.resolve())
        return stack.enter_context(session)
    except ImportError as error:
        raise UserError(
            f"data.engine={layout.engine!r} needs the package pyspark ({error}); "
            "pip install 'kd_ranker[spark]'"
        ) from error
