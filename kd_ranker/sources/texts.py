"""Text files of separated fields, read by the engine; a damaged line is refused by its number."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir

from kd_ranker.errors import UserError
from kd_ranker.sources.tables import Engine

_BLOCK_BYTES = 1 << 24
# Of a header, for a message about a file that has no line ends.
_HEADER_BYTES = 10_000


class Field(NamedTuple):
    """The values that a field may have.

    Attributes:
      kind: `text`, `whole` (a whole number, as it is usually written) or `number`.
      least: the least number.
      most: the largest one.
      among: the only values; () takes all.
      optional: True if it may be empty, which is then None.
    """

    kind: str = "text"
    least: float = -math.inf
    most: float = math.inf
    among: tuple[float | str, ...] = ()
    optional: bool = False

    def sql(self, name: str) -> tuple[str, str]:
        """The value of a column of texts, and a condition that holds where it is not allowed."""
        text = _quoted(name)
        value, checks = text, []
        if self.kind == "whole":
            # The narrowest, since a log may have hundreds of millions of rows.
            bits = next((bits for bits in (8, 32) if self.most < 2 ** (bits - 1)), 64)
            value = f"try_cast({text} AS INT{bits // 8})"
            checks.append(f"{value}::VARCHAR = {text}")
        elif self.kind == "number":
            value = f"try_cast({text} AS DOUBLE)"
            checks.append(f"NOT isnan({value})")
        if not math.isinf(self.least):
            checks.append(f"{value} >= {_plain(self.least)}")
        if not math.isinf(self.most):
            checks.append(f"{value} <= {_plain(self.most)}")
        if self.among:
            allowed = ", ".join(
                f"'{of}'" if isinstance(of, str) else _plain(of) for of in self.among
            )
            checks.append(f"{value} IN ({allowed})")
        good = " AND ".join(checks) or "true"
        empty = f"{text} IS NULL"
        return value, f"NOT coalesce({good}, false) AND NOT {empty}" if self.optional else (
            f"{empty} OR NOT coalesce({good}, false)"
        )

    def __str__(self) -> str:
        """A description of them."""
        if self.among:
            return f"one of {', '.join(map(_plain, self.among))}"
        kind = {"text": "a text", "whole": "a whole number", "number": "a number"}[self.kind]
        least = "" if math.isinf(self.least) else f" from {_plain(self.least)}"
        return kind + least + ("" if math.isinf(self.most) else f" to {_plain(self.most)}")


def _quoted(name: str) -> str:
    """A name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.16g}"


class Text(NamedTuple):
    """A file and its rows: the fields that were asked for, and `line`, the number of the line."""

    path: Path
    rows: ir.Table


def read_text(
    engine: Engine,
    path: Path,
    fields: Mapping[str, Field],
    *,
    names: Sequence[str] = (),
    separator: str = ",",
    encoding: str = "utf-8",
) -> Text:
    """Reads a file whose lines are rows.

    Args:
      engine: holds the rows.
      path: the file.
      fields: name -> field, of those to read.
      names: the names of all fields, in their order, of a file that has none in its first line.
      separator: of fields. With a comma a field may stand in quotation marks.
      encoding: of the text.

    Raises:
      UserError: the file is empty or lacks a field, or a line has too many or too few of them, or a
        field that is not allowed; names the line.
    """
    is_csv, header = separator == ",", int(not names)
    names = names or column_names(path, fields)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    source = path
    if encoding != "utf-8":
        source = engine.folder / f"{path.name}.utf-8"
        source.write_text(path.read_text(encoding), "utf-8", newline="\n")
    # The engine wants a plain name for its list of what it rejects.
    plain = re.sub(r"\W", "_", path.name)
    run, raw = engine.backend.con.execute, _lines_of(source, plain, names, separator, header)
    read = {name: field.sql(name) for name, field in fields.items()}
    faults = " ".join(f"WHEN {bad} THEN {place}" for place, (_, bad) in enumerate(read.values()))
    values = ", ".join(f"{value} AS {_quoted(name)}" for name, (value, _) in read.items())
    run(
        f"CREATE TEMP TABLE text_{plain} AS "
        f"SELECT line, CASE {faults} END::INT1 AS fault, {values} FROM {raw}"
    )
    ((number, line, place),) = run(
        f"SELECT count(*), min(line) FILTER (fault >= 0), arg_min(fault, line) FROM text_{plain}"
    ).fetchall()
    with source.open("rb") as file:
        ends = sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    if number < ends - header:
        rejects = engine.backend.table(f"rejects_{plain}").order_by("line", "column_idx").limit(1)
        _check_rejects(path, engine.fetch(rejects).to_pylist(), separator, len(names))
        _check_lost(path, source, is_csv)
    if line is not None:
        name = list(fields)[place]
        ((text,),) = run(f"SELECT {_quoted(name)} FROM {raw} WHERE line = {line}").fetchall()
        raise UserError(f"{path}, line {line}: {name} {text or ''!r} is not {fields[name]}")
    if not number:
        raise UserError(f"{path} has no rows")
    return Text(path, engine.backend.table(f"text_{plain}").drop("fault"))


def _lines_of(source: Path, plain: str, names: Sequence[str], separator: str, header: int) -> str:
    """The lines of a file as SQL: texts by these names, and `line`; rejects by a plain name."""
    columns = ", ".join(f"'{_escaped(name)}': 'VARCHAR'" for name in names)
    quote = '"' if separator == "," else ""
    # Ibis has no word for rejects, nor would another engine know them.
    return f"""(SELECT *, row_number() OVER () + {header} AS line FROM read_csv(
        '{_escaped(str(source))}', auto_detect = false, header = {bool(header)},
        delim = '{separator}', quote = '{quote}', escape = '{quote}', nullstr = '',
        columns = {{{columns}}}, store_rejects = true, rejects_limit = 1000,
        rejects_table = 'rejects_{plain}', rejects_scan = 'scans_{plain}'))"""


def _escaped(text: str) -> str:
    """A text as it stands between single quotation marks in SQL."""
    return text.replace("'", "''")


def column_names(path: Path, wanted: Sequence[str] | Mapping[str, Field]) -> list[str]:
    """The names in the first line of a file; raises UserError where a wanted one is not there."""
    with path.open("rb") as file:
        # A byte order mark is not part of the first name.
        found = file.readline(_HEADER_BYTES).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not found:
        raise UserError(f"{path} is empty, or its first line is")
    names = found.split(",")
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{path} lacks the column {', '.join(missing)}; it has: {found}")
    return names


def _check_rejects(
    path: Path, rejects: list[dict[str, Any]], separator: str, expected: int
) -> None:
    """Raises UserError for the first line that the engine has not read."""
    for found in rejects:
        problem = found["error_message"]
        if "COLUMNS" in found["error_type"]:
            fields = found["csv_line"].strip("\n").count(separator) + 1
            problem = f"{fields} fields separated by {separator!r}, expected {expected}"
        elif found["error_type"] == "INVALID ENCODING":
            problem = "is not in UTF-8"
        raise UserError(f"{path}, line {found['line']}: {problem}")


def _check_lost(path: Path, source: Path, is_csv: bool) -> None:
    """Raises UserError for an empty line that is not at the end, or an unclosed quotation mark."""
    empty = 0
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                empty = empty or number
            elif empty:
                raise UserError(f"{path}, line {empty}: is empty")
            elif is_csv and line.count(b'"') % 2:
                raise UserError(f"{path}, line {number}: a quotation mark is not closed")


def refuse(engine: Engine, text: Text, condition: str, problem: str, more: str = "") -> None:
    """Raises UserError for the first line of which a condition holds, if there is one.

    Args:
      engine: holds the rows.
      text: the file, whose rows are `these` in SQL.
      condition: in SQL.
      problem: a template for the values of the row, such as `user {user} is unknown`.
      more: what joins the rows to others.
    """
    rows = ibis.to_sql(text.rows)
    wrong = f"WITH these AS ({rows}) FROM these {more} WHERE {condition} ORDER BY line LIMIT 1"
    for row in engine.backend.con.sql(wrong).to_arrow_table().to_pylist():
        raise UserError(f"{text.path}, line {row['line']}: {problem.format(**row)}")


def check_once(engine: Engine, text: Text, keys: Sequence[str], what: str) -> None:
    """Raises UserError where a row has the same `keys` as one before; `what` names it by them."""
    by = ", ".join(map(_quoted, keys))
    # Most files have none, and to count takes less than to sort.
    several = f"SELECT {by}, min(line) AS first FROM these GROUP BY {by} HAVING count(*) > 1"
    problem = f"{what} was given before, in {text.path.name}, line {{first}}"
    refuse(engine, text, "line > first", problem, f"JOIN ({several}) USING ({by})")


def check_known(engine: Engine, text: Text, key: str, known: Text, what: str) -> None:
    """Raises UserError for a row whose `key` is not among those of another file."""
    others = f"ANTI JOIN ({ibis.to_sql(known.rows.select(key))}) USING ({_quoted(key)})"
    refuse(engine, text, "true", f"{what} is not in {known.path.name}", others)
