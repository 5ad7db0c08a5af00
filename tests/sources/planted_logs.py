"""Logs of a feed whose every column was planted, to be written as Parquet files."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REQUESTS, CANDIDATES, PASSED, SHOWN = 200, 60, 20, 8
USERS, ITEMS = 80, 500
START = 1_700_000_000  # seconds since 1970
TASKS = {"click": -0.5, "like": -2.0}  # logit of the base rate

# Columns of a log that hold one value a request.
OF_REQUEST = (
    "request_id", "time", "user_id", "age", "country", "hour", "device", "recent_items",
    "interests", "item_count",
)  # fmt: skip


def make_columns(seed: int = 0, requests: int = REQUESTS) -> dict[str, list | np.ndarray]:
    """Column -> values, a candidate a row; None where there is none. Ids are numbers."""
    rng = np.random.default_rng(seed)
    user = rng.integers(USERS, size=requests)
    time = START + np.cumsum(rng.integers(1, 900, size=requests))
    taste = rng.normal(size=USERS)
    age, country = rng.integers(18, 80, size=USERS), rng.integers(5, size=USERS)
    quality, duration = rng.normal(size=ITEMS), rng.gamma(2.0, 30.0, size=ITEMS)
    category, author = rng.integers(12, size=ITEMS), rng.integers(90, size=ITEMS)
    tags = [sorted(rng.choice(40, size=rng.integers(1, 5), replace=False)) for _ in range(ITEMS)]
    interests = [sorted(rng.choice(12, size=3, replace=False)) for _ in range(USERS)]
    item = np.concatenate(
        [rng.choice(ITEMS, size=CANDIDATES, replace=False) for _ in range(requests)]
    )
    seen: list[list[int]] = [list(rng.choice(ITEMS, size=6)) for _ in range(USERS)]
    history = []
    for request in range(requests):
        history.append(seen[user[request]][-20:])
        seen[user[request]] += list(item[request * CANDIDATES :][:2])
    row = np.repeat(np.arange(requests), CANDIDATES)
    retrieval = rng.normal(size=len(row)) + 0.5 * quality[item]
    followed = rng.random(len(row)) < 0.1
    logit = taste[user[row]] * quality[item] + 0.5 * retrieval + followed
    # The order in which the funnel went through them: better ones come further, with noise.
    order = np.lexsort([-(logit + rng.normal(size=len(row))), row])
    rank = np.empty(len(row), int)
    rank[order] = np.tile(np.arange(CANDIDATES), requests)
    passed, shown = rank < PASSED, rank < SHOWN
    columns: dict[str, list | np.ndarray] = {
        "request_id": 10_000 + row,
        "time": time[row],
        "user_id": 5_000 + user[row],
        "item_id": 100_000 + item,
        "stage": np.where(shown, "shown", np.where(passed, "passed", "retrieved")),
        "position": [int(r) if s else None for r, s in zip(rank, shown, strict=True)],
        "label_weight": np.where(shown, 1.0, 0.0),
        "age": age[user[row]],
        "country": np.array(["de", "fr", "it", "jp", "us"])[country[user[row]]],
        "hour": (time[row] // 3600) % 24,
        "device": np.array(["ios", "android", "web"])[rng.integers(3, size=requests)[row]],
        "recent_items": [[100_000 + int(i) for i in history[r]] for r in row],
        "interests": [[int(i) for i in interests[u]] for u in user[row]],
        "duration": duration[item],
        "category_id": category[item],
        "author_id": 7_000_000_000 + author[item],
        "tags": [[f"tag{t}" for t in tags[i]] for i in item],
        "title": [f"the story number {i} of all that were ever told here" for i in item],
        "retrieval_score_7d": retrieval,
        "followed": followed.astype(int),
        "item_count": np.full(len(row), CANDIDATES) + user[row] % 3,
        "source": np.full(len(row), "feed"),
        "trace": [f"{rng.integers(2**62):x}" for _ in row],
    }
    dwell = np.zeros(len(row))
    for task, base in TASKS.items():
        probability = 1 / (1 + np.exp(-(logit + base)))
        label = (rng.random(len(row)) < probability).astype(int)
        dwell += label
        logged = np.clip(probability + 0.02 * rng.normal(size=len(row)), 0.001, 0.999)
        columns[task] = [int(y) if s else None for y, s in zip(label, shown, strict=True)]
        columns[f"teacher_probability_{task}"] = [
            float(p) if each else None for p, each in zip(logged, passed, strict=True)
        ]
    seconds = 3 + 20 * dwell + rng.gamma(1.0, 2.0, size=len(row))
    columns["dwell"] = [float(d) if s else None for d, s in zip(seconds, shown, strict=True)]
    columns["teacher_version"] = np.where(row % 20 == 3, "v1", "v2")
    return columns


def table_of(columns: Mapping[str, list | np.ndarray], rows: str = "candidate") -> pa.Table:
    """The columns as a table, with one row per candidate, or one per request with lists."""
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if rows == "candidate":
        return table
    starts = pa.array(np.arange(0, table.num_rows + 1, CANDIDATES, dtype=np.int32))
    by_request = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        if name in OF_REQUEST:
            by_request[name] = values.take(starts[:-1])
        else:
            by_request[name] = pa.ListArray.from_arrays(starts, values)
    return pa.table(by_request)


def write(table: pa.Table, folder: Path) -> Path:
    """Write a table as three files below `folder`; rows of a request may be in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = np.linspace(0, table.num_rows, 4).astype(int)
    for index, (start, end) in enumerate(itertools.pairwise(ends)):
        pq.write_table(table.slice(start, end - start), folder / f"part-{index:03}.parquet")
    return folder
