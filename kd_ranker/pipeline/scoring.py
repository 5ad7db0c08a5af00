"""Scoring with trained rankers: a dataset's requests (`log_teacher`), or another log (`score`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int
from ml_collections import ConfigDict

from kd_ranker.batch import Stage
from kd_ranker.config import checks
from kd_ranker.errors import UserError, command
from kd_ranker.pipeline import datasets, scores
from kd_ranker.pipeline.remote import Place
from kd_ranker.pipeline.scores import Part, Scored, Scorer
from kd_ranker.pipeline.trained import config_of, load_teacher, open_ranker
from kd_ranker.requests import storage
from kd_ranker.requests.columns import Columns
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, ranges
from kd_ranker.requests.row_files import columns_of_block
from kd_ranker.sources.logs import vocabulary
from kd_ranker.sources.logs.encode import ITEM, encode_requests
from kd_ranker.sources.logs.files import SQL, Log
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.unseen import Unseen, open_unseen, read_unseen
from kd_ranker.training.specs import TEACHER_STAGES

# The number of batches in a part of a dataset.
_BATCHES = 64


def score_dataset(config: ConfigDict) -> Scored:
    """Write the probabilities of a teacher for the candidates of its dataset.

    Training requests get those of the candidates of `config.teacher.stage`, all others those of
    every candidate. They are written as a table, and as the column that students learn from.
    """
    dataset = datasets.dataset_of(config, unchanged=True)
    ranker = load_teacher(config)
    stage = config.teacher.stage
    output = datasets.scores_folder(config, ranker.version)
    provenance = scores.scores_provenance(config, ranker, [stage])
    # Those of other value weights, for example, are replaced.
    with scores.writing(output, provenance, replaces=True) as work:
        if work:
            scorer = Scorer(
                ranker,
                config,
                jax.device_put(dataset.items),
                candidates=max(
                    int(columns.counts.retrieved.max()) for columns in dataset.columns.values()
                ),
                item_names=(
                    vocabulary.read_vocabulary(dataset.directory, ITEM)
                    if _is_of_log(dataset)
                    else None
                ),
            )
            size = _BATCHES * config.evaluation.requests
            scorer.write(work, _parts_of_dataset(dataset, TEACHER_STAGES[stage], size, work))
    return Scored(output)


class _Split(NamedTuple):
    """The requests of a split, and the column of a teacher's probabilities for training."""

    columns: Columns
    request_ids: pa.Array
    requests_of_file: list[Int[np.ndarray, "n"]]  # the numbers of the requests, by file
    scored: Int[np.ndarray, "R"]  # how many candidates of each request the teacher scores
    first_row: Int[np.ndarray, "R"]  # of each request in the column
    column: Float32[np.ndarray, "rows T"]


def _parts_of_dataset(dataset: Dataset, stage: Stage, size: int, work: Path) -> Iterator[Part]:
    """Yield the requests of each file that an earlier run has not written, `size` at a time."""
    files = list(SPLITS)
    if _is_of_log(dataset):
        files = list(vocabulary.read_manifest(dataset.directory))
    paths = scores.paths_like([SQL] if SQL in files else files, work)
    splits = [_open_split(dataset, name, stage, len(paths), work) for name in sorted(SPLITS)]
    for number, path in enumerate(paths):
        if path.exists():
            continue
        for split in splits:
            requests = split.requests_of_file[number]
            # A file without requests has one part, as its table has a schema.
            for start in range(0, max(len(requests), 1), size):
                own = requests[start : start + size]
                yield Part(
                    path,
                    split.request_ids.take(pa.array(own)),
                    split.columns,
                    own,
                    split.scored[own],
                    split.column,
                    ranges(split.first_row[own], split.scored[own]),
                )


def _open_split(dataset: Dataset, name: str, stage: Stage, num_files: int, work: Path) -> _Split:
    """Open a split to score; its requests belong to files of the log, or all to that of the split.

    Of training requests the teacher scores the candidates that reached `stage`, else all.
    """
    columns = dataset.columns[name]
    if _is_of_log(dataset):
        logged = vocabulary.read_requests_of(dataset.directory, name)
        request_ids = logged["request"].combine_chunks()
        file = logged["file"].to_numpy()
    else:
        request_ids = pa.array(columns.counts.request_id)
        file = np.full(len(request_ids), SPLITS.index(name))
    by_file = np.argsort(file, kind="stable")
    return _Split(
        columns,
        request_ids,
        np.split(by_file, np.searchsorted(file[by_file], range(1, num_files))),
        columns.counts.reached(stage if name == "train" else Stage.RETRIEVED),
        storage.first_rows(columns),
        storage.open_column(work, name, columns, dataset.spec),
    )


def _is_of_log(dataset: Dataset) -> bool:
    """Whether a dataset was made of a log, so that its ids have names and its requests files."""
    return (dataset.directory / vocabulary.MANIFEST).exists()


def score_unseen(
    config: ConfigDict,
    workdir: Place,
    run: str = "",
    output: Path | None = None,
    run_config: ConfigDict | None = None,
) -> tuple[Scored, list[str]]:
    """Write the scores of the ranker in a workdir for the log at `config.data.path`.

    The log is read with the ids, means and deviations of the training log. Return the scores, and
    lines on the ranker and the candidates. `run_config` is the config of the ranker's run, as
    `config_of` reads it; other arguments and errors are those of `api.score`.
    """
    run_config = run_config or config_of(workdir)
    log, layout, trained_layout = _open_log(config, run_config, workdir)
    run_config.data.dir = config.data.dir or run_config.data.dir
    ranker = open_ranker(workdir, run, config=run_config)
    how_read = [
        layout.by_request,
        layout.units_per_second,
        layout.time_format,
        layout.retrieved,
    ]
    inputs = [log.manifest, repr(layout.features), layout.columns, *how_read]
    provenance = scores.scores_provenance(config, ranker, inputs)
    if output is None:
        name = ranker.dataset.directory.parent.name
        name += f"-{ranker.role}-{ranker.version}-{provenance['scores']}"
        output = Path(config.data.dir) / datasets.SCORES_FOLDER / name
    if output.resolve().is_relative_to(Path(layout.path).resolve()):
        raise UserError(
            f"{output} is inside the log and would become a part of it; give another --out"
        )
    with scores.writing(output, provenance) as work:
        if work:
            read = read_unseen(log, layout, trained_layout, ranker.dataset, work / ".read")
            items = jax.device_put(read.items)
            scorer = Scorer(ranker, config, items, read.largest, read.item_names)
            paths = scores.paths_like(log.files or [SQL], work)
            scorer.write(work, _parts_of_log(layout, read, paths), read.counts)
    counts = scores.counts_of(output)
    unknown = (
        f"{number:,} candidates ({number / counts['used']:.1%}) by their {name}"
        for name, number in counts["new"].items()
    )
    return Scored(output), [
        str(ranker),
        datasets.candidates_line(counts["used"], "scored", counts["rejected"]),
        f"unknown to training: {', '.join(unknown)}",
    ]


def _open_log(
    config: ConfigDict, run: ConfigDict, workdir: Place
) -> tuple[Log, LogLayout, LogLayout]:
    """Find the log of a config; return it, its layout, and that of the log of a run."""
    for name in (run.data.name, config.data.name):
        if name != "parquet":
            raise UserError(
                f"{workdir} and the config have to be of a log (data.name='parquet'), and one "
                f"is of {name}; {command('log_teacher')} scores the requests of every dataset"
            )
    # One device scores, however many were used for training.
    checks.validate(config, config.parallel.devices or config.parallel.runs or 1)
    layout = read_layout(config.data, config.tasks, config.funnel)
    trained_layout = read_layout(run.data, run.tasks, run.funnel)
    log, layout = open_unseen(layout, trained_layout)
    return log, layout, trained_layout


def _parts_of_log(layout: LogLayout, read: Unseen, paths: Sequence[Path]) -> Iterator[Part]:
    """Yield the requests of each file that an earlier run has not written, piece by piece."""
    first = 0
    for piece in read.pieces:
        requests = piece.requests()
        file = requests["file"].to_numpy()
        request_ids = requests["request"].combine_chunks()
        last = len(paths) - 1 if piece is read.pieces[-1] else file[-1]
        left = [number for number in range(first, last + 1) if not paths[number].exists()]
        if left:
            block = encode_requests(layout, read.encoding, piece)
            columns = columns_of_block(block, read.encoding.spec)
            for number in left:
                own = np.flatnonzero(file == number)
                yield Part(
                    paths[number],
                    request_ids.take(pa.array(own)),
                    columns,
                    own,
                    columns.counts.retrieved[own],
                )
        first = file[-1]
