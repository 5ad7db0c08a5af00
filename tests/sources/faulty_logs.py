"""Logs with every kind of fault, in both layouts, and in plain Python what is to become of them."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.batch import Request
from kd_ranker.config.defaults import feature
from kd_ranker.configs import parquet
from kd_ranker.requests.request import SPLITS, requests_in
from kd_ranker.requests.source import Source
from kd_ranker.sources.logs.layout import ALLOWABLE, LogLayout, read_layout

TASKS = ("watch", "like")
RETRIEVED = 12
NAN, INF = math.nan, math.inf
OF_REQUEST = ("request_id", "time", "user_id", "age", "country", "hour", "recent", "spots")


@dataclasses.dataclass
class Row:
    """A row of the layout with a row a request: what belongs to it, and its candidates."""

    of_request: dict[str, Any]
    candidates: list[dict[str, Any]]


def config(path: Path | str, directory: Path | str, **changes: Any) -> ConfigDict:
    """A config for logs of `make_rows`; `split="user"` changes `data.split`."""
    result = parquet()
    result.tasks, result.value_weights = TASKS, (1.0, 2.0)
    result.data.path, result.data.dir = str(path), str(directory)
    result.data.columns.teacher_version = "version"
    result.data.columns.label_weight = "weight"
    result.data.teacher_version = "v1"
    result.data.allow = ALLOWABLE  # they are small, and their clock starts in 1970
    result.data.features = ConfigDict(
        dict(
            age=feature("user", "dense"),
            country=feature("user", "category"),
            hour=feature("context", "dense", standardize=False),
            spots=feature("context", "bag", length=2, hashed=True, size=7),
            recent=feature("user", "history", length=4),
            author=feature("item", "category", size=5),
            duration=feature("item", "dense"),
            quality=feature("item", "dense", cheap=False),
            tags=feature("item", "bag", length=3),
            score=feature("candidate", "dense"),
            source=feature("candidate", "category"),
        )
    )
    result.data.validation_share, result.data.test_share = 0.1, 0.3
    result.data.memory = 0.5
    result.funnel.retrieved, result.funnel.passed, result.funnel.shown = RETRIEVED, 6, 3
    result.funnel.report_at = (3, 6)
    for key, value in changes.items():
        result.data[key] = value
    return result


def made_small(config: ConfigDict, steps: int = 2) -> ConfigDict:
    """The config, with small models and few steps on one device."""
    config.parallel.devices = 1
    config.batch.requests = 8
    config.batch.candidates = 12
    for train in (config.train, config.teacher.train):
        train.update(steps=steps, log_every=2, checkpoint_every=steps, eval_every=0)
    config.student.update(width=4, interests=2, hidden=(8,))
    config.teacher.update(width=4, attention_hidden=4, experts=2, expert_hidden=4, cross_layers=1)
    config.evaluation.requests = 8
    return config


def layout(config: ConfigDict) -> LogLayout:
    """The layout of a config."""
    return read_layout(config.data, config.tasks, config.funnel)


def open_source(config: ConfigDict) -> Source:
    """The source of a config."""
    from kd_ranker.sources.logs.source import open_source

    return open_source(config.data, config.tasks, config.funnel)


def make_rows(seed: int, requests: int = 30, texts: bool = False, faults: float = 0.0) -> list[Row]:
    """Requests in the order of time; with `faults`, each kind of fault befalls such a share.

    Ids are whole numbers, or `texts`. All times differ.
    """
    generator = np.random.default_rng(seed)
    items = {
        number: {
            "author": int(generator.integers(0, 9)),
            "duration": round(float(generator.normal(50, 20)), 3),
            "quality": round(float(generator.normal()), 3),
            "tags": [f"t{tag}" for tag in generator.integers(0, 6, generator.integers(0, 5))],
        }
        for number in range(40)
    }

    def name(kind: str, number: int) -> Any:
        return f"{kind}-{number}" if texts else number + 100

    def strikes(share: float = 1.0) -> bool:
        return bool(generator.random() < faults * share)

    rows: list[Row] = []
    for number in range(requests):
        chosen = generator.permutation(40)[: generator.integers(3, RETRIEVED + 1)]
        shown = 0 if strikes() else 3
        candidates = [
            _candidate(generator, name("item", int(item)), items[int(item)], place, shown)
            for place, item in enumerate(chosen)
        ]
        history = generator.integers(0, 50, generator.integers(0, 7)).tolist()
        of_request: dict[str, Any] = {
            "request_id": name("request", number),
            "time": 1_000_000 + 60 * number,
            "user_id": name("user", int(generator.integers(0, 8))),
            "age": float(generator.integers(10, 80)),
            "country": f"country {generator.integers(0, 5)}",
            "hour": float(generator.integers(0, 24)),
            "recent": [name("item", item) for item in history],
            "spots": [f"s{spot}" for spot in generator.integers(0, 5, generator.integers(0, 4))],
        }
        for candidate in candidates:
            _spoil_candidate(generator, candidate, strikes)
        _spoil_request(generator, of_request, strikes)
        if strikes():
            candidates.insert(int(generator.integers(len(candidates))), dict(candidates[0]))
        if strikes():
            more = [n for n in range(40) if n not in chosen][: RETRIEVED + 3 - len(candidates)]
            candidates += [
                _candidate(generator, name("item", n), items[n], place, 0)
                for place, n in enumerate(more, len(candidates))
            ]
        rows.append(Row(of_request, candidates))
        if strikes():
            # A part of the request in a row of its own, of another user or another time.
            half = len(candidates) // 2
            other = dict(of_request)
            if strikes(share=0.5 / max(faults, 1e-9)):
                other["user_id"] = name("user", 9)
            else:
                other["time"] = 1_000_000 + 60 * number + 30
            rows[-1].candidates = candidates[:half]
            rows.append(Row(other, candidates[half:]))
    return rows


def _candidate(
    generator: np.random.Generator, item: Any, of_item: dict, place: int, shown: int
) -> dict[str, Any]:
    is_shown, is_passed = place < shown, place < 6
    return {
        "item_id": item,
        "stage": "shown" if is_shown else "passed" if is_passed else "retrieved",
        "position": place if is_shown else None,
        "watch": int(generator.integers(0, 2)) if is_shown else None,
        "like": int(generator.integers(0, 2)) if is_shown else None,
        "weight": float(generator.integers(1, 4)) if is_shown else None,
        "teacher_probability_watch": float(generator.random()) if is_passed else None,
        "teacher_probability_like": float(generator.random()) if is_passed else None,
        "version": "v1",
        "score": float(generator.normal()),
        "source": f"source {generator.integers(0, 3)}",
        **of_item,
    }


def _spoil_candidate(generator: np.random.Generator, candidate: dict, strikes: Any) -> None:
    for name, values in (
        ("item_id", [None]),
        ("stage", [None, "lost"]),
        ("watch", [2, -1, None]),
        ("weight", [-1.0, NAN, INF, None]),
        ("teacher_probability_watch", [NAN, 1.5, -0.25, INF, None]),
        ("version", ["v0", None]),
        ("score", [NAN, INF, None]),
        ("source", [None, "", f"rare {candidate['item_id']}"]),
        ("duration", [NAN, None, 77.0]),
        ("author", [None, 8]),
        ("tags", [None, [], [None], ["t1", None, "t2"]]),
    ):
        if strikes():
            candidate[name] = values[generator.integers(len(values))]


def _spoil_request(generator: np.random.Generator, of_request: dict, strikes: Any) -> None:
    for name, values in (
        ("request_id", [None]),
        ("time", [None]),
        ("user_id", [None]),
        ("age", [NAN, None, -INF]),
        ("country", [None, ""]),
        ("recent", [None, []]),
        ("spots", [None, [], [None]]),
    ):
        if strikes():
            of_request[name] = values[generator.integers(len(values))]


def write_log(
    directory: Path,
    rows: list[Row],
    by_request: bool = False,
    files: int = 1,
    row_group: int = 64,
    shuffle: int | None = None,
) -> Path:
    """Writes rows to Parquet files, in their order, or shuffled with a seed."""
    directory.mkdir(parents=True)
    if by_request:
        flat = [_listed(row) for row in rows]
    else:
        flat = [row.of_request | candidate for row in rows for candidate in row.candidates]
    if shuffle is not None:
        flat = [flat[i] for i in np.random.default_rng(shuffle).permutation(len(flat))]
    schema = _schema(rows, by_request)
    for number, part in enumerate(np.array_split(np.arange(len(flat)), files)):
        table = pa.Table.from_pylist([flat[i] for i in part], schema)
        pq.write_table(table, directory / f"part-{number}.parquet", row_group_size=row_group)
    return directory


def _listed(row: Row) -> dict[str, Any]:
    names = row.candidates[0] if row.candidates else {}
    return row.of_request | {name: [c[name] for c in row.candidates] for name in names}


def _schema(rows: list[Row], by_request: bool) -> pa.Schema:
    texts = any(isinstance(row.of_request["user_id"], str) for row in rows)
    id_ = pa.string() if texts else pa.int64()
    types = {
        "request_id": id_, "time": pa.int64(), "user_id": id_, "age": pa.float64(),
        "country": pa.string(), "hour": pa.float32(), "recent": pa.list_(id_),
        "spots": pa.list_(pa.string()),
    }  # fmt: skip
    if "stars" in rows[0].of_request:
        types |= {"stars": pa.list_(pa.float32()), "views": pa.list_(pa.list_(pa.float64()))}
    of_candidate = {
        "item_id": id_, "stage": pa.string(), "position": pa.int32(), "watch": pa.int8(),
        "like": pa.int8(), "weight": pa.float64(), "teacher_probability_watch": pa.float64(),
        "teacher_probability_like": pa.float32(), "version": pa.string(), "score": pa.float64(),
        "source": pa.string(), "author": pa.int32(), "duration": pa.float64(),
        "quality": pa.float32(), "tags": pa.list_(pa.string()),
    }  # fmt: skip
    if "embedding" in rows[0].candidates[0]:
        of_candidate["embedding"] = pa.list_(pa.float32(), 3 if texts else -1)
    for name, type_ in of_candidate.items():
        types[name] = pa.list_(type_) if by_request else type_
    return pa.schema(types.items())


# From here on, what is to become of a log, restated without any of the project's code.


@dataclasses.dataclass
class Restated:
    """What a log holds: requests by their ids, and how many candidates each reason costs."""

    requests: dict[Any, dict[str, Any]]
    reasons: collections.Counter
    candidates: int
    items: dict[Any, dict[str, Any]]


def restate(rows: list[Row], of: ConfigDict) -> Restated:
    """Reads a log as `docs/own_logs.md` says."""
    reasons: collections.Counter = collections.Counter()
    candidates = 0
    kept: dict[Any, list[tuple[dict, dict]]] = collections.defaultdict(list)
    times: dict[Any, list[int]] = collections.defaultdict(list)
    for row in rows:
        for candidate in row.candidates:
            candidates += 1
            if row.of_request["request_id"] is not None and row.of_request["time"] is not None:
                times[row.of_request["request_id"]].append(row.of_request["time"])
            if reason := _reason(row.of_request, candidate):
                reasons[reason] += 1
            else:
                kept[row.of_request["request_id"]].append((row.of_request, candidate))
    requests = {}
    for request, pairs in kept.items():
        number = collections.Counter(head["user_id"] for head, _ in pairs)
        user = min(number, key=lambda user: (-number[user], user))
        reasons["several_users"] += sum(head["user_id"] != user for head, _ in pairs)
        pairs = [(head, candidate) for head, candidate in pairs if head["user_id"] == user]
        seen, unique = set(), []
        for _, candidate in pairs:
            if candidate["item_id"] in seen:
                reasons["duplicate_item"] += 1
            else:
                seen.add(candidate["item_id"])
                unique.append(candidate)
        order = ["shown", "passed", "retrieved"]
        unique.sort(
            key=lambda c: (
                order.index(c["stage"]),
                INF if c["position"] is None else c["position"],
                c["item_id"],
            )
        )
        reasons["beyond_retrieved"] += len(unique[RETRIEVED:])
        requests[request] = {
            **pairs[0][0],
            "time": min(times[request]),
            "user_id": user,
            "candidates": unique[:RETRIEVED],
        }
    ordered = sorted(min(t) for t in times.values())
    for request in requests.values():
        # The requests from this one on; all times differ.
        left = len(ordered) - ordered.index(request["time"])
        share = of.data.test_share
        request["split"] = "test" if left <= round(share * len(ordered)) else "train"
        share += of.data.validation_share
        if request["split"] == "train" and left <= round(share * len(ordered)):
            request["split"] = "validation"
    items: dict[Any, dict[str, Any]] = {}
    for request in sorted(requests.values(), key=lambda request: request["time"]):
        for candidate in request["candidates"]:
            items[candidate["item_id"]] = candidate
    reasons = collections.Counter({reason: n for reason, n in reasons.items() if n})
    return Restated(requests, reasons, candidates, items)


def _reason(head: dict, candidate: dict) -> str:
    if head["request_id"] is None:
        return "missing_request"
    if head["time"] is None:
        return "missing_time"
    if head["user_id"] is None:
        return "missing_user"
    if candidate["item_id"] is None:
        return "missing_item"
    if candidate["stage"] not in ("retrieved", "passed", "shown"):
        return "unknown_stage"
    if any(candidate[task] not in (0, 1, None) for task in TASKS):
        return "bad_label"
    return ""


def all_requests(source: Source) -> dict[str, list[Request]]:
    """The requests of all splits."""
    return {split: list(requests_in(source.blocks(split))) for split in SPLITS}


def comparable(request: Request) -> list:
    """A request as what == compares, NaN like any other."""
    return [
        value.tobytes() + str((value.shape, value.dtype)).encode()
        if isinstance(value, np.ndarray)
        else value
        for value in (getattr(request, f.name) for f in dataclasses.fields(request))
    ]


def same(one: dict[str, list[Request]], other: dict[str, list[Request]]) -> bool:
    """Whether two sources yield the same requests in the same order."""
    return all(
        [comparable(r) for r in one[split]] == [comparable(r) for r in other[split]]
        for split in SPLITS
    )
