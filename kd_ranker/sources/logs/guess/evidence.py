"""Tests of a column by its values, whatever its name: what it depends on, and what it foretells.

Codes are those of `column.Column`: equal for equal values, -1 where there is none. The owner of a
row is the request, the user or the item that it belongs to, as a code of another column.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, Shaped

Code = Int32[np.ndarray, "rows"]

# Disagreements that chance would have brought, below which their absence says little: e⁻⁵ < 1%.
ENOUGH_EXPECTED = 5.0
# Logs have faults, and features of a user may change now and then.
NEARLY_ALWAYS = 0.98
_BINS = 20
_FEW_VALUES = 50


class Agreement(NamedTuple):
    """The extent to which all rows of an owner have the same value of a column.

    Attributes:
      owners: owners with two values or more, null aside.
      expected: how many values would differ from the first one of their owner by chance.
      kappa: 1 − (how many differ) / `expected`: 1 for a constant, about 0 for a column that does
        not care about owners. (Cohen's kappa, 1960, of each value and the first of its owner.)
    """

    owners: int
    expected: float
    kappa: float

    @property
    def is_known(self) -> bool:
        """True if there was occasion to differ."""
        return self.expected >= ENOUGH_EXPECTED

    @property
    def is_constant(self) -> bool:
        """True if the column is constant within each owner, and might not have been."""
        return self.is_known and self.kappa >= NEARLY_ALWAYS


def agreement(code: Code, owner: Code) -> Agreement:
    """Measures how far a column is constant within each owner.

    A column that mostly holds the same value agrees within any owner, so agreement counts only as
    far as it exceeds that of two rows drawn at random.

    >>> agreement(np.array([3, 3, 4, 4]), np.array([0, 0, 1, 1]))
    Agreement(owners=2, expected=1.0, kappa=1.0)
    >>> agreement(np.array([3, 4, 3, 4]), np.array([0, 0, 1, 1])).kappa
    -1.0
    """
    known = (code >= 0) & (owner >= 0)
    code, owner = code[known], owner[known]
    if not len(code):
        return Agreement(0, 0.0, 0.0)
    first = np.zeros(int(owner.max()) + 1, np.int64)
    # Of equal indices the last one is kept, so from the end it is the first.
    first[owner[::-1]] = np.arange(len(owner))[::-1]
    reference = first[owner]
    later = reference != np.arange(len(owner))
    differing = int((code != code[reference])[later].sum())
    same_by_chance = float(np.square(np.bincount(code) / len(code)).sum())
    expected = int(later.sum()) * (1 - same_by_chance)
    kappa = 1 - differing / expected if expected > 0 else 0.0
    return Agreement(len(np.unique(owner[later])), expected, kappa)


def repeats_within(code: Code, owner: Code) -> float:
    """The share of values that an owner has more than once, counted after their first."""
    known = (code >= 0) & (owner >= 0)
    if not known.any():
        return 0.0
    pair = owner[known].astype(np.int64) * (int(code.max()) + 1) + code[known]
    return 1 - len(np.unique(pair)) / int(known.sum())


def permutation_share(numbers: Float64[np.ndarray, "rows"], owner: Code) -> float:
    """The share of owners whose numbers are 0 to n − 1, or 1 to n, in some order.

    Groups with fewer than two numbers are left out; NaN is no number.
    """
    known = np.isfinite(numbers) & (owner >= 0)
    number, owner = numbers[known], owner[known]
    if not len(number):
        return 0.0
    order = np.lexsort([number, owner])
    number, owner = number[order], owner[order]
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    size = np.diff(np.append(start, len(owner)))
    rank = np.arange(len(owner)) - np.repeat(start, size)
    lowest = number[start]
    in_order = np.logical_and.reduceat(number - np.repeat(lowest, size) == rank, start)
    is_one = in_order & ((lowest == 0) | (lowest == 1))
    return float(is_one[size > 1].mean()) if (size > 1).any() else 0.0


def binned(
    numbers: Float64[np.ndarray, "rows"] | None, code: Code, distinct: int
) -> Int64[np.ndarray, "rows"] | None:
    """A column in at most some 20 bins of about as many rows, or by its values if they are few.

    Missing values have a bin of their own. None for names of many kinds: their information could
    not be told from chance.
    """
    if distinct <= _FEW_VALUES:
        return code.astype(np.int64) + 1
    if numbers is None:
        return None
    known = np.isfinite(numbers)
    if not known.any():
        return None
    edges = np.unique(np.quantile(numbers[known], np.linspace(0, 1, _BINS + 1)[1:-1]))
    return np.where(known, np.searchsorted(edges, np.where(known, numbers, 0)) + 1, 0)


def information(bin_: Int64[np.ndarray, "rows"], is_so: Bool[np.ndarray, "rows"]) -> float:
    """The share of the uncertainty of a yes or no that a column tells: I(bin; is_so) / H(is_so).

    I is the estimate from counts, less its bias of about (bins − 1) / 2n (Miller, 1955). 0 where
    the answer is nearly always the same: too little to tell.

    >>> is_so = np.array([False, False, True, True] * 50)
    >>> information(np.array([0, 0, 1, 1] * 50), is_so) > 0.99
    True
    >>> information(np.array([0, 1, 0, 1] * 50), is_so)
    0.0
    """
    yes = int(is_so.sum())
    if min(yes, len(is_so) - yes) < 30:
        return 0.0
    bins = int(bin_.max()) + 1
    counts = np.bincount(bin_ * 2 + is_so, minlength=2 * bins).reshape(bins, 2) / len(is_so)
    answer = counts.sum(axis=0)
    independent = counts.sum(axis=1, keepdims=True) * answer
    held = counts > 0
    shared = float((counts[held] * np.log(counts[held] / independent[held])).sum())
    shared -= (int(held.any(axis=1).sum()) - 1) / (2 * len(is_so))
    return max(shared, 0.0) / float(-(answer * np.log(answer)).sum())


def skill(probability: Float64[np.ndarray, "rows"], is_so: Bool[np.ndarray, "rows"]) -> float:
    """By how much a column, taken as probabilities, beats the base rate: 1 − BCE / BCE(base rate).

    Negative for numbers in [0, 1] that are no probabilities of this; -1 with too few to tell.

    >>> y = np.array([True] * 60 + [False] * 60)
    >>> skill(np.full(120, 0.5), y), skill(np.where(y, 0.9, 0.1), y) > 0.8
    (0.0, True)
    """
    known = np.isfinite(probability) & (probability >= 0) & (probability <= 1)
    p, y = np.clip(probability[known], 1e-6, 1 - 1e-6), is_so[known]
    if min(int(y.sum()), int((~y).sum())) < 30:
        return -1.0
    base = float(y.mean())
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    return max(-1.0, float(1 + np.where(y, np.log(p), np.log1p(-p)).mean() / entropy))


def first_rows(owner: Code) -> Int64[np.ndarray, "owners"]:
    """The first row of each owner, in the order of the owners' codes."""
    known, first = np.unique(owner, return_index=True)
    return first[known >= 0]


def counts_by(owner: Code, mask: Bool[np.ndarray, "rows"]) -> Int64[np.ndarray, "owners"]:
    """The number of rows of each owner in `mask`; index: the owner's code."""
    size = int(owner.max(initial=-1)) + 1
    return np.bincount(owner[mask & (owner >= 0)], minlength=size)


def is_side_by_side(owner: Shaped[np.ndarray, "rows"]) -> bool:
    """True if the rows of nearly every owner lie side by side."""
    pieces = int((np.diff(owner) != 0).sum()) + 1
    return len(np.unique(owner)) >= 0.9 * pieces
