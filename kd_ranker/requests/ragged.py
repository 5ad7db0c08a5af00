"""Lists of different lengths, concatenated in one array."""

import numpy as np
from jaxtyping import Int, Int64, Shaped


def starts_of(lengths: Shaped[np.ndarray, "n"]) -> Int64[np.ndarray, "n+1"]:
    """Return where each of several concatenated lists begins, and where the last one ends.

    >>> starts_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def runs(
    first: Int[np.ndarray, "n"], numbers: Int[np.ndarray, "n"], stride: int = 1
) -> Int[np.ndarray, "sum"]:
    """Return concatenated ranges: `numbers[i]` integers from `first[i]` in steps of `stride`.

    >>> runs(np.array([5, 90]), np.array([3, 2])).tolist()
    [5, 6, 7, 90, 91]
    """
    start = starts_of(numbers)
    return np.repeat(first - stride * start[:-1], numbers) + stride * np.arange(start[-1])
