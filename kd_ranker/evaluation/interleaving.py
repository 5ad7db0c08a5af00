"""Team-draft interleaving of two funnels' lists, and the number of requests that a test needs.

    mixed = interleave(list_a, list_b, seed=(experiment, request_id))
    show(mixed.items)
    a, b = mixed.credit(clicked)

`docs/interleaving.md` has the formulas and their assumptions.
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from kd_ranker.errors import UserError

Side = Literal["a", "b"]

_LEVEL, _POWER = 0.05, 0.80


class Credit(NamedTuple):
    """Clicked items that only one of two lists contains, counted by list."""

    a: int
    b: int


class Interleaved(NamedTuple):
    """A mixed list: the items of both lists, each once, in the order in which to show them."""

    items: list[Hashable]
    sides: list[Side]  # the side that picked each item
    shared: list[bool]  # True for each item that both lists contain

    def credit(self, clicked: Iterable[Hashable]) -> Credit:
        """Count the distinct clicked items of each side.

        A user sees a shared item with either funnel, so a click on it does not count.

        Raises:
          UserError: a clicked item is not in the list.

        >>> interleave(["x", "y"], ["x", "z"], seed=0).credit(["x", "z"])
        Credit(a=0, b=1)
        """
        own = dict(zip(self.items, zip(self.sides, self.shared, strict=True), strict=True))
        clicks = {*clicked}
        if unknown := clicks - own.keys():
            item = next(iter(unknown))
            raise UserError(f"clicked item {item!r} is not in the list; give items that were shown")
        return Credit(*(sum(own[item] == (side, False) for item in clicks) for side in ("a", "b")))


def interleave(
    list_a: Iterable[Hashable], list_b: Iterable[Hashable], seed: int | Sequence[int]
) -> Interleaved:
    """Mix two ranked lists by team draft (Radlinski, Kurup and Joachims, CIKM 2008).

    In each round both sides pick once, in random order. A side picks its first item that is not in
    the mixed list yet. When one list has no item left, the other adds the rest of its items.

    Args:
      list_a: items (hashable ids), best first; a repeated item counts at its first position.
      list_b: the same for the other side.
      seed: at least 0, different for each request; the same seed gives the same mixed list.

    >>> interleave([1, 2, 3], [1, 4], seed=0).sides.count("a")
    2
    """
    rankings: dict[Side, list[Hashable]] = {"a": list(list_a), "b": list(list_b)}
    in_a, in_b = ({*ranking} for ranking in rankings.values())
    items, shared = in_a | in_b, in_a & in_b
    left = {side: iter(ranking) for side, ranking in rankings.items()}
    generator = np.random.default_rng(seed)
    orders: tuple[tuple[Side, Side], ...] = (("a", "b"), ("b", "a"))
    picked: dict[Hashable, Side] = {}
    while len(picked) < len(items):
        for side in orders[generator.integers(2)]:
            fresh = (item for item in left[side] if item not in picked)
            picked |= dict.fromkeys(itertools.islice(fresh, 1), side)
    return Interleaved(list(picked), list(picked.values()), [item in shared for item in picked])


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
    a, b = (np.asarray(values, np.float64) for values in (value_a, value_b))
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
        number_needed(2 * (a.var(ddof=1) + b.var(ddof=1)), change),
        number_needed((a - b).var(ddof=1), change),
    )


def number_needed(variance: float, change: float) -> int:
    """Return ⌈z² · variance / change²⌉: requests with which a mean shows a change, not 0.

    The variance is that of one request's number, the test two-sided at 5% with a power of 80%.
    """
    z = stats.norm.ppf(1 - _LEVEL / 2) + stats.norm.ppf(_POWER)
    return math.ceil((z / change) ** 2 * variance)
