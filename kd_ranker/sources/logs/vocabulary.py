"""The ids and scales of a dataset in the terms of its log, by which another log is read.

The ids are of users, items, values and requests.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_ranker.batch import FeatureSpec, Items
from kd_ranker.errors import UserError
from kd_ranker.requests.request import starts_of
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.data_report import JSON_FILE, read_data_report
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import (
    ITEM,
    TRANSFORMS,
    USER,
    Encoding,
    encoding_of,
    item_matrix,
    spec_of,
    transforms,
)
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


def new_encoding(
    database: Database, layout: LogLayout, moments: Mapping[str, Mapping[str, float]]
) -> tuple[Encoding, dict[str, pa.Table]]:
    """Return the encoding and the vocabularies of a log of which no dataset was made before.

    Args:
      database: with the tables of `log.sql`.
      layout: of the log.
      moments: dense feature -> its moments in training.
    """
    found = find_vocabularies(database, layout)
    spec = spec_of(layout, {name: len(table) for name, table in found.items()})
    starts = zip((of.name for of in spec.categories), spec.category_starts, strict=True)
    of_features = {f"feature:{name}": start for name, start in starts}
    vocabularies = {name: shifted(of, of_features.get(name, 0)) for name, of in found.items()}
    return encoding_of(layout, spec, vocabularies, moments), vocabularies


def write(
    layout: LogLayout,
    encoding: Encoding,
    vocabularies: Mapping[str, pa.Table],
    kinds: Mapping[str, str],
    manifest: Mapping[str, list],
    directory: Path,
) -> None:
    """Write the files next to a dataset from which `settled_by` and `read_manifest` read.

    `vocabularies/` has `user.parquet`, `item.parquet` and `feature-<name>.parquet`, with the
    columns `value`, as in the log, and `id`: in [0, num_users) and [0, num_items); that of a
    feature is its category id.

    Args:
      layout: of the log.
      encoding: its rules.
      vocabularies: all of them, by name.
      kinds: see `Settled`.
      manifest: see `files.Log`.
      directory: of the dataset.
    """
    folder = directory / VOCABULARIES_FOLDER
    folder.mkdir()
    for name, table in vocabularies.items():
        pq.write_table(table, _path(folder, name))
    rules = transforms(layout, encoding, kinds)
    (directory / TRANSFORMS).write_text(json.dumps(rules, indent=2))
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2))


def read_vocabulary(directory: Path, name: str) -> pa.Table:
    """The `value` and `id` of `user`, `item` or `feature:<name>`, by id, next to a dataset.

    Raises:
      UserError: it is missing.
    """
    return _read(directory, _path(directory / VOCABULARIES_FOLDER, name))


def _read(directory: Path, path: Path) -> pa.Table:
    # A path only would make pyarrow read a dataset of all its folder.
    with pq.ParquetFile(_found(directory, path, "which has ids of the log")) as parquet:
        return parquet.read()


def read_manifest(directory: Path) -> dict[str, list]:
    """Return the manifest of the log of a dataset, see `files.Log`; UserError if it is gone."""
    holds = "the list of files that this dataset was made of"
    return json.loads(_found(directory, directory / MANIFEST, holds).read_text())


def _found(directory: Path, path: Path, holds: str) -> Path:
    """Return the path of a file next to a dataset, and raise UserError if it is gone."""
    if path.exists():
        return path
    raise UserError(
        f"{path}, {holds}, is gone; restore it, or remove {directory} and make it again with: "
        "python -m experiments.prepare_data"
    )


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


class Settled(NamedTuple):
    """The ids, vocabularies and scales of a dataset, by which another log is read.

    Attributes:
      encoding: the rules by which values become ids and features.
      vocabularies: the `value` and `id` of users, items and categories, see `read_vocabulary`.
      moments: feature -> its entry in the data report, with the moments in training if it is dense.
      kinds: key of the config that names a column of ids or categories -> `files.kind_of` its
        values, where known.
      trained: how many of the first ids of `user` and of `item` training requests have.
    """

    encoding: Encoding
    vocabularies: Mapping[str, pa.Table]
    moments: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, str]
    trained: Mapping[str, int]


def settled_by(layout: LogLayout, spec: FeatureSpec, directory: Path) -> Settled:
    """Read the ids, vocabularies and scales of the dataset in `directory`.

    Args:
      layout: of its log.
      spec: its sizes.
      directory: its folder.

    Raises:
      UserError: files next to the dataset are gone.
    """
    _found(directory, directory / JSON_FILE, "which has the means and deviations of training")
    report = read_data_report(directory) or {}
    moments = {feature["name"]: feature for feature in report["features"]}
    names = [USER, ITEM, *(f"feature:{of.name}" for of in layout.vocabularies)]
    vocabularies = {name: read_vocabulary(directory, name) for name in names}
    encoding = encoding_of(layout, spec, vocabularies, moments)
    ids = report["ids"]
    trained = {name: ids[f"{name}s"] - ids[f"{name}s_not_in_train"] for name in (USER, ITEM)}
    path = directory / TRANSFORMS
    kinds = json.loads(path.read_text()).get("kinds", {}) if path.exists() else {}
    return Settled(encoding, vocabularies, moments, kinds, trained)


def kinds_of(layout: LogLayout, types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """Return `Settled.kinds` of a log; requests keep their own ids."""
    wanted = [of for of in files.wanted_columns(layout) if of.use == "id"]
    kinds = {
        of.key: files.kind_of(types[of.column]) for of in wanted if of.key != "data.columns.request"
    }
    return {key: kind for key, kind in kinds.items() if kind}


def check_types(layout: LogLayout, types: Mapping[str, pa.DataType], settled: Settled) -> None:
    """Refuse texts where training had whole numbers, and the reverse: none would match."""
    column_of = {of.key: of.column for of in files.wanted_columns(layout)}
    for key, here in kinds_of(layout, types).items():
        there = settled.kinds.get(key, here)
        if here != there:
            raise UserError(
                f"column {column_of[key]!r} ({key}) holds {here}, and in training it held "
                f"{there}; give it the type that it had"
            )


def with_items(
    layout: LogLayout, encoding: Encoding, items: Items, table: pa.Table
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features and category ids of the items of a dataset and of a log.

    Args:
      layout: of the log.
      encoding: its rules.
      items: those of the dataset.
      table: the fields of the items of the log; their values take the places of known ones.
    """
    places = table["id"].to_numpy()
    matrices = []
    known_items = (np.asarray(items.features), np.asarray(items.category))
    for known, logged in zip(known_items, item_matrix(layout, encoding, table), strict=True):
        whole = np.zeros((max(len(known), places.max() + 1), known.shape[1]), known.dtype)
        whole[: len(known)] = known
        whole[places] = logged
        matrices.append(whole)
    features, category = matrices
    return features, category
