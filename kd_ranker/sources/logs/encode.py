"""The last pass: requests and candidates in their final order, and pieces of them as blocks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float32, Float64, Int, Int32, Int64, UInt64

from kd_ranker.batch import FeatureSpec, Items, Owner, Stage
from kd_ranker.distillation.teacher_signal import probability_of_rank, probability_of_score
from kd_ranker.requests.request import SPLITS, Block, ranges, starts_of
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import LogLayout, early_score

USER, ITEM = "user", "item"
# Candidates that each process holds at a time.
PIECE = 2**18
_ORDER_OF_CANDIDATES = "number, stage DESC, position NULLS LAST, item"
# The number of a piece is its split times this, plus a number that ascends with its requests.
_SPLIT = 2**32


class Piece(NamedTuple):
    """Consecutive requests of one split, on disk.

    Each reader returns a table with the columns of `request_fields` or `candidate_fields` in
    `log.sql`. A process of another machine can call it.
    """

    split: str
    requests: Callable[[], pa.Table]
    candidates: Callable[[], pa.Table]


def write_ordered(database: Database) -> list[Piece]:
    """Write requests and candidates in their final order, and return the pieces to read.

    A piece has as many requests as have `PIECE` candidates on average, and less than four times as
    many candidates, or one request.
    """
    (candidates,) = database.rows("""SELECT avg(size) AS mean, max(size) AS largest
        FROM (SELECT count(*) AS size FROM used GROUP BY number) AS sizes""")
    num_requests = max(1, int(min(PIECE / candidates["mean"], 4 * PIECE / candidates["largest"])))
    # No piece has requests of two splits.
    piece = f"split * {_SPLIT} + number // {num_requests}"

    def count_rows(table: str) -> pa.Table:
        query = f"SELECT {piece} AS piece, count(*) AS size FROM {table}"
        return database.fetch(f"{query} GROUP BY piece ORDER BY piece")

    # Each request has candidates, so both tables have the same pieces.
    pieces = count_rows("requests")
    splits = [SPLITS[number // _SPLIT] for number in pieces["piece"].to_pylist()]
    request_readers = database.write_ordered("request_fields", "number", piece, pieces)
    candidate_readers = database.write_ordered(
        "candidate_fields", _ORDER_OF_CANDIDATES, piece, count_rows("used")
    )
    return [
        Piece(split, read_requests, read_candidates)
        for split, read_requests, read_candidates in zip(
            splits, request_readers, candidate_readers, strict=True
        )
    ]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The rules by which values and numbers of a log become ids and features.

    Attributes:
      spec: the sizes that follow.
      vocabularies: `user`, `item` and `feature:<name>` of each categorical feature that is not
        hashed -> the `value`s of the log and their `id`s, by id; those of a feature are category
        ids.
      rules: the content of `transforms.json`: `dense` and `categories` have the features of each
        field by column, `history` those of events, and `kinds` the key of each column of ids or
        categories in the config -> `columns.kind_of` its values, where known.
    """

    spec: FeatureSpec
    vocabularies: Mapping[str, pa.Table]
    rules: Mapping[str, Any]

    @functools.cached_property
    def _lookups(self) -> dict[str, "_Lookup"]:
        """The vocabularies that requests are encoded with."""
        return {
            name: _Lookup(
                values=pd.Index(table["value"].combine_chunks().to_numpy(zero_copy_only=False)),
                ids=np.append(table["id"].to_numpy(), np.int32(-1)),
            )
            for name, table in self.vocabularies.items()
            if name != USER
        }

    def ids_of(self, name: str, values: pa.Array, missing: int) -> Int64[np.ndarray, "n"]:
        """Return the id of each value in a vocabulary, and `missing` for null and others."""
        lookup = self._lookups[name]
        encoded = values.dictionary_encode()
        distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
        places: Any = lookup.values.get_indexer(distinct) if len(distinct) else []
        # The last place is that of null, whose index is -1.
        places = np.append(places, -1).astype(int)
        distinct_ids = np.where(places < 0, missing, lookup.ids[places])
        return distinct_ids[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


class _Lookup(NamedTuple):
    """A vocabulary to look up."""

    values: pd.Index
    ids: Int32[np.ndarray, "values+1"]  # the last one is -1


def item_matrix(
    encoding: Encoding, items: pa.Table, known: Items | None = None
) -> tuple[Float32[np.ndarray, "items F"], Int32[np.ndarray, "items I"]]:
    """Return the features and category ids of items by id, from the table `item_fields` of a log.

    Items of the log replace some of those that are `known` in a dataset, and follow the others.
    """
    logged = (
        _dense(encoding, "item_features", encoding.spec.item_features, items),
        _categories(encoding, "item_category", items),
    )
    if known is None:
        return logged
    ids = items["id"].to_numpy()
    num_new = max(0, ids.max() + 1 - len(known.features))
    features = np.pad(known.features, ((0, num_new), (0, 0)))
    category = np.pad(known.category, ((0, num_new), (0, 0)))
    features[ids], category[ids] = logged
    return features, category


def encode_requests(
    layout: LogLayout, encoding: Encoding, piece: Piece, num_earlier: int = 0
) -> Block:
    """Return the requests of a piece as a block; those for training lack facts for the evaluation.

    The ids of requests are those of the log if they are integers. Else they are numbers, which
    follow the `num_earlier` requests of older files.
    """
    requests, candidates = piece.requests(), piece.candidates()
    spec, tasks = encoding.spec, layout.tasks
    owner = candidates["number"].to_numpy() - requests["number"][0].as_py()
    stage = candidates["stage"].to_numpy()
    teacher_weight = candidates["teacher_weight"].to_numpy()
    label = np.stack([candidates[f"label:{task}"].to_numpy() for task in tasks], axis=1)
    signal = np.full((len(owner), len(tasks)), np.nan)
    for task in layout.scored_tasks:
        signal[:, tasks.index(task)] = floats_of(candidates, f"teacher:{task}")

    def count(chosen: np.ndarray) -> Int64[np.ndarray, "requests"]:
        return np.bincount(owner[chosen], minlength=requests.num_rows).astype(np.int64)

    retrieved = count(stage >= Stage.RETRIEVED)
    passed = count(stage >= Stage.PASSED)
    shown = count(stage >= Stage.SHOWN)
    # Where the teacher scored beyond the passed candidates, all are kept.
    has_signal = ~np.isnan(signal).all(axis=1)
    scored_beyond = count(has_signal & (stage < Stage.PASSED)) > 0
    scored = np.where(scored_beyond, retrieved, passed) if layout.scored_tasks else 0 * passed

    probability = signal
    if layout.teacher_signal == "rank":
        probability = _ranks(signal, teacher_weight, owner)
    elif layout.teacher_signal == "score":
        probability = probability_of_score(signal)
    history = _history(encoding, requests)
    facts = _facts(layout, candidates) if piece.split != "train" else {}
    numbers: dict[Owner, Int64[np.ndarray, "n"]] = {
        "request": np.ones(requests.num_rows, np.int64),
        "event": history.lengths,
        "candidate": retrieved,
        "shown": shown,
        "scored": scored,
        "known": retrieved if facts else 0 * retrieved,
    }
    unknown = np.full(numbers["known"].sum(), np.nan, np.float32)
    early_scores = np.empty((len(unknown), len(layout.early_scores)), np.float32)
    for place, column in enumerate(layout.early_scores):
        early_scores[:, place] = facts.get(early_score(column), unknown)
    # Shown and scored candidates are the first ones of their request.
    first = starts_of(retrieved)[:-1]
    shown_rows = ranges(first, shown)
    scored_rows = ranges(first, scored)
    values = {
        "request_id": _request_ids(requests, num_earlier),
        "time": requests["time"].to_numpy(),
        "user_id": requests["user_id"].to_numpy().astype(np.int32),
        "user_features": _dense(encoding, "user_features", spec.user_features, requests),
        "context": _dense(encoding, "context", spec.context_features, requests),
        "request_category": _categories(encoding, "request_category", requests),
        "history_id": history.items,
        "history_features": history.features,
        "item_id": candidates["item_id"].to_numpy(),
        "candidate_features": _dense(
            encoding, "candidate_features", spec.candidate_features, candidates
        ),
        "candidate_category": _categories(encoding, "candidate_category", candidates),
        "num_passed": passed,
        "user_label": np.maximum(label[shown_rows], 0).astype(np.uint8),
        "label_weight": candidates["label_weight"].to_numpy()[shown_rows],
        "teacher_probability": probability[scored_rows].astype(np.float32),
        "teacher_weight": teacher_weight[scored_rows],
        "teacher_version": np.full(requests.num_rows, spec.teacher_version, object),
        "true_probability": np.stack([unknown] * len(tasks), axis=1),
        "incumbent": facts.get("incumbent", unknown),
        "propensity": facts.get("propensity", unknown),
        "early_scores": early_scores,
    }
    return Block(values, numbers)


def _request_ids(requests: pa.Table, num_earlier: int) -> Int64[np.ndarray, "n"]:
    ids = requests["request"]
    if pa.types.is_integer(ids.type):  # without the sign
        return ids.to_numpy().astype(np.int64) & np.int64(2**63 - 1)
    return num_earlier + requests["number"].to_numpy().astype(np.int64)


def _facts(layout: LogLayout, candidates: pa.Table) -> dict[str, Float32[np.ndarray, "n"]]:
    """Return the columns for the evaluation; only shown candidates have a propensity."""
    facts = {
        name: floats_of(candidates, name).astype(np.float32)
        for name in layout.facts
        if name in candidates.column_names
    }
    if "propensity" in facts:
        facts["propensity"][candidates["stage"].to_numpy() < Stage.SHOWN] = np.nan
    return facts


def _ranks(
    position: Float64[np.ndarray, "n T"],
    weight: Float32[np.ndarray, "n"],
    owner: Int[np.ndarray, "n"],
) -> Float64[np.ndarray, "n T"]:
    """Return positions as numbers in (0, 1), by their ranks in the request; ties share a mean."""
    proper = (position >= 0) & np.isfinite(position) & (weight > 0)[:, None]
    ranks = pd.DataFrame(np.where(proper, position, np.nan)).groupby(owner).rank() - 1
    return probability_of_rank(ranks.to_numpy())


def floats_of(table: pa.Table, name: str) -> Float64[np.ndarray, "n"]:
    """Return a column of numbers, NaN where it is null."""
    return table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()


class _History(NamedTuple):
    """The events of some requests."""

    lengths: Int64[np.ndarray, "n"]  # how many each request has
    items: Int32[np.ndarray, "events"]
    features: Float32[np.ndarray, "events E"]


def _history(encoding: Encoding, requests: pa.Table) -> _History:
    """Return the events of requests, without those of unknown items."""
    history = encoding.rules["history"]
    if not history:
        return _History(
            lengths=np.zeros(requests.num_rows, np.int64),
            items=np.zeros(0, np.int32),
            features=np.zeros((0, 1), np.float32),
        )
    lengths, values = _lists(requests, history["name"])
    ids = encoding.ids_of(ITEM, values, -1)
    known = ids >= 0
    features = np.ones((len(ids), encoding.spec.history_features), np.float32)
    for place, feature in enumerate(history["features"]):
        lengths_of_feature, numbers = _lists(requests, feature["name"])
        # A request has a number for each event, or none.
        has_number = np.repeat(lengths_of_feature > 0, lengths)
        features[:, place] = 0
        features[has_number, place] = numbers.fill_null(0).to_numpy()
    num_known_before = starts_of(known)
    return _History(
        lengths=np.diff(num_known_before[starts_of(lengths)]),
        items=ids[known].astype(np.int32),
        features=features[known],
    )


def _dense(
    encoding: Encoding, field: str, width: int, table: pa.Table
) -> Float32[np.ndarray, "n width"]:
    """Normalize the dense features of a field.

    A field has a first column of zeros if the log has no such feature, and for items also if none
    of theirs is cheap. Features come after it.
    """
    features = encoding.rules["dense"][field]
    matrix = np.zeros((table.num_rows, width), np.float32)
    num_zero_columns = width - len(features)
    for column, feature in enumerate(features, num_zero_columns):
        number = floats_of(table, f"feature:{feature['name']}")
        with np.errstate(over="ignore"):
            scaled = ((number - feature["mean"]) / feature["scale"]).astype(np.float32)
        matrix[:, column] = np.where(np.isfinite(scaled), scaled, np.float32(feature["missing"]))
    return matrix


def _categories(encoding: Encoding, field: str, table: pa.Table) -> Int32[np.ndarray, "n K"]:
    """Return a field of category ids; -1 fills bags up."""
    columns = [np.zeros((table.num_rows, 0), np.int32)]
    for feature in encoding.rules["categories"][field]:
        first, buckets = feature["first_id"], feature["buckets"]
        lengths, values = _lists(table, feature["name"])
        if buckets is None:
            known = encoding.ids_of(f"feature:{feature['name']}", values, first)
        else:
            bucket = first + 1 + (hashes_of(values) % np.uint64(buckets)).astype(np.int64)
            known = np.where(values.is_valid().to_numpy(zero_copy_only=False), bucket, first)
        ids = np.full((table.num_rows, feature["length"]), -1, np.int32)
        ids[np.arange(feature["length"]) < lengths[:, None]] = known
        columns.append(ids)
    return np.concatenate(columns, axis=1)


def _lists(table: pa.Table, feature: str) -> tuple[Int64[np.ndarray, "n"], pa.Array]:
    """Return the length of each row's list, and all values; a single value is a list of one."""
    column = table[f"feature:{feature}"].combine_chunks()
    if not pa.types.is_list(column.type):
        return np.ones(len(column), np.int64), column
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64), column.flatten()


def hashes_of(values: pa.Array) -> UInt64[np.ndarray, "n"]:
    """Hash each value: integers by splitmix64, texts by SipHash; null has any hash."""
    if pa.types.is_integer(values.type):
        numbers = values.fill_null(0).to_numpy(zero_copy_only=False)
        return splitmix64(numbers.astype(np.uint64, casting="unsafe"))
    texts = values.fill_null("").to_numpy(zero_copy_only=False)
    return splitmix64(pd.util.hash_array(texts))


def splitmix64(bits: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Take a step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a bijection.

    >>> splitmix64(np.array([0, 1], np.uint64)).tolist()
    [16294208416658607535, 10451216379200822465]
    """
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
