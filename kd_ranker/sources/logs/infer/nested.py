"""Values within a value: objects, lists of objects, and texts that join several values."""

from collections.abc import Collection
from typing import Any

import duckdb
import pandas as pd

from kd_ranker.sources.logs.sql import literal, quoted

_SEPARATORS = ("|", ";", ",", " ")
# Least share of the texts that join at least two values, and most distinct values per text.
_LEAST_JOINED, _MOST_VALUES = 0.05, 0.5


def spread_object(rows: duckdb.DuckDBPyRelation) -> str:
    """Return what to select for columns of the fields of the first object; "" if there is none."""
    for column, type_ in _types(rows).items():
        if type_.id == "struct":
            fields = []
            for field, _ in type_.children:
                name = f"{column}_{field}"
                while name in rows.columns:
                    name += "_"
                fields.append(f"{quoted(column)}.{quoted(field)} AS {quoted(name)}")
            return f"SELECT * EXCLUDE ({quoted(column)}), {', '.join(fields)}"
    return ""


def find_lists_of_objects(rows: duckdb.DuckDBPyRelation) -> dict[str, list[str]]:
    """Return the fields of the objects in each column of lists of objects."""
    fields = {}
    for column, type_ in _types(rows).items():
        if type_.id == "list" and type_.children[0][1].id == "struct":
            fields[column] = [field for field, _ in type_.children[0][1].children]
    return fields


def unnest_objects(rows: duckdb.DuckDBPyRelation, column: str, fields: Collection[str]) -> str:
    """Return what to select for a row per object in the lists of a column.

    Columns that are called like a field get another name.
    """
    selected = f"* EXCLUDE ({quoted(column)})"
    clashes = sorted({*fields} & {*rows.columns})
    if clashes:
        names = [f"{quoted(name)} AS {quoted(f'request_{name}')}" for name in clashes]
        selected += f" RENAME ({', '.join(names)})"
    return f"SELECT {selected}, unnest({quoted(column)}, max_depth := 2)"


def _types(rows: duckdb.DuckDBPyRelation) -> dict[str, Any]:
    return dict(zip(rows.columns, rows.types, strict=True))


def find_joined(con: duckdb.DuckDBPyConnection, columns: Collection[str]) -> dict[str, str]:
    """Return the columns of texts that are lists, each with the SQL of the list.

    Lists share their values: far fewer values are distinct than texts. The words of titles and of
    addresses do not.

    Args:
      con: a connection with a table `candidates`.
      columns: of texts.
    """
    return {column: values for column in columns if (values := _list_of(con, column))}


def _list_of(con: duckdb.DuckDBPyConnection, column: str) -> str:
    """Return the SQL of the lists in a column of texts; "" if it has none."""
    text = quoted(column)
    is_empty = f"coalesce(bool_or({text} = ''), false)"
    if con.execute(f"SELECT {is_empty} FROM candidates").fetchall()[0][0]:
        text = f"nullif({text}, '')"
    for separator in _SEPARATORS:
        values = f"string_split({text}, {literal(separator)})"
        facts = _facts_of_lists(con, column, values)
        # Words are no list; ids are.
        if _are_lists(facts) and (separator != " " or facts["numbered"] == 1):
            return values
    values = f"""TRY(from_json({text}, '["VARCHAR"]'))"""
    return values if _are_lists(_facts_of_lists(con, column, values)) else ""


def _facts_of_lists(con: duckdb.DuckDBPyConnection, column: str, values: str) -> pd.Series:
    """Return counts of the texts, of the lists that the SQL `values` makes, and of their values."""
    select = f"""
        WITH lists AS (SELECT DISTINCT {quoted(column)} AS text, {values} AS list FROM candidates),
        counts_of_lists AS (
            SELECT count(text) AS texts, count(list) AS lists,
                avg((len(list) > 1)::INT) AS joined
            FROM lists
        ),
        counts_of_values AS (
            SELECT count(DISTINCT value) AS values,
                bool_or(value = '' OR value != trim(value)) AS is_prose,
                avg(regexp_matches(value, '[0-9]')::INT) AS numbered
            FROM (SELECT unnest(list) AS value FROM lists)
        )
        SELECT * FROM counts_of_lists, counts_of_values
    """
    return con.execute(select).df().iloc[0]


def _are_lists(facts: pd.Series) -> bool:
    is_each_a_list = 0 < facts["lists"] == facts["texts"] and not facts["is_prose"]
    is_shared = facts["values"] <= _MOST_VALUES * facts["texts"]
    return bool(is_each_a_list and facts["joined"] >= _LEAST_JOINED and is_shared)
