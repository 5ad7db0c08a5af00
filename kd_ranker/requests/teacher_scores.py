"""A teacher's probabilities for the candidates of a dataset, as a column in separate files.

    teacher-SPLIT.npy   float32 [1 + candidates, T]: NaN in the first row, which serves for padding,
                        then a row per candidate in stored order, NaN where it was not scored

The requests themselves stay where they are.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from kd_ranker import manifest
from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Rows
from kd_ranker.requests.packing import Span
from kd_ranker.requests.ragged import runs, starts_of
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS

_FIELD = "teacher_probability"


def write_column(
    folder: Path,
    split: str,
    columns: Columns,
    scored: Int[np.ndarray, "n"],
    parts: Iterable[Float32[np.ndarray, "_ T"]],
) -> None:
    """Write the column of a split.

    Args:
      folder: to write to.
      split: one of `SPLITS`.
      columns: its requests.
      scored: the number of leading candidates of each request that have probabilities.
      parts: the probabilities of these candidates, in the order of requests.
    """
    parts = iter(parts)
    first = next(parts)
    retrieved = columns.counts.retrieved
    shape = (1 + int(retrieved.sum()), first.shape[1])
    column = np.lib.format.open_memmap(_path(folder, split), "w+", np.float32, shape)
    column[:] = np.nan
    places = runs(_first(retrieved), scored)
    start = 0
    for part in (first, *parts):
        column[places[start : start + len(part)]] = part
        start += len(part)
    column.flush()


def with_column(
    dataset: Dataset, folder: Path, made_by: str, version: str, stage: Stage
) -> Dataset:
    """Return a dataset with the probabilities of a teacher in place of those of its log.

    Args:
      dataset: the dataset that the teacher has scored.
      folder: the column of each split, with a manifest.
      made_by: the command that makes the column.
      version: of the teacher.
      stage: the stage of the training candidates that it has scored; of other splits, all are.

    Raises:
      UserError: the column is missing or damaged, or of another content of the dataset.
    """
    if not folder.exists():
        raise UserError(f"no scores of teacher {version} at {folder}; make them with: {made_by}")
    remedy = f"remove the folder {folder} and make it again with: {made_by}"
    scored_dataset = manifest.check(folder, remedy).get("dataset")
    if scored_dataset != dataset.identity["dataset"]:
        raise UserError(
            f"{folder} has the scores of {scored_dataset}, and the dataset is now "
            f"{dataset.identity['dataset']}; {remedy}"
        )
    files = [_path(folder, split).name for split in SPLITS]
    fingerprint = manifest.fingerprint(folder, files, remedy)
    columns = {}
    for split in SPLITS:
        counts = dataset.columns[split].counts
        values = np.asarray(np.load(_path(folder, split), mmap_mode="r")).view(np.int32)
        span = Span(_FIELD, 0, values.shape[1:], "float32")
        column = Rows(values, (span,), _first(counts.retrieved))
        candidates = dataset.columns[split].candidates.without([_FIELD]).with_column(column)
        scored = counts.reached(stage if split == "train" else Stage.RETRIEVED)
        columns[split] = dataclasses.replace(
            dataset.columns[split], candidates=candidates, counts=counts._replace(scored=scored)
        )
    return dataclasses.replace(
        dataset,
        identity={**dataset.identity, "scored": f"{folder.name}/{fingerprint}"},
        spec=dataclasses.replace(
            dataset.spec, teacher_version=version, teacher_signal="probability"
        ),
        columns=columns,
    )


def _first(retrieved: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Return the row of the first candidate of each request."""
    return 1 + starts_of(retrieved)[:-1]


def _path(folder: Path, split: str) -> Path:
    return folder / f"teacher-{split}.npy"
