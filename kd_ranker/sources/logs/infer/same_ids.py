"""Columns that hold the same ids under other names: one system's `item_id` is another's `adId`."""

from typing import NamedTuple

import duckdb

from kd_ranker.sources.logs.sql import quoted

# Two columns hold the same ids if this share of so many values of one is in the other.
_LEAST_COMMON = 0.5
_TRIED_VALUES = 1000
# A column of ids has at least so many values in the first rows. Whole numbers fill no more than
# this share of their range: small ones are in each other's range by chance.
_LEAST_IDS = 100
_MOST_FILLED = 0.25
_FIRST_ROWS = 120_000
_WHOLE_NUMBERS = ("INTEGER", "BIGINT", "HUGEINT", "UINTEGER", "UBIGINT")


class IdColumn(NamedTuple):
    """A column that may hold ids."""

    name: str
    type: str  # in SQL
    source: str  # what FROM reads for its table


def id_columns(con: duckdb.DuckDBPyConnection, source: str) -> list[IdColumn]:
    """Return the columns of texts, UUIDs and whole numbers with many values."""
    rows = con.sql(f"SELECT * FROM {source} LIMIT {_FIRST_ROWS}")
    columns = [
        IdColumn(name, str(type_), source)
        for name, type_ in zip(rows.columns, rows.types, strict=True)
        if str(type_) in ("VARCHAR", "UUID", *_WHOLE_NUMBERS)
    ]
    return [column for column in columns if _has_ids(con, column)]


def _has_ids(con: duckdb.DuckDBPyConnection, column: IdColumn) -> bool:
    name = quoted(column.name)
    spread = f"max({name}) - min({name})" if column.type in _WHOLE_NUMBERS else "NULL"
    select = (
        f"SELECT count(DISTINCT {name}), {spread} "
        f"FROM (SELECT {name} FROM {column.source} LIMIT {_FIRST_ROWS})"
    )
    num_ids, width = con.sql(select).fetchall()[0]
    return num_ids >= _LEAST_IDS and (width is None or num_ids <= _MOST_FILLED * width)


def have_same_ids(con: duckdb.DuckDBPyConnection, one: IdColumn, other: IdColumn) -> bool:
    """Return whether most values of one column are in the other.

    Either may be the larger: a catalog holds more items than a log, a log more than its clicks.
    """
    return (
        _share_within(con, one, other) >= _LEAST_COMMON
        or _share_within(con, other, one) >= _LEAST_COMMON
    )


def _share_within(con: duckdb.DuckDBPyConnection, inner: IdColumn, outer: IdColumn) -> float:
    """Return the share of the values of a column that another one has, by some of them."""
    tried = f"SELECT * FROM ({_values(inner)}) ORDER BY hash(id) LIMIT {_TRIED_VALUES}"
    select = f"SELECT avg((id IN ({_values(outer)}))::INTEGER) FROM ({tried})"
    return float(con.sql(select).fetchall()[0][0])


def _values(column: IdColumn) -> str:
    name = quoted(column.name)
    return f"SELECT DISTINCT {name}::VARCHAR AS id FROM {column.source} WHERE {name} IS NOT NULL"
