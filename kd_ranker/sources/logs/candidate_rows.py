"""The place in the log of each candidate of a dataset, kept beside it to score the log.

A file a shard of the dataset, with a row a candidate in the order in which they are stored:
`request_id` as stored, `file` (its number among the sorted files), `row` (counted from 0 in that
file) and `place` (in the row's lists; -1 where a row is a candidate). One to four bytes a
candidate.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.named_columns import NamedColumns, array_of

ROWS_FOLDER = "candidate_rows"


def write_candidate_rows(
    requests: NamedColumns, candidates: NamedColumns, folder: Path, name: str
) -> dict[str, str]:
    """Writes the places of the candidates of a bucket; see `log_statistics.BucketRequests`.

    Returns:
      Split -> the path, below `folder`.
    """
    number = array_of(requests, "candidates")
    request_id = np.repeat(array_of(requests, "request") & (2**63 - 1), number)
    split_of = np.repeat(array_of(requests, "split"), number)
    paths = {}
    for index, split in enumerate(SPLITS):
        chosen = split_of == index
        columns = {"request_id": request_id[chosen]} | {
            column: array_of(candidates, column)[chosen] for column in ("file", "row", "place")
        }
        paths[split] = str(folder / f"{ROWS_FOLDER}-{name}-{split}.parquet")
        pq.write_table(
            pa.table(columns),
            paths[split],
            compression="zstd",
            use_dictionary=["request_id", "file", "place"],
            column_encoding={"row": "DELTA_BINARY_PACKED"},
        )
    return paths


def move_candidate_rows(paths: Sequence[str], split: str, directory: Path) -> None:
    """Moves the files of a split to a dataset's folder, in the order of its shards."""
    (directory / ROWS_FOLDER).mkdir(exist_ok=True)
    for index, path in enumerate(paths):
        shutil.move(path, path_of(directory, split, index))


def path_of(directory: Path, split: str, shard: int) -> Path:
    """The file with the places of a shard of the dataset in `directory`."""
    return directory / ROWS_FOLDER / f"{split}-{shard:05d}.parquet"
