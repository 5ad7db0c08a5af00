"""A sample of a log, and the facts of its columns that the rules for a first config look at."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.files import find_files, register_store, register_stores
from kd_ranker.sources.logs.infer.guess import Guess
from kd_ranker.sources.logs.infer.nested import (
    find_joined,
    find_lists_of_objects,
    spread_object,
    unnest_objects,
)
from kd_ranker.sources.logs.infer.several_tables import join_tables
from kd_ranker.sources.logs.infer.words import NAMES, find_key, without, words
from kd_ranker.sources.logs.layout import (
    NO_PLACE,
    TIME_UNITS,
    is_text_log,
    patterns_of_parquet,
    split_at_commas,
    sql_of_texts,
)
from kd_ranker.sources.logs.sql import from_select, literal, quoted, select_with
from kd_ranker.sources.logs.times import FORMATS, find_formats, sql_of_time

# The limits of the sample.
_MOST_ROWS = 120_000
_MOST_REQUESTS = 1_000  # if these are the rows
_MOST_BYTES = 200_000_000
_MOST_FILES = 24
_KINDS = {
    r".*\]": "list",
    r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|BOOLEAN": "integer",
    "FLOAT|DOUBLE|DECIMAL.*": "float",
    "VARCHAR|BLOB|UUID|ENUM.*": "text",
    "DATE|TIMESTAMP.*": "time",
}
# Texts that programs write for a missing value.
_MISSING = ("\\N", "NULL", "null", "None", "NaN", "nan")
# Whole numbers between these two may be dates, as 20240131.
_EARLIEST_DATE, _LATEST_DATE = 19_900_101, 21_001_231
# In seconds since 1970: numbers between these two are probably times.
_YEAR_1995, _YEAR_2050 = 788_918_400, 2_524_608_000
# A column is constant within owners if at least so many rows could have shown the contrary.
_LEAST_PROOF = 20


class RowGuess(NamedTuple):
    """What a row of the log is."""

    guess: Guess  # of `data.rows`
    lists: list[str]  # the columns of lists with one value per candidate


class Sample:
    """A table `candidates` in DuckDB, and the facts of its columns.

    Attributes:
      con: the connection to DuckDB.
      unnested: the column of lists whose objects are the candidates; "" for none.
      markers: column -> the number that means none, which is missing here and in `sql`.
      named: what the user named, by key of the config.
      sections: those that the user named as a whole, such as `data.labels`.
      facts: a row per column of the log. Its facts `request`, `item` and `user` are 1 if the column
        is constant in each request, item or user, 0 if not, NaN if unknown.
      numbers: a number for each value, NaN for none; 0 and 1 for texts such as no and yes.
      time_formats: column of texts -> the formats by which all of them are times, if not ISO 8601.
      codes: a number for each value, NaN for none; equal values of a column have equal codes.
      request: the request of each row.
      layout: the guess of `data.rows`, and the lists of candidates.
      shown: whether each row was shown.
      passed: whether each row was passed.
    """

    def __init__(self, path: str, named: Mapping[str, Any], sections: Collection[str]) -> None:
        """Read the beginnings of the files at a path; the user may have named some columns."""
        self.named = named
        self.sections = sections
        self.con = duckdb.connect()
        self.con.execute("SET enable_progress_bar = false")
        self.markers: dict[str, int] = {}
        self.unnested = ""
        self._path = path
        # A SELECT in place of the path: the user's, or one with options for CSV files.
        self._sql = named.get("data.sql", "").strip()
        self._tables = None if self._sql else join_tables(self.con, path)
        if self._tables:
            self._sql = self._tables.sql
        # What unfolds objects: SELECTs without their FROM, each of the rows of the one before.
        self._heads: list[str] = []
        # Column of texts that join values -> the SQL of its lists.
        self._joined: dict[str, str] = {}
        self._read(self._select(path))
        if not self._sql and "read_csv(" in self._log and (options := self._options_of_csv()):
            self._sql = sql_of_texts(path, options=options)
            self._read(self._select(path))
        is_text = self.facts["column_type"] == "VARCHAR"
        texts = self.facts.index[is_text & (self.facts["kind"] != "time") & ~self.facts["is_truth"]]
        self._joined = find_joined(self.con, texts)
        if self._joined:
            self._read(select_with(self._joined, "SELECT * FROM candidates"))
        self.request = pd.Series(range(len(self.codes)))
        self.layout = self._find_rows()
        listed = self.layout.lists
        if listed:
            lists = ", ".join(f"unnest({name}) AS {name}" for name in map(quoted, listed))
            self.request = self.frame(f"rowid, {lists}").iloc[:, 0]
            self._read(f"SELECT * REPLACE ({lists}) FROM candidates")
        if self.request.empty:
            lists = f", or its lists {', '.join(listed)} are empty" if listed else ""
            log = f"data.path={path}" if path else "data.sql"
            raise UserError(f"{log} has no rows{lists}; name a log with candidates")
        facts = self.facts
        facts["groups"] = facts["distinct"] < facts["rows"] / 1.5
        if self.layout.guess.value == "request":
            facts["request"] = np.where(facts.index.isin(listed), 0.0, 1.0)
            facts["groups"] = facts["distinct"] == self.request.nunique()
        self.passed = pd.Series(False, self.request.index)
        self.set_shown(self.passed)

    def _select(self, path: str) -> str:
        """Return the SELECT of some rows: the first, or of Parquet files at even distances."""
        if not path and not self._sql:
            raise UserError("data.path is empty; give a file, a directory or a glob of them")
        if self._sql or is_text_log(path):
            self._log = self._sql.rstrip(";") or sql_of_texts(path)
            register_stores(self.con, self._log)
            # CSV files have no objects, and to ask for their types is to read them all.
            if "read_csv(" not in self._log and self._list_of_candidates(self.con.sql(self._log)):
                # Requests from all of the log, in the same order each time.
                return f"SELECT * FROM ({self._log}) t ORDER BY hash(t) LIMIT {_MOST_REQUESTS}"
            if self._tables and not is_text_log(self._tables.candidates):
                rows = self._select_of_parquet(self._tables.candidates)
                return self._log.replace(self._tables.source, f"({rows})", 1)
            return f"SELECT * FROM ({self._log}) LIMIT {_MOST_ROWS}"
        return self._select_of_parquet(path)

    def _select_of_parquet(self, path: str) -> str:
        """Return the SELECT of some rows of Parquet files, at even distances."""
        system, manifest = find_files(path)
        paths = list(manifest)
        if not isinstance(system, LocalFileSystem):
            register_store(self.con, system)
            paths = [system.unstrip_protocol(file) for file in paths]
        # A name is a pattern to DuckDB.
        files = [literal(re.sub(r"[*?\[]", r"[\g<0>]", file)) for file in paths]
        if not self._tables:
            self._log = _sql_of_parquet(files)
        files = files[:: len(files) // _MOST_FILES + 1]
        size = "sum(total_uncompressed_size) / sum(row_group_num_rows)"
        row = f"count(DISTINCT path_in_schema) * {size}"
        bytes_a_row: Any = self.frame(row, f"parquet_metadata({files[0]})").iat[0, 0]
        rows = min(_MOST_ROWS, _MOST_BYTES / (bytes_a_row or 1))
        rows_a_file = int(rows / len(files)) + 1
        return " UNION ALL BY NAME ".join(
            f"(FROM read_parquet({file}, hive_partitioning = true) LIMIT {rows_a_file})"
            for file in files
        )

    def _options_of_csv(self) -> dict[str, str]:
        """Return options by which columns of texts are numbers, or have missing values."""
        texts = self.facts.index[self.facts["column_type"] == "VARCHAR"]
        options = {}
        markers: set[str] = set()
        for text in map(quoted, texts):
            has_value = f"{text} NOT IN ('', {', '.join(map(literal, _MISSING))})"
            is_number = f"regexp_full_match({text}, '-?[0-9]+(,[0-9]+)?')"
            values = f"bool_and({is_number}) AND bool_or(contains({text}, ','))"
            if self.frame(f"coalesce({values}, false)", f"candidates WHERE {has_value}").iat[0, 0]:
                options["decimal_separator"] = literal(",")
            found = self.frame(f"DISTINCT {text} AS text", f"candidates WHERE NOT {has_value}")
            markers |= {*found["text"]}
        if markers - {""}:
            options["nullstr"] = f"[{', '.join(map(literal, sorted(markers | {''})))}]"
        return options

    @property
    def doubt_of_tables(self) -> str:
        """Whether the tables of a folder are joined right; "" for one table."""
        return self._tables.doubt if self._tables else ""

    @property
    def log(self) -> str:
        """A SELECT of the whole log."""
        return self._rewrite(self._log)

    @property
    def sql(self) -> str:
        """The SELECT for `data.sql`, in place of the path; "" for none."""
        if not (self._heads or self._joined or self.markers):
            return self._sql
        if self._sql or is_text_log(self._path):
            return self._rewrite(self._log)
        pattern = patterns_of_parquet(self._path)
        # A pattern matches the files of an unfinished job, too.
        has_same_files = find_files(pattern).manifest == find_files(self._path).manifest
        files = split_at_commas(pattern)
        return self._rewrite(_sql_of_parquet(map(literal, files)) if has_same_files else self._log)

    def _rewrite(self, select: str) -> str:
        """Return a SELECT with columns for objects, lists for texts, and no number for none."""
        for head in self._heads:
            select = f"{head}\n{from_select(select)}"
        values = dict(self._joined)
        for column, number in self.markers.items():
            in_list = column in self.layout.lists
            value = f"nullif({'value' if in_list else quoted(column)}, {number})"
            each = f"list_transform({quoted(column)}, lambda value: {value})"
            values[column] = each if in_list else value
        return select_with(values, select) if values else select

    def set_missing(self, markers: Mapping[str, int]) -> None:
        """Take a number of each of some columns for a missing value."""
        if not markers:
            return
        self.markers = dict(markers)
        values = {column: f"nullif({quoted(column)}, {markers[column]})" for column in markers}
        select = select_with(values, "SELECT * FROM candidates")
        self.con.execute(f"CREATE OR REPLACE TABLE candidates AS {select}")
        for column, number in markers.items():
            is_none = self.numbers[column] == number
            self.numbers[column] = self.numbers[column].mask(is_none)
            self.codes[column] = self.codes[column].mask(is_none)
        self._count_values()

    def frame(self, values: str, source: str = "candidates") -> pd.DataFrame:
        """Return the rows of a SELECT."""
        return self.con.execute(f"SELECT {values} FROM {source}").df()

    def _find_rows(self) -> RowGuess:
        """Find what a row is, and the lists with one value per candidate."""
        facts = self.facts
        named = self.named.get("data.rows", "")
        is_list = (facts["kind"] == "list") & ~facts.index.isin([*self._joined])
        is_named_item = facts.index == self.named.get("data.columns.item")
        is_item = (facts["sure"] == "item") | is_named_item
        has_item = (is_item & ~is_list & (facts["known"] > 0.9)).any()
        lists = facts.index[is_list]
        lists_of_items = facts.index[is_list & is_item]
        if named == "candidate" or lists.empty or self.unnested or (has_item and not named):
            return RowGuess(Guess(named or "candidate"), [])
        sizes = ", ".join(f"len({quoted(name)}) AS {quoted(name)}" for name in lists)
        lengths = self.frame(sizes)
        if not lists_of_items.empty:
            item = lists_of_items[0]
            candidates = _as_long_as(item, lengths)
            why = f"{len(candidates)} columns hold lists as long as {item!r}"
            return RowGuess(Guess("request", why), candidates)
        candidates = self._find_lists_of_candidates(lengths)
        if candidates:
            doubt = f"by lists of one length, as {candidates[0]!r}; is a row a request?"
            return RowGuess(Guess("request", "", "" if named else doubt), candidates)
        is_id_of_row = (facts["sure"] == "request") & (facts["distinct"] == facts["rows"])
        doubt = "" if named else "no column of lists is called like the item"
        guess = "request" if is_id_of_row.any() else "candidate"
        return RowGuess(Guess(named or guess, "", doubt), [])

    def _find_lists_of_candidates(self, lengths: pd.DataFrame) -> list[str]:
        """Return the lists of one length, one of them without repetition, in rows with a time."""
        facts = self.facts
        is_time = (facts["kind"] == "time") | (facts["unit"] != "")
        if not is_time.any():
            return []
        groups = [_as_long_as(str(name), lengths) for name in lengths if lengths[name].mean() > 1.5]
        candidates = max(groups, key=len, default=[])
        if len(candidates) > 1 and any(map(self._never_repeats_in_rows, candidates)):
            return candidates
        return []

    def _never_repeats_in_rows(self, column: str) -> bool:
        elements = kind_of(re.sub(r"\[\d*\]$", "", self.facts["column_type"][column]))
        if elements not in ("integer", "text"):
            return False
        differ = f"bool_and(len(list_distinct({quoted(column)})) = len({quoted(column)}))"
        return bool(self.frame(differ).iat[0, 0])

    def _read(self, select: str) -> None:
        """Make the table, and the facts of its columns that need no role."""
        self.con.execute(f"CREATE OR REPLACE TABLE candidates AS {select}")
        while head := self._head_of_objects():
            self._heads.append(head)
            rows = f"{head} FROM candidates LIMIT {_MOST_ROWS}"
            self.con.execute(f"CREATE OR REPLACE TABLE candidates AS {rows}")
        table = self.con.table("candidates")
        facts = pd.DataFrame({"column_type": map(str, table.types)}, table.columns)
        self.facts = facts
        facts["kind"] = facts["column_type"].map(kind_of)
        facts["is_number"] = facts["kind"].isin(["integer", "float"])
        self._read_texts()
        self._read_values()
        self._read_names()
        self._count_values()
        facts[["request", "item", "user"]] = float("nan")

    def _head_of_objects(self) -> str:
        """Return the next SELECT, without its FROM, that unfolds objects; "" if none are left."""
        rows = self.con.table("candidates")
        if head := spread_object(rows):
            return head
        column = self._list_of_candidates(rows)
        if not column:
            return ""
        self.unnested = column
        return unnest_objects(rows, column, find_lists_of_objects(rows)[column])

    def _list_of_candidates(self, rows: duckdb.DuckDBPyRelation) -> str:
        """Return the column of lists whose objects are the candidates; "" if it has none.

        In a log with a row per candidate, lists of objects are the events of a history.
        """
        keys = [find_key(name, NAMES["sure"]) for name in rows.columns]
        has_candidates = {*keys} & {"item", "stage", "position"}
        has_labels = any(find_key(name, NAMES["tasks"]) for name in rows.columns)
        if has_candidates or has_labels or self.unnested or "data.rows" in self.named:
            return ""
        lists = find_lists_of_objects(rows)
        return max(lists, key=lambda column: len(lists[column]), default="")

    def _read_texts(self) -> None:
        """Find the texts that are truth values, times or several words."""
        facts = self.facts
        self.time_formats: dict[str, list[str]] = {}
        facts["is_truth"] = False
        facts["is_prose"] = False
        for column in facts.index[facts["column_type"] == "VARCHAR"]:
            text = f"nullif(trim({quoted(column)}), '')"
            values = (
                f"count({text}), count(try_cast({text} AS BOOLEAN)), "
                f"count(try_cast({text} AS TIMESTAMPTZ)), avg(({text} LIKE '% %')::INT)"
            )
            known, truths, times, spaced = self.frame(values).iloc[0]
            facts.loc[column, "is_truth"] = 0 < known == truths
            facts.loc[column, "is_prose"] = spaced > 0.5
            if 0 < known == times:
                facts.loc[column, "kind"] = "time"
                continue
            texts = self.frame(f"DISTINCT {text} AS text", f"candidates WHERE {text} IS NOT NULL")
            if formats := find_formats(texts["text"].tolist(), self._formats_to_try()):
                self.time_formats[column] = formats
                facts.loc[column, "kind"] = "time"

    def _formats_to_try(self) -> Sequence[str]:
        named = self.named.get("data.time_format")
        return (named,) if named else FORMATS

    def _read_values(self) -> None:
        """Read the numbers and the codes of all values."""
        facts = self.facts
        numbers = self.frame(", ".join(map(self._sql_of_number, facts.index)))
        codes = self.frame(", ".join(map(self._sql_of_code, facts.index)))
        numbers.columns = facts.index
        codes.columns = facts.index
        floats = facts.index[facts["kind"] == "float"]
        codes[floats] = numbers[floats]  # NaN is missing, too
        # Integers next to missing ones may be floats.
        is_whole = numbers.isna() | ((numbers % 1 == 0) & (numbers.abs() < 2**53))
        facts.loc[facts["is_number"] & is_whole.all(), "kind"] = "integer"
        self.numbers = numbers
        self.codes = codes

    def _sql_of_number(self, column: str) -> str:
        facts = self.facts.loc[column]
        if facts["is_truth"]:
            return f"try_cast(trim({quoted(column)}) AS BOOLEAN)::DOUBLE"
        return f"{quoted(column)}::DOUBLE" if facts["is_number"] else "NULL::DOUBLE"

    def _sql_of_code(self, column: str) -> str:
        value = quoted(column)
        if self.facts["column_type"][column] == "VARCHAR":
            value = f"nullif({value}, '')"  # which is missing to a dataset, too
        return f"CASE WHEN {value} IS NOT NULL THEN (hash({value}) >> 12)::DOUBLE END"

    def _count_values(self) -> None:
        facts = self.facts
        facts["rows"] = len(self.codes)
        facts["distinct"] = self.codes.nunique()
        facts["known"] = self.codes.notna().mean()
        facts["low"] = self.numbers.min()
        facts["high"] = self.numbers.max()
        # Of a position: the smallest number besides the one that means none.
        facts["first_place"] = self.numbers[self.numbers != NO_PLACE].min()
        facts["unit"] = ""
        # Ids that count up may be as large as times.
        is_id = pd.Series([words(column)[-1:] == ("id",) for column in facts.index], facts.index)
        middle = self.numbers.median()
        for unit, per_second in TIME_UNITS.items():
            is_recent = middle.between(_YEAR_1995 * per_second, _YEAR_2050 * per_second)
            facts.loc[is_recent & ~is_id, "unit"] = unit
        is_named_time = (facts["sure"] + facts["hint"]) == "time"
        facts["is_time"] = (facts["kind"] == "time") | ((facts["unit"] != "") & is_named_time)
        facts["is_date"] = False
        is_possible = (facts["kind"] == "integer") & (facts["low"] >= _EARLIEST_DATE)
        for column in facts.index[is_possible & (facts["high"] <= _LATEST_DATE)]:
            numbers = self.numbers[column].dropna().astype(int).unique()
            facts.loc[column, "is_date"] = bool(find_formats([*map(str, numbers)], ("%Y%m%d",)))
        is_discrete = facts["kind"].isin(["integer", "text"])
        is_moment = facts["is_time"] | facts["is_date"]
        facts["is_id"] = is_discrete & ~is_moment & (facts["distinct"] > 1)
        facts["is_few"] = facts["is_id"] & (facts["distinct"] <= 9)
        is_truth = (facts["kind"] == "integer") | facts["is_truth"]
        facts["binary"] = is_truth & (facts["low"] >= 0) & (facts["high"] == 1)

    def _read_names(self) -> None:
        """Find the roles, tasks and groups of words that the names of columns point at."""
        facts = self.facts
        facts["sure"] = [find_key(name, NAMES["sure"]) for name in facts.index]
        facts["hint"] = [find_key(name, NAMES["maybe"]) for name in facts.index]
        actions = ["_".join(without(name, "affixes", "outputs", "teacher")) for name in facts.index]
        facts["task"] = [find_key(action, NAMES["tasks"]) for action in actions]
        groups = [key for key, listed in NAMES.items() if isinstance(listed, list)]
        for group in groups:
            facts[group] = [without(name, group) != words(name) for name in facts.index]

    def constant_within(self, owner: str, columns: Iterable[str] | None = None) -> pd.Series:
        """Return whether each column has one value for each value of an owner: 1, 0, or NaN.

        Owners of one row say nothing, and too few rows of others leave it unknown.
        """
        codes = self.codes if columns is None else self.codes[list(columns)]
        is_repeated = self.codes[owner].duplicated(keep=False)
        groups = codes[is_repeated].groupby(self.codes[owner])
        counts = groups.count()
        if counts.empty:
            return pd.Series(np.nan, codes.columns)
        # A value that only some rows of an owner have is not constant.
        has_gaps = (counts > 0) & counts.lt(groups.size(), axis=0)
        differs = (groups.min() != groups.max()) & (counts > 0)
        is_constant = ~(has_gaps | differs).any()
        proof = (counts - 1).clip(lower=0).sum()
        return is_constant.astype(float).where(~is_constant | (proof >= _LEAST_PROOF))

    def set_owner(self, role: str, column: str) -> None:
        """Complete the facts by the column of requests, items or users; "" for none."""
        facts = self.facts
        if role not in facts:
            return
        if column and facts[role].isna().all():
            facts[role] = self.constant_within(column)
            if role == "request":
                self.request = self.codes[column]
        if role == "request":
            ids = facts.index[facts["is_id"]]
            facts["in_requests"] = self.codes[ids].groupby(self.request).nunique().sum()

    def set_shown(self, shown: pd.Series) -> None:
        """Complete the facts by who was shown; False for all if it is not known.

        The facts `known_in` and `ones_in` are the shares of values known, and of 1, of shown
        candidates; `known_out` and `ones_out` are those of others.
        """
        self.shown = shown
        facts = self.facts
        knows_shown = bool(shown.any())
        inside = shown if knows_shown else ~shown
        for suffix, rows in (("in", inside), ("out", ~inside)):
            facts[f"known_{suffix}"] = self.codes[rows].notna().mean().fillna(0)
            facts[f"ones_{suffix}"] = self.numbers[rows].mean().fillna(0)
        facts["only_shown"] = _are_of_shown(facts["known_in"], facts["known_out"]) & knows_shown
        # Without a stage, a candidate with a position counts as shown.
        places = self.numbers[self.numbers != NO_PLACE].notna()
        has_place = _are_of_shown(places[inside].mean(), places[~inside].mean())
        facts["placed"] = has_place | (not knows_shown)

    def seconds(self, column: str) -> pd.Series:
        """Return the times of a column, in its unit since 1970; NaN for none."""
        if self.facts["kind"][column] != "time":
            return self.numbers[column]
        time = f"{quoted(column)}::TIMESTAMP"
        if column in self.time_formats:
            time = sql_of_time(quoted(column), self.time_formats[column][0])
        return self.frame(f"epoch({time})").iloc[:, 0]

    def texts(self, column: str) -> pd.Series:
        """Return the values of a column as the texts that a config names."""
        texts = self.frame(f"{quoted(column)}::VARCHAR").iloc[:, 0]
        texts = texts.where(self.codes[column].notna())
        return texts.str.title() if self.facts["column_type"][column] == "BOOLEAN" else texts


def _sql_of_parquet(files: Iterable[str]) -> str:
    """Return the SELECT of Parquet files, whose names are literals."""
    options = "hive_partitioning = true, union_by_name = true"
    return f"SELECT * FROM read_parquet([{', '.join(files)}], {options})"


def _are_of_shown(known_in: pd.Series, known_out: pd.Series) -> pd.Series:
    """Return whether the values of each column are those of shown candidates, by their shares."""
    return (known_out <= 0.01) & (known_in >= 0.5)


def kind_of(type_: str) -> str:
    """Return the kind of a type of DuckDB."""
    for pattern, kind in _KINDS.items():
        if re.fullmatch(pattern, type_):
            return kind
    return "other"


def _as_long_as(name: str, lengths: pd.DataFrame) -> list[str]:
    """Return the columns whose lists are as long as those of one in each row; a list may miss."""
    has_equal_length = (lengths.sub(lengths[name], axis=0).fillna(0) == 0).all()
    return [*lengths.columns[has_equal_length]]
