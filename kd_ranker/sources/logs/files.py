"""The files of a log, or its SELECT: find them and check their columns."""

import contextlib
import difflib
import glob
import hashlib
import itertools
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

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.layout import (
    EARLY_SCORES,
    IDENTIFYING,
    OPTIONAL,
    LogLayout,
    is_text_log,
    split_path,
    sql_of_texts,
)

# Stands for the text of `data.sql` among the files of a manifest.
SQL = "data.sql"
# The contents of ids, in words.
NUMBERS, TEXTS = "whole numbers", "texts"

_SUFFIXES = (".parquet", ".pq")
# How many footers are read at a time: a store far away answers many requests at once.
_FOOTERS_AT_A_TIME = 16
# The names under which different stores keep a mark that differs once a file is rewritten.
_CHANGED = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag")
# The head of a page in Thrift's compact protocol: its type, its two sizes, and then the checksum.
_WITH_CHECKSUM = re.compile(rb"(?:\x15[\x80-\xff]*[\x00-\x7f]){3}\x15", re.DOTALL)
# A missing value in the name of a folder.
_NONE = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = r"u?int\d+|bool|null"
_NUMBER = rf"{_INTEGER}|halffloat|float|double|decimal.*"
_TEXT = r"(large_)?(string|binary)(_view)?|fixed_size_binary.*|extension<arrow\.uuid>"
# Use of a column -> types that its values may have, and these in words.
_TAKES = {
    "id": (f"{_NUMBER}|{_TEXT}", f"{NUMBERS} or {TEXTS}"),
    "number": (_NUMBER, "numbers"),
    "label": (f"{_NUMBER}|{_TEXT}", "numbers, or true and false"),
    "time": (f"{_NUMBER}|{_TEXT}|(timestamp|date).*", "timestamps, numbers or ISO texts"),
    "text": (f"{_INTEGER}|{_TEXT}", f"{TEXTS} or {NUMBERS}"),
}
_USE_OF_COLUMN = dict.fromkeys(("request", "user", "item"), "id") | {"time": "time"}
_USE_OF_COLUMN |= dict.fromkeys(("stage", "teacher_version", "split"), "text")
_USE_OF_KIND = {"dense": "number", "category": "id", "bag": "id", "history": "id"}


class Wanted(NamedTuple):
    """A column that a key of the config names, its use in `_TAKES`, and the lists around a value.

    If a row is a request, columns with a value `per_candidate` hold a list of them.
    """

    key: str
    column: str
    use: str
    most_lists: int
    least_lists: int
    per_candidate: bool


class Log(NamedTuple):
    """A log, found and checked; one that a SELECT yields has no `files` and nothing `given`."""

    name: str  # for messages
    system: Any  # the file system
    files: tuple[str, ...]  # the paths to read, sorted
    # File -> its size in bytes, and a text that changes when it is rewritten. A SELECT has the
    # files that it reads, and `SQL`.
    manifest: dict[str, list]
    names: tuple[str, ...]  # all columns of any file, sorted
    given: pa.Table  # columns from names of folders such as `date=2024-05-01/`, one row per file
    sql: str = ""  # `data.sql`, or the SELECT of text files at `data.path`

    @property
    def size(self) -> int:
        """The bytes of all files to read; 0 if it is not known."""
        return sum(self.manifest[file][0] for file in self.files)


def wanted_columns(layout: LogLayout) -> list[Wanted]:
    """Return the columns that a log must have."""
    listed = int(layout.by_request)
    wanted = []
    for name in (of for of in (*IDENTIFYING, *OPTIONAL) if of in layout.columns):
        is_listed = name not in ("request", "time", "user")
        most = listed * is_listed
        # Other columns need no list if all candidates of a request have the same value.
        least = most if name in ("item", "stage", "position", "incumbent") else 0
        key, use = f"data.columns.{name}", _USE_OF_COLUMN.get(name, "number")
        wanted.append(Wanted(key, layout.columns[name], use, most, least, is_listed))
    for column in layout.early_scores:
        key = f"data.columns.{EARLY_SCORES}: {column}"
        wanted.append(Wanted(key, column, "number", listed, listed, True))
    for section, use in (("labels", "label"), ("teacher", "number")):
        for task, column in getattr(layout, section).items():
            wanted.append(Wanted(f"data.{section}.{task}", column, use, listed, listed, True))
    for feature in layout.features:
        lists = (feature.kind in ("bag", "history")) + (feature.of == "event")
        lists += (feature.place is not None) + listed * (not feature.of_request)
        key, use = f"data.features.{feature.key}", _USE_OF_KIND[feature.kind]
        wanted.append(Wanted(key, feature.column, use, lists, lists, not feature.of_request))
    return list(dict.fromkeys(wanted))


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

    def schema_of(file: str) -> pa.Schema:
        with _opened(system, file) as parquet:
            return parquet.schema_arrow

    with ThreadPoolExecutor(_FOOTERS_AT_A_TIME) as pool:
        schemas = dict(zip(files, pool.map(schema_of, files), strict=True))
    names = sorted({name for of in schemas.values() for name in of.names})
    # A column in a file takes precedence over the names of folders.
    of_all = given_by_folders(manifest)
    given = {name: of.filter(is_new) for name, of in of_all.items() if name not in names}
    _check_columns(layout, {file: [*of.names, *given] for file, of in schemas.items()})
    _check_ids(layout, schemas)
    url = split_path(layout.path)[0]
    return Log(url, system, files, manifest, tuple(names), pa.table(given))


def _open_select(layout: LogLayout) -> Log:
    """Check the SELECT that yields a log, and its columns."""
    sql, path = layout.sql, layout.path
    try:
        with duckdb.connect() as connection:
            if [of.type for of in duckdb.extract_statements(sql)] != [duckdb.StatementType.SELECT]:
                raise UserError("data.sql must be one SELECT")
            register_stores(connection, sql)
            rows = connection.sql(sql)
            _check_names(path, rows.columns)
            if is_text_log(path):
                if not rows.limit(1).fetchall():
                    raise UserError(f"{path} has no rows")
                types = dict(zip(rows.columns, map(str, rows.types), strict=True))
                # Among ids that look like fractions, 1e5 and 100000 would be one number.
                ids = [of for of in wanted_columns(layout) if types.get(of.column) == "DOUBLE"]
                ids = [of for of in ids if of.use == "id" and of.key.startswith("data.columns.")]
                for file in split_path(path) if ids else ():
                    _check_there(file, ids, connection.sql(sql_of_texts(file)).columns)
                sql = sql_of_texts(path, [of.column for of in ids])
            schema = connection.sql(sql).limit(0).to_arrow_table().schema
    except duckdb.Error as error:
        raise UserError(f"{path}: {line_of(error)}") from error
    _check_columns(layout, {path: schema.names})
    check_types(layout, dict(zip(schema.names, schema.types, strict=True)))
    manifest = manifest_of("", layout.sql)
    return Log(path, None, (), manifest, tuple(schema.names), pa.table({}), sql)


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
            raise UserError(f"{protocol}:// cannot be read: {error}") from error


def register_store(connection: Any, system: Any) -> None:
    """Let DuckDB read from a file system of fsspec."""
    names = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    if not {*names} & {*connection.list_filesystems()}:
        connection.register_filesystem(system)


def manifest_of(path: str, sql: str = "") -> dict[str, list]:
    """Return the current `Log.manifest` of a log, without files that are gone."""
    manifest: dict[str, list] = {}
    for url in split_path(path) if not sql else ():
        with contextlib.suppress(UserError):
            manifest |= find_files(url)[1]
    if sql:
        manifest[SQL] = [len(sql), hashlib.sha256(sql.encode()).hexdigest()]
    for text in re.findall(r"'((?:[^']|'')+)'|\"([^\"]+)\"", sql):
        # A text that is not the name of a file is another value of the query.
        with contextlib.suppress(Exception):
            system, place = fsspec.core.url_to_fs("".join(text).replace("''", "'"))
            manifest |= _manifest(system, filter(system.isfile, system.glob(place)))
    return manifest


def _manifest(system: Any, files: Iterable[str]) -> dict[str, list]:
    manifest = {}
    for file in files:
        info = system.info(file)
        changed = "; ".join(str(info[key]) for key in _CHANGED if info.get(key))
        manifest[file] = [int(info["size"] or 0), changed]
    return manifest


def manifest_differences(before: dict[str, list], now: dict[str, list]) -> str:
    """Return the differences of two manifests in words; "" if they are equal."""
    new, gone = now.keys() - before.keys(), before.keys() - now.keys()
    changed = [file for file in now.keys() & before.keys() if now[file] != before[file]]
    counted = ((new, "new"), (gone, "gone"), (changed, "rewritten"))
    return ", ".join(f"{_count(len(files), 'file')} {what}" for files, what in counted if files)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def find_files(path: str) -> tuple[Any, dict[str, list]]:
    """Return the file system and the `Log.manifest`, by name, of the Parquet files at `data.path`.

    Raises:
      UserError: there are no files, or they are on several file systems.
    """
    if not (urls := split_path(path)):
        raise UserError(f"data.path={path!r} names no file; give a file, a directory or a glob")
    try:
        places = [(url, *fsspec.core.url_to_fs(url)) for url in urls]
        system = places[0][1]
        # Of one kind there may be several: two hosts, two archives.
        if any(other is not system for _, other, _ in places):
            raise UserError(f"data.path={path} names several file systems; give those of one")
        return system, _manifest(system, sorted({of for place in places for of in _at(*place)}))
    except UserError:
        raise
    # Stores raise errors of many kinds: an unknown protocol, a missing package, refused access.
    except Exception as error:
        raise UserError(f"data.path={path} cannot be read: {error}") from error


def _at(url: str, system: Any, path: str) -> list[str]:
    """Return the files that a URL names; it is at this path of a file system."""
    if glob.has_magic(path):
        if not (files := [file for file in system.glob(path) if system.isfile(file)]):
            raise UserError(f"data.path={url} matches no file")
        return files
    if not system.isdir(path):
        if not system.isfile(path):
            raise UserError(f"data.path={url} does not exist; give a file, a directory or a glob")
        return [path]
    below = {file: file.removeprefix(path).strip("/").split("/") for file in system.find(path)}
    if any("_delta_log" in names for names in below.values()):
        logging.warning(
            "%s is a Delta table: all its files are read, of earlier versions too; if there are "
            "several versions, write the right one to a separate folder",
            url,
        )
    # Names that begin with _ or . belong to the writer, as unfinished files and metadata do.
    visible = [
        file
        for file, names in below.items()
        if not any(name.startswith(("_", ".")) and "=" not in name for name in names)
    ]
    if files := [file for file in visible if file.endswith(_SUFFIXES)]:
        return files
    content = f"holds {below[visible[0]][-1]}" if visible else "is empty"
    raise UserError(
        f"data.path={url} holds no file that ends in {_SUFFIXES[0]}; it {content}; give a pattern "
        "for files of other kinds, such as logs/*.csv, or a SELECT by data.sql"
    )


def given_by_folders(files: Collection[str]) -> dict[str, pa.Array]:
    """Return the columns that the names of folders give, as in Hive: `name=value/`.

    The values are integers if all of them are, else texts.
    """
    folders = [dict(re.findall(r"([^/=]+)=([^/]*)(?=/)", file)) for file in files]
    columns = {}
    for name in dict.fromkeys(itertools.chain(*folders)):
        texts = [None if of.get(name, _NONE) == _NONE else unquote(of[name]) for of in folders]
        columns[name] = pa.array(texts, pa.string())
        with contextlib.suppress(pa.ArrowInvalid):
            columns[name] = columns[name].cast(pa.int64())
    return columns


@contextlib.contextmanager
def _opened(system: Any, file: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, and raise a UserError if it cannot be read."""
    try:
        with pq.ParquetFile(file, filesystem=system, page_checksum_verification=True) as parquet:
            yield parquet
    # A store that cannot read a part of a file raises a ValueError.
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def check_pages(log: Log, columns: Collection[str], threads: int) -> None:
    """Raise UserError for a damaged page in some columns, if the writer has stored checksums.

    DuckDB ignores these. Files without checksums are not read.
    """

    def check(file: str) -> None:
        with _opened(log.system, file) as parquet:
            if has_checksums(log.system, file, parquet.metadata):
                names = [name for name in parquet.schema_arrow.names if name in columns]
                for _ in parquet.iter_batches(columns=names, use_threads=False):
                    pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(check, log.files))


def has_checksums(system: Any, file: str, metadata: pq.FileMetaData) -> bool:
    """Return whether the first page of a file has a checksum; a writer stores all or none."""
    if not metadata.num_row_groups:
        return False
    start = metadata.row_group(0).column(0).data_page_offset
    return _WITH_CHECKSUM.match(system.cat_file(file, start=start, end=start + 20)) is not None


def _check_columns(layout: LogLayout, names: Mapping[str, Sequence[str]]) -> None:
    """Check the names of columns in each file, and warn of features that some files lack."""
    wanted = wanted_columns(layout)
    # A feature may begin with a later file.
    needed = [of for of in wanted if not of.key.startswith("data.features.")]
    for file, of_file in names.items():
        _check_names(file, of_file)
        _check_there(file, needed, of_file)
    _check_there(layout.path, wanted, list(dict.fromkeys(itertools.chain(*names.values()))))
    for of in wanted:
        if lack := sum(of.column not in of_file for of_file in names.values()):
            missing = f"is missing in {_count(lack, 'file')} of {len(names)}, where it is null"
            logging.warning("column %r (%s) %s", of.column, of.key, missing)


def _check_ids(layout: LogLayout, schemas: Mapping[str, pa.Schema]) -> None:
    """Refuse ids that are texts in one file and fractions in another: "5" is not "5.0"."""
    for of in (of for of in wanted_columns(layout) if of.use == "id"):
        have = [file for file, schema in schemas.items() if of.column in schema.names]
        types = {str(inner_type(schemas[file].field(of.column).type)): file for file in have}
        texts = [type_ for type_ in types if re.fullmatch(_TEXT, type_)]
        others = [type_ for type_ in types if not re.fullmatch(rf"{_TEXT}|u?int\d+|null", type_)]
        if texts and others:
            where = " and ".join(f"{type_} in {types[type_]}" for type_ in (others[0], texts[0]))
            raise UserError(f"column {of.column!r} ({of.key}) is {where}; give it one type")


def _check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names that the engine cannot distinguish, from others or from its own."""
    seen = {of: f"{of!r}, which the engine adds," for of in ("file_index", "file_row_number")}
    for name in names:
        if other := seen.get(name.lower()):
            raise UserError(
                f"{where} has columns {other} and {name!r}, and case does not count; rename one"
            )
        seen[name.lower()] = repr(name)


def _check_there(where: str, wanted: Sequence[Wanted], names: Collection[str]) -> None:
    """Refuse columns that are missing, with the one that was probably meant."""
    if missing := [of for of in wanted if of.column not in names]:
        named = ", ".join(dict.fromkeys(f"{of.column!r} ({of.key})" for of in missing))
        close = difflib.get_close_matches(missing[0].column, names, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{where} has no column {named}; {hint}it has: {', '.join(names)}")


def check_types(layout: LogLayout, types: Mapping[str, pa.DataType]) -> None:
    """Raise UserError for a column with a type, as the engine returns it, that is not allowed."""
    for of in wanted_columns(layout):
        name, (takes, words) = f"column {of.column!r} ({of.key})", _TAKES[of.use]
        type_ = types[of.column]
        inner, lists = _inner_and_lists(type_)
        if pa.types.is_null(inner):
            if of.use == "id" and of.most_lists:
                raise UserError(f"{name} holds nothing in any file; leave it out of the config")
        elif not (re.fullmatch(takes, str(inner)) and of.least_lists <= lists <= of.most_lists):
            flatten = "; flatten it: make each of its fields a column" * pa.types.is_nested(inner)
            raise UserError(
                f"{name} is {type_}; it takes {'lists of ' * of.most_lists}{words}{flatten}"
            )
    if layout.history:
        item, column = layout.columns["item"], layout.history.column
        kinds = {of: kind_of(types[of]) for of in (column, item)}
        if len({*kinds.values()} - {""}) > 1:
            raise UserError(
                f"column {column!r} (data.features.{layout.history.name}) holds {kinds[column]}, "
                f"and {item!r} (data.columns.item) {kinds[item]}; a history holds item ids"
            )


def _inner_and_lists(type_: pa.DataType) -> tuple[pa.DataType, int]:
    """Return the type of the values of a column, and the number of lists around them."""
    lists = 0
    while is_list(type_) or pa.types.is_dictionary(type_):
        lists, type_ = lists + is_list(type_), type_.value_type
    return type_, lists


def inner_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, without lists and dictionaries around them."""
    return _inner_and_lists(type_)[0]


def is_list(type_: pa.DataType) -> bool:
    """Return True for lists of any length."""
    return pa.types.is_list(type_) or pa.types.is_fixed_size_list(type_)


def is_text(type_: pa.DataType) -> bool:
    """Return True for texts, bytes and UUIDs."""
    return re.fullmatch(_TEXT, str(inner_type(type_))) is not None


def kind_of(type_: pa.DataType) -> str:
    """Return the kind of the ids that a type holds: `NUMBERS`, `TEXTS`, "" if unknown.

    Integers of more than 64 bits are texts.
    """
    inner = inner_type(type_)
    if pa.types.is_null(inner):
        return ""
    return TEXTS if is_text(inner) or pa.types.is_decimal(inner) else NUMBERS
