"""`data.name = "parquet"`: from a log to requests, and the files next to their dataset.

Of a log that has grown by files, `data.extends` reads the new files only, by the ids, vocabularies,
means and deviations of a dataset of the older ones. New users, items and values get the ids after
those. Requests of that dataset stay as they are, and are all for training. Only the new requests
are split; the last of them are the test.

A log to score (`open_unseen`) gives requests, their candidates and the features of these. No column
that is known only after a request is read.
"""

import contextlib
import dataclasses
import functools
import itertools
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float64
from ml_collections import ConfigDict

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.requests.lock import hold_work, remove_leftovers
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, Block, Source
from kd_ranker.sources.logs import data_report, encode, files, findings, vocabulary
from kd_ranker.sources.logs.data_report import Counts, Report, count_rejected, read_data_report
from kd_ranker.sources.logs.database import Database, open_duckdb
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding, Piece
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.findings import Finding
from kd_ranker.sources.logs.layout import LogLayout, read_layout, sql_of
from kd_ranker.sources.logs.query import PREFIX, Query

# Folder below `data.dir` for the report of a log that makes no dataset.
REFUSED = "refused_log"
# The beginning of the name of a hidden folder there, for the tables of a log that is read.
_WORK = ".parquet-"
# Numbers of a column that are enough to guess what they are.
_SOME_NUMBERS = 1000
_REMEDY = "or make a dataset of the whole log: leave data.extends out"


class _Earlier(NamedTuple):
    """A dataset of older files of a log, with the files next to it; empty for a whole log."""

    directory: Path = Path()
    encoding: Encoding | None = None
    files: Mapping[str, list] = {}
    report: Report = {}
    items: Items | None = None
    requests: int = 0
    last: int = 0  # the time of the last request


class Tables(NamedTuple):
    """A log in an engine, with the tables of `log.sql`."""

    log: Log
    layout: LogLayout
    database: Database
    query: Query

    def some_numbers(self, column: str) -> Float64[np.ndarray, "n"]:
        """Some finite numbers of a column; none of one that holds something else."""
        if not self.query.is_number(column):
            return np.zeros(0)
        number = self.query.number(column)
        numbers = self.database.fetch(
            f"SELECT {number} AS number FROM unfolded WHERE {number} IS NOT NULL "
            f'ORDER BY file, "row" LIMIT {_SOME_NUMBERS}'
        )["number"].to_numpy()
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
    earlier = _open_earlier(layout, extended) if extended else _Earlier()
    log = files.open_log(layout, earlier.files)
    directory = Path(layout.directory)
    remove_leftovers(directory, f"{_WORK}*")
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(hold_work(directory / f"{_WORK}{uuid.uuid4().hex[:12]}"))
        opened = open_tables(log, layout, work, earlier.encoding)
        source = _source(stack.enter_context(opened), earlier)
        # From here on, the source closes all of it.
        return dataclasses.replace(source, close=stack.pop_all().close)


def check_unchanged(data: ConfigDict, directory: Path) -> None:
    """Raise UserError if a log has changed since `directory` was made of it; it may be missing."""
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
    has_new_values: bool = True,
) -> Iterator[Tables]:
    """Read a log into the tables of `log.sql`, in the engine that the config names.

    New ids follow those that are `known` in a dataset, `has_new_values` also of features. Tables
    that do not fit in memory go to `folder`.

    Raises:
      UserError: a file is damaged, a column has a type that does not fit its use, the engine is not
        installed or does not start, or the log has ids of another type than `known`.
    """
    with contextlib.ExitStack() as stack:
        database = _enter_engine(stack, log, layout, folder)
        database.open_log(log)
        schema = database.fetch("FROM log LIMIT 0").schema
        logged = (of for of in schema if of.name.startswith(PREFIX))
        types = {of.name.removeprefix(PREFIX): of.type for of in logged}
        files.check_types(layout, types)
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
        columns = {of.column for of in files.wanted_columns(layout)}
        files.check_pages(log, columns, layout.processes)  # Spark checks pages itself
        return stack.enter_context(open_duckdb(layout.memory, layout.processes, folder, log.size))
    try:
        from kd_ranker.sources.logs.spark_engine import open_spark

        opened = open_spark(layout.spark_master, layout.spark_options, folder.resolve())
        return stack.enter_context(opened)
    except ImportError as error:
        raise UserError(
            f"data.engine={layout.engine!r} needs the package pyspark ({error}); "
            "pip install 'kd_ranker[spark]'"
        ) from error


def _source(tables: Tables, earlier: _Earlier) -> Source:
    log, layout, database, query = tables
    if earlier.encoding:
        _check_new(earlier, layout, database)
    counts = _count(tables)
    pieces = encode.write_ordered(database) if counts.used else []
    report = _report(tables, counts, SPLITS[1:] if earlier.encoding else SPLITS)
    moments = {of.name: counts.moments(of.name) for of in layout.of(kind="dense")}
    kinds = vocabulary.kinds_of(layout, query.types)
    encoding = vocabulary.encoding_of(database, layout, kinds, moments, earlier.encoding)
    if earlier.encoding:
        _extend_report(earlier, encoding, tables, report)
    items = database.fetch("SELECT * FROM item_fields ORDER BY id")
    features, category = encode.item_matrix(encoding, items, earlier.items)

    # Requests have the ids of their users already, and other machines need not hold those.
    others = {name: of for name, of in encoding.vocabularies.items() if name != USER}
    to_encode = dataclasses.replace(encoding, vocabularies=others)

    def shards(split: str) -> list[Callable[[], Block]]:
        return [
            functools.partial(encode.encode_requests, layout, to_encode, piece, earlier.requests)
            for piece in pieces
            if piece.split == split
        ]

    def write_beside(directory: Path) -> None:
        _write_report(tables, report, directory)
        vocabulary.write(encoding, log.manifest, directory)
        for split in SPLITS:
            before = (
                (vocabulary.read_requests_of(earlier.directory, of), earlier.files)
                for of in SPLITS
                if earlier.encoding and split == "train"
            )
            own = log.files or [files.SQL]
            new = ((piece.requests(), own) for piece in pieces if piece.split == split)
            requests = itertools.chain(before, new)
            vocabulary.write_requests(requests, log.manifest, directory, split)

    return Source(
        spec=encoding.spec,
        item_features=features,
        requests=lambda split: (
            request for shard in shards(split) for request in shard().requests()
        ),
        num_requests={of: report["splits"].get(of, {}).get("requests", 0) for of in SPLITS},
        item_category=category,
        shards=shards,
        map=database.map,
        write_beside=write_beside,
    )


def _count(tables: Tables) -> Counts:
    """Count by the tables of `report.sql`; UserError for requests without one valid split."""
    layout, database = tables.layout, tables.database
    if layout.split == "column":
        bad, example = database.rows("SELECT count(*), min(request) FROM bad_splits")[0].values()
        if bad:
            raise UserError(
                f"data.columns.split: in column {layout.columns['split']!r}, {bad:,} requests, "
                f"such as {example!r}, do not have one of {', '.join(SPLITS)} in all of their rows"
            )
    statements = tables.query.statements("report.sql")
    database.run(statements)
    names = re.findall(r'^CREATE TABLE ("[^"]+"|\w+)', "\n".join(statements), re.M)
    names.remove("sampled")
    rows = {name.strip('"'): database.rows(f"SELECT * FROM {name}") for name in names}
    counts = Counts(count_rejected(database), rows, {})
    if counts.candidates != counts.used + sum(counts.rejected.values()):
        raise RuntimeError(f"{counts.candidates} candidates, {counts.used} used, {counts.rejected}")
    return counts._replace(leaks=findings.find_leaks(database, layout) if counts.used else {})


def _report(tables: Tables, counts: Counts, splits: Sequence[str]) -> Report:
    """Return the report on a log; UserError for one that makes no dataset with these splits."""
    layout = tables.layout
    report = data_report.make_data_report(tables.log, layout, counts, tables.some_numbers)
    found = findings.find(report, tables.time_hint)
    report["allowed"] = [finding._asdict() for finding in found if finding.name in layout.allow]
    for name, text in found:
        verdict = "Allowed" if name in layout.allow else "Refused"
        report["remarks"].append(f"{verdict}, {name}: {text}.")
    if why := _unusable(layout, counts, report, found, splits):
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


def _unusable(
    layout: LogLayout,
    counts: Counts,
    report: Report,
    found: Sequence[Finding],
    splits: Sequence[str],
) -> str:
    """A reason for making no dataset of a log, or ""."""
    times = "".join(f"; {finding.text}" for finding in found if finding.name == "times")
    if not counts.used:
        return f"not one row of the log can be used{times}"
    if missing := [split for split in splits if split not in report["splits"]]:
        by = (
            f"data.validation_share={layout.validation_share} and data.test_share="
            f"{layout.test_share}"
        )
        if layout.split == "column":
            by = f"column {layout.columns['split']!r}"
        elif layout.split == "time":
            by += f"; each split needs another time: or split by 'request' or 'user'{times}"
        split = f"the split {missing[0]!r} by data.split={layout.split!r}"
        return f"no request is left for {split} with {by}"
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


def _write_report(tables: Tables, report: Report, directory: Path) -> None:
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
    columns = dataset.columns.values()
    return _Earlier(
        directory,
        encoding,
        before,
        read_data_report(directory) or {},
        dataset.items,
        sum(map(len, columns)),
        max(int(of.counts.time.max()) for of in columns),
    )


def _check_new(earlier: _Earlier, layout: LogLayout, database: Database) -> None:
    """Refuse new requests that the dataset has, or that are earlier than its last one."""
    directory = earlier.directory
    known = pa.concat_tables(
        vocabulary.read_requests_of(directory, split).select(["request"]) for split in SPLITS
    )
    type_ = known["request"].type
    here = database.fetch("SELECT request FROM requests LIMIT 0")["request"].type
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
    early = f"SELECT count(*) FROM requests WHERE time < {earlier.last}"
    if number := database.number(early):
        raise UserError(
            f"{number:,} requests of the new files are earlier than "
            f"{np.datetime64(earlier.last, 's')}, the last time in {directory}; add files in the "
            f"order of time, {_REMEDY}"
        )


def _extend_report(earlier: _Earlier, encoding: Encoding, tables: Tables, report: Report) -> None:
    """Complete a report on new files by the moments and numbers of ids of the longer dataset."""
    before = {feature["name"]: feature for feature in earlier.report["features"]}
    for feature, new in zip(tables.layout.features, report["features"], strict=True):
        old = before[feature.name]
        varies = new.get("deviation") or new.get("mean", old.get("mean")) != old.get("mean")
        if feature.standardize and not old.get("deviation") and varies:
            raise UserError(
                f"data.features.{feature.key} had at most one value in {earlier.directory}, so "
                f"there is no deviation to divide new values by; leave it out, {_REMEDY}"
            )
        for moment in ("mean", "deviation"):
            new.pop(moment, None)
            new |= {moment: old[moment]} if moment in old else {}
    known = earlier.encoding.vocabularies if earlier.encoding else {}
    for name in (USER, ITEM):
        unknown = f"SELECT count(*) FROM {name}s WHERE id >= {len(known[name])} AND train = 0"
        report["ids"][f"{name}s"] = len(encoding.vocabularies[name])
        report["ids"][f"{name}s_not_in_train"] = tables.database.number(unknown)
    report["remarks"].insert(
        0,
        f"The dataset extends {earlier.directory} (requests: {earlier.requests:,}, files: "
        f"{len(earlier.files):,}); the counts here are of the new files, and the means and "
        "deviations of features are those of that dataset.",
    )


class Unseen(NamedTuple):
    """A log that was read by the `encoding` of a dataset."""

    pieces: list[Piece]  # in the order of the files of the log
    encoding: Encoding
    largest: int  # the most candidates that a request has
    items: Items  # of the dataset and of the log
    item_names: pa.Table  # the `value` and `id` of the items of the log, by id
    # Of candidates: `used`, `rejected` by reason, and by `user` and `item` the `new` ones, of users
    # and items that no training request has.
    counts: dict[str, Any]


def open_unseen(layout: LogLayout, trained: LogLayout) -> tuple[Log, LogLayout]:
    """Find a log to score, and the layout of the columns that are read; footers only.

    Raises:
      UserError: the layout has other features or tasks than that of training, or the log lacks a
        column.
    """
    here, there = _fields(layout), _fields(trained)
    if differing := [key for key in here | there if here.get(key) != there.get(key)]:
        raise UserError(
            f"the config reads a log in another way than the dataset that was trained on: "
            f"{', '.join(differing)}; leave --config out, which takes the config of training"
        )
    log = files.open_log(to_score := layout.to_score(has_time=False))
    if layout.columns["time"] in (*log.names, *log.given.column_names):
        log = files.open_log(to_score := layout.to_score(has_time=True))
    return log, to_score


def _fields(layout: LogLayout) -> dict[str, object]:
    """The keys that decide the fields of a request, whatever the names of columns."""
    features = {f"data.features.{of.key}": vars(of) | {"column": ""} for of in layout.features}
    others = {"tasks": layout.tasks, "data.history_length": layout.history_length}
    return {**features, **others, "data.columns.user": "user" in layout.columns}


def read_unseen(
    log: Log, layout: LogLayout, trained: LogLayout, dataset: Dataset, folder: Path
) -> Unseen:
    """Read a log of `open_unseen` by the ids and scales of a dataset that was `trained` on.

    The log gives new features to the items of the dataset that are candidates in it. New items get
    the ids after those. The content of `folder` is replaced.

    Raises:
      UserError: the log cannot be read, a column has a type that does not fit its use, or holds ids
        of another type than training, or none of its rows can be used; or files next to the dataset
        are gone.
    """
    encoding = vocabulary.read_encoding(trained, dataset.spec, dataset.directory)
    ids = (read_data_report(dataset.directory) or {})["ids"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Ids that training requests have come first.
    known = {of: ids[f"{of}s"] - ids[f"{of}s_not_in_train"] for of in (USER, ITEM)}
    with open_tables(log, layout, folder, encoding, has_new_values=False) as tables:
        database, rejected = tables.database, count_rejected(tables.database)
        used, *new = database.rows(f"""
            SELECT count(*) AS used, count(*) FILTER (WHERE user_id >= {known[USER]}) AS by_user,
                count(*) FILTER (WHERE items.id >= {known[ITEM]}) AS by_item
            FROM used JOIN request_rows USING (number) JOIN items USING (item)""")[0].values()
        if not used:
            raise UserError(f"{layout.path}: not one row of the log can be used: {rejected}")
        pieces = encode.write_ordered(database)
        logged = database.fetch("SELECT * FROM item_fields ORDER BY id")
        largest = database.number(
            "SELECT max(size) FROM (SELECT count(*) AS size FROM used GROUP BY number)"
        )
    counts = {"used": used, "rejected": rejected, "new": dict(zip(known, new, strict=True))}
    items = Items(*encode.item_matrix(encoding, logged, dataset.items))  # type: ignore[arg-type]
    return Unseen(pieces, encoding, largest, items, logged.select(["value", "id"]), counts)
