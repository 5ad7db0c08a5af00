"""Requests and candidates in their final order, in two files that are read in pieces."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int64

from kd_ranker.requests.ragged import starts_of
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.database import Database

REQUESTS, CANDIDATES = "requests", "candidates"
# Candidates that each process holds at a time.
PIECE = 2**18


class Piece(NamedTuple):
    """Consecutive requests of one split.

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


def write_ordered(database: Database) -> list[Piece]:
    """Write both files to the database's folder, and return the pieces to read them in.

    They have the columns of `request_fields` and `candidate_fields` in `log.sql`.
    """
    sizes = database.fetch(
        "SELECT split, count(*) AS size FROM used GROUP BY number, split ORDER BY number"
    )
    pieces = _pieces(*(sizes[name].to_numpy() for name in ("split", "size")))
    lengths = [piece.requests[1] - piece.requests[0] for piece in pieces]
    _write(database, REQUESTS, "SELECT * FROM request_fields ORDER BY number", lengths)
    lengths = [piece.candidates for piece in pieces]
    order = "number, stage DESC, position NULLS LAST, item"
    _write(database, CANDIDATES, f"SELECT * FROM candidate_fields ORDER BY {order}", lengths)
    return pieces


def _pieces(split: Int[np.ndarray, "n"], size: Int64[np.ndarray, "n"]) -> list[Piece]:
    """Pieces of some `PIECE` candidates; requests are in the order of splits."""
    ends = starts_of(size)
    # A piece ends with a split, or where it would have grown too large.
    block = ends[:-1] // PIECE
    starts = np.flatnonzero(np.diff(split, prepend=-1) | np.diff(block, prepend=-1)).tolist()
    return [
        Piece(index, SPLITS[split[first]], (first, last), int(ends[last] - ends[first]))
        for index, (first, last) in enumerate(itertools.pairwise([*starts, len(split)]))
    ]


def _write(database: Database, name: str, query: str, lengths: Sequence[int]) -> None:
    """Write a result in its order, one batch per piece; `lengths` are the rows of each."""
    batches = database.stream(query)
    # Arrow's own format: what is read repeatedly takes a tenth of Parquet's time. To compress it
    # would add a fifth to the time of writing.
    with pa.ipc.new_file(str(_path(database.folder, name)), batches.schema) as writer:
        for rows in _cut(batches, lengths):
            writer.write_table(rows)


def _cut(batches: Iterator[pa.RecordBatch], lengths: Sequence[int]) -> Iterator[pa.Table]:
    """The rows of some batches, one contiguous table per length."""
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
