"""The terms of the sums over test requests, by ranker, in two files.

    requests.parquet          a row per model, head and test request
    request_curves.parquet    a row per model, head, test request and k

Every measure is a function of sums over requests. These files hold the terms of the sums, by name,
with `/<task>` if there is one per task. So each measure can be computed on other draws of the
requests, as intervals need.
"""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
    spaced_evenly = np.geomspace(1, retrieved, spaced).round().astype(int).tolist()
    named_or_all = [min(k, retrieved) for k in named]
    return sorted({*spaced_evenly, *named_or_all})


def request_files(kept: PerRequestByRanker, tasks: Sequence[str]) -> dict[str, bytes]:
    """The contents of the two files of test requests by their names, for one or more rankers."""
    requests = []
    curves = []
    for ranker, per_request in kept.each.items():
        requests.append(_table(ranker, per_request.sums, tasks))
        curves.append(_table(ranker, per_request.curves, tasks, kept.ks))
    return {REQUESTS_FILE: _parquet(requests), REQUEST_CURVES_FILE: _parquet(curves)}


def _parquet(tables: Sequence[pa.Table]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), file, compression="zstd")
    return file.getvalue()


def _table(
    ranker: RankerKey, sums: Sums, tasks: Sequence[str], ks: Int[np.ndarray, "K"] | None = None
) -> pa.Table:
    """A ranker's rows: one a request, or with `ks` one a request and k."""
    axes = 1 if ks is None else 2
    shape = next(iter(sums.values())).shape[:axes]
    indices = np.indices(shape, np.int32).reshape(axes, -1)
    num_rows = indices.shape[1]
    run, serve = ranker
    columns = {
        "run": _constant(run, num_rows),
        "serve": _constant(serve, num_rows),
        "request": indices[0],
    }
    if ks is not None:
        columns["k"] = np.asarray(ks, np.int32)[indices[1]]
    for name, array in sums.items():
        flat = np.asarray(array, np.float32).reshape(num_rows, -1)
        names = [name] if array.ndim == axes else [f"{name}/{task}" for task in tasks]
        columns |= zip(names, flat.T, strict=True)
    return pa.table(columns)


def _constant(text: str, num_rows: int) -> pa.DictionaryArray:
    """Return a column with the same text in each row."""
    return pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int32), [text])


def read_requests(folder: Path) -> PerRequestByRanker:
    """The files of `request_files` in a folder, as they were written."""
    requests = _columns_by_ranker(folder / REQUESTS_FILE)
    curves = _columns_by_ranker(folder / REQUEST_CURVES_FILE)
    ks = np.unique(next(iter(curves.values()))["k"])
    each = {}
    for ranker, columns in requests.items():
        each[ranker] = PerRequest(
            sums=_arrays(columns, ()), curves=_arrays(curves[ranker], (len(ks),))
        )
    return PerRequestByRanker(ks, each)


def _columns_by_ranker(path: Path) -> dict[RankerKey, dict[str, np.ndarray]]:
    """The columns of each ranker by name; its rows are one after the other."""
    table = pq.read_table(path, read_dictionary=["run", "serve"])
    run, serve = (table[name].to_pandas().cat for name in ("run", "serve"))
    is_other = (np.diff(run.codes) != 0) | (np.diff(serve.codes) != 0)
    starts = [0, *(np.flatnonzero(is_other) + 1).tolist(), len(table)]
    names = [name for name in table.column_names if name not in ("run", "serve")]
    columns = {name: table[name].to_numpy() for name in names}
    by_ranker = {}
    for start, end in itertools.pairwise(starts):
        key = run.categories[run.codes[start]], serve.categories[serve.codes[start]]
        by_ranker[key] = {name: column[start:end] for name, column in columns.items()}
    return by_ranker


def _arrays(columns: Mapping[str, np.ndarray], over: tuple[int, ...]) -> Sums:
    """Sums by name, the columns of its tasks side by side: [R, *over] or [R, *over, T]."""
    columns_of_sum: dict[str, list[np.ndarray]] = {}
    for column, values in columns.items():
        if column not in ("request", "k"):
            columns_of_sum.setdefault(column.partition("/")[0], []).append(values)
    sums: Sums = {}
    for name, of_tasks in columns_of_sum.items():
        tasks = [] if name in columns else [len(of_tasks)]
        sums[name] = np.stack(of_tasks, axis=1).reshape(-1, *over, *tasks)
    return sums
