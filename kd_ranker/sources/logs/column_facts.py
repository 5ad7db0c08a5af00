"""Facts of the columns of a log: a sample in DuckDB, and a table that describes each column."""

import functools
import json
import keyword
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.files import find_files, line_of
from kd_ranker.sources.logs.layout import TIME_UNITS, sql_of
from kd_ranker.sources.logs.query import quoted

NAMES: dict[str, Any] = json.loads((Path(__file__).parent / "names.json").read_text())
_MOST_ROWS, _MOST_BYTES, _MOST_FILES = 120_000, 200_000_000, 24  # of the sample
_ROW = '"row "'
_KINDS = {
    r".*\]": "list",
    r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|BOOLEAN": "integer",
    "FLOAT|DOUBLE|DECIMAL.*": "float",
    "VARCHAR|BLOB|UUID|ENUM.*": "text",
    "DATE|TIMESTAMP.*": "time",
}


class Guess(NamedTuple):
    """A column or another value, "" for none; the reason; and a doubt, "" for none."""

    column: Any
    why: str = ""
    check: str = ""


def each(facts: pd.DataFrame) -> list[Any]:
    """Return the facts of each column as an object, with its name as `Index`."""
    return [*facts.itertuples()]


@functools.cache
def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name, in lower case and the singular.

    >>> words_of("lastItemIDs"), words_of("点击 7d")
    (('last', 'item', 'id'), ('点击', '7d'))
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = filter(None, re.split(r"[\W_]+", spaced.lower()))
    return tuple(re.sub(r"(?<=[^\W_]{2})(?<![suio])s$", "", word) for word in words)


def joined(name: str) -> str:
    """Return a name without case, plural and separators."""
    return "".join(words_of(name))


def key_of(name: str, table: Mapping[str, Sequence[str]]) -> str:
    """Return the first key of a table that lists a name; "" for none."""
    return next((of for of in table if joined(name) in map(joined, table[of])), "")


def has_word(name: str, *groups: str) -> bool:
    """Return True if a name has a word of a group of `NAMES`."""
    return any(word in NAMES[group] for word in words_of(name) for group in groups)


def task_of(name: str) -> str:
    """Return the task of a label with this name, "" if it is unknown.

    >>> task_of("is_clicked"), task_of("label_long_view"), task_of("点击"), task_of("f7")
    ('click', 'long_view', 'click', '')
    """
    bare = "_".join(word for word in words_of(name) if word not in NAMES["affixes"])
    return key_of(bare, NAMES["tasks"])


def predicts(name: str, task: str, label: str) -> bool:
    """Return True if a column is called a model's output for a task: `p_click`, `pctr`."""
    words = [word for word in words_of(name) if not has_word(word, "outputs", "teacher")]
    if len(words) == len(words_of(name)):
        return NAMES["rates"].get("".join(words)) == task
    return bool(words) and (task_of("_".join(words)) == task or (*words,) == words_of(label))


def identifier(name: str) -> str:
    """Return a name as a key of a config.

    >>> identifier("item.views (7d)"), identifier("7d"), identifier("items"), identifier("点击")
    ('item_views_7d', 'c_7d', 'items_', '点击')
    """
    text = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_") or "column"
    text = text if text.isidentifier() else f"c_{text}"
    return f"{text}_" if keyword.iskeyword(text) or hasattr(ConfigDict, text) else text


def is_table(value: Any) -> bool:
    """Return True for a DataFrame of pandas or polars, and for an Arrow table."""
    return hasattr(value, "iloc") or hasattr(value, "__arrow_c_stream__")


def arrow_of(table: Any) -> pa.Table:
    """Return a table of pandas, without its index, of polars or of Arrow as an Arrow table.

    Raises:
      UserError: it is not a table, has no rows, or a column holds values of several types.
    """
    kind = type(table).__name__
    if isinstance(table, pd.Series):
        raise UserError("a Series is not a table; give a DataFrame")
    try:
        is_pandas = hasattr(table, "iloc")
        rows = pa.Table.from_pandas(table, preserve_index=False) if is_pandas else pa.table(table)
        if any(getattr(of.type, "value_type", None) == pa.string_view() for of in rows.schema):
            # Parquet takes no dictionary of these, as polars has it.
            rows = duckdb.from_arrow(rows).to_arrow_table()
    except (pa.ArrowException, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"a {kind} cannot be read as a table: {line}") from error
    if not rows.num_rows:
        raise UserError(f"a {kind} has no rows")
    return rows


def read_sample(path: str) -> tuple[pa.Table, int]:
    """Read the beginnings of files at even distances, and count the rows of all files."""
    if not path:
        raise UserError("data.path is empty; give a Parquet file, a directory or a glob of them")
    try:
        if sql := sql_of(ConfigDict({"path": path, "sql": ""})):
            found = duckdb.connect().sql(f"SELECT * FROM ({sql}) LIMIT {_MOST_ROWS}")
            table = found.to_arrow_table()
            rows = table.num_rows
        else:
            table, rows = _read_parquet(path)
    except duckdb.Error as error:
        raise UserError(f"data.path={path} cannot be read: {line_of(error)}") from error
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise UserError(f"data.path={path} cannot be read as Parquet: {error}") from error
    if not rows:
        raise UserError(f"data.path={path} has no rows")
    return table, rows


def _read_parquet(path: str) -> tuple[pa.Table, int]:
    system, files = find_files(path)
    dataset = ds.dataset([*files], filesystem=system, format="parquet", partitioning="hive")
    pieces = [of for of in dataset.get_fragments() if of.count_rows()]
    rows = sum(of.count_rows() for of in pieces)
    size = sum(group.total_byte_size for of in pieces for group in of.row_groups)
    schemas = [of.physical_schema for of in pieces]
    whole = pa.unify_schemas([*schemas, dataset.schema], promote_options="permissive")
    # Columns that only some files have are left out; folders give those that no file has.
    number = {name: sum(name in of.names for of in schemas) for name in whole.names}
    whole = pa.schema([
        of.with_type(pa.float32()) if of.type == pa.float16() else of
        for of in whole if number[of.name] in (0, len(pieces))
    ])  # fmt: skip
    read = pieces[:: len(pieces) // _MOST_FILES + 1]
    most = int(min(_MOST_ROWS, rows * _MOST_BYTES / max(size, 1)))
    heads = [of.scanner(schema=whole).head(most // len(read) + 1) for of in read]
    return pa.concat_tables(heads) if heads else whole.empty_table(), rows


class Log:
    """A sample of a log: DuckDB with a table `candidates`, and the facts of its columns.

    Attributes:
      named: the values that the user gave, by key of the config.
      layout: one row per request, or per candidate.
      request, shown, passed: SQL that distinguishes requests, and that is true of candidates that
        were shown or passed; "" if unknown.
      facts: column -> its kind, that of elements, distinct, known (a share), low and high; roles
        and tasks by its name; and 1 if it is constant in a request, item or user, 0 if not, NaN if
        the sample is too small.
    """

    def __init__(self, table: pa.Table, named: Mapping[str, Any]) -> None:
        self.named, self.con = named, duckdb.connect()
        self.con.execute("SET enable_progress_bar = false")
        self.con.register("files", table)
        types = {of: type_ for of, type_, *_ in self.con.execute("DESCRIBE files").fetchall()}
        family, self.layout = self._lists_of_candidates(types)
        rows = [f"{'unnest' * (of in family)}({quoted(of)}) {quoted(of)}" for of in types]
        types |= {of: types[of].removesuffix("[]") for of in family}
        values = [f"{_plain(quoted(of), type_)} {quoted(of)}" for of, type_ in types.items()]
        self.con.execute(
            f"CREATE TABLE candidates AS SELECT {_ROW}, {', '.join(values)} "
            f"FROM (SELECT {_ROW}, {', '.join(rows)} "
            f"FROM (SELECT row_number() OVER () {_ROW}, * FROM files))"
        )
        if not self.row("count(*)")[0]:
            raise UserError(f"no row holds a candidate: the lists of {family} are empty")
        for of in (quoted(of) for of in types if _kind(types[of]) == "float"):
            if self.row(f"bool_and({of} = floor({of}) AND abs({of}) < 2**53)")[0]:
                # Integers, next to nulls.
                self.con.execute(f"ALTER TABLE candidates ALTER {of} TYPE BIGINT")
        self.facts = self._facts()
        self.facts["bool"] = [types[of] == "BOOLEAN" for of in self.facts.index]
        self.request = self.shown = self.passed = ""
        if self.layout.column == "request":
            self.request = _ROW
            self.facts["request"] = [float(of not in family) for of in self.facts.index]

    def row(self, *values: str, source: str = "candidates") -> list[Any]:
        """Return the values of aggregates over a table."""
        return list(self.con.execute(f"SELECT {', '.join(values)} FROM {source}").fetchone() or ())

    def distinct(self, *columns: str) -> int:
        """Return the number of different values, or tuples of values, of SQL expressions."""
        (number,) = self.row(f"count(DISTINCT ({', '.join(columns)}))")
        return number

    def given(self, section: str) -> dict[str, Guess]:
        """Return the columns that the user named in a section such as `data.labels.`."""
        named = {key: of for key, of in self.named.items() if key.startswith(section) and of}
        return {key.rpartition(".")[2]: Guess(of, "named by you") for key, of in named.items()}

    def _lists_of_candidates(self, types: Mapping[str, str]) -> tuple[list[str], Guess]:
        """Find the columns of lists with one value per candidate, and the layout of rows."""
        item = self.named.get("data.columns.item")
        names = {of: "item" if of == item else key_of(of, NAMES["sure"]) for of in types}
        known = self.row(*(f"count({quoted(of)}) > 0.9 * count(*)" for of in types), source="files")
        items = [of for of, is_known in zip(types, known, strict=True) if is_known]
        items = [of for of in items if names[of] == "item"]
        lists = [of for of in types if types[of].endswith("[]")]
        if given := self.named.get("data.rows", "candidate" if {*items} - {*lists} else ""):
            items = items if given == "request" else []
        if anchor := next((of for of in items if of in lists), ""):
            equal = [f"bool_and(len({quoted(of)}) = len({quoted(anchor)}))" for of in lists]
            are_equal = zip(lists, self.row(*equal, source="files"), strict=True)
            family = [of for of, is_equal in are_equal if is_equal]
            why = f"{len(family)} columns hold lists as long as {anchor!r}"
            return family, Guess("request", why)
        ids = [f"count(DISTINCT {quoted(of)}) = count(*)" for of in types if names[of] == "request"]
        is_unique = lists and any(self.row("0", *ids, source="files"))
        unknown = "no column is called like the item, or the items, of a row"
        doubt = "" if given or not lists else unknown
        return [], Guess(given or ("request" if is_unique else "candidate"), "", doubt)

    def summary(self, where: str = "true") -> pd.DataFrame:
        """Return DuckDB's summary of each column, the share that is known, and that of ones."""
        rows = f"SELECT * EXCLUDE {_ROW} FROM candidates WHERE {where}"
        t = self.con.execute(f"SUMMARIZE {rows}").df().set_index("column_name")
        t["known"] = 1 - t.null_percentage.astype(float).fillna(100) / 100
        t["ones"] = pd.to_numeric(t.avg, errors="coerce").fillna(0)  # of a column of 0 and 1
        return t

    def _facts(self) -> pd.DataFrame:
        t = self.summary().rename(columns={"approx_unique": "distinct"})
        t["kind"] = t.column_type.map(_kind)
        t["element"] = t.column_type.str.replace(r"\[\d*\]$", "", regex=True).map(_kind)
        t["is_number"] = t.kind.isin(["integer", "float"])
        for name, column in (("low", "min"), ("middle", "q50"), ("high", "max")):
            t[name] = pd.to_numeric(t[column].where(t.is_number), errors="coerce")
        t["unit"] = ""
        for unit, by in TIME_UNITS.items():  # dates from 2000 to 2049
            t.loc[t.middle.between(946684800 * by, 2524608000 * by), "unit"] = unit
        t["sure"], t["hint"] = ([key_of(of, NAMES[x]) for of in t.index] for x in ("sure", "maybe"))
        t["is_time"] = (t.kind == "time") | ((t.unit != "") & (t.sure + t.hint == "time"))
        t["is_id"] = t.kind.isin(["integer", "text"]) & ~t.is_time & (t.distinct > 1)
        t["is_few"] = t.kind.isin(["integer", "text"]) & t.distinct.between(2, 9)
        t["binary"] = (t.kind == "integer") & (t.low >= 0) & (t.high == 1)
        t["task"] = [task_of(of) for of in t.index]
        t["shown"] = [key_of(of, {"shown": NAMES["shown"]}) for of in t.index]
        t["output"] = [has_word(of, "teacher", "predictions") for of in t.index]
        t["later"] = [
            has_word(of, "afterwards") or (has_word(of, "uses") and has_word(of, "amounts"))
            for of in t.index
        ]
        t[["request", "item", "user"]] = float("nan")
        return t

    def set_constant(self, owner: str, key: str, source: str = "candidates") -> None:
        """Set in the facts which columns are constant within an owner, by Cohen's kappa.

        The agreement of two values of an owner is compared with that of any two. Pairs are random:
        in a log in the order of the funnel, successive stages agree.
        """
        q, found = [quoted(name) for name in self.facts.index], []
        for window in (f"PARTITION BY {key} ORDER BY hash(rowid)", "ORDER BY hash(rowid)"):
            same = [f"({of} = lag({of} IGNORE NULLS) OVER w)::INT s{i}" for i, of in enumerate(q)]
            rows = f"FROM {source} WHERE {key} IS NOT NULL WINDOW w AS ({window})"
            counts = [f"[count(s{i}), coalesce(avg(s{i}), 1)]" for i in range(len(q))]
            found.append(self.row(*counts, source=f"(SELECT {', '.join(same)} {rows})"))
        for name, (pairs, share), (_, chance) in zip(self.facts.index, *found, strict=True):
            is_enough = pairs * (1 - chance) >= 5
            is_constant = float(1 - share <= 0.05 * (1 - chance))
            self.facts.loc[name, owner] = is_constant if is_enough else float("nan")

    def set_shown(self) -> None:
        """Set in the facts what is known, and 1, of shown candidates and of all others."""
        t, shown = self.facts, self.shown or "true"
        for suffix, where in (("in", shown), ("out", f"NOT ({shown})")):
            of = self.summary(where)
            t[f"known_{suffix}"], t[f"ones_{suffix}"] = of.known, of.ones
        t["only_shown"] = (t.known_out <= 0.01) & (t.known_in >= 0.5) & bool(self.shown)
        # Without a stage, a candidate with a position counts as shown.
        t["placed"] = t.only_shown | (not self.shown)

    def correlates(self, score: str, label: str) -> bool:
        """Return True if a score correlates with a label where shown, by three standard errors."""
        y, p = quoted(label), quoted(score)
        where = f"{y} IN (0, 1) AND {p} IS NOT NULL AND ({self.shown or 'true'})"
        correlation = f"covar_pop({p}, {y}) / nullif(stddev_pop({p}) * stddev_pop({y}), 0)"
        by_chance = f"{correlation} * sqrt(count(*)) < 3"
        return self.row(by_chance, source=f"candidates WHERE {where}")[0] is False

    def kind_of_feature(self, f: Any, item: str) -> tuple[str, list[str]]:
        """Return the kind of a feature, "" for none, and further arguments of `feature`."""
        hashed = ["hashed=True"] * (f.distinct > 10_000)
        if f.kind != "list":
            if f.is_time or f.kind == "other":
                return "", []
            is_amount = (f.distinct > 32 and abs(f.high) < 2**31) or has_word(f.Index, "quantities")
            is_amount &= f.kind == "integer" and not has_word(f.Index, "identifiers")
            return ("dense", []) if f.kind == "float" or is_amount else ("category", hashed)
        q = quoted(f.Index)
        lists = f"(SELECT DISTINCT {q} FROM candidates)"
        short, long = self.row(f"min(len({q}))", f"quantile_disc(len({q}), 0.95)", source=lists)
        length = [f"length={min(max(long or 1, 1), 200)}"]
        if f.element not in ("integer", "text"):
            return ("dense" if f.element == "float" and short == long else "", length)
        if item and f.request != 0:
            among = f"avg((e::VARCHAR IN (SELECT {quoted(item)}::VARCHAR FROM candidates))::INT)"
            source = f"(SELECT unnest({q}) e FROM {lists})"
            share, number = self.row(among, "count(DISTINCT e)", source=source)
            if (share or 0) > 0.5 and number > 20:
                return "history", length
        return "bag", [*hashed, *length]


def _plain(value: str, type_: str) -> str:
    """Return SQL of a value, where NaN is null and a truth value is a number."""
    if re.fullmatch(r"FLOAT|DOUBLE|DECIMAL[(\d, )]*", type_):
        return f"nullif({value}::DOUBLE, 'nan'::DOUBLE)"
    to = {"BOOLEAN": "TINYINT", "BLOB": "VARCHAR", "UUID": "VARCHAR"}.get(type_)
    return f"{value}::{to}" if to else value


def _kind(type_: str) -> str:
    return next((kind for like, kind in _KINDS.items() if re.fullmatch(like, type_)), "other")
