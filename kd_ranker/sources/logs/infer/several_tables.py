"""A folder that holds a log as several tables: the candidates, their requests, items, events.

The table with the most rows is that of the candidates. A table joins it by the columns that both
have, if these are different in each of its rows and some values are in both. Where their names
differ, columns with the same ids take part. A table of events becomes a column per type of event: 1
for the candidates that have one, 0 for the others.
"""

import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from kd_ranker.sources.logs.infer.same_ids import IdColumn, have_same_ids, id_columns
from kd_ranker.sources.logs.infer.words import identifier
from kd_ranker.sources.logs.layout import PARQUET, is_text_log, sql_of_texts
from kd_ranker.sources.logs.sql import literal, quoted

# Files of one table share at least this share of the columns of the wider one.
_LEAST_SHARED = 0.75
_MOST_EVENT_TYPES = 12
_NUMBER = "[0-9]*"  # in a pattern
# Whether columns tell candidates apart is tried on so many.
_MOST_ROWS = 120_000


class Joined(NamedTuple):
    """A SELECT with a row per candidate of several tables."""

    sql: str
    candidates: str  # the path or pattern of the table of candidates
    source: str  # what FROM reads for it
    doubt: str  # names the tables, and those that did not join


class _Table(NamedTuple):
    name: str
    path: str  # or a pattern
    source: str  # what FROM reads
    columns: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Return whether it has a column of this name; SQL ignores case."""
        return name.lower() in _in_lower_case(self.columns)

    def renamed(self, as_others: Mapping[str, IdColumn]) -> "_Table":
        """Return the table with columns that have the names and types of others."""
        if not as_others:
            return self
        old = ", ".join(map(quoted, as_others))
        new = ", ".join(
            f"try_cast({quoted(column)} AS {other.type}) AS {quoted(other.name)}"
            for column, other in as_others.items()
        )
        left = (column for column in self.columns if column not in as_others)
        return self._replace(
            source=f"(SELECT * EXCLUDE ({old}), {new} FROM {self.source})",
            columns=(*left, *(other.name for other in as_others.values())),
        )


def join_tables(con: duckdb.DuckDBPyConnection, path: str) -> Joined | None:
    """Return the tables of a local folder as one; None if fewer than two join."""
    tables = _find_tables(con, path)
    if len(tables) < 2:
        return None
    candidates = max(tables, key=lambda table: _value(con, f"SELECT count(*) FROM {table.source}"))
    others = [table for table in tables if table is not candidates]
    query = _Query(candidates)
    left = _join_events(con, query, _join_by_keys(con, query, others))
    if left == others:
        return None
    doubt = f"is each row of {candidates.name!r} a candidate, and are the tables joined right?"
    if left:
        doubt += f" Not joined: {', '.join(table.name for table in left)}."
    return Joined(query.sql, candidates.path, candidates.source, doubt)


class _Query:
    """A SELECT that grows by the tables that join.

    Attributes:
      tables: that of the candidates, and those with a key that joined it.
      owners: column in lower case -> the name of the table that it is taken from.
    """

    def __init__(self, candidates: _Table) -> None:
        self.tables = [candidates]
        self.owners = dict.fromkeys(map(str.lower, candidates.columns), candidates.name)
        self._clauses = [f"FROM {candidates.source} AS {quoted(candidates.name)}"]
        self._values = [f"{quoted(candidates.name)}.*"]

    @property
    def sql(self) -> str:
        return "\n".join(["SELECT " + ",\n    ".join(self._values), *self._clauses])

    def join(self, source: str, name: str, key: Sequence[str]) -> None:
        """Join what FROM reads by columns that the query has; `take` says which values count."""
        equal = "\n    AND ".join(
            f"{quoted(name)}.{quoted(column)} = "
            f"{quoted(self.owners[column.lower()])}.{quoted(column)}"
            for column in key
        )
        self._clauses.append(f"LEFT JOIN {source} AS {quoted(name)}\n    ON {equal}")

    def take(self, name: str, values: Sequence[str], columns: Iterable[str]) -> None:
        """Take columns of a table that joined, by these values."""
        self._values += values
        self.owners |= dict.fromkeys(map(str.lower, columns), name)


class _Keyed(NamedTuple):
    """A table with a key; its columns have the names of others."""

    table: _Table
    key: tuple[str, ...]


def _join_by_keys(
    con: duckdb.DuckDBPyConnection, query: _Query, tables: Sequence[_Table]
) -> list[_Table]:
    """Join the tables with a key; returns the others.

    A table may join by a column of another that joined before: users by their requests.
    """
    left = list(tables)
    while keyed := _find_keyed(con, query, left):
        table, key = keyed
        left = [other for other in left if other.name != table.name]
        query.join(table.source, table.name, key)
        known = [column for column in table.columns if column.lower() in query.owners]
        new = [column for column in table.columns if column not in known]
        repeated = ", ".join(map(quoted, known))
        query.take(table.name, [f"{quoted(table.name)}.* EXCLUDE ({repeated})"] if new else [], new)
        query.tables.append(table)
    return left


def _find_keyed(
    con: duckdb.DuckDBPyConnection, query: _Query, tables: Sequence[_Table]
) -> _Keyed | None:
    """Return the first table with a key, by names if there is one; None if none has."""
    for find in (_keyed_by_names, _keyed_by_ids):
        for table in tables:
            if keyed := find(con, query, table):
                return keyed
    return None


def _keyed_by_names(con: duckdb.DuckDBPyConnection, query: _Query, table: _Table) -> _Keyed | None:
    key = _find_key(con, table, query.owners)
    return _Keyed(table, key) if key and _have_common(con, query, table, key) else None


def _keyed_by_ids(con: duckdb.DuckDBPyConnection, query: _Query, table: _Table) -> _Keyed | None:
    unique = [
        column for column in id_columns(con, table.source) if _is_key(con, table, [column.name])
    ]
    for joined in query.tables:
        for other in id_columns(con, joined.source):
            own = _same_column(con, table, unique, other)
            if own is not None:
                return _Keyed(table.renamed({own.name: other}), (other.name,))
    return None


def _same_column(
    con: duckdb.DuckDBPyConnection, table: _Table, columns: Sequence[IdColumn], other: IdColumn
) -> IdColumn | None:
    """Return the first of a table's columns with the ids of another one, under another name."""
    if table.has(other.name):
        return None
    for column in columns:
        if have_same_ids(con, column, other):
            return column
    return None


def _join_events(
    con: duckdb.DuckDBPyConnection, query: _Query, tables: Sequence[_Table]
) -> list[_Table]:
    """Join the tables with events of the candidates; returns the others."""
    left = []
    for table in tables:
        keyed = _keyed_events(con, query.tables[0], table)
        types = _find_event_types(con, keyed.table, query.owners) if keyed else {}
        if keyed is None or not types:
            left.append(table)
            continue
        query.join(_count_events(keyed.table, keyed.key, types), table.name, keyed.key)
        values = [
            f"coalesce({quoted(table.name)}.{quoted(name)}, 0) AS {quoted(name)}" for name in types
        ]
        query.take(table.name, values, types)
    return left


def _keyed_events(
    con: duckdb.DuckDBPyConnection, candidates: _Table, table: _Table
) -> _Keyed | None:
    """Return a table with the key of the candidates, under their names; None if it lacks one."""
    first_rows = f"(SELECT * FROM {candidates.source} LIMIT {_MOST_ROWS})"
    some_candidates = candidates._replace(source=first_rows)
    if key := _find_key(con, some_candidates, _in_lower_case(table.columns)):
        return _Keyed(table, key)
    # The id columns of the candidates, by those of the table that hold the same.
    same: dict[str, IdColumn] = {}
    own_columns = id_columns(con, table.source)
    for other in id_columns(con, candidates.source):
        left = [column for column in own_columns if column.name not in same]
        own = _same_column(con, table, left, other)
        if own is not None:
            same[own.name] = other
    key = _find_key(con, some_candidates, _in_lower_case(table.renamed(same).columns))
    if not key:
        return None
    in_key = {name: other for name, other in same.items() if other.name in key}
    return _Keyed(table.renamed(in_key), key)


def _count_events(table: _Table, key: Sequence[str], types: dict[str, str]) -> str:
    """Return what FROM reads for events: a row per key, with 1 for each type that it has."""
    keys = ", ".join(map(quoted, key))
    values = [
        f"max(CAST({is_type} AS INTEGER)) AS {quoted(name)}" for name, is_type in types.items()
    ]
    columns = ",\n        ".join([keys, *values])
    return f"(\n    SELECT {columns}\n    FROM {table.source}\n    GROUP BY {keys}\n)"


def _find_tables(con: duckdb.DuckDBPyConnection, path: str) -> list[_Table]:
    """Return the tables in a folder; none if two are parts of one table."""
    if not os.path.isdir(path):
        return []
    tables: list[_Table] = []
    for name, pattern in _find_patterns(Path(path)):
        source = f"read_parquet({literal(pattern)})"
        if is_text_log(pattern):
            source = sql_of_texts(pattern).removeprefix("SELECT * FROM ")
        columns = tuple(con.sql(f"SELECT * FROM {source} LIMIT 0").columns)
        if any(_are_alike(columns, table.columns) for table in tables):
            # The parts of one table: the usual log, which is read as a whole.
            return []
        name = identifier(name, [table.name for table in tables])
        tables.append(_Table(name, pattern, source, columns))
    return tables


def _find_patterns(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and pattern of what may be a table.

    It is a folder, a file, or files whose names differ in a number: `events-0.csv`, `events-1.csv`.
    """
    parts: dict[str, list[Path]] = {}
    for part in sorted(folder.iterdir()):
        if part.name[0] not in "._":
            name = re.sub(r"\d+", _NUMBER, part.name) if part.is_file() else part.name
            parts.setdefault(name, []).append(part)
    for name, group in parts.items():
        pattern = _pattern_of(group[0])
        if not pattern:
            continue
        if len(group) == 1:
            yield re.sub(r"\..*", "", group[0].name), pattern
        else:
            yield re.sub(r"\..*", "", name.replace(_NUMBER, "")), str(folder / name)


def _pattern_of(part: Path) -> str:
    """Return a file, or the pattern of a folder with files of one kind; "" for others."""
    files = [part] if part.is_file() else sorted(file for file in part.rglob("*") if file.is_file())
    files = [file for file in files if file.name[0] not in "._"]
    if files and all(file.name.endswith(PARQUET) for file in files):
        return str(part if part.is_file() else part / f"**/*{files[0].suffix}")
    if files and is_text_log(",".join(map(str, files))):
        last = files[0].suffixes
        ending = "".join(last[-2:]) if last[-1] == ".gz" else last[-1]
        return str(part if part.is_file() else part / f"**/*{ending}")
    return ""


def _are_alike(columns: Sequence[str], others: Sequence[str]) -> bool:
    shared = {*columns} & {*others}
    return len(shared) >= _LEAST_SHARED * max(len(columns), len(others))


def _find_key(
    con: duckdb.DuckDBPyConnection, table: _Table, known: Collection[str]
) -> tuple[str, ...]:
    """Return the fewest known columns that differ in each row of a table; () for none.

    `known` are in lower case.
    """
    shared = [column for column in table.columns if column.lower() in known]
    for size in (1, 2):
        for key in itertools.combinations(shared, size):
            if _is_key(con, table, key):
                return key
    return ()


def _is_key(con: duckdb.DuckDBPyConnection, table: _Table, columns: Sequence[str]) -> bool:
    key = ", ".join(map(quoted, columns))
    return bool(_value(con, f"SELECT count(*) = count(DISTINCT ({key})) FROM {table.source}"))


def _in_lower_case(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def _have_common(
    con: duckdb.DuckDBPyConnection, query: _Query, table: _Table, key: Sequence[str]
) -> bool:
    """Return whether some values of a key are in the query and in a table."""
    columns = ", ".join(map(quoted, key))
    common = f"FROM ({query.sql}) q SEMI JOIN {table.source} t USING ({columns})"
    try:
        return bool(_value(con, f"SELECT count(*) FROM (SELECT 1 {common} LIMIT 1)"))
    except duckdb.ConversionException:
        return False  # numbers in one, texts in the other


def _find_event_types(
    con: duckdb.DuckDBPyConnection, table: _Table, known: Collection[str]
) -> dict[str, str]:
    """Return column -> the condition of its type of events, by the first column of a few texts."""
    rows = con.sql(f"SELECT * FROM {table.source} LIMIT 0")
    for column, type_ in zip(rows.columns, rows.types, strict=True):
        if type_ != "VARCHAR" or column.lower() in known:
            continue
        select = f"SELECT DISTINCT {quoted(column)} FROM {table.source}"
        found = f"{select} WHERE {quoted(column)} IS NOT NULL LIMIT {_MOST_EVENT_TYPES + 1}"
        texts = sorted(text for (text,) in con.sql(found).fetchall())
        if len(texts) <= _MOST_EVENT_TYPES:
            types: dict[str, str] = {}
            for text in texts:
                name = identifier(text, [*known, *types])
                types[name] = f"{quoted(column)} = {literal(text)}"
            return types
    return {}


def _value(con: duckdb.DuckDBPyConnection, select: str) -> Any:
    return con.sql(select).fetchall()[0][0]
