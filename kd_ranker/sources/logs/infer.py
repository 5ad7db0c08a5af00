"""Write a first config for a log, from the names of its columns and a few facts about their values.

A role needs a name of `names.json` and values that fit, or values that prove it: 0 and 1 known only
where a candidate was shown. Without such evidence a role stays open: the config names the two
likeliest columns, and `prepare_data` reports it as missing.
"""

import json
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.errors import UserError, check_choice, command
from kd_ranker.sources.logs.column_facts import (
    NAMES,
    Guess,
    Log,
    arrow_of,
    each,
    has_word,
    identifier,
    key_of,
    predicts,
    read_sample,
    words_of,
)
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.layout import STAGES, literal
from kd_ranker.sources.logs.query import quoted

CHECK = "CHECK: "
OPEN = "?"  # an optional role that the user has to settle, as no column has this name
# Role -> the facts that its column has, see `Log`.
_FITS = {
    "request": "groups",
    "item": "once and known > 0.95 and request != 1",
    "user": "is_id and request != 0 and item != 1 and enough",
    "time": "is_time and user != 1 and (request == 1 or (request != 0 and item != 1 and is_sure))",
    "position": "kind == 'integer' and low in (0, 1) and request != 1 and item != 1 and placed",
    "label_weight": "is_number and low >= 0 and item != 1",
    "teacher_version": "is_few and item != 1 and user != 1 and scored",
    "teacher_weight": "is_number and low >= 0 and item != 1 and scored",
    "incumbent": "is_number",
    "propensity": "is_number and low >= 0 and high <= 1 and item != 1",
}
# The reason to leave a column out of the features -> the facts of such a column.
_LEFT_OUT = {
    "its type is not supported": "feature == ''",
    "constant": "distinct < 2",
    "a row number": "is_index",
    "perhaps a column of an open role or a label": "maybe",
    "missing where a candidate was not shown": "only_shown",
    "known only afterwards, by its name": "later and user != 1 and item != 1",
    "called like a label, with other values": "task != '' and not binary and item != 1",
    "called like the output of a model": "output and item != 1 and request != 1",
    "an id or a text": "feature == 'category' and is_unique",
}
_ROW_NUMBER = r"(__index_level_\d+__|unnamed.*|index|column0+|)"
_TEMPLATE = '''"""A first config for the log {name}, inferred from {read:,} of {rows:,} rows."""

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


def _choose(role: str, log: Log) -> Guess:
    """Return the column that has the facts and the name of a role, or the two likeliest."""
    if given := log.given("data.columns.").get(role):
        return given
    fitting = log.facts.query(_FITS[role])
    sure = [*fitting.index[fitting.sure == role]]
    likely = sure or [*fitting.index[fitting.hint == role]]
    if len(likely) == 1 and (sure or role in ("request", "time")):
        return Guess(likely[0], "its name, and values that fit")
    if is_required := role in ("request", "item", "time"):
        words = {word for of in NAMES["sure"][role] for word in words_of(of)} - {"id"}
        near = [of for of in log.facts.index if words & {*words_of(of)}]
        others = log.facts.index[log.facts.unit != "" if role == "time" else log.facts.is_id]
        likely = list(dict.fromkeys([*likely, *near, *others]))
    if not likely:
        return Guess("", "no column looks like it")
    return Guess("" if is_required else OPEN, "", _which(role, likely))


def _which(what: str, likely: Sequence[str]) -> str:
    which = " or ".join(map(repr, likely[:2])) or "no column looks like it"
    return f"which column has the {what}: {which}?"


def _find_ids(log: Log) -> dict[str, Guess]:
    """Find requests, items, users and times, and set in the facts what is constant in each."""
    t, columns = log.facts, {}
    (rows,) = log.row("count(*)")
    times = [quoted(of) for of in t.index[t.is_time & (t.sure == "time")]]
    t["groups"], t["once"], t["is_sure"] = False, False, t.sure != ""
    for name in t.index[t.is_id & ((t.sure == "request") | (t.hint == "request"))]:
        number = log.distinct(quoted(name))
        if log.request:
            is_unique = number > 0.95 * log.distinct(log.request)
            t.loc[name, "groups"] = bool(is_unique and t.request[name] == 1)
        elif number < rows / 1.5:
            pairs = (log.distinct(quoted(name), time) for time in times)
            t.loc[name, "groups"] = any(pair <= 1.05 * number for pair in pairs)
    columns["request"] = _choose("request", log)
    if columns["request"].column and not log.request:
        log.request = quoted(columns["request"].column)
        log.set_constant("request", log.request)
    key = log.request or "rowid"
    for name in t.index[t.is_id & ((t.sure == "item") | (t.hint == "item"))]:
        is_row_number = log.request and t.high[name] - t.low[name] + 1 == rows
        is_once = log.distinct(key, quoted(name)) > 0.95 * rows
        t.loc[name, "once"] = bool(is_once and not is_row_number)
    columns["item"] = _choose("item", log)
    if columns["item"].column:
        log.set_constant("item", quoted(columns["item"].column))
    t["enough"] = t.distinct >= min(10, 0.02 * log.distinct(key))
    columns["user"] = _choose("user", log)
    if columns["user"].column not in ("", OPEN):
        first = f"QUALIFY row_number() OVER (PARTITION BY {key}) = 1"
        requests = f"(SELECT *, rowid FROM candidates {first})"
        log.set_constant("user", quoted(columns["user"].column), requests)
    return columns | {"time": _choose("time", log)}


def _find_stage(log: Log) -> tuple[Guess, dict[str, str]]:
    """Find the stage and its texts, and set what is true of shown and of passed candidates."""
    guess, texts = log.given("data.columns.").get("stage", Guess("", "no column looks like it")), {}
    few = log.facts.query("is_few and known > 0.95 and request != 1 and item != 1")
    for f in each(few):
        if guess.column not in ("", OPEN, f.Index):
            continue
        is_named = "stage" in (f.sure, f.hint)
        rows = f"SELECT {quoted(f.Index)}::VARCHAR FROM candidates GROUP BY 1 ORDER BY count(*)"
        values = [value for (value,) in log.con.execute(rows).fetchall() if value]
        found = {of: value for value in values if (of := key_of(value, NAMES["stages"]))}
        found = {"retrieved": "0", "shown": "1"} if f.binary and f.shown else found
        rest = sorted({*values} - {*found.values()})
        if "shown" in found and len(found) > 1 and (is_named or not rest or guess.column):
            doubt = f"rows of {', '.join(rest)} will be rejected" * bool(rest)
            guess, texts = Guess(f.Index, "its values name stages", doubt), found
        elif is_named:
            guess = Guess(OPEN, "", f"is {f.Index!r} the stage? then name its values, too")
    if texts:
        texts |= {of: given.column for of, given in log.given("data.stages.").items()}
        value = f"{quoted(guess.column)}::VARCHAR"
        log.shown = f"{value} = {literal(texts['shown'])}"
        log.passed = f"{value} <> {literal(texts['retrieved'])}" if len(texts) == 3 else ""
        if log.facts["bool"][guess.column]:
            texts = {"retrieved": "False", "shown": "True"}
    return guess, texts


def _find_labels(log: Log) -> tuple[dict[str, Guess], list[str]]:
    """Find the label of each task, and columns that may be labels; set what was shown."""
    labels = log.given("data.labels.")
    t = log.facts[~log.facts.index.isin([of.column for of in labels.values()])]
    t = t.query("binary and request != 1 and item != 1 and sure == '' and shown == ''")
    partly = [quoted(of) for of in t.index[(t.task != "") & (t.known < 0.99)]]
    if partly and not log.shown:
        log.shown = f"coalesce({', '.join(partly)}) IS NOT NULL"
    log.set_shown()
    series = [re.sub(r"\d+", "#", of) for of in log.facts.index]
    maybe = []
    for f in each(log.facts.loc[t.index]):
        if f.task and (not log.shown or f.only_shown or f.ones_out < 0.2 * f.ones_in):
            task = f.task if f.task not in labels else identifier(f.Index)
            labels[task] = Guess(f.Index, "0 or 1, and its name")
        elif not f.task and f.only_shown:
            labels[identifier(f.Index)] = Guess(f.Index, "0 or 1, known only where shown")
        elif not f.task and not f.ones_out and series.count(re.sub(r"\d+", "#", f.Index)) < 4:
            maybe.append(f.Index)
    return labels, maybe


def _find_teacher(log: Log, labels: Mapping[str, Guess]) -> tuple[dict[str, Guess], list[str]]:
    """Find the teacher's column of each task, and columns that may be one."""
    found, maybe = log.given("data.teacher."), []
    used = [of.column for of in (*labels.values(), *found.values())]
    free = log.facts[~log.facts.index.isin(used)].query("request != 1 and item != 1 and sure == ''")
    free = free.loc[[of for of in free.index if not has_word(of, "early")]]
    scores = free.query("kind == 'float' and low >= 0 and high <= 1 and distinct >= 10")
    for task, label in labels.items():
        named = [of for of in free.index if predicts(of, task, label.column)]
        named = [of for of in named if has_word(of, "teacher")] or named
        # An early ranker's score is known of all candidates, and a final ranker's of those passed.
        late = scores.index[(scores.known < 0.99) & (scores.known_in > 0.9)]
        likely = [of for of in named or late if of in scores.index]
        likely = [of for of in likely if log.correlates(of, label.column)]
        if named == likely and len(named) == 1 and task not in found:
            found[task] = Guess(named[0], "its name, in [0, 1], and it correlates with the label")
        else:
            maybe += likely
    ranks = free.index[free.kind == "integer"]
    maybe += [of for of in ranks if has_word(of, "teacher") and has_word(of, "ranks")]
    taken = {of.column for of in found.values()}
    return found, [of for of in dict.fromkeys(maybe) if of not in taken]


def _find_features(log: Log, used: Collection[str], item: str, maybe: Collection[str]) -> list[str]:
    """Return a line of the config per free column: its feature, or why it is left out."""
    t = log.facts[~log.facts.index.isin([*used])].copy()
    kinds = {f.Index: log.kind_of_feature(f, item) for f in each(t)}
    t["feature"], t["maybe"] = [kinds[of][0] for of in t.index], t.index.isin([*maybe])
    items, rows = log.row(f"count(DISTINCT {quoted(item)})" if item else "0", "count(*)")
    t["is_unique"] = t.distinct > 0.9 * t.item.map({1.0: items}).fillna(rows)
    t["is_index"] = t.index.str.fullmatch(_ROW_NUMBER, case=False)
    t["why"] = ""
    for why, rule in _LEFT_OUT.items():
        t.loc[t.index.isin(t.query(rule).index) & (t.why == ""), "why"] = why
    lines, names = [], []
    for f in each(t):
        owner, doubt = _owner(f)
        kind, more = kinds[f.Index]
        names.append(identifier(f.Index))
        name = names[-1] + f"_{len(names)}" * (names[-1] in names[:-1])
        column = [] if name == f.Index else [f"column={_code(f.Index)}"]
        owner = "user" if kind == "history" else owner
        code = f"configs.feature({', '.join([_code(owner), _code(kind), *column, *more])})"
        left_out = f"    # left out: {_code(f.Index)}: {f.why}"
        lines.append(left_out if f.why else _line(f"data.features.{name}", code, "", doubt))
    return lines


def _owner(f: Any) -> tuple[str, str]:
    """The owner of a feature, and a doubt about it."""
    words = words_of(f.Index)
    named = next((of for word in words for of, its in NAMES["owners"].items() if word in its), "")
    if math.isnan(f.request):
        return ("item", "") if f.item == 1 else (named or "candidate", "or another owner?")
    pair = ("user", "context") if f.request else ("item", "candidate")
    is_constant = f.user if f.request else f.item
    if math.isnan(is_constant):
        return named if named in pair else pair[1], f"{pair[0]!r} or {pair[1]!r}?"
    return pair[not is_constant], ""


def _code(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, ConfigDict):
        return f"ConfigDict({value.to_dict() or ''})"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    return repr(value)


def _line(key: str, code: str, why: str = "", check: str = "") -> str:
    """An assignment, with the reason next to it and the doubt above."""
    above = textwrap.indent(textwrap.fill(CHECK + check, 94), "    # ") + "\n" if check else ""
    return f"{above}    {key} = {code}" + f"  # {why}" * bool(why)


def _find_sizes(log: Log) -> dict[str, Guess]:
    """Return the sizes of the funnel, from the requests of the sample."""
    names = {"a": "true", "s": log.shown or "false", "p": log.passed or "false"}
    counts = ", ".join(f"count(*) FILTER ({of}) {name}" for name, of in names.items())
    requests = f"(SELECT {counts} FROM candidates GROUP BY {log.request or 'rowid'})"
    most, top, kept = log.row("max(a)", "median(s)", "median(p)", source=requests)
    page = int(min(max(1, top or min(10, most // 4)), most))
    few = int(min(max(page, kept or max(most // 10, 2 * page)), most))
    report_at = {of for of in (page, few // 2, few, 2 * few) if page <= of <= most}
    doubt = "" if log.request else "no request is known; what are the sizes of yours?"
    return {
        "funnel.retrieved": Guess(most, "the largest request of the sample", doubt),
        "funnel.passed": Guess(few, "", "" if kept else "how many may the final ranker score?"),
        "funnel.shown": Guess(page, "", "" if top else "how many does a page show?"),
        "funnel.report_at": Guess(tuple(sorted(report_at))),
    }


def _config_lines(path: str, name: str, log: Log) -> list[str]:
    """Return the lines of the config of a log."""
    columns = _find_ids(log)
    columns["stage"], texts = _find_stage(log)
    labels, maybe = _find_labels(log)
    teacher, scores = _find_teacher(log, labels)
    log.facts["scored"] = bool(teacher)
    columns |= {role: _choose(role, log) for role in _FITS if role not in columns}
    used = {of.column for of in (*columns.values(), *labels.values(), *teacher.values())}
    unsure = {of for of in log.facts.index for role in columns.values() if repr(of) in role.check}
    item, time, version = (columns[of].column for of in ("item", "time", "teacher_version"))
    features = _find_features(log, used, item, {*maybe, *scores, *unsure})
    if teacher and not log.passed:
        log.passed = " OR ".join(f"{quoted(of.column)} IS NOT NULL" for of in teacher.values())
    if version not in ("", OPEN):
        version = log.row(f"mode({quoted(version)})::VARCHAR")[0]
    labels = labels or {"label": Guess("", "", _which("label, 0 or 1", maybe))}
    worth = [float((not teacher or of in teacher) and of not in NAMES["unwanted"]) for of in labels]
    worth = worth if any(worth) else [1.0] * len(worth)
    guesses = {
        "data.path": Guess(path),
        "data.title": Guess(name),
        "data.rows": log.layout,
        **{f"data.columns.{role}": of for role, of in columns.items()},
        "data.time_unit": Guess(log.facts.unit.get(time) or "s"),
        "data.split": Guess("time" if time else "request"),
        **{f"data.stages.{stage}": Guess(texts.get(stage, "")) for stage in STAGES if texts},
        "data.labels": Guess(ConfigDict()),
        **{f"data.labels.{task}": of for task, of in labels.items()},
        "data.teacher": Guess(ConfigDict()),
        **{f"data.teacher.{task}": of for task, of in teacher.items()},
        "data.teacher_version": Guess(version.strip(OPEN)),
        "teacher.source": Guess(
            "logged" if teacher else "live", "", _which("teacher", scores) if scores else ""
        ),
        "tasks": Guess(tuple(labels)),
        "value_weights": Guess(tuple(worth), "", "what is each task worth? 0 without a teacher"),
        **_find_sizes(log),
        "data.features": Guess(ConfigDict()),
    }
    named = {key: Guess(of, "named by you") for key, of in log.named.items() if key != "data.infer"}
    prefixes = {key: "" if key.startswith("data.") else "config." for key in guesses | named}
    lines = [
        _line(f"{prefixes[key]}{key}", _code(of), why, check)
        for key, (of, why, check) in (guesses | named).items()
    ]
    return [*lines, *features]


def write_first_config(log: Any, folder: Path, named: Mapping[str, Any]) -> FirstConfig:
    """Write a config for a log, a path or a table, into a folder; see `api.infer`."""
    is_path, name = isinstance(log, (str, Path)), "log"
    if is_path:  # the last part of the path without wildcards
        parts = [of for of in re.split(r"[/\\]+", str(log)) if of and not re.search(r"[*?\[]", of)]
        name = identifier(re.sub(r"\.\w+$", "", parts[-1])).lower() if parts else name
    file, copy = folder / f"{name}.py", folder / f"{name}.parquet"
    if old := [of for of in (file, copy) if of.exists() and not (of == copy and is_path)]:
        raise UserError(f"{old[0]} exists already; move it away, or give another --workdir")
    if is_path:
        path, (table, rows) = str(log), read_sample(str(log))
    else:
        table = arrow_of(log)
        path, rows = str(copy), table.num_rows
    for key, column in named.items():
        if key.startswith(("data.columns.", "data.labels.", "data.teacher.")) and column:
            check_choice(key, column, table.column_names)
    try:
        body = "\n".join(_config_lines(path, name, Log(table, named)))
    except duckdb.Error as error:
        raise UserError(f"data.path={path} cannot be read: {line_of(error)}") from error
    text = _TEMPLATE.format(name=name, read=table.num_rows, rows=rows, body=body)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_path:
        pq.write_table(table, path)
    file.write_text(text)
    commands = [f"{command('prepare')} --config={file}"]
    step = "train" if 'config.teacher.source = "logged"' in text else "train_teacher"
    commands.append(f"{command(step)} --config={file} --workdir=runs/{name}-{step}")
    return FirstConfig(file, text.count(CHECK), tuple(commands))
