"""A log written back with what a ranker says of its candidates.

That is the teacher which was trained on the log's dataset, or, by `write_files` alone, whoever has
scored the candidates of a log of which there is no dataset. Of the first:

The probabilities are those of the dataset's scored copy. Rows are not scored by themselves: a
candidate's probability depends on other rows of the log too (its request's user and time, its
item's last features). The copy's candidates are traced back to their rows by the places that were
kept when the dataset was built, see `candidate_rows`: the engine sorts them by file and row, and
then each file of the log is read once more and written with its columns added.

Memory, in each process: the scores of one row group of the log, and one batch of it with all
columns; and what `data.memory` gives to the engine.
"""

import contextlib
import functools
import itertools
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, Int64
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.errors import UserError
from kd_ranker.requests import storage
from kd_ranker.requests.pool import Runner, open_pool
from kd_ranker.requests.ragged import runs, starts_of
from kd_ranker.requests.records import damage, record_features, teacher_column
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import candidate_rows, files
from kd_ranker.sources.logs.duckdb_engine import open_duckdb
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import LogLayout, read_layout
from kd_ranker.sources.logs.lists import lists_of
from kd_ranker.sources.logs.source import MANIFEST, check_unchanged

# Folder below `data.dir` for scored logs.
SCORED_FOLDER = "scored"
VERSION_COLUMN = "teacher_version"
# Ends the names of the columns, if the log has one of these names already.
SUFFIX = "_scored"
_UNSORTED = "unsorted"
# The columns of scores that say where their candidate is, and by which they are sorted.
PLACE = ("file", "row", "place")
# Requests that are read from the copy at a time.
_REQUESTS = 512


class Scored(NamedTuple):
    """A log with a ranker's columns.

    Attributes:
      directory: of the log.
      columns: the names of the columns that were added: one a score, and that of the version.
    """

    directory: Path
    columns: tuple[str, ...]


class ScoredLog(NamedTuple):
    """The rest of the work on a scored log, after all checks.

    Attributes:
      write_beside: writes the log's manifest into the folder of the dataset's scored copy.
      write: writes the log with the probabilities of that copy.
    """

    write_beside: Callable[[Path], None]
    write: Callable[[], Scored]


def open_scored_log(
    data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict, directory: Path, name: str
) -> ScoredLog:
    """Checks that a log can be written back; reads footers only.

    Args:
      data: `config.data`.
      tasks: `config.tasks`.
      funnel: `config.funnel`.
      directory: of the dataset that was built of the log.
      name: of the dataset's scored copy, see `storage.dataset_name`.

    Raises:
      UserError: the dataset is damaged, the log is gone or not what the dataset was built of, or
        the copy or the scored log are there and were made of an older one.
    """
    storage.check_whole(directory, "python -m experiments.prepare_data")
    check_unchanged(data, directory)
    layout = read_layout(data, tasks, funnel)
    log = files.open_log(layout)
    if not (directory / candidate_rows.ROWS_FOLDER).is_dir():
        raise UserError(
            f"{directory} does not say which rows of the log its candidates are; remove that "
            "folder and make it anew with: python -m experiments.prepare_data"
        )
    copy, output = storage.directory_of(name, data.dir), Path(data.dir) / SCORED_FOLDER / name
    made_of = (directory / MANIFEST).read_text()
    for folder in (copy, output):
        manifest = folder / MANIFEST
        if folder.exists() and not (manifest.exists() and manifest.read_text() == made_of):
            raise UserError(
                f"{folder} was made of the log as it was before; remove that folder and run this "
                "again"
            )
    paths = output_paths(log, output)

    def write_beside(folder: Path) -> None:
        (folder / MANIFEST).write_text(made_of)

    def write() -> Scored:
        storage.check_whole(copy, "python -m experiments.log_teacher")
        _start_folder(output, made_of)
        columns = added_columns(log, (*map(teacher_column, layout.tasks), VERSION_COLUMN))
        _write_missing(log, layout, directory, copy, columns, paths)
        return Scored(output, columns)

    return ScoredLog(write_beside, write)


def added_columns(log: Log, columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the columns to add, the same ones in all files; none is in the log already."""
    while set(columns) & set(log.names):
        columns = tuple(column + SUFFIX for column in columns)
    return columns


def output_paths(log: Log, output: Path) -> list[Path]:
    """The path to write each file to, below `output` as it is below what all have in common.

    It ends in `.parquet` or `.pq`.

    Raises:
      UserError: two files would get the same one.
    """
    if not log.files:
        raise UserError("a log of data.sql cannot be written back; write its rows to Parquet files")
    # From the root no name leads further up, whatever .. an archive has in it.
    rooted = [posixpath.normpath("/" + file.lstrip("/")) for file in log.files]
    common = posixpath.commonpath(map(posixpath.dirname, rooted))
    names = [posixpath.relpath(file, common) for file in rooted]
    names = [name if name.endswith(files.SUFFIXES) else name + files.SUFFIXES[0] for name in names]
    if again := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two files of {log.url} would both be written to {min(again)}; rename one")
    return [output / name for name in names]


def _start_folder(output: Path, made_of: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if not (output / MANIFEST).exists():
        temporary = output / f".{MANIFEST}"
        temporary.write_text(made_of)
        temporary.replace(output / MANIFEST)


def _write_missing(
    log: Log,
    layout: LogLayout,
    directory: Path,
    copy: Path,
    columns: tuple[str, ...],
    outputs: Sequence[Path],
) -> None:
    """Writes those of the files that are not there yet."""
    if all(path.exists() for path in outputs):
        return
    spec = FeatureSpec.from_json((copy / storage.SPEC_FILE).read_text())
    splits = tfds.builder_from_directory(directory).info.splits
    with contextlib.ExitStack() as stack:
        work = Path(tempfile.mkdtemp(prefix=".scored-", dir=layout.directory))
        stack.callback(shutil.rmtree, work)
        run = stack.enter_context(open_pool(layout.processes))
        (work / _UNSORTED).mkdir()
        calls: list[tuple] = []
        for split in SPLITS:
            lengths = splits[split].shard_lengths
            firsts = itertools.accumulate(lengths, initial=0)
            calls += [
                (split, first, number, candidate_rows.path_of(directory, split, shard))
                for shard, (first, number) in enumerate(zip(firsts, lengths, strict=False))
            ]
        find = functools.partial(write_scores, spec, copy, work / _UNSORTED)
        for _ in run(find, calls, "reading scores"):
            pass
        write_files(
            log, layout, columns, spec.teacher_version, work / _UNSORTED, work, outputs, run
        )


def write_files(
    log: Log,
    layout: LogLayout,
    columns: Sequence[str],
    version: str,
    scores: Path,
    work: Path,
    outputs: Sequence[Path],
    run: Runner,
) -> None:
    """Writes those of the files of a log that are not there yet, with columns added.

    Args:
      log: the log.
      layout: of the log.
      columns: the names of the columns to add: one a score, in their order, and that of the
        version.
      version: of what has scored.
      scores: a folder of files as `write_scores` writes them, with the scores of all files.
      work: a folder for what is not whole yet.
      outputs: the path of each file.
      run: what writes them.

    Raises:
      UserError: a file of the log cannot be read.
    """
    missing = [file for file, path in enumerate(outputs) if not path.exists()]
    path = work / "sorted.parquet"
    with open_duckdb(layout.memory, layout.processes, work) as engine:
        unsorted = engine.backend.read_parquet(str(scores / "*.parquet"))
        wanted = unsorted.filter(unsorted.file.isin(missing)).order_by(*PLACE)
        batches = engine.stream(wanted)
        with pq.ParquetWriter(path, batches.schema, compression="lz4") as writer:
            for batch in batches:
                writer.write_batch(batch)
    write = functools.partial(write_file, log, layout, columns, version, path)
    calls = [(file, work / f"{file:06d}.parquet", outputs[file]) for file in missing]
    for _ in run(write, calls, "writing the scored log"):
        pass


def write_scores(
    spec: FeatureSpec, copy: Path, folder: Path, split: str, first: int, number: int, rows: Path
) -> None:
    """Writes the scores of some requests, with the places of their candidates in the log.

    A row a scored candidate: `file`, `row`, `place`, and its scores, here one a task.

    Args:
      spec: of the scored copy.
      copy: its folder.
      folder: to write to.
      split: of the requests.
      first: the number of the first request in that split.
      number: how many they are.
      rows: the file with the places of their candidates.

    Raises:
      UserError: the copy holds other requests.
    """
    copied = _read_scores(spec, copy, split, first, number)
    # Not by way of a path alone, which pyarrow takes for a dataset.
    with pq.ParquetFile(rows) as parquet:
        stored = parquet.read(use_threads=False)
    request_of = np.repeat(copied.request_id, copied.candidates)
    if not np.array_equal(request_of, stored["request_id"].to_numpy()):
        raise UserError(
            f"{copy} holds other requests than the dataset that it was made of holds now; remove "
            "that folder and run this again"
        )
    chosen = pa.array(runs(starts_of(copied.candidates)[:-1], copied.scored))
    columns = {name: stored[name].take(chosen) for name in PLACE}
    columns |= {teacher_column(task): pa.array(score) for task, score in copied.scores.items()}
    pq.write_table(pa.table(columns), folder / f"{split}-{first:012d}.parquet")


class _CopiedScores(NamedTuple):
    """The scores of some requests of a scored copy.

    Attributes:
      request_id: as stored.
      candidates: the number of candidates of each request.
      scored: the number of those that have a score, the first ones.
      scores: task -> the scores of all requests, one request after the other.
    """

    request_id: Int64[np.ndarray, "requests"]
    candidates: Int64[np.ndarray, "requests"]
    scored: Int64[np.ndarray, "requests"]
    scores: dict[str, Float32[np.ndarray, "n"]]


def _read_scores(
    spec: FeatureSpec, copy: Path, split: str, first: int, number: int
) -> _CopiedScores:
    column_of = {task: teacher_column(task) for task in spec.tasks}
    features = tfds.features.FeaturesDict(
        {
            name: feature
            for name, feature in record_features(spec).items()
            if name in ("request_id", "item_id", *column_of.values())
        }
    )
    records = tfds.builder_from_directory(copy).as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    request_id, candidates, scored = [], [], []
    scores: dict[str, list[np.ndarray]] = {task: [] for task in spec.tasks}
    last = min(first + number, len(records))
    for start in range(first, last, _REQUESTS):
        with damage(copy, "python -m experiments.log_teacher"):
            chunk = records.__getitems__(list(range(start, min(start + _REQUESTS, last))))
        for record in chunk:
            request = features.deserialize_example_np(record)
            request_id.append(request["request_id"])
            candidates.append(len(request["item_id"]))
            scored.append(len(request[column_of[spec.tasks[0]]]))
            for task, column in column_of.items():
                scores[task].append(request[column])
    return _CopiedScores(
        np.array(request_id, np.int64),
        np.array(candidates, np.int64),
        np.array(scored, np.int64),
        {task: np.concatenate(of_requests) for task, of_requests in scores.items()},
    )


def write_file(
    log: Log,
    layout: LogLayout,
    columns: Sequence[str],
    version: str,
    scores: Path,
    file: int,
    temporary: Path,
    output: Path,
) -> None:
    """Writes a file of the log with columns added.

    Args:
      log: the log.
      layout: of the log.
      columns: the names of the columns to add: one a score, and that of the version.
      version: of what has scored.
      scores: the files of `write_scores` as one, sorted.
      file: the number of the file in the log.
      temporary: the path to write it to.
      output: the path to move it to once it is whole.

    Raises:
      UserError: the file cannot be read.
    """
    schema = files.read_schema(log, file)
    type_ = pa.list_(pa.float32()) if layout.by_request else pa.float32()
    for column in columns[:-1]:
        schema = schema.append(pa.field(column, type_))
    schema = schema.append(pa.field(columns[-1], pa.string()))
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in log.parts:
            if part.file != file:
                continue
            end = part.first_row + part.rows
            # They are sorted, so that the bounds of row groups say which of them to read.
            of_part = pq.read_table(
                scores,
                filters=[("file", "=", file), ("row", ">=", part.first_row), ("row", "<", end)],
                use_threads=False,
            )
            found = {name: of_part[name].to_numpy() for name in of_part.column_names}
            for _, row, batch in files.read_parts(log, [part], None):
                added = _columns_of(layout, version, found, row, batch)
                writer.write_batch(pa.record_batch([*batch.columns, *added], schema))
    output.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, output)


def _columns_of(
    layout: LogLayout,
    version: str,
    scores: Mapping[str, np.ndarray],
    first_row: int,
    batch: pa.RecordBatch,
) -> list[pa.Array]:
    """The columns to add to a batch; `scores` are sorted by their rows."""
    chosen = slice(*np.searchsorted(scores["row"], [first_row, first_row + batch.num_rows]))
    row = scores["row"][chosen] - first_row
    added, places, number = [], row, batch.num_rows
    offsets = None
    if layout.by_request:
        # As long as the row's list of items, so that all its lists stay of one length.
        _, length, valid, _ = lists_of(batch.column(layout.columns["item"]))
        ends = starts_of(length)
        offsets = pa.array(ends.astype(np.int32), mask=np.append(~valid, False))
        number = int(ends[-1])
        places = ends[row] + scores["place"][chosen]
    for name in (name for name in scores if name not in PLACE):
        score, unknown = np.zeros(number, np.float32), np.ones(number, bool)
        score[places] = scores[name][chosen]
        unknown[places] = False
        array = pa.array(score, mask=unknown)
        added.append(array if offsets is None else pa.ListArray.from_arrays(offsets, array))
    return [*added, _version_of(version, np.isin(np.arange(batch.num_rows), row))]


def _version_of(version: str, scored: Bool[np.ndarray, "n"]) -> pa.Array:
    """The version where a row has any score."""
    return pc.if_else(pa.array(scored), pa.scalar(version), pa.scalar(None, pa.string()))
