"""Write a first config for a log, from the names of its columns and a few facts about their values.

A role needs a name of `names.json` and values that fit. Otherwise it stays open: the config names
the two likeliest columns, and `prepare_data` reports it as missing.
"""

import keyword
import math
import re
import textwrap
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.errors import UserError, check_choice, command
from kd_ranker.sources.logs.column_facts import (
    NAMES,
    Sample,
    arrow_of,
    has_word,
    predicts,
    words_of,
)
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.query import quoted

CHECK = "CHECK: "
OPEN = "?"  # an optional role that the user has to settle
# Role -> the facts that its column has, see `Sample`, in the order of their search.
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
_LABEL = "binary and request != 1 and item != 1 and sure == '' and not is_shown"
_SCORE = "kind == 'float' and low >= 0 and high <= 1 and distinct >= 10"
_ROW_NUMBER = r"__index_level_\d+__|unnamed.*|index|column0+|"
_TEMPLATE = '''"""A first config for the log {name}, inferred from {rows:,} rows."""

from ml_collections import ConfigDict

from kd_ranker import configs


def get_config(variant: str = "") -> ConfigDict:
    """The template with the columns of this log; CHECK marks lines to verify or to fill in."""
    config = configs.parquet(variant)
    data = config.data
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


def _named(sample: Sample, section: str) -> dict[str, _Guess]:
    """Return the columns that the user named in a section such as `data.labels.`."""
    named = {key: of for key, of in sample.named.items() if key.startswith(section) and of}
    return {key.removeprefix(section): _Guess(of, "named by you") for key, of in named.items()}


def _which(role: str, likely: Iterable[str]) -> str:
    two = [*dict.fromkeys(likely)][:2]
    return f"which column has the {role}: {' or '.join(map(repr, two)) or 'none looks like it'}?"


def _choose(role: str, sample: Sample) -> _Guess:
    """Return the column that has the facts and the name of a role, or the two likeliest."""
    if given := _named(sample, "data.columns.").get(role):
        return given
    facts = sample.facts
    fitting = facts.query(_FITS[role])
    sure = [*fitting.index[fitting.sure == role]]
    if len(sure) == 1:
        return _Guess(sure[0], "its name, and values that fit")
    if role == "stage" and len(fitting) == 1:
        return _Guess(fitting.index[0], "its values name stages")
    likely = [*sure, *fitting.index[fitting.hint == role]]
    if is_required := role in ("request", "item", "time"):
        words = {word for of in NAMES["sure"][role] for word in words_of(of)} - {"id"}
        likely += [of for of in facts.index if words & {*words_of(of)}]
        likely += [*facts.index[facts.unit != "" if role == "time" else facts.is_id]]
    if not likely:
        return _Guess("", "no column looks like it")
    return _Guess("" if is_required else OPEN, "", _which(role, likely))


def _find_columns(sample: Sample) -> dict[str, _Guess]:
    """Find the column of each role, and complete the facts by it."""
    columns = {}
    for key, column in sample.named.items():
        if key.startswith(("data.columns.", "data.labels.", "data.teacher.")) and column:
            check_choice(key, column, sample.facts.index)
    for role in _FITS:
        columns[role] = _choose(role, sample)
        column = columns[role].value.strip(OPEN)
        if role == "request":
            sample.set_request(column)
        elif role == "stage":
            sample.set_shown(column)
        elif role in ("item", "user") and column:
            sample.set_constant(role, quoted(column))
    return columns


def _find_labels(sample: Sample) -> dict[str, _Guess]:
    """Find the label of each task: 0 or 1, by its name, or known only where shown."""
    labels = _named(sample, "data.labels.")
    free = sample.facts.query(_LABEL)
    free = free[~free.index.isin([of.value for of in labels.values()])]
    is_sure = "only_shown or (task != '' and ones_out <= 0.2 * ones_in)"
    likely: Iterable[Any] = free.query(is_sure).itertuples()
    for f in likely:
        task = f.task if f.task and f.task not in labels else identifier(f.Index, labels)
        why = "0 or 1, and its name" if f.task else "0 or 1, known only where shown"
        labels[task] = _Guess(f.Index, why)
    return labels or {"label": _Guess("", "", _which("label, 0 or 1", free.index))}


def _find_teacher(sample: Sample, labels: Mapping[str, _Guess]) -> tuple[dict[str, _Guess], str]:
    """Find the teacher's column of each task; the doubt names other columns that may be one."""
    found, maybe = _named(sample, "data.teacher."), []
    used = [of.value for of in (*labels.values(), *found.values())]
    free = sample.facts.query("is_number and request != 1 and item != 1 and sure == ''")
    free = free[~free.index.isin([of for of in free.index if of in used or has_word(of, "early")])]
    scores = free.query(_SCORE)
    for task, label in labels.items():
        names = [of for of in free.index if predicts(of, task, label.value)]
        names = [of for of in names if has_word(of, "teacher")] or names
        is_sure = len(names) == 1 and names[0] in scores.index and task not in found
        if is_sure and sample.correlates(names[0], label.value):
            found[task] = _Guess(names[0], "its name, and it correlates with the label")
        else:
            maybe += names
    # An early ranker's score is known of all candidates, and a final ranker's of those passed.
    maybe += [*scores.query("known < 0.99 and known_in > 0.9").index]
    maybe += [of for of in free.index if has_word(of, "teacher") and has_word(of, "ranks")]
    maybe = [of for of in maybe if of not in {guess.value for guess in found.values()}]
    return found, _which("teacher", maybe) if maybe else ""


def _feature_line(f: Any, name: str, sample: Sample, item: str, is_doubtful: bool) -> str:
    """Return the line of the config for a column without a role: its feature, or why not."""
    kind, *more = _kind_of_feature(f, sample, item)
    afterwards = has_word(f.Index, "afterwards", "predictions", "teacher")
    afterwards |= has_word(f.Index, "uses") and has_word(f.Index, "amounts")
    afterwards |= f.task != "" and not f.binary
    may_vary = f.item != 1 and f.user != 1
    number = sample.facts.distinct[item] if f.item == 1 else f.rows
    left_out = {
        "its type is not supported": not kind,
        "constant": f.distinct < 2,
        "a row number": re.fullmatch(_ROW_NUMBER, f.Index, re.IGNORECASE),
        "perhaps a column of an open role": is_doubtful,
        "missing where a candidate was not shown": f.only_shown,
        "perhaps a label": may_vary and f.request != 1 and f.binary and not f.ones_out,
        "known only afterwards, by its name": may_vary and afterwards,
        "an id or a text": kind == "category" and f.distinct > 0.8 * number,
    }
    if reasons := [reason for reason, holds in left_out.items() if holds]:
        return f"    # left out: {f.Index!r}: {reasons[0]}"
    doubt = ""
    if f.item == 1 and f.request != 1:
        owner = "item"
    elif math.isnan(f.request):
        words, doubt = {*words_of(f.Index)}, "or another owner?"
        owner = next((of for of, its in NAMES["owners"].items() if words & {*its}), "candidate")
    else:
        owner = ("user" if f.user == 1 else "context") if f.request else "candidate"
    owner = "user" if kind == "history" else owner
    arguments = [repr(owner), repr(kind), *[f"column={f.Index!r}"] * (name != f.Index), *more]
    return _line(f"data.features.{name}", f"configs.feature({', '.join(arguments)})", "", doubt)


def _kind_of_feature(f: Any, sample: Sample, item: str) -> tuple[str, ...]:
    """Return the kind of a feature, "" for none, and further arguments of `feature`."""
    hashed = ["hashed=True"] * (f.distinct > 10_000)
    if f.is_time or f.kind == "other":
        return ("",)
    if f.kind != "list":
        is_amount = (f.distinct > 32 and abs(f.high) < 2**31) or has_word(f.Index, "quantities")
        is_amount &= f.kind == "integer" and not has_word(f.Index, "identifiers")
        return ("dense",) if f.kind == "float" or is_amount else ("category", *hashed)
    lists = f"(SELECT DISTINCT {quoted(f.Index)} AS l FROM candidates)"
    short, long = sample.row("min(len(l))", "quantile_disc(len(l), 0.95)", source=lists)
    length = f"length={min(max(long or 1, 1), 200)}"
    if f.element not in ("integer", "text"):
        return "dense" if f.element == "float" and short == long else "", length
    if item and f.request != 0:
        known = f"avg((e::VARCHAR IN (SELECT {quoted(item)}::VARCHAR FROM candidates))::INT) > 0.5"
        elements = f"(SELECT unnest(l) e FROM {lists})"
        if all(sample.row(known, "count(DISTINCT e) > 20", source=elements)):
            return "history", length
    return "bag", *hashed, length


def _find_sizes(sample: Sample) -> dict[str, _Guess]:
    """Return the sizes of the funnel, from the requests of the sample."""
    shown, passed = (f"count(*) FILTER ({of})" for of in (sample.shown, sample.passed))
    requests = f"FROM candidates GROUP BY {sample.request or 'rowid'}"
    requests = f"(SELECT count(*) a, {shown} s, {passed} p {requests})"
    most, page, few = map(int, sample.row("max(a)", "median(s)", "median(p)", source=requests))
    doubt = "" if sample.request and page and few else "what are the sizes of your funnel?"
    page = page or min(10, most)
    few = max(page, few or min(most, 2 * page))
    return {
        "funnel.retrieved": _Guess(most, "the largest request of the sample", doubt),
        "funnel.passed": _Guess(few),
        "funnel.shown": _Guess(page),
        "funnel.report_at": _Guess(tuple(sorted({page, few, min(2 * few, most)}))),
    }


def _line(key: str, code: str, why: str = "", check: str = "") -> str:
    """An assignment, with the reason next to it and the doubt above."""
    above = textwrap.indent(textwrap.fill(CHECK + check, 94), "    # ") + "\n" if check else ""
    return f"{above}    {key} = {code}" + f"  # {why}" * bool(why)


def _config_lines(path: str, name: str, sample: Sample) -> list[str]:
    """Return the lines of the config of a log."""
    columns, labels = _find_columns(sample), _find_labels(sample)
    teacher, teacher_doubt = _find_teacher(sample, labels)
    if teacher and sample.passed == "false":
        sample.passed = " OR ".join(f"{quoted(of.value)} IS NOT NULL" for of in teacher.values())
    item, time, version = (columns[of].value for of in ("item", "time", "teacher_version"))
    if version := version.strip(OPEN):
        version = sample.row(f"mode({quoted(version)})::VARCHAR")[0]
    worth = tuple(float(of not in NAMES["unwanted"]) for of in labels)
    guesses = {
        "data.path": _Guess(path),
        "data.title": _Guess(name),
        "data.rows": _Guess(*sample.layout),
        **{f"data.columns.{role}": of for role, of in columns.items()},
        "data.time_unit": _Guess(sample.facts.unit.get(time) or "s"),
        "data.split": _Guess("time" if time else "request"),
        **{f"data.stages.{stage}": _Guess(of) for stage, of in sample.stages.items()},
        "data.labels": _Guess(ConfigDict()),
        **{f"data.labels.{task}": of for task, of in labels.items()},
        "data.teacher": _Guess(ConfigDict()),
        **{f"data.teacher.{task}": of for task, of in teacher.items()},
        "data.teacher_version": _Guess(version),
        "teacher.source": _Guess("logged" if teacher else "live", "", teacher_doubt),
        "tasks": _Guess(tuple(labels)),
        "value_weights": _Guess(worth, "", "what is each task worth? 0 without a teacher"),
        **_find_sizes(sample),
        "data.features": _Guess(ConfigDict()),
    } | {key: _Guess(of, "named by you") for key, of in sample.named.items() if key != "data.infer"}
    lines = []
    for key, (value, why, check) in guesses.items():
        prefix = "" if key.startswith("data.") else "config."
        is_section = isinstance(value, ConfigDict)
        code = f"ConfigDict({value.to_dict() or ''})" if is_section else repr(value)
        lines.append(_line(prefix + key, code, why, check))
    used = {of.value for of in (*columns.values(), *labels.values(), *teacher.values())}
    checks = " ".join(of.check for of in guesses.values())
    names: list[str] = []
    for f in sample.facts[~sample.facts.index.isin([*used])].itertuples():
        names.append(identifier(str(f.Index), names))
        lines.append(_feature_line(f, names[-1], sample, item, repr(f.Index) in checks))
    return lines


def write_first_config(log: Any, folder: Path, named: Mapping[str, Any]) -> FirstConfig:
    """Write a config for a log, a path or a table, into a folder; see `api.infer`."""
    is_path, name = isinstance(log, (str, Path)), "log"
    if is_path:  # the last part of the path without wildcards
        parts = [of for of in re.split(r"[/\\]+", str(log)) if of and not re.search(r"[*?\[]", of)]
        name = identifier(re.sub(r"\.\w+$", "", parts[-1])).lower() if parts else name
    file, copy = folder / f"{name}.py", folder / f"{name}.parquet"
    if old := [of for of in (file, copy) if of.exists() and not (of == copy and is_path)]:
        raise UserError(f"{old[0]} exists already; move it away, or give another --workdir")
    path, table = (str(log), None) if is_path else (str(copy), arrow_of(log))
    try:
        sample = Sample(path if table is None else table, named)
        body = "\n".join(_config_lines(path, name, sample))
    except duckdb.Error as error:
        raise UserError(f"data.path={path} cannot be read: {line_of(error)}") from error
    text = _TEMPLATE.format(name=name, rows=sample.facts.rows.max(), body=body)
    folder.mkdir(parents=True, exist_ok=True)
    if table is not None:
        pq.write_table(table, path)
    file.write_text(text)
    commands = [f"{command('prepare')} --config={file}"]
    step = "train" if "config.teacher.source = 'logged'" in text else "train_teacher"
    commands.append(f"{command(step)} --config={file} --workdir=runs/{name}-{step}")
    return FirstConfig(file, text.count(CHECK), tuple(commands))
