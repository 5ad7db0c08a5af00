"""A teacher of whom the log holds the order alone: positions as numbers in (0, 1)."""

import numpy as np
from jaxtyping import Float, Float32, Int


def probability_of_rank(
    rank: Float[np.ndarray, "n"] | Int[np.ndarray, "n"], number: Int[np.ndarray, "n"]
) -> Float32[np.ndarray, "n"]:
    """1 − (rank + ½) / number: a number in (0, 1) that falls from the first to the last.

    It is no probability of anything, and only its order within a request means something.

    Args:
      rank: of a candidate among those of its request that the teacher ranked, 0 the best.
      number: of these.

    >>> probability_of_rank(np.array([0, 1]), np.array([2, 2])).tolist()
    [0.75, 0.25]
    """
    return (1 - (rank + 0.5) / number).astype(np.float32)
