"""Writes a first config for a log, to edit: a Python file with each guess and its reason."""

import difflib
import keyword
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.duckdb_engine import open_duckdb
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.features import FeatureGuess, find_features
from kd_ranker.sources.logs.guess.funnel import find_sizes
from kd_ranker.sources.logs.guess.ids import find_ids
from kd_ranker.sources.logs.guess.roles import Roles, find_roles
from kd_ranker.sources.logs.guess.rules import Guess, counted
from kd_ranker.sources.logs.guess.sample import (
    REQUEST_ROWS,
    Footers,
    Sample,
    open_log,
    read_sample,
)

CHECK = "CHECK: "
_INDENT = " " * 4
_WIDTH = 100  # of a line, as `ruff format` is set here
_LONGEST = "config.teacher.batch.candidates"  # of all keys but those of features
_TEMPLATE = '''"""A first config for the log {name}, to edit: what its columns seem to be, and why.

Guessed from {read} in {files}.
What is doubtful stands below CHECK, with what else it may be.
"""

from ml_collections import ConfigDict

from kd_ranker import configs


def get_config(variant: str = "") -> ConfigDict:
    """The template, with what was guessed of this log."""
    config = configs.parquet(variant)
    data = config.data
{body}

    return config
'''


class FirstConfig(NamedTuple):
    """A config file that was written.

    Attributes:
      path: the file.
      num_checks: how many of its guesses are doubtful.
      next_commands: the commands to run next.
    """

    path: Path
    num_checks: int
    next_commands: tuple[str, ...]


def write_first_config(config: ConfigDict, folder: Path) -> FirstConfig:
    """Reads a part of the log at `config.data.path` and writes a config for it into `folder`.

    Columns that `config.data.columns` names other than the template does are taken as given.

    Raises:
      UserError: the file is there already, the log cannot be read, or requests or items cannot be
        told.
    """
    footers = open_log(str(config.data.path))
    name = name_of_log(footers.log.url)
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path} exists already; move it away, or give another --workdir")
    text = config_text(name, footers, config)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("x") as file:
        file.write(text)
    flag, runs = f"--config={path}", f"runs/{name}"
    train = f"python -m experiments.train_teacher {flag} --workdir={runs}/teacher"
    if 'config.teacher.source = "logged"' in text:
        train = f"python -m experiments.train {flag} --workdir={runs}/student"
    commands = (f"python -m experiments.prepare_data {flag}", train)
    return FirstConfig(path, text.count(CHECK), commands)


def name_of_log(path: str) -> str:
    """A name for a log: the last part of its path that is no pattern.

    >>> name_of_log("/logs/My-Feed/2024/*.parquet"), name_of_log("s3://bucket/feed.parquet")
    ('c_2024', 'feed')
    >>> name_of_log("*.parquet")
    'log'
    """
    parts = [part for part in re.split(r"[/\\]+", path) if part and not re.search(r"[*?\[]", part)]
    stem = re.sub(r"\.(parquet|pq)$", "", parts[-1]) if parts else ""
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower() or "log"
    if keyword.iskeyword(name):
        return f"{name}_log"
    return f"c_{name}" if name[0].isdigit() else name


def _named_by_user(columns: Mapping[str, str], footers: Footers) -> dict[str, str]:
    """The columns that a user has named, by role: those unlike the template's.

    Raises:
      UserError: the log has no such column.
    """
    named = {role: of for role, of in columns.items() if of and of != names.SYNONYMS[role][0]}
    for role, column in named.items():
        if column not in footers.types:
            close = difflib.get_close_matches(column, footers.types, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"data.columns.{role}={column!r} is no column of {footers.log.url}; {hint}it has: "
                f"{footers.type_names()}"
            )
    return named


def config_text(name: str, footers: Footers, config: ConfigDict) -> str:
    """The config of a log, as Python, on top of the template `config`."""
    named = _named_by_user(config.data.columns.to_dict(), footers)
    data = config.data
    with (
        tempfile.TemporaryDirectory() as folder,
        open_duckdb(data.memory, data.processes, Path(folder)) as engine,
    ):
        read = read_sample(engine, footers)
        log = find_ids(engine, footers, read, named)
        roles = find_roles(log, named)
        features = find_features(log, roles)
        sizes = find_sizes(log, roles, config)
    what = "requests" if read.rows == REQUEST_ROWS else "rows, a candidate each,"
    sections = [
        _log_lines(footers, read, roles),
        _columns_lines(roles),
        _tasks_lines(roles),
        _teacher_lines(roles),
        _features_lines(features),
        _left_out_lines(features),
        [_line(key, _code(of.number), of.why, of.check) for key, of in sizes.items()],
    ]
    return _TEMPLATE.format(
        name=repr(name),
        read=f"{read.file_rows:,} of {footers.num_rows:,} {what}",
        files=counted(len(footers.log.files), "file"),
        body="\n\n".join("\n".join(lines) for lines in sections if lines),
    )


def _log_lines(footers: Footers, read: Sample, roles: Roles) -> list[str]:
    files = counted(len(footers.log.files), "file")
    timed = bool(roles.columns["time"].column)
    share = "the last 10% for the test, those before for validation"
    return [
        _line("data.path", quoted(footers.log.url), f"{files}, {footers.num_rows:,} rows"),
        _line("data.rows", quoted(read.rows), read.why_rows, read.check_rows),
        _line("data.split", *(('"time"', share) if timed else ('"request"', "no time is known"))),
    ]


def _columns_lines(roles: Roles) -> list[str]:
    lines = [_guess(f"data.columns.{role}", guess) for role, guess in roles.columns.items()]
    lines.append(_guess("data.time_unit", roles.time_unit))
    return lines + [_guess(f"data.stages.{stage}", of) for stage, of in roles.stages.items()]


def _tasks_lines(roles: Roles) -> list[str]:
    tasks = list(roles.labels)
    unwanted = {task for task in tasks if names.is_unwanted(task)}
    unscored = {task for task in tasks if roles.teacher and task not in roles.teacher}
    weights = tuple(0.0 if task in unwanted | unscored else 1.0 for task in tasks)
    worth = "what each task is worth to the feed" * bool(tasks)
    worth += "; nothing, for what users do to be rid of an item" * bool(unwanted)
    worth += "; nothing, for tasks that the log's teacher has not scored" * bool(unscored)
    none = "no column looks like a label, 0 or 1: name one, data.labels.TASK" * (not tasks)
    return [
        _line("data.labels", "ConfigDict()", "task: its column"),
        *(_guess(f"data.labels.{task}", guess) for task, guess in roles.labels.items()),
        _line("config.tasks", _code(tuple(tasks)), "", none),
        _line("config.value_weights", _code(weights), "", worth),
    ]


def _teacher_lines(roles: Roles) -> list[str]:
    if not roles.teacher:
        return [
            _line("data.teacher", "ConfigDict()", "no column looks like a teacher's"),
            _line("config.teacher.source", '"live"', "a teacher is to be trained first"),
        ]
    is_rank = roles.teacher_signal == "rank"
    what = "these columns hold positions" if is_rank else "these columns hold probabilities"
    loss = _line("config.distill.loss", '"softmax"', "positions are an order: no probabilities")
    return [
        _line("data.teacher", "ConfigDict()", "task: its column"),
        *(_guess(f"data.teacher.{task}", guess) for task, guess in roles.teacher.items()),
        _line("data.teacher_signal", quoted(roles.teacher_signal), what),
        *([loss] if is_rank else []),
        _guess("data.teacher_version", roles.teacher_version),
        _line("config.teacher.source", '"logged"', "or live: one that is trained here"),
    ]


def _features_lines(features: Sequence[FeatureGuess]) -> list[str]:
    lines = [_line("data.features", "ConfigDict()", "what rankers may read")]
    for feature in features:
        if not feature.left_out:
            key = f"data.features.{feature.name}"
            code = _call("configs.feature(", _arguments(feature), key=key)
            lines.append(_line(key, code, feature.why, feature.check))
    return lines


def _left_out_lines(features: Sequence[FeatureGuess]) -> list[str]:
    lines = []
    for feature in features:
        if feature.left_out:
            guess = f", of column {feature.column!r}"
            if feature.arguments:
                guess = f" = configs.feature({', '.join(_arguments(feature))})"
            lines += _comment(feature.left_out)
            lines.append(f"{_INDENT}# data.features.{feature.name}{guess}")
    return [f"{_INDENT}# Left out, and why.", *lines] if lines else []


def _arguments(feature: FeatureGuess) -> list[str]:
    (_, of), (_, kind), *rest = feature.arguments.items()
    if feature.column != feature.name:
        rest.insert(0, ("column", feature.column))
    return [_code(of), _code(kind), *(f"{key}={_code(value)}" for key, value in rest)]


def _guess(key: str, guess: Guess) -> str:
    return _line(key, quoted(guess.column), guess.why, guess.check)


def _line(key: str, code: str, why: str = "", check: str = "") -> str:
    """An assignment, its reason beside it or above it, and above both what to check."""
    line = f"{_INDENT}{key} = {code}"
    if len(line) > _WIDTH and "\n" not in code and len(code) + 2 * len(_INDENT) <= _WIDTH:
        line = f"{_INDENT}{key} = (\n{2 * _INDENT}{code}\n{_INDENT})"
    above = _comment(f"{CHECK}{check}")
    beside = f"{line}  # {why}"
    if why and "\n" not in line and len(beside) <= _WIDTH:
        return "\n".join([*(above if check else []), beside])
    return "\n".join([*_comment(why), *(above if check else []), line])


def _comment(text: str) -> list[str]:
    hash_ = f"{_INDENT}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=hash_, subsequent_indent=hash_,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _code(value: Any) -> str:
    """A value as Python, in the lines that `ruff format` would make of it.

    >>> _code(1), _code(100_000), _code(("a",)), _code(())
    ('1', '100_000', '("a",)', '()')
    """
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, tuple):
        return _call("(", [_code(each) for each in value], ",)" if len(value) == 1 else ")")
    is_long = isinstance(value, int) and value >= 10_000
    return f"{value:_}" if is_long else repr(value)


def _call(opening: str, arguments: Sequence[str], closing: str = ")", key: str = _LONGEST) -> str:
    """A call, or a tuple, in one line where that leaves room for a key, else a line each."""
    one = f"{opening}{', '.join(arguments)}{closing}"
    if len(f"{_INDENT}{key} = {one}") <= _WIDTH:
        return one
    return "\n".join([opening, *(f"{2 * _INDENT}{each}," for each in arguments), f"{_INDENT})"])


def quoted(text: str) -> str:
    """Text as Python, in the quotes that need fewer escapes, double ones first.

    >>> print(quoted("a"), quoted('say "a"'), quoted("it's"))
    "a" 'say "a"' "it's"
    """
    if text.count('"') > text.count("'"):
        return repr(text)
    # After a single quote, repr puts double ones around what has none of these.
    parts = (repr(f"'{part}")[2:-1] for part in text.split('"'))
    return '"' + '\\"'.join(parts) + '"'
