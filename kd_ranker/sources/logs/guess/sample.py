"""A bounded sample of a log, as columns over its candidates, whatever the layout of its rows.

Of every column the sample holds the distinct values and, for each row, the *code* of its value:
rows have equal codes where they hold equal values, and -1 where they hold none. Dependences between
columns can be counted on codes alone, for strings and lists as for numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from jaxtyping import Int32, Int64

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.files import find_files, is_list
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.column import Column, encode, kind_of

MAX_ROWS = 300_000  # candidates in a sample
MAX_CELLS = 12_000_000  # values read for it, elements of lists included
MAX_BYTES = 400_000_000  # of these values
MAX_CHUNKS = 24  # row groups read for it
MAX_REQUESTS = 100_000  # requests in a second sample, of a row a request
_MAX_REQUEST_CELLS = 48_000_000  # values read for that
_BATCH_CELLS = 100_000
_READ_AHEAD = 1 << 20  # bytes

CANDIDATE_ROWS, REQUEST_ROWS = "candidate", "request"


class FileFooter(NamedTuple):
    """One file of a log, without its data."""

    system: Any
    path: str
    types: dict[str, pa.DataType]
    rows: tuple[int, ...]  # of each row group


class LogFooters(NamedTuple):
    """A log, without its data.

    Attributes:
      path: as the config gives it.
      files: those that have rows.
      types: of every column of any file; null where files disagree so far that none holds all.
      num_rows: in all files.
    """

    path: str
    files: list[FileFooter]
    types: dict[str, pa.DataType]
    num_rows: int

    def missing(self, name: str) -> int:
        """The number of files that lack a column."""
        return sum(name not in file.types for file in self.files)


class Sample(NamedTuple):
    """Candidates of a log.

    Attributes:
      rows: content of a row of the files, `CANDIDATE_ROWS` or `REQUEST_ROWS`.
      why_rows: the reason for that.
      check_rows: a doubt about it; "" if it is sure.
      columns: by name. A row is one candidate.
      of_request: names of columns of which the files hold one value a request; only in the layout
        of a row a request.
      request: the row of the files that a candidate comes from, in that layout; else all -1.
      edge: rows beside which the log goes on, so that their request may be incomplete.
      file_rows: the number of rows of the files.
      unread: column that cannot be read -> the reason.
    """

    rows: str
    why_rows: str
    check_rows: str
    columns: dict[str, Column]
    of_request: frozenset[str]
    request: Int32[np.ndarray, "rows"]
    edge: Int64[np.ndarray, "_"]
    file_rows: int
    unread: dict[str, str]

    @property
    def num_rows(self) -> int:
        """The number of candidates."""
        return len(self.request)


def read_footers(path: str) -> LogFooters:
    """Reads the footers of the files that `path` means.

    Raises:
      UserError: there are none, one is no Parquet file, or all are empty.
    """
    if not path:
        raise UserError(
            "data.path is empty; give a Parquet file, a directory or a glob of them, with "
            "--config.data.path=…"
        )
    system, paths, *_ = find_files(path)
    files = []
    for file in paths:
        try:
            parquet = _opened(system, file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
        except (pa.ArrowException, OSError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{file} cannot be read as Parquet: {reason}") from error
        for name in schema.names:
            if schema.names.count(name) > 1:
                raise UserError(f"{file} has two columns {name!r}; rename one of them")
        rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        types = dict(zip(schema.names, map(_plain_type, schema.types), strict=True))
        files.append(FileFooter(system, file, types, rows))
    num_rows = sum(sum(each.rows) for each in files)
    if not num_rows:
        raise UserError(f"data.path={path}: its {len(files)} Parquet files have no rows")
    files = [each for each in files if sum(each.rows)]
    return LogFooters(path, files, _common_types(files), num_rows)


def _opened(system: Any, path: str) -> pq.ParquetFile:
    source = path if isinstance(system, LocalFileSystem) else system.open(path, "rb")
    # Without a buffer, a whole column of a row group is read at once.
    return pq.ParquetFile(source, buffer_size=_READ_AHEAD)


def _plain_type(of: pa.DataType) -> pa.DataType:
    """The type of the values, however they are stored."""
    if pa.types.is_dictionary(of):
        return _plain_type(of.value_type)
    if pa.types.is_large_string(of) or pa.types.is_string_view(of):
        return pa.string()
    if pa.types.is_large_binary(of) or pa.types.is_fixed_size_binary(of):
        return pa.binary()
    if pa.types.is_float16(of):
        return pa.float32()
    if is_list(of):
        return pa.list_(_plain_type(of.value_type))
    return of


def _common_types(files: Sequence[FileFooter]) -> dict[str, pa.DataType]:
    types: dict[str, pa.DataType] = {}
    differing = set()
    for file in files:
        for name, of in file.types.items():
            common = _common_type(types.get(name, of), of)
            if common is None:
                differing.add(name)
            types[name] = of if common is None else common
    return types | dict.fromkeys(differing, pa.null())


def _common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both; None if there is none."""
    if one.equals(other):
        return one
    try:
        fields = [pa.schema([("", of)]) for of in (one, other)]
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


class _Chunk(NamedTuple):
    """Successive rows from the beginning of a row group."""

    table: pa.Table
    follows: bool  # the chunk before it, without a gap
    is_first: bool  # it begins where its file begins
    is_last: bool  # it ends where its file ends


def read_sample(log: LogFooters, max_rows: int = MAX_ROWS, max_cells: int = MAX_CELLS) -> Sample:
    """Reads row groups spread over the log, of each as many rows as its share of the bounds."""
    unread = _unreadable(log)
    wanted = [name for name in log.types if name not in unread]
    chunks = list(_read_chunks(log, wanted, max_rows, max_cells))
    table = pa.concat_tables([chunk.table for chunk in chunks])
    edge = _edges(chunks)
    aligned, why, check = _find_aligned(table)
    rows = REQUEST_ROWS if aligned else CANDIDATE_ROWS
    if aligned:
        columns, request = _exploded(table, aligned, max_rows, unread)
        file_rows = int(request.max()) + 1
        # Each of its rows holds a whole request.
        edge = np.zeros(0, np.int64)
    else:
        columns, file_rows = _encoded(table, unread), table.num_rows
        request = np.full(table.num_rows, -1, np.int32)
    of_request = frozenset(columns) - frozenset(aligned) if aligned else frozenset[str]()
    return Sample(rows, why, check, columns, of_request, request, edge, file_rows, unread)


def _unreadable(log: LogFooters) -> dict[str, str]:
    reasons = {}
    for name, of in log.types.items():
        kinds = sorted({str(file.types[name]) for file in log.files if name in file.types})
        if pa.types.is_null(of):
            differ = f"files disagree on its type: {', '.join(kinds)}"
            reasons[name] = "never known" if kinds == ["null"] else differ
        elif not kind_of(of):
            reasons[name] = f"its type {of} is no number, string, time or list; flatten it first"
    return reasons


def _spread_row_groups(log: LogFooters) -> list[tuple[FileFooter, int]]:
    """At most MAX_CHUNKS row groups at even distances, in the order of the log."""
    row_groups = [
        (file, row_group) for file in log.files for row_group, rows in enumerate(file.rows) if rows
    ]
    places = np.unique(
        np.linspace(0, len(row_groups) - 1, min(MAX_CHUNKS, len(row_groups))).round()
    )
    return [row_groups[int(place)] for place in places]


def _read_chunks(
    log: LogFooters, wanted: Sequence[str], max_rows: int, max_cells: int
) -> Iterator[_Chunk]:
    schema = pa.schema([(name, log.types[name]) for name in wanted])
    row_groups, bytes_left = _spread_row_groups(log), MAX_BYTES
    before: tuple[FileFooter, int] | None = None
    for index, (file, row_group) in enumerate(row_groups):
        # The share that small row groups leave goes to those that follow.
        left = len(row_groups) - index
        parquet, present, cells = _open_row_group(file, row_group, wanted)
        rows = min(
            file.rows[row_group], max(1, min(max_rows // left, int(max_cells / cells) // left))
        )
        batches, read, held = [], 0, 0
        for batch in _batches(parquet, row_group, present, cells, rows):
            batches.append(_conformed(batch.slice(0, rows - read), schema))
            read += len(batches[-1])
            held += batches[-1].nbytes
            if read >= rows or held >= bytes_left // left:
                break
        max_rows, max_cells = max_rows - read, max_cells - int(read * cells)
        bytes_left -= held
        ends_row_group = read == file.rows[row_group]
        yield _Chunk(
            table=pa.concat_tables(batches),
            follows=before == (file, row_group),
            is_first=row_group == 0,
            is_last=ends_row_group and row_group == len(file.rows) - 1,
        )
        before = (file, row_group + 1) if ends_row_group else None


def _open_row_group(
    file: FileFooter, row_group: int, wanted: Sequence[str]
) -> tuple[pq.ParquetFile, list[str], float]:
    """A file, those of the columns that it has, and how many of their values a row holds."""
    parquet = _opened(file.system, file.path)
    present = [name for name in wanted if name in file.types]
    metadata = parquet.metadata.row_group(row_group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    cells = sum(
        chunk.num_values
        for chunk in chunks
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in present)
    )
    return parquet, present, max(cells / metadata.num_rows, 1.0)


def _batches(
    parquet: pq.ParquetFile, row_group: int, columns: list[str], cells: float, rows: int
) -> Iterator[pa.RecordBatch]:
    size = max(1, min(rows, int(_BATCH_CELLS / cells)))
    return parquet.iter_batches(batch_size=size, row_groups=[row_group], columns=columns)


def _conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """A table of the schema's columns: cast to its types, null where the file lacks a column."""
    arrays = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        if place < 0:
            arrays.append(pa.nulls(len(batch), field.type))
            continue
        array = batch.column(place)
        arrays.append(array if array.type.equals(field.type) else _cast(array, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _cast(array: pa.Array, of: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(of, safe=False)


def _edges(chunks: Sequence[_Chunk]) -> Int64[np.ndarray, "_"]:
    """Rows beside which the log has rows that the sample lacks."""
    edges, end = [], 0
    for index, chunk in enumerate(chunks):
        start, end = end, end + chunk.table.num_rows
        if not chunk.is_first and not chunk.follows:
            edges.append(start)
        is_followed = index + 1 < len(chunks) and chunks[index + 1].follows
        if not chunk.is_last and not is_followed:
            edges.append(end - 1)
    return np.array(edges, np.int64)


def _find_aligned(table: pa.Table) -> tuple[list[str], str, str]:
    """Finds the columns whose lists hold a value a candidate.

    Lists of a row a request are as long as each other in every row, one of them names items and so
    holds nothing twice, and successive rows hold other lists. Histories of items and their times
    are as long as each other, too; but they repeat from candidate to candidate.

    Returns:
      The columns, none where a row is a candidate; the reason, and a doubt.
    """
    lengths = {
        name: pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy()
        for name in table.column_names
        if is_list(table.schema.field(name).type)
    }
    families: list[list[str]] = []
    for name, length in lengths.items():
        if (length >= 0).mean() < 0.5 or np.median(length) < 2:
            continue
        for family in families:
            other = lengths[family[0]]
            if np.array_equal(*(each[(length >= 0) & (other >= 0)] for each in (length, other))):
                family.append(name)
                break
        else:
            families.append([name])
    plain = "its columns hold one value each"
    if lengths:
        plain = "its lists differ in length within a row"
    families = [family for family in families if len(family) > 1 and _ids_of(table, family)]
    if not families:
        return [], plain, ""
    family = max(families, key=lambda family: _suits_candidates(table, family))
    item = _ids_of(table, family)
    code = encode(table[item])[0]
    if len(np.unique(code)) < 0.8 * len(code):
        return [], f"lists repeat from row to row, those of {item!r} for one", ""
    has_item = any(
        names.match(name, names.SYNONYMS["item"]) == 2
        for name in table.column_names
        if name not in lengths
    )
    named = any(
        names.match(name, names.SYNONYMS["item"])
        or (names.task_of_label(name)[1] and _holds_only_binary(table[name]))
        for name in family
    )
    if has_item and not named:
        return [], "it has a column of items that is no list", ""
    why = f"the lists of {len(family)} columns are equally long within each row"
    check = '"candidate", if these lists are histories' if not named else ""
    return family, why, check


def _suits_candidates(table: pa.Table, family: Sequence[str]) -> tuple[int, bool, int]:
    """Sorting key of columns of lists: a name like that of items, labels, their number."""
    items = max(names.match(name, names.SYNONYMS["item"]) for name in family)
    return items, any(_holds_only_binary(table[name]) for name in family), len(family)


def _holds_only_binary(chunked: pa.ChunkedArray) -> bool:
    """True if lists hold nothing but zeros and ones, or truth values."""
    kind = kind_of(chunked.type.value_type)
    if kind not in ("integer", "float"):
        return kind == "bool"
    numbers = chunked.slice(0, 2000).combine_chunks().flatten().cast(pa.float64())
    return set(pc.unique(numbers).to_pylist()) - {None} == {0.0, 1.0}


def _ids_of(table: pa.Table, family: Sequence[str]) -> str:
    """The first of the columns whose lists hold nothing twice, and no fractions; "" if none."""
    by_name = sorted(family, key=lambda name: -names.match(name, names.SYNONYMS["item"]))
    for name in by_name:
        if kind_of(table.schema.field(name).type.value_type) not in ("integer", "string"):
            continue
        array = table[name].slice(0, 2000).combine_chunks()
        element = encode(pa.chunked_array([array.flatten()]))[0]
        row = np.repeat(np.arange(len(array)), pc.fill_null(pc.list_value_length(array), 0))
        known = element >= 0
        key = row[known] * (int(element.max(initial=0)) + 1) + element[known]
        # A row of zeros and ones has long ones twice.
        if len(key) and len(np.unique(key)) >= 0.98 * len(key):
            return name
    return ""


def _exploded(
    table: pa.Table, aligned: Sequence[str], max_rows: int, unread: dict[str, str]
) -> tuple[dict[str, Column], Int32[np.ndarray, "rows"]]:
    """Columns over candidates, and the row of each, from a table of a row a request."""
    lengths = np.max(
        [pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() for name in aligned], axis=0
    )
    # Rows with too many candidates together are thinned at even distances.
    kept = np.arange(0, table.num_rows, max(1, -(-int(lengths.sum()) // max_rows)))
    table, lengths = table.take(pa.array(kept)), lengths[kept]
    row = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    columns = {
        name: column.taken(row)
        for name, column in _encoded(table.drop_columns(list(aligned)), unread).items()
    }
    flat = {}
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    for name in aligned:
        array = table[name].combine_chunks()
        own = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        place = np.repeat(np.cumsum(own) - own, lengths) + within
        flat[name] = array.flatten().take(pa.array(place, mask=np.repeat(own == 0, lengths)))
    columns |= _encoded(pa.table(flat), unread)
    return {name: columns[name] for name in table.column_names if name in columns}, row


def _encoded(table: pa.Table, unread: dict[str, str]) -> dict[str, Column]:
    """Columns of a table; lists whose elements cannot be read are added to `unread`."""
    columns = {}
    for name in table.column_names:
        of = table.schema.field(name).type
        kind = kind_of(of)
        element = kind_of(of.value_type) if kind == "list" else kind
        if element in ("", "list"):
            unread[name] = f"its type {of} is no number, string, time or list of these"
            continue
        columns[name] = Column(name, kind, *encode(table[name]))
    return columns


def sample_requests(log: LogFooters, request: str, of_request: Sequence[str]) -> dict[str, Column]:
    """Columns over requests, more of them than a sample of candidates holds.

    Args:
      log: the log.
      request: the column that tells requests apart; "" where each row is one.
      of_request: columns that hold the same for all candidates of a request.

    Returns:
      The columns, `request` included; a row is one request.
    """
    wanted = list(dict.fromkeys([request, *of_request] if request else of_request))
    schema = pa.schema([(name, log.types[name]) for name in wanted])
    row_groups = _spread_row_groups(log)
    cells_left, rows_left, tables = _MAX_REQUEST_CELLS, MAX_REQUESTS, []
    for index, (file, row_group) in enumerate(row_groups):
        left = len(row_groups) - index
        parquet, present, cells = _open_row_group(file, row_group, wanted)
        if not present or (request and request not in present):
            continue
        rows = max(1, min(file.rows[row_group], int(cells_left / cells) // left))
        read = kept = 0
        for batch in _batches(parquet, row_group, present, cells, rows):
            table = _firsts(_conformed(batch, schema), request)
            tables.append(table.slice(0, rows_left // left - kept))
            read, kept = read + len(batch), kept + len(tables[-1])
            if read >= rows or kept >= rows_left // left:
                break
        cells_left, rows_left = cells_left - int(read * cells), rows_left - kept
    return _encoded(_firsts(pa.concat_tables(tables), request), {}) if tables else {}


def _firsts(table: pa.Table, request: str) -> pa.Table:
    """The first row of each request."""
    if not request:
        return table
    code, _ = encode(table[request])
    known, first = np.unique(code, return_index=True)
    return table.take(pa.array(np.sort(first[known >= 0])))


def type_names(log: LogFooters, among: Mapping[str, Any] | None = None) -> str:
    """The columns of a log for a message: `user_id (int64), item_id (string)`."""
    shown = [name for name in log.types if among is None or name in among]
    return ", ".join(f"{name} ({log.types[name]})" for name in shown)
