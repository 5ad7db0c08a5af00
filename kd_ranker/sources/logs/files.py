"""The files of a log, or its SELECT: find them and check their columns."""

import contextlib
import dataclasses
import difflib
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import unquote

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging
from fsspec.implementations.local import LocalFileSystem

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.layout import (
    IDENTIFYING,
    OPTIONAL,
    LogLayout,
    reader_of,
    rows_of,
    split_path,
    text_files,
)

SUFFIXES = (".parquet", ".pq")
# How many footers are read at a time: a store far away answers many requests at once.
_FOOTERS_AT_A_TIME = 16
_OTHERS = "give a pattern for files of other kinds, such as logs/*.csv, or a SELECT by data.sql"
# The names under which different stores keep a mark that differs once a file is rewritten.
_CHANGED = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag")
# The head of a page in Thrift's compact protocol: its type, its two sizes, and then the checksum.
_WITH_CHECKSUM = re.compile(rb"(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x15", re.DOTALL)

# A missing value in the name of a folder.
_NONE = "__HIVE_DEFAULT_PARTITION__"

# Names of columns that the engines add.
_OF_ENGINES = ("file_row_number", "__file")

# Stands for the text of `data.sql` among the files of a manifest.
SQL = "data.sql"

_INTEGER, _FLOAT, _DECIMAL, _BOOLEAN = "integer", "float", "decimal", "boolean"
_UNSIGNED = "uint64"
_TEXT, _TIME, _NULL, _OTHER = "text", "time", "null", "other"
_FAMILIES = {
    _NULL: "null",
    _BOOLEAN: "bool",
    _INTEGER: r"u?int\d+",
    _FLOAT: "halffloat|float|double",
    _DECIMAL: r"decimal\d+\(.*",
    _TIME: r"(timestamp|date).*",
    _TEXT: r"(large_)?(string|binary)(_view)?|fixed_size_binary.*|extension<arrow\.uuid>",
}
# Use of a column -> types that its values may have, and these in words.
_TAKES = {
    "id": ((_INTEGER, _FLOAT, _DECIMAL, _BOOLEAN, _TEXT, _NULL), "whole numbers or texts"),
    "number": ((_INTEGER, _FLOAT, _DECIMAL, _BOOLEAN, _NULL), "numbers"),
    "label": ((_INTEGER, _FLOAT, _DECIMAL, _BOOLEAN, _TEXT, _NULL), "numbers, or true and false"),
    "time": ((_INTEGER, _FLOAT, _TIME, _TEXT, _NULL), "timestamps, numbers or ISO texts"),
    "text": ((_INTEGER, _BOOLEAN, _TEXT, _NULL), "texts or whole numbers"),
}
_USE_OF_COLUMN = dict.fromkeys(("request", "user", "item"), "id") | {"time": "time"}
_USE_OF_COLUMN |= dict.fromkeys(("stage", "teacher_version", "split"), "text")
_USE_OF_KIND = {"dense": "number", "category": "id", "bag": "id", "history": "id"}


_LISTS = (
    pa.ListType,
    pa.LargeListType,
    pa.FixedSizeListType,
    pa.ListViewType,
    pa.LargeListViewType,
)


class Wanted(NamedTuple):
    """A column that the config names.

    Attributes:
      key: of the config.
      column: its name.
      use: a key of `_TAKES`.
      depth: the most nested lists around its values.
      least_depth: the fewest.
      per_candidate: True if each candidate has a value. A row that is a request has a list of them.
    """

    key: str
    column: str
    use: str
    depth: int = 0
    least_depth: int = 0
    per_candidate: bool = False

    @property
    def is_feature(self) -> bool:
        """True for a column in `data.features`."""
        return self.key.startswith("data.features.")


@dataclasses.dataclass(frozen=True)
class Log:
    """A log, found and checked.

    Attributes:
      url: the first path in `data.path`; the others are in its file system. "" for a SELECT.
      files: the paths to read, sorted; () for a SELECT.
      manifest: file -> its size in bytes, and a text that changes when it is rewritten. A SELECT
        has the files that it reads, and `SQL`.
      candidates: their approximate number; 0 if it is not known.
      names: all columns of any file, sorted.
      given: columns from the names of folders such as `date=2024-05-01/`, one row per file.
      sql: `data.sql`, or the SELECT of text files at `data.path`.
      name: of the SELECT in messages, as `LogLayout.path`.
    """

    url: str
    files: tuple[str, ...]
    manifest: dict[str, list]
    candidates: int
    names: tuple[str, ...]
    given: pa.Table
    sql: str = ""
    name: str = ""


def wanted_columns(layout: LogLayout) -> list[Wanted]:
    """Return the columns that a log must have."""
    listed = 1 if layout.by_request else 0
    wanted = []
    for name in (of for of in (*IDENTIFYING, *OPTIONAL) if of in layout.columns):
        is_listed = name not in ("request", "time", "user")
        depth = listed if is_listed else 0
        # Other columns need no list if all candidates of a request have the same value.
        least = depth if name in ("item", "stage", "position", "incumbent") else 0
        use = _USE_OF_COLUMN.get(name, "number")
        column = layout.columns[name]
        wanted.append(Wanted(f"data.columns.{name}", column, use, depth, least, is_listed))
    for section, use in (("labels", "label"), ("teacher", "number")):
        wanted += [
            Wanted(f"data.{section}.{task}", column, use, listed, listed, True)
            for task, column in getattr(layout, section).items()
        ]
    for feature in layout.features:
        lists = (feature.kind in ("bag", "history")) + (feature.of == "event")
        lists += feature.place is not None
        depth = (0 if feature.of_request else listed) + lists
        key = f"data.features.{feature.key}"
        use = _USE_OF_KIND[feature.kind]
        wanted.append(Wanted(key, feature.column, use, depth, depth, not feature.of_request))
    return list(dict.fromkeys(wanted))


def open_log(layout: LogLayout, earlier: Collection[str] = ()) -> Log:
    """Find the files of a log and check that they have the columns that the config names.

    It reads footers only.

    Args:
      layout: of the log.
      earlier: files to check with the others and to leave out, except in the manifest.

    Raises:
      UserError: there are no files, one is not a Parquet file, or a column is missing or has a type
        that does not fit its use.
    """
    if layout.sql:
        sql, schema = _select_of(layout)
        _check_columns(layout, {layout.path: schema}, schema.names)
        names, manifest = tuple(schema.names), manifest_of("", layout.sql)
        return Log("", (), manifest, 0, names, given_by_folders([]), sql, layout.path)
    system, manifest = find_files(layout.path)
    files = list(manifest)
    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        footers = list(pool.map(lambda file: _footer(system, file, layout), files))
    own = [place for place, file in enumerate(files) if file not in earlier]
    names = tuple(sorted({name for place in own for name in footers[place].schema.names}))
    # A column in a file takes precedence over the names of folders.
    in_files = {name for footer in footers for name in footer.schema.names}
    given = given_by_folders(files)
    given = given.drop_columns([name for name in given.column_names if name in in_files])
    schemas = {
        file: pa.schema([*footer.schema, *given.schema])
        for file, footer in zip(files, footers, strict=True)
    }
    _check_columns(layout, schemas, (*names, *given.column_names))
    if not sum(footers[place].rows for place in own):
        raise UserError(f"data.path={layout.path}: {_count(len(own), 'file')} without any row")
    candidates = sum(footers[place].candidates for place in own)
    read = tuple(files[place] for place in own)
    return Log(split_path(layout.path)[0], read, manifest, candidates, names, given.take(own))


def _select_of(layout: LogLayout) -> tuple[str, pa.Schema]:
    """Return the SELECT that yields a log, and its columns.

    Raises:
      UserError: it is not one SELECT that DuckDB can run, two columns have the same name, or text
        files have no rows.
    """
    sql, connection = layout.sql, duckdb.connect()
    try:
        statements = duckdb.extract_statements(sql)
        if [of.type for of in statements] != [duckdb.StatementType.SELECT]:
            raise UserError("data.sql must be one SELECT")
        register_stores(connection, sql)
        if texts := text_files(layout.path):
            if not connection.execute(f"SELECT 1 FROM (\n{sql}\n) LIMIT 1").fetchone():
                raise UserError(f"{layout.path} has no rows")
            sql = _rows_with_text_ids(connection, texts, layout)
        names = connection.sql(sql).columns
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{layout.path} makes column {min(twice)!r} twice; rename one of them")
        return sql, connection.sql(f"SELECT * FROM (\n{sql}\n) LIMIT 0").to_arrow_table().schema
    except duckdb.Error as error:
        raise UserError(f"{layout.path}: {line_of(error)}") from error
    finally:
        connection.close()


def _rows_with_text_ids(
    connection: duckdb.DuckDBPyConnection, paths: Sequence[str], layout: LogLayout
) -> str:
    """Return the SELECT of text files, where ids that look like fractions are texts.

    Among such ids, 1e5 and 100000 would be one number.
    """
    ids = [layout.columns[of] for of in ("request", "user", "item") if of in layout.columns]
    readers = []
    for path in paths:
        columns = connection.execute(f"DESCRIBE FROM {reader_of(path)}").fetchall()
        fractions = [name for name, type_, *_ in columns if type_ in ("DOUBLE", "FLOAT")]
        readers.append(reader_of(path, [of for of in fractions if of in ids]))
    return rows_of(readers)


def line_of(error: duckdb.Error) -> str:
    """Return the first paragraph of DuckDB's message in one line, without its advice."""
    first = re.split(r"\n\n|Possible fixes|The search space", str(error))[0]
    return " ".join(first.split())


def register_stores(connection: Any, sql: str) -> None:
    """Let DuckDB read the URLs in a query by fsspec."""
    for protocol in {*re.findall(r"['\"](\w+)://", sql)}:
        register_store(connection, fsspec.filesystem(protocol))


def register_store(connection: Any, system: Any) -> None:
    """Let DuckDB read from a file system of fsspec."""
    names = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    if not {*names} & {*connection.list_filesystems()}:
        connection.register_filesystem(system)


def manifest_of(path: str, sql: str = "") -> dict[str, list]:
    """Return the current `Log.manifest` of a log.

    Raises:
      UserError: there are no files at `path`.
    """
    if not sql:
        return find_files(path)[1]
    manifest: dict[str, list] = {SQL: [len(sql), hashlib.sha256(sql.encode()).hexdigest()]}
    for text in re.findall(r"'((?:[^']|'')+)'|\"([^\"]+)\"", sql):
        # A text that is not the name of a file is another value of the query.
        with contextlib.suppress(Exception):
            system, place = fsspec.core.url_to_fs("".join(text).replace("''", "'"))
            manifest |= _manifest(system, filter(system.isfile, system.glob(place)))
    return manifest


def _manifest(system: Any, files: Iterable[str]) -> dict[str, list]:
    """Return the size of each file, and a text that changes when it is rewritten."""
    manifest = {}
    for file in files:
        info = system.info(file)
        changed = "; ".join(str(info[key]) for key in _CHANGED if info.get(key))
        manifest[file] = [int(info["size"] or 0), changed]
    return manifest


class _Footer(NamedTuple):
    """The columns of a file, the number of its rows, and about that of its candidates."""

    schema: pa.Schema
    rows: int
    candidates: int


def _footer(system: Any, file: str, layout: LogLayout) -> _Footer:
    """Read the footer of a file.

    Raises:
      UserError: it is not a Parquet file.
    """
    with _opened(system, file) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
    # A list counts as many values as it has, and an empty one counts 1.
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    item = f"{layout.columns['item']}."
    places = [place for place, path in enumerate(paths) if f"{path}.".startswith(item)]
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    candidates = sum(group.column(place).num_values for group in groups for place in places[:1])
    return _Footer(schema, metadata.num_rows, candidates or metadata.num_rows)


def find_files(path: str) -> tuple[Any, dict[str, list]]:
    """Find the Parquet files that `data.path` names: one or several URLs, with commas between.

    Returns:
      The file system, and `Log.manifest` of the files in the order of their names.

    Raises:
      UserError: there are no files, or they are on several file systems.
    """
    try:
        urls = split_path(path)
        if not all(urls):
            raise UserError(f"data.path={path} has a comma without a path on either side of it")
        places = [(url, *fsspec.core.url_to_fs(url)) for url in urls]
        system = places[0][1]
        # Of one kind there may be several: two hosts, two archives.
        if any(other is not system for _, other, _ in places):
            raise UserError(f"data.path={path} names several file systems; give those of one")
        files = sorted({file for place in places for file in _files_at(*place)})
        return system, _manifest(system, files)
    except UserError:
        raise
    # Stores raise errors of many kinds: an unknown protocol, a missing package, refused access.
    except Exception as error:
        raise UserError(f"data.path={path} cannot be read: {error}") from error


def is_there(path: str) -> bool:
    """Return True if any path in `data.path` has a log."""
    for url in split_path(path):
        with contextlib.suppress(UserError):
            find_files(url)
            return True
    return False


def _files_at(url: str, system: Any, path: str) -> list[str]:
    """Return the files that a URL names; it is at this path of a file system."""
    if any(character in path for character in "*?["):
        paths = [file for file in system.glob(path) if system.isfile(file)]
        if not paths:
            raise UserError(f"data.path={url} matches no file")
        return paths
    if system.isdir(path):
        return _in_directory(url, path, system.find(path))
    if system.isfile(path):
        return [path]
    raise UserError(f"data.path={url} does not exist; give a file, a directory or a glob")


def _in_directory(url: str, folder: str, paths: Sequence[str]) -> list[str]:
    """Return the Parquet files of a directory.

    Names that begin with _ or . belong to the writer, as unfinished files and metadata do.
    """
    below = {file: file.removeprefix(folder).strip("/").split("/") for file in paths}
    if any("_delta_log" in names for names in below.values()):
        logging.warning(
            "%s is a Delta table: all its files are read, of earlier versions too; if there are "
            "several versions, write the right one to a separate folder",
            url,
        )
    visible = [
        file
        for file, names in below.items()
        if not any(name.startswith(("_", ".")) and "=" not in name for name in names)
    ]
    files = [file for file in visible if file.endswith(SUFFIXES)]
    if not files:
        others = f"; it holds {below[visible[0]][-1]}; {_OTHERS}" if visible else "; it is empty"
        raise UserError(f"data.path={url} holds no file that ends in {SUFFIXES[0]}{others}")
    return files


def given_by_folders(files: Sequence[str]) -> pa.Table:
    """Return the columns that the names of folders give, as in Hive: `name=value/`."""
    folders = [dict(re.findall(r"([^/=]+)=([^/]*)(?=/)", file)) for file in files]
    names = list(dict.fromkeys(name for folder in folders for name in folder))
    columns = {}
    for name in names:
        texts = [unquote(folder.get(name, _NONE)) for folder in folders]
        columns[name] = _typed_texts([None if text == _NONE else text for text in texts])
    # A table has as many rows as its first column, even where there is no other.
    return pa.table({"": range(len(files)), **columns}).drop_columns([""])


def _typed_texts(texts: Sequence[str | None]) -> pa.Array:
    """Return texts as whole numbers or dates if all of them are."""
    array = pa.array(texts, pa.string())
    for type_, pattern in ((pa.int64(), r"-?\d{1,18}"), (pa.date32(), r"\d{4}-\d\d-\d\d")):
        if all(text is None or re.fullmatch(pattern, text) for text in texts):
            with contextlib.suppress(pa.ArrowInvalid):  # 30 February
                return array.cast(type_)
    return array


@contextlib.contextmanager
def _opened(system: Any, file: str, **options: bool) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, and raise a UserError if it cannot be read."""
    try:
        if isinstance(system, LocalFileSystem):
            with pq.ParquetFile(file, **options) as parquet:
                yield parquet
        else:
            with (
                system.open(file, "rb") as raw,
                pq.ParquetFile(raw, pre_buffer=True, **options) as parquet,
            ):
                yield parquet
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error
    except ValueError as error:
        raise UserError(
            f"{file} cannot be read in parts; download the log, or use a server that supports "
            f"range requests: {error}"
        ) from error


def _check_columns(
    layout: LogLayout, schemas: Mapping[str, pa.Schema], names: Collection[str]
) -> None:
    """Check that the files have the columns that the config names, in types that fit their use.

    Args:
      layout: of the log.
      schemas: file -> its columns, and those that the names of folders give.
      names: all columns of the files to read.
    """
    wanted = wanted_columns(layout)
    for file, schema in schemas.items():
        _check_names(file, schema.names, {of.column: of.key for of in wanted})
        # A feature may begin with a later file.
        _check_there(file, [of for of in wanted if not of.is_feature], schema.names)
    _check_there(layout.path, wanted, names)
    families = {of.column: _check_types(of, schemas) for of in wanted}
    if layout.history:
        item, column = layout.columns["item"], layout.history.column
        kinds = [families[column], families[item]]
        if all(kinds) and (kinds[0] == _TEXT) != (kinds[1] == _TEXT):
            raise UserError(
                f"column {column!r} (data.features.{layout.history.name}) holds {kinds[0]} ids, "
                f"and {item!r} (data.columns.item) {kinds[1]} ids; a history holds item ids"
            )


def _check_names(file: str, names: Sequence[str], keys: Mapping[str, str]) -> None:
    """Refuse names that the engine cannot distinguish."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in _OF_ENGINES:
            raise UserError(
                f"{file} has a column {name!r}, a name that the engine needs; rename it"
            )
        if name in keys and name in seen.values():
            raise UserError(f"{file} has two columns {name!r} ({keys[name]}); rename one of them")
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise UserError(
                f"{file} has columns {other!r} and {name!r}, which differ only in case; rename one"
            )


def _check_there(where: str, wanted: Sequence[Wanted], names: Collection[str]) -> None:
    """Refuse columns that are missing, with the one that was probably meant."""
    if missing := [of for of in wanted if of.column not in names]:
        named = ", ".join(dict.fromkeys(f"{of.column!r} ({of.key})" for of in missing))
        close = difflib.get_close_matches(missing[0].column, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{where} has no column {named}; {hint}it has: {', '.join(names)}")


def _check_types(column: Wanted, schemas: Mapping[str, pa.Schema]) -> str:
    """Check the types of a column, and warn if files lack it; return the family of its values."""
    name = f"column {column.column!r} ({column.key})"
    have = [file for file, schema in schemas.items() if column.column in schema.names]
    if lack := len(schemas) - len(have):
        missing = f"is missing in {_count(lack, 'file')} of {len(schemas)}, where it is null"
        logging.warning("%s %s", name, missing)
    # Type -> the first file with it, since few types are in many files.
    types = {schemas[file].field(column.column).type: file for file in reversed(have)}
    takes, words = _TAKES[column.use]
    families: dict[str, str] = {}
    for type_, file in reversed(types.items()):
        family = family_of(type_)
        if family == _NULL:
            continue
        if family not in takes or not column.least_depth <= _depth_of(type_) <= column.depth:
            lists = "lists of " * column.depth
            is_nested = pa.types.is_nested(inner_type(type_))
            nested = "; flatten it: make each of its fields a column" if is_nested else ""
            raise UserError(f"{file}: {name} is {type_}; it takes {lists}{words}{nested}")
        if column.use == "id":
            # A number and its text are different ids, and no engine has one type for signed and
            # unsigned integers of 64 bits.
            family = _TEXT if is_text(type_) else _INTEGER
            family = _UNSIGNED if pa.types.is_uint64(inner_type(type_)) else family
        families.setdefault(family, file)
    if column.use == "id" and len(families) > 1:
        (one, first), (other, second), *_ = families.items()
        raise UserError(
            f"{name} holds {one} ids in {first} and {other} ids in {second}; give it one type"
        )
    if column.use == "id" and column.depth and not families:
        raise UserError(f"{name} holds nothing in any file; leave it out of the config")
    return next(iter(families), "")


def inner_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, without lists and dictionaries around them."""
    while is_list(type_) or pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return type_


def family_of(type_: pa.DataType) -> str:
    """Return the family of the values of a column."""
    name = str(inner_type(type_))
    return next((of for of, like in _FAMILIES.items() if re.fullmatch(like, name)), _OTHER)


def _depth_of(type_: pa.DataType) -> int:
    """Return the number of lists around the values of a column."""
    if pa.types.is_dictionary(type_):
        return _depth_of(type_.value_type)
    return 1 + _depth_of(type_.value_type) if is_list(type_) else 0


def is_text(type_: pa.DataType) -> bool:
    """Return True if ids are texts: texts, bytes, UUIDs, and integers of more than 64 bits."""
    return family_of(type_) in (_TEXT, _DECIMAL)


def is_list(type_: pa.DataType) -> bool:
    """Return True for lists of any layout."""
    return isinstance(type_, _LISTS)


def check_pages(log: Log, columns: Collection[str], threads: int) -> None:
    """Compare the pages of some columns with their checksums, if the writer has stored any.

    DuckDB ignores them and reads a damaged page as other numbers. Files without checksums are not
    read.

    Raises:
      UserError: a page is damaged.
    """
    system, _ = fsspec.core.url_to_fs(log.url)

    def check(file: str) -> None:
        with _opened(system, file, page_checksum_verification=True) as parquet:
            if not _has_checksums(system, file, parquet.metadata):
                return
            names = [name for name in parquet.schema_arrow.names if name in columns]
            for _ in parquet.iter_batches(columns=names, use_threads=False):
                pass

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(check, log.files):
            pass


def _has_checksums(system: Any, file: str, metadata: pq.FileMetaData) -> bool:
    """Return whether the first page of a file has a checksum; a writer stores all or none."""
    if not metadata.num_row_groups:
        return False
    start = metadata.row_group(0).column(0).data_page_offset
    return _WITH_CHECKSUM.match(system.cat_file(file, start=start, end=start + 20)) is not None


def manifest_differences(before: dict[str, list], now: dict[str, list]) -> str:
    """Return the differences of two manifests in words; "" if they are equal."""
    new, gone = now.keys() - before.keys(), before.keys() - now.keys()
    changed = [file for file in now.keys() & before.keys() if now[file] != before[file]]
    counted = ((new, "new"), (gone, "gone"), (changed, "rewritten"))
    return ", ".join(f"{_count(len(files), 'file')} {what}" for files, what in counted if files)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
