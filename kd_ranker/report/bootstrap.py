"""Intervals that cover both the test requests and the repeats.

A measure of a setting is a function of sums over the test requests, averaged over repeats: seeds of
the teacher, the initialisation and the order of the data. All repeats are read on the same
requests, so requests and repeats are crossed. To first order the measure of repeat r is

    θ_r = θ + a_r + b + c_r

with a_r of the repeat, b of the requests, which all repeats share, and c_r of how the requests meet
this repeat. What is wanted is θ, and the variance of the mean over R repeats is Var(a)/R + Var(b) +
Var(c)/R. Repeats tell the first and the last of these, requests drawn anew the other two.

    counts = request_counts(requests)
    before, after = (measured(sums, counts, needed) for sums in (of_none, of_aux))
    crossed_interval(combined(np.subtract, after, before))

Axes: `R` repeats, `N` test requests, `B` draws of the requests, `K` values of k.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from kd_ranker.evaluation.metrics import ratio
from kd_ranker.report.intervals import CONFIDENCE, Interval

DRAWS = 1000
# Beyond this share of draws without a measure, what is left of them says too little of the rest.
_UNKNOWN_DRAWS = 0.05


class Measured(NamedTuple):
    """A measure of a setting in each repeat, NaN where it has none.

    Attributes:
      repeats: their names, in the order of the R axis.
      each: on the test requests.
      drawn: on each draw of the requests.
      requests: how many there are.
    """

    repeats: tuple[Hashable, ...]
    each: Float[np.ndarray, "R"]
    drawn: Float[np.ndarray, "B R"]
    requests: int


def request_counts(requests: int, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "B N"]:
    """The times that each request occurs in each draw of as many, with replacement.

    The same counts are to serve every setting and repeat, so that what a draw does to both sides of
    a difference cancels out (Efron, Ann. Stat. 1979).

    Args:
      requests: N, at least one.
      draws: B.
      seed: the same seed gives the same counts.
    """
    evenly = np.full(requests, 1 / requests)
    return np.random.default_rng(seed).multinomial(requests, evenly, size=draws)


def resampled_sums(
    values: Float[np.ndarray, "R N *shape"], counts: Int[np.ndarray, "B N"]
) -> Float[np.ndarray, "B R *shape"]:
    """The sums over requests in each draw: Σ_n counts[b, n] · values[r, n], in float64."""
    repeats, requests, *shape = values.shape
    flat = np.asarray(values, np.float64).reshape(repeats, requests, -1)
    sums = np.matmul(counts.astype(np.float64), flat)
    return np.moveaxis(sums, 0, 1).reshape(len(counts), repeats, *shape)


def measured(
    values: Float[np.ndarray, "R N *shape"],
    counts: Int[np.ndarray, "B N"],
    measure: Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]],
    repeats: Sequence[Hashable] | None = None,
) -> Measured:
    """A measure of the sums over requests, on the test requests and on each draw of them.

    Args:
      values: of each repeat and request, what the measure takes the sums of.
      counts: of `request_counts`, for the same requests.
      measure: from sums [..., *shape] to numbers [...], NaN where there is none.
      repeats: names that tell which repeats two settings have in common; numbered if None.
    """
    names = tuple(range(len(values)) if repeats is None else repeats)
    totals = np.asarray(values, np.float64).sum(axis=1)
    return Measured(
        names, measure(totals), measure(resampled_sums(values, counts)), values.shape[1]
    )


def combined(function: Callable[..., Any], *settings: Measured) -> Measured:
    """A function of the measures of several settings, over the repeats that they have in common.

    `np.subtract` gives the paired difference. Repeats and draws are paired, so all settings must
    stem from the same counts.

    Args:
      function: from one array of numbers a setting to an array of that shape.
      *settings: at least one.
    """
    first, *others = settings
    common = [name for name in first.repeats if all(name in other.repeats for other in others)]
    places = [[setting.repeats.index(name) for name in common] for setting in settings]
    each = [setting.each[at] for setting, at in zip(settings, places, strict=True)]
    drawn = [setting.drawn[:, at] for setting, at in zip(settings, places, strict=True)]
    return Measured(tuple(common), function(*each), function(*drawn), first.requests)


def crossed_interval(setting: Measured, confidence: float = CONFIDENCE) -> Interval:
    """The mean over the repeats that have the measure, and an interval over requests and repeats.

    mean ± (t_N · B + t_R · S) / √(B + S), with two parts of the variance of the mean,

        B = N/(N−1) · mean of Cov_b(drawn[b, r], drawn[b, s]) over r ≠ s    requests, at least 0
        S = Var_r(each[r]) / R                    repeats, and pairs of a repeat and a request

    and t_N, t_R the points of Student's distribution (Biometrika 1908) with N − 1 and R − 1
    degrees of freedom. B + S is an unbiased estimate of the variance if B > 0. Its factor is the
    mean of both points, weighted by the parts (Cochran, Biometrics 1964). One point with
    Satterthwaite's degrees of freedom (Biometrics 1946) covers less where repeats are few.
    `docs/report.md` has the measured coverage. The interval of one repeat is ± t_N · √V with
    V = N/(N−1) · Var_b(drawn[b]), and covers the requests only.

    Returns:
      `low` and `high` are NaN if there is one request or no repeat with the measure. They are also
      NaN if more than one draw of twenty lacks the measure.
    """
    known = np.isfinite(setting.each)
    each, drawn = setting.each[known], setting.drawn[:, known]
    n, requests = len(each), setting.requests
    nan = float("nan")
    if n == 0:
        return Interval(nan, nan, nan, 0, "nothing")
    mean = float(each.mean())
    whole = np.isfinite(drawn).all(axis=1)
    if requests < 2 or whole.mean() < 1 - _UNKNOWN_DRAWS:
        return Interval(mean, nan, nan, n, "nothing")
    half = _half(each, drawn[whole], requests, confidence)
    return Interval(mean, mean - half, mean + half, n, "both" if n > 1 else "requests")


def _half(
    each: Float[np.ndarray, "R"], drawn: Float[np.ndarray, "B R"], requests: int, confidence: float
) -> float:
    """The half-width of `crossed_interval`."""
    repeats = len(each)
    # A variance over draws has N in place of N − 1.
    covariance = np.cov(drawn, rowvar=False).reshape(repeats, repeats) * requests / (requests - 1)
    t_requests = stats.t.ppf((1 + confidence) / 2, requests - 1)
    if repeats == 1:
        return float(t_requests * np.sqrt(covariance.item()))
    t_repeats = stats.t.ppf((1 + confidence) / 2, repeats - 1)
    of_requests = max(covariance[~np.eye(repeats, dtype=bool)].mean(), 0.0)
    of_repeats = each.var(ddof=1) / repeats
    if (total := of_requests + of_repeats) == 0:
        # Repeats that agree exactly tell nothing of each other: the requests remain.
        return float(t_requests * np.sqrt(max(covariance.mean(), 0.0)))
    return float((t_requests * of_requests + t_repeats * of_repeats) / np.sqrt(total))


def passed_for(
    sums: Float[np.ndarray, "*shape K"], ks: Int[np.ndarray, "K"], target: float
) -> Float[np.ndarray, "*shape"]:
    """The smallest k whose sum is at least `target` of the last; NaN if none is, or that is 0.

    Between two values of k the curve is taken for a straight line, and k is rounded up: on a grid
    of all k this is the smallest one exactly.

    Args:
      sums: a curve over k, summed over requests; its last entry is what there is to capture.
      ks: the values of k, increasing.
      target: a share, in (0, 1].

    Raises:
      ValueError: the curve and `ks` differ in length.

    >>> passed_for(np.array([5.0, 7.0, 8.0]), np.array([10, 20, 40]), 0.92)  # 7.36: 20 + 0.36 · 20
    array(28.)
    """
    if sums.shape[-1] != len(ks):
        raise ValueError(f"a curve of {sums.shape[-1]} values at {len(ks)} values of k")
    share = ratio(sums, sums[..., -1:])
    reached = share >= target
    at = reached.argmax(axis=-1)
    before = np.maximum(at - 1, 0)
    above = np.take_along_axis(share, at[..., None], axis=-1)[..., 0]
    below = np.take_along_axis(share, before[..., None], axis=-1)[..., 0]
    # No line leads to the first k.
    part = (target - below) / np.where(at == 0, 1.0, above - below)
    between = np.maximum(np.ceil(ks[before] + part * (ks[at] - ks[before])), ks[before] + 1)
    return np.where(reached.any(axis=-1), np.where(at == 0, ks[0], between), np.nan)
