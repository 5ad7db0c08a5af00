"""Writes a first config for a log, to edit: a Python file with each guess and its reason."""

import keyword
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.guess import ids, names, roles, sample
from kd_ranker.sources.logs.guess.feature_guesses import DEFAULT_SIZE, FeatureGuess, find_features
from kd_ranker.sources.logs.guess.funnel_sizes import FunnelSizes, Size, find_funnel_sizes
from kd_ranker.sources.logs.guess.ids import Guess
from kd_ranker.sources.logs.guess.roles import Roles

CHECK = "CHECK: "
_INDENT = " " * 4
_WIDTH = 100  # of a line, as `ruff format` is set here


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


def write_first_config(data: ConfigDict, folder: Path) -> FirstConfig:
    """Reads a part of the log at `data.path` and writes a config for it into `folder`.

    Columns that `data.columns` names other than the template does are taken as given.

    Raises:
      UserError: the file is there already, the log cannot be read, or requests or items cannot be
        told.
    """
    log = sample.read_footers(str(data.path))
    name = name_of_log(log.path)
    path = folder / f"{name}.py"
    if path.exists():
        raise UserError(f"{path} exists already; move it away, or give another --workdir")
    named = ids.columns_named_by_user(data.columns.to_dict(), log)
    text = config_text(name, log, named)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("x") as file:
        file.write(text)
    config, runs = f"--config={path}", f"runs/{name}"
    train = f"python -m experiments.train_teacher {config} --workdir={runs}/teacher"
    if 'config.teacher.source = "logged"' in text:
        train = f"python -m experiments.train {config} --workdir={runs}/student"
    commands = (f"python -m experiments.prepare_data {config}", train)
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
    # A file of this name beside the configs would hide the template.
    if keyword.iskeyword(name) or name in ("parquet", "defaults"):
        return f"{name}_log"
    return f"c_{name}" if name[0].isdigit() else name


def config_text(name: str, log: sample.LogFooters, named: Mapping[str, str]) -> str:
    """The config of a log, as Python."""
    read = sample.read_sample(log)
    facts, guesses = ids.find_facts(log, read, named)
    guessed = roles.find_roles(facts, guesses, named)
    features = find_features(facts, guessed)
    funnel = find_funnel_sizes(facts, guessed)
    what = "rows, a candidate each," if read.rows == sample.CANDIDATE_ROWS else "requests"
    files = ids.counted(len(log.files), "file")
    head = [
        f'"""A first config for the log {name!r}, to edit: what its columns seem to be, and why.',
        "",
        f"Guessed from {read.file_rows:,} of {log.num_rows:,} {what} in {files}.",
        "What is doubtful stands below CHECK, with what else it may be.",
        '"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from configs import parquet",
        "",
        "",
        'def get_config(variant: str = "") -> ConfigDict:',
        '    """The template, with what was guessed of this log."""',
        "    config = parquet.get_config(variant)",
        "    data = config.data",
    ]
    sections = [
        _log_section(log, read, guessed),
        _columns_section(guessed),
        _tasks_section(guessed),
        _teacher_section(guessed),
        _features_section(features),
        _left_out_section(features),
        _funnel_section(funnel),
    ]
    body = []
    for section in sections:
        body += [*section, ""] if section else []
    return "\n".join([*head, *body, f"{_INDENT}return config", ""])


def _log_section(log: sample.LogFooters, read: sample.Sample, guessed: Roles) -> list[str]:
    files = ids.counted(len(log.files), "file")
    split = '"time"' if guessed.columns["time"].column else '"request"'
    share = (
        f"the last {0.1:.0%} for the test, those before for validation"
        if split == '"time"'
        else "no time is known"
    )
    return [
        *_line("data.path", quoted(log.path), f"{files}, {log.num_rows:,} rows"),
        *_line("data.rows", quoted(read.rows), read.why_rows, read.check_rows),
        *_line("data.split", split, share),
    ]


def _columns_section(guessed: Roles) -> list[str]:
    lines = []
    for role in guessed.columns:
        lines += _guess(f"data.columns.{role}", guessed.columns[role])
    unit = guessed.time_unit
    lines += _line("data.time_unit", quoted(unit.column), unit.why, unit.check)
    if guessed.columns["stage"].column:
        why, check = guessed.stages_guess.why, guessed.stages_guess.check
        for stage, text in guessed.stages.items():
            lines += _line(f"data.stages.{stage}", quoted(text), why, check)
            why = check = ""
    return lines


def _tasks_section(guessed: Roles) -> list[str]:
    tasks = list(guessed.labels)
    lines = _line("data.labels", "ConfigDict()", "task: its column")
    for task in tasks:
        lines += _guess(f"data.labels.{task}", guessed.labels[task])
    check = "" if tasks else "no column looks like a label, 0 or 1: name one, data.labels.TASK"
    lines += _line("config.tasks", tuple_text(map(quoted, tasks)), "", check)
    weights = ["0.0" if task in names.UNWANTED else "1.0" for task in tasks]
    check = "what each task is worth to the feed"
    if "0.0" in weights:
        check += "; nothing, for what users do to be rid of an item"
    return lines + _line("config.value_weights", tuple_text(weights), "", check if tasks else "")


def _teacher_section(guessed: Roles) -> list[str]:
    why = "task: its column" if guessed.teacher else "no column looks like a teacher's"
    lines = _line("data.teacher", "ConfigDict()", why)
    for task, guess in guessed.teacher.items():
        lines += _guess(f"data.teacher.{task}", guess)
    if not guessed.teacher:
        return lines + _line("config.teacher.source", '"live"', "a teacher is to be trained first")
    what = {"probability": "these columns hold probabilities", "rank": "they hold positions"}
    signal = guessed.teacher_signal
    lines += _line("data.teacher_signal", quoted(signal), what[signal])
    lines += _guess("data.teacher_version", guessed.teacher_version)
    return lines + _line("config.teacher.source", '"logged"', "or live: one that is trained here")


def _features_section(features: Sequence[FeatureGuess]) -> list[str]:
    lines = _line("data.features", "ConfigDict()", "what rankers may read")
    for feature in features:
        if not feature.left_out:
            lines += _line(_key(feature), _feature_code(feature), feature.why, feature.check)
    return lines


def _left_out_section(features: Sequence[FeatureGuess]) -> list[str]:
    left_out = [feature for feature in features if feature.left_out]
    lines = [f"{_INDENT}# Left out, and why."] if left_out else []
    for feature in left_out:
        guess = f"# {_key(feature)} = {_feature_call(feature)}" if feature.kind else ""
        guess = guess or f"# {_key(feature)}, of column {feature.column!r}"
        lines += [*_comment(feature.left_out), f"{_INDENT}{guess}"]
    return lines


def _key(feature: FeatureGuess) -> str:
    return f"data.features.{feature.name}"


def _arguments(feature: FeatureGuess) -> list[str]:
    arguments = [quoted(feature.of), quoted(feature.kind)]
    if feature.column != feature.name:
        arguments.append(f"column={quoted(feature.column)}")
    if feature.hashed:
        arguments.append("hashed=True")
    if feature.size != DEFAULT_SIZE:
        arguments.append(f"size={feature.size:_}")
    if feature.length != 1:
        arguments.append(f"length={feature.length}")
    return arguments


def _feature_call(feature: FeatureGuess) -> str:
    return f"parquet.feature({', '.join(_arguments(feature))})"


def _feature_code(feature: FeatureGuess) -> str:
    code = _feature_call(feature)
    if len(f"{_INDENT}{_key(feature)} = {code}") <= _WIDTH:
        return code
    return _exploded("parquet.feature(", _arguments(feature))


def _funnel_section(funnel: FunnelSizes) -> list[str]:
    return [
        *_size("config.funnel.retrieved", funnel.retrieved),
        *_size("config.funnel.passed", funnel.passed),
        *_size("config.funnel.shown", funnel.shown),
        *_line("config.funnel.report_at", tuple_text(map(str, funnel.report_at)), ""),
        *_size("config.batch.candidates", funnel.candidates),
        *_size("config.teacher.batch.candidates", funnel.teacher_candidates),
    ]


def _guess(key: str, guess: Guess) -> list[str]:
    return _line(key, quoted(guess.column), guess.why, guess.check)


def _size(key: str, size: Size) -> list[str]:
    return _line(key, str(size.number), size.why, size.check)


def _line(key: str, code: str, why: str, check: str = "") -> list[str]:
    """An assignment, its reason beside it or above it, and above both what to check."""
    line = f"{_INDENT}{key} = {code}"
    if len(line) > _WIDTH and "\n" not in code and len(code) + 2 * len(_INDENT) <= _WIDTH:
        line = f"{_INDENT}{key} = (\n{2 * _INDENT}{code}\n{_INDENT})"
    above = _comment(f"{CHECK}{check}") if check else []
    beside = f"{line}  # {why}"
    if why and "\n" not in line and len(beside) <= _WIDTH:
        return [*above, beside]
    return [*(_comment(why) if why else []), *above, line]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{_INDENT}# ",
        subsequent_indent=f"{_INDENT}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def quoted(text: str) -> str:
    """Text as Python, in the quotes that need fewer escapes, double ones first.

    >>> print(quoted("a"), quoted('say "a"'), quoted("it's"))
    "a" 'say "a"' "it's"
    """
    quote = "'" if text.count('"') > text.count("'") else '"'
    # The escapes of repr are needed in any quotes; the quotes themselves are put in afterwards.
    inner = repr(text.replace('"', "").replace("'", ""))[1:-1]
    if '"' not in text and "'" not in text:
        return f'"{inner}"'
    parts = re.split("([\"'])", text)
    escaped = [
        (f"\\{part}" if part == quote else part) if part in ("'", '"') else repr(part)[1:-1]
        for part in parts
    ]
    return f"{quote}{''.join(escaped)}{quote}"


def tuple_text(elements: Iterable[str]) -> str:
    """A tuple as Python, in one line where that leaves room for a key.

    >>> tuple_text(["1"]), tuple_text([])
    ('(1,)', '()')
    """
    elements = list(elements)
    one = f"({', '.join(elements)}{',' * (len(elements) == 1)})"
    longest_key = len("config.teacher.batch.candidates") + len(_INDENT)
    return one if len(one) + longest_key <= _WIDTH else _exploded("(", elements)


def _exploded(opening: str, elements: Sequence[str]) -> str:
    lines = [f"{2 * _INDENT}{element}," for element in elements]
    return "\n".join([opening, *lines, f"{_INDENT})"])
