"""A dataset built of a log of `make_log.py` against DuckDB alone, on the same threads.

Plain DuckDB rejects the same rows, finds each request's time and user, its first features, the last
features of items and the ids of users and items, and writes candidates in the order of requests and
of the funnel to a Parquet file: `PLAIN`. It counts no faults and no values, which the project's
report does, and writes no records, packed rows and vocabularies. Each side runs in a process of its
own, whose peak of memory is reported. Both find the same numbers of requests and of candidates.
"""

import argparse
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import duckdb

from kd_ranker import api
from kd_ranker.configs import parquet
from kd_ranker.pipeline import datasets
from kd_ranker.requests.request import SPLITS

BAR, MEMORY = 1.2, 2.0  # times plain DuckDB; GiB
MAKE_LOG = Path(__file__).resolve().parent.parent / "make_log.py"

PLAIN = """
CREATE TEMP TABLE log AS SELECT filename, file_row_number AS row, request_id, user_id, item_id,
  epoch(time)::BIGINT AS time, position, watch, "like", teacher_probability_watch AS p_watch,
  teacher_probability_like AS p_like, score, source,
  CASE stage WHEN 'shown' THEN 3 WHEN 'passed' THEN 2 WHEN 'retrieved' THEN 1 ELSE 0 END AS stage
  FROM read_parquet('{log}/*.parquet', filename = true, file_row_number = true);
CREATE TEMP TABLE good AS SELECT * FROM log WHERE request_id <> '' AND time IS NOT NULL
  AND user_id IS NOT NULL AND item_id <> '' AND stage > 0 AND coalesce(watch, 0) IN (0, 1)
  AND coalesce("like", 0) IN (0, 1);
CREATE TEMP TABLE owner AS SELECT request_id, arg_max(user_id, n) AS user_id, min(time) AS time,
  min(place) AS place FROM (SELECT request_id, user_id, count(*) AS n, min(time) AS time,
  min((filename, row)) AS place FROM good GROUP BY ALL) GROUP BY request_id;
CREATE TEMP TABLE twice AS SELECT request_id, item_id, min((filename, row)) AS place FROM good
  GROUP BY ALL HAVING count(*) > 1;
CREATE TEMP TABLE used AS SELECT good.* EXCLUDE (time), owner.time FROM good
  JOIN owner USING (request_id, user_id) LEFT JOIN twice USING (request_id, item_id)
  WHERE twice.place IS NULL OR twice.place = (filename, row);
CREATE TEMP TABLE items AS SELECT item_id, row_number() OVER (ORDER BY n DESC, item_id) - 1 AS id,
  (last.filename, last.row) AS place FROM (SELECT item_id, count(*) AS n,
  max(struct_pack(time, filename, row)) AS last FROM used GROUP BY item_id);
CREATE TEMP TABLE users AS SELECT user_id, row_number() OVER (ORDER BY n DESC, user_id) - 1 AS id
  FROM (SELECT user_id, count(*) AS n FROM owner GROUP BY user_id);
COPY (SELECT used.* EXCLUDE (item_id, user_id), items.id AS item FROM used
  JOIN items USING (item_id) ORDER BY time, request_id, stage DESC, position NULLS LAST, item_id)
  TO '{out}' (FORMAT parquet);
CREATE TEMP VIEW whole AS SELECT *, (filename, file_row_number) AS place
  FROM read_parquet('{log}/*.parquet', filename = true, file_row_number = true);
COPY (SELECT owner.request_id, owner.time, users.id AS user_id, age, country, hour, device, recent
  FROM owner JOIN users USING (user_id) JOIN whole USING (place)
  ORDER BY owner.time, owner.request_id) TO '{out}.requests' (FORMAT parquet);
COPY (SELECT items.id, author, duration, quality, tags FROM items JOIN whole USING (place)
  ORDER BY items.id) TO '{out}.items' (FORMAT parquet);
"""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds both of a log of so many rows, with one thread and with two."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        flags = ["--rows", str(arguments.rows), "--files", "8", "--faults", "0.001"]
        subprocess.run([sys.executable, MAKE_LOG, log, *flags], check=True, capture_output=True)
        sides = {
            f"{name}, threads {threads}": _alone(build, str(log), threads)
            for threads in (1, 2)
            for name, build in (("plain DuckDB", plain), ("kd_ranker", ours))
        }
    ratios = {
        str(threads): sides[f"kd_ranker, threads {threads}"]["seconds"]
        / sides[f"plain DuckDB, threads {threads}"]["seconds"]
        for threads in (1, 2)
    }
    counts = {(side["requests"], side["candidates"]) for side in sides.values()}
    peak = max(of["peak GiB"] for side, of in sides.items() if side.startswith("kd_ranker"))
    return {
        "rows": arguments.rows,
        "ratio": ratios,
        "bar": BAR,
        "passed": max(ratios.values()) <= BAR and len(counts) == 1 and peak <= MEMORY + 1,
        "sides": sides,
    }


def _alone(build: Any, log: str, threads: int) -> dict[str, float]:
    # Spawned: it must not start with what this process holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(_timed, build, log, threads).result()


def _timed(build: Any, log: str, threads: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        requests, candidates = build(log, threads, folder)
        seconds = time.perf_counter() - start
    # In kilobytes; the dataset is written by processes of its own.
    peaks = [
        resource.getrusage(processes).ru_maxrss
        for processes in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return {
        "seconds": seconds,
        "requests": requests,
        "candidates": candidates,
        "peak GiB": max(peaks) / 2**20,
    }


def plain(log: str, threads: int, folder: str) -> tuple[int, int]:
    """`PLAIN`; how many requests and candidates it found."""
    limits: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads,
        "memory_limit": f"{MEMORY}GiB",
        "temp_directory": folder,
    }
    with duckdb.connect(config=limits) as connection:
        connection.execute(PLAIN.format(log=log, out=f"{folder}/requests.parquet"))
        counted = "SELECT count(DISTINCT request_id), count(*) FROM used"
        numbers = connection.execute(counted).fetchone()
    assert numbers
    return int(numbers[0]), int(numbers[1])


def ours(log: str, threads: int, folder: str) -> tuple[int, int]:
    """`prepare_data`, whole; how many requests and candidates the dataset has."""
    config = parquet()
    config.data.path, config.data.dir = log, folder
    config.data.processes, config.data.memory = threads, MEMORY
    api.prepare(config)
    columns = datasets.dataset_of(config).columns
    return (
        sum(len(columns[split]) for split in SPLITS),
        int(sum(columns[split].counts.retrieved.sum() for split in SPLITS)),
    )
