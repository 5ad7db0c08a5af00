"""Requests and candidates in their last order, in two Parquet files that are read in pieces."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int, Int64

from kd_ranker.requests.ragged import starts_of
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.grouped import Grouped, funnel_order
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.numbered import Numbered

REQUESTS, CANDIDATES = "requests", "candidates"
# Candidates that are held at a time, by each process.
PIECE = 2**18


class Piece(NamedTuple):
    """Requests in a row, of one split: the numbers of their rows in both files, [start, stop)."""

    split: str
    requests: tuple[int, int]
    candidates: tuple[int, int]


def write_ordered(
    engine: Engine, layout: LogLayout, grouped: Grouped, numbered: Numbered
) -> list[Piece]:
    """Writes both files to the engine's folder, and says which pieces to read them in.

    A request has `user_id` and what `Numbered.requests` says. A candidate has `number` (of its
    request), `item_id` and what `typed` says but for times and what only brings it into order.
    """
    user_id = numbered.users.select(user="value", user_id="id")
    requests = numbered.requests.join(user_id, "user").drop("user")
    engine.write(requests.order_by("number"), REQUESTS)
    item_id = numbered.items.select(item="value", item_id="id")
    candidates = grouped.candidates.join(item_id, "item")
    candidates = candidates.order_by("number", *funnel_order(candidates))
    unused = {"item", "position", "time", "at", "split"}
    engine.write(candidates.select(*(set(candidates.columns) - unused)), CANDIDATES)
    sizes = engine.fetch(
        grouped.candidates.group_by("number", "split").agg(size=ibis._.count()).order_by("number")
    )
    return _pieces(*(sizes[name].to_numpy() for name in ("split", "size")))


def _pieces(split: Int[np.ndarray, "n"], size: Int64[np.ndarray, "n"]) -> list[Piece]:
    """Pieces of some `PIECE` candidates; requests stand in the order of splits."""
    ends = starts_of(size)
    # A piece ends with a split, or where it would have grown too large.
    block = ends[:-1] // PIECE
    starts = np.flatnonzero(np.diff(split, prepend=-1) | np.diff(block, prepend=-1)).tolist()
    return [
        Piece(SPLITS[split[first]], (first, last), (int(ends[first]), int(ends[last])))
        for first, last in itertools.pairwise([*starts, len(split)])
    ]


def read_piece(
    folder: Path, piece: Piece, columns: Sequence[str] | None = None
) -> tuple[pa.Table, pa.Table]:
    """The requests and the candidates of a piece, of these the given columns."""
    return (
        _rows(folder / f"{REQUESTS}.parquet", *piece.requests, None),
        _rows(folder / f"{CANDIDATES}.parquet", *piece.candidates, columns),
    )


def _rows(path: Path, start: int, stop: int, columns: Sequence[str] | None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        groups = range(file.metadata.num_row_groups)
        ends = np.cumsum([0, *(file.metadata.row_group(group).num_rows for group in groups)])
        first, last = np.searchsorted(ends, [start, stop], side="right") - 1
        read = file.read_row_groups(
            list(range(first, min(last + 1, len(ends) - 1))), columns=columns, use_threads=False
        )
    return read.slice(start - ends[first], stop - start).combine_chunks()
