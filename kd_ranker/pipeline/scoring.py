"""Scores of trained rankers for a dataset (`log_teacher`) or for another log (`score`).

They are a table that its owner joins to the dataset or log by two columns:

    request, item         ids, as they are in the log; numbers of the dataset if it has no log
    probability_<task>    float32, one column per task
    value                 float32, what the ranker sorts by
    passed                whether a policy passes the candidate; only if one is named
    version               the ranker's exact weights

It is a folder of Parquet files: one per file of the log, or per split of the dataset. A request
with rows in several files is in the first of them. Scoring resumes where it stopped: finished parts
are kept in a hidden folder inside the result's folder. Its name contains a hash of all inputs that
the numbers depend on.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker import manifest
from kd_ranker.batch import CandidateBatch, Items, Stage
from kd_ranker.batches import cutting
from kd_ranker.config import checks
from kd_ranker.errors import UserError
from kd_ranker.evaluation import funnel
from kd_ranker.evaluation.policy import Policy, to_json
from kd_ranker.pipeline import trained
from kd_ranker.pipeline.datasets import (
    SCORES_FOLDER,
    candidates_line,
    current_dataset,
    scores_folder,
)
from kd_ranker.pipeline.remote import Place, fetched
from kd_ranker.pipeline.trained import Finished
from kd_ranker.requests import lock
from kd_ranker.requests.columns import Columns, columns_of_block
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.storage import write_column
from kd_ranker.sources.logs import unseen
from kd_ranker.sources.logs.encode import encode_requests
from kd_ranker.sources.logs.files import SQL, Log
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.ordered import Piece
from kd_ranker.sources.logs.unseen import Counted
from kd_ranker.sources.logs.vocabulary import (
    MANIFEST,
    Settled,
    read_requests_of,
    read_vocabulary,
    requests_of_piece,
    settled_by,
)
from kd_ranker.training.recipes import TEACHER_STAGES
from kd_ranker.training.workdir import read_json, write_atomically

FILE = "scores.json"
"""Next to complete scores: the ranker that scored, and the counts of the rows of a log."""

_WORK, _PARTS = ".scoring-", "parts"

# The number of batches in a part of a dataset, raised where a split would have more than the
# largest number of parts.
_BATCHES = 64
_MOST_PARTS = 256


class Scored(NamedTuple):
    """The scores of a ranker as a table in Parquet files.

    Attributes:
      directory: the folder of the files.
      columns: the names of the columns.
    """

    directory: Path
    columns: tuple[str, ...]

    def __str__(self) -> str:
        return f"scores: {self.directory}\ntheir columns: {', '.join(self.columns)}"


class Part(NamedTuple):
    """Some of the requests to score.

    Attributes:
      columns: holds the requests.
      numbers: which of its requests they are.
      scored: the number of leading candidates of each request with scores to write.
      request: the ids of the requests.
      file: the number of the file to which each request belongs.
    """

    columns: Columns
    numbers: Int[np.ndarray, "n"]
    scored: Int[np.ndarray, "n"]
    request: pa.Array
    file: Int[np.ndarray, "n"]


class Requests(NamedTuple):
    """Requests to score.

    Attributes:
      parts: the function that reads each part, by the stem of its file.
      files: the names of the files to write.
      items: the features and categories of the items.
      item_names: the `value` and the `id` of each item, by id; None if ids have no other names.
      candidates: the largest number of candidates of a request.
      counts: what to record in `scores.json`.
    """

    parts: Mapping[str, Callable[[], Part]]
    files: Sequence[str]
    items: Items
    item_names: pa.Table | None
    candidates: int
    counts: Any = None


def score_dataset(config: ConfigDict) -> Scored:
    """Write the probabilities of a teacher for the candidates of its dataset.

    Training requests get those of the candidates of `config.teacher.stage`, all others those of
    every candidate. They are written as a table, and as the column that students learn from.

    Args:
      config: a valid config; `config.teacher.workdir` names the teacher.

    Raises:
      UserError: dataset or teacher are missing, the dataset was not built from this log, or another
        process writes the same scores.
    """
    dataset = current_dataset(config)
    ranker = trained.load_teacher(config, dataset)
    output, stage = scores_folder(config, ranker.version), config.teacher.stage
    names = [f"probability_{task}" for task in dataset.spec.tasks]

    def write_columns(parts: Path) -> None:
        for split in SPLITS:
            tables = (pq.read_table(path) for path in sorted(parts.glob(f"{split}-*")))
            of_split = (np.stack([table[name] for name in names], axis=1) for table in tables)
            columns = dataset.columns[split]
            scored = columns.counts.reached(_stage(stage, split))
            write_column(output, split, columns, scored, of_split)

    score(
        config,
        ranker,
        lambda work: _of_dataset(stage, config.evaluation.requests, dataset),
        output,
        [stage, _BATCHES, _MOST_PARTS],
        write_columns,
        replaces=True,  # with other value weights, for example
    )
    return Scored(output, tuple(columns_of(ranker)))


def _stage(name: str, split: str) -> Stage:
    """Return the stage of the candidates of a split that a teacher scores."""
    return TEACHER_STAGES[name] if split == "train" else Stage.RETRIEVED


def _of_dataset(stage: str, batch: int, dataset: Dataset) -> Requests:
    """Return the requests of a dataset, in parts that do not depend on the machine."""
    path = dataset.directory / MANIFEST
    of_log = path.exists()
    files = list(json.loads(path.read_text())) if of_log else SPLITS
    parts = {
        f"{split}-{number:03d}": functools.partial(
            _part_of_dataset, dataset, _stage(stage, split), split, of_log, *span
        )
        for split in SPLITS
        for number, span in enumerate(spans_of(len(dataset.columns[split]), batch))
    }
    item_names = read_vocabulary(dataset.directory, "item") if of_log else None
    most = max(int(dataset.columns[split].counts.retrieved.max()) for split in SPLITS)
    names = _names_like([SQL] if SQL in files else files)
    return Requests(parts, names, dataset.items, item_names, most)


def _names_like(files: Sequence[str]) -> list[str]:
    """Return the name of the scores of each file of a log, or of each split: its number and name.

    >>> _names_like(["s3://logs/day=1/a.parquet", "s3://logs/day=2/a.parquet"])
    ['00000-a.parquet', '00001-a.parquet']
    """
    return [f"{number:05d}-{Path(file).stem}.parquet" for number, file in enumerate(files)]


def spans_of(number: int, batch: int) -> list[tuple[int, int]]:
    """Cut a number of requests into spans of whole batches: those of one pass over all."""
    size = batch * max(_BATCHES, -(-number // (batch * _MOST_PARTS)))
    return [(start, min(start + size, number)) for start in range(0, number, size)]


def _part_of_dataset(
    dataset: Dataset, stage: Stage, split: str, of_log: bool, start: int, stop: int
) -> Part:
    columns = dataset.columns[split]
    counts = columns.counts.of(slice(start, stop))
    request, file = pa.array(counts.request_id), np.full(stop - start, SPLITS.index(split))
    if of_log:
        names = read_requests_of(dataset.directory, split)
        request = names["request"].combine_chunks()[start:stop]
        file = names["file"].to_numpy()[start:stop]
    return Part(columns, np.arange(start, stop), counts.reached(stage), request, file)


def score_unseen(
    config: ConfigDict,
    workdir: Place,
    member: str = "",
    output: Path | None = None,
    trust: bool = False,
    policy: str = "",
) -> tuple[Scored, list[str]]:
    """Write the scores of the ranker in a workdir for the log at `config.data.path`.

    The log is read with the ids, means and deviations of the training log.

    Args:
      config: the run's own with another `data.path`, or one with the same features and tasks.
      workdir: of a teacher, a student or a sweep.
      member: of a sweep; "" takes the best one on validation.
      output: the folder to write to; None takes one below `config.data.dir`.
      trust: whether a file that the run's config names may be executed, see `trained.config_of`.
      policy: one that the sweep has fitted, to add the column `passed`; "" takes none.

    Returns:
      The scores, and lines on the ranker and the candidates.

    Raises:
      UserError: the workdir holds no finished ranker that was trained on a log, its dataset is
        gone, the log lacks a column that training had, or a policy is named and the value
        weights are others than the run's.
    """
    with fetched(workdir) as folder:
        run = trained.config_of(folder, trust)
        for name in (run.data.name, config.data.name):
            if name != "parquet":
                raise UserError(
                    f"{workdir} and the config have to be of a log (data.name='parquet'), and one "
                    f"is of {name}; experiments.log_teacher scores the requests of every dataset"
                )
        # One device scores, however many were used for training.
        devices = config.parallel.devices or config.parallel.members or 1
        checks.validate(config, devices)
        layout, run_layout = (read_layout(of.data, of.tasks, of.funnel) for of in (config, run))
        log, layout = unseen.open_unseen(layout, run_layout)
        ranker = trained.open_finished(folder, member, "", str(config.data.dir), trust, policy)
        fitted, given = (tuple(of.value_weights) for of in (ranker.config, config))
        if policy and fitted != given:
            raise UserError(
                f"--policy: fitted with value_weights={fitted}, and the config has {given}; leave "
                "--config out, or set the former"
            )
        ranker = ranker._replace(title=ranker.title.replace(str(folder), str(workdir)))
        dataset = ranker.dataset
        settled = settled_by(run_layout, dataset.spec, dataset.directory)
        inputs = [
            *(log.manifest, repr(layout.features), layout.columns),
            *(layout.by_request, layout.units_per_second, layout.retrieved),
        ]
        if output is None:
            digest = made_of_scores(config, ranker, inputs)["scores"]
            name = f"{dataset.directory.parent.name}-{ranker.role}-{ranker.version}-{digest}"
            output = Path(config.data.dir) / SCORES_FOLDER / name
        if output.resolve().is_relative_to(Path(layout.path).resolve()):
            raise UserError(
                f"{output} is inside the log and would become a part of it; give another --out"
            )
        read = functools.partial(_of_log, log, layout, settled, dataset)
        counts = score(config, ranker, read, output, inputs)
    scored = Scored(output, tuple(columns_of(ranker)))
    lines = [trained.ranker_line(ranker), *_unseen_lines(Counted(*counts))]
    return scored, lines


def _of_log(
    log: Log, layout: LogLayout, settled: Settled, dataset: Dataset, work: Path
) -> Requests:
    """Read a log as requests into a folder, unless an earlier run has done so."""
    folder, unfinished = work / "read", work / "unfinished"
    if not folder.exists():
        unfinished.mkdir(parents=True)
        unseen.read_unseen(log, layout, settled, dataset.items, unfinished)
        unfinished.rename(folder)
    read = unseen.load_unseen(folder)

    def part_of(piece: Piece) -> Part:
        block = encode_requests(layout, read.encoding, folder, piece)
        columns = columns_of_block(block, dataset.spec)
        names = requests_of_piece(folder, piece)
        request, file = names["request"].combine_chunks(), names["file"].to_numpy()
        return Part(columns, np.arange(len(columns)), columns.counts.retrieved, request, file)

    parts = {
        f"{number:06d}": functools.partial(part_of, piece)
        for number, piece in enumerate(read.pieces)
    }
    files = _names_like(log.files or [SQL])
    counted = read.counted
    return Requests(parts, files, read.items, read.item_names, counted.largest, counted)


def _unseen_lines(read: Counted) -> list[str]:
    """The lines on a scored log: its candidates, and how many have values unknown to training."""
    unknown = (
        f"{number:,} candidates ({number / read.used:.1%}) by their {name}"
        for name, number in read.new.items()
    )
    candidates = candidates_line(read.used, "scored", read.rejected)
    return [candidates, f"unknown to training: {', '.join(unknown)}"]


def score(
    config: ConfigDict,
    ranker: Finished,
    open_requests: Callable[[Path], Requests],
    output: Path,
    inputs: Any,
    finish: Callable[[Path], None] = lambda parts: None,
    replaces: bool = False,
) -> Any:
    """Write the scores of requests, see the top of this file.

    Args:
      config: gives the value weights, and the requests per batch.
      ranker: the ranker.
      open_requests: called with a folder that is kept until the scores are complete.
      output: the folder to write to.
      inputs: all that the requests depend on, as JSON.
      finish: called with the folder of all parts, before the manifest is written.
      replaces: whether other scores of the same dataset by the same ranker are replaced.

    Returns:
      `Requests.counts`, as JSON.

    Raises:
      UserError: the folder contains something else, or another process writes to it.
    """
    made_of = made_of_scores(config, ranker, inputs)
    work = output / f"{_WORK}{made_of['scores']}"
    with lock.hold(output):
        if not _is_finished(output, work, made_of, replaces):
            try:
                requests = open_requests(work)
            except UserError:
                shutil.rmtree(work, ignore_errors=True)
                raise
            folder = work / _PARTS
            folder.mkdir(parents=True, exist_ok=True)
            for name, read in tqdm(requests.parts.items(), "scoring", leave=False, disable=None):
                if not (path := folder / f"{name}.parquet").exists():
                    _write_part(path, config, ranker, requests, read())
            finish(folder)
            _write_files(folder, requests.files, output)
            description = {
                "ranker": ranker.title,
                "serve": ranker.serve,
                "version": ranker.version,
                "policy": ranker.policy.name if ranker.policy else "",
                "columns": columns_of(ranker),
                "counts": requests.counts,
            }
            write_atomically(output / FILE, json.dumps(description, indent=2))
            names = (path.name for path in output.iterdir() if path.name[0] != ".")
            manifest.write(output, made_of, names)
            shutil.rmtree(work)
        return read_json(output / FILE, _remedy(output))["counts"]


def columns_of(ranker: Finished) -> list[str]:
    """Return the names of the columns of scores."""
    probabilities = [f"probability_{task}" for task in ranker.dataset.spec.tasks]
    passed = ["passed"] if ranker.policy else []
    return ["request", "item", *probabilities, "value", *passed, "version"]


def made_of_scores(config: ConfigDict, ranker: Finished, inputs: Any) -> manifest.MadeOf:
    """Return the fingerprints of all that scores depend on."""
    releases = [metadata.version(package) for package in ("kd_ranker", "jax")]
    numbers = [list(config.value_weights), config.evaluation.requests]
    dataset = ranker.dataset.identity["dataset"]
    of_ranker = [ranker.version, ranker.role, ranker.serve, *numbers]
    if ranker.policy:
        of_ranker.append(to_json({("", ""): {ranker.policy.name: ranker.policy}}))
    return {
        "dataset": dataset,
        "ranker": ranker.version,
        "scores": manifest.digest([dataset, of_ranker, inputs, releases]),
    }


def _remedy(output: Path) -> str:
    return f"remove the folder {output} and run this again"


def _is_finished(output: Path, work: Path, made_of: manifest.MadeOf, replaces: bool) -> bool:
    """Test if a folder contains the result; raise UserError if it has other contents."""
    finished = (output / manifest.FILE).exists()
    if finished:
        found = manifest.read(output, _remedy(output))["made_of"]
        if found == made_of:
            manifest.check(output, _remedy(output))
            shutil.rmtree(work, ignore_errors=True)  # the leftovers of a run that was killed
            return True
        if replaces and {**found, "scores": ""} == {**made_of, "scores": ""}:
            for path in (*output.glob("*.parquet"), output / manifest.FILE):
                path.unlink()
            return False
    if finished or not (work.exists() or {path.name for path in output.iterdir()} <= lock.FILES):
        raise UserError(
            f"{output} holds something else than these scores by this ranker; remove it, or give "
            "another folder with --out"
        )
    return False


def _write_part(
    path: Path, config: ConfigDict, ranker: Finished, requests: Requests, part: Part
) -> None:
    """Write the scores of a part to a file that is complete or absent."""
    is_scored = np.arange(requests.candidates) < part.scored[:, None]
    size = config.evaluation.requests
    starts = range(0, len(part.numbers), size)
    batches = _probabilities(ranker, requests, part, size)
    probability = np.concatenate(
        [of[is_scored[at : at + size]] for at, of in zip(starts, batches, strict=True)]
    )
    value = funnel.value(jnp.asarray(probability), jnp.asarray(tuple(config.value_weights)))
    owner = np.repeat(np.arange(len(part.numbers)), part.scored)
    scores = [*probability.T, np.asarray(value)]
    if ranker.policy:
        scores.append(_passed(ranker.policy, np.asarray(value), is_scored))
    ids = _items_of(part, requests.item_names)
    arrays = [part.request.take(pa.array(owner)), ids, *map(pa.array, scores)]
    arrays.append(pa.repeat(ranker.version, len(owner)))
    columns = dict(zip(columns_of(ranker), arrays, strict=True))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table({"file": pa.array(part.file[owner]), **columns}), temporary)
    temporary.replace(path)


def _write_files(parts: Path, files: Sequence[str], output: Path) -> None:
    """Write the scores of each file of a log, or of each split, from those of all parts."""
    scores = ds.dataset([str(path) for path in sorted(parts.glob("*.parquet"))])
    names = [name for name in scores.schema.names if name != "file"]
    for number, name in enumerate(files):
        own = scores.scanner(columns=names, filter=ds.field("file") == number)
        temporary = output / f".{name}"
        with pq.ParquetWriter(temporary, own.projected_schema, compression="zstd") as writer:
            for batch in own.to_batches():
                if batch.num_rows:
                    writer.write_batch(batch)
        temporary.replace(output / name)


def _passed(
    policy: Policy, value: Float[np.ndarray, "scored"], is_scored: Bool[np.ndarray, "R N"]
) -> Bool[np.ndarray, "scored"]:
    """Return True for the candidates that a policy passes; equal values keep their order."""
    values = np.full(is_scored.shape, -np.inf, np.float32)
    values[is_scored] = value
    k = np.asarray(policy.passed(jnp.asarray(values), jnp.asarray(is_scored)))
    places = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1)
    return (places < k[:, None])[is_scored]


def _items_of(part: Part, item_names: pa.Table | None) -> pa.Array:
    """Return the item of each scored candidate."""
    candidates = part.columns.candidates.fields(part.numbers, part.scored)
    ids = np.asarray(candidates["item_id"])
    if item_names is None:
        return pa.array(ids)
    values = item_names["value"].combine_chunks()
    return values.take(pa.array(np.searchsorted(item_names["id"].to_numpy(), ids)))


def _probabilities(
    ranker: Finished, requests: Requests, part: Part, size: int
) -> Iterator[Float[np.ndarray, "R N T"]]:
    """Yield the probabilities of the candidates of a part, `size` requests at a time.

    The last array has fewer. Candidates are padded to N = `requests.candidates`; entries of padding
    have no meaning.
    """
    items, index = jax.device_put(requests.items), np.arange(requests.candidates)
    for start in range(0, len(part.numbers), size):
        chunk = part.numbers[start : start + size]
        # A last chunk of another size would need another compilation.
        filled = np.append(chunk, np.repeat(chunk[-1:], size - len(chunk)))
        places = np.where(index < part.columns.kept[filled, None], index, -1)
        batch = CandidateBatch(**cutting.all_fields(part.columns, filled, places))
        served = ranker.ranker.serve(ranker.parameters, batch, items)
        yield np.asarray(served.probability[ranker.serve])[: len(chunk)]
