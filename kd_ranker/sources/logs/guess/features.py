"""Features of a log: whom each column belongs to, its kind, and whether it is known only later."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
from ibis import _

from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.cells import elements_of
from kd_ranker.sources.logs.guess.facts import ELEMENTS, ZERO_ONE
from kd_ranker.sources.logs.guess.ibis_leaks import copies_of_teachers, shares_told
from kd_ranker.sources.logs.guess.ids import OWNER, Log
from kd_ranker.sources.logs.guess.roles import Roles
from kd_ranker.sources.logs.guess.rules import first
from kd_ranker.sources.logs.guess.sample import AT
from kd_ranker.sources.logs.leaks import SHOWN

_DEFAULT_SIZE = 100_000  # of `feature`
_HASHED_FROM = 10_000  # values in the sample
_MAX_LENGTH = 200


class FeatureGuess(NamedTuple):
    """One feature, or a column that is none.

    Attributes:
      name: its key in the config.
      column: its column.
      arguments: of `config.features.feature`.
      why: the reason for the guess.
      check: a doubt about it; "" for none.
      left_out: the reason for not reading it; "" for a feature.
    """

    name: str
    column: str
    arguments: Mapping[str, Any] = MappingProxyType({})
    why: str = ""
    check: str = ""
    left_out: str = ""


def find_features(log: Log, roles: Roles) -> list[FeatureGuess]:
    """A feature, or why there is none, for each column without a role, in the log's order."""
    free = [name for name in log.footers.types if name not in roles.used()]
    rows = {f.Index: f for f in roles.facts.itertuples()}
    unusable = {name: _why_unusable(log, roles, name, rows.get(name)) for name in free}
    usable = [name for name in free if not unusable[name]]
    of_request = roles.facts.of_request.reindex(usable).astype(bool)
    told = _told(log, roles, list(of_request.index[~of_request]))
    against = _against(log, roles, list(of_request.index[of_request]))
    against |= _like_teachers(log, roles, list(of_request.index[~of_request]))
    facts = roles.facts.join(log.cells.where(roles.passed).add_prefix("passed_"))
    # Of requests, more are known than are in the sample.
    facts.loc[of_request.index[of_request], log.requests.facts.columns] = log.requests.facts
    looked = facts.assign(
        told=[told.get(name, {}) for name in facts.index],
        against=[against.get(name, "") for name in facts.index],
        of="",
        owners=0,
    )
    rows = {f.Index: f for f in looked.itertuples()}
    features: list[FeatureGuess] = []
    for column in free:
        taken = {feature.name for feature in features}
        name = names.unused(names.identifier(column), taken)
        if unusable[column]:
            features.append(FeatureGuess(name, column, left_out=unusable[column]))
            continue
        features.append(_feature(log, name, rows[column]))
    return _with_one_history(features)


def _feature(log: Log, name: str, f: Any) -> FeatureGuess:
    of, why, check = _owner_of(log, f)
    cells = log.requests if f.of_request else log.cells
    owner = log.columns[of].column if of in ("user", "item") else ""
    owners = cells.facts.distinct.get(owner, f.known)
    f = f._replace(of=of, owners=owners)
    kind, kind_why, kind_check = first(f, "dense", "category")
    leak, doubt = first(f, "left out"), first(f, "doubt")
    if leak.column:
        kind = "bag" if f.kind == "list" else kind
        return FeatureGuess(name, f.Index, {"of": of, "kind": kind}, left_out=leak.why)
    check = "; ".join(filter(None, (check, doubt.why if doubt.column else "", kind_check)))
    if f.kind == "list":
        return _of_lists(log, name, f, why, check)
    arguments = {"of": of, "kind": kind, **(_sized(f.distinct) if kind == "category" else {})}
    return FeatureGuess(name, f.Index, arguments, f"{why}; {kind_why}", check)


def _why_unusable(log: Log, roles: Roles, name: str, f: Any) -> str:
    """The reason for which a column cannot be read, whatever it says; "" if it can."""
    if why := log.footers.why_unread(name):
        return why
    if f is None:
        of = log.footers.types[name][0]
        return f"its type {of} is no number, string, time or list of these; flatten it first"
    missing = " or missing" * (f.known < f.rows)
    reasons = (
        (name in roles.left_out, roles.left_out.get(name, "")),
        (names.is_shown(name), "says whether a candidate was shown"),
        (not f.known, "never known"),
        (f.distinct == 1, f"always {_some_value(log, f) if f.distinct == 1 else ''}{missing}"),
        (log.sample.requests is not None and not f.of_request and f.request_constant,
         "lists of the same for all candidates of a request; give it once a request"),
        (f.is_time, "a time; what matters of it, an hour or an age, needs a column of its own"),
        (f.element in ("float", "time", "bool"),
         "lists of numbers; a vector needs a column for each of them"),
        (f.kind == "list" and name not in log.lists.index, "its lists are empty"),
    )  # fmt: skip
    return next((why for holds, why in reasons if holds), "")


def _some_value(log: Log, f: Any) -> str:
    table = log.sample.table
    known = table.filter(table[f.Index].notnull()).select(f.Index).limit(1)
    value = log.cells.engine.fetch(known)[f.Index][0].as_py()
    return "a list" if f.kind == "list" else reprlib.repr(str(value))


def _owner_of(log: Log, f: Any) -> tuple[str, str, str]:
    """The owner of a column, the reason, and a doubt about it."""
    said = names.owner_of(f.Index)
    if not log.columns["request"].column and said in ("user", "context"):
        return said, "its name", "or 'candidate': no requests are told"
    if f.of_request:
        owner, other, of, owners = "user", "context", "user", f.user_owners
        place, apart = "constant within a request", ", not within a user"
        is_constant, is_told, kappa = f.user_constant, f.user_told, f.user_kappa
        many = f"{owners:,} users with several requests"
        if not log.columns["user"].column:
            return "user" if said == "user" else "context", f"{place}; the log has no users", ""
    else:
        owner, other, of, owners = "item", "candidate", "candidate", f.item_owners
        place, apart = "differs within a request", " and within an item"
        is_constant, is_told, kappa = f.item_constant, f.item_told, f.item_kappa
        many = f"{owners:,} items met more than once"
    if is_constant:
        return owner, f"constant within {'each' if kappa == 1 else 'nearly all'} of {many}", ""
    if is_told:
        return other, place + apart, ""
    of = said if said in (owner, other) else of
    than = other if of == owner else owner
    return of, "its name; " * (of == said) + place, f"or {than!r}: too few {many} tell"


def _sized(values: int) -> dict[str, int | bool]:
    """Twice the default size or more once the sample alone holds half of it."""
    sized: dict[str, int | bool] = {"hashed": True} if values > _HASHED_FROM else {}
    large = {"size": 2 ** math.ceil(math.log2(4 * max(values, 1)))}
    return sized | (large if values > _DEFAULT_SIZE // 2 else {})


def _of_lists(log: Log, name: str, f: Any, why: str, check: str) -> FeatureGuess:
    """The feature of a column of lists: a history if most of their elements are items, or a bag."""
    lists, item = log.lists.loc[f.Index], log.columns["item"].column
    share, elements = lists.get(item, 0.0), int(lists[ELEMENTS])
    named = f.of_request and names.has_word(f.Index, "histories")
    # Small numbers of any meaning are item ids, too; a history is of more than a few of them.
    is_varied = f.of_request and elements >= max(20, 0.05 * log.facts.distinct[item])
    if share >= 0.05 if named else share >= 0.5 and is_varied:
        length = _length(log, f.Index, 0.9)
        why = f"{share:.0%} of its ids are items of the sample"
        why += f"; 90% of the lists have at most {length}"
        check = "" if named and share >= 0.5 else "or 'bag', if these are not items"
        arguments: dict[str, Any] = {"of": "user", "kind": "history", "length": length}
        return FeatureGuess(name, f.Index, arguments, why, check)
    length = _length(log, f.Index, 0.95)
    why += f"; lists of {elements:,} values, 95% of at most {length}"
    no_history = f"only {share:.0%} are items: no history" * named
    check = "; ".join(filter(None, (check, no_history)))
    arguments = {"of": f.of, "kind": "bag", **_sized(elements), "length": length}
    return FeatureGuess(name, f.Index, arguments, why, check)


def _length(log: Log, name: str, quantile: float) -> int:
    """The length that this share of the different lists of a column have at most."""
    lists = log.sample.table.select(name).distinct()
    lengths = log.cells.engine.fetch(lists.select(length=lists[name].length()))["length"]
    longest = np.quantile(lengths.drop_null().to_numpy(), quantile, method="higher")
    return int(np.clip(longest, 1, _MAX_LENGTH))


def _told(log: Log, roles: Roles, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Column -> label, or "shown" -> the share that it tells, as `leaks.shares_told`."""
    table, shown = log.sample.table, ibis.literal(1.0)
    answers: dict[str, ir.Value] = {}
    if roles.shown is not None:
        table = table.join(roles.shown, AT)
        shown = answers[f" {SHOWN}"] = table.is_so.cast("float64")
    for task, guess in roles.labels.items():
        label = table[guess.column].cast("float64")
        is_label = (shown == 1) & label.isin((0.0, 1.0))
        answers[f" {task}"] = ibis.ifelse(is_label, label, None)
    if not answers or not columns:
        return {}
    rows, cells = table.select(AT, **answers), log.cells
    places = log.facts.index.get_indexer(columns).tolist()
    of_columns = cells.table.filter(cells.table.column.isin(places)).join(rows, AT)
    told = shares_told(cells.engine, rows, of_columns, list(cells.facts.index), list(answers))
    return {name: {of[1:]: share for of, share in each.items()} for name, each in told.items()}


def _against(log: Log, roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    """Column of requests -> a reason against it: it lists candidates, or counts labels."""
    reasons: dict[str, str] = {}
    lists = [name for name in columns if name in log.lists.index]
    for name, (own, others) in _shares_of_candidates(log, lists).items() if lists else ():
        is_number = log.facts.element[name] == "integer"
        if log.sample.requests is not None and is_number and log.lists[ZERO_ONE][name]:
            why = "CHECK: labels? 0 and 1, in lists of another length than those of the items"
            reasons[name] = why
        # Small catalogues are in any request.
        elif own - others >= 0.3 * (1 - others) and own > 0:
            reasons[name] = f"{own:.0%} of what it lists are candidates of the same request"
    numbers = [name for name in columns if log.facts.is_number[name]]
    return reasons | (_counts_of_labels(log, roles, numbers) if numbers and roles.labels else {})


def _like_teachers(log: Log, roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    """Column of candidates -> the reason against it, for numbers in the order of a teacher's."""
    teachers = {guess.column: guess.column for guess in roles.teacher.values()}
    numbers = [name for name in columns if log.facts.is_number[name]]
    copies = copies_of_teachers(log.cells.engine, log.candidates(), OWNER, numbers, teachers)
    return {
        name: f"CHECK: the teacher's score? ordered like {teacher!r}, rank correlation {share:.2f}"
        for name, of in copies.items()
        for teacher, share in of.items()
    }


def _shares_of_candidates(log: Log, names_: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Column of lists -> the shares that are among the request's own candidates, and another's."""
    first_ = log.owner.group_by("owner").agg(**{AT: log.owner[AT].min()})
    first_ = first_.mutate(other=first_.owner.lag().over(order_by=AT))
    lists = log.sample.table.semi_join(first_, AT)
    elements = elements_of(lists, names_, AT).join(first_, AT).drop(AT)
    items = log.cells.owners(log.columns["item"].column).select(AT, code="owner")
    candidates = items.join(log.owner, AT).select("code", "owner").distinct()
    own = candidates.mutate(is_own=True)
    others = candidates.rename(other="owner").mutate(is_other=True)
    found = elements.left_join(own, ["code", "owner"]).drop("code_right", "owner_right")
    found = found.left_join(others, ["code", "other"]).group_by("column")
    shares = found.agg(own=_.is_own.count() / _.count(), others=_.is_other.count() / _.count())
    rows = log.cells.engine.fetch(shares).to_pylist()
    return {names_[row["column"]]: (row["own"], row["others"]) for row in rows}


def _counts_of_labels(log: Log, roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    """Column of requests -> the reason, for numbers that go with how often a label is 1."""
    table = log.candidates()
    ones = {of: (table[x.column].cast("float64") == 1).sum() for of, x in roles.labels.items()}
    numbers = {f"{name} ": table[name].cast("float64").min() for name in columns}
    each = table.group_by(OWNER).agg(**numbers, **{f" {task}": of for task, of in ones.items()})
    asked: dict[str, ir.Value] = {name: each[f"{name} "].count() for name in columns}
    for name in columns:
        for task in ones:
            asked[f"{name} {task}"] = each[f"{name} "].corr(each[f" {task}"], how="pop")
    (row,) = log.cells.engine.fetch(each.agg(**asked)).to_pylist()
    return {
        name: f"goes with the number of {task!r} in the request: known only afterwards"
        for name in columns
        for task in ones
        if row[name] >= 30 and abs(row[f"{name} {task}"] or 0.0) >= 0.95
    }


def _with_one_history(features: list[FeatureGuess]) -> list[FeatureGuess]:
    """Keeps the first history that is sure, or the first; a config has room for one."""
    histories = [of for of in features if of.arguments.get("kind") == "history" and not of.left_out]
    best = min(histories, key=lambda feature: bool(feature.check), default=None)
    why = f"CHECK: another history than {best.name!r}; there is room for one" if best else ""
    return [
        of._replace(left_out=why) if of in histories and of is not best else of for of in features
    ]
