"""Sums by key that are merged piece by piece, in memory that follows the number of keys."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, Shaped

T = TypeVar("T")
# Merging fewer rows would cost more than it saves.
_WORTH_MERGING = 1 << 18


class Merger(Generic[T]):
    """Pieces that are merged as soon as they have grown as large as all that was merged before.

    So at most about twice the memory of the result is held, and each row is merged O(log n) times,
    of n rows. The result does not depend on when pieces are merged, as long as `merge` does not.
    """

    def __init__(self, merge: Callable[[list[T]], T], size: Callable[[T], int]):
        self._merge, self._size = merge, size
        self._pieces: list[T] = []
        self._merged = 0
        self._waiting = 0

    def add(self, piece: T) -> None:
        """Takes one more piece, which comes after those before."""
        self._pieces.append(piece)
        self._waiting += self._size(piece)
        if self._waiting > max(self._merged, _WORTH_MERGING):
            self.result()

    def result(self) -> T:
        """All pieces so far, merged; there must be one."""
        if self._waiting or len(self._pieces) > 1:
            self._pieces = [self._merge(self._pieces)]
            self._merged, self._waiting = self._size(self._pieces[0]), 0
        return self._pieces[0]


class Counts(NamedTuple):
    """Numbers of times that keys occur; the keys are sorted and distinct."""

    key: Int64[np.ndarray, "k"]
    train: Int64[np.ndarray, "k"]
    total: Int64[np.ndarray, "k"]


def counts_of(key: Int64[np.ndarray, "n"], in_train: Shaped[np.ndarray, "n"]) -> Counts:
    """Counts keys, and those of them that are in training requests."""
    keys, inverse, total = np.unique(key, return_inverse=True, return_counts=True)
    train = np.bincount(inverse, weights=in_train, minlength=len(keys)).astype(np.int64)
    return Counts(keys, train, total.astype(np.int64))


def merge_counts(pieces: list[Counts]) -> Counts:
    """The sums of several counts."""
    keys, inverse = np.unique(np.concatenate([piece.key for piece in pieces]), return_inverse=True)

    def summed(numbers: list[np.ndarray]) -> Int64[np.ndarray, "k"]:
        # Sums of whole numbers below 2⁵³ are exact in doubles.
        weights = np.concatenate(numbers)
        return np.bincount(inverse, weights=weights, minlength=len(keys)).astype(np.int64)

    return Counts(
        keys, summed([piece.train for piece in pieces]), summed([piece.total for piece in pieces])
    )


def count_merger() -> Merger[Counts]:
    """A merger of counts."""
    return Merger(merge_counts, lambda counts: len(counts.key))
