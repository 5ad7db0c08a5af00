"""The last pass: ids and numbers of a piece as features, a `Request` at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float32, Float64, Int, Int32, Int64, UInt64

from kd_ranker.batch import Category, FeatureSpec, Owner, Stage
from kd_ranker.distillation.teacher_signal import probability_of_rank, probability_of_score
from kd_ranker.requests.request import Block, runs, starts_of
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.ordered import Piece, read_piece

# The version that the probabilities get where every one counts.
ANY_VERSION = "any"
USER, ITEM = "user", "item"
# Beside a dataset: how raw columns become its fields, see `transforms`.
TRANSFORMS = "transforms.json"


class Encoding(NamedTuple):
    """The rules by which values and numbers become ids and features.

    Attributes:
      spec: the sizes that follow.
      values: categorical feature that is not hashed, or `item` -> its values in the order of ids.
      ids: the same names -> the id of each value; that of a feature is its category id.
      scales: dense feature -> the number subtracted, the divisor, and the value for a missing one.
    """

    spec: FeatureSpec
    values: dict[str, pd.Index]
    ids: dict[str, Int32[np.ndarray, "values"]]
    scales: dict[str, tuple[float, float, float]]


def encoding_of(
    layout: LogLayout,
    spec: FeatureSpec,
    vocabularies: Mapping[str, pa.Table],
    moments: Mapping[str, Mapping[str, float]],
) -> Encoding:
    """Return the encoding by the vocabularies and the moments of a dataset.

    Args:
      layout: of its log.
      spec: its sizes.
      vocabularies: see `vocabulary.read_vocabulary`.
      moments: dense feature -> its moments in training.
    """
    tables = {of.name: vocabularies[f"feature:{of.name}"] for of in layout.vocabularies}
    tables[ITEM] = vocabularies[ITEM]
    return Encoding(
        spec,
        values={name: _index_of(of["value"]) for name, of in tables.items()},
        ids={name: of["id"].to_numpy() for name, of in tables.items()},
        scales={of.name: _scale_of(of, moments[of.name]) for of in layout.of_kind("dense")},
    )


def _index_of(values: pa.ChunkedArray) -> pd.Index:
    """Values to look others up among."""
    return pd.Index(values.combine_chunks().to_numpy(zero_copy_only=False))


def spec_of(layout: LogLayout, sizes: Mapping[str, int]) -> FeatureSpec:
    """Return the sizes of a dataset from those of the vocabularies of a log, by their names."""
    categories = []
    for feature in layout.of_kind("category", "bag"):
        size = feature.size if feature.hashed else sizes[f"feature:{feature.name}"]
        owner = "request" if feature.of_request else feature.of
        categories.append(Category(feature.name, owner, size + 1, feature.length))

    def width(*owners: str) -> int:
        return max(1, len(layout.of(*owners, kind="dense")))

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
    )


def _scale_of(feature: Feature, moments: Mapping[str, float]) -> tuple[float, float, float]:
    """The scale of a dense feature, see `Encoding`, from its moments in training, if any."""
    # In 32 bits, so that the order in which the moments were added up leaves no trace.
    mean, deviation = (float(np.float32(moments.get(of, 0.0))) for of in ("mean", "deviation"))
    if not feature.standardise:
        return 0.0, 1.0, mean
    # By rounding, a column of one value may have a deviation just above 0.
    constant = deviation <= 1e-6 * abs(mean) or deviation == 0
    return mean, 1.0 if constant else deviation, 0.0


def transforms(layout: LogLayout, encoding: Encoding, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The way from raw columns to the fields of a request, for those who serve without this code.

    Args:
      layout: of the log.
      encoding: its rules.
      kinds: key of the config that names a column of ids -> `query.kind_of` these.

    Returns:
      Values for JSON: the formula of dense features, and by field its columns in their order; the
      formula of hashes, and by field its categorical features in theirs; and `kinds`.
    """
    cheap_first = sorted(layout.of("item", kind="dense"), key=lambda feature: not feature.cheap)
    dense = {
        "user_features": layout.of("user", kind="dense"),
        "context": layout.of("context", kind="dense"),
        "candidate_features": layout.of("candidate", kind="dense"),
        "item_features": cheap_first,
    }
    categories = {
        "request_category": layout.categories("user", "context"),
        "candidate_category": layout.categories("candidate"),
        "item_category": layout.categories("item"),
    }
    names = (category.name for category in encoding.spec.categories)
    starts = dict(zip(names, encoding.spec.category_starts, strict=True))

    def scaled(feature: Feature) -> dict[str, Any]:
        mean, scale, missing = encoding.scales[feature.name]
        numbers = {"mean": mean, "scale": scale, "missing": missing}
        place = {"place": feature.place, "length": feature.length}
        return {"column": feature.column, **place, **numbers}

    def numbered(feature: Feature) -> dict[str, Any]:
        kept = {name: getattr(feature, name) for name in ("name", "column", "kind", "length")}
        size: dict[str, Any] = {"buckets": None}
        if feature.hashed:
            size = {
                "buckets": feature.size,
                "values": kinds.get(f"data.features.{feature.key}", ""),
            }
        return {**kept, **size, "first_id": starts[feature.name]}

    history = layout.history
    return {
        "dense_formula": _DENSE_FORMULA,
        "dense": {field: [scaled(of) for of in features] for field, features in dense.items()},
        "category_formula": _CATEGORY_FORMULA,
        "categories": {
            field: [numbered(of) for of in features] for field, features in categories.items()
        },
        "history": {
            "column": history.column,
            "length": layout.history_length,
            "features": [scaled(feature) for feature in layout.of("event")],
        }
        if history
        else {},
        "history_formula": _HISTORY_FORMULA,
        "kinds": dict(kinds),
    }


_DENSE_FORMULA = (
    "(x - mean) / scale as float32, and `missing` where that is not finite, or x is missing or "
    "beyond float32; x is the entry `place` of a vector's column, missing where the vector has not "
    "`length` of them; a field without columns is one 0"
)
_CATEGORY_FORMULA = (
    "without buckets the `id` of the value in vocabularies/feature-<name>.parquet, first_id for a "
    "value that is missing there; with buckets first_id + 1 + hash % buckets, first_id for a "
    "missing one, where hash is splitmix64 of a whole number's 64 bits, or of those that "
    "pandas.util.hash_array(texts, categorize=False) makes of a text, and `values` names the "
    "kind; a bag takes the first `length` values that are not missing, and -1 fills "
    "up; an empty text is a missing value, and so is a number that is not whole; true is 1, false 0"
)
_HISTORY_FORMULA = (
    "the last `length` values of the column that are not missing, those without an id in "
    "vocabularies/item.parquet left out, then filled up at the end with history_mask false; "
    "history_features are the last entries of the lists of `features`, as many as the history has "
    "values that are not missing, by the formula of dense features, and 0 for a list of another "
    "length; without features they are 1"
)


def item_matrix(
    layout: LogLayout, encoding: Encoding, items: pa.Table
) -> tuple[Float32[np.ndarray, "items F"], Int32[np.ndarray, "items I"]]:
    """The features of each item: dense ones, cheap before costly, and category ids."""
    cheap = [feature for feature in layout.of("item", kind="dense") if feature.cheap]
    costly = [feature for feature in layout.of("item", kind="dense") if not feature.cheap]
    features = np.concatenate(
        [_dense(encoding, cheap, items), *([_dense(encoding, costly, items)] if costly else [])],
        axis=1,
    )
    return features, _categories(layout, encoding, items, "item")


def encode_requests(
    layout: LogLayout, encoding: Encoding, folder: Path, piece: Piece, before: int = 0
) -> Block:
    """Return the requests of a piece.

    Args:
      layout: of the log.
      encoding: its rules.
      folder: with the files of `ordered.write_ordered`.
      piece: the piece.
      before: the number of requests of the dataset before the first piece.
    """
    requests, candidates = read_piece(folder, piece)
    spec, tasks = encoding.spec, layout.tasks
    number = requests.num_rows
    owner = candidates["number"].to_numpy() - piece.requests[0]
    stage = candidates["stage"].to_numpy()
    teacher_weight = floats_of(candidates, "teacher_weight").astype(np.float32)
    label = np.stack([candidates[f"label:{task}"].to_numpy() for task in tasks], axis=1)
    scored = {task: floats_of(candidates, f"teacher:{task}") for task in layout.scored_tasks}
    counts = _stage_counts(owner, stage, scored, number)
    if layout.teacher_signal == "rank":
        scored = {task: _ranks(of, teacher_weight, owner) for task, of in scored.items()}
    elif layout.teacher_signal == "score":
        scored = {task: probability_of_score(of) for task, of in scored.items()}
    unscored = np.full(len(owner), np.nan)
    probability = np.stack([scored.get(task, unscored) for task in tasks], axis=1)
    history = _history(layout, encoding, requests)
    facts = {
        name: floats_of(candidates, name).astype(np.float32)
        for name in ("incumbent", "propensity")
        if name in candidates.column_names and piece.split != "train"
    }
    if "propensity" in facts:
        facts["propensity"][stage < Stage.SHOWN] = np.nan
    numbers: dict[Owner, Int64[np.ndarray, "n"]] = {
        "request": np.ones(number, np.int64),
        "event": np.diff(history.start),
        "candidate": counts["candidates"],
        "shown": counts["shown"],
        "scored": counts["scored"],
        "known": counts["candidates"] if facts else np.zeros(number, np.int64),
    }
    unknown = np.full(numbers["known"].sum(), np.nan, np.float32)
    # Both are of the first candidates of each request.
    first = starts_of(counts["candidates"])[:-1]
    shown, judged = (runs(first, numbers[of]) for of in ("shown", "scored"))
    values = {
        "request_id": _request_ids(requests, before),
        "time": requests["time"].to_numpy(),
        "user_id": requests["user_id"].to_numpy().astype(np.int32),
        "user_features": _dense(encoding, layout.of("user", kind="dense"), requests),
        "context": _dense(encoding, layout.of("context", kind="dense"), requests),
        "request_category": _categories(layout, encoding, requests, "user", "context"),
        "history_id": history.item_id,
        "history_features": history.features,
        "item_id": candidates["item_id"].to_numpy().astype(np.int32),
        "candidate_features": _dense(encoding, layout.of("candidate", kind="dense"), candidates),
        "candidate_category": _categories(layout, encoding, candidates, "candidate"),
        "num_passed": counts["passed"],
        "user_label": np.maximum(label[shown], 0).astype(np.uint8),
        "label_weight": floats_of(candidates, "label_weight").astype(np.float32)[shown],
        "teacher_probability": probability[judged].astype(np.float32),
        "teacher_weight": teacher_weight[judged],
        "teacher_version": np.full(number, spec.teacher_version, object),
        "true_probability": np.stack([unknown] * len(tasks), axis=1),
        **{name: facts.get(name, unknown) for name in ("incumbent", "propensity")},
    }
    return Block(values, numbers)


def _request_ids(requests: pa.Table, before: int) -> Int64[np.ndarray, "n"]:
    """The ids of requests as whole numbers: their own without the sign, or the places of texts."""
    ids = requests["request"]
    if pa.types.is_integer(ids.type):
        own = ids.combine_chunks().to_numpy(zero_copy_only=False)
        return (own.view(np.uint64) & np.uint64(2**63 - 1)).astype(np.int64)
    return before + requests["number"].to_numpy()


def _stage_counts(
    owner: Int[np.ndarray, "n"],
    stage: Int[np.ndarray, "n"],
    scored: Mapping[str, np.ndarray],
    requests: int,
) -> dict[str, Int64[np.ndarray, "requests"]]:
    """Numbers of candidates of each request: of each stage, and with a logged teacher."""

    def count(chosen: np.ndarray) -> Int64[np.ndarray, "requests"]:
        return np.bincount(owner[chosen], minlength=requests).astype(np.int64)

    counts = {
        "candidates": count(stage >= Stage.RETRIEVED),
        "passed": count(stage >= Stage.PASSED),
        "shown": count(stage >= Stage.SHOWN),
    }
    if not scored:
        return counts | {"scored": np.zeros(requests, np.int64)}
    written = np.any([~np.isnan(of) for of in scored.values()], axis=0)
    beyond = count(written & (stage < Stage.PASSED)) > 0
    return counts | {"scored": np.where(beyond, counts["candidates"], counts["passed"])}


def _ranks(
    position: np.ndarray, weight: Float32[np.ndarray, "n"], owner: Int[np.ndarray, "n"]
) -> Float32[np.ndarray, "n"]:
    """Positions as numbers in (0, 1), by the rank in the request; equal ones share their mean."""
    proper = (position >= 0) & np.isfinite(position) & (weight > 0)
    rank = pd.Series(np.where(proper, position, np.nan)).groupby(owner).rank() - 1
    return probability_of_rank(rank.to_numpy()).astype(np.float32)


def floats_of(table: pa.Table, name: str) -> Float64[np.ndarray, "n"]:
    """A column of numbers, NaN where it is null."""
    column = table[name].combine_chunks().cast(pa.float64()).fill_null(float("nan"))
    return column.to_numpy(zero_copy_only=False)


class _Histories(NamedTuple):
    """The start of each request's history, and the events of all; unknown items are left out."""

    start: Int64[np.ndarray, "n+1"]
    item_id: Int32[np.ndarray, "all"]
    features: Float32[np.ndarray, "all E"]


def _history(layout: LogLayout, encoding: Encoding, requests: pa.Table) -> _Histories:
    if layout.history is None:
        empty = np.zeros(0, np.int32), np.zeros((0, 1), np.float32)
        return _Histories(np.zeros(requests.num_rows + 1, np.int64), *empty)
    start, values = _lists(requests, layout.history)
    ids = _places(encoding.values[ITEM], values)
    known = ids >= 0
    features = np.ones((len(ids), encoding.spec.history_features), np.float32)
    for place, feature in enumerate(layout.of("event")):
        logged, numbers = _lists(requests, feature)
        # A request has a number for each event, or none.
        has = np.repeat(np.diff(logged) > 0, np.diff(start))
        column = np.zeros(len(ids))
        column[has] = numbers.fill_null(0).to_numpy(zero_copy_only=False)
        features[:, place] = column
    return _Histories(starts_of(known)[start], ids[known].astype(np.int32), features[known])


def _dense(
    encoding: Encoding, features: list[Feature], table: pa.Table
) -> Float32[np.ndarray, "n F"]:
    """Dense features side by side; one column of zeros without any."""
    if not features:
        return np.zeros((table.num_rows, 1), np.float32)
    matrix = np.empty((table.num_rows, len(features)), np.float32)
    for index, feature in enumerate(features):
        mean, scale, missing = encoding.scales[feature.name]
        number = floats_of(table, f"feature:{feature.name}")
        with np.errstate(over="ignore"):
            scaled = ((number - mean) / scale).astype(np.float32)
        matrix[:, index] = np.where(np.isfinite(scaled), scaled, np.float32(missing))
    return matrix


def _categories(
    layout: LogLayout, encoding: Encoding, table: pa.Table, *owners: str
) -> Int32[np.ndarray, "n K"]:
    """Category ids side by side, in the order of the features; -1 fills bags up."""
    names = (category.name for category in encoding.spec.categories)
    starts = dict(zip(names, encoding.spec.category_starts, strict=True))
    columns = [np.zeros((table.num_rows, 0), np.int32)]
    for feature in layout.categories(*owners):
        if feature.kind == "bag":
            start, values = _lists(table, feature)
            ids = np.full((table.num_rows, feature.length), -1, np.int32)
            lengths = np.diff(start)
            row = np.repeat(np.arange(table.num_rows), lengths)
            place = np.arange(len(values)) - np.repeat(start[:-1], lengths)
            ids[row, place] = _ids(encoding, feature, values, starts[feature.name])
        else:
            values = table[f"feature:{feature.name}"].combine_chunks()
            ids = _ids(encoding, feature, values, starts[feature.name])[:, None]
        columns.append(ids.astype(np.int32))
    return np.concatenate(columns, axis=1)


def _lists(table: pa.Table, feature: Feature) -> tuple[Int64[np.ndarray, "n+1"], pa.Array]:
    """The start of each row's list, and the values of all, one after the other."""
    column = table[f"feature:{feature.name}"].combine_chunks()
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return starts_of(lengths), column.flatten()


def _ids(
    encoding: Encoding, feature: Feature, values: pa.Array, first: int
) -> Int64[np.ndarray, "n"]:
    """The category id of each value; `first` for a missing, rare or unknown one."""
    if not feature.hashed:
        ids = np.append(encoding.ids[feature.name], first)
        return ids[_places(encoding.values[feature.name], values)]
    bucket = 1 + (hashes_of(values) % np.uint64(feature.size)).astype(np.int64)
    return first + np.where(values.is_null().to_numpy(zero_copy_only=False), 0, bucket)


def _places(known: pd.Index, values: pa.Array) -> Int64[np.ndarray, "n"]:
    """The place of each value among those that are known, -1 if it is not."""
    encoded = values.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    places = np.append(known.get_indexer(distinct) if len(distinct) else [], -1).astype(np.int64)
    return places[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def hashes_of(values: pa.Array) -> UInt64[np.ndarray, "n"]:
    """A hash of each value: of integers by splitmix64, of texts by SipHash."""
    if pa.types.is_integer(values.type):
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        return splitmix64(numbers.astype(np.uint64, casting="unsafe"))
    encoded = values.dictionary_encode()
    texts = np.append(encoded.dictionary.to_numpy(zero_copy_only=False), "").astype(object)
    hashed = splitmix64(pd.util.hash_array(texts, categorize=False))
    return hashed[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def splitmix64(bits: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection.

    >>> splitmix64(np.array([0, 1], np.uint64)).tolist()
    [16294208416658607535, 10451216379200822465]
    """
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
