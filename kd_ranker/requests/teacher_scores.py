"""A teacher's probabilities for the candidates of a dataset, as a column in separate files.

    teacher-SPLIT.npy   float32 [1 + candidates, T]: NaN in the first row, which serves for padding,
                        then a row per candidate in stored order, NaN where it was not scored

The requests themselves stay where they are.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kd_ranker import manifest
from kd_ranker.batch import FeatureSpec, Stage
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Rows
from kd_ranker.requests.packing import Span
from kd_ranker.requests.ragged import starts_of
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS

_FIELD = "teacher_probability"


def open_column(folder: Path, split: str, columns: Columns, spec: FeatureSpec) -> np.memmap:
    """Open the column of a split to write to it; without a file, it is new and NaN everywhere.

    Args:
      folder: of the column.
      split: one of `SPLITS`.
      columns: its requests.
      spec: the sizes of their features.

    Returns:
      float32 [1 + candidates, T]; the candidates of a request begin at its row of `first_rows`.
    """
    path = _path(folder, split)
    if not path.exists():
        shape = (1 + int(columns.counts.retrieved.sum()), len(spec.tasks))
        unfinished = path.with_name(f".{path.name}")
        column = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
        column[:] = np.nan
        column.flush()
        unfinished.replace(path)
    return np.lib.format.open_memmap(path, "r+")


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
        column = Rows(values, (span,), first_rows(dataset.columns[split]))
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


def first_rows(columns: Columns) -> Int[np.ndarray, "n"]:
    """Return the row of the first candidate of each request in a column."""
    return 1 + starts_of(columns.counts.retrieved)[:-1]


def _path(folder: Path, split: str) -> Path:
    return folder / f"teacher-{split}.npy"
