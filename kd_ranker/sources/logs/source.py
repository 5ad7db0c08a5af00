"""`data.name = "parquet"`: from a log to a source of requests, and the files next to them.

Of a log that has grown by files, `data.extends` reads the new files only, by the ids, vocabularies,
means and deviations of a dataset of the older ones. New users, items and values get the ids after
those. Requests of that dataset stay as they are, and are all for training. Only the new requests
are split; the last of them are the test.
"""

import contextlib
import dataclasses
import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, Block, Source
from kd_ranker.sources.logs import data_report, encode, files, findings, vocabulary
from kd_ranker.sources.logs.data_report import Counts, Report, count_rejected
from kd_ranker.sources.logs.database import Database, open_duckdb
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding, Piece
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.layout import LogLayout, read_layout, sql_of
from kd_ranker.sources.logs.query import PREFIX, Query

# Folder below `data.dir` for the report of a log that makes no dataset.
REFUSED = "refused_log"
_REMEDY = "or make a dataset of the whole log: leave data.extends out"


class _Earlier(NamedTuple):
    """A dataset that was made of the older files of a log, with the files next to it."""

    dataset: Dataset
    encoding: Encoding
    files: dict[str, list]
    report: Report

    @property
    def requests(self) -> int:
        return sum(map(len, self.dataset.columns.values()))


class _Tables(NamedTuple):
    """A log in an engine, with the tables of `log.sql`."""

    log: Log
    layout: LogLayout
    earlier: _Earlier | None
    database: Database
    query: Query

    def some_numbers(self, column: str) -> Float64[np.ndarray, "n"]:
        """Some finite numbers of a column; none of one that holds something else."""
        text = self.query.some_numbers(column)
        numbers = self.database.fetch(text)["number"].to_numpy() if text else np.zeros(0)
        return numbers[np.isfinite(numbers)]

    def time_hint(self) -> str:
        """A unit that the times may have, in words."""
        return findings.time_hint(self.some_numbers(self.layout.columns["time"]), self.layout)


def open_source(
    data: ConfigDict,
    tasks: Sequence[str],
    funnel: ConfigDict,
    extended: Dataset | None = None,
) -> Source:
    """Open a log as a source; `configs/parquet.py` explains `data`.

    The engine brings the rows into order in a folder below `data.dir`, which `Source.close`
    removes.

    Args:
      data: `config.data`.
      tasks: `config.tasks`.
      funnel: `config.funnel`.
      extended: a dataset of older files of the log, which new files follow; None reads all files.

    Returns:
      The source; each split comes in the order of time, then of request ids.

    Raises:
      UserError: the config or the log's columns are at fault, nothing is left to train or to test
        on, a finding is not in `data.allow`, or with `data.strict` any row is at fault; or the log
        cannot extend that dataset.
    """
    layout = read_layout(data, tasks, funnel)
    earlier = _open_earlier(layout, extended) if extended else None
    log = files.open_log(layout, earlier.files if earlier else ())
    Path(layout.directory).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=".parquet-", dir=layout.directory))
        stack.callback(shutil.rmtree, work)
        known = earlier.encoding if earlier else None
        opened = open_tables(log, layout, work, known, known.vocabularies if known else ())
        tables = _Tables(log, layout, earlier, *stack.enter_context(opened))
        source = _source(tables)
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
            how += f"; with another data.dir, --config.data.extends={data.dir} adds new files"
        raise UserError(
            f"the log at {data.path or files.SQL} has changed since {directory} was made of it "
            f"({how}); give another data.dir to make a dataset of it as it is now, or restore its "
            "files"
        )


@contextlib.contextmanager
def open_tables(
    log: Log,
    layout: LogLayout,
    folder: Path,
    known: Encoding | None = None,
    names: Iterable[str] = (),
) -> Iterator[tuple[Database, Query]]:
    """Read a log into the tables of `log.sql`, in the engine that the config names.

    With the ids that are `known`, those of a dataset, new ones follow in the vocabularies `names`.
    Tables that do not fit in memory go to `folder`.

    Raises:
      UserError: a file is damaged, a column has a type that does not fit its use, the engine is not
        installed or does not start, or the log has ids of another type than `known`.
    """
    with contextlib.ExitStack() as stack:
        database = _enter_engine(stack, log, layout, folder)
        schema = database.open_log(log)
        types = {
            of.name.removeprefix(PREFIX): of.type for of in schema if of.name.startswith(PREFIX)
        }
        files.check_types(layout, types)
        vocabularies = {name: known.vocabularies[name] for name in names} if known else {}
        for name, table in vocabularies.items():
            database.put(f"known_{name}", table)
        sizes = {f"known_{name}": len(table) for name, table in vocabularies.items()}
        query = Query(layout, types, sizes)
        if known:
            vocabulary.check_kinds(layout, types, known)
        database.run(query.statements("log.sql"))
        yield database, query


def _enter_engine(
    stack: contextlib.ExitStack, log: Log, layout: LogLayout, folder: Path
) -> Database:
    if layout.engine == "duckdb":
        columns = {of.column for of in files.wanted_columns(layout)}
        files.check_pages(log, columns, layout.processes)  # Spark checks pages itself
        opened = open_duckdb(layout.memory, layout.processes, folder, log.candidates)
        return stack.enter_context(opened)
    try:
        from kd_ranker.sources.logs.spark_engine import open_spark

        opened = open_spark(layout.spark_master, layout.spark_options, folder.resolve())
        return stack.enter_context(opened)
    except ImportError as error:
        raise UserError(
            f"data.engine={layout.engine!r} needs the package pyspark ({error}); "
            "pip install 'kd_ranker[spark]'"
        ) from error


def _source(tables: _Tables) -> Source:
    log, layout, earlier, database, query = tables
    if earlier:
        _check_new(earlier, layout, database)
    _check_splits(tables)
    counts = _count(tables)
    pieces = encode.write_ordered(database) if counts.used else []
    report = _report(tables, counts)
    kinds = vocabulary.kinds_of(layout, query.types)
    if earlier:
        _extend_report(earlier, layout, report, database)
        encoding = vocabulary.longer_encoding(earlier.encoding, database, layout, kinds)
    else:
        moments = {of.name: counts.moments(of.name) for of in layout.of(kind="dense")}
        encoding = vocabulary.new_encoding(database, layout, moments, kinds)
    items = database.fetch("SELECT * FROM item_fields ORDER BY id")
    known = earlier.dataset.items if earlier else None
    features, category = encode.item_matrix(encoding, items, known)
    before = earlier.requests if earlier else 0

    def block_of(piece: Piece) -> Block:
        of_training = piece.split == "train"
        return encode.encode_requests(layout, encoding, *piece.read(), of_training, before)

    def shards(split: str) -> list[Callable[[], Block]]:
        return [functools.partial(block_of, piece) for piece in pieces if piece.split == split]

    def write_beside(directory: Path) -> None:
        _write_report(tables, report, directory)
        vocabulary.write(encoding, log.manifest, directory)
        for split in SPLITS:
            read = (piece.read()[0] for piece in pieces if piece.split == split)
            own = [requests.select(["request", "file"]) for requests in read]
            if earlier:
                own = _all_requests(earlier, split, own, log.manifest)
            vocabulary.write_requests(own, directory, split)

    return Source(
        spec=encoding.spec,
        item_features=features,
        requests=lambda split: (
            request for shard in shards(split) for request in shard().requests()
        ),
        num_requests={of: report["splits"].get(of, {}).get("requests", 0) for of in SPLITS},
        item_category=category,
        shards=shards,
        threads=layout.processes,
        write_beside=write_beside,
    )


def _check_splits(tables: _Tables) -> None:
    """Raise UserError for times, or a column of splits, that cannot split the requests."""
    layout, database = tables.layout, tables.database
    unsplit = "SELECT count(*) FROM requests CROSS JOIN cutoffs WHERE test IS NULL"
    if layout.split == "time" and database.number(unsplit):
        raise UserError(
            f"data.split='time', but the requests of {layout.path} have less than three different "
            f"times, one a split; split by 'request' or 'user'{tables.time_hint()}"
        )
    count = "SELECT count(*) FROM bad_splits"
    if layout.split == "column" and (number := database.number(count)):
        (example,) = database.rows("SELECT min(request) AS request FROM bad_splits")
        raise UserError(
            f"data.columns.split: in column {layout.columns['split']!r}, {number:,} requests, such "
            f"as {example['request']!r}, do not have one of {', '.join(SPLITS)} in all of their "
            "rows"
        )


def _count(tables: _Tables) -> Counts:
    """Count by the tables of `report.sql`."""
    database, statements = tables.database, tables.query.statements("report.sql")
    database.run(statements)
    names = re.findall(r'^CREATE TABLE ("[^"]+"|\w+)', "\n".join(statements), re.M)
    names.remove("sampled")
    rows = {name.strip('"'): database.rows(f"SELECT * FROM {name}") for name in names}
    counts = Counts(count_rejected(database), rows, {})
    if counts.candidates != counts.used + sum(counts.rejected.values()):
        raise RuntimeError(f"{counts.candidates} candidates, {counts.used} used, {counts.rejected}")
    return counts._replace(
        leaks=findings.find_leaks(database, tables.layout) if counts.used else {}
    )


def _report(tables: _Tables, counts: Counts) -> Report:
    """Return the report on a log, and raise UserError for a log that makes no dataset."""
    layout = tables.layout
    report = data_report.make_data_report(tables.log, layout, counts, tables.some_numbers)
    found = findings.find(report, tables.time_hint)
    report["allowed"] = [finding._asdict() for finding in found if finding.name in layout.allow]
    for name, text in found:
        verdict = "Allowed" if name in layout.allow else "Refused"
        report["remarks"].append(f"{verdict}, {name}: {text}.")
    if why := _unusable(tables, counts, report, found):
        directory = Path(layout.directory) / REFUSED
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _write_report(tables, report, directory)
        rejected = ", ".join(f"{name} {number:,}" for name, number in counts.rejected.items())
        raise UserError(
            f"{layout.path}: {why}{f'; rejected were: {rejected}' if rejected else ''}; see "
            f"{directory / data_report.PAGE}"
        )
    return report


def _unusable(tables: _Tables, counts: Counts, report: Report, found: Sequence[Finding]) -> str:
    """A reason for making no dataset of a log, or ""."""
    layout = tables.layout
    if not counts.used:
        times = "".join(f"; {finding.text}" for finding in found if finding.name == "times")
        return f"not one row of the log can be used{times}"
    needed = SPLITS[1:] if tables.earlier else SPLITS
    if missing := [split for split in needed if split not in report["splits"]]:
        shares = ("validation_share", "test_share")
        by = " and ".join(f"data.{name}={getattr(layout, name)}" for name in shares)
        if layout.split == "column":
            by = f"column {layout.columns['split']!r}"
        return f"no request is left for the split {missing[0]!r}, with {by}"
    propensities = counts.row("propensities")
    if bad := propensities.get("bad"):
        return (
            f"data.columns.propensity: {bad:,} of {propensities['shown']:,} values of column "
            f"{layout.columns['propensity']!r} on shown candidates are not in (0, 1], such as "
            f"{propensities['least']:g}"
        )
    faults: dict[str, int] = {
        "rejected candidates": report["candidates"]["rejected"],
        "invalid values": sum(column["out_of_range"] for column in report["columns"]),
        "candidates of another teacher version": report["teacher"]["other_version"],
        "requests of several times": report["requests"]["several_times"],
    }
    if layout.strict and any(faults.values()):
        counted = ", ".join(f"{number:,} {what}" for what, number in faults.items() if number)
        return f"data.strict=True, and the log has faults: {counted}"
    return findings.refusal(found, layout.allow)


def _write_report(tables: _Tables, report: Report, directory: Path) -> None:
    """Write the report and the rejected rows."""
    data_report.write_data_report(report, directory)
    types, folder = tables.query.types, directory / data_report.REJECTED_FOLDER
    data_report.write_rejected(tables.database, tables.log, tables.layout, types, folder)


def _open_earlier(layout: LogLayout, dataset: Dataset) -> _Earlier:
    """Open the dataset that the new files of a log extend, or raise UserError."""
    if layout.sql or layout.engine != "duckdb":
        raise UserError(
            "data.extends takes Parquet files at data.path, and data.engine='duckdb'; leave "
            "data.extends out to make a dataset of the whole log"
        )
    directory = dataset.directory
    encoding = vocabulary.read_encoding(layout, dataset.spec, directory)
    before, now = vocabulary.read_manifest(directory), files.find_files(layout.path)[1]
    old = {file: now[file] for file in now if file in before}
    if how := files.manifest_differences(before, old):
        raise UserError(
            f"the log at {layout.path} has changed since {directory} was made of it "
            f"({how}), and only new files can be added; restore those files, {_REMEDY}"
        )
    if len(now) == len(before):
        raise UserError(f"the log at {layout.path} has no file that {directory} lacks")
    return _Earlier(dataset, encoding, before, vocabulary.read_report(directory))


def _check_new(earlier: _Earlier, layout: LogLayout, database: Database) -> None:
    """Refuse new requests that the dataset has, or that are earlier than its last one."""
    directory = earlier.dataset.directory
    read = (vocabulary.read_requests_of(directory, split) for split in SPLITS)
    known = pa.concat_tables([requests.select(["request"]) for requests in read])
    type_, (here,) = (
        known["request"].type,
        database.fetch("SELECT request FROM requests LIMIT 0").schema.types,
    )
    if here != type_:
        raise UserError(
            f"column {layout.columns['request']!r} (data.columns.request) holds ids of type {here} "
            f"in the new files, and {directory} has {type_}; give it one type, {_REMEDY}"
        )
    database.put("known_requests", known)
    repeated = "FROM requests SEMI JOIN known_requests USING (request)"
    if number := database.number(f"SELECT count(*) {repeated}"):
        (example,) = database.rows(f"SELECT min(request) AS request {repeated}")
        raise UserError(
            f"{number:,} requests of the new files, such as {example['request']!r}, are in "
            f"{directory} already; write all rows of a request to one file, {_REMEDY}"
        )
    last = max(int(of.counts.time.max()) for of in earlier.dataset.columns.values())
    if number := database.number(f"SELECT count(*) FROM requests WHERE time < {last}"):
        raise UserError(
            f"{number:,} requests of the new files are earlier than {np.datetime64(last, 's')}, "
            f"the last time in {directory}; add files in the order of time, {_REMEDY}"
        )


def _all_requests(
    earlier: _Earlier, split: str, new: Sequence[pa.Table], manifest: Mapping[str, list]
) -> list[pa.Table]:
    """Return the tables of `vocabulary.write_requests` for a split, with files of the whole log."""
    place = {file: number for number, file in enumerate(manifest)}
    old_files = [place[file] for file in earlier.files]
    new_files = [place[file] for file in manifest if file not in earlier.files]
    before = SPLITS if split == "train" else ()
    old = (vocabulary.read_requests_of(earlier.dataset.directory, of) for of in before)
    numbered = [(table, old_files) for table in old] + [(table, new_files) for table in new]
    return [
        table.set_column(1, "file", pa.array(of, pa.int32()).take(table["file"]))
        for table, of in numbered
    ]


def _extend_report(
    earlier: _Earlier, layout: LogLayout, report: Report, database: Database
) -> None:
    """Complete a report on new files by the moments and numbers of ids of the longer dataset."""
    directory = earlier.dataset.directory
    before = {feature["name"]: feature for feature in earlier.report["features"]}
    for feature, new in zip(layout.features, report["features"], strict=True):
        old = before[feature.name]
        varies = new.get("deviation") or new.get("mean", old.get("mean")) != old.get("mean")
        if feature.standardise and not old.get("deviation") and varies:
            raise UserError(
                f"data.features.{feature.key} had at most one value in {directory}, so there is no "
                f"deviation to divide new values by; leave it out, {_REMEDY}"
            )
        for moment in ("mean", "deviation"):
            new.pop(moment, None)
            new |= {moment: old[moment]} if moment in old else {}
    for name in (USER, ITEM):
        known = len(earlier.encoding.vocabularies[name])
        count = f"SELECT count(*) FROM {name}s WHERE id >= {known}"
        report["ids"][f"{name}s"] = known + database.number(count)
        report["ids"][f"{name}s_not_in_train"] = database.number(f"{count} AND train = 0")
    report["remarks"].insert(
        0,
        f"The dataset extends {directory} (requests: {earlier.requests:,}, files: "
        f"{len(earlier.files):,}); the counts here are of the new files, and the means and "
        "deviations of features are those of that dataset.",
    )
