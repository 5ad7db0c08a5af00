"""Writes a log in Parquet files to try `configs/parquet.py` on, of any size.

    python scripts/make_log.py DIRECTORY [--rows N] [--files N] [--by-request] [--faults SHARE]

Requests of a feed over thirty days. Users and items have a few hidden traits, and the items of an
author resemble each other. The better the traits match, the more a candidate is watched and liked.
Of a hundred candidates, today's early ranker passes fifty: it knows the truth vaguely. The final
ranker errs a little, and shows ten. It scores what was passed, and all candidates of some requests.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CANDIDATES, PASSED, SHOWN = 100, 50, 10
TRAITS, HISTORY = 4, 20
FIRST, DAYS = 1_700_000_000, 30
COUNTRIES = np.array([f"country {number}" for number in range(60)])
STAGES = np.array(["retrieved", "passed", "shown"])
DEVICES = np.array(["phone", "tablet", "television", "web"])
SOURCES = np.array(["following", "popular", "similar items", "trending"])
TAGS = np.array([f"tag {number}" for number in range(500)])


def main() -> None:
    """Writes the log that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=200_000, help="candidates in all")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--users", type=int, default=0, help="0: one for every five requests")
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument(
        "--scored-whole",
        type=float,
        default=0.1,
        help="the share of requests of which the final ranker scored all candidates",
    )
    parser.add_argument("--by-request", action="store_true", help="a row a request, with lists")
    parser.add_argument("--faults", type=float, default=0.0, help="the share of rows with a fault")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    requests = max(arguments.rows // CANDIDATES, arguments.files)
    world = make_world(arguments.users or max(requests // 5, 1), arguments.items, arguments.seed)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, requests, arguments.files + 1).astype(int)
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        generator = np.random.default_rng([arguments.seed, 1, number])
        path = arguments.directory / f"part-{number:04d}.parquet"
        writer = None
        for first in range(start, end, 2000):
            table = make_requests(
                world,
                np.arange(first, min(first + 2000, end)),
                requests,
                arguments.scored_whole,
                generator,
            )
            if arguments.faults:
                table = with_faults(table, arguments.faults, generator)
            if arguments.by_request:
                table = by_request(table)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
        if writer:
            writer.close()
    print(f"{requests:,} requests of {CANDIDATES} candidates in {arguments.directory}")


def make_world(users: int, items: int, seed: int) -> dict[str, np.ndarray]:
    """Users and items as columns, each with hidden traits."""
    generator = np.random.default_rng([seed, 0])
    authors = max(items // 10, 1)
    author = generator.integers(0, authors, items)
    item_traits = generator.normal(size=(authors, TRAITS))[author]
    item_traits += 0.5 * generator.normal(size=(items, TRAITS))
    return {
        "user_traits": generator.normal(size=(users, TRAITS)).astype(np.float32),
        "item_traits": item_traits.astype(np.float32),
        "age": generator.integers(13, 80, users),
        "country": generator.zipf(1.6, users) % len(COUNTRIES),
        "author": author,
        "duration": generator.lognormal(3, 1, items).astype(np.float32),
        "quality": generator.normal(size=items).astype(np.float32),
        "tags": generator.integers(0, len(TAGS), (items, 3)),
    }


def make_requests(
    world: dict[str, np.ndarray],
    numbers: np.ndarray,
    requests: int,
    scored_whole: float,
    generator: np.random.Generator,
) -> pa.Table:
    """Some of all requests, a row a candidate, in the order of time."""
    count = len(numbers)
    users = len(world["age"])
    items = len(world["author"])
    user = generator.integers(0, users, count)
    # A request's candidates are different items: a random stretch of a random order.
    start = generator.integers(0, items, count)
    step = 2 * generator.integers(1, items // 2, count)
    step += np.gcd(step + 1, items) == 1
    item = (start[:, None] + step[:, None] * np.arange(CANDIDATES)) % items
    match = np.einsum("rt,rct->rc", world["user_traits"][user], world["item_traits"][item])
    logit = 0.5 * match + 0.5 * world["quality"][item] - 1
    probability = [1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(1.5 - logit))]
    teacher = [
        1 / (1 + np.exp(np.log(1 / truth - 1) + 0.3 * generator.normal(size=truth.shape)))
        for truth in probability
    ]
    score = 0.5 * logit + generator.normal(size=logit.shape)
    passed = _place(score) < PASSED
    position = _place(np.where(passed, teacher[0] + teacher[1], -1))
    shown = position < SHOWN
    stage = np.where(shown, 2, np.where(passed, 1, 0))
    scored = passed | (generator.random((count, 1)) < scored_whole)
    row = np.repeat(np.arange(count), CANDIDATES)

    def flat(values: np.ndarray, known: np.ndarray | None = None) -> pa.Array:
        return pa.array(values.ravel(), mask=None if known is None else ~known.ravel())

    def text(names: np.ndarray, index: np.ndarray) -> pa.Array:
        return pa.array(names).take(pa.array(index.ravel()))

    second = FIRST + numbers * (DAYS * 86_400) // requests
    # A history: of some items, those that match the user best.
    recent = generator.integers(0, items, (count, 5 * HISTORY))
    match = np.einsum("rt,rht->rh", world["user_traits"][user], world["item_traits"][recent])
    recent = np.take_along_axis(recent, np.argsort(-match, axis=1)[:, :HISTORY], axis=1)
    item_names = pa.array(np.char.add("item-", np.arange(items).astype(str)))
    columns = {
        "request_id": text(np.char.add("request-", numbers.astype(str)), row),
        "time": pa.array(second[row], pa.timestamp("s")).cast(pa.timestamp("ms")),
        "user_id": pa.array(user[row] + 1000),
        "item_id": item_names.take(flat(item)),
        "stage": text(STAGES, stage),
        "position": flat(position, shown),
        "teacher_version": pa.array(["v1"]).take(pa.array(np.zeros(len(row), int))),
        "age": pa.array(world["age"][user][row]),
        "country": text(COUNTRIES, world["country"][user][row]),
        "hour": pa.array((second // 3600 % 24)[row]),
        "device": text(DEVICES, generator.integers(0, len(DEVICES), count)[row]),
        "author": flat(world["author"][item]),
        "duration": flat(world["duration"][item]),
        "quality": flat(world["quality"][item]),
        "tags": pa.FixedSizeListArray.from_arrays(text(TAGS, world["tags"][item]), 3).cast(
            pa.list_(pa.string())
        ),
        "score": flat(score.astype(np.float32)),
        "source": text(SOURCES, generator.integers(0, len(SOURCES), (count, CANDIDATES))),
        "recent": pa.FixedSizeListArray.from_arrays(
            item_names.take(flat(recent[row])), HISTORY
        ).cast(pa.list_(pa.string())),
    }
    for task, truth, value in zip(("watch", "like"), probability, teacher, strict=True):
        label = (generator.random(truth.shape) < truth).astype(np.int8)
        columns[task] = flat(label, shown)
        columns[f"teacher_probability_{task}"] = flat(value.astype(np.float32), scored)
    return pa.table(columns)


def _place(score: np.ndarray) -> np.ndarray:
    """The place of each candidate of a request, the largest score first."""
    return np.argsort(np.argsort(-score, axis=1), axis=1)


def with_faults(table: pa.Table, share: float, generator: np.random.Generator) -> pa.Table:
    """The same rows with missing ids, wrong labels and teachers, and repeated rows."""

    def replaced(name: str, value: object) -> None:
        nonlocal table
        column = table[name].combine_chunks()
        wrong = pa.array(generator.random(len(table)) < share / 5)
        values = pa.scalar(value, column.type)
        changed = pa.compute.if_else(wrong, values, column)
        table = table.set_column(table.schema.get_field_index(name), name, changed)

    replaced("item_id", None)
    replaced("watch", 2)
    replaced("stage", "lost")
    replaced("teacher_probability_watch", 1.7)
    again = np.flatnonzero(generator.random(len(table)) < share / 5)
    return pa.concat_tables([table, table.take(pa.array(again))])


def by_request(table: pa.Table) -> pa.Table:
    """The same log with a row a request."""
    of_request = ["time", "user_id", "age", "country", "hour", "device", "recent"]
    key = table["request_id"].combine_chunks()
    order = pa.compute.sort_indices(key)
    table = table.take(order)
    key = table["request_id"].to_numpy()
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    offsets = pa.array(np.append(first, len(key)).astype(np.int32))
    columns = {}
    for name in table.schema.names:
        column = table[name].combine_chunks()
        if name in ("request_id", *of_request):
            columns[name] = column.take(pa.array(first))
        else:
            columns[name] = pa.ListArray.from_arrays(offsets, column)
    return pa.table(columns)


if __name__ == "__main__":
    main()
