"""The files of a log, or its SELECT: list them, read their schemas, and know them again."""

import contextlib
import glob
import hashlib
import itertools
import re
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import unquote

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.columns import (
    check_columns,
    check_ids,
    check_names,
    check_present,
    check_types,
    wanted_columns,
)
from kd_ranker.sources.logs.layout import (
    PARQUET,
    LogLayout,
    is_text_log,
    split_at_commas,
    sql_of_texts,
)

# Stands for the text of `data.sql` among the files of a manifest.
SQL = "data.sql"

Manifest = dict[str, list]
"""File -> its size in bytes, and a text that changes when it is rewritten.

A SELECT has the files that it reads, and `SQL`.
"""

# How many footers are read at a time: a store far away answers many requests at once.
_FOOTERS_AT_A_TIME = 16
# The names under which different stores keep a mark that differs once a file is rewritten.
_CHANGED = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag")
# A missing value in the name of a folder.
_NONE = "__HIVE_DEFAULT_PARTITION__"


class Log(NamedTuple):
    """A log whose columns are checked; one that a SELECT yields has no `files`."""

    name: str  # for messages
    system: Any  # the file system
    files: tuple[str, ...]  # the paths to read, sorted
    manifest: Manifest
    names: tuple[str, ...]  # all columns of any file, sorted
    # Columns from the names of folders, such as `date=2024-05-01/`: a row per file.
    folder_columns: pa.Table
    sql: str = ""  # `data.sql`, or the SELECT of text files at `data.path`

    @property
    def size(self) -> int:
        """The bytes of all files to read; 0 if it is not known."""
        return sum(self.manifest[file][0] for file in self.files)


class Files(NamedTuple):
    """Files, and the file system that they are on."""

    system: Any
    manifest: Manifest  # sorted by file


def open_log(layout: LogLayout, earlier: Collection[str] = ()) -> Log:
    """Find the files of a log, and check their footers; those in `earlier` are only listed.

    Raises:
      UserError: there are no files, one is not a Parquet file, or a column is missing.
    """
    if layout.sql:
        return _open_select(layout)
    system, manifest = find_files(layout.path)
    is_new = [file not in earlier for file in manifest]
    files = tuple(itertools.compress(manifest, is_new))
    schemas = _read_schemas(system, files)
    names = sorted({name for schema in schemas.values() for name in schema.names})
    folder_columns = {
        name: values.filter(is_new)
        for name, values in read_folder_columns(manifest).items()
        if name not in names  # a column in a file takes precedence
    }
    names_by_file = {file: [*schema.names, *folder_columns] for file, schema in schemas.items()}
    check_columns(layout, names_by_file)
    check_ids(layout, schemas)
    return Log(
        name=split_at_commas(layout.path)[0],
        system=system,
        files=files,
        manifest=manifest,
        names=tuple(names),
        folder_columns=pa.table(folder_columns),
    )


def _read_schemas(system: Any, files: Sequence[str]) -> Mapping[str, pa.Schema]:
    def read_schema(file: str) -> pa.Schema:
        with open_parquet(system, file) as parquet:
            return parquet.schema_arrow

    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        return dict(zip(files, pool.map(read_schema, files), strict=True))


def _open_select(layout: LogLayout) -> Log:
    """Check the SELECT that yields a log, and its columns."""
    sql, path = layout.sql, layout.path
    try:
        with duckdb.connect() as connection:
            statements = duckdb.extract_statements(sql)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                raise UserError(f"data.sql must be one SELECT, not {textwrap.shorten(sql, 80)!r}")
            register_stores(connection, sql)
            rows = connection.sql(sql)
            check_names(path, rows.columns)
            if is_text_log(path):
                sql = _sql_of_text_log(layout, connection, rows)
            schema = connection.sql(sql).limit(0).to_arrow_table().schema
    except duckdb.Error as error:
        raise UserError(f"{path}: {line_of(error)}") from error
    check_columns(layout, {path: schema.names})
    check_types(layout, dict(zip(schema.names, schema.types, strict=True)))
    return Log(
        name=path,
        system=None,
        files=(),
        manifest=manifest_of("", layout.sql),
        names=tuple(schema.names),
        folder_columns=pa.table({}),
        sql=sql,
    )


def _sql_of_text_log(
    layout: LogLayout, connection: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation
) -> str:
    """Return the SELECT of text files in which ids that look like fractions are texts.

    As numbers, the ids 1e5 and 100000 would be one.
    """
    if not rows.limit(1).fetchall():
        raise UserError(f"{layout.path} has no rows; name files with some in data.path")
    types = dict(zip(rows.columns, map(str, rows.types), strict=True))
    ids = [
        wanted
        for wanted in wanted_columns(layout)
        if wanted.use == "id"
        and wanted.key.startswith("data.columns.")
        and types.get(wanted.column) == "DOUBLE"
    ]
    if ids:
        for file in split_at_commas(layout.path):
            check_present(file, ids, connection.sql(sql_of_texts(file)).columns)
    return sql_of_texts(layout.path, [wanted.column for wanted in ids])


def line_of(error: duckdb.Error) -> str:
    """Return the first paragraph of DuckDB's message in one line, without its advice."""
    first = re.split(r"\n\n|Possible fixes|The search space", str(error))[0]
    return " ".join(first.split())


def register_stores(connection: Any, sql: str) -> None:
    """Let DuckDB read the URLs in a query by fsspec.

    Raises:
      UserError: a protocol is unknown, or a package that it needs is not installed.
    """
    for protocol in sorted({*re.findall(r"['\"](\w+)://", sql)}):
        try:
            register_store(connection, fsspec.filesystem(protocol))
        except ImportError as error:
            raise UserError(
                f"{protocol}:// cannot be read: {error}; install the packages that are named here "
                "with pip"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{protocol}:// cannot be read: {error}; copy the files to this machine, and name "
                "them there"
            ) from error


def register_store(connection: Any, system: Any) -> None:
    """Let DuckDB read from a file system of fsspec."""
    protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    if not {*protocols} & {*connection.list_filesystems()}:
        connection.register_filesystem(system)


def manifest_of(path: str, sql: str = "") -> Manifest:
    """Return the current manifest of a log, without files that are gone."""
    if sql:
        return _manifest_of_select(sql)
    manifest: Manifest = {}
    for url in split_at_commas(path):
        with contextlib.suppress(UserError):
            manifest |= find_files(url).manifest
    return manifest


def _manifest_of_select(sql: str) -> Manifest:
    manifest: Manifest = {SQL: [len(sql), hashlib.sha256(sql.encode()).hexdigest()]}
    for in_single_quotes, in_double_quotes in re.findall(r"'((?:[^']|'')+)'|\"([^\"]+)\"", sql):
        text = (in_single_quotes or in_double_quotes).replace("''", "'")
        # A text that is not the name of a file is another value of the query.
        with contextlib.suppress(Exception):
            system, pattern = fsspec.core.url_to_fs(text)
            manifest |= _manifest(system, filter(system.isfile, system.glob(pattern)))
    return manifest


def _manifest(system: Any, files: Iterable[str]) -> Manifest:
    manifest: Manifest = {}
    for file in files:
        info = system.info(file)
        changed = "; ".join(str(info[key]) for key in _CHANGED if info.get(key))
        manifest[file] = [int(info["size"] or 0), changed]
    return manifest


def manifest_differences(before: Manifest, now: Manifest) -> str:
    """Return the differences of two manifests in words; "" if they are equal."""
    in_both = now.keys() & before.keys()
    counts = {
        "new": len(now.keys() - before.keys()),
        "gone": len(before.keys() - now.keys()),
        "rewritten": sum(now[file] != before[file] for file in in_both),
    }
    return ", ".join(
        f"{number:,} {'file' if number == 1 else 'files'} {change}"
        for change, number in counts.items()
        if number
    )


def find_files(path: str) -> Files:
    """Find the Parquet files at `data.path`.

    Raises:
      UserError: there are no files, or they are on several file systems.
    """
    urls = split_at_commas(path)
    if not urls:
        raise UserError(f"data.path={path!r} names no file; give a file, a directory or a glob")
    try:
        places = [_Place(url, *fsspec.core.url_to_fs(url)) for url in urls]
        system = places[0].system
        # Of one kind there may be several: two hosts, two archives.
        if any(place.system is not system for place in places):
            raise UserError(f"data.path={path} names several file systems; give those of one")
        files = set(itertools.chain.from_iterable(map(_files_at, places)))
        return Files(system, _manifest(system, sorted(files)))
    except UserError:
        raise
    # Stores raise errors of many kinds: an unknown protocol, a missing package, refused access.
    except Exception as error:
        raise UserError(
            f"data.path={path} cannot be read: {error}; check that it exists, and that this "
            "machine may read it"
        ) from error


class _Place(NamedTuple):
    """What a URL names: a path of a file system."""

    url: str
    system: Any
    path: str


def _files_at(place: _Place) -> list[str]:
    """Return the files that a URL names."""
    url, system, path = place
    if glob.has_magic(path):
        files = [file for file in system.glob(path) if system.isfile(file)]
        if not files:
            raise UserError(f"data.path={url} matches no file; give a glob that does")
        return files
    if system.isdir(path):
        return _files_in_folder(place)
    if not system.isfile(path):
        raise UserError(f"data.path={url} does not exist; give a file, a directory or a glob")
    return [path]


def _files_in_folder(place: _Place) -> list[str]:
    url, system, folder = place
    # File -> the names of its folders below this one, and its own.
    names_of = {
        file: file.removeprefix(folder).strip("/").split("/") for file in system.find(folder)
    }
    if any("_delta_log" in names for names in names_of.values()):
        logging.warning(
            "%s is a Delta table: all its files are read, of earlier versions too; if there are "
            "several versions, write the right one to a separate folder",
            url,
        )
    visible = [file for file, names in names_of.items() if not any(map(_is_hidden, names))]
    files = [file for file in visible if file.endswith(PARQUET)]
    if files:
        return files
    content = f"holds {names_of[visible[0]][-1]}" if visible else "is empty"
    raise UserError(
        f"data.path={url} holds no file that ends in {PARQUET[0]}; it {content}; give a pattern "
        "for files of other kinds, such as logs/*.csv, or a SELECT by data.sql"
    )


def _is_hidden(name: str) -> bool:
    """Return True for names of unfinished files and metadata, which belong to the writer."""
    return name.startswith(("_", ".")) and "=" not in name


def read_folder_columns(files: Collection[str]) -> dict[str, pa.Array]:
    """Return the columns that the names of folders give, as in Hive: `name=value/`.

    The values are integers if all of them are, else texts.
    """
    folders = [dict(re.findall(r"([^/=]+)=([^/]*)(?=/)", file)) for file in files]
    columns = {}
    for name in dict.fromkeys(itertools.chain(*folders)):
        texts = [_text_of_folder(folder.get(name, _NONE)) for folder in folders]
        columns[name] = pa.array(texts, pa.string())
        with contextlib.suppress(pa.ArrowInvalid):
            columns[name] = columns[name].cast(pa.int64())
    return columns


def _text_of_folder(value: str) -> str | None:
    return None if value == _NONE else unquote(value)


@contextlib.contextmanager
def open_parquet(system: Any, file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, and raise a UserError if it cannot be read."""
    try:
        with pq.ParquetFile(file, filesystem=system, page_checksum_verification=True) as parquet:
            yield parquet
    # A store that cannot read a part of a file raises a ValueError.
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as Parquet: {error}; write it again, or leave it out"
        ) from error
