"""A log to score: its requests in the ids and scales of a dataset that exists.

Ids, vocabularies, means and deviations are those of the dataset. The log gives the requests, their
candidates and the features of these; no column that is known only after a request is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import ITEM, USER, save_encoding
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, write_ordered
from kd_ranker.sources.logs.rejected import count_rejected
from kd_ranker.sources.logs.settled import Settled, check_types, with_items
from kd_ranker.sources.logs.source import open_engine

_ITEM_FEATURES, _ITEM_CATEGORY, _READ = "item_features.npy", "item_category.npy", "read.json"
_ITEM_NAMES = "items.parquet"


class Unseen(NamedTuple):
    """A log that was read; its rows are in a folder.

    Attributes:
      pieces: the pieces of its requests and candidates.
      largest: the most candidates that a request has.
      used: how many candidates there are.
      rejected: reason -> how many candidates it has cost; they are in no piece.
      new: `user` and `item` -> how many candidates are of one that no training request has.
    """

    pieces: list[Piece]
    largest: int
    used: int
    rejected: dict[str, int]
    new: dict[str, int]


def open_unseen(layout: LogLayout, trained: LogLayout) -> tuple[Log, LogLayout]:
    """Find a log to score and check that it has what rankers were trained on; footers only.

    Args:
      layout: of the log.
      trained: of the one that the rankers' dataset was made of.

    Returns:
      The log, and the layout of the columns that are read.

    Raises:
      UserError: the layouts have other features or tasks, or the log lacks a column, or one is of
        another type than its use admits.
    """
    _check_same(layout, trained)
    time = layout.columns["time"]
    log = files.open_log(to_score := layout.to_score(has_time=False))
    if time in (*log.names, *log.given.column_names):
        log = files.open_log(to_score := layout.to_score(has_time=True))
    return log, to_score


def _check_same(layout: LogLayout, trained: LogLayout) -> None:
    """Refuse a layout of other features or tasks; each column may have another name."""

    def of(layout: LogLayout) -> dict[str, object]:
        fields = {
            f"data.features.{feature.key}": vars(feature) | {"column": ""}
            for feature in layout.features
        }
        return fields | {
            "tasks": layout.tasks,
            "data.history_length": layout.history_length,
            "data.columns.user": "user" in layout.columns,
        }

    here, there = of(layout), of(trained)
    if differing := [key for key in here | there if here.get(key) != there.get(key)]:
        raise UserError(
            f"the config reads a log in another way than the dataset that was trained on: "
            f"{', '.join(differing)}; leave --config out, which takes the config of training"
        )


def read_unseen(
    log: Log,
    layout: LogLayout,
    settled: Settled,
    items: Items,
    folder: Path,
) -> None:
    """Read a log into a folder that is there, for `load_unseen`, `load_items` and encode_requests.

    Args:
      log: the log.
      layout: of the columns that are read, see `open_unseen`.
      settled: the terms to read it in.
      items: features and category ids of the items of the dataset; those of items that are
        candidates in the log take their places, and new ones follow.
      folder: to write to.

    Raises:
      UserError: the log cannot be read, holds ids of another type than training, or not one row of
        it can be used.
    """
    sizes = {f"known_{of}": len(settled.vocabularies[of]) for of in (USER, ITEM)}
    with open_engine(log, layout, folder, sizes) as (database, query):
        check_types(query, settled)
        for of in (USER, ITEM):
            database.put(f"known_{of}", settled.vocabularies[of])
        database.run(query.statements("log.sql"))
        rejected = count_rejected(database)
        if not database.number("SELECT count(*) FROM used"):
            raise UserError(f"{layout.path}: not one row of the log can be used: {rejected}")
        pieces = write_ordered(database)
        save_encoding(settled.encoding, folder / "encoding")
        logged = database.fetch("SELECT * FROM item_fields ORDER BY id")
        pq.write_table(logged.select(["value", "id"]), folder / _ITEM_NAMES)
        whole = with_items(layout, settled.encoding, items, logged)
        for file, matrix in zip((_ITEM_FEATURES, _ITEM_CATEGORY), whole, strict=True):
            np.save(folder / file, matrix)
        sizes_of = "SELECT max(size) FROM (SELECT count(*) AS size FROM used GROUP BY number) AS of"
        found = Unseen(
            pieces,
            largest=database.number(sizes_of),
            used=sum(piece.candidates for piece in pieces),
            rejected=rejected,
            new=_new(database, settled.trained),
        )
    (folder / _READ).write_text(json.dumps(found))


def load_unseen(folder: Path) -> Unseen:
    """Load what `read_unseen` has read into a folder."""
    pieces, *rest = json.loads((folder / _READ).read_text())
    return Unseen([Piece(batch, split, tuple(of), n) for batch, split, of, n in pieces], *rest)


def load_items(folder: Path) -> Items:
    """The items of the dataset and of the log that `read_unseen` has read into a folder."""
    return Items(*(np.load(folder / file) for file in (_ITEM_FEATURES, _ITEM_CATEGORY)))


def load_item_names(folder: Path) -> pa.Table:
    """The `value` and `id` of the items of the log that `read_unseen` has read, by id."""
    return pq.read_table(folder / _ITEM_NAMES)


def _new(database: Database, trained: Mapping[str, int]) -> dict[str, int]:
    """`Unseen.new`."""
    users = f"SELECT number FROM request_rows WHERE user_id >= {trained[USER]}"
    items = f"SELECT value AS item FROM items WHERE id >= {trained[ITEM]}"
    count = "SELECT count(*) FROM used SEMI JOIN ({}) AS new USING ({})"
    return {
        USER: database.number(count.format(users, "number")),
        ITEM: database.number(count.format(items, "item")),
    }
