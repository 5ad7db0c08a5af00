"""Requests and candidates in their final order, in two files that are read in pieces."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kd_ranker.requests.request import SPLITS, starts_of
from kd_ranker.sources.logs.database import Database

# Candidates that each process holds at a time.
PIECE = 2**18
# The rows of each file, and their order.
_ORDERS = {"request": "number", "candidate": "number, stage DESC, position NULLS LAST, item"}


class Piece(NamedTuple):
    """Consecutive requests of one split.

    Attributes:
      place: of its record batch in both files, from 0.
      split: one of `SPLITS`.
      requests: the numbers of its requests, [start, stop).
    """

    place: int
    split: str
    requests: tuple[int, int]


def write_ordered(database: Database) -> list[Piece]:
    """Write both files to the database's folder, and return the pieces to read them in.

    They have the columns of `request_fields` and `candidate_fields` in `log.sql`. A record batch of
    a file is a piece of some `PIECE` candidates.
    """
    sizes = database.fetch(
        "SELECT split, count(*) AS size FROM used GROUP BY number, split ORDER BY number"
    )
    split, size = (sizes[name].to_numpy() for name in ("split", "size"))
    # A piece ends with a split, or where it would have grown too large.
    block = starts_of(size)[:-1] // PIECE
    ends = [*(np.flatnonzero(np.diff(split) | np.diff(block)) + 1).tolist(), len(split)]
    spans = list(itertools.pairwise([0, *ends]))
    rows = {
        "request": [stop - start for start, stop in spans],
        "candidate": [int(size[start:stop].sum()) for start, stop in spans],
    }
    for name, order in _ORDERS.items():
        batches = database.stream(f"SELECT * FROM {name}_fields ORDER BY {order}")
        _write(database.folder / f"{name}.arrow", batches, rows[name])
    return [Piece(place, SPLITS[split[of[0]]], of) for place, of in enumerate(spans)]


def _write(path: Path, batches: pa.RecordBatchReader, lengths: Sequence[int]) -> None:
    """Write rows to record batches of these lengths."""
    # Arrow's own format: what is read repeatedly takes a tenth of Parquet's time. To compress it
    # would add a fifth to the time of writing.
    with pa.ipc.new_file(str(path), batches.schema) as writer:
        rows, left = batches.schema.empty_table(), [*reversed(lengths)]
        for batch in batches:
            rows = pa.concat_tables([rows, pa.Table.from_batches([batch])])
            while left and left[-1] <= len(rows):
                length = left.pop()
                writer.write_batch(rows[:length].combine_chunks().to_batches()[0])
                rows = rows[length:]


def read_piece(folder: Path, piece: Piece) -> tuple[pa.Table, pa.Table]:
    """Return the requests and the candidates of a piece."""
    requests, candidates = (_read(folder / f"{name}.arrow", piece) for name in _ORDERS)
    return requests, candidates


def read_requests(folder: Path, piece: Piece) -> pa.Table:
    """Return the `request` id and the number of the first `file` of each request of a piece."""
    return _read(folder / "request.arrow", piece).select(["request", "file"])


def _read(path: Path, piece: Piece) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(piece.place)])
