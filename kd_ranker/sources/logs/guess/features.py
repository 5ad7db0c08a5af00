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

from kd_ranker.sources.logs.cells import elements_of
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.facts import Fact
from kd_ranker.sources.logs.guess.ids import Ids
from kd_ranker.sources.logs.guess.roles import Roles
from kd_ranker.sources.logs.guess.rules import first
from kd_ranker.sources.logs.guess.sample import AT
from kd_ranker.sources.logs.leaks import SHOWN, shares_told

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


def find_features(ids: Ids, roles: Roles) -> list[FeatureGuess]:
    """A feature, or why there is none, for each column without a role, in the log's order."""
    free = [name for name in ids.footers.types if name not in roles.used()]
    unusable = {name: why for name in free if (why := _why_unusable(ids, roles, name))}
    usable = [name for name in free if name not in unusable]
    told = _told(ids, roles, [name for name in usable if not roles.facts[name].of_request])
    against = _against(ids, roles, [name for name in usable if roles.facts[name].of_request])
    passed = ids.cells.where(roles.passed) if roles.passed is not None else {}
    features: list[FeatureGuess] = []
    for column in free:
        name = names.identifier(column)
        while name in {feature.name for feature in features}:
            name += "_"
        if column in unusable:
            features.append(FeatureGuess(name, column, left_out=unusable[column]))
            continue
        f = roles.facts[column].but(
            passed=passed.get(column), told=told.get(column, {}), against=against.get(column, "")
        )
        features.append(_feature(ids, name, f))
    return _with_one_history(features)


def _feature(ids: Ids, name: str, f: Fact) -> FeatureGuess:
    of, why, check = _owner_of(ids, f)
    cells = ids.requests if f.of_request else ids.cells
    owner = cells.columns.get(ids.columns[of].column) if of in ("user", "item") else None
    # Of requests, more are known than are in the sample.
    view = cells.columns[f.name]
    owners = owner.distinct if owner else view.known
    known = {
        of: getattr(f, of) for of in ("in_request", "in_item", "shown", "passed", "told", "against")
    }
    f = view.but(of_request=f.of_request, of=of, owners=owners, **known)
    kind, kind_why, kind_check = first(f, "dense", "category")
    leak, doubt = first(f, "left out"), first(f, "doubt")
    if leak.column:
        kind = "bag" if f.kind == "list" else kind
        return FeatureGuess(name, f.name, {"of": of, "kind": kind}, left_out=leak.why)
    check = "; ".join(filter(None, (check, doubt.why if doubt.column else "", kind_check)))
    if f.kind == "list":
        return _of_lists(ids, name, f, why, check)
    arguments = {"of": of, "kind": kind, **(_sized(f.distinct) if kind == "category" else {})}
    return FeatureGuess(name, f.name, arguments, f"{why}; {kind_why}", check)


def _why_unusable(ids: Ids, roles: Roles, name: str) -> str:
    """The reason for which a column cannot be read, whatever it says; "" if it can."""
    if why := ids.footers.why_unread(name):
        return why
    if name not in roles.facts:
        of = ids.footers.types[name][0]
        return f"its type {of} is no number, string, time or list of these; flatten it first"
    f = roles.facts[name]
    missing = " or missing" * (f.known < f.rows)
    reasons = (
        (name in roles.left_out, roles.left_out.get(name, "")),
        (names.is_shown(name), "says whether a candidate was shown"),
        (not f.known, "never known"),
        (f.distinct == 1, f"always {_some_value(ids, f) if f.distinct == 1 else ''}{missing}"),
        (ids.sample.requests is not None and not f.of_request and f.in_request.is_constant,
         "lists of the same for all candidates of a request; give it once a request"),
        (f.may_be_time, "a time; what matters of it, an hour or an age, needs a column of its own"),
        (f.element in ("float", "time", "bool"),
         "lists of numbers; a vector needs a column for each of them"),
        (f.kind == "list" and name not in ids.lists, "its lists are empty"),
    )  # fmt: skip
    return next((why for holds, why in reasons if holds), "")


def _some_value(ids: Ids, f: Fact) -> str:
    table = ids.sample.table
    known = table.filter(table[f.name].notnull()).select(f.name).limit(1)
    value = ids.cells.engine.fetch(known)[f.name][0].as_py()
    return "a list" if f.kind == "list" else reprlib.repr(str(value))


def _owner_of(ids: Ids, f: Fact) -> tuple[str, str, str]:
    """The owner of a column, the reason, and a doubt about it."""
    said = names.owner_of(f.name)
    if not ids.columns["request"].column and said in ("user", "context"):
        return said, "its name", "or 'candidate': no requests are told"
    if f.of_request:
        owner, other, within, of = "user", "context", f.in_user, "user"
        place, apart = "constant within a request", ", not within a user"
        many = f"{within.owners:,} users with several requests"
        if not ids.columns["user"].column:
            return "user", place, "or 'context': no user is told"
    else:
        owner, other, within, of = "item", "candidate", f.in_item, "candidate"
        place, apart = "differs within a request", " and within an item"
        many = f"{within.owners:,} items met more than once"
    if within.is_constant:
        each = "each of" if within.kappa == 1 else "nearly all of"
        return owner, f"constant within {each} {many}", ""
    if within.is_known:
        return other, place + apart, ""
    of = said if said in (owner, other) else of
    than = other if of == owner else owner
    return of, "its name; " * (of == said) + place, f"or {than!r}: too few {many} tell"


def _sized(values: int) -> dict[str, int | bool]:
    """Twice the default size or more once the sample alone holds half of it."""
    sized: dict[str, int | bool] = {"hashed": True} if values > _HASHED_FROM else {}
    large = {"size": 2 ** math.ceil(math.log2(4 * max(values, 1)))}
    return sized | (large if values > _DEFAULT_SIZE // 2 else {})


def _of_lists(ids: Ids, name: str, f: Fact, why: str, check: str) -> FeatureGuess:
    """The feature of a column of lists: a history if most of their elements are items, or a bag."""
    lists, item = ids.lists[f.name], ids.facts[ids.columns["item"].column]
    share = lists.listed.get(item.name, 0.0)
    named = f.of_request and names.has_word(f.name, "histories")
    # Small numbers of any meaning are item ids, too; a history is of more than a few of them.
    is_varied = f.of_request and lists.distinct >= max(20, 0.05 * item.distinct)
    if share >= 0.05 if named else share >= 0.5 and is_varied:
        length = _length(ids, f.name, 0.9)
        why = f"{share:.0%} of its ids are items of the sample"
        why += f"; 90% of the lists have at most {length}"
        check = "" if named and share >= 0.5 else "or 'bag', if these are not items"
        arguments: dict[str, Any] = {"of": "user", "kind": "history", "length": length}
        return FeatureGuess(name, f.name, arguments, why, check)
    length = _length(ids, f.name, 0.95)
    why += f"; lists of {lists.distinct:,} values, 95% of at most {length}"
    no_history = f"only {share:.0%} are items: no history" * named
    check = "; ".join(filter(None, (check, no_history)))
    arguments = {"of": f.of, "kind": "bag", **_sized(lists.distinct), "length": length}
    return FeatureGuess(name, f.name, arguments, why, check)


def _length(ids: Ids, name: str, quantile: float) -> int:
    """The length that this share of the different lists of a column have at most."""
    lists = ids.sample.table.select(name).distinct()
    lengths = ids.cells.engine.fetch(lists.select(length=lists[name].length()))["length"]
    longest = np.quantile(lengths.drop_null().to_numpy(), quantile, method="higher")
    return int(np.clip(longest, 1, _MAX_LENGTH))


def _told(ids: Ids, roles: Roles, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Column -> label, or "shown" -> the share that it tells, as `leaks.shares_told`."""
    table, shown = ids.sample.table, ibis.literal(1.0)
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
    rows, cells = table.select(AT, **answers), ids.cells
    places = [place for place, name in enumerate(cells.columns) if name in columns]
    of_columns = cells.table.filter(cells.table.column.isin(places)).join(rows, AT)
    told = shares_told(cells.engine, rows, of_columns, list(cells.columns), list(answers))
    return {name: {of[1:]: share for of, share in each.items()} for name, each in told.items()}


def _against(ids: Ids, roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    """Column of requests -> a reason against it: it lists candidates, or counts labels."""
    reasons: dict[str, str] = {}
    lists = [name for name in columns if name in ids.lists]
    for name, (own, others) in _shares_of_candidates(ids, lists).items() if lists else ():
        is_number = roles.facts[name].element == "integer"
        if ids.sample.requests is not None and is_number and ids.lists[name].is_binary:
            why = "CHECK: labels? 0 and 1, in lists of another length than those of the items"
            reasons[name] = why
        # Small catalogues are in any request.
        elif own - others >= 0.3 * (1 - others) and own > 0:
            reasons[name] = f"{own:.0%} of what it lists are candidates of the same request"
    numbers = [name for name in columns if roles.facts[name].is_number]
    return reasons | (_counts_of_labels(ids, roles, numbers) if numbers and roles.labels else {})


def _shares_of_candidates(ids: Ids, names_: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Column of lists -> the shares that are among the request's own candidates, and another's."""
    first_ = ids.owner.group_by("owner").agg(**{AT: ids.owner[AT].min()})
    first_ = first_.mutate(other=first_.owner.lag().over(order_by=AT))
    lists = ids.sample.table.semi_join(first_, AT)
    elements = elements_of(lists, names_, AT).join(first_, AT).drop(AT)
    items = ids.cells.owners(ids.columns["item"].column).select(AT, code="owner")
    candidates = items.join(ids.owner, AT).select("code", "owner").distinct()
    own = candidates.mutate(is_own=True)
    others = candidates.rename(other="owner").mutate(is_other=True)
    found = elements.left_join(own, ["code", "owner"]).drop("code_right", "owner_right")
    found = found.left_join(others, ["code", "other"]).group_by("column")
    shares = found.agg(own=_.is_own.count() / _.count(), others=_.is_other.count() / _.count())
    rows = ids.cells.engine.fetch(shares).to_pylist()
    return {names_[row["column"]]: (row["own"], row["others"]) for row in rows}


def _counts_of_labels(ids: Ids, roles: Roles, columns: Sequence[str]) -> dict[str, str]:
    """Column of requests -> the reason, for numbers that go with how often a label is 1."""
    table = ids.sample.table.join(ids.owner, AT)
    ones = {of: (table[x.column].cast("float64") == 1).sum() for of, x in roles.labels.items()}
    numbers = {f"{name} ": table[name].cast("float64").min() for name in columns}
    each = table.group_by("owner").agg(**numbers, **{f" {task}": of for task, of in ones.items()})
    asked: dict[str, ir.Value] = {name: each[f"{name} "].count() for name in columns}
    for name in columns:
        for task in ones:
            asked[f"{name} {task}"] = each[f"{name} "].corr(each[f" {task}"], how="pop")
    (row,) = ids.cells.engine.fetch(each.agg(**asked)).to_pylist()
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
