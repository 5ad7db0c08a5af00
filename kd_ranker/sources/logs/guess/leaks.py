"""Columns that tell something known only after a ranker has to score."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.guess import evidence, names
from kd_ranker.sources.logs.guess.column import (
    Column,
    as_type,
    is_binary,
    is_known_where,
    positives_of,
)
from kd_ranker.sources.logs.guess.ids import Facts
from kd_ranker.sources.logs.guess.roles import Roles
from kd_ranker.sources.logs.guess.sample import REQUEST_ROWS

_CERTAIN = 0.9  # share of the uncertainty which candidates were shown
_LEAKS, _SUSPECT, _SOMEWHAT = 0.5, 0.2, 0.05  # shares of a label's uncertainty
_MAX_REQUESTS = 2000  # whose lists are compared with their candidates


def leak_of(facts: Facts, roles: Roles, column: Column, of: str) -> tuple[str, str]:
    """Reasons against a column that may be known only later: a certain one, or a suspicion.

    Args:
      facts: of the sample.
      roles: of the other columns.
      column: the column, over candidates.
      of: its owner.

    Returns:
      The reason for which it leaks, and the suspicion that it does; "" for none.
    """
    if column.name not in facts.of_request:
        return _leak_of_candidates(facts, roles, column, of)
    if column.kind == "list":
        return _leak_of_lists(facts, column), ""
    return _leak_of_requests(facts, roles, column), ""


def _leak_of_candidates(facts: Facts, roles: Roles, column: Column, of: str) -> tuple[str, str]:
    shown = roles.shown
    if shown is not None and shown.any() and not shown.all():
        if is_known_where(column, shown):
            return "missing where a candidate was not shown: known only afterwards", ""
        if roles.level is not None:
            passed = roles.level >= Stage.PASSED
            if passed.any() and not passed.all() and is_known_where(column, passed):
                return "missing where a candidate was not passed: too late for an early ranker", ""
        if _is_default_unless(column, shown):
            return "nearly always the same where a candidate was not shown, and not elsewhere", ""
    bins = evidence.binned(
        column.numbers if column.kind in ("integer", "float") else None,
        column.code,
        column.distinct,
    )
    told = 0.0 if bins is None or shown is None else evidence.information(bins, shown)
    if told >= _CERTAIN:
        return f"tells which candidates were shown: {told:.0%} of that uncertainty", ""
    gains = {} if bins is None else _gains(facts, roles, bins)
    task = max(gains, key=lambda task: gains[task], default="")
    most = gains.get(task, 0.0)
    afterwards = of == "candidate" and names.is_known_afterwards(column.name)
    if most >= (_SOMEWHAT if afterwards else _LEAKS):
        return f"tells too much of {task!r} to be known before: {most:.0%} of its uncertainty", ""
    if afterwards and not gains:
        return "CHECK: known only afterwards? a label, of 0 and 1, may be made of it", ""
    if of == "candidate" and column.kind != "list" and names.task_of_label(column.name)[1]:
        if not is_binary(column):
            return "CHECK: called like a label, but not 0 or 1", ""
        return "", "called like a label, but as often 1 where nothing was shown"
    if told >= _LEAKS:
        # A score that ranked them may be known before, and then is a feature worth having.
        return "", f"tells {told:.0%} of the uncertainty what was shown: is it known before?"
    if most >= _SUSPECT:
        return "", f"tells {most:.0%} of the uncertainty of {task!r}: is it known before?"
    if afterwards:
        return "", "known only afterwards?"
    is_score = of == "candidate" and names.is_score(column.name)
    return "", "whose score? is it known to an early ranker?" if is_score else ""


def _is_default_unless(column: Column, shown: Bool[np.ndarray, "rows"]) -> bool:
    """True if one value stands for "nothing" where nothing was shown, and often not elsewhere."""
    code = column.code[~shown & column.known]
    if len(code) < 1000:
        return False
    usual = np.bincount(code).argmax()
    differs = column.code[shown & column.known] != usual
    return bool((code == usual).mean() >= 0.999 and len(differs) and differs.mean() >= 0.2)


def _gains(facts: Facts, roles: Roles, bins: np.ndarray) -> dict[str, float]:
    """Task -> the share of the uncertainty of its label that a column takes away."""
    gains = {}
    for task, guess in roles.labels.items():
        column = facts.columns[guess.column]
        rows = column.known if roles.shown is None else column.known & roles.shown
        gains[task] = evidence.information(bins[rows], column.numbers[rows] == 1)
    return gains


def _leak_of_lists(facts: Facts, column: Column) -> str:
    """Tells lists of candidates, and of labels: zeros and ones, more or fewer than candidates."""
    elements = column.values.flatten().drop_null()
    is_number = pa.types.is_integer(elements.type)
    is_unlike_items = facts.sample.rows == REQUEST_ROWS and is_number
    if is_unlike_items and set(elements.unique().to_pylist()) <= {0, 1}:
        return "CHECK: labels? 0 and 1, in lists of another length than those of the items"
    own, others = _shares_of_candidates(facts, column)
    # Small catalogues are in any request.
    if own - others >= 0.3 * (1 - others) and own > 0:
        return f"{own:.0%} of what it lists are candidates of the same request"
    return ""


def _shares_of_candidates(facts: Facts, column: Column) -> tuple[float, float]:
    """The shares of a request's list that are among its own candidates, and another's."""
    lists = column.values
    items = as_type(facts.columns[facts.item_name].values, lists.type.value_type)
    if items is None:
        return 0.0, 0.0
    first = evidence.first_rows(facts.request)[:_MAX_REQUESTS]
    first = first[column.code[first] >= 0]
    used = lists.take(pa.array(column.code[first]))
    length = np.asarray(pc.list_value_length(used).to_numpy(zero_copy_only=False), np.int64)
    flat = used.flatten()
    item = pc.index_in(flat, value_set=items)
    item = np.asarray(pc.fill_null(item, -1).to_numpy(zero_copy_only=False), np.int64)
    if not len(item) or len(first) < 2:
        return 0.0, 0.0
    size = len(items) + 1
    candidates = facts.request.astype(np.int64) * size + facts.item
    shares = []
    for request in (facts.request[first], np.roll(facts.request[first], 1)):
        pair = np.repeat(request.astype(np.int64), length) * size + item
        shares.append(float(((item >= 0) & np.isin(pair, candidates)).mean()))
    return shares[0], shares[1]


def _leak_of_requests(facts: Facts, roles: Roles, column: Column) -> str:
    """Tells numbers that count what users did in the request."""
    if column.kind not in ("integer", "float"):
        return ""
    first = evidence.first_rows(facts.request)
    numbers = column.numbers[first]
    known = np.isfinite(numbers)
    for task, guess in roles.labels.items():
        positives = positives_of(facts.columns[guess.column])
        counts = evidence.counts_by(facts.request, positives)
        counts = np.pad(counts, (0, int(facts.request.max()) + 1 - len(counts)))
        counted = counts[facts.request[first]][known]
        if known.sum() >= 30 and np.std(counted) > 0 and np.std(numbers[known]) > 0:
            correlation = float(np.corrcoef(numbers[known], counted)[0, 1])
            if abs(correlation) >= 0.95:
                return f"goes with the number of {task!r} in the request: known only afterwards"
    return ""
