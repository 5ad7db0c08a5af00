"""The choice of an engine."""

import contextlib
from pathlib import Path

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.duckdb_engine import open_duckdb
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import LogLayout


def open_engine(
    layout: LogLayout, folder: Path, candidates: int
) -> contextlib.AbstractContextManager[Engine]:
    """Opens the engine that the config names.

    Args:
      layout: of the log.
      folder: for what does not fit in memory.
      candidates: about how many the log has.

    Raises:
      UserError: the engine is not installed, or does not start.
    """
    if layout.engine == "duckdb":
        return open_duckdb(layout.memory, layout.processes, folder, candidates)
    try:
        from kd_ranker.sources.logs.spark_engine import open_spark
    except ImportError as error:
        raise UserError(
            f"data.engine={layout.engine!r} needs the package pyspark ({error}); "
            "pip install 'kd_ranker[spark]'"
        ) from error
    return open_spark(layout.spark_master, layout.spark_options, folder.resolve())
