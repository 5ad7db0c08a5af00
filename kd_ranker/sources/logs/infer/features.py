"""The columns that become features, and those that are left out.

A feature is constant within a user, an item or a request. A column that differs among the
candidates of a request may be a score, a position or an outcome: it is a feature only if its name
says that it is known before the final ranker runs.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from kd_ranker.sources.logs.infer.by_structure import is_session
from kd_ranker.sources.logs.infer.guess import Guess, Roles
from kd_ranker.sources.logs.infer.sample import Sample, kind_of
from kd_ranker.sources.logs.infer.words import NAMES, identifier, words
from kd_ranker.sources.logs.sql import quoted

# A count of some days, such as orders_30d.
_WINDOW = r"\d+(d|h|w|m)"
# A column is set by a label if it is set in so many rows, and elsewhere in this share of them.
_LEAST_SET, _STRAY = 20, 0.01
# Requests with a label of 1 that would lack a column by chance.
_LEAST_EXPECTED = 5
# A column tells where others are missing if its values do in so many of these requests.
_LEAST_TOLD = 0.3
# Least correlation of a count of labels with the labels' own.
_COUNTS = 0.8
# A number of requests counts their passed candidates if it does so in this share of them.
_LEAST_EQUAL = 0.9
_ROW_NUMBER = r"__index_level_\d+__|unnamed.*|index|column0+|"


class InferredFeature(NamedTuple):
    """A feature, as the arguments of `configs.feature`."""

    name: str  # its key in the config
    column: str
    of: str
    kind: str
    options: Sequence[str] = ()  # further arguments, as code


class LeftOut(NamedTuple):
    """A column that is no feature."""

    column: str
    why: str
    feature: InferredFeature | None = None  # which it would be, if it is known before ranking


class InferredFeatures(NamedTuple):
    """The columns of a log that have no role."""

    features: list[InferredFeature]
    left_out: list[LeftOut]


def find_features(
    sample: Sample, roles: Roles, doubtful: Collection[str], written_after: Mapping[str, str]
) -> InferredFeatures:
    """Find what the columns without a role are.

    Args:
      sample: of the log.
      roles: of its columns.
      doubtful: columns that may have a role that is still open.
      written_after: column -> the sign that it was written after the ranking.
    """
    features: list[InferredFeature] = []
    left_out: list[LeftOut] = []
    names: list[str] = []
    for facts in sample.facts.drop(roles.used(), errors="ignore").itertuples():
        column = str(facts.Index)
        names.append(identifier(column, names))
        kind = _kind_of_feature(facts, sample, roles.column("item"))
        owner = _owner_of_feature(facts, kind.kind)
        feature = InferredFeature(names[-1], column, owner or "candidate", *kind)
        if column in doubtful:
            why = "perhaps the column that a CHECK asks for"
            left_out.append(LeftOut(column, why, feature if kind.kind else None))
        elif why := _why_no_feature(facts, sample, roles, kind.kind):
            left_out.append(LeftOut(column, why))
        elif facts.request == 1 and facts.experiments:  # or of experience: an amount
            left_out.append(LeftOut(column, "perhaps of an experiment, by its name", feature))
        elif _is_called_as_an_outcome(facts):
            left_out.append(LeftOut(column, "known only afterwards, by its name", feature))
        elif owner == "context" and (why := _why_known_after_ranking(sample, roles, column)):
            left_out.append(LeftOut(column, why, feature))
        elif facts.request == 1 and (stage := _stage_that_it_counts(sample, column)):
            why = f"the number of {stage} candidates of the request"
            left_out.append(LeftOut(column, why, feature))
        elif label := _label_that_sets(sample, roles, column):
            left_out.append(LeftOut(column, f"known, or not 0, only where {label!r} is 1", feature))
        elif column in written_after:
            left_out.append(LeftOut(column, written_after[column], feature))
        elif owner == "context" and facts.is_id and is_session(sample, column):
            left_out.append(LeftOut(column, "perhaps a session", feature))
        elif owner:
            features.append(feature)
        else:
            why = "differs within a request" if facts.request == 0 else "owner unknown"
            left_out.append(LeftOut(column, why, feature))
    return InferredFeatures(features, left_out)


def _why_no_feature(facts: Any, sample: Sample, roles: Roles, kind: str) -> str:
    """Return why a column can be no feature, "" if it may be one.

    Args:
      facts: those of the column, as `DataFrame.itertuples` yields them.
      sample: of the log.
      roles: of its columns.
      kind: of the feature, "" for none.
    """
    may_vary = facts.item != 1 and facts.user != 1
    is_of_request = facts.request == 1 and facts.user != 1
    is_no_action = may_vary and facts.binary and facts.no_actions and facts.request != 1
    is_of_experiment = facts.request == 1 and facts.experiments
    is_rare_elsewhere = facts.ones_out <= 0.2 * facts.ones_in
    has_ones_only_in = facts.binary and not facts.ones_out
    number = _number_of_owners(facts, sample, roles)
    reasons = {
        "a date or a time, and no number": facts.kind == "time" or facts.is_date,
        "its type is not supported": not kind,
        "constant": facts.distinct < 2,
        "a row number": re.fullmatch(_ROW_NUMBER, facts.Index, re.IGNORECASE),
        "missing where a candidate was not shown": facts.only_shown,
        "no action of a user, by its name": is_no_action,
        "perhaps a label": may_vary and facts.request != 1 and has_ones_only_in,
        "a label of another task": facts.binary and facts.task and is_rare_elsewhere,
        "of an experiment, by its name": is_of_experiment and kind != "dense",
        "of what served the request, by its name": is_of_request and facts.system,
        "a weight, by its name": is_of_request and facts.weights,
        "an id or a text": kind == "category" and facts.distinct > 0.8 * number,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_called_as_an_outcome(facts: Any) -> bool:
    """Return whether the name of a column says that it is known only after the ranking."""
    may_vary = facts.item != 1 and facts.user != 1
    is_output = facts.predictions or facts.teacher or (facts.uses and facts.amounts)
    # The count of ratings is one of the past.
    is_outcome = facts.afterwards and not facts.quantities
    is_action = facts.task and not facts.binary
    return bool(may_vary and (is_output or is_outcome or is_action))


def _number_of_owners(facts: Any, sample: Sample, roles: Roles) -> int:
    """Return how many items, users or requests a column is constant for, or rows if for none."""
    if facts.request == 1 and facts.user != 1:
        return sample.request.nunique()
    owner = "user" if facts.user == 1 else "item" if facts.item == 1 else ""
    column = roles.column(owner) if owner else ""
    return sample.facts["distinct"][column] if column else facts.rows


def _why_known_after_ranking(sample: Sample, roles: Roles, column: str) -> str:
    """Return the sign that a column of requests was written after the ranking; "" for none.

    The number of an order is missing where nothing was bought, and a count is that of labels.
    """
    written = {
        "whether the final ranker scored the request": _columns_of(roles.teacher),
        "for which requests the labels were lost": _columns_of(roles.labels),
    }
    for what, columns in written.items():
        if _tells_where_known(sample, column, columns):
            return f"tells {what}"
    is_missing = sample.codes[column].isna().groupby(sample.request).all()
    if user := roles.column("user"):
        # Who has no account has no age of it, either.
        is_missing &= sample.codes[user].notna().groupby(sample.request).all()
    numbers = sample.numbers[column].groupby(sample.request).first()
    for label in _columns_of(roles.labels):
        count = (sample.numbers[label] == 1).groupby(sample.request).sum()
        expected = is_missing.sum() * (count > 0).mean()
        if expected >= _LEAST_EXPECTED and not (is_missing & (count > 0)).any():
            return f"missing for requests without a 1 of {label!r}"
        if numbers.nunique() > 1 and abs(numbers.corr(count)) >= _COUNTS:
            return f"goes with the number of 1 of {label!r} in the request"
    return ""


def _stage_that_it_counts(sample: Sample, column: str) -> str:
    """Return the stage that as many candidates of a request reached as a column says; or ""."""
    said = sample.numbers[column].groupby(sample.request).first()
    for stage, reached in {"passed": sample.passed, "shown": sample.shown}.items():
        count = reached.groupby(sample.request).sum()
        if count.nunique() > 1 and (said == count).mean() >= _LEAST_EQUAL:
            return stage
    return ""


def _tells_where_known(sample: Sample, column: str, others: Sequence[str]) -> bool:
    """Return whether some values of a column of requests occur just where the others are missing.

    As the status of a request does whose scores were lost.
    """
    if not others or not sample.facts["is_few"][column]:
        return False
    is_known = sample.codes[[*others]].notna().any(axis=1).groupby(sample.request).any()
    values = sample.codes[column].groupby(sample.request).first()
    shares = is_known.groupby(values).mean()
    is_told = values.isin(shares.index[shares == 0])
    num_missing = (~is_known).sum()
    is_exception = num_missing < 0.5 * len(is_known)
    return bool(is_exception and is_told.sum() >= max(_LEAST_EXPECTED, _LEAST_TOLD * num_missing))


def _columns_of(guesses: Mapping[str, Guess]) -> list[str]:
    return [guess.value for guess in guesses.values() if guess.value]


def _label_that_sets(sample: Sample, roles: Roles, column: str) -> str:
    """Return the label without which a column is 0 or missing, as a revenue; "" for none."""
    is_set = sample.codes[column].notna() & (sample.numbers[column] != 0)
    labels = _columns_of(roles.labels)
    # A purchase is a click, too.
    for label in sorted(labels, key=lambda label: (sample.numbers[label] == 1).sum()):
        is_positive = sample.numbers[label] == 1
        is_elsewhere = is_set & ~is_positive
        if is_set.sum() >= _LEAST_SET and is_elsewhere.sum() <= _STRAY * is_set.sum():
            return label
    return ""


def _owner_of_feature(facts: Any, kind: str) -> str:
    """Return the first owner for which a column is constant; "" if that is not settled."""
    if (facts.user == 1 and facts.request != 0) or (kind == "history" and facts.request == 1):
        return "user"
    if facts.request == 1:
        return "context"
    if facts.item == 1:
        return "item"
    return "candidate" if facts.early and facts.request == 0 else ""


class _FeatureKind(NamedTuple):
    """The kind of a feature, "" for none, and further arguments of `configs.feature`, as code."""

    kind: str
    options: Sequence[str] = ()


def _kind_of_feature(facts: Any, sample: Sample, item: str) -> _FeatureKind:
    """Return the kind of the feature that a column may be."""
    if facts.is_time or facts.kind == "other":
        return _FeatureKind("")
    hashed = ["hashed=True"] if facts.distinct > 10_000 else []
    if facts.kind == "list":
        return _kind_of_list(facts, sample, item, hashed)
    has_many_values = facts.distinct > 32 and abs(facts.high) < 2**31
    *_, last_word = ("", *words(facts.Index))
    is_code = facts.identifiers and last_word not in NAMES["quantities"]
    is_integer = facts.kind == "integer" and not is_code
    has_window = any(re.fullmatch(_WINDOW, word) for word in words(facts.Index))
    is_amount = is_integer and (has_many_values or facts.quantities or has_window)
    if facts.kind == "float" or is_amount:
        return _FeatureKind("dense")
    return _FeatureKind("category", hashed)


def _kind_of_list(facts: Any, sample: Sample, item: str, hashed: Sequence[str]) -> _FeatureKind:
    lists = f"(SELECT DISTINCT {quoted(facts.Index)} AS l FROM candidates)"
    lengths = "min(len(l)), coalesce(quantile_disc(len(l), 0.95), 1)::INT"
    shortest, long = sample.frame(lengths, lists).iloc[0]
    length = f"length={min(max(long, 1), 200)}"
    kind_of_elements = kind_of(re.sub(r"\[\d*\]$", "", facts.column_type))
    if kind_of_elements not in ("integer", "text"):
        is_vector = kind_of_elements == "float" and shortest == long
        return _FeatureKind("dense" if is_vector else "", [length])
    if item and facts.request != 0:
        items = f"(SELECT {quoted(item)}::VARCHAR FROM candidates)"
        are_items = f"avg((e::VARCHAR IN {items})::INT) > 0.5 AND count(DISTINCT e) > 20"
        if sample.frame(are_items, f"(SELECT unnest(l) e FROM {lists})").iat[0, 0]:
            return _FeatureKind("history", [length])
    return _FeatureKind("bag", [*hashed, length])
