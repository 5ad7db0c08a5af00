"""The number of requests that a live test needs to show a change of clicks.

`docs/serving.md` has the formulas and their assumptions.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from kd_ranker.errors import UserError

_LEVEL = 0.05
_POWER = 0.80


class RequestsNeeded(NamedTuple):
    """Numbers of requests for an A/B test, both arms together, and for an interleaved test."""

    ab: int
    interleaved: int


def requests_needed(
    value_a: Float[np.ndarray, "R"], value_b: Float[np.ndarray, "R"], effect: float = 0.002
) -> RequestsNeeded:
    """Plan a test that detects a change in clicks at 5% (two-sided) with a power of 80%.

    With Δ = effect · mean(value_a) and z = z.975 + z.80, the numbers are

        ab           2 z² · (Var(value_a) + Var(value_b)) / Δ²
        interleaved  z² · Var(value_a − value_b) / Δ²

    The second holds for credited clicks if a click on an item depends neither on its position nor
    on the other items, and users see the whole mixed list.

    Args:
      value_a: clicks on the list of funnel a, summed in each of R ≥ 2 requests.
      value_b: the same for funnel b in the same requests, from the same draw of clicks.
      effect: the change to detect, as a share of the mean of `value_a`; above 0.

    Raises:
      UserError: an effect or values from which no number follows.
    """
    a = np.asarray(value_a, np.float64)
    b = np.asarray(value_b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise UserError(
            f"value_a and value_b have shapes {a.shape} and {b.shape}; "
            "give one number per request for the same 2 or more requests"
        )
    change = effect * a.mean()
    if not (0 < change < math.inf and np.isfinite(b).all()):
        raise UserError(
            f"effect={effect} of a mean value_a of {a.mean():g} is no positive change, or a value "
            "is not finite; give a positive effect and finite values with a positive mean"
        )
    return RequestsNeeded(
        ab=number_needed(2 * (a.var(ddof=1) + b.var(ddof=1)), change),
        interleaved=number_needed((a - b).var(ddof=1), change),
    )


def number_needed(variance: float, change: float) -> int:
    """Return ⌈z² · variance / change²⌉: requests with which a mean shows a change, not 0.

    The variance is that of one request's number, the test two-sided at 5% with a power of 80%.
    """
    z = stats.norm.ppf(1 - _LEVEL / 2) + stats.norm.ppf(_POWER)
    return math.ceil((z / change) ** 2 * variance)
