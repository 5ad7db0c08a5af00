"""Write a first config for a log, from the names of its columns and a few facts about their values.

A role needs a name of `names.json` and values that fit. Otherwise it stays open: the config names
the two likeliest columns, and `prepare_data` reports it as missing.
"""

import functools
import json
import keyword
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
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
_MOST_ROWS, _MOST_BYTES, _MOST_FILES = 120_000, 200_000_000, 24  # of the sample
_KINDS = {
    r".*\]": "list",
    r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|BOOLEAN": "integer",
    "FLOAT|DOUBLE|DECIMAL.*": "float",
    "VARCHAR|BLOB|UUID|ENUM.*": "text",
    "DATE|TIMESTAMP.*": "time",
}
# Role -> the facts that its column has, see `_Sample`, in the order of their search.
_FITS = {
    "request": "is_id and groups",
    "item": "is_id and known > 0.95 and request != 1 and in_requests > 0.95 * rows",
    "user": "is_id and request != 0 and item != 1 and distinct >= 10",
    "time": "is_time and request != 0 and item != 1 and user != 1",
    "stage": "has_stages and known > 0.95 and request != 1 and item != 1",
    "position": "kind == 'integer' and low in (0, 1) and request != 1 and item != 1 and placed",
    "label_weight": "is_number and low >= 0 and item != 1",
    "teacher_version": "is_few and item != 1 and user != 1",
    "teacher_weight": "is_number and low >= 0 and item != 1",
    "incumbent": "is_number",
    "propensity": "is_number and low >= 0 and high <= 1 and item != 1",
}
_LABEL = "binary and request != 1 and item != 1 and sure == ''"
_SURE_LABEL = "only_shown or (task != '' and ones_out <= 0.2 * ones_in)"
_TEACHER = "is_number and request != 1 and item != 1 and sure == '' and not early"
_SCORE = "kind == 'float' and low >= 0 and high <= 1 and distinct >= 10"
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
    """A column or another value, "" for none; the reason; and a doubt, "" for none."""

    value: Any
    why: str = ""
    check: str = ""


@functools.cache
def _words(name: str) -> tuple[str, ...]:
    """Return the words of a name in lower case and the singular: last, item, id of lastItemIDs."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = filter(None, re.split(r"[\W_]+", spaced.lower()))
    return tuple(re.sub(r"(?<=[^\W_]{2})(?<![suio])s$", "", word) for word in words)


def _key(name: str, table: Mapping[str, Sequence[str]]) -> str:
    """Return the first key of a table that lists a name; "" for none."""
    bare = "".join(_words(name))
    return next((key for key, of in table.items() if bare in map("".join, map(_words, of))), "")


def _without(name: str, *groups: str) -> tuple[str, ...]:
    """Return the words of a name that are in no group of `_NAMES`."""
    return tuple(word for word in _words(name) if not any(word in _NAMES[of] for of in groups))


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
    """A table `candidates` in DuckDB, and the `facts` of its columns that the rules query.

    `numbers` and `codes` have a number for each value, NaN for none; equal values of a column have
    equal codes. `request`, `shown` and `passed` have a value per row. The facts `request`, `item`
    and `user` of a column are 1 if it is constant in each of them, 0 if not, NaN if unknown.
    """

    def __init__(self, path: str, named: Mapping[str, Any], sections: Collection[str]) -> None:
        """Read the beginnings of the files at a path; the user may have named some columns.

        `named` has them by key, and `sections` are those that the user named as a whole.
        """
        self.sections = sections
        self.named, self.con = named, duckdb.connect()
        self.labels = [of for key, of in named.items() if key.startswith("data.labels.")]
        self.con.execute("SET enable_progress_bar = false")
        self._read(self._select(path))
        self.request = pd.Series(range(len(self.codes)))
        self.layout, listed = self._find_layout()
        if listed:
            lists = ", ".join(f"unnest({of}) AS {of}" for of in map(quoted, listed))
            self.request = self.frame(f"rowid, {lists}").iloc[:, 0]
            self._read(f"SELECT * REPLACE ({lists}) FROM candidates")
        if self.request.empty:
            raise UserError(f"the log has no rows, or its lists {listed} are empty")
        t = self.facts
        t["has_stages"] = [bool(self._stage_texts(f)) for _, f in t.iterrows()]
        t["groups"] = t.distinct < t.rows / 1.5
        if self.layout.value == "request":
            t["request"] = 1.0 - t.index.isin(listed)
            t["groups"] = t.distinct == self.request.nunique()

    def _select(self, path: str) -> str:
        """Return the SELECT of some rows of text files, or of Parquet files at even distances."""
        if not path:
            raise UserError("data.path is empty; give a file, a directory or a glob of them")
        if is_text_log(path):
            select = sql_of_texts(path)
            register_stores(self.con, select)
            return f"SELECT * FROM ({select}) LIMIT {_MOST_ROWS}"
        system, manifest = find_files(path)
        read = [*manifest][:: len(manifest) // _MOST_FILES + 1]
        if not isinstance(system, LocalFileSystem):
            register_store(self.con, system)
            read = [system.unstrip_protocol(of) for of in read]
        # A name is a pattern to DuckDB.
        files = [literal(re.sub(r"[*?\[]", r"[\g<0>]", of)) for of in read]
        size = "sum(total_uncompressed_size) / sum(row_group_num_rows)"
        row = f"count(DISTINCT path_in_schema) * {size}"
        size_of_row: Any = self.frame(row, f"parquet_metadata({files[0]})").iat[0, 0]
        most = int(min(_MOST_ROWS, _MOST_BYTES / (size_of_row or 1)) / len(files)) + 1
        tables = (f"read_parquet({of}, hive_partitioning = true)" for of in files)
        return " UNION ALL BY NAME ".join(f"(FROM {of} LIMIT {most})" for of in tables)

    def frame(self, values: str, source: str = "candidates") -> pd.DataFrame:
        """Return the rows of a SELECT."""
        return self.con.execute(f"SELECT {values} FROM {source}").df()

    def _find_layout(self) -> tuple[_Guess, list[str]]:
        """Find the layout, and the lists with one value per candidate."""
        t, given = self.facts, self.named.get("data.rows", "")
        is_list = t.kind == "list"
        is_item = (t.sure == "item") | (t.index == self.named.get("data.columns.item"))
        has_item = (is_item & ~is_list & (t.known > 0.9)).any()
        lists, items = t.index[is_list], t.index[is_list & is_item]
        if given == "candidate" or lists.empty or (has_item and not given):
            return _Guess(given or "candidate"), []
        if items.empty:
            is_unique = ((t.sure == "request") & (t.distinct == t.rows)).any()
            doubt = "" if given else "no column of lists is called like the item"
            return _Guess(given or ("request" if is_unique else "candidate"), "", doubt), []
        lengths = self.frame(", ".join(f"len({quoted(of)}) AS {quoted(of)}" for of in lists))
        is_equal = (lengths.sub(lengths[items[0]], axis=0).fillna(0) == 0).all()
        why = f"{is_equal.sum()} columns hold lists as long as {items[0]!r}"
        return _Guess("request", why), [*lists[is_equal]]

    def _read(self, select: str) -> None:
        """Make the table, and the facts of its columns that need no role."""
        self.con.execute(f"CREATE OR REPLACE TABLE candidates AS {select}")
        table = self.con.table("candidates")
        self.facts = t = pd.DataFrame({"column_type": map(str, table.types)}, table.columns)
        t["kind"] = t.column_type.map(_kind)
        t["is_number"] = t.kind.isin(["integer", "float"])
        values = (quoted(str(of)) if number else "NULL" for of, number in t.is_number.items())
        self.numbers = numbers = self.frame(", ".join(f"({of})::DOUBLE" for of in values))
        code = "CASE WHEN COLUMNS(*) IS NOT NULL THEN (hash(COLUMNS(*)) >> 12)::DOUBLE END"
        self.codes = codes = self.frame(code)
        numbers.columns = codes.columns = t.index
        floats = t.index[t.kind == "float"]
        codes[floats] = numbers[floats]  # NaN is missing, too
        # Integers next to missing ones may be floats.
        is_whole = numbers.isna() | ((numbers % 1 == 0) & (numbers.abs() < 2**53))
        t.loc[t.is_number & is_whole.all(), "kind"] = "integer"
        t["rows"], t["distinct"], t["unit"] = len(codes), codes.nunique(), ""
        t["known"] = codes.notna().mean()
        t["low"], t["high"], middle = numbers.min(), numbers.max(), numbers.median()
        for unit, by in TIME_UNITS.items():  # dates from 2000 to 2049
            t.loc[middle.between(946684800 * by, 2524608000 * by), "unit"] = unit
        t["sure"], t["hint"] = ([_key(of, _NAMES[x]) for of in t.index] for x in ("sure", "maybe"))
        actions = ("_".join(_without(of, "affixes", "outputs", "teacher")) for of in t.index)
        t["task"] = [_key(of, _NAMES["tasks"]) for of in actions]
        for group in (key for key, of in _NAMES.items() if isinstance(of, list)):
            t[group] = [_without(of, group) != _words(of) for of in t.index]
        t["is_time"] = (t.kind == "time") | ((t.unit != "") & (t.sure + t.hint == "time"))
        t["is_id"] = t.kind.isin(["integer", "text"]) & ~t.is_time & (t.distinct > 1)
        t["is_few"] = t.is_id & (t.distinct <= 9)
        t["binary"] = (t.kind == "integer") & (t.low >= 0) & (t.high == 1)
        t[["request", "item", "user"]] = float("nan")

    def set_role(self, role: str, column: str) -> None:
        """Complete the facts by the column of a role, "" for none."""
        t = self.facts
        if column and role in ("request", "item", "user") and t[role].isna().all():
            owner = self.codes[column]
            # One value in each owner of two rows or more.
            by_owner = self.codes.fillna(-1)[owner.duplicated(keep=False)].groupby(owner)
            t[role] = np.floor((by_owner.min() == by_owner.max()).mean())
            self.request = owner if role == "request" else self.request
        if role == "request":
            of_items = self.codes.loc[:, (t.sure == "item") | (t.hint == "item")]
            t["in_requests"] = of_items.groupby(self.request).nunique().sum()
        if role == "stage":
            self._find_shown(column)

    def _find_shown(self, column: str) -> None:
        """Find who was shown, and the shares known and 1 of shown and of other candidates."""
        t = self.facts
        is_label = (t.binary & (t.task != "")) | t.index.isin(self.labels)
        partly = is_label & (t.known < 0.99)
        self.shown = self.codes.loc[:, partly].notna().any(axis=1)
        self.passed = pd.Series(False, self.request.index)
        stages = self._stage_texts(t.loc[column]) if column else {}
        stages |= {of: text for of in STAGES if (text := self.named.get(f"data.stages.{of}"))}
        self.stages = stages if column and "shown" in stages else {}
        if self.stages:
            texts = self.texts(column)
            self.shown = texts == stages["shown"]
            self.passed = (texts != stages.get("retrieved")) & (len(stages) == 3)
        is_known = bool(self.shown.any())
        shown = self.shown if is_known else ~self.shown
        for suffix, rows in (("in", shown), ("out", ~shown)):
            t[f"known_{suffix}"] = self.codes[rows].notna().mean().fillna(0)
            t[f"ones_{suffix}"] = self.numbers[rows].mean().fillna(0)
        t["only_shown"] = (t.known_out <= 0.01) & (t.known_in >= 0.5) & is_known
        # Without a stage, a candidate with a position counts as shown.
        t["placed"] = t.only_shown | (not is_known)

    def texts(self, column: str) -> pd.Series:
        """Return the values of a column as the texts that a config names."""
        texts = self.frame(f"{quoted(column)}::VARCHAR").iloc[:, 0]
        texts = texts.where(self.codes[column].notna())
        return texts.str.title() if self.facts.column_type[column] == "BOOLEAN" else texts

    def _stage_texts(self, f: Any) -> dict[str, str]:
        """Return the text of each stage in a column, {} if not all of its values name one."""
        values = sorted(self.texts(f.name).dropna().unique()) if f.is_few else []
        if f.binary and f.sure == "shown":
            return dict(zip(("retrieved", "shown"), values, strict=False))
        texts = {_key(value, _NAMES["stages"]): value for value in values}
        has_all = {"shown"} < {*texts} and "" not in texts and len(texts) == len(values)
        return texts if has_all else {}


def _kind(type_: str) -> str:
    return next((kind for like, kind in _KINDS.items() if re.fullmatch(like, type_)), "other")


def _named(sample: _Sample, section: str) -> dict[str, _Guess]:
    """Return the columns that the user named in a section such as `data.labels.`."""
    named = {key: of for key, of in sample.named.items() if key.startswith(section) and of}
    for key, column in named.items():
        check_choice(key, column, sample.facts.index)
    return {key.removeprefix(section): _Guess(of) for key, of in named.items()}


def _which(role: str, likely: Iterable[str]) -> str:
    two = [*dict.fromkeys(likely)][:2]
    return f"which column has the {role}: {' or '.join(map(repr, two)) or 'none looks like it'}?"


def _choose(role: str, sample: _Sample) -> _Guess:
    """Return the column that has the facts and the name of a role, or the two likeliest."""
    facts = sample.facts
    fitting = facts.query(_FITS[role])
    sure = [*fitting.index[fitting.sure == role]]
    if len(sure) == 1:
        return _Guess(sure[0], "its name, and values that fit")
    if role == "stage" and len(fitting) == 1:
        return _Guess(fitting.index[0], "its values name stages")
    likely = [*sure, *fitting.index[fitting.hint == role]]
    if is_required := role in ("request", "item", "time"):
        words = {word for of in _NAMES["sure"][role] for word in _words(of)} - {"id"}
        likely += [of for of in facts.index if words & {*_words(of)}]
        likely += [*facts.index[facts.unit != "" if role == "time" else facts.is_id]]
    if not likely:
        return _Guess("", "no column looks like it")
    return _Guess("" if is_required else OPEN, "", _which(role, likely))


def _find_labels(sample: _Sample) -> dict[str, _Guess]:
    """Find the label of each task: 0 or 1, by its name, or known only where shown.

    Labels that the user named together, as a section, are all that there are.
    """
    labels = _named(sample, "data.labels.")
    if labels and "data.labels" in sample.sections:
        return labels
    free = sample.facts.query(_LABEL).drop([of.value for of in labels.values()], errors="ignore")
    for column, known in free.query(_SURE_LABEL).task.items():
        task = known if known and known not in labels else identifier(str(column), labels)
        why = "0 or 1, and its name" if known else "0 or 1, known only where shown"
        labels[task] = _Guess(column, why)
    return labels or {"label": _Guess("", "", _which("label, 0 or 1", free.index))}


def _find_written_after(sample: _Sample, used: Collection[str]) -> dict[str, str]:
    """Return the columns without a role that were written after the ranking, and why it seems so.

    Only columns that may differ among the candidates of a request are looked at, by their values.
    """
    varying = sample.facts.query("request != 1 and item != 1 and user != 1 and distinct > 1")
    varying = varying[varying.kind.isin(["integer", "float", "text"])]
    shown, passed = sample.shown, sample.passed
    if not shown.any():
        labels = sample.facts.query(_LABEL).query("task != ''").index
        positive = (sample.numbers[[*labels, *sample.labels]] == 1).any(axis=1)
        telling = varying.index.difference([*labels, *sample.labels])
        shown = guess_shown(sample.codes[telling], positive)
    found: dict[str, str] = {}
    for column in varying.index.difference([*used]):
        codes, numbers = sample.codes[column], sample.numbers[column]
        why = why_written_after(codes, numbers, sample.request, shown)
        if passed.any() and not why:
            why = why_written_after(codes, numbers, sample.request, passed, "passed")
        if why:
            found[column] = why
    return found


def _find_teacher(
    sample: _Sample, labels: Mapping[str, _Guess], written_after: Collection[str]
) -> tuple[dict[str, _Guess], str]:
    """Find the teacher's column of each task; the doubt names other columns that may be one."""
    found = _named(sample, "data.teacher.")
    used = [of.value for of in (*labels.values(), *found.values())]
    free = sample.facts.query(_TEACHER).drop(used, errors="ignore")
    scores = free.query(_SCORE)
    # An early ranker's score is known of all candidates, and a final ranker's of those passed.
    maybe = [*scores.query("known < 0.99 and known_in > 0.9").index]
    maybe += [*free.query("teacher and ranks").index]
    outputs = free.query("teacher or outputs or predictions").index
    stems = {of: _without(of, "outputs", "teacher") for of in outputs}
    for task, label in labels.items():
        words = _words(label.value) or None
        names = [of for of, stem in stems.items() if stem == words or free.task[of] == task]
        names = [of for of in names if free.teacher[of]] or names
        maybe = names + maybe
        is_sure = len(names) == 1 and names[0] in scores.index and task not in found
        known = sample.numbers[[*names, label.value]].dropna() if is_sure else pd.DataFrame()
        if is_sure and known.corr().iat[0, 1] * len(known) ** 0.5 >= 3:  # standard errors
            found[task] = _Guess(names[0], "its name, and it correlates with the label")
    if not found:
        floats = free.query("kind == 'float' and not only_shown").index
        maybe += [of for of in floats if of in written_after]
    maybe = [of for of in maybe if of not in {guess.value for guess in found.values()}]
    return found, _which("teacher", maybe) if maybe else ""


def _feature_line(
    f: Any, name: str, sample: _Sample, item: str, is_doubtful: bool, written_after: str
) -> str:
    """Return the line of the config for a column without a role: its feature, or why not."""
    kind, *more = _kind_of_feature(f, sample, item)
    is_output = f.afterwards or f.predictions or f.teacher or (f.uses and f.amounts)
    may_vary = f.item != 1 and f.user != 1
    number = sample.facts.distinct[item] if f.item == 1 else f.rows
    left_out = {
        "its type is not supported": not kind,
        "constant": f.distinct < 2,
        "a row number": re.fullmatch(_ROW_NUMBER, f.Index, re.IGNORECASE),
        "perhaps a column of an open role": is_doubtful,
        "missing where a candidate was not shown": f.only_shown,
        "perhaps a label": may_vary and f.request != 1 and f.binary and not f.ones_out,
        "a label of another task": f.binary and f.task and f.ones_out <= 0.2 * f.ones_in,
        f"perhaps written after the ranking: {written_after}": written_after,
        "known only afterwards, by its name": may_vary and (is_output or (f.task and not f.binary)),
        "an id or a text": kind == "category" and f.distinct > 0.8 * number,
    }
    if reasons := [reason for reason, holds in left_out.items() if holds]:
        return f"    # left out: {f.Index!r}: {reasons[0]}"
    of_user = kind == "history" or (f.user == 1 and f.request != 0)
    constant = {"user": of_user, "context": f.request == 1, "item": f.item == 1, "candidate": True}
    owner = next(of for of, is_constant in constant.items() if is_constant)
    is_open = owner == "candidate" and np.isnan(f.request)
    arguments = [repr(owner), repr(kind), *[f"column={f.Index!r}"] * (name != f.Index), *more]
    code, doubt = f"configs.feature({', '.join(arguments)})", "or another owner?" if is_open else ""
    return _line(f"data.features.{name}", code, "", doubt)


def _kind_of_feature(f: Any, sample: _Sample, item: str) -> tuple[str, ...]:
    """Return the kind of a feature, "" for none, and further arguments of `feature`."""
    hashed = ["hashed=True"] * (f.distinct > 10_000)
    if f.is_time or f.kind == "other":
        return ("",)
    if f.kind != "list":
        is_amount = (f.distinct > 32 and abs(f.high) < 2**31) or f.quantities
        is_amount &= f.kind == "integer" and not f.identifiers
        return ("dense",) if f.kind == "float" or is_amount else ("category", *hashed)
    lists = f"(SELECT DISTINCT {quoted(f.Index)} AS l FROM candidates)"
    lengths = "min(len(l)), coalesce(quantile_disc(len(l), 0.95), 1)::INT"
    short, long = sample.frame(lengths, lists).iloc[0]
    length = f"length={min(max(long, 1), 200)}"
    element = _kind(re.sub(r"\[\d*\]$", "", f.column_type))
    if element not in ("integer", "text"):
        return "dense" if element == "float" and short == long else "", length
    if item and f.request != 0:
        known = f"avg((e::VARCHAR IN (SELECT {quoted(item)}::VARCHAR FROM candidates))::INT) > 0.5"
        elements = f"(SELECT unnest(l) e FROM {lists})"
        if sample.frame(f"{known} AND count(DISTINCT e) > 20", elements).iat[0, 0]:
            return "history", length
    return "bag", *hashed, length


def _find_sizes(sample: _Sample) -> dict[str, _Guess]:
    """Return the sizes of the funnel, from the requests of the sample."""
    parts = pd.DataFrame({"passed": sample.passed, "shown": sample.shown})
    requests = parts.groupby(sample.request, dropna=False)
    most, few, page = map(int, (requests.size().max(), *requests.sum().median()))
    is_known = sample.facts.request.notna().any() and few and page
    page = page or min(10, most)
    few = max(page, few or min(most, 2 * page))
    doubt = "" if is_known else "what are the sizes of your funnel?"
    return {
        "funnel.retrieved": _Guess(most, "the largest request of the sample", doubt),
        "funnel.passed": _Guess(few),
        "funnel.shown": _Guess(page),
        "funnel.report_at": _Guess(tuple(sorted({page, few, min(2 * few, most)}))),
    }


def _line(key: str, code: str, why: str = "", check: str = "") -> str:
    """Return an assignment, with the reason next to it and the doubt above."""
    above = f"    # {CHECK}{check}\n" if check else ""
    return f"{above}    {key} = {code}{f'  # {why}' if why else ''}"


def _config_lines(path: str, name: str, sample: _Sample) -> list[str]:
    """Return the lines of the config of a log."""
    columns = _named(sample, "data.columns.")
    for role in _FITS:
        columns[role] = columns.get(role) or _choose(role, sample)
        sample.set_role(role, columns[role].value.strip(OPEN))
    labels = _find_labels(sample)
    roles = [of.value for its in (columns, labels) for of in its.values()]
    written_after = _find_written_after(sample, roles)
    teacher, teacher_doubt = _find_teacher(sample, labels, written_after)
    if not sample.passed.any():
        scored = sample.codes[[of.value for of in teacher.values()]]
        sample.passed = scored.notna().any(axis=1)
    item, time, version = (columns[of].value for of in ("item", "time", "teacher_version"))
    if version := version.strip(OPEN):
        version = next(iter(sample.texts(version).mode()), "")
    worth = tuple(float(of not in _NAMES["unwanted"]) for of in labels)
    stages = {stage: _Guess(text) for stage, text in sample.stages.items()}
    sections = {"columns": columns, "stages": stages, "labels": labels, "teacher": teacher}
    guesses = {
        "data.path": _Guess(path),
        "data.title": _Guess(name),
        "data.rows": sample.layout,
        **{f"data.{of}.{key}": guess for of, its in sections.items() for key, guess in its.items()},
        "data.time_unit": _Guess(sample.facts.unit.get(time) or "s"),
        "data.split": _Guess("time" if time else "request"),
        "data.teacher_version": _Guess(version),
        "teacher.source": _Guess("logged" if teacher else "live", "", teacher_doubt),
        "tasks": _Guess(tuple(labels)),
        "value_weights": _Guess(worth, "", "what is each task worth? 0 without a teacher"),
        **_find_sizes(sample),
    } | {key: _Guess(of, "named by you") for key, of in sample.named.items() if key != "data.infer"}
    lines = [
        _line(key if key.startswith("data.") else f"config.{key}", repr(value), why, check)
        for key, (value, why, check) in guesses.items()
    ]
    used = [of.value for its in (columns, labels, teacher) for of in its.values()]
    checks = " ".join(of.check for of in guesses.values())
    names: list[str] = []
    for f in sample.facts.drop(used, errors="ignore").itertuples():
        names.append(identifier(str(f.Index), names))
        is_doubtful, why = repr(f.Index) in checks, written_after.get(str(f.Index), "")
        lines.append(_feature_line(f, names[-1], sample, item, is_doubtful, why))
    return lines


def write_first_config(path: str, folder: Path, named: Mapping[str, Any], name: str) -> FirstConfig:
    """Write a config for a log into a folder, see `api.infer`; name "" is that of the path."""
    if not name:  # the last part of the path without wildcards
        parts = [of for of in re.split(r"[/\\]+", path) if of and not re.search(r"[*?\[]", of)]
        name = identifier(re.sub(r"\.\w+$", "", parts[-1])).lower() if parts else "log"
    file = folder / f"{name}.py"
    if file.exists():
        raise UserError(f"{file} exists already; move it away, or give another --workdir")
    sections = [key for key in named if key in ("data.columns", "data.labels", "data.teacher")]
    by_key = {key: of for key, of in named.items() if key not in sections}
    for section in sections:
        by_key |= {f"{section}.{name}": of for name, of in named[section].items()}
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
