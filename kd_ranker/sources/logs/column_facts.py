"""Facts of the columns of a log: a sample in DuckDB, and a table with one row per column."""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.files import find_files, register_store
from kd_ranker.sources.logs.layout import STAGES, TIME_UNITS, literal, sql_of
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
# Type -> the type that facts are read from.
_READ_AS = {"BOOLEAN": "TINYINT", "BLOB": "VARCHAR", "UUID": "VARCHAR"}


@functools.cache
def words_of(name: str) -> tuple[str, ...]:
    """Return the words of a name, in lower case and the singular.

    >>> words_of("lastItemIDs"), words_of("点击 7d")
    (('last', 'item', 'id'), ('点击', '7d'))
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = filter(None, re.split(r"[\W_]+", spaced.lower()))
    return tuple(re.sub(r"(?<=[^\W_]{2})(?<![suio])s$", "", word) for word in words)


def key_of(name: str, table: Mapping[str, Sequence[str]]) -> str:
    """Return the first key of a table that lists a name; "" for none."""
    bare = "".join(words_of(name))
    return next((key for key, of in table.items() if bare in map("".join, map(words_of, of))), "")


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


class Sample:
    """A sample of a log: DuckDB with a table `candidates`, and the facts of its columns.

    Attributes:
      named: the values that the user gave, by key of the config.
      layout: `data.rows`, the reason and a doubt.
      request: SQL of a request's key; "" if unknown.
      stages: stage -> its text in the stage column.
      shown, passed: SQL conditions for candidates that were shown or passed; "false" if unknown.
      facts: column -> its kind, distinct, known (a share), low and high; the role and the task of
        its name; and 1 if it is constant in each request, item or user, 0 if not, NaN if unknown.
    """

    def __init__(self, log: Any, named: Mapping[str, Any]) -> None:
        """Read the beginnings of the files at a path, or a table of Arrow."""
        self.named, self.con = named, duckdb.connect()
        self.con.execute("SET enable_progress_bar = false")
        if isinstance(log, str):
            self.con.execute(f"CREATE TABLE files AS {self._select(log)}")
        else:
            self.con.register("files", log)
        types = {of: type_ for of, type_, *_ in self.con.execute("DESCRIBE files").fetchall()}
        self.listed: list[str] = []
        self.layout = self._find_layout(types)
        rows = [f"{'unnest' * (of in self.listed)}({quoted(of)}) {quoted(of)}" for of in types]
        types |= {of: types[of].removesuffix("[]") for of in self.listed}
        floats = [of for of, type_ in types.items() if _kind(type_) == "float"]
        plain = {of: f"nullif({quoted(of)}::DOUBLE, 'nan'::DOUBLE)" for of in floats}
        plain |= {
            of: f"{quoted(of)}::{_READ_AS[types[of]]}" for of in types if types[of] in _READ_AS
        }
        replaced = ", ".join(f"{value} AS {quoted(of)}" for of, value in plain.items())
        self.con.execute(
            f"CREATE TABLE candidates AS SELECT * {f'REPLACE ({replaced})' * bool(plain)} "
            f"FROM (SELECT {_ROW}, {', '.join(rows)} "
            f"FROM (SELECT row_number() OVER () {_ROW}, * FROM files))"
        )
        whole = [
            f"bool_and({of} = floor({of}) AND abs({of}) < 2**53)" for of in map(quoted, floats)
        ]
        for of in itertools.compress(floats, self.row("0", *whole)[1:]):  # integers next to nulls
            self.con.execute(f"ALTER TABLE candidates ALTER {quoted(of)} TYPE BIGINT")
        if not self.row("count(*)")[0]:
            raise UserError(f"the log has no rows, or its lists {self.listed} are empty")
        self.stages: dict[str, str] = {}
        self.request, self.shown, self.passed = "", "false", "false"
        self.facts = self._facts(types)
        self.facts["groups"] = self.facts.distinct < self.facts.rows / 1.5
        if self.layout[0] == "request":
            self.request = _ROW
            self.facts["request"] = [float(of not in self.listed) for of in self.facts.index]
            self.facts["groups"] = self.facts.index.isin(self.unique)

    def _select(self, path: str) -> str:
        """Return the SELECT of some rows of text files, or of Parquet files at even distances."""
        if not path:
            raise UserError("data.path is empty; give a file, a directory or a glob of them")
        if sql := sql_of(ConfigDict({"path": path, "sql": ""})):
            return f"SELECT * FROM ({sql}) LIMIT {_MOST_ROWS}"
        system, manifest = find_files(path)
        read = [*manifest][:: len(manifest) // _MOST_FILES + 1]
        if not isinstance(system, LocalFileSystem):
            register_store(self.con, system)
            read = [system.unstrip_protocol(of) for of in read]
        # A name is a pattern to DuckDB.
        files = [literal(re.sub(r"[*?\[]", r"[\g<0>]", of)) for of in read]
        of_values = "sum(total_uncompressed_size) / sum(row_group_num_rows)"
        columns = "count(DISTINCT path_in_schema)"
        (size,) = self.row(f"{columns} * {of_values}", source=f"parquet_metadata({files[0]})")
        most = int(min(_MOST_ROWS, _MOST_BYTES / (size or 1)) / len(files)) + 1
        tables = (f"read_parquet({of}, hive_partitioning = true)" for of in files)
        return " UNION ALL BY NAME ".join(f"(FROM {of} LIMIT {most})" for of in tables)

    def row(self, *values: str, source: str = "candidates") -> list[Any]:
        """Return the values of aggregates over a table."""
        return list(self.con.execute(f"SELECT {', '.join(values)} FROM {source}").fetchone() or ())

    def per_column(self, aggregate: str, source: str = "candidates") -> list[Any]:
        """Return an SQL aggregate of each column, which it calls `{c}`."""
        columns = map(quoted, self.facts.index)
        return self.row(*[aggregate.replace("{c}", of) for of in columns], source=source)

    def _find_layout(self, types: Mapping[str, str]) -> tuple[str, str, str]:
        """Find `data.rows`, and the columns of lists with one value per candidate."""
        item, given = (self.named.get(of, "") for of in ("data.columns.item", "data.rows"))
        names = {of: "item" if of == item else key_of(of, NAMES["sure"]) for of in types}
        lists = [of for of, type_ in types.items() if type_.endswith("[]")]
        items = [of for of in types if names[of] == "item"]
        requests = [of for of in types if names[of] == "request"]
        unique = [f"count(DISTINCT {quoted(of)}) = count(*)" for of in requests]
        known = [f"count({quoted(of)}) > 0.9 * count(*)" for of in items if of not in lists]
        is_unique, is_known = (self.row("0", *of, source="files")[1:] for of in (unique, known))
        self.unique = [*itertools.compress(requests, is_unique)]
        if given == "candidate" or not lists or (any(is_known) and not given):
            return given or "candidate", "", ""
        if anchor := next((of for of in items if of in lists), ""):
            equal = [f"bool_and(len({quoted(of)}) = len({quoted(anchor)}))" for of in lists]
            self.listed = [*itertools.compress(lists, self.row(*equal, source="files"))]
            return "request", f"{len(self.listed)} columns hold lists as long as {anchor!r}", ""
        doubt = "" if given else "no column of lists is called like the item"
        return given or ("request" if self.unique else "candidate"), "", doubt

    def _facts(self, types: Mapping[str, str]) -> pd.DataFrame:
        rows = f"SELECT * EXCLUDE {_ROW} FROM candidates"
        t = self.con.execute(f"SUMMARIZE {rows}").df().set_index("column_name")
        t["rows"], t["distinct"] = self.row("count(*)")[0], t.approx_unique
        t["known"] = 1 - t.null_percentage.astype(float) / 100
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
        t["is_shown"] = [key_of(of, {"shown": NAMES["shown"]}) != "" for of in t.index]
        t["is_bool"] = [types[of] == "BOOLEAN" for of in t.index]
        t["has_stages"] = [bool(self.stage_texts(f)) for f in t.itertuples()]
        t[["request", "item", "user"]] = float("nan")
        return t

    def set_constant(self, owner: str, key: str) -> None:
        """Set in the facts which columns have one value in each owner of two rows or more."""
        columns = map(quoted, self.facts.index)
        same = ", ".join(f"min(hash({of})) = max(hash({of})) AS {of}" for of in columns)
        owners = f"FROM candidates WHERE {key} IS NOT NULL GROUP BY {key} HAVING count(*) > 1"
        constant = self.per_column("bool_and({c})", f"(SELECT {same} {owners})")
        self.facts[owner] = pd.Series(constant, self.facts.index, float)

    def set_request(self, column: str) -> None:
        """Set in the facts what is constant in a request, and how often items are in one."""
        if column and not self.request:
            self.request = quoted(column)
            self.set_constant("request", self.request)
        key, t = self.request or "rowid", self.facts
        pairs = {of: f"count(DISTINCT ({key}, {quoted(of)}))" for of in t.index[t.sure == "item"]}
        t["in_requests"] = 0
        t.loc[[*pairs], "in_requests"] = self.row("0", *pairs.values())[1:]

    def stage_texts(self, f: Any) -> dict[str, str]:
        """Return the text of each stage in a column, {} if not all of its values name one."""
        if f.binary and f.is_shown:
            return {"retrieved": "0", "shown": "1"}
        if not f.is_few:
            return {}
        (values,) = self.row(f"list(DISTINCT {quoted(f.Index)}::VARCHAR)")
        values = [*filter(None, values)]
        texts = {key_of(value, NAMES["stages"]): value for value in values}
        has_all = {"shown"} < {*texts} and "" not in texts and len(texts) == len(values)
        return texts if has_all else {}

    def set_shown(self, column: str) -> None:
        """Set the stages, and in the facts the shares known and 1 of shown and other candidates."""
        t = self.facts
        if column:
            (f,) = t.loc[[column]].itertuples()
            texts = {stage: self.named.get(f"data.stages.{stage}", "") for stage in STAGES}
            self.stages = self.stage_texts(f) | {stage: of for stage, of in texts.items() if of}
        if "shown" in self.stages:
            self.shown = f"{quoted(column)}::VARCHAR = {literal(self.stages['shown'])}"
            if len(self.stages) == 3:
                self.passed = f"{quoted(column)}::VARCHAR <> {literal(self.stages['retrieved'])}"
            if t.is_bool[column]:
                self.stages = {"retrieved": "False", "shown": "True"}
        elif partly := [quoted(of) for of in t.index[t.binary & (t.task != "") & (t.known < 0.99)]]:
            self.shown = f"coalesce({', '.join(partly)}) IS NOT NULL"
        shown = self.shown if self.shown != "false" else "true"
        for suffix, where in (("in", shown), ("out", f"NOT ({shown})")):
            known = f"coalesce(avg(({{c}} IS NOT NULL)::INT) FILTER ({where}), 0)"
            t[f"known_{suffix}"] = self.per_column(known)
            ones = [f"coalesce(avg({quoted(of)}) FILTER ({where}), 0)" for of in t.index[t.binary]]
            t[f"ones_{suffix}"] = 0.0
            t.loc[t.binary, f"ones_{suffix}"] = self.row("0", *ones)[1:]
        t["only_shown"] = (t.known_out <= 0.01) & (t.known_in >= 0.5) & (self.shown != "false")
        # Without a stage, a candidate with a position counts as shown.
        t["placed"] = t.only_shown | (self.shown == "false")

    def correlates(self, score: str, label: str) -> bool:
        """Return True if a score correlates with a label where shown, by three standard errors."""
        y, p = quoted(label), quoted(score)
        over_error = f"nullif(corr({p}, {y}), 'nan'::DOUBLE) * sqrt(count(*)) >= 3"
        where = f"{y} IN (0, 1) AND {p} IS NOT NULL"
        return self.row(over_error, source=f"candidates WHERE {where}")[0] is True


def _kind(type_: str) -> str:
    return next((kind for like, kind in _KINDS.items() if re.fullmatch(like, type_)), "other")
