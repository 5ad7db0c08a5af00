"""Spark as engine, for a log that outgrows a machine: the same SQL, translated by SQLGlot.

Needs the packages pyspark and sqlglot, and Java 17.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot
from sqlglot import exp

from kd_ranker.errors import UserError
from kd_ranker.requests.row_files import Flat
from kd_ranker.sources.logs.database import ROWS_AT_A_TIME, Database, Shard
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.query import MOST_REPORTED, PREFIX

# A statement that begins with it is written for Spark, since it has no translation.
SPARK_ONLY = "/* spark */"
# Its own hash has 32 bits.
_NAMES = {"ROUND_EVEN": "BROUND", "FAVG": "AVG", "HASH": "XXHASH64"}
# It has no unsigned integers of 64 bits, and reads them as these.
_UNSIGNED = pa.decimal128(20, 0)
_SETTINGS = {
    "spark.ui.enabled": False,
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.legacy.sizeOfNull": False,
    "spark.hadoop.parquet.page.verify-checksum.enabled": True,
    "spark.log.level": "ERROR",
    # With it, planning a log of one row per request had not ended after 20 minutes.
    "spark.sql.constraintPropagation.enabled": False,
    # A task keeps no more rejected rows of a reason than the file of them may have.
    "spark.sql.window.group.limit.threshold": MOST_REPORTED + 1,
}


def in_spark(query: str) -> str:
    """Return a query of DuckDB as Spark runs it."""
    return sqlglot.parse_one(query, read="duckdb").transform(_translated).sql("spark")


class Created(NamedTuple):
    """What a CREATE statement makes."""

    name: str
    is_table: bool  # not a view
    query: str  # for Spark


def created(statement: str) -> Created:
    """Read a CREATE statement of DuckDB."""
    match = re.fullmatch(r'CREATE (TABLE|VIEW) "?([^"]+?)"? AS\s+(.*)', statement, re.DOTALL)
    assert match
    kind, name, query = match.groups()
    is_for_spark = query.startswith(SPARK_ONLY)
    query = query.removeprefix(SPARK_ONLY) if is_for_spark else in_spark(query)
    return Created(name, kind == "TABLE", query)


def _translated(node: exp.Expression) -> exp.Expression:
    """Translate names of functions and slices of lists, which SQLGlot leaves unchanged."""
    if isinstance(node, exp.Anonymous) and node.name.upper() in _NAMES:
        return exp.Anonymous(this=_NAMES[node.name.upper()], expressions=node.expressions)
    if isinstance(node, exp.Bracket) and isinstance(node.expressions[0], exp.Slice):
        items = node.this
        part = node.expressions[0]
        one = exp.Literal.number(1)
        if part.this is None:
            return exp.Anonymous(this="SLICE", expressions=[items, one, part.expression])
        if part.this == part.expression:
            return exp.Anonymous(this="SLICE", expressions=[items, part.this, one])
        # The last entries: all of a shorter list.
        length = part.this.this
        first = exp.ArraySize(this=items.copy()) - length.copy() + one
        start = exp.Greatest(this=first, expressions=[one.copy()])
        return exp.Anonymous(this="SLICE", expressions=[items, start, length])
    return node


class Spark(Database):
    """A session, with workers that can read the log and the folder."""

    def run(self, statements: Sequence[str]) -> None:
        """Run statements that make tables and views, one after the other."""
        for statement in statements:
            name, is_table, query = created(statement)
            frame = self.connection.sql(query)
            if is_table:
                # Not by `persist`: a plan contains all plans before it, and outgrew the memory.
                frame = self.connection.read.parquet(f"file://{self._written(frame.write)}")
            frame.createOrReplaceTempView(f"`{name}`")

    def _new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def _written(self, writer: Any) -> Path:
        """Write rows to a new folder of Parquet files."""
        folder = self._new_folder() / "rows"
        # Not `as_uri`: Hadoop does not decode %20.
        writer.parquet(f"file://{folder}")
        return folder

    def fetch(self, query: str) -> pa.Table:
        """The result of a query that fits in memory."""
        table = self.connection.sql(in_spark(query)).toArrow()
        return table.cast(_schema(table.schema))

    def stream(self, query: str) -> pa.RecordBatchReader:
        """The result of a query in its order; the whole is written to the folder first."""
        frame = self.connection.sql(in_spark(query))
        schema = _schema(frame.limit(0).toArrow().schema)
        written = self._written(frame.write)

        def batches() -> Iterator[pa.RecordBatch]:
            # The names of the parts follow the order of the rows.
            for part in sorted(written.glob("part-*.parquet")):
                with pq.ParquetFile(part) as file:
                    for batch in file.iter_batches(ROWS_AT_A_TIME):
                        yield batch.cast(schema)
                part.unlink()

        return pa.RecordBatchReader.from_batches(schema, batches())

    def write_ordered(
        self, fields: str, order: str, piece: str, pieces: pa.Table
    ) -> list[Callable[[], pa.Table]]:
        """Write each piece to a file, see `database.Database.write_ordered`."""
        rows = in_spark(f"SELECT *, {piece} AS piece FROM {fields}")
        # All rows of a piece are in one task.
        query = f"SELECT * FROM ({rows}) DISTRIBUTE BY piece SORT BY piece, {order}"
        folder = self._written(self.connection.sql(query).write.partitionBy("piece"))
        return [
            functools.partial(_read_piece, folder / f"piece={number}")
            for number in pieces["piece"].to_pylist()
        ]

    def map(self, function: Callable[[Shard], Flat], shards: Iterable[Shard]) -> Iterator[Flat]:
        """Apply a function to each shard on a worker, and yield what the workers have written."""
        from pyspark import TaskContext

        shards = list(shards)
        folder = self._new_folder()

        def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for place in batch["id"].to_pylist():
                    # Spark may repeat a task while its first attempt still runs.
                    unfinished = folder / f".{TaskContext.get().taskAttemptId()}.npz"
                    np.savez(unfinished, **function(shards[place])._asdict())
                    unfinished.replace(folder / f"{place}.npz")
                yield batch

        with spark_errors("the log cannot be encoded by Spark"):
            places = self.connection.range(0, len(shards), 1, len(shards))
            places.mapInArrow(work, places.schema).write.format("noop").mode("overwrite").save()
        for place in range(len(shards)):
            path = folder / f"{place}.npz"
            with np.load(path) as arrays:
                yield Flat(**arrays)
            path.unlink()

    def put(self, name: str, rows: pa.Table) -> None:
        """Make a table of rows."""
        self.connection.createDataFrame(rows).createOrReplaceTempView(name)

    def open_log(self, log: Log) -> None:
        """Make the view `log`, see `database.Database.open_log`."""
        # Without the look-up, columns would be made of the names of folders.
        reader = self.connection.read.options(mergeSchema=True, recursiveFileLookup=True)
        frame = reader.parquet(*map(log.system.unstrip_protocol, log.files))
        paths = [path for (path,) in frame.select("_metadata.file_path").distinct().collect()]
        urls = map(urlsplit, paths)
        numbers = [log.files.index(unquote(url.netloc + url.path)) for url in urls]
        files = pa.table({"path": paths, "file": pa.array(numbers, pa.int64())})
        for name in log.folder_columns.column_names:
            values = log.folder_columns[name].take(files["file"])
            files = files.append_column(PREFIX + name, values)
        self.put("files", files)
        columns = [f"`{name}` AS `{PREFIX}{name}`" for name in log.names]
        columns += ["_metadata.file_path AS path", "_metadata.row_index AS row"]
        rows = frame.selectExpr(*columns).join(self.connection.table("files"), "path")
        rows.drop("path").createOrReplaceTempView("log")


def _schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns as DuckDB returns them."""
    return pa.schema([pa.field(field.name, _type(field.type)) for field in schema])


def _type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type_):
        return pa.list_(_type(type_.value_type))
    return pa.uint64() if type_ == _UNSIGNED else type_


def _read_piece(folder: Path) -> pa.Table:
    parts = sorted(folder.glob("part-*.parquet"))  # the names follow the order of the rows
    table = pa.concat_tables([pq.read_table(part, partitioning=None) for part in parts])
    return table.cast(_schema(table.schema))


@contextlib.contextmanager
def spark_errors(fault: str) -> Iterator[None]:
    """Turn what Spark raises into a UserError; of a worker's traceback, only the error is kept."""
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        is_lost = isinstance(error, Py4JJavaError)
        text = str(error.java_exception.getMessage() if is_lost else error)
        *_, why = re.split(r"^(?=[\w.]+(?:Error|Exception)\b)", text, flags=re.MULTILINE)
        remedy = ""
        if is_lost:
            remedy = "; if a worker had too little memory, raise spark.executor.memoryOverhead"
        elif "ModuleNotFoundError" in why:
            remedy = "; install kd_ranker[spark] in the Python that PYSPARK_PYTHON names"
        raise UserError(f"{fault}: {' '.join(why.split())[:500]}{remedy}") from error


@contextlib.contextmanager
def open_spark(master: str, options: Mapping[str, Any], folder: Path) -> Iterator[Database]:
    """Open a session of Spark with a folder for tables, to which its workers write.

    Raises:
      UserError: Java is not installed, the master does not answer, or a query fails meanwhile.
    """
    # Its queries can be translated without these.
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    # A session of the caller continues afterwards.
    is_own = SparkSession.getActiveSession() is None
    if master.startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master(master).appName("kd_ranker")
    for name, value in {**_SETTINGS, **options}.items():
        builder = builder.config(name, value)
    try:
        session = builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise UserError(f"Spark does not start, which needs Java 17: {error}") from error
    try:
        with spark_errors("the log cannot be read by Spark"):
            yield Spark(session, folder)
    finally:
        if is_own:
            session.stop()
