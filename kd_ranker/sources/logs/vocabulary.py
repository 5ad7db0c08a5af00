"""The ids of a dataset in the terms of its log: of users, items, values and requests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.batch import FeatureSpec
from kd_ranker.errors import UserError
from kd_ranker.requests.ragged import starts_of
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, read_piece
from kd_ranker.sources.logs.query import vocabulary_table

VOCABULARIES_FOLDER = "vocabularies"


def write_vocabularies(
    database: Database, layout: LogLayout, spec: FeatureSpec, folder: Path
) -> None:
    """Write `user.parquet`, `item.parquet` and `feature-<name>.parquet`.

    Each has the columns `value`, as in the log, and `id`: in [0, num_users) and [0, num_items);
    that of a feature is its category id. Hashed features have no file, nor is there an entry for
    the values that share a feature's first category id: rare, unknown and missing ones.
    """
    folder.mkdir()
    starts = category_starts(spec)
    tables = {"user": ("users", 0), "item": ("items", 0)}
    for of in layout.vocabularies:
        tables[f"feature:{of.name}"] = (vocabulary_table(of), starts[of.name])
    for name, (table, start) in tables.items():
        query = f"SELECT value, (id + {start})::INT AS id FROM {table} WHERE id >= 0 ORDER BY id"
        pq.write_table(database.fetch(query), _path(folder, name))


def category_starts(spec: FeatureSpec) -> dict[str, int]:
    """Categorical feature -> its first category id."""
    names = (category.name for category in spec.categories)
    return dict(zip(names, spec.category_starts, strict=True))


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


def write_requests(folder: Path, pieces: Iterable[Piece], directory: Path, split: str) -> None:
    """Write `requests_of_piece` of a split next to its dataset, in stored order."""
    tables = [requests_of_piece(folder, piece) for piece in pieces]
    pq.write_table(pa.concat_tables(tables), directory / _requests_file(split), compression="zstd")


def read_requests_of(directory: Path, split: str) -> pa.Table:
    """Return what `write_requests` has written for a dataset; UserError if it is gone."""
    return _read(directory, directory / _requests_file(split))


def _requests_file(split: str) -> str:
    return f"log_requests-{split}.parquet"
