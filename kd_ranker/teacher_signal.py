"""What a log holds of the teacher (`FeatureSpec.teacher_signal`): probabilities, or positions.

Positions become pseudo-probabilities, so that all that reads a log reads numbers in [0, 1]. They
say nothing of how likely an action is: what compares with them may use their order, no more.
"""

import numpy as np
from jaxtyping import Float, Num


def probability_of_rank(rank: Num[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """The number in [0, 1] that stands for a position in the teacher's order.

        p = 1 / (2 + r),   so that   logit(p) = -log(1 + r)

    The logits are those of Zipf's law: a softmax over them gives position r a share proportional to
    1 / (1 + r).

    Args:
      rank: r = 0, 1, 2, … from the best on, within a request.

    >>> probability_of_rank(np.array([0, 2, 8])).tolist()
    [0.5, 0.25, 0.1]
    """
    return 1 / (2 + rank)
