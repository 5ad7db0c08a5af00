"""The share of values that items explain without their users."""

import numpy as np
from jaxtyping import Float, Shaped


def item_share(
    request: Shaped[np.ndarray, "n"],
    item: Shaped[np.ndarray, "n"],
    value: Float[np.ndarray, "n"],
) -> float:
    """Share of the variance of `value` within requests that the item alone explains.

    With v the value less its request's mean and u = v / (1 − 1 / n) for a request of n entries,
    (1 − 1 / M) Σ_i n_i · c_i / Σ u v, where n_i is the number of entries of item i, c_i the mean
    product of two different ones of its u, and M = (Σ n_i)² / Σ n_i² the effective number of items.
    The factor corrects for distinct items in a request: the mean of the others depends on the item.
    For v of item effects and noise, both sums are unbiased up to the same factor, so no list of
    items has to be fitted (the method of moments for variance components: Searle, Casella and
    McCulloch, "Variance Components", 1992). Items and requests with one entry are left out. A value
    of labels also varies by chance, which no ranker explains: its share is a lower bound of that of
    the probabilities.

    Args:
      request: the request of each entry, any ids.
      item: its item.
      value: its value: of labels, of a ranker, or true.

    Returns:
      About 1 where the item explains everything, and about 0 where it explains nothing; NaN without
      two entries of an item.

    >>> item_share(np.array([0, 0, 1, 1]), np.array([5, 7, 5, 7]), np.array([1.0, 0.0, 3.0, 2.0]))
    1.0
    """
    requests, items = (np.unique(ids, return_inverse=True)[1] for ids in (request, item))
    sizes = np.bincount(requests)[requests]
    within = value - (np.bincount(requests, value) / np.bincount(requests))[requests]
    scaled = within * sizes / np.maximum(sizes - 1, 1)
    number, sums, squares, total = (
        np.bincount(items[sizes > 1], of[sizes > 1], minlength=items.max(initial=0) + 1)
        for of in (np.ones_like(within), scaled, scaled**2, scaled * within)
    )
    often = number > 1
    distinct = 1 - (number[often] ** 2).sum() / max(number[often].sum(), 1) ** 2
    explained = ((sums**2 - squares)[often] / (number[often] - 1)).sum()
    whole = total[often].sum()
    return float(distinct * explained / whole) if whole else float("nan")
