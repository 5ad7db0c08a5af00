"""Write a first config for a log, from the names of its columns and facts about their values.

A role needs a name of `names.json` and values that fit. Where only the values fit, without a rival,
the config proposes the column below a CHECK. Otherwise the role stays open: the config names the
two likeliest columns, and `prepare_data` reports it as missing. A file imports only those above it:

* `words` compares names. `guess` holds what is guessed.
* `nested` finds objects, and texts that are lists. `several_tables` joins those of a folder, by the
  `same_ids`. `sample` reads rows and their facts.
* `by_name` and `by_structure` find the roles that names and values settle; `markers`, between them,
  finds numbers that mean none. `roles` decides.
* `features` finds features; `funnel` counts its sizes. `config_text` writes the config.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from kd_ranker.errors import UserError, command
from kd_ranker.sources.logs.files import line_of
from kd_ranker.sources.logs.infer.by_structure import follow_in_time
from kd_ranker.sources.logs.infer.config_text import text_of_config
from kd_ranker.sources.logs.infer.features import find_features
from kd_ranker.sources.logs.infer.funnel import count_funnel
from kd_ranker.sources.logs.infer.guess import CHECK, Guess, Roles
from kd_ranker.sources.logs.infer.roles import (
    check_clashes,
    check_named_columns,
    find_roles,
    find_signal,
    find_written_after,
)
from kd_ranker.sources.logs.infer.sample import Sample
from kd_ranker.sources.logs.infer.words import NAMES, identifier
from kd_ranker.sources.logs.layout import OPEN, TIME_UNITS

# Share of candidates with a time that is not wrong by chance.
_OFTEN = 0.01
# Keys that say where the log is.
_OF_LOG = ("data.infer", "data.path", "data.sql")


class FirstConfig(NamedTuple):
    """A config file, what it holds, and the commands to run next."""

    path: Path
    num_checks: int  # lines to confirm or to edit
    num_features: int
    num_left_out: int
    next_commands: tuple[str, ...]

    def __str__(self) -> str:
        """Return what to do next."""
        counts = (
            f"{_count(self.num_checks, 'line needs', 'lines need')} you (CHECK); "
            f"{_count(self.num_features, 'column', 'columns')} became features: is each known "
            f"before the final ranker runs? {_count(self.num_left_out, 'was', 'were')} left out: "
            "read why. Then"
        )
        commands = [f"    {next_command}" for next_command in self.next_commands]
        return "\n".join([f"config: {self.path}", counts, *commands])


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


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
    check_clashes(by_key)
    try:
        sample = Sample(path, by_key, sections)
        check_named_columns(sample)
        roles = find_roles(sample)
        guesses = _guess_keys(path, name, sample, roles)
    except duckdb.Error as error:
        log = f"data.path={path}" if path else "data.sql"
        raise UserError(f"{log} cannot be read: {line_of(error)}") from error
    of_roles = [guess.check for key, guess in guesses.items() if key not in _OF_LOG]
    checks = " ".join([roles.teacher_doubt, *of_roles])
    doubtful = [column for column in sample.facts.index if repr(column) in checks]
    written_after = find_written_after(sample, roles.used())
    inferred = find_features(sample, roles, doubtful, written_after)
    has_unshown = bool(sample.shown.any() and not sample.shown.all())
    text = text_of_config(
        name, len(sample.codes), guesses, inferred, roles.teacher_doubt, has_unshown
    )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    run = f"{command('run')} --config={file} --workdir=runs/{name}"
    return FirstConfig(
        path=file,
        num_checks=text.count(CHECK),
        num_features=len(inferred.features),
        num_left_out=len(inferred.left_out),
        next_commands=(f"{command('prepare')} --config={file}", run),
    )


def _guess_keys(path: str, name: str, sample: Sample, roles: Roles) -> dict[str, Guess]:
    """Return the guesses by key of the config, without features; defaults are left out."""
    guesses = {"data.path": Guess(path)}
    if sample.sql:
        guesses = {"data.sql": _guess_select(sample, roles.column("time"))}
    guesses["data.title"] = Guess(name)
    rows = sample.layout.guess
    if rows.value != "candidate" or rows.check:
        guesses["data.rows"] = rows
    sections = {
        "columns": {role: guess for role, guess in roles.columns.items() if guess != Guess("")},
        "stages": roles.stages,
        "labels": roles.labels,
        "teacher": roles.teacher,
    }
    for section, its_guesses in sections.items():
        for key, guess in its_guesses.items():
            guesses[f"data.{section}.{key}"] = guess
    guesses |= _guess_how_times_are_written(sample, roles.column("time"))
    if signal := find_signal(sample, roles):
        guesses["data.teacher_signal"] = signal
        guesses["distill.loss"] = Guess("softmax", "takes the order of scores, not probabilities")
    if version := roles.columns.get("teacher_version"):
        guesses |= _guess_version(sample, version, roles.column("time"))
    guesses["tasks"] = Guess(tuple(roles.labels))
    # A partial teacher knows no value of the others.
    valued = {task for task, guess in roles.teacher.items() if guess.value} or {*roles.labels}
    worth = tuple(float(task in valued - {*NAMES["unwanted"]}) for task in roles.labels)
    if not any(worth):
        worth = (1.0,) * len(worth)
    doubt = (
        "what is each task worth? 0 for a task that the teacher does not predict"
        if len(worth) > 1
        else ""
    )
    guesses["value_weights"] = Guess(worth, "", doubt)
    guesses |= count_funnel(sample, roles).guesses()
    guesses |= {key: Guess(value) for key, value in sample.named.items() if key not in _OF_LOG}
    return guesses


def _guess_select(sample: Sample, time: str) -> Guess:
    is_for_values = "data.sql" not in sample.named and not sample.doubt_of_tables
    why = "in place of the path, for its values" if is_for_values else ""
    none = [f"{number} in {column!r}" for column, number in sample.markers.items()]
    doubts = []
    if sample.doubt_of_tables:
        doubts.append(sample.doubt_of_tables)
        if late := _later_than_requests(sample, time):
            doubts.append(
                f"Times in {late[0]!r} are later than the requests: which columns of its table "
                "hold what came after? Leave them out."
            )
    if sample.unnested:
        doubts.append(f"is each object in {sample.unnested!r} a candidate?")
    if none:
        doubts.append(f"does this mean none: {', '.join(none)}?")
    return Guess(sample.sql, why, " ".join(doubts))


def _later_than_requests(sample: Sample, time: str) -> list[str]:
    """Return the times of an item or a user that are often later than the request."""
    if not time:
        return []
    facts = sample.facts
    is_of_owner = (facts["item"] == 1) | (facts["user"] == 1)
    requested = sample.seconds(time) / TIME_UNITS[facts["unit"][time] or "s"]
    return [
        str(column)
        for column in facts.index[is_of_owner & (facts["kind"] == "time")]
        if (sample.seconds(column) > requested).mean() > _OFTEN
    ]


def _guess_version(sample: Sample, column: Guess, time: str) -> dict[str, Guess]:
    """Return the version of the teacher that counts: all that follow each other, or the usual one.

    The test is at the end of a log, where only the last version may be.
    """
    if column.value in ("", OPEN):
        return {}
    texts = sample.texts(column.value)
    if time and follow_in_time(sample, column.value, time):
        last = sample.seconds(time).groupby(texts).median().idxmax()
        doubt = f"all versions count; or only the last one, {last!r}?"
        return {"data.teacher_version": Guess("", "", doubt)}
    usual = next(iter(texts.mode()), "")
    doubt = "only this version counts; or '' for all?" if texts.nunique() > 1 else ""
    return {"data.teacher_version": Guess(usual, "", doubt)}


def _guess_how_times_are_written(sample: Sample, column: str) -> dict[str, Guess]:
    unit = sample.facts["unit"].get(column)
    if unit and unit != "s":
        return {"data.time_unit": Guess(unit)}
    if formats := sample.time_formats.get(column):
        doubt = f"or {formats[1]!r}, which fits as well?" if len(formats) > 1 else ""
        return {"data.time_format": Guess(formats[0], "", doubt)}
    return {}


def _name_of(path: str) -> str:
    """Return a name for the log at a path: the last part without wildcards."""
    parts = [part for part in re.split(r"[/\\]+", path) if part and not re.search(r"[*?\[]", part)]
    return identifier(re.sub(r"\.\w+$", "", parts[-1])).lower() if parts else "log"
