"""The last pass: the keys and numbers of a bucket as ids and features, a `Request` at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from kd_ranker.batch import Category, FeatureSpec
from kd_ranker.requests.request import SPLITS, Request
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.log_statistics import Moments, Statistics, moments_of
from kd_ranker.sources.logs.merging import Counts
from kd_ranker.sources.logs.named_columns import (
    ColumnValues,
    NamedColumns,
    Ragged,
    array_of,
    num_rows,
    read_columns,
    starts_of,
)
from kd_ranker.sources.logs.value_keys import MISSING, mixed
from kd_ranker.sources.logs.values import compacted
from kd_ranker.sources.searching import look_up

# The version that the probabilities get where every one counts.
ANY_VERSION = "any"


class Vocabulary(NamedTuple):
    """Keys and their numbers: `number[i]` is that of `key[i]`; the keys are sorted."""

    key: Int64[np.ndarray, "known"]
    number: Int32[np.ndarray, "known"]


class Encoding(NamedTuple):
    """The rules by which keys and numbers become ids and features.

    Attributes:
      spec: the sizes that follow.
      vocabularies: `user`, `item`, or `feature:<name>` of a categorical feature that is not hashed
        -> its vocabulary. Users and items count from 0, values of a feature from 1.
      scales: dense feature -> the number subtracted, the divisor, and the value for a missing one.
    """

    spec: FeatureSpec
    vocabularies: dict[str, Vocabulary]
    scales: dict[str, tuple[float, float, float]]


def make_encoding(layout: LogLayout, statistics: Statistics) -> Encoding:
    """Settles ids and scales, from the training requests.

    Users and items get an id each, those of training requests first, the most frequent before the
    others, and then those that no training request has: so these keep their features, and are
    told from each other where ids are hashed. A model that looks ids up has no trained row for
    them and serves its reserved one. Of a categorical feature the `size` most frequent values of
    training requests are kept; those of an item count as often as it is a candidate.
    """
    item_counts = counts_of_items(statistics.items)
    vocabularies = {
        "user": _numbered(statistics.counts["user"]),
        "item": _numbered(item_counts),
    }
    scales, categories = {}, []
    for feature in layout.features:
        if feature.kind == "dense":
            scales[feature.name] = _scale(feature, feature_moments(feature, statistics))
        elif feature.kind in ("category", "bag"):
            size = feature.size
            if not feature.hashed:
                vocabulary = _most_frequent(feature_counts(feature, statistics), size)
                vocabularies[f"feature:{feature.name}"] = vocabulary
                size = len(vocabulary.key)
            owner = "request" if feature.of_request else feature.of
            categories.append(Category(feature.name, owner, size + 1, feature.length))
    return Encoding(_spec(layout, vocabularies, categories), vocabularies, scales)


def _spec(
    layout: LogLayout, vocabularies: Mapping[str, Vocabulary], categories: Sequence[Category]
) -> FeatureSpec:
    def width(*owners: str) -> int:
        return max(1, len(layout.of(*owners, kind="dense")))

    cheap = sum(feature.cheap for feature in layout.of("item", kind="dense"))
    costly = len(layout.of("item", kind="dense")) - cheap
    return FeatureSpec(
        dataset="parquet",
        tasks=layout.tasks,
        num_users=len(vocabularies["user"].key),
        num_items=len(vocabularies["item"].key),
        user_features=width("user"),
        context_features=width("context"),
        candidate_features=width("candidate"),
        item_features=max(1, cheap) + costly,
        cheap_item_features=max(1, cheap),
        history_length=layout.history_length,
        history_features=1,
        teacher_version=(layout.teacher_version or ANY_VERSION) if layout.scored_tasks else "",
        categories=tuple(categories),
        teacher_signal=layout.teacher_signal,
    )


def counts_of_items(items: NamedColumns) -> Counts:
    """The number of times that each item is a candidate."""
    return Counts(*(array_of(items, name) for name in ("item", "train", "total")))


def feature_moments(feature: Feature, statistics: Statistics) -> Moments:
    """The moments of a dense feature: over items that training has, or over training requests."""
    if feature.of != "item":
        return statistics.moments[feature.name]
    values = array_of(statistics.items, f"feature:{feature.name}")
    return moments_of(values[array_of(statistics.items, "train") > 0])


def feature_counts(feature: Feature, statistics: Statistics) -> Counts:
    """The counts of the values of a categorical feature that is not hashed."""
    name = f"feature:{feature.name}"
    if feature.of != "item":
        return statistics.counts[name]
    return item_category_counts(statistics.items[name], counts_of_items(statistics.items))


def item_category_counts(column: ColumnValues, items: Counts) -> Counts:
    """The number of candidates that have each value of a feature of items."""
    if isinstance(column, Ragged):
        key, lengths = column.values, column.lengths
    else:
        lengths = (column != MISSING).astype(np.int64)
        key = column[column != MISSING]
    keys, index = np.unique(key, return_inverse=True)
    train, total = (
        np.bincount(index, weights=np.repeat(number, lengths), minlength=len(keys))
        for number in (items.train, items.total)
    )
    return Counts(keys, train.astype(np.int64), total.astype(np.int64))


def _numbered(counts: Counts) -> Vocabulary:
    not_in_train = np.where(counts.train > 0, 0, counts.total)
    return _vocabulary(counts.key, np.lexsort((counts.key, -not_in_train, -counts.train)), 0)


def _most_frequent(counts: Counts, size: int) -> Vocabulary:
    order = np.lexsort((counts.key, -counts.train))
    return _vocabulary(counts.key, order[: min(size, int((counts.train > 0).sum()))], 1)


def _vocabulary(
    key: Int64[np.ndarray, "n"], order: Int[np.ndarray, "known"], first: int
) -> Vocabulary:
    """The keys at the places `order`, numbered in that order."""
    by_key = np.argsort(key[order])
    return Vocabulary(key[order][by_key], (first + by_key).astype(np.int32))


def _scale(feature: Feature, moments: Moments) -> tuple[float, float, float]:
    # In 32 bits, so that the order in which the moments were added up leaves no trace.
    mean = float(np.float32(moments.mean))
    deviation = float(np.float32(moments.deviation))
    if not feature.standardise:
        return 0.0, 1.0, mean
    # Of rounding alone, a column of one value may have a deviation just above 0.
    constant = deviation <= 1e-6 * abs(mean) or deviation == 0
    return mean, 1.0 if constant else deviation, 0.0


def save_encoding(encoding: Encoding, folder: Path) -> None:
    """Writes an encoding for `load_encoding`."""
    folder.mkdir()
    (folder / "spec.json").write_text(encoding.spec.to_json())
    (folder / "rest.json").write_text(json.dumps([encoding.scales, [*encoding.vocabularies]]))
    for index, vocabulary in enumerate(encoding.vocabularies.values()):
        np.save(folder / f"{index}-key.npy", vocabulary.key)
        np.save(folder / f"{index}-number.npy", vocabulary.number)


def load_encoding(folder: Path) -> Encoding:
    """The inverse of `save_encoding`; processes share the memory of the vocabularies."""
    scales, names = json.loads((folder / "rest.json").read_text())
    vocabularies = {
        name: Vocabulary(
            np.load(folder / f"{index}-key.npy", mmap_mode="r"),
            np.load(folder / f"{index}-number.npy", mmap_mode="r"),
        )
        for index, name in enumerate(names)
    }
    spec = FeatureSpec.from_json((folder / "spec.json").read_text())
    return Encoding(spec, vocabularies, scales)


def item_matrix(
    layout: LogLayout, encoding: Encoding, items: NamedColumns
) -> tuple[Float32[np.ndarray, "items F"], Int32[np.ndarray, "items I"]]:
    """The features of each item: dense ones, cheap before costly, and category ids."""
    place, known = look_up(encoding.vocabularies["item"].key, array_of(items, "item"))
    assert known.all()
    order = np.empty(len(place), np.int64)
    order[encoding.vocabularies["item"].number[place]] = np.arange(len(place))
    cheap = [feature for feature in layout.of("item", kind="dense") if feature.cheap]
    costly = [feature for feature in layout.of("item", kind="dense") if not feature.cheap]
    features = np.concatenate(
        [_dense(encoding, cheap, items), *([_dense(encoding, costly, items)] if costly else [])],
        axis=1,
    )
    return features[order], _categories(layout, encoding, items, "item")[order]


def encode_requests(
    layout: LogLayout, requests_path: str, candidates_path: str, encoding_folder: str, split: str
) -> Iterator[Request]:
    """The requests of a split that lie in a bucket, in the order of time."""
    encoding = load_encoding(Path(encoding_folder))
    requests, candidates = read_columns(Path(requests_path)), read_columns(Path(candidates_path))
    spec, tasks = encoding.spec, layout.tasks
    user_id = _ids(encoding.vocabularies["user"], array_of(requests, "user"))
    item_id = _ids(encoding.vocabularies["item"], array_of(candidates, "item"))
    user_features = _dense(encoding, layout.of("user", kind="dense"), requests)
    context = _dense(encoding, layout.of("context", kind="dense"), requests)
    candidate_features = _dense(encoding, layout.of("candidate", kind="dense"), candidates)
    request_category = _categories(layout, encoding, requests, "user", "context")
    candidate_category = _categories(layout, encoding, candidates, "candidate")
    history_start, history_id = _history(layout, encoding, requests)
    label = np.stack([array_of(candidates, f"label:{task}") for task in tasks], axis=1)
    label = np.maximum(label, 0).astype(np.uint8)
    unknown = np.full(num_rows(candidates), np.nan, np.float32)
    probability = np.stack(
        [np.asarray(candidates.get(f"teacher:{task}", unknown)) for task in tasks], axis=1
    ).astype(np.float32)
    label_weight = np.asarray(candidates["label_weight"], np.float32)
    teacher_weight = np.asarray(candidates["teacher_weight"], np.float32)
    start = starts_of(array_of(requests, "candidates"))
    # As Python's own numbers, which are quicker to take one by one.
    request, time, shown, passed, scored = (
        array_of(requests, name).tolist()
        for name in ("request", "time", "shown", "passed", "scored")
    )
    no_truth = np.zeros((0, len(tasks)), np.float32)
    for index in np.flatnonzero(array_of(requests, "split") == SPLITS.index(split)).tolist():
        first, end = int(start[index]), int(start[index + 1])
        history = history_id[history_start[index] : history_start[index + 1]]
        yield Request(
            request_id=request[index] & (2**63 - 1),
            time=time[index],
            user_id=int(user_id[index]),
            user_features=user_features[index],
            context=context[index],
            history_id=history,
            history_features=np.ones((len(history), 1), np.float32),
            item_id=item_id[first:end],
            candidate_features=candidate_features[first:end],
            num_passed=passed[index],
            user_label=label[first : first + shown[index]],
            label_weight=label_weight[first : first + shown[index]],
            teacher_probability=probability[first : first + scored[index]],
            teacher_weight=teacher_weight[first : first + scored[index]],
            teacher_version=spec.teacher_version,
            true_probability=no_truth,
            request_category=request_category[index] if request_category.shape[1] else None,
            candidate_category=(
                candidate_category[first:end] if candidate_category.shape[1] else None
            ),
        )


def _ids(vocabulary: Vocabulary, key: Int64[np.ndarray, "n"]) -> Int32[np.ndarray, "n"]:
    place, known = look_up(vocabulary.key, key)
    assert known.all()
    return np.asarray(vocabulary.number)[place]


def _history(
    layout: LogLayout, encoding: Encoding, requests: NamedColumns
) -> tuple[Int64[np.ndarray, "n+1"], Int32[np.ndarray, "all"]]:
    """The start of each request's history, and the ids of all histories; unknown items left out."""
    if layout.history is None:
        return np.zeros(num_rows(requests) + 1, np.int64), np.zeros(0, np.int32)
    column = requests[f"feature:{layout.history.name}"]
    assert isinstance(column, Ragged)
    place, known = look_up(encoding.vocabularies["item"].key, column.values)
    ids = np.asarray(encoding.vocabularies["item"].number)[place[known]]
    return compacted(column.lengths, known), ids


def _dense(
    encoding: Encoding, features: list[Feature], table: NamedColumns
) -> Float32[np.ndarray, "n F"]:
    """Dense features side by side; one column of zeros if there are none."""
    if not features:
        return np.zeros((num_rows(table), 1), np.float32)
    matrix = np.empty((num_rows(table), len(features)), np.float32)
    for index, feature in enumerate(features):
        mean, scale, missing = encoding.scales[feature.name]
        number = np.asarray(table[f"feature:{feature.name}"], np.float64)
        with np.errstate(over="ignore"):
            scaled = ((number - mean) / scale).astype(np.float32)
        matrix[:, index] = np.where(np.isfinite(scaled), scaled, np.float32(missing))
    return matrix


def _categories(
    layout: LogLayout, encoding: Encoding, table: NamedColumns, *owners: str
) -> Int32[np.ndarray, "n K"]:
    """Category ids side by side, in the order of the features; -1 fills bags up."""
    starts = dict(
        zip(
            (category.name for category in encoding.spec.categories),
            encoding.spec.category_starts,
            strict=True,
        )
    )
    columns = [np.zeros((num_rows(table), 0), np.int32)]
    for feature in layout.categories(*owners):
        column = table[f"feature:{feature.name}"]
        if isinstance(column, Ragged):
            ids = np.full((num_rows(table), feature.length), -1, np.int32)
            row = np.repeat(np.arange(num_rows(table)), column.lengths)
            place = np.arange(len(column.values)) - np.repeat(column.start[:-1], column.lengths)
            ids[row, place] = starts[feature.name] + _numbers(encoding, feature, column.values)
        else:
            ids = (starts[feature.name] + _numbers(encoding, feature, column))[:, None]
        columns.append(ids.astype(np.int32))
    return np.concatenate(columns, axis=1)


def _numbers(
    encoding: Encoding, feature: Feature, key: Int64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """The number of each value within its feature; 0 for a missing, rare or unheard-of one."""
    if feature.hashed:
        bucket = 1 + (mixed(key) % np.uint64(feature.size)).astype(np.int64)
        return np.where(key == MISSING, 0, bucket)
    vocabulary = encoding.vocabularies[f"feature:{feature.name}"]
    place, known = look_up(vocabulary.key, key)
    number = np.append(np.asarray(vocabulary.number), 0)
    return np.where(known, number[place], 0)
