"""Looking up keys among sorted ones."""

import numpy as np
from jaxtyping import Bool, Int, Int64


def look_up(
    sorted_keys: Int[np.ndarray, "known"], key: Int[np.ndarray, "n"]
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Finds the place of each key among sorted ones, 0 if it is not there, and tells the two apart.

    >>> look_up(np.array([3, 5]), np.array([5, 4]))
    (array([1, 0]), array([ True, False]))
    """
    if not len(sorted_keys):
        return np.zeros(len(key), np.int64), np.zeros(len(key), bool)
    place = np.minimum(np.searchsorted(sorted_keys, key), len(sorted_keys) - 1)
    known = sorted_keys[place] == key
    return np.where(known, place, 0), known
