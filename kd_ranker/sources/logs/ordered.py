"""Requests and candidates in their final order, in two files that are read in pieces."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int64

from kd_ranker.requests.ragged import starts_of
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.database import Database

# Candidates that each process holds at a time.
PIECE = 2**18
_REQUESTS, _CANDIDATES = "requests", "candidates"


class Piece(NamedTuple):
    """Consecutive requests of one split.

    Attributes:
      split: one of `SPLITS`.
      requests: the numbers of its requests, [start, stop).
      candidates: the rows of their candidates, [start, stop).
    """

    split: str
    requests: tuple[int, int]
    candidates: tuple[int, int]


def write_ordered(database: Database) -> list[Piece]:
    """Write both files to the database's folder, and return the pieces to read them in.

    They have the columns of `request_fields` and `candidate_fields` in `log.sql`.
    """
    _write(database, _REQUESTS, "SELECT * FROM request_fields ORDER BY number")
    order = "number, stage DESC, position NULLS LAST, item"
    _write(database, _CANDIDATES, f"SELECT * FROM candidate_fields ORDER BY {order}")
    sizes = database.fetch(
        "SELECT split, count(*) AS size FROM used GROUP BY number, split ORDER BY number"
    )
    return _pieces(*(sizes[name].to_numpy() for name in ("split", "size")))


def _write(database: Database, name: str, query: str) -> None:
    # Arrow's own format: what is read repeatedly takes a tenth of Parquet's time. To compress it
    # would add a fifth to the time of writing.
    batches, lengths = database.stream(query), []
    with pa.ipc.new_file(str(database.folder / f"{name}.arrow"), batches.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            lengths.append(batch.num_rows)
    np.save(database.folder / f"{name}.npy", starts_of(np.array(lengths)))


def _pieces(split: Int[np.ndarray, "n"], size: Int64[np.ndarray, "n"]) -> list[Piece]:
    """Return pieces of some `PIECE` candidates; requests are in the order of splits."""
    rows = starts_of(size)
    # A piece ends with a split, or where it would have grown too large.
    block = rows[:-1] // PIECE
    starts = np.flatnonzero(np.diff(split, prepend=-1) | np.diff(block, prepend=-1)).tolist()
    return [
        Piece(SPLITS[split[first]], (first, last), (int(rows[first]), int(rows[last])))
        for first, last in itertools.pairwise([*starts, len(split)])
    ]


def read_piece(folder: Path, piece: Piece) -> tuple[pa.Table, pa.Table]:
    """Return the requests and the candidates of a piece."""
    return (
        _read(folder, _REQUESTS, *piece.requests),
        _read(folder, _CANDIDATES, *piece.candidates),
    )


def read_requests(folder: Path, piece: Piece) -> pa.Table:
    """Return the `request` id and the number of the first `file` of each request of a piece."""
    return _read(folder, _REQUESTS, *piece.requests, columns=("request", "file"))


def _read(folder: Path, name: str, start: int, stop: int, columns: Sequence[str] = ()) -> pa.Table:
    starts = np.load(folder / f"{name}.npy")
    first = int(np.searchsorted(starts, start, side="right")) - 1
    with pa.memory_map(str(folder / f"{name}.arrow")) as file:
        reader = pa.ipc.open_file(file)
        numbers = range(first, int(np.searchsorted(starts, stop)))
        rows = pa.Table.from_batches([reader.get_batch(number) for number in numbers])
    rows = rows.select(columns or rows.column_names)
    return rows.slice(start - int(starts[first]), stop - start).combine_chunks()
