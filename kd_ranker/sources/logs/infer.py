"""Write a first config for a log, from the names of its columns and a few facts about their values.

A role needs a name of `names.json` and values that fit. Otherwise it stays open: the config names
the two likeliest columns, and `prepare_data` reports it as missing.
"""

import functools
import json
import keyword
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd
from fsspec.implementations.local import LocalFileSystem
from ml_collections import ConfigDict

from kd_ranker.errors import UserError, check_choice, command
from kd_ranker.sources.logs.files import find_files, line_of, register_store, register_stores
from kd_ranker.sources.logs.layout import STAGES, TIME_UNITS, is_text_log, literal, sql_of_texts
from kd_ranker.sources.logs.query import quoted
from kd_ranker.sources.logs.written_after import guess_shown, why_written_after

CHECK = "CHECK: "
OPEN = "?"  # an optional role that the user has to settle
_NAMES: dict[str, Any] = json.loads((Path(__file__).parent / "names.json").read_text())
# The limits of the sample.
_MOST_ROWS = 120_000
_MOST_BYTES = 200_000_000
_MOST_FILES = 24
_KINDS = {
    r".*\]": "list",
    r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|BOOLEAN": "integer",
    "FLOAT|DOUBLE|DECIMAL.*": "float",
    "VARCHAR|BLOB|UUID|ENUM.*": "text",
    "DATE|TIMESTAMP.*": "time",
}
# In seconds since 1970: numbers between these two are probably times.
_YEAR_2000, _YEAR_2050 = 946_684_800, 2_524_608_000
_ROW_NUMBER = r"__index_level_\d+__|unnamed.*|index|column0+|"
_TEMPLATE = '''"""A first config for the log {name}, inferred from {rows:,} rows."""

from ml_collections import ConfigDict

from kd_ranker import configs


def get_config(variant: str = "") -> ConfigDict:
    """The template with the columns of this log; CHECK marks lines to verify or to fill in."""
    config = configs.parquet(variant)
    data = config.data
    data.labels, data.teacher, data.features = ConfigDict(), ConfigDict(), ConfigDict()
{body}
    return config
'''


class FirstConfig(NamedTuple):
    """A config file, the number of its lines to check, and the commands to run next."""

    path: Path
    num_checks: int
    next_commands: tuple[str, ...]


class _Guess(NamedTuple):
    """A value of the config that is guessed."""

    value: Any  # a column, for example; "" for none
    why: str = ""  # the reason
    check: str = ""  # a doubt; "" for none


class _RowGuess(NamedTuple):
    """What a row of the log is."""

    guess: _Guess  # of `data.rows`
    lists: list[str]  # the columns of lists with one value per candidate


@functools.cache
def _words(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case and the singular: last, item, id of lastItemIDs."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = filter(None, re.split(r"[\W_]+", spaced.lower()))
    return tuple(re.sub(r"(?<=[^\W_]{2})(?<![suio])s$", "", word) for word in words)


def _find_key(name: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return the first key that lists a name, in any spelling; "" for none."""
    joined = "".join(_words(name))
    for key, listed in names.items():
        if any(joined == "".join(_words(other)) for other in listed):
            return key
    return ""


def _without(name: str, *groups: str) -> tuple[str, ...]:
    """Return the words of a name that are in no group of `_NAMES`."""
    unwanted = {word for group in groups for word in _NAMES[group]}
    return tuple(word for word in _words(name) if word not in unwanted)


def identifier(name: str, taken: Collection[str] = ()) -> str:
    """Return a name as a key of a config, other than those that are taken.

    >>> identifier("item.views (7d)"), identifier("7d"), identifier("items"), identifier("点击")
    ('item_views_7d', 'c_7d', 'items_', '点击')
    """
    text = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", name)).strip("_") or "column"
    text = text if text.isidentifier() else f"c_{text}"
    while text in taken or keyword.iskeyword(text) or hasattr(ConfigDict, text):
        text += "_"
    return text


class _Sample:
    """A table `candidates` in DuckDB, and the facts of its columns that the rules look at.

    Attributes:
      con: the connection to DuckDB.
      named: what the user named, by key of the config.
      sections: those that the user named as a whole, such as `data.labels`.
      facts: a row per column of the log. Its facts `request`, `item` and `user` are 1 if the column
        is constant in each request, item or user, 0 if not, NaN if unknown.
      numbers: a number for each value, NaN for none.
      codes: a number for each value, NaN for none; equal values of a column have equal codes.
      request: the request of each row.
      layout: the guess of `data.rows`.
      stages: stage -> its text, where a column has the stage.
      shown: whether each row was shown.
      passed: whether each row was passed.
    """

    def __init__(self, path: str, named: Mapping[str, Any], sections: Collection[str]) -> None:
        """Read the beginnings of the files at a path; the user may have named some columns."""
        self.named = named
        self.sections = sections
        self.con = duckdb.connect()
        self.labels = [column for key, column in named.items() if key.startswith("data.labels.")]
        self.con.execute("SET enable_progress_bar = false")
        self._read(self._select(path))
        self.request = pd.Series(range(len(self.codes)))
        self.layout, listed = self._find_rows()
        if listed:
            lists = ", ".join(f"unnest({name}) AS {name}" for name in map(quoted, listed))
            self.request = self.frame(f"rowid, {lists}").iloc[:, 0]
            self._read(f"SELECT * REPLACE ({lists}) FROM candidates")
        if self.request.empty:
            raise UserError(f"the log has no rows, or its lists {listed} are empty")
        facts = self.facts
        facts["has_stages"] = [bool(self._stage_texts(column)) for _, column in facts.iterrows()]
        facts["groups"] = facts["distinct"] < facts["rows"] / 1.5
        if self.layout.value == "request":
            facts["request"] = np.where(facts.index.isin(listed), 0.0, 1.0)
            facts["groups"] = facts["distinct"] == self.request.nunique()

    def _select(self, path: str) -> str:
        """Return the SELECT of some rows of text files, or of Parquet files at even distances."""
        if not path:
            raise UserError("data.path is empty; give a file, a directory or a glob of them")
        if is_text_log(path):
            select = sql_of_texts(path)
            register_stores(self.con, select)
            return f"SELECT * FROM ({select}) LIMIT {_MOST_ROWS}"
        system, manifest = find_files(path)
        paths = list(manifest)[:: len(manifest) // _MOST_FILES + 1]
        if not isinstance(system, LocalFileSystem):
            register_store(self.con, system)
            paths = [system.unstrip_protocol(file) for file in paths]
        # A name is a pattern to DuckDB.
        files = [literal(re.sub(r"[*?\[]", r"[\g<0>]", file)) for file in paths]
        size = "sum(total_uncompressed_size) / sum(row_group_num_rows)"
        row = f"count(DISTINCT path_in_schema) * {size}"
        bytes_a_row: Any = self.frame(row, f"parquet_metadata({files[0]})").iat[0, 0]
        rows = min(_MOST_ROWS, _MOST_BYTES / (bytes_a_row or 1))
        rows_a_file = int(rows / len(files)) + 1
        return " UNION ALL BY NAME ".join(
            f"(FROM read_parquet({file}, hive_partitioning = true) LIMIT {rows_a_file})"
            for file in files
        )

    def frame(self, values: str, source: str = "candidates") -> pd.DataFrame:
        """Return the rows of a SELECT."""
        return self.con.execute(f"SELECT {values} FROM {source}").df()

    def _find_rows(self) -> _RowGuess:
        """Find what a row is, and the lists with one value per candidate."""
        facts = self.facts
        named = self.named.get("data.rows", "")
        is_list = facts["kind"] == "list"
        is_named_item = facts.index == self.named.get("data.columns.item")
        is_item = (facts["sure"] == "item") | is_named_item
        has_item = (is_item & ~is_list & (facts["known"] > 0.9)).any()
        lists = facts.index[is_list]
        lists_of_items = facts.index[is_list & is_item]
        if named == "candidate" or lists.empty or (has_item and not named):
            return _RowGuess(_Guess(named or "candidate"), [])
        if lists_of_items.empty:
            is_id_of_row = (facts["sure"] == "request") & (facts["distinct"] == facts["rows"])
            doubt = "" if named else "no column of lists is called like the item"
            guess = "request" if is_id_of_row.any() else "candidate"
            return _RowGuess(_Guess(named or guess, "", doubt), [])
        lengths = self.frame(", ".join(f"len({quoted(name)}) AS {quoted(name)}" for name in lists))
        item = lists_of_items[0]
        has_equal_length = (lengths.sub(lengths[item], axis=0).fillna(0) == 0).all()
        why = f"{has_equal_length.sum()} columns hold lists as long as {item!r}"
        return _RowGuess(_Guess("request", why), [*lists[has_equal_length]])

    def _read(self, select: str) -> None:
        """Make the table, and the facts of its columns that need no role."""
        self.con.execute(f"CREATE OR REPLACE TABLE candidates AS {select}")
        table = self.con.table("candidates")
        facts = pd.DataFrame({"column_type": map(str, table.types)}, table.columns)
        self.facts = facts
        facts["kind"] = facts["column_type"].map(_kind)
        facts["is_number"] = facts["kind"].isin(["integer", "float"])
        self._read_values()
        self._count_values()
        self._read_names()
        is_named_time = (facts["sure"] + facts["hint"]) == "time"
        facts["is_time"] = (facts["kind"] == "time") | ((facts["unit"] != "") & is_named_time)
        is_discrete = facts["kind"].isin(["integer", "text"])
        facts["is_id"] = is_discrete & ~facts["is_time"] & (facts["distinct"] > 1)
        facts["is_few"] = facts["is_id"] & (facts["distinct"] <= 9)
        is_integer = facts["kind"] == "integer"
        facts["binary"] = is_integer & (facts["low"] >= 0) & (facts["high"] == 1)
        facts[["request", "item", "user"]] = float("nan")

    def _read_values(self) -> None:
        """Read the numbers and the codes of all values."""
        facts = self.facts
        values = [
            f"({quoted(str(name)) if is_number else 'NULL'})::DOUBLE"
            for name, is_number in facts["is_number"].items()
        ]
        numbers = self.frame(", ".join(values))
        code = "CASE WHEN COLUMNS(*) IS NOT NULL THEN (hash(COLUMNS(*)) >> 12)::DOUBLE END"
        codes = self.frame(code)
        numbers.columns = facts.index
        codes.columns = facts.index
        floats = facts.index[facts["kind"] == "float"]
        codes[floats] = numbers[floats]  # NaN is missing, too
        # Integers next to missing ones may be floats.
        is_whole = numbers.isna() | ((numbers % 1 == 0) & (numbers.abs() < 2**53))
        facts.loc[facts["is_number"] & is_whole.all(), "kind"] = "integer"
        self.numbers = numbers
        self.codes = codes

    def _count_values(self) -> None:
        facts = self.facts
        facts["rows"] = len(self.codes)
        facts["distinct"] = self.codes.nunique()
        facts["known"] = self.codes.notna().mean()
        facts["low"] = self.numbers.min()
        facts["high"] = self.numbers.max()
        facts["unit"] = ""
        middle = self.numbers.median()
        for unit, per_second in TIME_UNITS.items():
            is_recent = middle.between(_YEAR_2000 * per_second, _YEAR_2050 * per_second)
            facts.loc[is_recent, "unit"] = unit

    def _read_names(self) -> None:
        """Find the roles, tasks and groups of words that the names of columns point at."""
        facts = self.facts
        facts["sure"] = [_find_key(name, _NAMES["sure"]) for name in facts.index]
        facts["hint"] = [_find_key(name, _NAMES["maybe"]) for name in facts.index]
        actions = [
            "_".join(_without(name, "affixes", "outputs", "teacher")) for name in facts.index
        ]
        facts["task"] = [_find_key(action, _NAMES["tasks"]) for action in actions]
        groups = [key for key, words in _NAMES.items() if isinstance(words, list)]
        for group in groups:
            facts[group] = [_without(name, group) != _words(name) for name in facts.index]

    def set_role(self, role: str, column: str) -> None:
        """Complete the facts by the column of a role, "" for none."""
        facts = self.facts
        is_owner = role in ("request", "item", "user")
        if column and is_owner and facts[role].isna().all():
            owner = self.codes[column]
            # Owners of one row say nothing; without others, the fact stays unknown.
            is_repeated = owner.duplicated(keep=False)
            by_owner = self.codes.fillna(-1)[is_repeated].groupby(owner)
            is_constant = by_owner.min() == by_owner.max()
            if len(is_constant):
                facts[role] = is_constant.all().astype(float)
            if role == "request":
                self.request = owner
        if role == "request":
            is_item = (facts["sure"] == "item") | (facts["hint"] == "item")
            items = self.codes.loc[:, is_item]
            facts["in_requests"] = items.groupby(self.request).nunique().sum()
        if role == "stage":
            self._find_shown(column)

    def _find_shown(self, stage: str) -> None:
        """Find who was shown, by the column of the stage or, if it is "", by partly known labels.

        The facts `known_in` and `ones_in` are the shares of values known, and of 1, of shown
        candidates; `known_out` and `ones_out` are those of others.
        """
        facts = self.facts
        is_label = (facts["binary"] & (facts["task"] != "")) | facts.index.isin(self.labels)
        partly_known = is_label & (facts["known"] < 0.99)
        self.shown = self.codes.loc[:, partly_known].notna().any(axis=1)
        self.passed = pd.Series(False, self.request.index)
        self.stages = self._find_stages(stage)
        if self.stages:
            texts = self.texts(stage)
            self.shown = texts == self.stages["shown"]
            is_beyond_retrieved = texts != self.stages.get("retrieved")
            self.passed = is_beyond_retrieved & (len(self.stages) == 3)
        knows_shown = bool(self.shown.any())
        shown = self.shown if knows_shown else ~self.shown
        for suffix, rows in (("in", shown), ("out", ~shown)):
            facts[f"known_{suffix}"] = self.codes[rows].notna().mean().fillna(0)
            facts[f"ones_{suffix}"] = self.numbers[rows].mean().fillna(0)
        is_known_of_shown = (facts["known_out"] <= 0.01) & (facts["known_in"] >= 0.5)
        facts["only_shown"] = is_known_of_shown & knows_shown
        # Without a stage, a candidate with a position counts as shown.
        facts["placed"] = facts["only_shown"] | (not knows_shown)

    def _find_stages(self, column: str) -> dict[str, str]:
        """Return the text of each stage, {} if that of the shown candidates is not known."""
        if not column:
            return {}
        stages = self._stage_texts(self.facts.loc[column])
        for stage in STAGES:
            if text := self.named.get(f"data.stages.{stage}"):
                stages[stage] = text
        return stages if "shown" in stages else {}

    def texts(self, column: str) -> pd.Series:
        """Return the values of a column as the texts that a config names."""
        texts = self.frame(f"{quoted(column)}::VARCHAR").iloc[:, 0]
        texts = texts.where(self.codes[column].notna())
        return texts.str.title() if self.facts["column_type"][column] == "BOOLEAN" else texts

    def _stage_texts(self, column: Any) -> dict[str, str]:
        """Return the text of each stage in a column of the facts, {} if a value names none."""
        if not column["is_few"]:
            return {}
        values = sorted(self.texts(column.name).dropna().unique())
        if column["binary"] and column["sure"] == "shown":
            return dict(zip(("retrieved", "shown"), values, strict=False))
        texts = {_find_key(value, _NAMES["stages"]): value for value in values}
        has_other_stage = {"shown"} < {*texts}
        each_has_its_own = "" not in texts and len(texts) == len(values)
        return texts if has_other_stage and each_has_its_own else {}


def _may_be_request(facts: pd.DataFrame) -> pd.Series:
    return facts["is_id"] & facts["groups"]


def _may_be_item(facts: pd.DataFrame) -> pd.Series:
    is_item_of_requests = (facts["request"] != 1) & (facts["in_requests"] > 0.95 * facts["rows"])
    return facts["is_id"] & (facts["known"] > 0.95) & is_item_of_requests


def _may_be_user(facts: pd.DataFrame) -> pd.Series:
    may_own_requests = (facts["request"] != 0) & (facts["item"] != 1)
    return facts["is_id"] & may_own_requests & (facts["distinct"] >= 10)


def _may_be_time(facts: pd.DataFrame) -> pd.Series:
    may_be_of_request = (facts["request"] != 0) & (facts["item"] != 1) & (facts["user"] != 1)
    return facts["is_time"] & may_be_of_request


def _may_be_stage(facts: pd.DataFrame) -> pd.Series:
    return facts["has_stages"] & (facts["known"] > 0.95) & _varies_in_requests(facts)


def _may_be_position(facts: pd.DataFrame) -> pd.Series:
    counts_from_start = (facts["kind"] == "integer") & facts["low"].isin([0, 1])
    return counts_from_start & _varies_in_requests(facts) & facts["placed"]


def _may_be_weight(facts: pd.DataFrame) -> pd.Series:
    return facts["is_number"] & (facts["low"] >= 0) & (facts["item"] != 1)


def _may_be_version(facts: pd.DataFrame) -> pd.Series:
    return facts["is_few"] & (facts["item"] != 1) & (facts["user"] != 1)


def _may_be_incumbent(facts: pd.DataFrame) -> pd.Series:
    return facts["is_number"]


def _may_be_propensity(facts: pd.DataFrame) -> pd.Series:
    return _may_be_weight(facts) & (facts["high"] <= 1)


def _varies_in_requests(facts: pd.DataFrame) -> pd.Series:
    """Return whether each column may differ among candidates, and is not one of the item."""
    return (facts["request"] != 1) & (facts["item"] != 1)


def _may_be_label(facts: pd.DataFrame) -> pd.Series:
    return facts["binary"] & _varies_in_requests(facts) & (facts["sure"] == "")


def _is_surely_label(facts: pd.DataFrame) -> pd.Series:
    is_rare_elsewhere = facts["ones_out"] <= 0.2 * facts["ones_in"]
    return facts["only_shown"] | ((facts["task"] != "") & is_rare_elsewhere)


def _may_be_teacher(facts: pd.DataFrame) -> pd.Series:
    is_number = facts["is_number"] & _varies_in_requests(facts)
    return is_number & (facts["sure"] == "") & ~facts["early"]


def _is_score(facts: pd.DataFrame) -> pd.Series:
    is_share = (facts["kind"] == "float") & (facts["low"] >= 0) & (facts["high"] <= 1)
    return is_share & (facts["distinct"] >= 10)


# Role -> whether the values of each column fit, by the facts; in the order of their search.
_FITS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "request": _may_be_request,
    "item": _may_be_item,
    "user": _may_be_user,
    "time": _may_be_time,
    "stage": _may_be_stage,
    "position": _may_be_position,
    "label_weight": _may_be_weight,
    "teacher_version": _may_be_version,
    "teacher_weight": _may_be_weight,
    "incumbent": _may_be_incumbent,
    "propensity": _may_be_propensity,
}


def _kind(type_: str) -> str:
    for pattern, kind in _KINDS.items():
        if re.fullmatch(pattern, type_):
            return kind
    return "other"


def _named(sample: _Sample, section: str) -> dict[str, _Guess]:
    """Return the columns that the user named in a section such as `data.labels.`."""
    guesses = {}
    for key, column in sample.named.items():
        if key.startswith(section) and column:
            check_choice(key, column, sample.facts.index)
            guesses[key.removeprefix(section)] = _Guess(column)
    return guesses


def _which(role: str, likely: Iterable[str]) -> str:
    """Return the question which column has a role, with the two likeliest."""
    two = list(dict.fromkeys(likely))[:2]
    choices = " or ".join(map(repr, two)) or "none looks like it"
    return f"which column has the {role}: {choices}?"


def _choose(role: str, sample: _Sample) -> _Guess:
    """Return the column that has the facts and the name of a role, or the two likeliest."""
    facts = sample.facts
    fitting = facts[_FITS[role](facts)]
    sure = list(fitting.index[fitting["sure"] == role])
    if len(sure) == 1:
        return _Guess(sure[0], "its name, and values that fit")
    if role == "stage" and len(fitting) == 1:
        return _Guess(fitting.index[0], "its values name stages")
    likely = [*sure, *fitting.index[fitting["hint"] == role]]
    is_required = role in ("request", "item", "time")
    if is_required:
        likely += _look_alikes(role, facts)
    if not likely:
        return _Guess("", "no column looks like it")
    return _Guess("" if is_required else OPEN, "", _which(role, likely))


def _look_alikes(role: str, facts: pd.DataFrame) -> list[str]:
    """Return columns that a user may have meant, by a part of their names or by their values."""
    words = {word for name in _NAMES["sure"][role] for word in _words(name)} - {"id"}
    by_name = [name for name in facts.index if words & {*_words(name)}]
    by_values = facts["unit"] != "" if role == "time" else facts["is_id"]
    return [*by_name, *facts.index[by_values]]


def _find_labels(sample: _Sample) -> dict[str, _Guess]:
    """Find the label of each task: 0 or 1, by its name, or known only where shown.

    Labels that the user named together, as a section, are all that there are.
    """
    labels = _named(sample, "data.labels.")
    if labels and "data.labels" in sample.sections:
        return labels
    possible = sample.facts[_may_be_label(sample.facts)]
    possible = possible.drop([label.value for label in labels.values()], errors="ignore")
    for column, known_task in possible[_is_surely_label(possible)]["task"].items():
        if known_task and known_task not in labels:
            task = known_task
        else:
            task = identifier(str(column), labels)
        why = "0 or 1, and its name" if known_task else "0 or 1, known only where shown"
        labels[task] = _Guess(column, why)
    if labels:
        return labels
    return {"label": _Guess("", "", _which("label, 0 or 1", possible.index))}


def _find_written_after(sample: _Sample, used: Collection[str]) -> dict[str, str]:
    """Return the columns without a role that were written after the ranking, and why it seems so.

    Only columns that may differ among the candidates of a request are looked at, by their values.
    """
    facts = sample.facts
    may_vary = _varies_in_requests(facts) & (facts["user"] != 1) & (facts["distinct"] > 1)
    varying = facts[may_vary & facts["kind"].isin(["integer", "float", "text"])]
    shown, passed = sample.shown, sample.passed
    if not shown.any():
        has_task = _may_be_label(facts) & (facts["task"] != "")
        labels = [*facts.index[has_task], *sample.labels]
        positive = (sample.numbers[labels] == 1).any(axis=1)
        shown = guess_shown(sample.codes[varying.index.difference(labels)], positive)
    signs: dict[str, str] = {}
    for column in varying.index.difference([*used]):
        codes, numbers = sample.codes[column], sample.numbers[column]
        why = why_written_after(codes, numbers, sample.request, shown)
        if passed.any() and not why:
            why = why_written_after(codes, numbers, sample.request, passed, "passed")
        if why:
            signs[column] = why
    return signs


class _Teacher(NamedTuple):
    """The columns of the final ranker's scores."""

    columns: dict[str, _Guess]  # by task
    doubt: str  # names other columns that may be one; "" for none


def _find_teacher(
    sample: _Sample, labels: Mapping[str, _Guess], written_after: Collection[str]
) -> _Teacher:
    """Find the teacher's column of each task."""
    columns = _named(sample, "data.teacher.")
    used = [guess.value for guess in (*labels.values(), *columns.values())]
    free = sample.facts[_may_be_teacher(sample.facts)].drop(used, errors="ignore")
    scores = free[_is_score(free)]
    # An early ranker's score is known of all candidates, and a final ranker's of those passed.
    known_of_passed = (scores["known"] < 0.99) & (scores["known_in"] > 0.9)
    likely = [*scores.index[known_of_passed]]
    likely += [*free.index[free["teacher"] & free["ranks"]]]
    for task, label in labels.items():
        names = _outputs_of_task(free, task, label.value)
        likely = names + likely
        is_only_score = len(names) == 1 and names[0] in scores.index and task not in columns
        if is_only_score and _correlates(sample.numbers[[names[0], label.value]]):
            columns[task] = _Guess(names[0], "its name, and it correlates with the label")
    if not columns:
        floats = free.index[(free["kind"] == "float") & ~free["only_shown"]]
        likely += [column for column in floats if column in written_after]
    chosen = {guess.value for guess in columns.values()}
    likely = [column for column in likely if column not in chosen]
    return _Teacher(columns, _which("teacher", likely) if likely else "")


def _outputs_of_task(free: pd.DataFrame, task: str, label: str) -> list[str]:
    """Return the columns that are called like a model's output for a task, or for its label.

    Those that are called like a teacher are returned alone.
    """
    outputs = free.index[free["teacher"] | free["outputs"] | free["predictions"]]
    words = _words(label) or None
    names = [
        name
        for name in outputs
        if _without(name, "outputs", "teacher") == words or free["task"][name] == task
    ]
    return [name for name in names if free["teacher"][name]] or names


def _correlates(numbers: pd.DataFrame) -> bool:
    """Return True if two columns correlate by at least three standard errors."""
    known = numbers.dropna()
    return bool(known.corr().iat[0, 1] * len(known) ** 0.5 >= 3)


def _feature_line(
    facts: Any, name: str, sample: _Sample, item: str, is_doubtful: bool, written_after: str
) -> str:
    """Return the line of the config for a column without a role: its feature, or why not.

    Args:
      facts: those of the column, as `DataFrame.itertuples` yields them.
      name: the key of the feature.
      sample: of the log.
      item: the column of the items, "" if it is not known.
      is_doubtful: whether the column may have a role that is still open.
      written_after: the sign that it was written after the ranking, "" for none.
    """
    column = facts.Index
    feature = _kind_of_feature(facts, sample, item)
    kind = feature.kind
    may_vary = facts.item != 1 and facts.user != 1
    is_output = facts.afterwards or facts.predictions or facts.teacher
    is_output = is_output or (facts.uses and facts.amounts)
    is_action = facts.task and not facts.binary
    is_rare_elsewhere = facts.ones_out <= 0.2 * facts.ones_in
    number = sample.facts["distinct"][item] if facts.item == 1 else facts.rows
    reasons = {
        "its type is not supported": not kind,
        "constant": facts.distinct < 2,
        "a row number": re.fullmatch(_ROW_NUMBER, column, re.IGNORECASE),
        "perhaps a column of an open role": is_doubtful,
        "missing where a candidate was not shown": facts.only_shown,
        "perhaps a label": (
            may_vary and facts.request != 1 and facts.binary and not facts.ones_out
        ),
        "a label of another task": facts.binary and facts.task and is_rare_elsewhere,
        f"perhaps written after the ranking: {written_after}": written_after,
        "known only afterwards, by its name": may_vary and (is_output or is_action),
        "an id or a text": kind == "category" and facts.distinct > 0.8 * number,
    }
    for reason, holds in reasons.items():
        if holds:
            return f"    # left out: {column!r}: {reason}"
    owner = _owner_of_feature(facts, kind)
    arguments = [repr(owner), repr(kind)]
    if name != column:
        arguments.append(f"column={column!r}")
    code = f"configs.feature({', '.join([*arguments, *feature.arguments])})"
    is_open = owner == "candidate" and np.isnan(facts.request)
    return _line(f"data.features.{name}", code, "", "or another owner?" if is_open else "")


def _owner_of_feature(facts: Any, kind: str) -> str:
    """Return the first owner for which a column is constant."""
    if kind == "history" or (facts.user == 1 and facts.request != 0):
        return "user"
    if facts.request == 1:
        return "context"
    return "item" if facts.item == 1 else "candidate"


class _FeatureKind(NamedTuple):
    """The kind of a feature, "" for none, and further arguments of `configs.feature`, as code."""

    kind: str
    arguments: Sequence[str] = ()


def _kind_of_feature(facts: Any, sample: _Sample, item: str) -> _FeatureKind:
    """Return the kind of the feature that a column may be."""
    if facts.is_time or facts.kind == "other":
        return _FeatureKind("")
    hashed = ["hashed=True"] if facts.distinct > 10_000 else []
    if facts.kind == "list":
        return _kind_of_list(facts, sample, item, hashed)
    has_many_values = facts.distinct > 32 and abs(facts.high) < 2**31
    is_integer = facts.kind == "integer" and not facts.identifiers
    is_amount = is_integer and (has_many_values or facts.quantities)
    if facts.kind == "float" or is_amount:
        return _FeatureKind("dense")
    return _FeatureKind("category", hashed)


def _kind_of_list(facts: Any, sample: _Sample, item: str, hashed: Sequence[str]) -> _FeatureKind:
    lists = f"(SELECT DISTINCT {quoted(facts.Index)} AS l FROM candidates)"
    lengths = "min(len(l)), coalesce(quantile_disc(len(l), 0.95), 1)::INT"
    shortest, long = sample.frame(lengths, lists).iloc[0]
    length = f"length={min(max(long, 1), 200)}"
    kind_of_elements = _kind(re.sub(r"\[\d*\]$", "", facts.column_type))
    if kind_of_elements not in ("integer", "text"):
        is_vector = kind_of_elements == "float" and shortest == long
        return _FeatureKind("dense" if is_vector else "", [length])
    if item and facts.request != 0:
        items = f"(SELECT {quoted(item)}::VARCHAR FROM candidates)"
        are_items = f"avg((e::VARCHAR IN {items})::INT) > 0.5 AND count(DISTINCT e) > 20"
        if sample.frame(are_items, f"(SELECT unnest(l) e FROM {lists})").iat[0, 0]:
            return _FeatureKind("history", [length])
    return _FeatureKind("bag", [*hashed, length])


def _find_sizes(sample: _Sample) -> dict[str, _Guess]:
    """Return the sizes of the funnel, from the requests of the sample."""
    reached = pd.DataFrame({"passed": sample.passed, "shown": sample.shown})
    requests = reached.groupby(sample.request, dropna=False)
    largest = int(requests.size().max())
    median = requests.sum().median()
    num_passed = int(median["passed"])
    num_shown = int(median["shown"])
    is_known = sample.facts["request"].notna().any() and num_passed and num_shown
    shown = num_shown or min(10, largest)
    passed = max(shown, num_passed or min(largest, 2 * shown))
    doubt = "" if is_known else "what are the sizes of your funnel?"
    report_at = sorted({shown, passed, min(2 * passed, largest)})
    return {
        "funnel.retrieved": _Guess(largest, "the largest request of the sample", doubt),
        "funnel.passed": _Guess(passed),
        "funnel.shown": _Guess(shown),
        "funnel.report_at": _Guess(tuple(report_at)),
    }


def _line(key: str, code: str, why: str = "", check: str = "") -> str:
    """Return an assignment, with the reason next to it and the doubt above."""
    above = f"    # {CHECK}{check}\n" if check else ""
    behind = f"  # {why}" if why else ""
    return f"{above}    {key} = {code}{behind}"


class _Roles(NamedTuple):
    """The columns that have a role, by the sections of `config.data`; a value "" is none."""

    columns: dict[str, _Guess]
    labels: dict[str, _Guess]
    teacher: dict[str, _Guess]

    def used(self) -> list[str]:
        """Return the columns of all sections."""
        sections = (self.columns, self.labels, self.teacher)
        return [guess.value for section in sections for guess in section.values()]


def _config_lines(path: str, name: str, sample: _Sample) -> list[str]:
    """Return the lines of the config of a log."""
    columns = _named(sample, "data.columns.")
    for role in _FITS:
        columns[role] = columns.get(role) or _choose(role, sample)
        sample.set_role(role, columns[role].value.strip(OPEN))
    labels = _find_labels(sample)
    written_after = _find_written_after(sample, _Roles(columns, labels, {}).used())
    teacher = _find_teacher(sample, labels, written_after)
    if not sample.passed.any():
        scores = [guess.value for guess in teacher.columns.values()]
        sample.passed = sample.codes[scores].notna().any(axis=1)
    roles = _Roles(columns, labels, teacher.columns)
    guesses = _guess_keys(path, name, sample, roles, teacher.doubt)
    for key, value in sample.named.items():
        if key != "data.infer":
            guesses[key] = _Guess(value, "named by you")
    lines = []
    for key, guess in guesses.items():
        key = key if key.startswith("data.") else f"config.{key}"
        lines.append(_line(key, repr(guess.value), guess.why, guess.check))
    checks = " ".join(guess.check for guess in guesses.values())
    names: list[str] = []
    for facts in sample.facts.drop(roles.used(), errors="ignore").itertuples():
        column = str(facts.Index)
        names.append(identifier(column, names))
        is_doubtful = repr(facts.Index) in checks
        why = written_after.get(column, "")
        item = columns["item"].value
        lines.append(_feature_line(facts, names[-1], sample, item, is_doubtful, why))
    return lines


def _guess_keys(
    path: str, name: str, sample: _Sample, roles: _Roles, teacher_doubt: str
) -> dict[str, _Guess]:
    """Return the guesses by key of the config, without features."""
    guesses = {
        "data.path": _Guess(path),
        "data.title": _Guess(name),
        "data.rows": sample.layout,
    }
    stages = {stage: _Guess(text) for stage, text in sample.stages.items()}
    sections = {
        "columns": roles.columns,
        "stages": stages,
        "labels": roles.labels,
        "teacher": roles.teacher,
    }
    for section, its_guesses in sections.items():
        for key, guess in its_guesses.items():
            guesses[f"data.{section}.{key}"] = guess
    time = roles.columns["time"].value
    version = roles.columns["teacher_version"].value.strip(OPEN)
    if version:
        version = next(iter(sample.texts(version).mode()), "")
    worth = tuple(float(task not in _NAMES["unwanted"]) for task in roles.labels)
    source = "logged" if roles.teacher else "live"
    return {
        **guesses,
        "data.time_unit": _Guess(sample.facts["unit"].get(time) or "s"),
        "data.split": _Guess("time" if time else "request"),
        "data.teacher_version": _Guess(version),
        "teacher.source": _Guess(source, "", teacher_doubt),
        "tasks": _Guess(tuple(roles.labels)),
        "value_weights": _Guess(worth, "", "what is each task worth? 0 without a teacher"),
        **_find_sizes(sample),
    }


def write_first_config(path: str, folder: Path, named: Mapping[str, Any], name: str) -> FirstConfig:
    """Write a config for a log into a folder, see `api.infer`; name "" is that of the path."""
    name = name or _name_of(path)
    file = folder / f"{name}.py"
    if file.exists():
        raise UserError(f"{file} exists already; move it away, or give another --workdir")
    sections = [key for key in named if key in ("data.columns", "data.labels", "data.teacher")]
    by_key = {key: value for key, value in named.items() if key not in sections}
    for section in sections:
        for key, column in named[section].items():
            by_key[f"{section}.{key}"] = column
    try:
        sample = _Sample(path, by_key, sections)
        body = "\n".join(_config_lines(path, name, sample))
    except duckdb.Error as error:
        raise UserError(f"data.path={path} cannot be read: {line_of(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    text = _TEMPLATE.format(name=name, rows=len(sample.codes), body=body)
    file.write_text(text)
    step = "train" if "config.teacher.source = 'logged'" in text else "train_teacher"
    train = f"{command(step)} --config={file} --workdir=runs/{name}-{step}"
    return FirstConfig(file, text.count(CHECK), (f"{command('prepare')} --config={file}", train))


def _name_of(path: str) -> str:
    """Return a name for the log at a path: the last part without wildcards."""
    parts = [part for part in re.split(r"[/\\]+", path) if part and not re.search(r"[*?\[]", part)]
    return identifier(re.sub(r"\.\w+$", "", parts[-1])).lower() if parts else "log"
