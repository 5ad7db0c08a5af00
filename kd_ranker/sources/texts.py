"""Text files of separated fields, read by the engine; a damaged line is refused by its number."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import Engine

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

    def read(self, text: ir.StringValue) -> tuple[ir.Value, ir.BooleanValue | None]:
        """The value of a text, and True where it is not allowed; None if any is."""
        if self.kind == "whole":
            # The narrowest, since a log may have hundreds of millions of rows.
            bits = next((bits for bits in (8, 32) if self.most < 2 ** (bits - 1)), 64)
            value = text.try_cast(f"int{bits}")
            is_good = value.cast("string") == text
        elif self.kind == "number":
            value = text.try_cast("float64")
            is_good = ~value.isnan()
        else:
            value, is_good = text, text.notnull()
        if not math.isinf(self.least):
            is_good &= value >= self.least
        if not math.isinf(self.most):
            is_good &= value <= self.most
        if self.among:
            is_good &= value.isin(self.among)
        elif self.kind == "text" and self.optional:
            return value, None
        is_bad = ~is_good.fill_null(False)
        return value, is_bad & text.notnull() if self.optional else is_bad

    def __str__(self) -> str:
        """A description of them."""
        if self.among:
            return f"one of {', '.join(map(_plain, self.among))}"
        kind = {"text": "a text", "whole": "a whole number", "number": "a number"}[self.kind]
        least = "" if math.isinf(self.least) else f" from {_plain(self.least)}"
        return kind + least + ("" if math.isinf(self.most) else f" to {_plain(self.most)}")


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
    raw = engine.backend.read_csv(
        str(source), auto_detect=False, header=bool(header), delim=separator,
        quote='"' if is_csv else "", escape='"' if is_csv else "", nullstr="",
        columns=dict.fromkeys(names, "VARCHAR"), store_rejects=True, rejects_limit=1000,
        rejects_table=f"rejects_{plain}", rejects_scan=f"scans_{plain}",
    )  # fmt: skip
    read = {name: field.read(raw[name]) for name, field in fields.items()}
    checks = [(is_bad, place) for place, (_, is_bad) in enumerate(read.values())]
    checks = [(is_bad, place) for is_bad, place in checks if is_bad is not None]
    fault = ibis.cases(*checks, else_=-1) if checks else ibis.literal(-1)
    line = ibis.row_number() + (1 + header)
    typed = {name: value for name, (value, _) in read.items()}
    rows = engine.keep(f"text_{plain}", raw.select(line=line, fault=fault.cast("int8"), **typed))
    (found,) = engine.fetch(
        rows.agg(number=rows.count(), line=rows.line.min(where=rows.fault >= 0))
    ).to_pylist()
    with source.open("rb") as file:
        ends = sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    if found["number"] < ends - header:
        rejects = engine.backend.table(f"rejects_{plain}")
        _check_rejects(engine, path, rejects, separator, len(names))
        _check_lost(path, source, is_csv)
    if found["line"] is not None:
        texts = raw.mutate(line=line).filter(lambda row: row.line == found["line"])
        (row,) = engine.fetch(texts).to_pylist()
        (place,) = engine.fetch(rows.filter(rows.line == found["line"]))["fault"].to_pylist()
        name = list(fields)[place]
        raise UserError(
            f"{path}, line {found['line']}: {name} {row[name] or ''!r} is not {fields[name]}"
        )
    if not found["number"]:
        raise UserError(f"{path} has no rows")
    return Text(path, rows.drop("fault"))


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
    engine: Engine, path: Path, rejects: ir.Table, separator: str, expected: int
) -> None:
    """Raises UserError for the first line that the engine has not read."""
    for found in engine.fetch(rejects.order_by("line", "column_idx").limit(1)).to_pylist():
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


def refuse(engine: Engine, text: Text, wrong: ir.Table, problem: str) -> None:
    """Raises UserError for the first line of some rows, if there are any.

    Args:
      engine: holds the rows.
      text: the file.
      wrong: the rows, with `line` and whatever `problem` mentions.
      problem: a template for the values of the row, such as `user {user} is unknown`.
    """
    for row in engine.fetch(wrong.order_by("line").limit(1)).to_pylist():
        raise UserError(f"{text.path}, line {row['line']}: {problem.format(**row)}")


def check_once(engine: Engine, text: Text, keys: Sequence[str], what: str) -> None:
    """Raises UserError where a row has the same `keys` as one before; `what` names it by them."""
    # Most files have none, and to count takes less than to sort.
    several = text.rows.group_by(list(keys)).having(ibis._.count() > 1).agg(first=ibis._.line.min())
    again = text.rows.inner_join(several, list(keys)).filter(ibis._.line > ibis._.first)
    refuse(engine, text, again, f"{what} was given before, in {text.path.name}, line {{first}}")


def check_known(engine: Engine, text: Text, key: str, known: Text, what: str) -> None:
    """Raises UserError for a row whose `key` is not among those of another file."""
    unknown = text.rows.anti_join(known.rows, key)
    refuse(engine, text, unknown, f"{what} is not in {known.path.name}")
