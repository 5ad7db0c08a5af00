"""A log that has grown by files: its new requests follow those of a dataset of its older files.

Only the new files are read, by the ids, vocabularies, means and deviations of that dataset. Users,
items and values that are new get the ids after those. Requests of the dataset stay as they are.

Only the new requests are split: the last of them are the test. All requests of the dataset are for
training.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import files, vocabulary
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.query import quoted

_REMEDY = "or make a dataset of the whole log: leave data.extends out"


class Earlier(NamedTuple):
    """A dataset that was made of the older files of a log, and the files next to it."""

    dataset: Dataset
    encoding: Encoding
    files: dict[str, list]
    report: Report

    @property
    def requests(self) -> int:
        """The number of its requests."""
        return sum(map(len, self.dataset.columns.values()))


def open_earlier(layout: LogLayout, dataset: Dataset) -> Earlier:
    """Open the dataset that the new files of a log extend.

    Raises:
      UserError: the log is not in Parquet files that DuckDB reads, an older file has changed or is
        gone, no file is new, or files next to the dataset are gone.
    """
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
    return Earlier(dataset, encoding, before, vocabulary.read_report(directory))


def check_requests(earlier: Earlier, database: Database) -> None:
    """Check that new requests can follow those of the dataset.

    Raises:
      UserError: the dataset has one of them, or one is earlier than the last of the dataset.
    """
    directory = earlier.dataset.directory
    known = [vocabulary.read_requests_of(directory, split).select(["request"]) for split in SPLITS]
    database.put("known_requests", pa.concat_tables(known))
    again = "FROM requests SEMI JOIN known_requests USING (request)"
    if number := database.number(f"SELECT count(*) {again}"):
        (example,) = database.rows(f"SELECT min(request) AS request {again}")
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


def all_requests(
    earlier: Earlier, split: str, new: Sequence[pa.Table], manifest: Mapping[str, list]
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


def extend_report(earlier: Earlier, layout: LogLayout, report: Report, database: Database) -> None:
    """Complete a report on the new files by the numbers that hold for the longer dataset.

    Those are the moments of features and the numbers of ids; all other counts are of the new files.

    Raises:
      UserError: a feature to standardize had at most one value before, and others now.
    """
    before = {feature["name"]: feature for feature in earlier.report["features"]}
    for feature, new in zip(layout.features, report["features"], strict=True):
        old = before[feature.name]
        varies = new.get("deviation") or new.get("mean", old.get("mean")) != old.get("mean")
        if feature.standardise and not old.get("deviation") and varies:
            raise UserError(
                f"data.features.{feature.key} had at most one value in {earlier.dataset.directory},"
                f" so there is no deviation to divide new values by; leave it out, {_REMEDY}"
            )
        moments = ("mean", "deviation")
        kept = {name: of for name, of in new.items() if name not in moments}
        new.clear()
        new.update(kept | {name: old[name] for name in moments if name in old})
    for name in (USER, ITEM):
        known, table = len(earlier.encoding.vocabularies[name]), quoted(f"{name}s")
        count = f"SELECT count(*) FROM {table} WHERE id >= {known}"
        report["ids"][f"{name}s"] = known + database.number(count)
        report["ids"][f"{name}s_not_in_train"] = database.number(f"{count} AND train = 0")
    report["remarks"].insert(
        0,
        f"The dataset extends {earlier.dataset.directory} (requests: {earlier.requests:,}, files: "
        f"{len(earlier.files):,}); the counts here are of the new files, and the means and "
        "deviations of features are those of that dataset.",
    )
