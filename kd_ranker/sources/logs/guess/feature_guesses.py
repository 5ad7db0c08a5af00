"""Features of a log: whom each column belongs to, its kind, and whether it leaks."""

import math
import reprlib
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd_ranker.sources.logs.guess import evidence, names
from kd_ranker.sources.logs.guess.column import (
    Column,
    distinct_in_rows,
    is_binary,
    may_be_time,
    share_of_values,
    value_text,
)
from kd_ranker.sources.logs.guess.ids import Facts
from kd_ranker.sources.logs.guess.leaks import leak_of
from kd_ranker.sources.logs.guess.roles import Roles
from kd_ranker.sources.logs.guess.sample import REQUEST_ROWS

DEFAULT_SIZE = 100_000  # of `feature`
_HASHED_FROM = 10_000  # values in the sample
_FEW_NUMBERS = 32
_MAX_LENGTH = 200


class FeatureGuess(NamedTuple):
    """One feature, or a column that is none.

    Attributes:
      name: its key in the config.
      column: its column.
      of: "user", "item", "context" or "candidate".
      kind: "dense", "category", "history" or "bag".
      hashed: True if its values are hashed.
      size: the most values that it has.
      length: the number of elements of a list that are kept.
      why: the reason for the guess.
      check: a doubt about it; "" for none.
      left_out: the reason for not reading it; "" for a feature.
    """

    name: str
    column: str
    of: str = ""
    kind: str = ""
    hashed: bool = False
    size: int = DEFAULT_SIZE
    length: int = 1
    why: str = ""
    check: str = ""
    left_out: str = ""


def find_features(facts: Facts, roles: Roles) -> list[FeatureGuess]:
    """A feature, or why there is none, for each column without a role, in the log's order."""
    features: list[FeatureGuess] = []
    taken: set[str] = set()
    for column in facts.log.types:
        if column in roles.used():
            continue
        name = names.identifier(column)
        while name in taken:
            name += "_"
        taken.add(name)
        reason = _why_unusable(facts, roles, column)
        features.append(
            FeatureGuess(name, column, left_out=reason)
            if reason
            else _find_feature(facts, roles, name, facts.columns[column])
        )
    return _with_one_history(features)


def _why_unusable(facts: Facts, roles: Roles, name: str) -> str:
    """The reason for which a column cannot be read, whatever it says; "" if it can."""
    if name in facts.sample.unread:
        return facts.sample.unread[name]
    if missing := facts.log.missing(name):
        return f"missing in {missing} of {len(facts.log.files)} files"
    if name in roles.left_out:
        return roles.left_out[name]
    column = facts.columns[name]
    if not column.known.any():
        return "never known"
    if column.distinct == 1:
        value = "a list" if column.kind == "list" else reprlib.repr(value_text(column, 0))
        return f"always {value}" if column.known.all() else f"always {value} or missing"
    if (
        facts.sample.rows == REQUEST_ROWS
        and name not in facts.of_request
        and evidence.agreement(column.code, facts.request).is_constant
    ):
        return "lists of the same for all candidates of a request; give it once a request"
    if may_be_time(column):
        return "a time; what matters of it, an hour or an age, needs a column of its own"
    if column.element_kind in ("float", "time", "bool"):
        return "lists of numbers; a vector needs a column for each of them"
    return ""


def _find_feature(facts: Facts, roles: Roles, name: str, column: Column) -> FeatureGuess:
    of, why, check = _owner_of(facts, column)
    leak, suspicion = leak_of(facts, roles, column, of)
    check = "; ".join(filter(None, (check, suspicion)))
    if leak:
        return FeatureGuess(name, column.name, of, _kind_of(column)[0], left_out=leak)
    view = facts.requests[column.name] if column.name in facts.of_request else column
    feature = FeatureGuess(name, column.name, of, why=why, check=check)
    if column.kind == "list":
        return _of_lists(facts, feature, view)
    values = distinct_in_rows(view)
    owners = _number_of_owners(facts, of, view)
    kind, kind_why, kind_check = _kind_of(view)
    feature = feature._replace(
        kind=kind,
        hashed=kind == "category" and values > _HASHED_FROM,
        size=_size(values) if kind == "category" else DEFAULT_SIZE,
        why=f"{why}; {kind_why}",
        check="; ".join(filter(None, (check, kind_check))),
    )
    if _is_name_of_its_own(view, values, owners):
        return feature._replace(
            left_out=f"{values:,} values for {owners:,} {_OWNED[of]}: an id or text"
        )
    return feature


_OWNED = {"user": "users", "item": "items", "context": "requests", "candidate": "candidates"}


def _owner_of(facts: Facts, column: Column) -> tuple[str, str, str]:
    """The owner of a column, the reason, and a doubt about it."""
    said = names.owner_of(column.name)
    if column.name in facts.of_request:
        by_user = evidence.agreement(facts.requests[column.name].code, facts.user)
        users = f"{by_user.owners:,} users with several requests"
        if facts.user_name == "":
            return "user", "constant within a request", "or 'context': no user is told"
        if by_user.is_constant:
            return "user", f"constant within {_each_of(by_user)} {users}", ""
        if by_user.is_known:
            return "context", "constant within a request, not within a user", ""
        of = said if said in ("user", "context") else "user"
        by_name = "its name; " if of == said else ""
        other = "user" if of == "context" else "context"
        return of, f"{by_name}constant within a request", f"or {other!r}: {users} in the sample"
    by_item = evidence.agreement(column.code, facts.item)
    items = f"{by_item.owners:,} items met more than once"
    if by_item.is_constant:
        return "item", f"constant within {_each_of(by_item)} {items}", ""
    if by_item.is_known:
        return "candidate", "differs within a request and within an item", ""
    of = "item" if said == "item" else "candidate"
    other = "item" if of == "candidate" else "candidate"
    by_name = "its name; " if of == said else ""
    return of, f"{by_name}differs within a request", f"or {other!r}: too few {items} tell"


def _each_of(agreement: evidence.Agreement) -> str:
    return "each of" if agreement.kappa == 1 else "nearly all of"


def _number_of_owners(facts: Facts, of: str, view: Column) -> int:
    """The number of users, items, requests or candidates that have a value of the column."""
    owners = {"user": facts.user, "item": facts.item}.get(of)
    known = view.known
    return int(known.sum()) if owners is None else len(np.unique(owners[known & (owners >= 0)]))


def _is_name_of_its_own(view: Column, values: int, owners: int) -> bool:
    """True if nearly every owner has a value of its own: another id, a title, free text."""
    if view.kind == "string":
        # Words, more than a name has.
        texts = [value_text(view, code) for code in range(min(view.distinct, 1000))]
        if np.mean([len(text.split()) for text in texts]) > 6:
            return True
    elif not (names.is_identifier(view.name) or np.nanmax(np.abs(view.numbers)) >= 2**31):
        return False
    return owners >= 50 and values >= 0.95 * owners


def _kind_of(column: Column) -> tuple[str, str, str]:
    """Dense or category, the reason, and a doubt about it."""
    if column.kind == "list":
        return "bag", "", ""
    values = distinct_in_rows(column)
    if column.kind in ("string", "bool"):
        values_are = "texts" if column.kind == "string" else "truth values"
        check = "all are numbers: a column of numbers would have an order" * _all_numbers(column)
        return "category", f"{values:,} {values_are}", check
    if not column.is_whole:
        return "dense", "numbers with fractions", ""
    if names.is_identifier(column.name):
        return "category", f"{values:,} numbers, names by its name", ""
    if names.is_quantity(column.name):
        return "dense", f"{values:,} numbers, an amount by its name", ""
    if column.kind == "float" and is_binary(column):
        return "dense", "0 or 1", ""
    if values <= _FEW_NUMBERS:
        return "category", f"{values:,} whole numbers", ""
    if np.nanmax(np.abs(column.numbers)) >= 2**31:
        return "category", f"{values:,} whole numbers, as long as ids are", "or 'dense', if amounts"
    return "dense", f"{values:,} whole numbers", "or 'category', if these are ids"


def _all_numbers(column: Column) -> bool:
    if column.kind != "string" or not pa.types.is_string(column.values.type):
        return False
    is_number = pc.match_substring_regex(column.values, r"^\s*-?\d+(\.\d+)?\s*$")
    return len(column.values) > _FEW_NUMBERS and bool(pc.all(is_number).as_py())


def _size(values: int) -> int:
    """Twice the default or more once the sample alone holds half of it."""
    return DEFAULT_SIZE if values <= DEFAULT_SIZE // 2 else 2 ** math.ceil(math.log2(4 * values))


def _of_lists(facts: Facts, feature: FeatureGuess, view: Column) -> FeatureGuess:
    """The feature of a column of lists: a history if most of their elements are items, or a bag."""
    used = view.values.take(pa.array(np.unique(view.code[view.known])))
    lengths = np.asarray(pc.list_value_length(used).to_numpy(zero_copy_only=False))
    elements = used.flatten().drop_null()
    values = elements.unique()
    if not len(values):
        return feature._replace(kind="bag", left_out="its lists are empty")
    items = facts.columns[facts.item_name]
    share = share_of_values(view, items)
    of_request = feature.of in ("user", "context")
    named = names.is_history(feature.column)
    # Small numbers of any meaning are item ids, too; a history is of more than a few of them.
    is_varied = len(values) >= max(20, 0.05 * items.distinct)
    if of_request and (share >= 0.05 if named else share >= 0.5 and is_varied):
        length, most = _length(lengths, 0.9), f"{share:.0%} of its ids are items of the sample"
        check = "" if named and share >= 0.5 else "or 'bag', if these are not items"
        why = f"{most}; 90% of the lists have at most {length}"
        return feature._replace(
            of="user", kind="history", length=length, why=why, check=check, hashed=False
        )
    length = _length(lengths, 0.95)
    why = f"{feature.why}; lists of {len(values):,} values, 95% of at most {length}"
    check = feature.check
    if of_request and named:
        check = "; ".join(filter(None, (check, f"only {share:.0%} are items: no history")))
    return feature._replace(
        kind="bag",
        length=length,
        hashed=len(values) > _HASHED_FROM,
        size=_size(len(values)),
        why=why,
        check=check,
    )


def _length(lengths: np.ndarray, quantile: float) -> int:
    return int(np.clip(np.quantile(lengths, quantile, method="higher"), 1, _MAX_LENGTH))


def _with_one_history(features: list[FeatureGuess]) -> list[FeatureGuess]:
    """Keeps the first history that is sure, or the first; a config has room for one."""
    histories = [feature for feature in features if feature.kind == "history"]
    if len(histories) < 2:
        return features
    best = min(histories, key=lambda feature: bool(feature.check))
    return [
        feature._replace(
            left_out=f"CHECK: another history than {best.name!r}; there is room for one"
        )
        if feature in histories and feature is not best
        else feature
        for feature in features
    ]
