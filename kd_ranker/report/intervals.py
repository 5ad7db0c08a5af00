"""Means over repeats, with intervals: of a measure, or of a paired difference.

A repeat is one (seed, data seed). What is compared is compared within repeats: their differences
are what an interval is taken of, so that what a repeat does to both students alike cancels out.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over `n` repeats and its interval; `low` and `high` are NaN below two repeats."""

    mean: float
    low: float
    high: float
    n: int


NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0, "nothing")
"""The interval of a measure that nobody knows."""


def interval(values: Float[np.ndarray, "n"]) -> Interval:
    """The mean of what is known of `values`, and its 95% interval.

    mean ± t · s / √n, where s is the standard deviation with n − 1 and t the 97.5% point of
    Student's distribution with n − 1 degrees of freedom (Student, Biometrika 1908). It holds for
    repeats that are independent and roughly normal.

    >>> round(interval(np.array([1.0, 2.0, 3.0])).high, 3)  # 2 + 4.303 · 1 / √3
    4.484
    """
    known = values[~np.isnan(values)]
    n = len(known)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(known.mean())
    if n == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * known.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def difference(table: pd.DataFrame, setting: str, other: str) -> Interval:
    """The paired difference `setting` − `other` over the repeats that know both.

    Args:
      table: of `by_repeat`.
      setting: a column of it.
      other: another.
    """
    return interval((table[setting] - table[other]).to_numpy())
