"""A log to score: its requests in the ids and scales of a dataset that exists.

Ids, vocabularies, means and deviations are those of the dataset. The log gives the requests, their
candidates and the features of these; no column that is known only after a request is read.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from kd_ranker.batch import Items
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, write_ordered
from kd_ranker.sources.logs.rejected import count_rejected
from kd_ranker.sources.logs.source import open_engine
from kd_ranker.sources.logs.vocabulary import Settled, check_types, with_items

_READ = "read.pickle"


class Counted(NamedTuple):
    """Numbers of candidates of a log.

    Attributes:
      largest: the most candidates that a request has.
      used: the number of candidates.
      rejected: reason -> the number of rejected candidates.
      new: `user` and `item` -> the number of candidates with one that no training request has.
    """

    largest: int
    used: int
    rejected: dict[str, int]
    new: dict[str, int]


class Unseen(NamedTuple):
    """A log that was read; its rows are in a folder.

    Attributes:
      pieces: the pieces of its requests and candidates.
      counted: the numbers of its candidates.
      encoding: the rules of the dataset.
      items: features and category ids of the items of the dataset and of the log.
      item_names: the `value` and `id` of the items of the log, by id.
    """

    pieces: list[Piece]
    counted: Counted
    encoding: Encoding
    items: Items
    item_names: pa.Table


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
    """Read a log into a folder that exists, for `load_unseen`.

    Args:
      log: the log.
      layout: of the columns that are read, see `open_unseen`.
      settled: the ids and scales to read it with.
      items: features and category ids of the items of the dataset; those of items that are
        candidates in the log take their places, and new ones follow.
      folder: to write to.

    Raises:
      UserError: the log cannot be read, holds ids of another type than training, or none of its
        rows can be used.
    """
    known = {of: settled.vocabularies[of] for of in (USER, ITEM)}
    with open_engine(log, layout, folder, known) as (database, query):
        check_types(layout, query.types, settled)
        database.run(query.statements("log.sql"))
        rejected = count_rejected(database)
        if not (used := database.number("SELECT count(*) FROM used")):
            raise UserError(f"{layout.path}: not one row of the log can be used: {rejected}")
        pieces = write_ordered(database)
        logged = database.fetch("SELECT * FROM item_fields ORDER BY id")
        users = f"SELECT number FROM request_rows WHERE user_id >= {settled.trained[USER]}"
        new_items = f"SELECT value AS item FROM items WHERE id >= {settled.trained[ITEM]}"
        new = "SELECT count(*) FROM used SEMI JOIN ({}) AS new USING ({})"
        counted = Counted(
            database.number(
                "SELECT max(size) FROM (SELECT count(*) AS size FROM used GROUP BY number)"
            ),
            used=used,
            rejected=rejected,
            new={
                USER: database.number(new.format(users, "number")),
                ITEM: database.number(new.format(new_items, "item")),
            },
        )
    matrices: Any = with_items(layout, settled.encoding, items, logged)
    names = logged.select(["value", "id"])
    found = Unseen(pieces, counted, settled.encoding, Items(*matrices), names)
    (folder / _READ).write_bytes(pickle.dumps(found))


def load_unseen(folder: Path) -> Unseen:
    """Load what `read_unseen` has read into a folder."""
    return pickle.loads((folder / _READ).read_bytes())
