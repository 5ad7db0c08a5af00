"""Spark as engine, for a log that outgrows a machine; needs the package pyspark."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.backends.pyspark.datatypes import PySparkSchema
from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import SparkSession

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import FILE, ROW, ROWS_AT_A_TIME, Engine
from kd_ranker.sources.logs.files import Log

# It has no whole numbers of 64 bits without a sign, and reads them as these.
_UNSIGNED = pa.decimal128(20, 0)


class Spark(Engine):
    """A session, whose workers see the log and the folder."""

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """The same table, worked out once."""
        # Not by `persist`: a plan names in full what all it reads was made of, and so in the end
        # plans outgrew the driver's memory.
        path = (self.folder / f"kept-{name}").as_uri()
        # Some of its columns are narrower than Ibis takes them for.
        self._frame(table).to(PySparkSchema.from_ibis(table.schema())).write.parquet(path)
        self.backend._session.read.parquet(path).createOrReplaceTempView(name)
        kept: ir.Table = self.backend.table(name)
        return kept

    def view(self, name: str, table: ir.Table) -> ir.Table:
        """The same table under a name, worked out where it is asked for."""
        self._frame(table).createOrReplaceTempView(name)
        view: ir.Table = self.backend.table(name)
        return view

    def fetch(self, table: ir.Table) -> pa.Table:
        """A table that fits in memory."""
        return self._frame(table).toArrow().cast(_schema(table))

    def stream(self, table: ir.Table) -> pa.RecordBatchReader:
        """A table in its order, some rows at a time; the whole is written to the folder first."""
        written = Path(tempfile.mkdtemp(dir=self.folder)) / "rows"
        self._frame(table).write.parquet(written.as_uri())
        # The names of the parts follow the order of the rows.
        parts, schema = sorted(written.glob("part-*.parquet")), _schema(table)

        def batches() -> Iterator[pa.RecordBatch]:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    for batch in file.iter_batches(ROWS_AT_A_TIME):
                        yield batch.cast(schema)
                part.unlink()

        return pa.RecordBatchReader.from_batches(schema, batches())

    def put(self, name: str, rows: pa.Table) -> ir.Table:
        """A table of rows that are here."""
        self.backend._session.createDataFrame(rows).createOrReplaceTempView(name)
        put: ir.Table = self.backend.table(name)
        return put

    def rows_of(self, log: Log, files: list[int]) -> ir.Table:
        """All rows of some files of a log, with the columns `FILE` and `ROW`."""
        name = f"log_{files[0]}_{len(files)}"
        self._read(log, files).createOrReplaceTempView(name)
        rows: ir.Table = self.backend.table(name)
        return rows

    def names_of(self, log: Log) -> list[str]:
        """The files of a log as `FILE` names them."""
        found = self._read(log, [*range(len(log.files))]).select(FILE).distinct().collect()
        names = {_path(row[0]): row[0] for row in found}
        # A file without rows has not been found.
        return [names.get(file, file) for file in log.files]

    def _read(self, log: Log, files: list[int]) -> Any:
        system, _ = fsspec.core.url_to_fs(log.url)
        reader = self.backend._session.read.option("mergeSchema", True)
        # Else columns would be made of the names of folders.
        reader = reader.option("recursiveFileLookup", True)
        frame = reader.parquet(*(system.unstrip_protocol(log.files[file]) for file in files))
        return frame.selectExpr(
            "*", f"_metadata.file_path AS {FILE}", f"_metadata.row_index AS {ROW}"
        )

    def _frame(self, table: ir.Table) -> Any:
        return self.backend._session.sql(self.backend.compile(table))


def _path(name: str) -> str:
    """The path of a file that Spark names by a URL."""
    url = urlsplit(name)
    return unquote(url.netloc + url.path)


def _schema(table: ir.Table) -> pa.Schema:
    """The columns of a table as other engines give them; some of Spark's own are narrower."""
    return pa.schema([pa.field(of.name, _type(of.type)) for of in table.schema().to_pyarrow()])


def _type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_list(type_):
        return pa.list_(_type(type_.value_type))
    return pa.uint64() if type_ == _UNSIGNED else type_


@contextlib.contextmanager
def open_spark(master: str, options: Mapping[str, Any], folder: Path) -> Iterator[Engine]:
    """Opens a session of Spark.

    Args:
      master: its URL, such as `local[2]` or `spark://host:7077`.
      options: further settings of the session by their names.
      folder: for what is handed over; workers write to it.

    Raises:
      UserError: Java is not installed, the master does not answer, or what runs meanwhile fails.
    """
    # One that the caller has goes on afterwards.
    is_own = SparkSession.getActiveSession() is None
    builder = SparkSession.builder.master(master).appName("kd_ranker")
    for name, value in {**_SETTINGS, **options}.items():
        builder = builder.config(name, value)
    try:
        session = builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise UserError(f"Spark does not start, which needs Java 17: {error}") from error
    try:
        yield Spark(ibis.pyspark.connect(session), folder)
    except PySparkException as error:
        raise UserError(f"the log cannot be read by Spark: {str(error)[:500]}") from error
    finally:
        if is_own:
            session.stop()


_SETTINGS = {
    "spark.ui.enabled": False,
    "spark.sql.session.timeZone": "UTC",
    # What a file says of its pages is checked.
    "spark.hadoop.parquet.page.verify-checksum.enabled": True,
    "spark.log.level": "ERROR",
}
