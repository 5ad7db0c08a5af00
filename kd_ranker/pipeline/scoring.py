"""Scores of trained rankers for a dataset (`log_teacher`) or for another log (`score`).

They are a table that its owner joins to the dataset or log by two columns:

    request, item         ids, as they are in the log; numbers of the dataset if it has no log
    probability_<task>    float32, one column per task
    value                 float32, what the ranker sorts by
    version               the ranker's exact weights

It is a folder of Parquet files: one per file of the log, or per split of the dataset. A request
with rows in several files is in the first of them. Until all are complete, they are in a hidden
folder inside the result's folder, and a run that was killed resumes at the first one that is
missing. The name of that folder contains a hash of all inputs that the numbers depend on.
"""

import contextlib
import functools
import itertools
import json
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker import manifest
from kd_ranker.batch import Items, Stage
from kd_ranker.batches import cutting
from kd_ranker.config import checks
from kd_ranker.errors import UserError, command
from kd_ranker.evaluation import funnel
from kd_ranker.pipeline import datasets
from kd_ranker.pipeline.job import TrainedRanker, config_of, load_teacher, open_ranker
from kd_ranker.pipeline.remote import Place
from kd_ranker.requests import lock, storage
from kd_ranker.requests.columns import Columns
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS, runs
from kd_ranker.requests.row_files import columns_of_block
from kd_ranker.sources.logs import vocabulary
from kd_ranker.sources.logs.encode import ITEM, encode_requests
from kd_ranker.sources.logs.files import SQL, Log
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.unseen import Unseen, open_unseen, read_unseen
from kd_ranker.training.specs import TEACHER_STAGES
from kd_ranker.training.workdir import read_json

FILE = "scores.json"
"""Next to complete scores: the ranker that scored, and the counts of the rows of a log."""

# The number of batches in a part of a dataset.
_BATCHES = 64


class Scored(NamedTuple):
    """The folder of the scores of a ranker, in Parquet files."""

    directory: Path

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of all files."""
        return tuple(pq.read_schema(next(self.directory.glob("*.parquet"))).names)

    def __str__(self) -> str:
        return f"scores: {self.directory}\ntheir columns: {', '.join(self.columns)}"


class _Part(NamedTuple):
    """Requests of one file of a log."""

    path: Path  # of their scores
    request: pa.Array  # their ids
    columns: Columns
    numbers: Int[np.ndarray, "n"]  # their places in the columns
    scored: Int[np.ndarray, "n"]  # how many candidates of each are scored, the first ones
    keep: Callable[[Float32[np.ndarray, "sum T"]], None] = lambda _: None  # gets probabilities


class _Scorer(NamedTuple):
    """A ranker, with items and sizes."""

    ranker: TrainedRanker
    config: ConfigDict
    items: Items
    candidates: int  # the most that a request has
    item_names: pa.Table | None  # `value` and `id`, ordered by id; None if ids have no names

    def write(
        self, work: Path, parts: Iterable[_Part], counts: Mapping[str, Any] | None = None
    ) -> None:
        """Write the scores of each file (its parts follow each other) and a description."""
        shown = tqdm(parts, "scoring", unit="part", leave=False, disable=None)
        for path, of_file in itertools.groupby(shown, key=operator.attrgetter("path")):
            tables = map(self._table, of_file)
            first, unfinished = next(tables), path.with_name(f".{path.name}")
            with pq.ParquetWriter(unfinished, first.schema, compression="zstd") as writer:
                for table in filter(len, itertools.chain([first], tables)):
                    writer.write_table(table)
            unfinished.replace(path)
        ranker = self.ranker
        description = {"ranker": ranker.title, "serve": ranker.serve, "counts": counts}
        (work / FILE).write_text(json.dumps(description, indent=2))

    def _table(self, part: _Part) -> pa.Table:
        """The scores of a part, a row per candidate."""
        probability = np.concatenate([*self._probabilities(part)])
        part.keep(probability)
        # Of NumPy: JAX would compile a program for each number of candidates.
        weights = np.array(self.config.value_weights, np.float32)
        value: Any = funnel.value(probability, weights)  # type: ignore[arg-type]
        item = pa.array(
            np.asarray(part.columns.candidates.fields(part.numbers, part.scored)["item_id"])
        )
        if self.item_names is not None:
            places = np.searchsorted(self.item_names["id"].to_numpy(), item.to_numpy())
            item = self.item_names["value"].combine_chunks().take(pa.array(places))
        request = part.request.take(pa.array(np.repeat(np.arange(len(part.numbers)), part.scored)))
        columns = {"request": request, "item": item}
        for task, of_task in zip(self.ranker.dataset.spec.tasks, probability.T, strict=True):
            columns[f"probability_{task}"] = pa.array(of_task)
        columns["value"] = pa.array(value)
        return pa.table({**columns, "version": pa.repeat(self.ranker.version, len(item))})

    def _probabilities(self, part: _Part) -> Iterator[Float32[np.ndarray, "scored T"]]:
        """Yield those of the scored candidates, batch by batch; the first has no candidates."""
        ranker, index = self.ranker.ranker, np.arange(self.candidates)
        size = cutting.batch_size(self.config.evaluation.requests, len(part.numbers))
        yield np.zeros((0, len(self.ranker.dataset.spec.tasks)), np.float32)
        for start in range(0, len(part.numbers), size):
            chunk = part.numbers[start : start + size]
            # A last batch of another size would need another compilation.
            filled = np.append(chunk, np.repeat(chunk[-1:], size - len(chunk)))
            places = np.where(index < part.columns.counts.retrieved[filled, None], index, -1)
            batch = cutting.whole_batch(part.columns, filled, places)
            served = ranker.serve(ranker.parameters, batch, self.items)
            probability = np.asarray(served.probability[self.ranker.serve])[: len(chunk)]
            yield probability[index < part.scored[start : start + size, None]]


def _paths_like(files: Iterable[str], work: Path) -> list[Path]:
    """The file for the scores of each file of a log, or of each split."""
    return [work / f"{number:05d}-{Path(of).stem}.parquet" for number, of in enumerate(files)]


def score_dataset(config: ConfigDict) -> Scored:
    """Write the probabilities of a teacher for the candidates of its dataset.

    Training requests get those of the candidates of `config.teacher.stage`, all others those of
    every candidate. They are written as a table, and as the column that students learn from.
    """
    dataset = datasets.dataset_of(config, unchanged=True)
    ranker = load_teacher(config)
    output, stage = datasets.scores_folder(config, ranker.version), config.teacher.stage
    # Those of other value weights, for example, are replaced.
    with _writing(output, _provenance(config, ranker, [stage]), replaces=True) as work:
        if work:
            of_log = (dataset.directory / vocabulary.MANIFEST).exists()
            names = vocabulary.read_vocabulary(dataset.directory, ITEM) if of_log else None
            most = max(int(of.counts.retrieved.max()) for of in dataset.columns.values())
            scorer = _Scorer(ranker, config, jax.device_put(dataset.items), most, names)
            size = _BATCHES * config.evaluation.requests
            scorer.write(work, _parts_of_dataset(dataset, TEACHER_STAGES[stage], size, work))
    return Scored(output)


def _parts_of_dataset(dataset: Dataset, stage: Stage, size: int, work: Path) -> Iterator[_Part]:
    """Yield the requests of each file that an earlier run has not written, `size` at a time."""
    of_log = (dataset.directory / vocabulary.MANIFEST).exists()
    files = list(vocabulary.read_manifest(dataset.directory)) if of_log else list(SPLITS)
    paths = _paths_like([SQL] if SQL in files else files, work)
    splits = []
    for split in sorted(SPLITS):
        columns = dataset.columns[split]
        request = pa.array(columns.counts.request_id)
        file = np.full(len(request), SPLITS.index(split))
        if of_log:
            names = vocabulary.read_requests_of(dataset.directory, split)
            request, file = names["request"].combine_chunks(), names["file"].to_numpy()
        order = np.argsort(file, kind="stable")
        of_files = np.split(order, np.searchsorted(file[order], range(1, len(paths))))
        scored = columns.counts.reached(stage if split == "train" else Stage.RETRIEVED)
        column = storage.open_column(work, split, columns, dataset.spec)
        splits.append((columns, request, of_files, scored, storage.first_rows(columns), column))
    for number, path in enumerate(paths):
        if path.exists():
            continue
        for columns, request, of_files, scored, first, column in splits:
            for start in range(0, max(len(of_files[number]), 1), size):
                own = of_files[number][start : start + size]
                keep = functools.partial(operator.setitem, column, runs(first[own], scored[own]))
                yield _Part(path, request.take(pa.array(own)), columns, own, scored[own], keep)


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
    log, layout, trained = _open_log(config, run_config, workdir)
    run_config.data.dir = config.data.dir or run_config.data.dir
    ranker = open_ranker(workdir, run, config=run_config)
    how_read = [layout.by_request, layout.units_per_second, layout.retrieved]
    inputs = [log.manifest, repr(layout.features), layout.columns, *how_read]
    provenance = _provenance(config, ranker, inputs)
    if output is None:
        name = ranker.dataset.directory.parent.name
        name += f"-{ranker.job.role}-{ranker.version}-{provenance['scores']}"
        output = Path(config.data.dir) / datasets.SCORES_FOLDER / name
    if output.resolve().is_relative_to(Path(layout.path).resolve()):
        raise UserError(
            f"{output} is inside the log and would become a part of it; give another --out"
        )
    with _writing(output, provenance) as work:
        if work:
            read = read_unseen(log, layout, trained, ranker.dataset, work / ".read")
            items = jax.device_put(read.items)
            scorer = _Scorer(ranker, config, items, read.largest, read.item_names)
            paths = _paths_like(log.files or [SQL], work)
            scorer.write(work, _parts_of_log(layout, read, paths), read.counts)
    counts = read_json(output / FILE, _remedy(output))["counts"]
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
    layout, trained_layout = (read_layout(of.data, of.tasks, of.funnel) for of in (config, run))
    return *open_unseen(layout, trained_layout), trained_layout


def _parts_of_log(layout: LogLayout, read: Unseen, paths: Sequence[Path]) -> Iterator[_Part]:
    """Yield the requests of each file that an earlier run has not written, piece by piece."""
    first = 0
    for piece in read.pieces:
        requests = piece.requests()
        file, ids = requests["file"].to_numpy(), requests["request"].combine_chunks()
        last = len(paths) - 1 if piece is read.pieces[-1] else file[-1]
        if left := [of for of in range(first, last + 1) if not paths[of].exists()]:
            block = encode_requests(layout, read.encoding, piece)
            columns = columns_of_block(block, read.encoding.spec)
            for of in left:
                own = np.flatnonzero(file == of)
                scored = columns.counts.retrieved[own]
                yield _Part(paths[of], ids.take(pa.array(own)), columns, own, scored)
        first = file[-1]


def _provenance(config: ConfigDict, ranker: TrainedRanker, inputs: Any) -> manifest.Provenance:
    """The provenance of all that scores depend on; `inputs` are JSON."""
    releases = [metadata.version(package) for package in ("kd_ranker", "jax")]
    numbers = [list(config.value_weights), config.evaluation.requests]
    dataset = ranker.dataset.provenance["dataset"]
    of_ranker = [ranker.version, ranker.job.role, ranker.serve, *numbers]
    return {
        "dataset": dataset,
        "ranker": ranker.version,
        "scores": manifest.digest([dataset, of_ranker, inputs, releases]),
    }


@contextlib.contextmanager
def _writing(
    output: Path, provenance: manifest.Provenance, replaces: bool = False
) -> Iterator[Path | None]:
    """Yield a hidden folder for the files of scores, which then move to `output`.

    It is kept if the run is killed. None is yielded if the scores are finished. With `replaces`,
    other scores of the same dataset by the same ranker are replaced; all else is a UserError.
    """
    work, remedy = output / f".scoring-{provenance['scores']}", _remedy(output)
    with lock.hold(output):
        finished = (output / manifest.FILE).exists()
        found = manifest.read(output, remedy)["provenance"] if finished else {}
        if found == provenance:
            manifest.check(output, remedy)
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its end
            yield None
            return
        is_ours = work.exists() or {path.name for path in output.iterdir()} <= lock.FILES
        if finished:
            is_ours = replaces and {**found, "scores": ""} == {**provenance, "scores": ""}
        if not is_ours:
            raise UserError(
                f"{output} holds something else than these scores by this ranker; remove it, or "
                "give another folder with --out"
            )
        work.mkdir(exist_ok=True)
        try:
            yield work
        except UserError:
            shutil.rmtree(work)
            raise
        (output / manifest.FILE).unlink(missing_ok=True)
        files = [path for path in work.iterdir() if path.name[0] != "."]
        # Tables first: a run that is killed here makes those that have moved again.
        for path in sorted(files, key=lambda path: path.suffix != ".parquet"):
            path.replace(output / path.name)
        manifest.write(output, provenance, [path.name for path in files])
        shutil.rmtree(work)


def _remedy(output: Path) -> str:
    return f"remove the folder {output} and run this again"
