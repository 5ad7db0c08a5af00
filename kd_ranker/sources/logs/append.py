"""A log that has grown by files: its new requests follow those of a dataset of its older files.

Only the new files are read, by the ids, vocabularies, means and deviations of that dataset. Users,
items and values that are new get the ids after those. Requests of the dataset stay as they are.

Only the new requests are split: the last of them are the test. All requests of the dataset are for
training.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding, encoding_of
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.query import quoted
from kd_ranker.sources.logs.vocabulary import (
    Settled,
    find_vocabularies,
    read_manifest,
    read_requests_of,
    settled_by,
    shifted,
)

_REMEDY = "or make a dataset of the whole log: leave data.extends out"


class Earlier(NamedTuple):
    """A dataset that was made of the older files of a log.

    Attributes:
      dataset: the dataset.
      settled: its ids, vocabularies and scales.
      files: the manifest of its log.
    """

    dataset: Dataset
    settled: Settled
    files: dict[str, list]

    @property
    def requests(self) -> int:
        """The number of its requests."""
        return sum(map(len, self.dataset.columns.values()))

    def known(self, name: str) -> int:
        """The number of entries of a vocabulary."""
        return len(self.settled.vocabularies[name])


def open_earlier(layout: LogLayout, dataset: Dataset) -> Earlier:
    """Open the dataset that the new files of a log extend.

    Args:
      layout: of the log.
      dataset: made of its older files, by the same config.

    Raises:
      UserError: the log is not in Parquet files that DuckDB reads, an older file has changed or is
        gone, no file is new, or files next to the dataset are gone.
    """
    if layout.sql or layout.engine != "duckdb":
        raise UserError(
            "data.extends takes Parquet files at data.path, and data.engine='duckdb'; leave "
            "data.extends out to make a dataset of the whole log"
        )
    settled = settled_by(layout, dataset.spec, dataset.directory)
    before, now = read_manifest(dataset.directory), files.find_files(layout.path)[1]
    old = {file: now[file] for file in now if file in before}
    if how := files.manifest_differences(before, old):
        raise UserError(
            f"the log at {layout.path} has changed since {dataset.directory} was made of it "
            f"({how}), and only new files can be added; restore those files, {_REMEDY}"
        )
    if len(now) == len(before):
        raise UserError(f"the log at {layout.path} has no file that {dataset.directory} lacks")
    return Earlier(dataset, settled, before)


def check_requests(earlier: Earlier, database: Database) -> None:
    """Check that new requests can follow those of the dataset.

    Raises:
      UserError: the dataset has one of them, or one is earlier than the last of the dataset.
    """
    directory = earlier.dataset.directory
    known = [read_requests_of(directory, split).select(["request"]) for split in SPLITS]
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


def check_scales(
    earlier: Earlier, layout: LogLayout, moments: Mapping[str, Mapping[str, float]]
) -> None:
    """Raise UserError for a feature to standardize that has values of one kind before only.

    Args:
      earlier: the dataset.
      layout: of the log.
      moments: feature -> mean and deviation in the new training requests, if it has values.
    """
    for feature in layout.of_kind("dense"):
        before, new = earlier.settled.moments[feature.name], moments[feature.name]
        varies = new.get("deviation") or (new and new["mean"] != before.get("mean"))
        if feature.standardise and not before.get("deviation") and varies:
            raise UserError(
                f"data.features.{feature.key} had at most one value in {earlier.dataset.directory},"
                f" so there is no deviation to divide new values by; leave it out, {_REMEDY}"
            )


def extend(
    earlier: Earlier, layout: LogLayout, database: Database
) -> tuple[Encoding, dict[str, pa.Table]]:
    """Return the encoding and the vocabularies of the longer dataset.

    Args:
      earlier: the dataset.
      layout: of the log.
      database: with the tables of the new files.
    """
    found = find_vocabularies(database, layout, {of: earlier.known(of) for of in (USER, ITEM)})
    spec, vocabularies = earlier.dataset.spec, {}
    last = spec.num_categories
    for name, known in earlier.settled.vocabularies.items():
        new = found[name]
        if name not in (USER, ITEM):
            new, last = shifted(new, last - 1), last + len(new)
        # An empty vocabulary does not know the type of its values.
        schema = known.schema if len(known) else new.schema
        vocabularies[name] = pa.concat_tables([known.cast(schema), new.cast(schema)])
    longer = dataclasses.replace(
        spec,
        num_users=len(vocabularies[USER]),
        num_items=len(vocabularies[ITEM]),
        later_categories=spec.later_categories + last - spec.num_categories,
    )
    return encoding_of(layout, longer, vocabularies, earlier.settled.moments), vocabularies


def all_requests(
    earlier: Earlier, split: str, new: Sequence[pa.Table], manifest: Mapping[str, Any]
) -> list[pa.Table]:
    """Return the tables of `vocabulary.write_requests` for a split, with files of the whole log.

    Args:
      earlier: the dataset.
      split: one of `SPLITS`.
      new: the tables of the new requests, by the numbers of the new files.
      manifest: of the whole log.
    """
    place = {file: number for number, file in enumerate(manifest)}
    old_files = np.array([place[file] for file in earlier.files], np.int32)
    new_files = np.array([place[of] for of in manifest if of not in earlier.files], np.int32)
    before = SPLITS if split == "train" else ()
    old = (read_requests_of(earlier.dataset.directory, of) for of in before)
    numbered = [(table, old_files) for table in old] + [(table, new_files) for table in new]
    return [
        table.set_column(1, "file", pa.array(of[table["file"].to_numpy()]))
        for table, of in numbered
    ]


def extend_report(earlier: Earlier, report: Report, database: Database) -> None:
    """Complete a report on the new files by the numbers that hold for the longer dataset.

    Those are the moments of features and the numbers of ids; all other counts are of the new files.
    """
    moments = earlier.settled.moments
    for feature in report["features"]:
        for name in ("mean", "deviation"):
            feature.pop(name, None)
            if name in moments[feature["name"]]:
                feature[name] = moments[feature["name"]][name]
    for name in (USER, ITEM):
        known, table = earlier.known(name), quoted(f"{name}s")
        count = f"SELECT count(*) FROM {table} WHERE id >= {known}"
        report["ids"][f"{name}s"] = known + database.number(count)
        report["ids"][f"{name}s_not_in_train"] = database.number(f"{count} AND train = 0")
    directory = earlier.dataset.directory
    report["remarks"].insert(
        0,
        f"The dataset extends {directory} (requests: {earlier.requests:,}, files: "
        f"{len(earlier.files):,}); the counts here are of the new files, and the means and "
        "deviations of features are those of that dataset.",
    )
