"""A log to score: its requests in the ids and scales of a dataset.

The log gives the requests, their candidates and the features of these. No column that is known only
after a request is read.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.logs import files, vocabulary
from kd_ranker.sources.logs.data_report import count_rejected
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding, Piece, item_matrix, write_ordered
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.source import open_tables


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
    features = {
        f"data.features.{feature.key}": vars(feature) | {"column": ""}
        for feature in layout.features
    }
    return features | {
        "tasks": layout.tasks,
        "data.history_length": layout.history_length,
        "data.columns.user": "user" in layout.columns,
    }


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
    ids = vocabulary.read_report(dataset.directory)["ids"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open_tables(log, layout, folder, encoding, [USER, ITEM]) as (database, _):

        def new(query: str, by: str, of: str) -> int:
            # Ids that training requests have come first.
            known = ids[f"{of}s"] - ids[f"{of}s_not_in_train"]
            unknown = f"({query} >= {known}) AS unknown USING ({by})"
            return database.number(f"SELECT count(*) FROM used SEMI JOIN {unknown}")

        counts = {
            "used": database.number("SELECT count(*) FROM used"),
            "rejected": count_rejected(database),
            "new": {
                USER: new("SELECT number FROM request_rows WHERE user_id", "number", USER),
                ITEM: new("SELECT value AS item FROM items WHERE id", "item", ITEM),
            },
        }
        if not counts["used"]:
            raise UserError(
                f"{layout.path}: not one row of the log can be used: {counts['rejected']}"
            )
        pieces = write_ordered(database)
        logged = database.fetch("SELECT * FROM item_fields ORDER BY id")
        largest = database.number(
            "SELECT max(size) FROM (SELECT count(*) AS size FROM used GROUP BY number)"
        )
    items = Items(*item_matrix(encoding, logged, dataset.items))  # type: ignore[arg-type]
    return Unseen(pieces, encoding, largest, items, logged.select(["value", "id"]), counts)
