"""The requests that a final ranker scored whole: only they show what it would have chosen.

So if a log has some requests with all scores, the funnel is measured on these. Where it scored no
more than was passed to it, the candidates to pass are known only between bounds: those without a
score are worth nothing, or they are like those with one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from kd_ranker.requests.columns import LEAST_WHOLE, Columns, slices

# A ranker with a higher `passed_auc` repeats the choice of the candidates that were scored, and
# gains by it. In the cascade, students with losses on stages have 0.77 to 0.81, others and lists
# 0.53 to 0.69, and upper bounds begin to fail at 0.68 (docs/results.md).
_LIKE_THE_CHOICE = 0.65


class Bounds(NamedTuple):
    """The bounds of a number of candidates to pass; `high` is NaN if it is not bounded."""

    low: float
    high: float


def bounds(if_worthless: float, if_alike: float, passed_auc: float) -> Bounds:
    """Return the bounds of `passed_for` of a ranker in requests that were scored in part.

    Candidates without a score are worth less than those with one, and more than nothing. If they
    are worth nothing, a ranker passes many in vain; if they are alike, few. But one that puts the
    candidates first that were chosen to be scored, as today's early ranker does, passes few in vain
    either way: it has no upper bound.

    Args:
      if_worthless: `passed_for`, with nothing for a candidate without a score.
      if_alike: `passed_for_alike`.
      passed_auc: the metric of this name.

    >>> bounds(467, 152, 0.63)
    Bounds(low=152, high=467)
    >>> bounds(183, 152, 1.0)
    Bounds(low=152, high=nan)
    """
    low, high = sorted((if_worthless, if_alike))
    if not passed_auc < _LIKE_THE_CHOICE:
        high = math.nan
    return Bounds(low, high)


class Measurable(NamedTuple):
    """The requests of a split on which the funnel is measured."""

    requests: Bool[np.ndarray, "n"] | None  # None: all
    are_partly_scored: bool  # whether they lack the scores of many candidates


def measurable(columns: Columns, value_weights: Sequence[float]) -> Measurable:
    """Choose the requests with a score for nearly all candidates, passed or not.

    A score is needed for each task with a value weight. Requests of which all candidates were
    passed do not count, as they are the small ones. All requests are measured if all are scored
    whole, or only small ones.
    """
    counted = np.asarray(value_weights) > 0
    counts = columns.counts
    share = np.empty(len(columns))
    for part in slices(counts.retrieved):
        sizes = counts.of(part).retrieved
        values = columns.candidates.fields(part, sizes)["teacher_probability"]
        request = np.repeat(np.arange(len(sizes)), sizes)
        is_known = ~np.isnan(values[:, counted]).any(axis=1)
        known = np.bincount(request, weights=is_known, minlength=len(sizes))
        share[part] = known / np.maximum(sizes, 1)
    is_whole = share >= LEAST_WHOLE
    if is_whole.all():
        return Measurable(None, are_partly_scored=False)
    is_whole &= counts.retrieved > counts.passed
    if is_whole.any():
        return Measurable(is_whole, are_partly_scored=False)
    return Measurable(None, bool(np.average(share, weights=counts.retrieved) < LEAST_WHOLE))
