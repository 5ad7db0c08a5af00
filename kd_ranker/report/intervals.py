"""Means over repeats, with intervals: of a measure, or of a paired difference.

The intervals made here are of repeats alone; those of `bootstrap` cover the test requests as well.
A repeat is one (seed, data seed). What is compared is compared within repeats: their differences
are what an interval is taken of, so that what a repeat does to both students alike cancels out.
"""

from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
# Of the interval by which two settings are said to be equivalent: two one-sided tests at 5% each.
EQUIVALENCE_CONFIDENCE = 0.90

Covers = Literal["repeats", "requests", "both", "nothing"]


class Interval(NamedTuple):
    """A mean over repeats and its interval.

    Attributes:
      mean: NaN without a repeat.
      low: the lower end; NaN where there is no interval.
      high: the upper end; NaN where there is no interval.
      n: the number of repeats.
      covers: what the interval allows for: the chance of repeats, of test requests, or of both.
    """

    mean: float
    low: float
    high: float
    n: int
    covers: Covers = "repeats"


NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0, "nothing")
"""The interval of a measure that nobody knows."""


def interval(values: Float[np.ndarray, "n"], confidence: float = CONFIDENCE) -> Interval:
    """The mean of what is known of `values`, and its interval, of 95% unless told.

    mean ± t · s / √n, where s is the standard deviation with n − 1 and t the point (1 +
    confidence) / 2 of Student's distribution with n − 1 degrees of freedom (Student, Biometrika
    1908). It holds for repeats that are independent and roughly normal.

    >>> round(interval(np.array([1.0, 2.0, 3.0])).high, 3)  # 2 + 4.303 · 1 / √3
    4.484
    """
    known = values[~np.isnan(values)]
    n = len(known)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0, "nothing")
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, float("nan"), float("nan"), 1, "nothing")
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * known.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def difference(table: pd.DataFrame, setting: str, other: str) -> Interval:
    """The paired difference `setting` − `other` over the repeats that know both.

    Args:
      table: of `by_repeat`.
      setting: a column of it.
      other: another.
    """
    return interval((table[setting] - table[other]).to_numpy())


def verdict(
    difference: Interval, narrower: Interval, margin: float
) -> Literal["higher", "lower", "equivalent", "undecided"]:
    """The reading of a difference that only matters beyond ±`margin`.

    It is *equivalent* if the 90% interval lies inside ±margin, which is two one-sided tests at 5%
    each (Schuirmann, J. Pharmacokinet. Biopharm. 1987); else *higher* or *lower* if the whole 95%
    interval lies on that side of 0; else *undecided*, as it is without an interval. A difference
    that is told from 0 and yet is sure to be too small to matter is equivalent.

    Args:
      difference: with its interval at `CONFIDENCE`.
      narrower: the same at `EQUIVALENCE_CONFIDENCE`.
      margin: at least 0, in the unit of the difference; at 0 nothing is equivalent.

    >>> verdict(Interval(0.01, -0.02, 0.04, 3), Interval(0.01, -0.01, 0.03, 3), 0.05)
    'equivalent'
    """
    if -margin < narrower.low and narrower.high < margin:
        return "equivalent"
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "undecided"
