"""Names and texts as SQL takes them, and SELECTs of SELECTs."""

import re
from collections.abc import Mapping


def quoted(name: str) -> str:
    """Return a name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return a text as SQL takes it."""
    return "'" + text.replace("'", "''") + "'"


def select_with(values: Mapping[str, str], select: str) -> str:
    """Return a SELECT of another one's columns, with other values by column."""
    expressions = [f"    {value} AS {quoted(column)}" for column, value in values.items()]
    return "SELECT * REPLACE (\n" + ",\n".join(expressions) + f"\n)\n{from_select(select)}"


def from_select(select: str) -> str:
    """Return the FROM clause that reads the rows of another SELECT.

    >>> from_select("SELECT * FROM read_csv('a.csv')")
    "FROM read_csv('a.csv')"
    """
    plain = re.fullmatch(r"SELECT \* (FROM read_\w+\([^()]*\))", select)
    return plain[1] if plain else f"FROM (\n{select}\n)"
