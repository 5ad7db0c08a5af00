"""Public datasets: convert the raw files into a log once, and open that log as any other."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.manifest import digest, write_whole
from kd_ranker.requests.request import Source, starts_of
from kd_ranker.sources.download import Archive, fetch
from kd_ranker.sources.logs import source as parquet
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.vocabulary import MANIFEST

# Requests that are held before they are written.
_AT_A_TIME = 256


class Converter(NamedTuple):
    """The conversion of one public dataset.

    Attributes:
      keys: the keys of `config.data` that decide the content of the log, next to `seed`.
      find_files: config.data -> the raw files; raises UserError for a missing one.
      write: (config.data, raw files, an empty folder) -> None; writes the log, in Parquet files.
      version: raised whenever `write` writes another log for the same files and keys.
    """

    keys: Sequence[str]
    find_files: Callable[[ConfigDict], Sequence[Path]]
    write: Callable[[ConfigDict, Sequence[Path], Path], None]
    version: int = 1


def open_source(
    converter: Converter, data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict
) -> Source:
    """Open a public dataset as a source; the log is stored below `data.dir`, in `logs`.

    Raises:
      UserError: the raw files are missing or malformed, or the log cannot be used.
    """
    files = converter.find_files(data)
    folder = _folder(converter, data, files)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".log-", dir=folder.parent) as temporary:
            log = Path(temporary) / "log"
            log.mkdir()
            try:
                converter.write(data, files, log)
            except (duckdb.Error, pa.ArrowException) as error:
                raise UserError(
                    f"the files at {files[0].parent} cannot be read: {line_of(error)}"
                ) from error
            log.rename(folder)
    own = data.copy_and_resolve_references()
    own.path = str(folder)
    source = parquet.open_source(own, tasks, funnel)
    spec = dataclasses.replace(source.spec, dataset=str(data.name))
    return dataclasses.replace(source, spec=spec)


def check_unchanged(converter: Converter, data: ConfigDict, directory: Path) -> None:
    """Check that the raw files are those of the dataset in `directory`; missing files are fine.

    Raises:
      UserError: a file has changed.
    """
    manifest = directory / MANIFEST
    if not data.path or not Path(data.path).exists() or not manifest.exists():
        return
    name = _folder(converter, data, converter.find_files(data)).name
    if any(Path(file).parent.name != name for file in json.loads(manifest.read_text())):
        raise UserError(
            f"the files at {data.path} have changed since {directory} was made of them; give "
            "another data.dir to make a dataset of them as they are now, or restore them"
        )


def _folder(converter: Converter, data: ConfigDict, files: Sequence[Path]) -> Path:
    """The folder of the log, named by all that decides its content."""
    logs = Path(data.dir) / "logs"
    contents = [[file.name, of] for file, of in zip(files, _digests(files, logs), strict=True)]
    given = data.copy_and_resolve_references().to_dict()
    values = {key: given.get(key) for key in (*converter.keys, "seed")}
    return logs / f"{data.name}-{digest([converter.version, values, contents])}"


def _digests(files: Sequence[Path], logs: Path) -> list[str]:
    """The SHA-256 of each file; a folder of logs keeps those of files with the same size and time.

    A copy of the files is thus the same dataset.
    """
    record = logs / ".raw_files.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    found = []
    for file in files:
        stat = file.stat()
        key = f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as raw:
                known[key] = hashlib.file_digest(raw, "sha256").hexdigest()
            with contextlib.suppress(OSError):  # a folder that may only be read
                logs.mkdir(parents=True, exist_ok=True)
                write_whole(record, json.dumps(known))
        found.append(known[key])
    return found


def find_raw(data: ConfigDict, archive: Archive, names: Sequence[str]) -> list[Path]:
    """The paths of files in `data.path`, or of the archive if that is empty; fetches it.

    Raises:
      UserError: one of the files is missing.
    """
    folder = Path(data.path) if data.path else fetch(archive, data.dir)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist; unpack {archive.url} and set data.path to the "
                f"folder that holds {', '.join(names)}"
            )
    return [folder / name for name in names]


def connect(data: ConfigDict, folder: Path) -> duckdb.DuckDBPyConnection:
    """Open an engine with the memory of `data.memory`; the rest goes to a folder."""
    con = duckdb.connect()
    con.execute(f"SET memory_limit = '{data.memory * 1024:.0f}MiB'")
    con.execute("SET temp_directory = ?", [str(folder / ".spilled")])
    return con


def check_none(con: duckdb.DuckDBPyConnection, faults: Mapping[str, str], folder: Path) -> None:
    """Raise UserError where the SQL of a fault, named by its description, returns a row."""
    for fault, sql in faults.items():
        for row in con.sql(sql).limit(1).fetchall():
            raise UserError(f"{folder}: {fault}: {', '.join(map(str, row))}")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a log with one row per request.

    Args:
      path: of the file.
      rows: column -> number or text; list (a NumPy array); or list of lists (a matrix, or a pyarrow
        ListArray).
    """
    writer, left = None, iter(rows)
    while chunk := list(itertools.islice(left, _AT_A_TIME)):
        columns = {name: _column([row[name] for row in chunk]) for name in chunk[0]}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        raise UserError("the raw files hold no request")
    writer.close()


def _column(values: list[Any]) -> pa.Array:
    if not isinstance(values[0], np.ndarray | pa.Array):
        return pa.array(values)
    inner = (
        np.concatenate(values) if isinstance(values[0], np.ndarray) else pa.concat_arrays(values)
    )
    if isinstance(inner, np.ndarray) and inner.ndim == 2:
        number, width = inner.shape
        inner = pa.LargeListArray.from_arrays(np.arange(number + 1) * width, inner.ravel())
    return pa.LargeListArray.from_arrays(starts_of(np.array(list(map(len, values)))), inner)
