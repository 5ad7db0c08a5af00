"""The place in the log of each candidate of a dataset, kept next to it to score the log.

One file per shard of the dataset, with one row per candidate in the order in which they are stored:
`request_id` as stored, `file` (its number among the sorted files), `row` (counted from 0 in that
file) and `place` (in the row's lists; -1 where a row is a candidate). One to four bytes a
candidate.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.sources.logs.encode import request_ids
from kd_ranker.sources.logs.ordered import Piece, read_piece

ROWS_FOLDER = "candidate_rows"


def write_candidate_rows(folder: Path, piece: Piece, path: Path) -> None:
    """Writes the places of the candidates of a piece, which is a shard of the dataset."""
    requests, candidates = read_piece(folder, piece, ["number", "file", "row", "place"])
    owner = candidates["number"].to_numpy() - piece.requests[0]
    columns = {
        "request_id": pa.array(request_ids(requests)[owner]),
        "file": candidates["file"].cast(pa.int32()),
        "row": candidates["row"],
        "place": candidates["place"].cast(pa.int32()),
    }
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        use_dictionary=["request_id", "file", "place"],
        column_encoding={"row": "DELTA_BINARY_PACKED"},
    )


def path_of(directory: Path, split: str, shard: int) -> Path:
    """The file with the places of a shard of the dataset in `directory`."""
    return directory / ROWS_FOLDER / f"{split}-{shard:05d}.parquet"
