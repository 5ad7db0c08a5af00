"""The ids and scales of a dataset in the terms of its log: made, extended, written and read.

Next to a dataset are

    vocabularies/*.parquet         `value` and `id` of users, items and values of features
    transforms.json                `Encoding.rules`
    log_requests-SPLIT.parquet     the `request` id in the log and the number of the first `file` of
                                   each request, in stored order
    log.json                       `Log.manifest`
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_ranker.batch import Category, FeatureSpec
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.encode import ITEM, USER, Encoding
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.query import vocabulary_table

VOCABULARIES_FOLDER, TRANSFORMS, MANIFEST = "vocabularies", "transforms.json", "log.json"
# The version that the probabilities get where every one counts.
ANY_VERSION = "any"
# Field of a request -> the owners of its features.
_DENSE = {"user_features": "user", "context": "context"}
_DENSE |= {"candidate_features": "candidate", "item_features": "item"}
_CATEGORIES: dict[str, tuple[str, ...]] = {"request_category": ("user", "context")}
_CATEGORIES |= {"candidate_category": ("candidate",), "item_category": ("item",)}


def encoding_of(
    database: Database,
    layout: LogLayout,
    kinds: Mapping[str, str],
    moments: Mapping[str, Mapping[str, float]],
    known: Encoding | None = None,
) -> Encoding:
    """Return the encoding of a log; `moments` are those of its dense features in training.

    That of a dataset, if it is `known`, keeps its ids and scales; new ids follow.
    """
    tables = {USER: "users", ITEM: "items"}
    tables |= {f"feature:{of.name}": vocabulary_table(of) for of in layout.vocabularies}
    found = {}
    for name, table in tables.items():
        first = len(known.vocabularies[name]) if known and name in (USER, ITEM) else 0
        # Ids of features are numbers from 1 here. Rare, unknown and missing values have none.
        found[name] = database.fetch(
            f"SELECT value, id::INT AS id FROM {table} WHERE id >= {first} ORDER BY id"
        )
    if known is None:
        spec = _spec_of(layout, {name: len(table) for name, table in found.items()})
        starts = zip(spec.categories, spec.category_starts, strict=True)
        first_ids = {f"feature:{of.name}": start for of, start in starts}
        shifted = {name: _shifted(table, first_ids.get(name, 0)) for name, table in found.items()}
        return Encoding(spec, shifted, _rules_of(layout, moments, first_ids, kinds))
    spec, vocabularies = known.spec, {}
    for name, new in found.items():
        before = known.vocabularies[name]
        if name not in (USER, ITEM):
            new = _shifted(new, spec.num_categories - 1)
            spec = dataclasses.replace(spec, later_categories=spec.later_categories + len(new))
        # An empty vocabulary does not know the type of its values.
        schema = before.schema if len(before) else new.schema
        try:
            vocabularies[name] = pa.concat_tables([before.cast(schema), new.cast(schema)])
        except pa.ArrowInvalid as error:
            raise UserError(
                f"new values of {name!r} are no {schema.types[0]}, as those of the dataset are: "
                f"{error}; make a dataset of the whole log: leave data.extends out"
            ) from error
    users, items = (len(vocabularies[of]) for of in (USER, ITEM))
    rules = {**known.rules, "kinds": {**kinds, **known.rules["kinds"]}}
    spec = dataclasses.replace(spec, num_users=users, num_items=items)
    return Encoding(spec, vocabularies, rules)


def _shifted(vocabulary: pa.Table, by: int) -> pa.Table:
    ids = pc.add(vocabulary["id"], pa.scalar(by, pa.int32()))
    return vocabulary.set_column(1, "id", ids)


def _spec_of(layout: LogLayout, sizes: Mapping[str, int]) -> FeatureSpec:
    """The sizes of a dataset from those of its vocabularies."""
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

    def dense(owner: str) -> list[dict[str, Any]]:
        # Cheap features of items come first.
        features = sorted(
            layout.of(owner, kind="dense"), key=lambda of: owner == "item" and not of.cheap
        )
        own = ("name", "column", "place", "length")
        return [
            {**{name: getattr(of, name) for name in own}, **_scale_of(of, moments[of.name])}
            for of in features
        ]

    def category(of: Feature) -> dict[str, Any]:
        entry = {name: getattr(of, name) for name in ("name", "column", "kind", "length")}
        entry["buckets"] = of.size if of.hashed else None
        if of.hashed:
            entry["values"] = kinds.get(f"data.features.{of.key}", "")
        return {**entry, "first_id": first_ids[f"feature:{of.name}"]}

    history: dict[str, Any] = {}
    if layout.history:
        history = {"name": layout.history.name, "column": layout.history.column}
        history |= {"length": layout.history_length, "features": dense("event")}
    return {
        "dense": {field: dense(owner) for field, owner in _DENSE.items()},
        "categories": {
            field: [category(of) for of in layout.categories(*owners)]
            for field, owners in _CATEGORIES.items()
        },
        "history": history,
        "kinds": dict(kinds),
    }


def _scale_of(feature: Feature, moments: Mapping[str, float]) -> dict[str, float]:
    """The number subtracted, the divisor, and the value for a missing one."""
    # In 32 bits, so that the order in which the moments were added up leaves no trace.
    mean, deviation = (float(np.float32(moments.get(of, 0.0))) for of in ("mean", "deviation"))
    if not feature.standardize:
        return {"mean": 0.0, "scale": 1.0, "missing": mean}
    # By rounding, a column of one value may have a deviation just above 0.
    constant = deviation <= 1e-6 * abs(mean) or deviation == 0
    return {"mean": mean, "scale": 1.0 if constant else deviation, "missing": 0.0}


def write(encoding: Encoding, manifest: Mapping[str, list], directory: Path) -> None:
    """Write the encoding of a dataset and the manifest of its log next to the dataset."""
    (directory / VOCABULARIES_FOLDER).mkdir()
    for name, table in encoding.vocabularies.items():
        pq.write_table(table, _vocabulary_file(directory, name))
    (directory / TRANSFORMS).write_text(json.dumps(encoding.rules, indent=2))
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2))


def read_encoding(layout: LogLayout, spec: FeatureSpec, directory: Path) -> Encoding:
    """Read the encoding of a dataset with these sizes."""
    names = [USER, ITEM, *(f"feature:{of.name}" for of in layout.vocabularies)]
    vocabularies = {name: read_vocabulary(directory, name) for name in names}
    return Encoding(spec, vocabularies, json.loads((directory / TRANSFORMS).read_text()))


def read_vocabulary(directory: Path, name: str) -> pa.Table:
    """Read `value` and `id` of `user`, `item` or `feature:<name>`."""
    return pq.read_table(_vocabulary_file(directory, name), partitioning=None)


def _vocabulary_file(directory: Path, name: str) -> Path:
    file = "".join(c if f"a{c}".isidentifier() or c in ".-" else "-" for c in name)
    return directory / VOCABULARIES_FOLDER / f"{file}.parquet"


def write_requests(
    requests: Iterable[tuple[pa.Table, Iterable[str]]],
    manifest: Mapping[str, list],
    directory: Path,
    split: str,
) -> None:
    """Write `request` and `file` of the requests of a split next to a dataset.

    Each table has numbers of the files with it, and the result those of the files in the manifest.
    """
    tables = []
    for table, own in requests:
        places = pc.index_in(pa.array(own, pa.string()), pa.array([*manifest]))
        file = places.take(table["file"].combine_chunks())
        tables.append(table.select(["request"]).append_column("file", file))
    pq.write_table(pa.concat_tables(tables), _requests_file(directory, split), compression="zstd")


def read_requests_of(directory: Path, split: str) -> pa.Table:
    """Return the table that `write_requests` has written."""
    return pq.read_table(_requests_file(directory, split), partitioning=None)


def _requests_file(directory: Path, split: str) -> Path:
    return directory / f"log_requests-{split}.parquet"


def read_manifest(directory: Path) -> dict[str, list]:
    """Return the manifest of the log of a dataset."""
    return json.loads((directory / MANIFEST).read_text())


def kinds_of(layout: LogLayout, types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """Return the `kinds` of a log, see `Encoding.rules`; requests keep their own ids."""
    ids = [of for of in files.wanted_columns(layout) if of.use == "id"]
    kinds = {of.key: files.kind_of(types[of.column]) for of in ids}
    return {key: of for key, of in kinds.items() if of and key != "data.columns.request"}


def check_kinds(layout: LogLayout, types: Mapping[str, pa.DataType], known: Encoding) -> None:
    """Refuse texts where training had whole numbers, and the reverse: none would match."""
    kinds = kinds_of(layout, types)
    for of in files.wanted_columns(layout):
        here, there = kinds.get(of.key), known.rules["kinds"].get(of.key)
        if here and there and here != there:
            raise UserError(
                f"column {of.column!r} ({of.key}) holds {here}, and in training it held {there}; "
                "give it the type that it had"
            )
