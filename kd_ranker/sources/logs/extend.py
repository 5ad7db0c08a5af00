"""A log that has grown by files, which `data.extends` adds to the dataset of the older ones.

Only the new files are read, by the ids, vocabularies, means and deviations of that dataset. New
users, items and values get the ids after those. The requests of that dataset stay as they are, and
are all for training. Only the new requests are split; the last of them are the test.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import vocabulary
from kd_ranker.sources.logs.data_report import Report, read_data_report
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.files import Manifest, find_files, manifest_differences
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.tables import Tables

_REMEDY = "or leave data.extends out to read the whole log"


@dataclasses.dataclass(frozen=True)
class EarlierDataset:
    """A dataset of older files of a log, with the files next to it."""

    directory: Path
    encoding: Encoding
    files: Manifest  # of the log that it was made of
    report: Report
    items: Items
    num_requests: int
    last_time: int  # of a request


def open_earlier(layout: LogLayout, dataset: Dataset) -> EarlierDataset:
    """Open the dataset that the new files of a log extend.

    Raises:
      UserError: the log is not one of Parquet files in DuckDB, has no new file, or has older files
        that have changed.
    """
    if layout.sql or layout.engine != "duckdb":
        raise UserError(
            "data.extends takes Parquet files at data.path, and data.engine='duckdb'; leave "
            "data.extends out to make a dataset of the whole log"
        )
    directory = dataset.directory
    encoding = vocabulary.read_encoding(layout, dataset.spec, directory)
    before = vocabulary.read_manifest(directory)
    now = find_files(layout.path).manifest
    old_files_now = {file: now[file] for file in now if file in before}
    if differences := manifest_differences(before, old_files_now):
        raise UserError(
            f"the log at {layout.path} has changed since {directory} was made of it "
            f"({differences}); restore those files, {_REMEDY}"
        )
    if len(now) == len(before):
        raise UserError(
            f"the log at {layout.path} has no file that {directory} lacks; add the new files, or "
            "leave data.extends out"
        )
    splits = dataset.columns.values()
    return EarlierDataset(
        directory=directory,
        encoding=encoding,
        files=before,
        report=read_data_report(directory) or {},
        items=dataset.items,
        num_requests=sum(len(columns) for columns in splits),
        last_time=max(int(columns.counts.time.max()) for columns in splits),
    )


def check_new_requests(earlier: EarlierDataset, tables: Tables) -> None:
    """Refuse new requests that the dataset has, or that are earlier than its last one."""
    layout, database, directory = tables.layout, tables.database, earlier.directory
    known = pa.concat_tables(
        vocabulary.read_requests_of(directory, split).select(["request"]) for split in SPLITS
    )
    known_type = known["request"].type
    new_type = database.fetch("SELECT request FROM requests LIMIT 0")["request"].type
    if new_type != known_type:
        raise UserError(
            f"column {layout.columns['request']!r} (data.columns.request) holds ids of type "
            f"{new_type} in the new files, and {directory} has {known_type}; give it one type, "
            f"{_REMEDY}"
        )
    database.put("known_requests", known)
    repeated = "FROM requests SEMI JOIN known_requests USING (request)"
    if number := database.number(f"SELECT count(*) {repeated}"):
        (example,) = database.rows(f"SELECT min(request) AS request {repeated}")
        raise UserError(
            f"{number:,} requests of the new files, such as {example['request']!r}, are in "
            f"{directory} already; write all rows of a request to one file, {_REMEDY}"
        )
    too_early = f"SELECT count(*) FROM requests WHERE time < {earlier.last_time}"
    if number := database.number(too_early):
        raise UserError(
            f"{number:,} requests of the new files are earlier than "
            f"{np.datetime64(earlier.last_time, 's')}, the last time in {directory}; add files in "
            f"the order of time, {_REMEDY}"
        )


def extend_report(
    earlier: EarlierDataset, encoding: Encoding, tables: Tables, report: Report
) -> None:
    """Complete a report on new files by the moments and numbers of ids of the longer dataset.

    Raises:
      UserError: a feature that is to be standardized varies for the first time.
    """
    _take_moments(earlier, tables.layout, report)
    for name in (USER, ITEM):
        first_new = len(earlier.encoding.vocabularies[name])
        unknown = f"SELECT count(*) FROM {name}s WHERE id >= {first_new} AND train = 0"
        report["ids"][f"{name}s"] = len(encoding.vocabularies[name])
        report["ids"][f"{name}s_not_in_train"] = tables.database.number(unknown)
    report["remarks"].insert(
        0,
        f"The dataset extends {earlier.directory} (requests: {earlier.num_requests:,}, files: "
        f"{len(earlier.files):,}); the counts here are of the new files, and the means and "
        "deviations of features are those of that dataset.",
    )


def _take_moments(earlier: EarlierDataset, layout: LogLayout, report: Report) -> None:
    """Replace the moments of features in a report by those of the earlier dataset."""
    old_features = {feature["name"]: feature for feature in earlier.report["features"]}
    for feature, new in zip(layout.features, report["features"], strict=True):
        old = old_features[feature.name]
        has_new_mean = new.get("mean", old.get("mean")) != old.get("mean")
        varies = new.get("deviation") or has_new_mean
        if feature.standardize and not old.get("deviation") and varies:
            raise UserError(
                f"data.features.{feature.key} had at most one value in {earlier.directory}, so "
                f"there is no deviation to divide new values by; leave it out, {_REMEDY}"
            )
        for moment in ("mean", "deviation"):
            new.pop(moment, None)
            if moment in old:
                new[moment] = old[moment]
