"""A bounded part of a log, which the engine reads, as candidates whatever the layout of rows."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.files import (
    Log,
    family_of,
    find_files,
    given_by_folders,
    read_footers,
    url_of,
)
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.cells import cells_of, elements_of
from kd_ranker.sources.logs.guess.ibis_leaks import number_of

MAX_ROWS = 300_000  # candidates in a sample
MAX_CELLS = 12_000_000  # values read for it, elements of lists included
MAX_BYTES = 400_000_000  # of these, as they lie in the files
PIECES = 24  # of successive rows that it is made of
MAX_REQUESTS = 100_000  # requests in a second sample, of a row a request
MAX_REQUEST_CELLS = 48_000_000  # values read for that

# Above every row of a file.
_ROWS_OF_A_FILE = 2**40
# Columns of its own that a sample has: no log has such names.
AT, ROW = " at", " row"  # the place of a candidate in the sample, and of its row
_SOME_ROWS = 2000
CANDIDATE_ROWS, REQUEST_ROWS = "candidate", "request"


class Footers(NamedTuple):
    """A log, without its data.

    Attributes:
      log: those of its files that have rows.
      metadata: the footer of each.
      types: of each column, in each file that has it.
    """

    log: Log
    metadata: tuple[pq.FileMetaData, ...]
    types: dict[str, list[pa.DataType]]

    @property
    def num_rows(self) -> int:
        """The number of rows in all files."""
        return sum(metadata.num_rows for metadata in self.metadata)

    def type_names(self) -> str:
        """The columns for a message: `user_id (int64), item_id (string)`."""
        return ", ".join(f"{name} ({types[0]})" for name, types in self.types.items())

    def why_unread(self, name: str) -> str:
        """The reason for not reading a column, as its types tell it; "" for none."""
        lacking, types = len(self.metadata) - len(self.types[name]), self.types[name]
        families = {family_of(of) for of in types} - {(0, "null")}
        numbers = {"integer", "float", "decimal", "boolean"}
        if len({(depth, "number" if of in numbers else of) for depth, of in families}) > 1:
            return f"files disagree on its type: {', '.join(sorted({str(of) for of in types}))}"
        if not families:
            return "never known"
        return f"missing in {lacking} of {len(self.metadata)} files" if lacking else ""


class Sample(NamedTuple):
    """Candidates of a log.

    Attributes:
      rows: content of a row of the files, `CANDIDATE_ROWS` or `REQUEST_ROWS`.
      why_rows, check_rows: the reason for that, and a doubt about it; "" if it is sure.
      table: the columns, with `AT` and `ROW`. A row is one candidate.
      requests: the columns of which the files hold one value a request, with a row of the files a
        row; None where a row is a candidate.
      edges: places beside which the log goes on, so that their request may be incomplete.
      file_rows: the number of rows of the files.
    """

    rows: str
    why_rows: str
    check_rows: str
    table: ir.Table
    requests: ir.Table | None
    edges: list[int]
    file_rows: int


def open_log(path: str) -> Footers:
    """Reads the footers of the files that `path` means.

    Raises:
      UserError: there are none, one is no Parquet file, or all are empty.
    """
    if not path:
        raise UserError(
            "data.path is empty; give a Parquet file, a directory or a glob of them, with "
            "--config.data.path=…"
        )
    system, files, sizes, changed = find_files(path)
    types: dict[str, list[pa.DataType]] = {}
    whole, footers = [], []
    for place, (schema, metadata) in enumerate(read_footers(system, files)):
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise UserError(f"{files[place]} has two columns {name!r}; rename one of them")
        if metadata.num_rows:
            whole.append((files[place], sizes[place], changed[place]))
            footers.append(metadata)
            for field in schema:
                types.setdefault(field.name, []).append(field.type)
    if not whole:
        raise UserError(f"data.path={path}: its {len(files)} Parquet files have no rows")
    files, sizes, changed = map(list, zip(*whole, strict=True))
    given = given_by_folders(files)
    for field in given.schema:
        types.setdefault(field.name, []).append(field.type)
    names = tuple(sorted(types))
    log = Log(url_of(path), tuple(files), {}, (), names, given)
    return Footers(log, tuple(footers), types)


def _rows_within(footers: Footers, rows: float, values: float, size: float) -> int:
    """The most rows whose number, values and bytes lie within bounds, on average."""
    groups = [of.row_group(place) for of in footers.metadata for place in range(of.num_row_groups)]
    held = sum(of.column(place).num_values for of in groups for place in range(of.num_columns))
    held_bytes = sum(group.total_byte_size for group in groups)
    share = min(values / max(held, 1), size / max(held_bytes, 1))
    return max(1, int(min(rows, share * footers.num_rows)))


def _read(
    engine: Engine, footers: Footers, columns: Iterable[str], rows: int
) -> tuple[ir.Table, list[int]]:
    """So many rows of a log, in pieces at even distances.

    Returns:
      The columns whose types are known here, with their place in the log as `AT`; and the places
      among them beside which the log has rows that the table lacks.
    """
    pieces = min(PIECES, rows) if rows < footers.num_rows else 1
    size = min(rows, footers.num_rows) // pieces
    starts = np.linspace(0, footers.num_rows - size, pieces).astype(int).tolist()
    ends = np.cumsum([metadata.num_rows for metadata in footers.metadata]).tolist()
    ranges = [
        (file, max(start - first, 0), min(start + size, end) - first)
        for file, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
        for start in starts
        if start < end and start + size > first
    ]
    files = sorted({file for file, *_rows in ranges})
    log = dataclasses.replace(
        footers.log,
        files=tuple(footers.log.files[of] for of in files),
        given=footers.log.given.take(files),
    )
    table = engine.read(log)
    within = [(table.row >= start) & (table.row < stop) for _file, start, stop in ranges]
    of_file = [table.file == files.index(file) for file, *_rows in ranges]
    # The engine skips row groups by the first condition, which asks of no other table.
    table = table.filter(functools.reduce(operator.or_, within)).filter(
        functools.reduce(operator.or_, map(operator.and_, within, of_file))
    )
    there = [of for of in columns if of in table.columns and kind_of(table[of].type())]
    table = table.select(
        **{AT: table.file * _ROWS_OF_A_FILE + table.row}, **{of: _plain(table[of]) for of in there}
    )
    apart = [each for each in range(1, pieces) if starts[each] > starts[each - 1] + size]
    return table, [at for each in apart for at in (each * size - 1, each * size)]


def kind_of(of: dt.DataType) -> str:
    """The kind of a type: bool, integer, float, string, time or list; "" for all others."""
    tests = {
        "bool": of.is_boolean(),
        "integer": of.is_integer(),
        "float": of.is_floating() or of.is_decimal(),
        "string": of.is_string() or of.is_binary(),
        "time": of.is_timestamp() or of.is_date(),
        "list": of.is_array() and bool(kind_of(of.value_type)),
    }
    return next((kind for kind, is_so in tests.items() if is_so), "")


def element_kind(table: ir.Table, name: str) -> str:
    """The kind of the elements of a column of lists; "" for a column of none."""
    of = table[name].type()
    return kind_of(of.value_type) if of.is_array() else ""


def _plain(value: ir.Value) -> ir.Value:
    """A value of the widest type of its kind; NaN, which is how some writers say null, is none."""
    kind = value.type()
    if kind.is_array():
        value = value.cast(dt.Array(_plain(ibis.null(kind.value_type)).type()))
        return value.map(number_of) if value.type().value_type.is_floating() else value
    if kind.is_floating() or kind.is_decimal():
        return number_of(value)
    if kind.is_integer() and kind != dt.uint64:
        return value.cast("int64")
    return value.cast("string") if kind.is_binary() else value


def read_sample(engine: Engine, footers: Footers) -> Sample:
    """Reads row groups spread over the log, of each as many rows as its share of the bounds."""
    wanted = [name for name in footers.types if not footers.why_unread(name)]
    rows = _rows_within(footers, MAX_ROWS, MAX_CELLS, MAX_BYTES)
    table, edges = _read(engine, footers, wanted, rows)
    place = ibis.row_number().over(order_by=AT)
    table = engine.keep("sampled rows", table.mutate(**{AT: place}))
    aligned, why, check = _find_aligned(engine, table)
    number = engine.count(table)
    if aligned:
        table, requests = _unfolded(engine, table, aligned)
        return Sample(REQUEST_ROWS, why, check, table, requests, [], number)
    table = table.mutate(**{ROW: table[AT]})
    return Sample(CANDIDATE_ROWS, why, check, table, None, edges, number)


def read_requests(
    engine: Engine, footers: Footers, request: str, of_request: Iterable[str]
) -> ir.Table:
    """Rows that hold columns of requests, of as many requests as its bounds allow, a row each.

    Args:
      engine: to read with.
      footers: of the log.
      request: the column that tells requests apart; "" where each row is one.
      of_request: columns that hold the same for all candidates of a request.
    """
    wanted = {*of_request, request} - {""}
    rows = MAX_REQUEST_CELLS // len(wanted) if request else MAX_REQUESTS
    table, _edges = _read(engine, footers, sorted(wanted), rows)
    return first_rows(table, request, MAX_REQUESTS) if request else table


def first_rows(table: ir.Table, owner: str, most: int | None = None) -> ir.Table:
    """The first row of each owner, or of some of them."""
    first = table.filter(table[owner].notnull()).group_by(owner).agg(**{AT: table[AT].min()})
    return table.semi_join(first.order_by(AT).limit(most) if most else first, AT)


def _find_aligned(engine: Engine, table: ir.Table) -> tuple[list[str], str, str]:
    """Finds the columns whose lists hold a value a candidate.

    Lists of a row a request are as long as each other in every row, one of them names items and so
    holds nothing twice, and successive rows hold other lists. Histories of items and their times
    are as long as each other, too; but they repeat from candidate to candidate.

    Returns:
      The columns, none where a row is a candidate; the reason, and a doubt.
    """
    lists = [name for name in table.columns if element_kind(table, name)]
    if not lists:
        return [], "its columns hold one value each", ""
    lengths = engine.fetch(table.select(**{name: table[name].length() for name in lists}))
    length = {name: lengths[name].fill_null(-1).to_numpy() for name in lists}
    facts = _facts_of_lists(engine, table, lists)

    def match(name: str) -> int:
        return names.match(name, names.SYNONYMS["item"])

    likely = []
    for item in lists:
        is_long = (length[item] >= 0).mean() >= 0.5 and np.median(length[item]) >= 2
        may_be_ids = element_kind(table, item) in ("integer", "string") and is_long
        # A row of zeros and ones has long ones twice.
        if may_be_ids and facts[item]["once"] >= 0.98:
            family = [of for of in lists if _are_as_long(length[item], length[of])]
            has_labels = any(facts[of]["is_binary"] for of in family)
            fit = (max(map(match, family)), has_labels, len(family), match(item))
            likely += [(fit, item, family)] if len(family) > 1 else []
    if not likely:
        return [], "its lists differ in length within a row", ""
    _fit, item, family = max(likely)
    if facts[item]["different"] < 0.8:
        return [], f"lists repeat from row to row, those of {item!r} for one", ""
    labels = [of for of in family if names.task_of_label(of)[1] and facts[of]["is_binary"]]
    is_named = bool(labels) or any(map(match, family))
    if not is_named and any(match(of) == 2 for of in table.columns if of not in lists):
        return [], "it has a column of items that is no list", ""
    why = f"the lists of {len(family)} columns are equally long within each row"
    return family, why, '"candidate", if these lists are histories' * (not is_named)


def _are_as_long(one: np.ndarray, other: np.ndarray) -> bool:
    both = (one >= 0) & (other >= 0)
    return bool(both.any()) and np.array_equal(one[both], other[both])


def _facts_of_lists(engine: Engine, table: ir.Table, lists: Sequence[str]) -> dict[str, dict]:
    """Of each column of lists: the shares that are "different" ones, and of elements met "once".

    "is_binary" is True for lists that hold zeros and ones and nothing else.
    """
    values = cells_of(table, lists).group_by("column")
    values = values.agg(rows=_.count(), values=_.code.nunique())
    each = elements_of(table.filter(table[AT] < _SOME_ROWS), lists, AT)
    each = each.group_by("column", AT, "code").agg(times=_.count(), number=_.number.min())
    elements = each.group_by("column").agg(
        elements=_.times.sum(),
        distinct=_.count(),
        zeros=_.times.sum(where=_.number == 0),
        ones=_.times.sum(where=_.number == 1),
    )
    found = {name: {"different": 0.0, "once": 0.0, "is_binary": False} for name in lists}
    for row in engine.fetch(values.join(elements, "column")).to_pylist():
        ones, zeros = row["ones"] or 0, row["zeros"] or 0
        found[lists[row["column"]]] = {
            "different": row["values"] / row["rows"],
            "once": row["distinct"] / row["elements"],
            "is_binary": bool(ones and zeros and ones + zeros == row["elements"]),
        }
    return found


def _unfolded(engine: Engine, table: ir.Table, aligned: Sequence[str]) -> tuple[ir.Table, ir.Table]:
    """Candidates, with their rows in `ROW`, and the other columns of these rows."""
    table = table.mutate(
        **{ROW: ibis.greatest(*(ibis.coalesce(table[of].length(), 0) for of in aligned))}
    )
    # Rows with too many candidates together are thinned at even distances.
    (whole,) = engine.fetch(table.agg(candidates=table[ROW].sum())).to_pylist()
    table = table.filter(table[AT] % -(-int(whole["candidates"] or 1) // MAX_ROWS) == 0)
    # A list that is missing is one of missing values, which a shorter list is filled up with.
    lists = [table[name].fill_null(ibis.literal([], type=table[name].type())) for name in aligned]
    of_request = [name for name in table.columns if name not in (AT, ROW, *aligned)]
    each = ibis.range(table[ROW]).zip(*lists).unnest()
    unfolded = table.select(*of_request, **{ROW: table[AT]}, each=each)
    values = {name: unfolded.each[f"f{place}"] for place, name in enumerate(aligned, 2)}
    place = ibis.row_number().over(order_by=[unfolded[ROW], unfolded.each["f1"]])
    candidates = unfolded.select(*of_request, ROW, **{AT: place}, **values)
    return engine.keep("candidates of rows", candidates), table.select(AT, *of_request)
