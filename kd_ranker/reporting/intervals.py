"""Intervals of a mean over repeats: of the repeats, and of the test requests as well.

A repeat is one (seed, data seed). Settings are compared within repeats: an interval is of their
differences, so effects of a repeat on both students cancel.

All repeats are measured on the same requests, so requests and repeats are crossed. To first order
the measure of repeat r is

    θ_r = θ + a_r + b + c_r

with a_r of the repeat, b of the requests, which all repeats share, and c_r of the interaction of
the requests with this repeat. The estimand is θ. The variance of the mean over R repeats is

    V_requests + V_repeats,    V_requests = Var(b),    V_repeats = (Var(a) + Var(c)) / R

The differences among repeats identify V_repeats, and draws of the requests identify V_requests.

Axes: `R` repeats, `N` test requests, `B` draws of the requests, `K` values of k.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

CONFIDENCE = 0.95
# The share of studies in which a difference that is planned for should exclude 0, and the largest
# number of repeats to plan.
POWER = 0.8
_MOST_REPEATS = 50
# With a larger share of draws without the measure, the others do not represent all draws.
_UNKNOWN_DRAWS = 0.05

Covers = Literal["repeats", "requests", "both", "nothing"]


class Interval(NamedTuple):
    """A mean over `n` repeats and the ends of its interval, which are NaN without one.

    `covers` are the sources of chance that it allows for.
    """

    mean: float
    low: float
    high: float
    n: int
    covers: Covers = "repeats"

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of `factor` times the measure."""
        low, high = sorted((factor * self.low, factor * self.high))
        return self._replace(mean=factor * self.mean, low=low, high=high)


_NAN = float("nan")
NOTHING = Interval(_NAN, _NAN, _NAN, 0, "nothing")
"""The interval of an unknown measure."""


@functools.cache
def _t_quantile(confidence: float, degrees: int) -> float:
    """Return the point of Student's distribution below which (1 + confidence) / 2 of it lies.

    SciPy takes a quarter of a millisecond, and a report has thousands of intervals.
    """
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def interval(values: Float[np.ndarray, "n"], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of the known `values` and its interval.

    mean ± t · s / √n, where s is the standard deviation with n − 1 and t the point (1 +
    confidence) / 2 of Student's distribution with n − 1 degrees of freedom (Student, Biometrika
    1908). It holds for repeats that are independent and roughly normal.

    >>> round(interval(np.array([1.0, 2.0, 3.0])).high, 3)  # 2 + 4.303 · 1 / √3
    4.484
    """
    known = values[~np.isnan(values)]
    n = len(known)
    if n == 0:
        return NOTHING
    mean = float(known.mean())
    if n == 1:
        return NOTHING._replace(mean=mean, n=1)
    half = float(_t_quantile(confidence, n - 1) * known.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


class OverDraws(NamedTuple):
    """A measure of a setting in each of the named repeats, NaN where it has none.

    Row 0 of its numbers is measured on the test requests, and rows 1 to B on a draw of them each.
    Where a measure is known on the test requests only, there is only row 0. A curve has one more
    axis.
    """

    repeats: tuple[Hashable, ...]
    numbers: Float[np.ndarray, "1+B R ..."]
    requests: int


def request_counts(requests: int, draws: int, seed: int = 0) -> Int[np.ndarray, "1+B N"]:
    """Return the counts of each request: once, then in each draw of N requests with replacement.

    Every setting and repeat takes the same counts, so that effects of a draw on both sides of a
    difference cancel (Efron, Ann. Stat. 1979). The same seed gives the same counts.
    """
    evenly = np.full(requests, 1 / requests)
    drawn = np.random.default_rng(seed).multinomial(requests, evenly, size=draws)
    return np.concatenate([np.ones((1, requests), drawn.dtype), drawn])


def combined(function: Callable[..., Any], *settings: OverDraws) -> OverDraws:
    """Return a function of the numbers of settings, over the repeats that they have in common.

    `np.subtract` gives the paired difference. Repeats and draws are paired, so all settings must
    stem from the same counts. If the draws of one are not known, those of the result are not.
    """
    first, *others = settings
    num_rows = min(len(setting.numbers) for setting in settings)
    common = [
        repeat for repeat in first.repeats if all(repeat in other.repeats for other in others)
    ]
    numbers = []
    for setting in settings:
        columns = [setting.repeats.index(repeat) for repeat in common]
        numbers.append(setting.numbers[:num_rows, columns])
    return OverDraws(tuple(common), function(*numbers), first.requests)


def crossed_interval(setting: OverDraws) -> Interval:
    """Return the mean over repeats with the measure, and an interval over requests and repeats.

    mean ± (t_N · V_requests + t_R · V_repeats) / √(V_requests + V_repeats), with

        V_requests = N/(N−1) · mean of Cov(drawn[:, r], drawn[:, s]) over r ≠ s, at least 0
        V_repeats = Var(on_test) / R

    where `drawn` is [draws, repeats], `on_test` [repeats] is measured on the test requests, and
    t_N, t_R are the points of Student's distribution (Biometrika 1908) with N − 1 and R − 1 degrees
    of freedom. The sum is an unbiased estimate of the variance if V_requests > 0. Its factor is the
    mean of both points, weighted by the parts (Cochran, Biometrics 1964). One point with
    Satterthwaite's degrees of freedom (Biometrics 1946) covers less if repeats are few.
    `docs/decisions.md` has the measured coverage. The interval of one repeat is ± t_N · √V with
    V = N/(N−1) · Var_b(drawn[b]), and covers the requests only.

    Returns:
      `low` and `high` are NaN if there is one request or no repeat with the measure. They are also
      NaN if more than one draw of twenty lacks the measure. Without draws, the interval is that
      of `interval`, over the repeats only.
    """
    if len(setting.numbers) == 1:
        return interval(setting.numbers[0])
    known = setting.numbers[:, np.isfinite(setting.numbers[0])]
    on_test = known[0]
    drawn = known[1:]
    n = len(on_test)
    if n == 0:
        return NOTHING
    mean = float(on_test.mean())
    is_whole = np.isfinite(drawn).all(axis=1)
    if setting.requests < 2 or is_whole.mean() < 1 - _UNKNOWN_DRAWS:
        return NOTHING._replace(mean=mean, n=n)
    half = _half_width(on_test, drawn[is_whole], setting.requests)
    return Interval(mean, mean - half, mean + half, n, "both" if n > 1 else "requests")


def repeats_to_see(setting: OverDraws, difference: float) -> int | None:
    """Return the repeats with which a true difference excludes 0 in four studies of five.

    The smallest R with

        (t_N · V_requests + t_R · V_repeats) / √V + z · √V ≤ difference

    where V is the sum of both variances, V_repeats is Var(on_test) / R, and 80% of the normal
    distribution lies below z. The first term is the half-width of `crossed_interval`; the second is
    how far a mean may fall short of the truth. Both variances are those of the repeats at hand, of
    which there must be at least two.

    Returns:
      None if 50 repeats would not do, or there are too few to tell.
    """
    known = setting.numbers[:, np.isfinite(setting.numbers[0])]
    on_test = known[0]
    if len(on_test) < 2 or not difference:
        return None
    drawn = known[1:]
    drawn = drawn[np.isfinite(drawn).all(axis=1)]
    v_requests = _variance_of_requests(drawn, setting.requests) if len(drawn) > 1 else 0.0
    t_requests = _t_quantile(CONFIDENCE, max(setting.requests - 1, 1))
    for repeats in range(2, _MOST_REPEATS + 1):
        v_repeats = on_test.var(ddof=1) / repeats
        deviation = np.sqrt(v_requests + v_repeats)
        half = _half_of(v_requests, v_repeats, t_requests, _t_quantile(CONFIDENCE, repeats - 1))
        if half + stats.norm.ppf(POWER) * deviation <= abs(difference):
            return repeats
    return None


def _half_width(
    on_test: Float[np.ndarray, "R"], drawn: Float[np.ndarray, "B R"], requests: int
) -> float:
    """Return the half-width of `crossed_interval`."""
    repeats = len(on_test)
    t_requests = _t_quantile(CONFIDENCE, requests - 1)
    covariance = _covariance(drawn, requests)
    if repeats == 1:
        return float(t_requests * np.sqrt(covariance.item()))
    v_requests = _variance_of_requests(drawn, requests)
    v_repeats = on_test.var(ddof=1) / repeats
    if v_requests + v_repeats == 0:
        # Repeats agree exactly on the test requests, and do not move together over the draws. What
        # they move on their own is the only variance left.
        return float(t_requests * np.sqrt(max(covariance.mean(), 0.0)))
    return _half_of(v_requests, v_repeats, t_requests, _t_quantile(CONFIDENCE, repeats - 1))


def _half_of(v_requests: float, v_repeats: float, t_requests: float, t_repeats: float) -> float:
    weighted = t_requests * v_requests + t_repeats * v_repeats
    return float(weighted / np.sqrt(v_requests + v_repeats))


def _variance_of_requests(drawn: Float[np.ndarray, "B R"], requests: int) -> float:
    """Return the variance of the mean over repeats that stems from the requests they share."""
    is_pair = ~np.eye(drawn.shape[1], dtype=bool)
    return max(float(_covariance(drawn, requests)[is_pair].mean()), 0.0)


def _covariance(drawn: Float[np.ndarray, "B R"], requests: int) -> Float[np.ndarray, "R R"]:
    """Return the covariance of repeats over the draws of requests."""
    repeats = drawn.shape[1]
    # A variance over draws has N in place of N − 1.
    covariance = np.cov(drawn, rowvar=False).reshape(repeats, repeats)
    return covariance * requests / (requests - 1)
