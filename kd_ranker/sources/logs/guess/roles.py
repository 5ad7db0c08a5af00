"""Roles of the columns of a log: ids, time, stage, labels, the values of a teacher."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int8

from kd_ranker.sources.logs.guess import evidence, names
from kd_ranker.sources.logs.guess.column import (
    Column,
    distinct_in_rows,
    is_binary,
    is_known_where,
    may_be_time,
    time_unit_of,
    value_text,
)
from kd_ranker.sources.logs.guess.ids import NONE, Facts, Fit, Guess, best_guess, said_by_name
from kd_ranker.sources.logs.guess.labels import (
    find_labelled,
    find_scores,
    guess_labels,
    guess_teacher,
)
from kd_ranker.sources.logs.guess.stages import find_shown, guess_stage

_WEIGHTS = ("label_weight", "teacher_weight")


class Roles(NamedTuple):
    """The roles of the columns of a log.

    Attributes:
      columns: role -> its column, for the keys of `config.data.columns`.
      time_unit: of an integer time column.
      stages: stage -> its text in the stage column, "" for none.
      stages_guess: the reason for these, and a doubt.
      level: the `Stage` of each candidate, 0 where unknown; None without a stage column.
      shown: True for candidates that were shown; None if the log does not tell them apart.
      labels: task -> its column.
      teacher: task -> its column.
      teacher_signal: "probability" or "rank".
      teacher_version: the version that counts.
      left_out: column that has no role and is not for a ranker to read -> the reason.
    """

    columns: dict[str, Guess]
    time_unit: Guess
    stages: dict[str, str]
    stages_guess: Guess
    level: Int8[np.ndarray, "rows"] | None
    shown: Bool[np.ndarray, "rows"] | None
    labels: dict[str, Guess]
    teacher: dict[str, Guess]
    teacher_signal: str
    teacher_version: Guess
    left_out: dict[str, str]

    def used(self) -> set[str]:
        """The columns that have a role."""
        guesses = [*self.columns.values(), *self.labels.values(), *self.teacher.values()]
        return {guess.column for guess in guesses if guess.column}


def find_roles(facts: Facts, ids: Mapping[str, Guess], named: Mapping[str, str]) -> Roles:
    """Finds the roles of all other columns.

    Args:
      facts: of the sample.
      ids: the guesses of "request", "item" and "user".
      named: role -> the column that the user has named.
    """
    taken = {guess.column for guess in ids.values()}
    time = _guess_time(facts, taken, named)
    taken.add(time.column)
    left = {name: column for name, column in facts.of_candidate().items() if name not in taken}
    binary = {name: column for name, column in left.items() if _may_be_label(facts, column)}
    stage, stages, stages_guess, level = guess_stage(facts, left, binary, named)
    binary.pop(stage.column, None)
    shown = find_shown(facts, binary, level)
    position = _guess_position(facts, left, shown, named)
    if not stage.column and not _suits_shown(facts, position, shown, named):
        # Without a stage, candidates with a position count as shown.
        position = NONE
    left_out: dict[str, str] = {}
    scores = find_scores(facts, {name: c for name, c in left.items() if name not in binary})
    labels = guess_labels(facts, binary, scores, shown, left_out)
    if shown is None:
        shown = find_labelled(facts, labels)
    teacher, signal = guess_teacher(facts, left, labels, scores, shown, left_out)
    used = {guess.column for guess in (*labels.values(), *teacher.values(), stage)} | taken
    if position.column in used:
        position = NONE
    used.add(position.column)
    if not stage.column and shown is None:
        check = "no candidate lacks its labels: was each of them shown?"
        stage = stage._replace(check=check)
    columns = {
        **{role: ids[role] for role in ("request", "user", "item")},
        "time": time,
        "stage": stage,
        "position": position,
        **_guess_rest(facts, used, named, bool(teacher)),
    }
    return Roles(
        columns=columns,
        time_unit=_guess_time_unit(facts, time.column),
        stages=stages,
        stages_guess=stages_guess,
        level=level,
        shown=shown,
        labels=labels,
        teacher=teacher,
        teacher_signal=signal,
        teacher_version=_most_frequent(facts, columns["teacher_version"].column),
        left_out=left_out,
    )


def _guess_rest(
    facts: Facts, used: set[str], named: Mapping[str, str], has_teacher: bool
) -> dict[str, Guess]:
    """The roles that only a name can tell: the label weight, a teacher's version and weight."""
    tests = {
        "label_weight": _may_be_weight(facts),
        "teacher_version": _may_be_version(facts),
        "teacher_weight": _is_nowhere_negative,
    }
    return {
        role: _guess_by_name(facts, role, used, named, may_be)
        if has_teacher or role == "label_weight"
        else NONE
        for role, may_be in tests.items()
    }


def _may_be_label(facts: Facts, column: Column) -> bool:
    """True for zeros and ones; those of items are features of theirs, unless called a label."""
    if any(names.match(column.name, names.SYNONYMS[role]) == 2 for role in _WEIGHTS):
        return False
    if names.task_of_label(column.name)[1]:
        return is_binary(column, nonsense=0.05)
    return is_binary(column) and not facts.is_of_item(column)


def _guess_time(facts: Facts, taken: set[str], named: Mapping[str, str]) -> Guess:
    if "time" in named:
        return Guess(named["time"], "named by you")
    fits = []
    for name, column in facts.columns.items():
        is_number = column.kind in ("integer", "float")
        if name in taken or not (is_number or column.kind == "time") or column.distinct < 2:
            continue
        by_name, looks = names.match(name, names.SYNONYMS["time"]), may_be_time(column)
        if not by_name and not looks:
            continue
        of_request = name in facts.of_request
        score = 1.5 * by_name + 2 * looks + 2 * of_request
        # A time of an item or a user is when these came to be.
        if not of_request and facts.is_of_item(column):
            score -= 2
        score -= 2 * facts.is_of_user(name)
        why = said_by_name(name, "time") + ("dates of this century" if looks else "numbers")
        why += "; constant within a request" if of_request else "; differs within a request"
        fits.append(Fit(name, score, column.distinct, why))
    fits = [fit for fit in fits if fit.score >= 3]
    if not fits:
        return Guess("", "no column looks like the time of a request", "name the column")
    return best_guess(fits, lambda fit: False, least=4)


def _guess_time_unit(facts: Facts, name: str) -> Guess:
    if not name:
        return Guess("s", "there is no time column")
    column = facts.columns[name]
    if column.kind == "time":
        return Guess("s", f"without effect: a {facts.log.types[name]} says its unit itself")
    lowest, highest = np.nanquantile(column.numbers, [0, 1])
    span = f"{name!r} goes from {lowest:.0f} to {highest:.0f}"
    if unit := time_unit_of(column):
        return Guess(unit, f"{span}: since 1970, this is a day of this century")
    return Guess("s", span, "or 'ms', 'us': these numbers are no dates of this century")


def _guess_position(
    facts: Facts,
    left: Mapping[str, Column],
    shown: Bool[np.ndarray, "rows"] | None,
    named: Mapping[str, str],
) -> Guess:
    """The column of the place where a candidate stood on the page."""
    if "position" in named:
        return Guess(named["position"], "named by you")
    fits = []
    for name, column in left.items():
        if column.kind not in ("integer", "float") or not column.is_whole or is_binary(column):
            continue
        by_name = names.match(name, names.SYNONYMS["position"])
        if not by_name and names.teacher_match(name, "", is_rank=True):
            continue
        share = evidence.permutation_share(column.numbers, facts.request)
        of_shown = shown is not None and not shown.all() and is_known_where(column, shown)
        score = 2.0 * by_name + 2 * (share > 0.9) + 2 * of_shown
        if share < 0.5 and by_name < 2:
            continue
        why = f"{said_by_name(name, 'position')}counts from 0 or 1 in {share:.0%} of requests"
        why += "; known where shown" if of_shown else ""
        fits.append(Fit(name, score, 0, why))
    fits = [fit for fit in fits if fit.score >= 4]
    return best_guess(fits, lambda fit: False, least=4) if fits else NONE


def _suits_shown(
    facts: Facts,
    position: Guess,
    shown: Bool[np.ndarray, "rows"] | None,
    named: Mapping[str, str],
) -> bool:
    if not position.column or "position" in named or shown is None:
        return True
    return not facts.columns[position.column].known[~shown].any()


def _guess_by_name(
    facts: Facts,
    role: str,
    used: Iterable[str],
    named: Mapping[str, str],
    may_be: Callable[[Column], bool],
) -> Guess:
    """A role that only a name can tell; the values may speak against it."""
    if role in named:
        return Guess(named[role], "named by you")
    synonyms: Sequence[str] = names.SYNONYMS[role]
    fits = [
        Fit(name, names.match(name, synonyms), -_place(name, synonyms), "its name")
        for name, column in facts.columns.items()
        if name not in used and names.match(name, synonyms) == 2 and may_be(column)
    ]
    return best_guess(fits, lambda fit: False, least=0) if fits else NONE


def _place(name: str, synonyms: Sequence[str]) -> int:
    return next(i for i, synonym in enumerate(synonyms) if names.match(name, [synonym]) == 2)


def _is_nowhere_negative(column: Column) -> bool:
    numbers = column.value_numbers
    return column.kind in ("bool", "integer", "float") and not (numbers < 0).any()


def _may_be_weight(facts: Facts) -> Callable[[Column], bool]:
    return lambda column: _is_nowhere_negative(column) and not facts.is_of_item(column)


def _may_be_version(facts: Facts) -> Callable[[Column], bool]:
    """Tests of a version; that of an item or a user is one of something else, of a phone, say."""

    def may_be(column: Column) -> bool:
        is_name = column.kind in ("bool", "integer", "string") and column.distinct <= 100
        return is_name and not (facts.is_of_item(column) or facts.is_of_user(column.name))

    return may_be


def _most_frequent(facts: Facts, name: str) -> Guess:
    if not name:
        return Guess("", "no version is told apart")
    column = facts.columns[name]
    counts = np.bincount(column.code[column.known], minlength=column.distinct)
    if not counts.any():
        return Guess("", "no version is known")
    most = int(counts.argmax())
    share = counts[most] / counts.sum()
    others = [value_text(column, code) for code in np.argsort(-counts).tolist() if code != most][:3]
    check = ""
    if share < 0.9:
        check = f"or {', '.join(map(repr, others))}; what other versions wrote counts for nothing"
    why = f"the version of {share:.0%} of the candidates, out of {distinct_in_rows(column)}"
    return Guess(value_text(column, most), why, check)
