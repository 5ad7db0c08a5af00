"""`data.name = "parquet"`: from a log to a source of requests, and the files next to them."""

import contextlib
import dataclasses
import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, Block, Source
from kd_ranker.sources.logs import append, data_report, encode, files, findings, vocabulary
from kd_ranker.sources.logs.append import Earlier
from kd_ranker.sources.logs.data_report import Counts, Report
from kd_ranker.sources.logs.database import Database, open_duckdb
from kd_ranker.sources.logs.encode import Encoding
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.layout import LogLayout, read_layout, sql_of
from kd_ranker.sources.logs.leaks import find_leaks
from kd_ranker.sources.logs.ordered import Piece, write_ordered
from kd_ranker.sources.logs.query import PREFIX, Query
from kd_ranker.sources.logs.rejected import REJECTED_FOLDER, count_rejected, write_rejected

# Folder below `data.dir` for the report of a log of which no dataset was built.
REFUSED = "refused_log"


class PreparedLog(NamedTuple):
    """A log, read up to the point where only requests remain to be written.

    Attributes:
      log: its files.
      layout: of the log.
      query: what made the tables of `log.sql`.
      database: holds these.
      counts: what was counted.
      pieces: the pieces in which requests and candidates are in the database's folder.
      earlier: the dataset that its files extend, if there is one.
    """

    log: Log
    layout: LogLayout
    query: Query
    database: Database
    counts: Counts
    pieces: list[Piece]
    earlier: Earlier | None

    def shards(self, split: str) -> list[Piece]:
        """The pieces of a split, in the order of time."""
        return [piece for piece in self.pieces if piece.split == split]

    def num_requests(self, split: str) -> int:
        """The number of requests of a split."""
        spans = (piece.requests for piece in self.shards(split))
        return sum(stop - start for start, stop in spans)


def open_source(
    data: ConfigDict,
    tasks: Sequence[str],
    funnel: ConfigDict,
    extended: Dataset | None = None,
) -> Source:
    """Open a log as a source; `configs/parquet.py` explains `data`.

    DuckDB, or Spark, reads the log, with the memory that `data.memory` gives it, and brings its
    rows into order in a folder below `data.dir`, which `Source.close` removes.

    Args:
      data: `config.data`.
      tasks: `config.tasks`.
      funnel: `config.funnel`.
      extended: a dataset of older files of the log, see `append`; None reads all files.

    Returns:
      The source; each split comes in the order of time, then of request ids.

    Raises:
      UserError: the config or the log's columns are at fault, nothing is left to train or to test
        on, a finding is not in `data.allow`, or with `data.strict` any row is at fault; or the log
        cannot extend that dataset.
    """
    layout = read_layout(data, tasks, funnel)
    earlier = append.open_earlier(layout, extended) if extended else None
    log = files.open_log(layout, earlier.files if earlier else ())
    Path(layout.directory).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=".parquet-", dir=layout.directory))
        stack.callback(shutil.rmtree, work)
        known = earlier.settled.vocabularies if earlier else {}
        database, query = stack.enter_context(open_engine(log, layout, work, known))
        source = _source(_read(log, layout, database, query, earlier))
        # From here on, the source closes all of it.
        return dataclasses.replace(source, close=stack.pop_all().close)


def check_unchanged(data: ConfigDict, directory: Path) -> None:
    """Check that a log has not changed since `directory` was made of it; a missing one is fine.

    Raises:
      UserError: files have been added, removed or changed.
    """
    now = files.manifest_of(data.path, sql_of(data))
    if not now.keys() - {files.SQL}:
        return
    before = vocabulary.read_manifest(directory)
    if how := files.manifest_differences(before, now):
        if before.items() <= now.items():
            how += f"; --config.data.extends={data.dir} adds new files"
        raise UserError(
            f"the log at {data.path or files.SQL} has changed since {directory} was made of it "
            f"({how}); give another data.dir to make a dataset of it as it is now, or restore its "
            "files"
        )


@contextlib.contextmanager
def open_engine(
    log: Log, layout: LogLayout, folder: Path, known: Mapping[str, pa.Table] = MappingProxyType({})
) -> Iterator[tuple[Database, Query]]:
    """Open a log in the engine that the config names, and makes its query.

    Args:
      log: the log.
      layout: of the log.
      folder: for tables that do not fit in memory.
      known: vocabularies of a dataset, which become the tables `known_<name>`.

    Raises:
      UserError: a file is damaged, or the engine is not installed or does not start.
    """
    with contextlib.ExitStack() as stack:
        if layout.engine == "duckdb":
            columns = {of.column for of in files.wanted_columns(layout)}
            files.check_pages(log, columns, layout.processes)  # Spark checks pages itself
            opened = open_duckdb(layout.memory, layout.processes, folder, log.candidates)
        else:
            try:
                from kd_ranker.sources.logs.spark_engine import open_spark
            except ImportError as error:
                raise UserError(
                    f"data.engine={layout.engine!r} needs the package pyspark ({error}); "
                    "pip install 'kd_ranker[spark]'"
                ) from error
            opened = open_spark(layout.spark_master, layout.spark_options, folder.resolve())
        database = stack.enter_context(opened)
        schema = database.open_log(log)
        types = {
            of.name.removeprefix(PREFIX): of.type for of in schema if of.name.startswith(PREFIX)
        }
        for name, table in known.items():
            database.put(f"known_{name}", table)
        sizes = {f"known_{name}": len(table) for name, table in known.items()}
        yield database, Query(layout, types, sizes)


def _read(
    log: Log, layout: LogLayout, database: Database, query: Query, earlier: Earlier | None
) -> PreparedLog:
    """All passes except the last."""
    if earlier:
        vocabulary.check_types(layout, query.types, earlier.settled)
    database.run(query.statements("log.sql"))
    if earlier:
        append.check_requests(earlier, database)
    _check_splits(layout, query, database)
    counted = query.statements("report.sql")
    database.run(counted)
    names = re.findall(r'^CREATE TABLE ("[^"]+"|\w+)', "\n".join(counted), re.M)
    tables = {
        name.strip('"'): database.rows(f"SELECT * FROM {name}")
        for name in names
        if name != "sampled"
    }
    counts = Counts(count_rejected(database), tables, {})
    if counts.candidates != counts.used + sum(counts.rejected.values()):
        raise RuntimeError(f"{counts.candidates} candidates, {counts.used} used, {counts.rejected}")
    pieces = []
    if counts.used:
        pieces = write_ordered(database)
        counts = counts._replace(leaks=find_leaks(database, layout))
    return PreparedLog(log, layout, query, database, counts, pieces, earlier)


def _some_numbers(database: Database, query: Query, column: str) -> Float64[np.ndarray, "n"]:
    """Some finite numbers of a column; none of one that holds something else."""
    text = query.some_numbers(column)
    numbers = database.fetch(text)["number"].to_numpy() if text else np.zeros(0)
    return numbers[np.isfinite(numbers)]


def _check_splits(layout: LogLayout, query: Query, database: Database) -> None:
    """Raise UserError for times, or a column of splits, that cannot split the requests."""
    unsplit = "SELECT count(*) FROM requests CROSS JOIN cutoffs WHERE test IS NULL"
    if layout.split == "time" and database.number(unsplit):
        numbers = _some_numbers(database, query, layout.columns["time"])
        raise UserError(
            f"data.split='time', but the requests of {layout.path} have less than three different "
            "times, one a split; split by 'request' or 'user'"
            f"{findings.time_hint(numbers, layout)}"
        )
    count = "SELECT count(*) FROM bad_splits"
    if layout.split == "column" and (number := database.number(count)):
        (example,) = database.rows("SELECT min(request) AS request FROM bad_splits")
        raise UserError(
            f"data.columns.split: in column {layout.columns['split']!r}, {number:,} requests, such "
            f"as {example['request']!r}, do not have one of {', '.join(SPLITS)} in all of their "
            "rows"
        )


def _source(read: PreparedLog) -> Source:
    log, layout, database, earlier = read.log, read.layout, read.database, read.earlier
    some_numbers = functools.partial(_some_numbers, database, read.query)
    report = data_report.make_data_report(log, layout, read.counts, some_numbers)
    found = findings.find(
        report, lambda: findings.time_hint(some_numbers(layout.columns["time"]), layout)
    )
    report["allowed"] = [finding._asdict() for finding in found if finding.name in layout.allow]
    for name, text in found:
        verdict = "Allowed" if name in layout.allow else "Refused"
        report["remarks"].append(f"{verdict}, {name}: {text}.")
    if why := _unusable(read, report, found):
        raise _refuse(read, report, why)
    encoding, vocabularies = _encoding(read)
    if earlier:
        append.extend_report(earlier, report, database)
    items = database.fetch("SELECT * FROM item_fields ORDER BY id")
    if earlier:
        matrices = vocabulary.with_items(layout, encoding, earlier.dataset.items, items)
    else:
        matrices = encode.item_matrix(layout, encoding, items)
    before = earlier.requests if earlier else 0

    def shards(split: str) -> list[Callable[[], Block]]:
        return [
            functools.partial(
                encode.encode_requests, layout, encoding, database.folder, piece, before
            )
            for piece in read.shards(split)
        ]

    def write_beside(directory: Path) -> None:
        _write_report(read, report, directory)
        kinds = vocabulary.kinds_of(layout, read.query.types)
        vocabulary.write(layout, encoding, vocabularies, kinds, log.manifest, directory)
        for split in SPLITS:
            requests = [
                vocabulary.requests_of_piece(database.folder, of) for of in read.shards(split)
            ]
            if earlier:
                requests = append.all_requests(earlier, split, requests, log.manifest)
            vocabulary.write_requests(requests, directory, split)

    return Source(
        spec=encoding.spec,
        item_features=matrices[0],
        requests=lambda split: (
            request for shard in shards(split) for request in shard().requests()
        ),
        num_requests={split: read.num_requests(split) for split in SPLITS},
        item_category=matrices[1],
        shards=shards,
        threads=layout.processes,
        write_beside=write_beside,
    )


def _encoding(read: PreparedLog) -> tuple[Encoding, dict[str, pa.Table]]:
    """The encoding, and all vocabularies."""
    layout = read.layout
    moments = {of.name: read.counts.moments(of.name) for of in layout.of_kind("dense")}
    if read.earlier:
        append.check_scales(read.earlier, layout, moments)
        return append.extend(read.earlier, layout, read.database)
    return vocabulary.new_encoding(read.database, layout, moments)


def _unusable(read: PreparedLog, report: Report, found: Sequence[Finding]) -> str:
    """A reason for making no dataset of a log, or ""."""
    layout = read.layout
    if not read.pieces:
        times = "".join(f"; {finding.text}" for finding in found if finding.name == "times")
        return f"not one row of the log can be used{times}"
    for split in SPLITS:
        has_earlier = read.earlier is not None and split == "train"
        if not read.num_requests(split) and not has_earlier:
            shares = (
                f"data.validation_share={layout.validation_share} and "
                f"data.test_share={layout.test_share}"
            )
            column = f"column {layout.columns.get('split')!r}"
            by = column if layout.split == "column" else shares
            return f"no request is left for the split {split!r}, with {by}"
    if bad := read.counts.row("propensities").get("bad"):
        of = read.counts.row("propensities")
        return (
            f"data.columns.propensity: {bad:,} of {of['shown']:,} values of column "
            f"{layout.columns['propensity']!r} on shown candidates are not in (0, 1], such as "
            f"{of['least']:g}"
        )
    if layout.strict and (faults := _faults(report)):
        return f"data.strict=True, and the log has faults: {faults}"
    return findings.refusal(found, layout.allow)


def _faults(report: Report) -> str:
    """Faults that a strict reading refuses, in words, or ""."""
    invalid = sum(column["out_of_range"] for column in report["columns"])
    counted: tuple[tuple[Any, str], ...] = (
        (report["candidates"]["rejected"], "rejected candidates"),
        (invalid, "invalid values"),
        (report["teacher"]["other_version"], "candidates of another teacher version"),
        (report["requests"]["several_times"], "requests of several times"),
    )
    return ", ".join(f"{number:,} {what}" for number, what in counted if number)


def _refuse(read: PreparedLog, report: Report, why: str) -> UserError:
    """The error for a log that makes no dataset; its report is written all the same."""
    directory = Path(read.layout.directory) / REFUSED
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _write_report(read, report, directory)
    rejected = ", ".join(f"{name} {number:,}" for name, number in read.counts.rejected.items())
    return UserError(
        f"{read.layout.path}: {why}{f'; rejected were: {rejected}' if rejected else ''}; see "
        f"{directory / data_report.PAGE}"
    )


def _write_report(read: PreparedLog, report: Report, directory: Path) -> None:
    """Write the report and the rejected rows."""
    data_report.write_data_report(report, directory)
    folder = directory / REJECTED_FOLDER
    write_rejected(read.database, read.log, read.layout, read.query.types, folder)
