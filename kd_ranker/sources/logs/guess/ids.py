"""Columns that tell requests, items and users apart; all other guesses rest on these."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ibis
import ibis.expr.types as ir
import pandas as pd

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.guess.facts import NEARLY_ALWAYS, Cells, Table, find_lists, make_cells
from kd_ranker.sources.logs.guess.rules import ROLES, Guess, best, counted, with_matches
from kd_ranker.sources.logs.guess.sample import (
    AT,
    ROW,
    Footers,
    Sample,
    first_rows,
    read_requests,
)

# The request of a candidate: no log has a column of this name.
OWNER = " owner"
# Requests that suffice to tell features of users; with fewer, more are read.
_ENOUGH_REQUESTS = 5_000
_MOST_OWNERS = 12
_NONE_OF_ROWS = Guess("", "no column differs from row to row", "name the column")


@dataclasses.dataclass(frozen=True)
class Log:
    """A log of which a part is read, and what is known of it so far.

    Attributes:
      footers: of the log.
      sample: of it.
      cells: of its candidates.
      requests: of its requests, of more than the sample has, those columns that are the same for
        all candidates of a request.
      facts: on each column, with `of_request`, and its agreement below `request_`, `item_` and
        `user_`, see `Cells.within`.
      lists: on each column of lists, see `find_lists`.
      columns: role -> its column, for the keys of `config.data.columns`.
      owner: `AT` and `owner`, the request of each candidate.
    """

    footers: Footers
    sample: Sample
    cells: Cells
    requests: Cells
    facts: Table
    lists: Table
    columns: dict[str, Guess]
    owner: ir.Table

    def candidates(self) -> ir.Table:
        """The candidates of the sample, with the request of each as `OWNER`."""
        return self.sample.table.join(self.owner.rename({OWNER: "owner"}), AT)


def find_ids(engine: Engine, footers: Footers, sample: Sample, named: Mapping[str, str]) -> Log:
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
    thin, facts = cells.thin(_MOST_OWNERS), cells.facts
    request, key = _NONE_OF_ROWS, ROW
    if sample.requests is None:
        request = _request(footers, thin, named)
        key = request.column or AT
    owner = cells.owners(key) if request.column else sample.table.select(AT, owner=key)
    agreement = cells.within(owner.mutate(by=ibis.literal(0))).droplevel(0)
    facts = facts.join(agreement.add_prefix("request_"))
    of_request = facts.request_constant | (facts.index == key)
    if sample.requests is not None:
        of_request = facts.index.isin(sample.requests.columns)
    facts["of_request"] = of_request
    of_rows = sorted(facts.index[of_request])
    table = _requests(engine, footers, sample, request.column, of_rows)
    requests = make_cells(engine, table, "cells of requests") if of_rows else cells
    of_candidates = find_lists(thin, sample.table, facts.index[~of_request])
    lists = find_lists(thin, table, of_rows)
    lists = pd.concat([lists, of_candidates]).fillna(0) if len(of_candidates) else lists
    item = _item(footers, thin, facts, lists, named)
    of_item = cells.within(cells.owners(item.column)).droplevel(0)
    if sample.requests is not None:
        request = best("request of rows", requests.facts, named)
        request = request if request.column else _NONE_OF_ROWS
    likely = [name for name in of_rows if name != request.column]
    user = _best_owner("user", requests, requests.facts.loc[likely], named)
    of_user = facts.filter(regex="^request_").mul(0).rename(columns=lambda of: of[8:])
    if user.column:
        of_user = requests.within(requests.owners(user.column), facts.index).droplevel(0)
    else:
        # A search log has queries, and may have no users.
        check = "" if request.column else "name the column"
        user = Guess("", "no column looks like the id of users", check)
    facts = facts.join(of_item.add_prefix("item_")).join(of_user.add_prefix("user_"))
    columns = {"request": request, "user": user, "item": item}
    return Log(footers, sample, cells, requests, facts, lists, columns, owner)


def _best_owner(
    role: str,
    cells: Cells,
    facts: Table,
    named: Mapping[str, str],
    more: Callable[[pd.Series, Table], dict] = lambda f, within: {},
    among: Iterable[str] | None = None,
) -> Guess:
    """The best column for a role of an owner, on which others may depend.

    Args:
      role: of `ROLES`.
      cells: to ask.
      facts: on all columns that may depend on it.
      named: role -> the column that the user has named.
      more: further facts on a column, from those on it and the agreement of all within it.
      among: the columns that may have it; None for all.
    """
    if role in named:
        return Guess(named[role], "named by you")
    likely = with_matches(facts if among is None else facts.loc[[*among]], role)
    likely = likely[likely.is_id | likely.is_time].sort_index()
    likely = likely.sort_values(["match", "distinct"], ascending=False, kind="stable")
    likely = likely.head(_MOST_OWNERS)
    if not len(likely):
        return Guess("", "no column may be one")
    within = cells.within(cells.owners(*likely.index))
    found = {}
    for name, f in likely.iterrows():
        others = within.loc[name].reindex(facts.index.drop(name))
        follows = int(others.constant.sum())
        known = {"follows": follows, "n_follows": counted(follows, "other column")}
        found[name] = known | more(f, others)

    def same(one: str, other: str) -> bool:
        return min(within.kappa[one, other], within.kappa[other, one]) >= NEARLY_ALWAYS

    return best(role, likely.join(pd.DataFrame(found).T), named, same)


def _request(footers: Footers, cells: Cells, named: Mapping[str, str]) -> Guess:
    """The id of requests, where a row is a candidate.

    Within a request, times and users are constant, and there is something of which no two
    candidates have the same.
    """
    facts = cells.facts

    def more(f: Any, others: Table) -> dict:
        is_apart = facts.is_id & ~others.constant & (others.owners > 0) & (others.repeats <= 0.02)
        times = others.index[others.constant & facts.is_time.reindex(others.index)]
        return {"time": next(iter(times), ""), "apart": is_apart.any()}

    is_id = facts.is_id | (facts.kind == "time")
    match = with_matches(facts, "request").match > 0
    likely = is_id & (match | (facts.side_by_side & (facts.per_value >= 1.5)))
    ids = facts.index[likely if likely.any() else is_id]
    guess = _best_owner("request", cells, facts, named, more, ids)
    if guess.column:
        return guess
    if not (facts.role[is_id] == "item").any():
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
    facts: Table,
    lists: Table,
    named: Mapping[str, str],
) -> Guess:
    """The id of items: no request has one twice, and other columns follow from it."""
    of_request = lists[facts.of_request.reindex(lists.index).astype(bool)]

    def more(f: Any, others: Table) -> dict:
        shares = of_request.get(f.name, pd.Series(dtype=float))
        return {"listed": next(iter(shares.index[shares >= 0.5]), "")}

    may_be = ROLES["item"].may_be
    likely = [f.Index for f in with_matches(facts, "item").itertuples() if may_be(f)]
    guess = _best_owner("item", cells, facts[~facts.of_request], named, more, likely)
    if not guess.column:
        raise UserError(
            f"no column of {footers.log.url} looks like the id of items, of which no two "
            "candidates of a request have the same; name it with --config.data.columns.item=COLUMN;"
            f" it has: {footers.type_names()}"
        )
    return guess


def _requests(
    engine: Engine, footers: Footers, sample: Sample, request: str, of_request: list[str]
) -> ir.Table:
    """The columns of requests, of more of them than the sample has if that has few."""
    table = sample.requests
    if table is None:
        table = first_rows(sample.table, request) if request else sample.table
    is_part = of_request and footers.num_rows > sample.file_rows
    if is_part and engine.count(table) < _ENOUGH_REQUESTS:
        # Of few requests, hardly two are of the same user.
        table = read_requests(engine, footers, request, of_request)
    return engine.keep("requests", table.select(AT, *of_request))
