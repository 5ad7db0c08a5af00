"""A log to score, read by the ids and scales of a dataset that was trained on.

It gives requests, their candidates and the features of these. No column that is known only after a
request is read.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset
from kd_ranker.sources.logs import encode, vocabulary
from kd_ranker.sources.logs.data_report import count_rejected, read_data_report
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding, Piece
from kd_ranker.sources.logs.files import Log, open_log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.tables import open_tables


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
    fields, trained_fields = _request_fields(layout), _request_fields(trained)
    differing = [
        key for key in fields | trained_fields if fields.get(key) != trained_fields.get(key)
    ]
    if differing:
        raise UserError(
            f"the config reads a log in another way than the dataset that was trained on: "
            f"{', '.join(differing)}; leave --config out, which takes the config of training"
        )
    without_time = layout.to_score(has_time=False)
    log = open_log(without_time)
    if layout.columns["time"] not in (*log.names, *log.folder_columns.column_names):
        return log, without_time
    with_time = layout.to_score(has_time=True)
    return open_log(with_time), with_time


def _request_fields(layout: LogLayout) -> dict[str, object]:
    """Return the values of the config that decide the fields of a request.

    The names of columns do not count.
    """
    fields: dict[str, object] = {
        f"data.features.{feature.key}": {**vars(feature), "column": ""}
        for feature in layout.features
    }
    fields["tasks"] = layout.tasks
    fields["data.history_length"] = layout.history_length
    fields["data.columns.user"] = "user" in layout.columns
    return fields


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
    users_in_train = ids["users"] - ids["users_not_in_train"]
    items_in_train = ids["items"] - ids["items_not_in_train"]
    with open_tables(log, layout, folder, encoding, has_new_values=False) as tables:
        database = tables.database
        rejected = count_rejected(database)
        (candidates,) = database.rows(f"""
            SELECT count(*) AS used,
                count(*) FILTER (WHERE user_id >= {users_in_train}) AS of_new_users,
                count(*) FILTER (WHERE items.id >= {items_in_train}) AS of_new_items
            FROM used JOIN request_rows USING (number) JOIN items USING (item)""")
        if not candidates["used"]:
            reasons = ", ".join(f"{name} {number:,}" for name, number in rejected.items())
            raise UserError(
                f"{layout.path}: not one row of the log can be used; rejected were: {reasons}; see "
                "docs/own_logs.md for what a row needs"
            )
        pieces = encode.write_ordered(database)
        items_of_log = database.fetch("SELECT * FROM item_fields ORDER BY id")
        largest = database.number(
            "SELECT max(size) FROM (SELECT count(*) AS size FROM used GROUP BY number)"
        )
    features, category = encode.item_matrix(encoding, items_of_log, dataset.items)
    return Unseen(
        pieces=pieces,
        encoding=encoding,
        largest=largest,
        items=Items(features, category),  # type: ignore[arg-type]
        item_names=items_of_log.select(["value", "id"]),
        counts={
            "used": candidates["used"],
            "rejected": rejected,
            "new": {USER: candidates["of_new_users"], ITEM: candidates["of_new_items"]},
        },
    )
