"""Pseudo-probabilities, for logs that hold the teacher's positions alone.

Everything past the log speaks of probabilities. So the candidate at position r = 0, 1, 2, … of the
final ranker's list is stored with the pseudo-probability

    p(r) = 1 / (2 + r),    logit p(r) = −log(1 + r)

of every task. It keeps the order, so measures of the order alone (survival, the members of the
top k, the higher one of two) are what they would be with probabilities. A softmax over these
logits gives position r a share in proportion to 1 / (1 + r): Zipf's law. As probabilities of an
action they mean nothing; `kd_ranker.distillation.losses.NEEDS_PROBABILITIES` names the losses that
take them so.
"""

from typing import TypeVar

import numpy as np
from jaxtyping import Array

Numbers = TypeVar("Numbers", float, np.ndarray, Array)


def probability_of_rank(rank: Numbers) -> Numbers:
    """The pseudo-probability of a position.

    Args:
      rank: position r ≥ 0, 0 being the best, of any shape; NaN where it is not known.

    Returns:
      1 / (2 + r), in (0, 1/2]; NaN where r is. In float32 neighbours differ up to r of some 10⁷.

    Example:
      >>> import numpy as np
      >>> probability_of_rank(np.array([0.0, 1.0, 8.0, np.nan]))
      array([0.5       , 0.33333333, 0.1       ,        nan])
    """
    return 1 / (2 + rank)


def rank_of_probability(probability: Numbers) -> Numbers:
    """The inverse of `probability_of_rank`, up to rounding.

    Example:
      >>> rank_of_probability(probability_of_rank(3.0))
      3.0
    """
    return 1 / probability - 2
