"""Public datasets: find or fetch the raw files, convert them into a log once, and open that log.

A converter's log has one row per request, or per candidate. Its columns of the roles in
`config.data.columns`, such as `request` and `split`, have the names of these, so that a config
names only labels, teacher, incumbent and features.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pooch
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.manifest import digest, write_whole
from kd_ranker.requests.lock import hold_work
from kd_ranker.requests.request import SPLITS, starts_of
from kd_ranker.requests.source import Source
from kd_ranker.sources.logs import source as parquet
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.layout import IDENTIFYING, OPTIONAL, STAGES
from kd_ranker.sources.logs.vocabulary import MANIFEST

_ROWS = 256  # requests that are in memory before they are written
BLOCK_KEYS = (
    "ratings_per_request",
    "validation_share",
    "test_share",
    "validation_requests_per_user",
    "test_requests_per_user",
)
"""The keys of `config.data` that `cut_blocks` reads."""


class Converter(NamedTuple):
    """The conversion of one public dataset: `write` puts the log of raw files into a folder."""

    keys: Sequence[str]  # of `config.data` that decide the content of the log, next to `seed`
    find_files: Callable[[ConfigDict], Sequence[Path]]  # raises UserError for a missing one
    write: Callable[[ConfigDict, Sequence[Path], Path], None]
    version: int = 1  # raised whenever `write` writes another log for the same files and keys

    def open_source(self, data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
        """Open the dataset as a source; the log is stored below `data.dir`, in `logs`."""
        files = self.find_files(data)
        folder = self._folder(data, files)
        if not folder.exists():
            self._convert(data, files, folder)
        source = parquet.open_source(_log_config(data, folder), tasks, funnel)
        spec = dataclasses.replace(source.spec, dataset=str(data.name))
        return dataclasses.replace(source, spec=spec)

    def _convert(self, data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
        """Write the log of raw files to `folder`; UserError if another process does so now."""
        with hold_work(folder.with_name(f".unfinished-{folder.name}")) as work:
            if folder.exists():  # another process has finished it meanwhile
                return
            log = work / "log"
            log.mkdir()
            try:
                self.write(data, files, log)
            except (duckdb.Error, pa.ArrowException) as error:
                raise UserError(
                    f"the files in {files[0].parent} cannot be read: {line_of(error)}; mend or "
                    "replace them"
                ) from error
            log.rename(folder)

    def check_unchanged(self, data: ConfigDict, directory: Path) -> None:
        """Raise UserError if raw files are not those of the dataset in `directory`, or missing."""
        manifest = directory / MANIFEST
        if not data.path or not Path(data.path).exists() or not manifest.exists():
            return
        log = self._folder(data, self.find_files(data)).name
        if any(Path(file).parent.name != log for file in json.loads(manifest.read_text())):
            raise UserError(
                f"the files at {data.path} have changed since {directory} was made of them; give "
                "another data.dir to make a dataset of them as they are now, or restore them"
            )

    def _folder(self, data: ConfigDict, files: Sequence[Path]) -> Path:
        """Return the folder of the log, named by all that decides its content."""
        logs = Path(data.dir) / "logs"
        names = [file.name for file in files]
        contents = [list(pair) for pair in zip(names, _digests(files, logs), strict=True)]
        config = data.copy_and_resolve_references().to_dict()
        values = {key: config.get(key) for key in (*self.keys, "seed")}
        return logs / f"{data.name}-{digest([self.version, values, contents])}"


def _log_config(data: ConfigDict, folder: Path) -> ConfigDict:
    """Return the config of the log in a folder, by the names of its columns."""
    schema = pq.read_schema(next(folder.glob("*.parquet")))
    roles = {role: role for role in (*IDENTIFYING, *OPTIONAL) if role in schema.names}
    has_lists = pa.types.is_nested(schema.field("item").type)
    config = data.copy_and_resolve_references()
    with config.unlocked():
        config.path = str(folder)
        config.sql = ""
        config.rows = "request" if has_lists else "candidate"
        config.columns = ConfigDict(roles | data.columns.to_dict())
        config.stages = ConfigDict({stage: stage for stage in STAGES})
        if config.split == "column" and "split" not in roles:
            config.split = "request"
    return config


def _digests(files: Sequence[Path], logs: Path) -> list[str]:
    """Return the SHA-256 of each file.

    A folder of logs stores the digests of files with their size and time, so that no file is read
    twice. A copy of the files has the same digests.
    """
    record = logs / ".raw_files.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    digests = []
    for file in files:
        stat = file.stat()
        key = f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            known[key] = pooch.file_hash(file)
            with contextlib.suppress(OSError):  # a folder that may only be read
                logs.mkdir(parents=True, exist_ok=True)
                write_whole(record, json.dumps(known))
        digests.append(known[key])
    return digests


def find_raw(data: ConfigDict, names: Iterable[str], where: str, folder: str = "") -> list[Path]:
    """Return the paths of files in `data.path`, or in another folder if that is empty.

    UserError names one that is missing, and `where` they come from.
    """
    folder = data.path or folder
    paths = [Path(folder) / name for name in names]
    for path in paths:
        if not folder or not path.is_file():
            raise UserError(f"{path} does not exist; set data.path to the folder of {where}")
    return paths


def fetch(url: str, sha256: str, data_dir: str) -> Path:
    """Return a file below `data_dir/downloads`, or the folder of the contents of a zip archive.

    Downloads it unless it is there. UserError: it cannot be fetched, or is another file.
    """
    folder = Path(data_dir) / "downloads"
    name = url.rpartition("/")[2]
    unpacked = folder / sha256[:16]
    if unpacked.exists():
        return unpacked
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=20
    )
    try:
        file = Path(pooch.retrieve(url, f"sha256:{sha256}", name, folder, downloader=downloader))
        if file.suffix != ".zip":
            return file
        # Not by pooch: a run that is killed while it unpacks would leave half of the files.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            shutil.unpack_archive(file, Path(temporary) / "whole")
            (Path(temporary) / "whole").rename(unpacked)
        file.unlink()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"could not fetch {url} ({reason}); fetch it by hand, unpack it if it is an archive, "
            "and set data.path to the folder of the files"
        ) from error
    return unpacked


def connect(data: ConfigDict, folder: Path) -> duckdb.DuckDBPyConnection:
    """Open an engine with the memory of `data.memory`; the rest goes to a folder."""
    con = duckdb.connect()
    con.execute(f"SET memory_limit = '{data.memory * 1024:.0f}MiB'")
    con.execute("SET temp_directory = ?", [str(folder / ".spilled")])
    return con


def columns(names: Iterable[str]) -> str:
    r"""SQL for each of some columns; `AS '\1'` after an expression of it keeps the name."""
    return f"COLUMNS('^({'|'.join(names)})$')"


def draw(seed: int, key: str, most: int) -> str:
    """SQL that orders rows by a hash of the seed and a key, and keeps `most`; 0 keeps all."""
    limit = f"LIMIT {most}" if most else ""
    return f"ORDER BY md5(concat_ws(' ', {seed}, {key})) {limit}"


def moment_of(seconds: str) -> str:
    """SQL for the hour, as a point on a circle, and the weekday, from Monday, 0."""
    angle = f"2 * pi() * (({seconds}) % 86400) / 86400"
    day = f"(({seconds}) // 86400 + 3) % 7"
    return f"sin({angle})::FLOAT AS hour_sin, cos({angle})::FLOAT AS hour_cos, {day} AS weekday"


class Block(NamedTuple):
    """Consecutive ratings of a user, which become a request."""

    number: int  # of the block, among all blocks of the user
    split: str
    start: int  # the first rating
    end: int  # after the last rating


def cut_blocks(time: Int64[np.ndarray, "n"], data: ConfigDict) -> Iterator[Block]:
    """Yield the blocks of a user's ratings that become requests; `time` ascends.

    A block takes `data.ratings_per_request` ratings, and then all that share the last one's
    second. A last block of less than half of that joins the one before it, if there is one. A
    split starts with the block, not the first, that starts nearest to its share.
    """
    starts = _block_starts(time, int(data.ratings_per_request))
    ends = [*starts[1:], len(time)]
    stop = len(starts)  # the first block of the later splits
    later_share = 0.0
    for split in reversed(SPLITS):
        first = 0
        if split != "train":
            later_share += data[f"{split}_share"]
            first = stop
            if later_share and stop > 1:
                distance = np.abs(np.array(starts[1:stop]) - (1 - later_share) * len(time))
                first = 1 + int(distance.argmin())
        most = data.get(f"{split}_requests_per_user") or None
        for number in range(first, stop)[:most]:
            yield Block(number, split, starts[number], ends[number])
        stop = first


def _block_starts(time: Int64[np.ndarray, "n"], size: int) -> list[int]:
    """Return the first rating of each block."""
    starts = [0]
    while starts[-1] + size <= len(time):
        last = time[starts[-1] + size - 1]
        starts.append(int(np.searchsorted(time, last, side="right")))
    if len(starts) > 1 and 2 * (len(time) - starts[-1]) < size:
        starts.pop()
    return starts


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a log with one row per request: numbers, texts, arrays, matrices, Arrow's lists."""
    writer = None
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, _ROWS)):
        columns = {name: _column([row[name] for row in chunk]) for name in chunk[0]}
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is None:
        raise UserError("the raw files hold no request; give whole ones, or others in data.path")
    writer.close()


def _column(values: list[Any]) -> pa.Array:
    """Return a column of one entry per request, a list for an array and for Arrow's lists."""
    if isinstance(values[0], np.ndarray):
        entries = np.concatenate(values)
        if entries.ndim == 2:
            number, width = entries.shape
            entries = pa.LargeListArray.from_arrays(np.arange(number + 1) * width, entries.ravel())
    elif isinstance(values[0], pa.Array):
        entries = pa.concat_arrays(values)
    else:
        return pa.array(values)
    lengths = np.array([len(value) for value in values])
    return pa.LargeListArray.from_arrays(starts_of(lengths), entries)
