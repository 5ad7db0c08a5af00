"""Values within a value: objects, lists of objects, and texts that join several values."""

from collections.abc import Collection
from typing import Any, NamedTuple

import duckdb
import pandas as pd

from kd_ranker.sources.logs.sql import literal, quoted

_SEPARATORS = ("|", ";", ",", " ")
# Least share of the texts that join at least two values, and most distinct values per text.
_LEAST_JOINED, _MOST_VALUES = 0.05, 0.5


class Unnested(NamedTuple):
    """A SELECT that makes columns of the fields of objects."""

    column: str  # with the objects
    head: str  # what the SELECT selects, without its FROM
    is_list: bool  # whether the objects are in lists, and get a row each


def unnest_objects(rows: duckdb.DuckDBPyRelation) -> Unnested | None:
    """Return the SELECT for the first column of objects, or for the lists of the largest ones."""
    columns = rows.columns
    objects = {}  # column -> the fields of its objects
    lists = {}  # column -> the fields of the objects in its lists
    for column, of_column in zip(columns, rows.types, strict=True):
        # Types have children of several kinds.
        type_: Any = of_column
        if type_.id == "struct":
            objects[column] = [field for field, _ in type_.children]
        elif type_.id == "list" and type_.children[0][1].id == "struct":
            lists[column] = [field for field, _ in type_.children[0][1].children]
    for column, fields in objects.items():
        selected = []
        for field in fields:
            name = f"{column}_{field}"
            while name in columns:
                name += "_"
            selected.append(f"{quoted(column)}.{quoted(field)} AS {quoted(name)}")
        head = f"SELECT * EXCLUDE ({quoted(column)}), {', '.join(selected)}"
        return Unnested(column, head, False)
    if not lists:
        return None
    column = max(lists, key=lambda column: len(lists[column]))
    excluded = f"* EXCLUDE ({quoted(column)})"
    if clashes := {*lists[column]} & {*columns}:
        names = (f"{quoted(name)} AS {quoted(f'request_{name}')}" for name in sorted(clashes))
        excluded += f" RENAME ({', '.join(names)})"
    return Unnested(column, f"SELECT {excluded}, unnest({quoted(column)}, max_depth := 2)", True)


def find_joined(con: duckdb.DuckDBPyConnection, columns: Collection[str]) -> dict[str, str]:
    """Return the columns of texts that are lists, each with the SQL of the list.

    Lists share their values: far fewer are distinct than the texts. So a title is none, whose words
    an address or a comma separates.

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
    of_texts = "count(text) AS texts, count(list) AS lists, avg((len(list) > 1)::INT) AS joined"
    of_values = (
        "count(DISTINCT value) AS values, bool_or(value = '' OR value != trim(value)) AS is_prose, "
        "avg(regexp_matches(value, '[0-9]')::INT) AS numbered"
    )
    return (
        con.execute(
            f"WITH lists AS (SELECT DISTINCT {quoted(column)} AS text, {values} AS list "
            f"FROM candidates) SELECT * FROM (SELECT {of_texts} FROM lists), "
            f"(SELECT {of_values} FROM (SELECT unnest(list) AS value FROM lists))"
        )
        .df()
        .iloc[0]
    )


def _are_lists(facts: pd.Series) -> bool:
    is_each_a_list = 0 < facts["lists"] == facts["texts"] and not facts["is_prose"]
    is_shared = facts["values"] <= _MOST_VALUES * facts["texts"]
    return bool(is_each_a_list and facts["joined"] >= _LEAST_JOINED and is_shared)
