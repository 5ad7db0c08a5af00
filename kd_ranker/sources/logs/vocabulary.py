"""The ids of a dataset in the terms of its log: of users, items, values and requests."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_ranker.errors import UserError
from kd_ranker.requests.ragged import starts_of
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, read_piece
from kd_ranker.sources.logs.query import vocabulary_table

VOCABULARIES_FOLDER = "vocabularies"
# Beside a dataset: the files of its log, see `files.Log`.
MANIFEST = "log.json"


def find_vocabularies(
    database: Database, layout: LogLayout, known: Mapping[str, int] = MappingProxyType({})
) -> dict[str, pa.Table]:
    """Return the `value` and `id` of `user`, `item` and each `feature:<name>`, by id.

    Ids of features are numbers from 1 here. Hashed features have none, nor do the rare, unknown and
    missing values that share a feature's first category id.

    Args:
      database: with the tables of `log.sql`.
      layout: of the log.
      known: `user` and `item` -> the first new id; smaller ones are left out.
    """
    tables = {"user": "users", "item": "items"}
    tables |= {f"feature:{of.name}": vocabulary_table(of) for of in layout.vocabularies}
    return {
        name: database.fetch(
            f"SELECT value, id::INT AS id FROM {table} WHERE id >= {known.get(name, 0)} ORDER BY id"
        )
        for name, table in tables.items()
    }


def shifted(vocabulary: pa.Table, by: int) -> pa.Table:
    """Return a vocabulary with larger ids."""
    ids = pc.add(vocabulary["id"], pa.scalar(by, pa.int32()))
    return vocabulary.set_column(1, "id", ids)


def write_vocabularies(vocabularies: Mapping[str, pa.Table], folder: Path) -> None:
    """Write `user.parquet`, `item.parquet` and `feature-<name>.parquet`.

    Each has the columns `value`, as in the log, and `id`: in [0, num_users) and [0, num_items);
    that of a feature is its category id.
    """
    folder.mkdir()
    for name, table in vocabularies.items():
        pq.write_table(table, _path(folder, name))


def read_vocabulary(directory: Path, name: str) -> pa.Table:
    """The `value` and `id` of `user`, `item` or `feature:<name>`, by id, next to a dataset.

    Raises:
      UserError: it is missing.
    """
    return _read(directory, _path(directory / VOCABULARIES_FOLDER, name))


def _read(directory: Path, path: Path) -> pa.Table:
    if not path.exists():
        raise UserError(
            f"{path}, which has ids of the log, is gone; restore it, or remove {directory} and "
            "make it again with: python -m experiments.prepare_data"
        )
    # A path only would make pyarrow read a dataset of all its folder.
    with pq.ParquetFile(path) as parquet:
        return parquet.read()


def _path(folder: Path, name: str) -> Path:
    file = "".join(c if f"a{c}".isidentifier() or c in ".-" else "-" for c in name)
    return folder / f"{file}.parquet"


def requests_of_piece(folder: Path, piece: Piece) -> pa.Table:
    """Return the `request` id in the log and the number of the first `file` of each request."""
    requests, candidates = read_piece(folder, piece, ["number", "file"])
    numbers = np.bincount(candidates["number"].to_numpy() - piece.requests[0])
    file = np.minimum.reduceat(candidates["file"].to_numpy(), starts_of(numbers)[:-1])
    return pa.table({"request": requests["request"], "file": pa.array(file, pa.int32())})


def write_requests(requests: Iterable[pa.Table], directory: Path, split: str) -> None:
    """Write tables of `requests_of_piece` of a split next to its dataset, in stored order."""
    table = pa.concat_tables(requests)
    pq.write_table(table, directory / _requests_file(split), compression="zstd")


def read_requests_of(directory: Path, split: str) -> pa.Table:
    """Return what `write_requests` has written for a dataset; UserError if it is gone."""
    return _read(directory, directory / _requests_file(split))


def _requests_file(split: str) -> str:
    return f"log_requests-{split}.parquet"
