"""The ids, vocabularies and scales of a dataset that exists, by which another log is read."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kd_ranker.batch import FeatureSpec, Items
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.data_report import JSON_FILE, read_data_report
from kd_ranker.sources.logs.encode import (
    ITEM,
    TRANSFORMS,
    USER,
    Encoding,
    encoding_of,
    item_matrix,
)
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.query import PREFIX, Query, kind_of
from kd_ranker.sources.logs.vocabulary import read_vocabulary


class Settled(NamedTuple):
    """The terms of a dataset that was made of a log.

    Attributes:
      encoding: the rules by which values become ids and features.
      vocabularies: the `value` and `id` of users, items and categories, see `read_vocabulary`.
      kinds: key of the config that names a column of ids or categories -> `query.kind_of` its
        values; "" where that is not known.
      trained: how many of the first ids of `user` and of `item` training requests have.
    """

    encoding: Encoding
    vocabularies: Mapping[str, pa.Table]
    kinds: Mapping[str, str]
    trained: Mapping[str, int]


def settled_by(layout: LogLayout, spec: FeatureSpec, directory: Path) -> Settled:
    """The terms of the dataset in `directory`.

    Args:
      layout: of its log.
      spec: its sizes.
      directory: its folder.

    Raises:
      UserError: files next to the dataset are gone.
    """
    report = read_data_report(directory)
    if report is None:
        raise UserError(
            f"{directory / JSON_FILE}, which holds the means and deviations of training, is gone; "
            f"restore it, or remove {directory} and make it again with: python -m "
            "experiments.prepare_data"
        )
    moments = {feature["name"]: feature for feature in report["features"]}
    names = [USER, ITEM, *(f"feature:{of.name}" for of in layout.vocabularies)]
    vocabularies = {name: read_vocabulary(directory, name) for name in names}
    encoding = encoding_of(layout, spec, vocabularies, moments)
    ids = report["ids"]
    trained = {name: ids[f"{name}s"] - ids[f"{name}s_not_in_train"] for name in (USER, ITEM)}
    kinds = _kinds(layout, vocabularies, directory)
    return Settled(encoding, vocabularies, kinds, trained)


def _kinds(
    layout: LogLayout, vocabularies: Mapping[str, pa.Table], directory: Path
) -> dict[str, str]:
    """`Settled.kinds`; hashed features have no vocabulary."""
    of_values = {
        name: kind_of(of["value"].type) if len(of) else "" for name, of in vocabularies.items()
    }
    if (path := directory / TRANSFORMS).exists():
        categories = json.loads(path.read_text())["categories"].values()
        of_values |= {
            f"feature:{of['name']}": of["values"]
            for of in itertools.chain(*categories)
            if "values" in of
        }
    kinds = {f"data.columns.{name}": of_values[name] for name in (USER, ITEM)}
    for of in layout.features:
        name = ITEM if of.kind == "history" else f"feature:{of.name}"
        kinds[f"data.features.{of.key}"] = of_values.get(name, "")
    return kinds


def check_types(query: Query, settled: Settled) -> None:
    """Refuse texts where training had whole numbers, and the reverse: none would match."""
    for column in files.wanted_columns(query.layout):
        here, there = kind_of(query.types[column.column]), settled.kinds.get(column.key, "")
        if here and there and here != there:
            name = column.column.removeprefix(PREFIX)
            raise UserError(
                f"column {name!r} ({column.key}) holds {here}, and in training it held "
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
