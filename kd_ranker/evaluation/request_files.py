"""The terms of the sums over test requests, by ranker, in two files.

    requests.parquet          a row per model, head and test request
    request_curves.parquet    a row per model, head, test request and k

Every measure is a function of sums over requests. These files hold the terms of the sums, by name,
with `/<task>` if there is one per task. So each measure can be computed on other draws of the
requests, as intervals need.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.metrics.metric import Sums

RankerKey = tuple[str, str]  # run and serve name
REQUESTS_FILE = "requests.parquet"
REQUEST_CURVES_FILE = "request_curves.parquet"


class PerRequestByRanker(NamedTuple):
    """The terms of the sums over test requests, by ranker."""

    ks: Int[np.ndarray, "K"]  # of the curves, increasing; the last is all that was retrieved
    each: Mapping[RankerKey, PerRequest]


def spaced_ks(retrieved: int, named: Sequence[int], spaced: int = 76) -> list[int]:
    """The named values of k and `spaced` others or fewer: small ones, then steps of a few percent.

    >>> spaced_ks(2000, [200])[-3:]
    [1633, 1807, 2000]
    """
    every = np.geomspace(1, retrieved, spaced).round().astype(int).tolist()
    return sorted({*every, *(min(k, retrieved) for k in named)})


def request_files(kept: PerRequestByRanker, tasks: Sequence[str]) -> dict[str, bytes]:
    """The contents of the two files of test requests by their names, for one or more rankers."""
    each = kept.each.items()
    return {
        REQUESTS_FILE: _parquet([_table(who, of_ranker.sums, tasks) for who, of_ranker in each]),
        REQUEST_CURVES_FILE: _parquet(
            [_table(who, of_ranker.curves, tasks, kept.ks) for who, of_ranker in each]
        ),
    }


def _parquet(tables: Sequence[pa.Table]) -> bytes:
    whole, sink = pa.concat_tables(tables), io.BytesIO()
    pq.write_table(whole, sink, compression="zstd")
    return sink.getvalue()


def _table(
    who: RankerKey, sums: Sums, tasks: Sequence[str], ks: Int[np.ndarray, "K"] | None = None
) -> pa.Table:
    """A ranker's rows: one a request, or with `ks` one a request and k."""
    axes = 1 if ks is None else 2
    shape = next(iter(sums.values())).shape[:axes]
    places = np.indices(shape, np.int32).reshape(axes, -1)
    run, serve = (
        pa.DictionaryArray.from_arrays(np.zeros(places.shape[1], np.int32), [name]) for name in who
    )
    columns = {"run": run, "serve": serve, "request": places[0]}
    if ks is not None:
        columns["k"] = np.asarray(ks, np.int32)[places[1]]
    for name, array in sums.items():
        flat = np.asarray(array, np.float32).reshape(places.shape[1], -1)
        names = [name] if array.ndim == axes else [f"{name}/{task}" for task in tasks]
        columns |= zip(names, flat.T, strict=True)
    return pa.table(columns)


def read_requests(folder: Path) -> PerRequestByRanker:
    """The files of `request_files` in a folder, as they were written."""
    single, curves = (_rankers(folder / file) for file in (REQUESTS_FILE, REQUEST_CURVES_FILE))
    ks = next(iter(curves.values()))["k"].unique()
    each = {
        who: PerRequest(_arrays(rows, ()), _arrays(curves[who], (len(ks),)))
        for who, rows in single.items()
    }
    return PerRequestByRanker(np.asarray(ks), each)


def _rankers(path: Path) -> dict[RankerKey, pd.DataFrame]:
    table = pq.read_table(path, read_dictionary=["run", "serve"]).to_pandas()
    of_rankers = table.groupby(["run", "serve"], sort=False, observed=True)
    return {(str(run), str(serve)): rows for (run, serve), rows in of_rankers}


def _arrays(rows: pd.DataFrame, over: tuple[int, ...]) -> Sums:
    """Sums by name, the columns of its tasks side by side: [R, *over] or [R, *over, T]."""
    known = rows.drop(columns=["run", "serve", "request", "k"], errors="ignore")
    names = [str(column).partition("/")[0] for column in known]
    sums: Sums = {}
    for name in dict.fromkeys(names):
        values = known.loc[:, [other == name for other in names]].to_numpy()
        tasks = [] if name in known else values.shape[1:]
        sums[name] = values.reshape(-1, *over, *tasks)
    return sums
