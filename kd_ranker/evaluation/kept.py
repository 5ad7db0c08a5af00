"""`requests.parquet` and `request_curves.parquet`: the terms of each test request in the measures.

Every measure is a function of sums over requests. So it can be computed from these files on other
draws of the requests, as intervals need. The first file has one row per ranker and request, the
second one per ranker, request and k. Columns are the sums of `metrics.METRICS` by name, with
`/<task>` if there is one per task.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from kd_ranker.evaluation.metrics import Sums
from kd_ranker.evaluation.totals import Each

FILE, CURVES_FILE = "requests.parquet", "request_curves.parquet"

Who = tuple[str, str]  # member and serve name


class Kept(NamedTuple):
    """The sums of each request, by ranker.

    Attributes:
      ks: the values of k of the curves, increasing; the last is all that was retrieved.
      each: by member and serve name.
    """

    ks: Int[np.ndarray, "K"]
    each: Mapping[Who, Each]


def kept_ks(retrieved: int, named: Sequence[int]) -> list[int]:
    """The values of k at which curves are kept: some sixty, and the named ones.

    >>> kept_ks(2000, [200])[-3:]
    [1633, 1807, 2000]
    """
    spaced = np.geomspace(1, retrieved, 76).round().astype(int).tolist()
    return sorted({*spaced, *(min(k, retrieved) for k in named)})


def files(kept: Kept, tasks: Sequence[str]) -> dict[str, bytes]:
    """The contents of the two files by their names.

    Args:
      kept: at least one ranker; all on the same requests.
      tasks: names of the tasks.
    """
    return {
        FILE: _parquet([_table(who, each.alone, tasks) for who, each in kept.each.items()]),
        CURVES_FILE: _parquet(
            [_table(who, each.curves, tasks, kept.ks) for who, each in kept.each.items()]
        ),
    }


def _parquet(tables: Sequence[pa.Table]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _table(
    who: Who, sums: Sums, tasks: Sequence[str], ks: Int[np.ndarray, "K"] | None = None
) -> pa.Table:
    """A ranker's rows: one a request, or with `ks` one a request and k."""
    axes = 1 if ks is None else 2
    shape = next(iter(sums.values())).shape[:axes]
    places = np.indices(shape, np.int32).reshape(axes, -1)
    member, serve = (
        pa.DictionaryArray.from_arrays(np.zeros(places.shape[1], np.int32), [name]) for name in who
    )
    columns = {"member": member, "serve": serve, "request": places[0]}
    if ks is not None:
        columns["k"] = np.asarray(ks, np.int32)[places[1]]
    for name, array in sums.items():
        flat = np.asarray(array, np.float32).reshape(places.shape[1], -1)
        names = [name] if array.ndim == axes else [f"{name}/{task}" for task in tasks]
        columns |= zip(names, flat.T, strict=True)
    return pa.table(columns)


def read(folder: Path) -> Kept:
    """The files of a folder, as they were written."""
    alone, curves = (_rankers(folder / file) for file in (FILE, CURVES_FILE))
    ks = next(iter(curves.values()))["k"]
    ks = ks[: np.unique(ks).size]
    each = {
        who: Each(_arrays(columns, ()), _arrays(curves[who], (len(ks),)))
        for who, columns in alone.items()
    }
    return Kept(ks, each)


def _rankers(path: Path) -> dict[Who, dict[str, np.ndarray]]:
    """Return the columns of each ranker; the rows of a ranker are contiguous."""
    table = pq.read_table(path, read_dictionary=["member", "serve"])
    who = np.stack([table[name].to_numpy().astype(str) for name in ("member", "serve")])
    starts = np.flatnonzero(np.r_[True, (who[:, 1:] != who[:, :-1]).any(axis=0)])
    columns = {
        name: table[name].to_numpy()
        for name in table.column_names
        if name not in ("member", "serve")
    }
    return {
        (who[0, start], who[1, start]): {
            name: column[start:end] for name, column in columns.items()
        }
        for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True)
    }


def _arrays(columns: Mapping[str, np.ndarray], over: tuple[int, ...]) -> Sums:
    """Sums by name, the columns of its tasks side by side: [R, *over] or [R, *over, T]."""
    of_tasks: dict[str, list[np.ndarray]] = {}
    alone: Sums = {}
    for column, values in columns.items():
        if column in ("request", "k"):
            continue
        name, _, task = column.partition("/")
        shaped = values.reshape(-1, *over)
        if task:
            of_tasks.setdefault(name, []).append(shaped)
        else:
            alone[name] = shaped
    return alone | {name: np.stack(parts, axis=-1) for name, parts in of_tasks.items()}
