"""Columns that tell requests, items and users apart; all other guesses rest on these."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.facts import (
    NEARLY_ALWAYS,
    UNKNOWN,
    Cells,
    Fact,
    Lists,
    Within,
    find_lists,
    make_cells,
)
from kd_ranker.sources.logs.guess.rules import ROLES, Guess, best
from kd_ranker.sources.logs.guess.sample import (
    AT,
    ROW,
    Footers,
    Sample,
    first_rows,
    read_requests,
)

# Requests that suffice to tell features of users; with fewer, more are read.
_ENOUGH_REQUESTS = 5_000
_MOST_OWNERS = 12


class Ids(NamedTuple):
    """A sample whose requests, items and users are known.

    Attributes:
      footers: of the log.
      sample: of it.
      cells: of its candidates.
      requests: of its requests, of more than the sample has, those columns that are the same for
        all candidates of a request.
      lists: what the columns of lists hold, where it is anything.
      columns: "request", "item", "user" -> its column.
      owner: `AT` and `owner`, the request of each candidate.
      facts: of each column.
    """

    footers: Footers
    sample: Sample
    cells: Cells
    requests: Cells
    lists: dict[str, Lists]
    columns: dict[str, Guess]
    owner: ir.Table
    facts: dict[str, Fact]


def find_ids(engine: Engine, footers: Footers, sample: Sample, named: Mapping[str, str]) -> Ids:
    """Finds requests, items and users, on which all else depends.

    Args:
      engine: to ask.
      footers: of the log.
      sample: of it.
      named: role -> the column that the user has named.

    Raises:
      UserError: no column looks like a request's id, or like an item's.
    """
    cells = make_cells(engine, sample.table, "cells")
    thin, facts = cells.thin(_MOST_OWNERS), cells.columns
    request = NONE_OF_ROWS
    if sample.requests is None:
        request = _request(footers, thin, named)
    key = request.column or (AT if sample.requests is None else ROW)
    owner = cells.owners(key) if request.column else sample.table.select(AT, owner=key)
    (in_request,) = cells.within(owner.mutate(by=ibis.literal(0))).values()
    of_request = {name for name, within in in_request.items() if within.is_constant} | {key}
    if sample.requests is not None:
        of_request = {*sample.requests.columns}
    of_request &= {*facts}
    facts = {
        name: f.but(of_request=name in of_request, in_request=in_request[name])
        for name, f in facts.items()
    }
    table = _requests(engine, footers, sample, request.column, of_request)
    requests = make_cells(engine, table, "cells of requests") if of_request else cells
    lists = find_lists(thin, sample.table, {*facts} - of_request)
    lists |= find_lists(thin, table, of_request)
    item = _item(footers, thin, facts, lists, named)
    in_item = cells.within(cells.owners(item.column))[item.column]
    of_rows = {name: requests.columns[name].but(of_request=True) for name in of_request}
    if sample.requests is not None:
        request = best("request of rows", of_rows.values(), named)
        request = request if request.column else NONE_OF_ROWS
    of_rows.pop(request.column, None)
    user = _best_owner("user", requests, of_rows, named, of_rows)
    in_user: dict[str, Within] = {}
    if user.column:
        in_user = requests.within(requests.owners(user.column))[user.column]
    else:
        user = Guess("", "no column looks like the id of users", "name the column")
    facts = {
        name: f.but(in_item=in_item[name], in_user=in_user.get(name, UNKNOWN))
        for name, f in facts.items()
    }
    columns = {"request": request, "user": user, "item": item}
    return Ids(footers, sample, cells, requests, lists, columns, owner, facts)


NONE_OF_ROWS = Guess("", "no column differs from row to row", "name the column")


def _best_owner(
    role: str,
    cells: Cells,
    facts: Mapping[str, Fact],
    named: Mapping[str, str],
    among: Iterable[str],
    more: Callable[[Fact, dict[str, Within]], dict] = lambda fact, within: {},
) -> Guess:
    """The best of some columns for a role of an owner, on which others may depend.

    Args:
      role: of `ROLES`.
      cells: to ask.
      facts: of all columns that may depend on it.
      named: role -> the column that the user has named.
      among: the columns.
      more: further facts of a column, from the agreement of all within it.
    """
    if role in named:
        return Guess(named[role], "named by you")
    likely = [name for name in among if facts[name].may_be_id or facts[name].may_be_time]
    likely.sort(key=lambda of: (-names.match(of, names.SYNONYMS[role]), -facts[of].distinct, of))
    withins = cells.within(cells.owners(*likely[:_MOST_OWNERS])) if likely else {}
    owners = []
    for name, within in withins.items():
        follows = tuple(other for other in facts if other != name and within[other].is_constant)
        f = facts[name].but(follows=follows)
        owners.append(f.but(**more(f, within)))

    def same(one: str, other: str) -> bool:
        return min(withins[one][other].kappa, withins[other][one].kappa) >= NEARLY_ALWAYS

    return best(role, owners, named, same)


def _request(footers: Footers, cells: Cells, named: Mapping[str, str]) -> Guess:
    """The id of requests, where a row is a candidate.

    Within a request, times and users are constant, and there is something of which no two
    candidates have the same.
    """
    facts = cells.columns

    def more(f: Fact, within: dict[str, Within]) -> dict:
        apart = any(
            within[name].owners and within[name].repeats <= 0.02 and facts[name].may_be_id
            for name in facts
            if name not in (f.name, *f.follows)
        )
        times = (name for name in f.follows if facts[name].may_be_time)
        return {"time": next(times, ""), "apart": apart}

    ids = [name for name, f in facts.items() if f.may_be_id or f.kind == "time"]
    likely = [
        name
        for name in ids
        if names.match(name, names.SYNONYMS["request"])
        or (facts[name].alone >= 0.9 * facts[name].distinct and facts[name].size >= 1.5)
    ]
    guess = _best_owner("request", cells, facts, named, likely or ids, more)
    if guess.column:
        return guess
    if not any(names.role_of(name) == "item" for name in ids):
        raise UserError(
            f"no column of {footers.log.url} looks like the id of requests, the same for all "
            "candidates of one; name it with --config.data.columns.request=COLUMN; it has: "
            f"{footers.type_names()}"
        )
    why = "no column is the same for all candidates of a request"
    return Guess("", why, "make one, which a dataset needs; here each row counts as a request")


def _item(
    footers: Footers,
    cells: Cells,
    facts: Mapping[str, Fact],
    lists: Mapping[str, Lists],
    named: Mapping[str, str],
) -> Guess:
    """The id of items: no request has one twice, and other columns follow from it."""

    def more(f: Fact, within: dict[str, Within]) -> dict:
        of_it = (
            name
            for name, each in lists.items()
            if facts[name].of_request and each.listed.get(f.name, 0.0) >= 0.5
        )
        return {"listed": next(of_it, "")}

    of_candidate = {name: f for name, f in facts.items() if not f.of_request}
    likely = [
        name
        for name, f in of_candidate.items()
        if ROLES["item"].may_be(f.but(match=names.match(name, names.SYNONYMS["item"])))
    ]
    guess = _best_owner("item", cells, of_candidate, named, likely, more)
    if not guess.column:
        raise UserError(
            f"no column of {footers.log.url} looks like the id of items, of which no two "
            "candidates of a request have the same; name it with --config.data.columns.item=COLUMN;"
            f" it has: {footers.type_names()}"
        )
    return guess


def _requests(
    engine: Engine, footers: Footers, sample: Sample, request: str, of_request: set[str]
) -> ir.Table:
    """The columns of requests, of more of them than the sample has if that has few."""
    table = sample.requests
    if table is None:
        table = first_rows(sample.table, request) if request else sample.table
    is_part = of_request and footers.num_rows > sample.file_rows
    if is_part and engine.count(table) < _ENOUGH_REQUESTS:
        # Of few requests, hardly two are of the same user.
        table = read_requests(engine, footers, request, of_request)
    return engine.keep("requests", table.select(AT, *sorted(of_request)))
