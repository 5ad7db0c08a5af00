"""Columns that tell requests, items and users apart; all other guesses rest on these."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.guess import evidence, names
from kd_ranker.sources.logs.guess.column import Column, may_be_time, share_of_values, value_text
from kd_ranker.sources.logs.guess.evidence import Code
from kd_ranker.sources.logs.guess.sample import (
    REQUEST_ROWS,
    LogFooters,
    Sample,
    sample_requests,
    type_names,
)

# The columns that the template names.
TEMPLATE_COLUMNS = {role: synonyms[0] for role, synonyms in names.SYNONYMS.items()}
# Requests that suffice to tell features of users; with fewer, more are read.
ENOUGH_REQUESTS = 5_000
_THIN_ROWS, _THIN_SLICES = 96_000, 12


class Guess(NamedTuple):
    """One guess.

    Attributes:
      column: the column; "" for none.
      why: the reason for the guess.
      check: other columns that it may be, or a doubt; "" if the guess is sure.
    """

    column: str
    why: str
    check: str = ""


NONE = Guess("", "the log seems to have none")


@dataclasses.dataclass(frozen=True)
class Facts:
    """A sample whose requests, items and users are known.

    Attributes:
      log: the log.
      sample: candidates of it.
      request: the request of each candidate.
      item: the item of each candidate.
      item_name: the column that says so.
      of_request: the columns that are the same for all candidates of a request.
      requests: those columns, with a row a request; of more requests than the sample holds.
      user: the user of each of these requests; -1 where the log has none.
      user_name: the column that says so; "" for none.
    """

    log: LogFooters
    sample: Sample
    request: Code
    item: Code
    item_name: str
    of_request: frozenset[str]
    requests: dict[str, Column]
    user: Code
    user_name: str

    @property
    def columns(self) -> dict[str, Column]:
        """The columns over candidates."""
        return self.sample.columns

    def of_candidate(self) -> dict[str, Column]:
        """The columns that differ between the candidates of a request."""
        return {
            name: column for name, column in self.columns.items() if name not in self.of_request
        }

    def is_of_item(self, column: Column) -> bool:
        """True if a column over candidates is constant within each item."""
        return evidence.agreement(column.code, self.item).is_constant

    def is_of_user(self, name: str) -> bool:
        """True if a column is constant within each user."""
        if name not in self.of_request:
            return False
        return evidence.agreement(self.requests[name].code, self.user).is_constant


class Fit(NamedTuple):
    """A column's score for a role."""

    column: str
    score: float
    tie: float  # decides between equal scores: the larger, the better
    why: str


def columns_named_by_user(columns: Mapping[str, str], log: LogFooters) -> dict[str, str]:
    """The columns that a user has named, by role: those unlike the template's.

    Raises:
      UserError: the log has no such column.
    """
    named = {
        role: column
        for role, column in columns.items()
        if column and column != TEMPLATE_COLUMNS.get(role)
    }
    for role, column in named.items():
        if column not in log.types:
            close = difflib.get_close_matches(column, log.types, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(
                f"data.columns.{role}={column!r} is no column of {log.path}; {hint}it has: "
                f"{type_names(log)}"
            )
    return named


def _may_be_id(column: Column) -> bool:
    is_number = column.kind in ("integer", "float") and column.is_whole
    return (is_number or column.kind == "string") and column.distinct > 0


def find_facts(
    log: LogFooters, sample: Sample, named: Mapping[str, str]
) -> tuple[Facts, dict[str, Guess]]:
    """Finds requests, items and users, on which all else depends.

    Args:
      log: the log.
      sample: of it.
      named: role -> the column that the user has named.

    Returns:
      The facts, and the guesses of "request", "item" and "user".

    Raises:
      UserError: no column looks like a request's id, or like an item's.
    """
    if sample.rows == REQUEST_ROWS:
        request, of_request = sample.request, sample.of_request
        of_rows = {name: sample.columns[name] for name in sample.of_request}
        guess = _guess_request_of_rows(sample, of_rows, named)
    else:
        guess = _guess_request(log, sample, named)
        request = sample.columns[guess.column].code
        of_request = _constant_within(sample.columns, request) | {guess.column}
    item = _guess_item(log, sample, request, of_request, named)
    requests = {
        name: sample.columns[name].taken(evidence.first_rows(request)) for name in of_request
    }
    if len(evidence.first_rows(request)) < ENOUGH_REQUESTS and log.num_rows > sample.file_rows:
        # Of few requests, hardly two are of the same user.
        key = guess.column if sample.rows != REQUEST_ROWS else ""
        more = sample_requests(log, key, sorted(of_request))
        if more and len(next(iter(more.values())).code) > len(evidence.first_rows(request)):
            requests = more
    user = _guess_user(requests, guess.column, named)
    nobody = np.full(len(next(iter(requests.values())).code) if requests else 0, -1, np.int32)
    facts = Facts(
        log=log,
        sample=sample,
        request=request,
        item=sample.columns[item.column].code,
        item_name=item.column,
        of_request=of_request,
        requests=requests,
        user=requests[user.column].code if user.column in requests else nobody,
        user_name=user.column,
    )
    return facts, {"request": guess, "item": item, "user": user}


def _constant_within(columns: Mapping[str, Column], owner: Code) -> frozenset[str]:
    return frozenset(
        name
        for name, column in columns.items()
        if evidence.agreement(column.code, owner).is_constant
    )


def _thin(sample: Sample) -> np.ndarray:
    """Some slices of a sample, for tests of many pairs of columns."""
    if sample.num_rows <= _THIN_ROWS:
        return np.arange(sample.num_rows)
    size = _THIN_ROWS // _THIN_SLICES
    starts = np.linspace(0, sample.num_rows - size, _THIN_SLICES).astype(int)
    return (starts[:, None] + np.arange(size)).ravel()


def _guess_request(log: LogFooters, sample: Sample, named: Mapping[str, str]) -> Guess:
    """The id of requests, where a row is a candidate.

    Within a request, times and users are constant, and there is something of which no two
    candidates have the same.
    """
    if "request" in named:
        return Guess(named["request"], "named by you")
    rows = _thin(sample)
    columns = {name: column.taken(rows) for name, column in sample.columns.items()}
    synonyms = names.SYNONYMS["request"]
    ids = [
        name
        for name, column in columns.items()
        if _may_be_id(column) or (column.kind == "time" and column.distinct > 1)
    ]
    likely = [
        name
        for name in ids
        if names.match(name, synonyms) or evidence.is_side_by_side(columns[name].code)
    ]
    fits = [fit for name in likely or ids if (fit := _fit_of_request(columns, name))]
    fits = [fit for fit in fits if fit.score >= 2]
    if not fits:
        raise UserError(
            f"no column of {log.path} looks like the id of requests, the same for all candidates "
            f"of one; name it with --config.data.columns.request=COLUMN; it has: {type_names(log)}"
        )
    return best_guess(
        fits, lambda fit: _are_one_to_one(columns, fits[0].column, fit.column), least=4
    )


def _fit_of_request(columns: Mapping[str, Column], name: str) -> Fit | None:
    owner = columns[name].code
    number = len(np.unique(owner[owner >= 0]))
    score = 2.0 * names.match(name, names.SYNONYMS["request"])
    size = (owner >= 0).sum() / max(number, 1)
    if (number < 2 or size < 1.5) and score < 4:
        return None
    others = {other: column for other, column in columns.items() if other != name}
    constant = _constant_within(others, owner)
    apart = [
        other
        for other, column in others.items()
        if other not in constant
        and _may_be_id(column)
        and evidence.repeats_within(column.code, owner) <= 0.02
    ]
    if not apart and score < 4:
        return None
    times = [other for other in constant if may_be_time(columns[other])]
    score += 3 * bool(times) + evidence.is_side_by_side(owner) + bool(constant)
    score -= may_be_time(columns[name])
    what = f", {times[0]!r} among them" if times else ""
    why = (
        f"{said_by_name(name, 'request')}groups of about {size:,.0f} rows, which share "
        f"{counted(len(constant), 'other column')}{what}"
    )
    return Fit(name, score, number, why)


def counted(number: int, noun: str) -> str:
    """A number of things, in words.

    >>> counted(1, "column"), counted(2000, "column")
    ('1 column', '2,000 columns')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def said_by_name(name: str, role: str) -> str:
    """Beginning of a reason, if the name of a column speaks for the role; else ""."""
    return "its name; " if names.match(name, names.SYNONYMS[role]) else ""


def _are_one_to_one(columns: Mapping[str, Column], one: str, other: str) -> bool:
    first, second = columns[one].code, columns[other].code
    return (
        evidence.agreement(first, second).kappa >= evidence.NEARLY_ALWAYS
        and evidence.agreement(second, first).kappa >= evidence.NEARLY_ALWAYS
    )


def best_guess(fits: list[Fit], is_the_same: Callable[[Fit], bool], least: float) -> Guess:
    """The best fit, and those close to it as a doubt; `fits` is sorted on the way.

    Args:
      fits: at least one.
      is_the_same: True for another fit that comes to the same as the best, `fits[0]` by then.
      least: a score below which the best is doubtful even without another.
    """
    fits.sort(key=lambda fit: (-fit.score, -fit.tie, fit.column))
    best = fits[0]
    close = [fit for fit in fits[1:] if fit.score >= best.score - 1 and not is_the_same(fit)]
    check = ""
    if close:
        check = "or " + ", ".join(repr(fit.column) for fit in close[:3])
    elif best.score < least:
        check = "little speaks for it"
    return Guess(best.column, best.why, check)


def _guess_request_of_rows(
    sample: Sample, of_rows: Mapping[str, Column], named: Mapping[str, str]
) -> Guess:
    """The id of requests, where a row is a request."""
    if "request" in named:
        return Guess(named["request"], "named by you")
    first = evidence.first_rows(sample.request)
    fits = []
    for name, column in of_rows.items():
        code = column.code[first]
        unique = len(np.unique(code)) / max(len(code), 1)
        named_so = names.match(name, names.SYNONYMS["request"])
        if not _may_be_id(column) or unique < 0.98 or (code < 0).any():
            continue
        # A time is often different in each row, too.
        score = 2.0 * named_so + 2 - 2 * may_be_time(column)
        why = f"{said_by_name(name, 'request')}different in each of {len(first):,} rows"
        fits.append(Fit(name, score, 0, why))
    if not fits:
        return Guess("", "no column differs from row to row", "name the column")
    return best_guess(fits, lambda fit: False, least=2)


def _guess_item(
    log: LogFooters,
    sample: Sample,
    request: Code,
    of_request: frozenset[str],
    named: Mapping[str, str],
) -> Guess:
    """The id of items: no request has one twice, and other columns follow from it."""
    if "item" in named:
        return Guess(named["item"], "named by you")
    rows = _thin(sample)
    columns = {
        name: column.taken(rows)
        for name, column in sample.columns.items()
        if name not in of_request
    }
    owner = request[rows]
    fits = []
    for name, column in columns.items():
        if not _may_be_id(column) or not column.known.any():
            continue
        by_name = names.match(name, names.SYNONYMS["item"])
        repeats = evidence.repeats_within(column.code, owner)
        is_template = name == TEMPLATE_COLUMNS["item"]
        if (repeats > 0.02 or column.known.mean() < 0.98) and not is_template:
            continue
        if by_name < 2 and evidence.permutation_share(column.numbers, owner) > 0.9:
            continue
        known = int(column.known.sum())
        distinct = len(np.unique(column.code[column.known]))
        others = {other: each for other, each in columns.items() if other != name}
        follow = _constant_within(others, column.code)
        score = 2.0 * by_name + min(len(follow), 3) - (distinct > 0.95 * known and by_name < 2)
        score -= 2 * (may_be_time(column) or _is_text(column))
        lists = [
            other
            for other in of_request
            if share_of_values(sample.columns[other], sample.columns[name]) >= 0.5
        ]
        score += bool(lists)
        why = (
            f"{said_by_name(name, 'item')}never twice in a request"
            f"{f', but for {repeats:.1%}' if repeats else ''}; {distinct:,} values in {known:,} "
            f"rows; it fixes {counted(len(follow), 'other column')}"
        )
        why += f"; {lists[0]!r} lists such values" if lists else ""
        fits.append(Fit(name, score, distinct, why))
    fits = [fit for fit in fits if fit.score >= 1]
    if not fits:
        raise UserError(
            f"no column of {log.path} looks like the id of items, of which no two candidates of a "
            "request have the same; name it with --config.data.columns.item=COLUMN; it has: "
            f"{type_names(log)}"
        )
    return best_guess(
        fits, lambda fit: _are_one_to_one(columns, fits[0].column, fit.column), least=2
    )


def _is_text(column: Column) -> bool:
    """True if values are words with spaces between them, and so no ids."""
    if column.kind != "string":
        return False
    texts = [value_text(column, code) for code in range(min(column.distinct, 100))]
    return float(np.mean([len(text.split()) for text in texts])) > 1.5


def _guess_user(requests: Mapping[str, Column], request: str, named: Mapping[str, str]) -> Guess:
    """The id of users: constant within a request, and other columns follow from it."""
    if "user" in named:
        return Guess(named["user"], "named by you")
    fits = []
    for name, column in requests.items():
        if name == request or not _may_be_id(column) or may_be_time(column):
            continue
        distinct = len(np.unique(column.code[column.known]))
        if distinct < 2:
            continue
        by_name = names.match(name, names.SYNONYMS["user"])
        others = {other: each for other, each in requests.items() if other not in (name, request)}
        follow = _constant_within(others, column.code)
        number = int(column.known.sum())
        score = 2.0 * by_name + min(len(follow), 3) + (distinct >= max(10, 0.02 * number))
        why = (
            f"{said_by_name(name, 'user')}{distinct:,} values in {number:,} requests; "
            f"it fixes {counted(len(follow), 'other column')}"
        )
        if by_name or follow:
            fits.append(Fit(name, score, distinct, why))
    fits = [fit for fit in fits if fit.score >= 2]
    if not fits:
        return Guess("", "no column looks like the id of users", "name the column")
    return best_guess(
        fits, lambda fit: _are_one_to_one(requests, fits[0].column, fit.column), least=3
    )
