"""The share of values that items explain without their users."""

import numpy as np
from jaxtyping import Float, Shaped


def item_share(
    request: Shaped[np.ndarray, "n"],
    item: Shaped[np.ndarray, "n"],
    value: Float[np.ndarray, "n"],
) -> float:
    """Share of the variance of `value` within requests that the item alone explains.

    With v the value less its request's mean, Σ_i n_i · c_i / Σ v², where n_i is the number of
    entries of item i and c_i the mean product of two different ones of them. For v = b_i + noise,
    c_i estimates b_i² without bias, so no list of items has to be fitted (the method of moments
    for variance components: Searle, Casella and McCulloch, "Variance Components", 1992).
    Items with one entry are left out. A value of labels also varies by chance, which no ranker
    explains: its share is a lower bound of that of the probabilities.

    Args:
      request: the request of each entry, any ids.
      item: its item.
      value: its value: of labels, of a ranker, or true.

    Returns:
      At most 1, and about 0 where the item explains nothing; NaN without two entries of an item.

    >>> item_share(np.array([0, 0, 1, 1]), np.array([5, 7, 5, 7]), np.array([1.0, 0.0, 3.0, 2.0]))
    1.0
    """
    requests, items = (np.unique(ids, return_inverse=True)[1] for ids in (request, item))
    within = value - (np.bincount(requests, value) / np.bincount(requests))[requests]
    number, sums, squares = (
        np.bincount(items, of) for of in (np.ones_like(within), within, within**2)
    )
    often = number > 1
    explained = ((sums**2 - squares)[often] / (number[often] - 1)).sum()
    total = squares[often].sum()
    return float(explained / total) if total else float("nan")
