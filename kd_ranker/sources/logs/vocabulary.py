"""The ids and scales of a dataset in the terms of its log: made, extended, written and read.

Next to a dataset are

    vocabularies/*.parquet         `value` and `id` of users, items and values of features
    transforms.json                `Encoding.rules`
    log_requests-SPLIT.parquet     the `request` id in the log and the number of the first `file` of
                                   each request, in stored order
    log.json                       the `files.Manifest` of the log
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_ranker.batch import Category, FeatureSpec
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.columns import kind_of, wanted_columns
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.files import Manifest
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.query import vocabulary_table

VOCABULARIES_FOLDER, TRANSFORMS, MANIFEST = "vocabularies", "transforms.json", "log.json"
# The version that the probabilities get where every one counts.
ANY_VERSION = "any"
# Field of a request -> the owners of its features.
_DENSE = {
    "user_features": "user",
    "context": "context",
    "candidate_features": "candidate",
    "item_features": "item",
}
_CATEGORIES: dict[str, tuple[str, ...]] = {
    "request_category": ("user", "context"),
    "candidate_category": ("candidate",),
    "item_category": ("item",),
}


class LoggedRequests(NamedTuple):
    """Some requests in the terms of their log."""

    table: pa.Table  # `request`, the id in the log, and `file`, a number in `files`
    files: Sequence[str]


def encoding_of(
    database: Database,
    layout: LogLayout,
    kinds: Mapping[str, str],
    moments: Mapping[str, Mapping[str, float]],
    known: Encoding | None = None,
) -> Encoding:
    """Return the encoding of a log, which keeps the ids and scales that are `known` in a dataset.

    Args:
      database: holds the tables of `log.sql`.
      layout: of the log.
      kinds: see `kinds_of`.
      moments: dense feature -> its `mean` and `deviation` in training.
      known: the encoding of the dataset that the log extends; new ids follow.

    Raises:
      UserError: new values have another type than those of the dataset.
    """
    vocabularies = _read_vocabularies(database, layout, known)
    if known:
        return _extended(known, vocabularies, kinds)
    sizes = {name: len(table) for name, table in vocabularies.items()}
    spec = _spec_of(layout, sizes)
    first_ids = {
        f"feature:{category.name}": start
        for category, start in zip(spec.categories, spec.category_starts, strict=True)
    }
    shifted = {
        name: _shifted(table, first_ids.get(name, 0)) for name, table in vocabularies.items()
    }
    return Encoding(spec, shifted, _rules_of(layout, moments, first_ids, kinds))


def _read_vocabularies(
    database: Database, layout: LogLayout, known: Encoding | None
) -> dict[str, pa.Table]:
    """Return the `value` and `id` of new users, items and values of features, by id.

    Users and items have their ids already. Ids of features are numbers from 1 here; rare, unknown
    and missing values have none.
    """
    tables = {USER: "users", ITEM: "items"}
    for feature in layout.vocabularies:
        tables[f"feature:{feature.name}"] = vocabulary_table(feature)
    vocabularies = {}
    for name, table in tables.items():
        first = len(known.vocabularies[name]) if known and name in (USER, ITEM) else 0
        vocabularies[name] = database.fetch(
            f"SELECT value, id::INT AS id FROM {table} WHERE id >= {first} ORDER BY id"
        )
    return vocabularies


def _extended(
    known: Encoding, new_vocabularies: Mapping[str, pa.Table], kinds: Mapping[str, str]
) -> Encoding:
    """Return the encoding of a dataset with the new values of further files after its own."""
    spec = known.spec
    vocabularies = {}
    for name, new in new_vocabularies.items():
        if name not in (USER, ITEM):
            new = _shifted(new, spec.num_categories - 1)
            spec = dataclasses.replace(spec, later_categories=spec.later_categories + len(new))
        vocabularies[name] = _joined(name, known.vocabularies[name], new)
    spec = dataclasses.replace(
        spec, num_users=len(vocabularies[USER]), num_items=len(vocabularies[ITEM])
    )
    rules = {**known.rules, "kinds": {**kinds, **known.rules["kinds"]}}
    return Encoding(spec, vocabularies, rules)


def _joined(name: str, before: pa.Table, new: pa.Table) -> pa.Table:
    # An empty vocabulary does not know the type of its values.
    schema = before.schema if len(before) else new.schema
    try:
        return pa.concat_tables([before.cast(schema), new.cast(schema)])
    except pa.ArrowInvalid as error:
        raise UserError(
            f"new values of {name!r} are no {schema.types[0]}, as those of the dataset are: "
            f"{error}; make a dataset of the whole log: leave data.extends out"
        ) from error


def _shifted(vocabulary: pa.Table, distance: int) -> pa.Table:
    ids = pc.add(vocabulary["id"], pa.scalar(distance, pa.int32()))
    return vocabulary.set_column(1, "id", ids)


def _spec_of(layout: LogLayout, sizes: Mapping[str, int]) -> FeatureSpec:
    """Return the sizes of a dataset from those of its vocabularies."""
    categories = []
    for feature in layout.categories():
        size = feature.size if feature.hashed else sizes[f"feature:{feature.name}"]
        owner = "request" if feature.of_request else feature.of
        categories.append(Category(feature.name, owner, size + 1, feature.length))

    def width(owner: str) -> int:
        return max(1, len(layout.of(owner, kind="dense")))

    cheap = sum(feature.cheap for feature in layout.of("item", kind="dense"))
    costly = len(layout.of("item", kind="dense")) - cheap
    return FeatureSpec(
        dataset="parquet",
        tasks=layout.tasks,
        num_users=sizes[USER],
        num_items=sizes[ITEM],
        user_features=width("user"),
        context_features=width("context"),
        candidate_features=width("candidate"),
        item_features=max(1, cheap) + costly,
        cheap_item_features=max(1, cheap),
        history_length=layout.history_length,
        history_features=width("event"),
        teacher_version=(layout.teacher_version or ANY_VERSION) if layout.scored_tasks else "",
        categories=tuple(categories),
        teacher_signal=layout.teacher_signal,
        early_scores=layout.early_scores,
    )


def _rules_of(
    layout: LogLayout,
    moments: Mapping[str, Mapping[str, float]],
    first_ids: Mapping[str, int],
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """Return `Encoding.rules`, which servers follow by the formulas in the README of an export."""
    categories = {
        field: [
            _rule_of_category(feature, first_ids, kinds) for feature in layout.categories(*owners)
        ]
        for field, owners in _CATEGORIES.items()
    }
    history: dict[str, Any] = {}
    if layout.history:
        history = {
            "name": layout.history.name,
            "column": layout.history.column,
            "length": layout.history_length,
            "features": _dense_rules(layout, "event", moments),
        }
    return {
        "dense": {field: _dense_rules(layout, owner, moments) for field, owner in _DENSE.items()},
        "categories": categories,
        "history": history,
        "kinds": dict(kinds),
    }


def _dense_rules(
    layout: LogLayout, owner: str, moments: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Return the rule of each dense feature of an owner; cheap features of items come first."""
    features = layout.of(owner, kind="dense")
    if owner == "item":
        features = sorted(features, key=lambda feature: not feature.cheap)
    return [
        {
            "name": feature.name,
            "column": feature.column,
            "place": feature.place,
            "length": feature.length,
            **_scale_of(feature, moments[feature.name]),
        }
        for feature in features
    ]


def _rule_of_category(
    feature: Feature, first_ids: Mapping[str, int], kinds: Mapping[str, str]
) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "name": feature.name,
        "column": feature.column,
        "kind": feature.kind,
        "length": feature.length,
        "buckets": feature.size if feature.hashed else None,
    }
    if feature.hashed:
        rule["values"] = kinds.get(f"data.features.{feature.key}", "")
    rule["first_id"] = first_ids[f"feature:{feature.name}"]
    return rule


def _scale_of(feature: Feature, moments: Mapping[str, float]) -> dict[str, float]:
    """Return the number subtracted (`mean`), the divisor, and the value for a missing one.

    A feature that is not standardized is stored as it is, and its mean stands for a missing value.
    """
    # In 32 bits, so that the order in which the moments were added up leaves no trace.
    mean = float(np.float32(moments.get("mean", 0.0)))
    deviation = float(np.float32(moments.get("deviation", 0.0)))
    if not feature.standardize:
        return {"mean": 0.0, "scale": 1.0, "missing": mean}
    # By rounding, a column of one value may have a deviation just above 0.
    is_constant = deviation <= 1e-6 * abs(mean) or deviation == 0
    return {"mean": mean, "scale": 1.0 if is_constant else deviation, "missing": 0.0}


def write(encoding: Encoding, manifest: Manifest, directory: Path) -> None:
    """Write the encoding of a dataset and the manifest of its log next to the dataset."""
    (directory / VOCABULARIES_FOLDER).mkdir()
    for name, table in encoding.vocabularies.items():
        pq.write_table(table, _vocabulary_file(directory, name))
    (directory / TRANSFORMS).write_text(json.dumps(encoding.rules, indent=2))
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2))


def read_encoding(layout: LogLayout, spec: FeatureSpec, directory: Path) -> Encoding:
    """Read the encoding of a dataset with these sizes."""
    names = [USER, ITEM, *(f"feature:{feature.name}" for feature in layout.vocabularies)]
    vocabularies = {name: read_vocabulary(directory, name) for name in names}
    return Encoding(spec, vocabularies, json.loads((directory / TRANSFORMS).read_text()))


def read_vocabulary(directory: Path, name: str) -> pa.Table:
    """Read `value` and `id` of `user`, `item` or `feature:<name>`."""
    return pq.read_table(_vocabulary_file(directory, name), partitioning=None)


def _vocabulary_file(directory: Path, name: str) -> Path:
    file = "".join(character if _is_safe(character) else "-" for character in name)
    return directory / VOCABULARIES_FOLDER / f"{file}.parquet"


def _is_safe(character: str) -> bool:
    """Return True for letters and digits of any script, and for the signs _ . -."""
    return f"a{character}".isidentifier() or character in ".-"


def write_requests(
    requests: Iterable[LoggedRequests], manifest: Manifest, directory: Path, split: str
) -> None:
    """Write `request` and `file` of the requests of a split next to a dataset.

    The numbers of files become those in the manifest.
    """
    files_in_manifest = pa.array([*manifest])
    tables = []
    for table, files in requests:
        numbers = pc.index_in(pa.array(files, pa.string()), files_in_manifest)
        file = numbers.take(table["file"].combine_chunks())
        tables.append(table.select(["request"]).append_column("file", file))
    pq.write_table(pa.concat_tables(tables), _requests_file(directory, split), compression="zstd")


def read_requests_of(directory: Path, split: str) -> pa.Table:
    """Return the table that `write_requests` has written."""
    return pq.read_table(_requests_file(directory, split), partitioning=None)


def _requests_file(directory: Path, split: str) -> Path:
    return directory / f"log_requests-{split}.parquet"


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of the log of a dataset."""
    return json.loads((directory / MANIFEST).read_text())


def kinds_of(layout: LogLayout, types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """Return the `kinds` of a log, see `Encoding.rules`; requests keep their own ids."""
    kinds = {}
    for wanted in wanted_columns(layout):
        if wanted.use != "id" or wanted.key == "data.columns.request":
            continue
        if kind := kind_of(types[wanted.column]):
            kinds[wanted.key] = kind
    return kinds


def check_kinds(layout: LogLayout, types: Mapping[str, pa.DataType], known: Encoding) -> None:
    """Refuse texts where training had whole numbers, and the reverse: none would match."""
    kinds = kinds_of(layout, types)
    for wanted in wanted_columns(layout):
        kind = kinds.get(wanted.key)
        kind_in_training = known.rules["kinds"].get(wanted.key)
        if kind and kind_in_training and kind != kind_in_training:
            raise UserError(
                f"column {wanted.column!r} ({wanted.key}) holds {kind}, and in training it held "
                f"{kind_in_training}; give it the type that it had"
            )
