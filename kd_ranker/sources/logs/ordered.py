"""Requests and candidates in their last order, in two files that are read in pieces."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
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
    """Requests in a row, of one split.

    Attributes:
      batch: the number of the piece, from 0.
      split: one of `SPLITS`.
      requests: the numbers of its requests, [start, stop).
      candidates: how many these have.
    """

    batch: int
    split: str
    requests: tuple[int, int]
    candidates: int


def write_ordered(
    engine: Engine, layout: LogLayout, grouped: Grouped, numbered: Numbered
) -> list[Piece]:
    """Writes both files to the engine's folder, and says which pieces to read them in.

    A request has `user_id` and what `Numbered.requests` says. A candidate has `number` (of its
    request), `item_id` and what `typed` says but for times and what only brings it into order.
    """
    sizes = engine.fetch(
        grouped.candidates.group_by("number", "split").agg(size=ibis._.count()).order_by("number")
    )
    pieces = _pieces(*(sizes[name].to_numpy() for name in ("split", "size")))
    user_id = numbered.users.select(user="value", user_id="id")
    requests = numbered.requests.join(user_id, "user").order_by("number")
    raw = {name for name in requests.columns if name.startswith("raw:")}
    lengths = [piece.requests[1] - piece.requests[0] for piece in pieces]
    _write(engine, _without(requests, {"user"} | raw), REQUESTS, lengths)
    item_id = numbered.items.select(item="value", item_id="id")
    candidates = grouped.candidates.join(item_id, "item")
    candidates = candidates.order_by("number", *funnel_order(candidates))
    unused = {"item", "position", "time", "at", "split"}
    lengths = [piece.candidates for piece in pieces]
    _write(engine, _without(candidates, unused), CANDIDATES, lengths)
    return pieces


def _without(table: ir.Table, columns: Collection[str]) -> ir.Table:
    """A table in its order without some columns."""
    return table.select(*(name for name in table.columns if name not in columns))


def _pieces(split: Int[np.ndarray, "n"], size: Int64[np.ndarray, "n"]) -> list[Piece]:
    """Pieces of some `PIECE` candidates; requests stand in the order of splits."""
    ends = starts_of(size)
    # A piece ends with a split, or where it would have grown too large.
    block = ends[:-1] // PIECE
    starts = np.flatnonzero(np.diff(split, prepend=-1) | np.diff(block, prepend=-1)).tolist()
    return [
        Piece(index, SPLITS[split[first]], (first, last), int(ends[last] - ends[first]))
        for index, (first, last) in enumerate(itertools.pairwise([*starts, len(split)]))
    ]


def _write(engine: Engine, table: ir.Table, name: str, lengths: Sequence[int]) -> None:
    """Writes a table in its order, a batch a piece; `lengths` are the rows of each."""
    batches = engine.stream(table)
    # Arrow's own format: what is read again and again takes a tenth of Parquet's time. To compress
    # it would add a fifth to the time of writing.
    path = str(_path(engine.folder, name))
    with pa.ipc.new_file(path, batches.schema) as writer:
        for rows in _cut(batches, lengths):
            writer.write_table(rows)


def _cut(batches: Iterator[pa.RecordBatch], lengths: Sequence[int]) -> Iterator[pa.Table]:
    """The rows of some batches, so many at a time, each in one piece."""
    rest = next(batches)
    for length in lengths:
        parts, missing = [], length
        while missing:
            rest = rest if rest.num_rows else next(batches)
            parts.append(rest.slice(0, missing))
            missing -= parts[-1].num_rows
            rest = rest.slice(parts[-1].num_rows)
        yield pa.Table.from_batches(parts).combine_chunks()


def read_piece(
    folder: Path, piece: Piece, columns: Sequence[str] | None = None
) -> tuple[pa.Table, pa.Table]:
    """The requests and the candidates of a piece, of these the given columns."""
    return (
        _read(_path(folder, REQUESTS), piece.batch, None),
        _read(_path(folder, CANDIDATES), piece.batch, columns),
    )


def _read(path: Path, batch: int, columns: Sequence[str] | None) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        names = pa.ipc.open_file(file).schema.names
        fields = [names.index(name) for name in columns or names]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        rows = pa.ipc.open_file(file, options=options).get_batch(batch)
    return pa.Table.from_batches([rows])


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"
