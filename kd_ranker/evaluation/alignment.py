"""Distances of a student from the teacher's probabilities.

Axes: `R` requests, `N` candidates, `T` tasks.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from kd_ranker.evaluation.label_metrics import binary_cross_entropy

# A mean divergence in nats, of float32 probabilities, that is none to rounding.
NO_DISTANCE = 1e-6


def teacher_bce_sums(
    student_probability: Float[Array, "R N T"],
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Weighted sum of the cross entropies against the teacher, in nats, and sum of the weights.

    `teacher_bce` is the first over the second, each summed over requests. Entries of weight 0
    contribute exactly nothing, whatever they hold.
    """
    losses = binary_cross_entropy(student_probability, teacher_probability)
    losses = jnp.where(teacher_weight > 0, teacher_weight * losses, 0.0)
    return losses.sum(axis=1), teacher_weight.sum(axis=1)


def teacher_entropy_sums(
    teacher_probability: Float[Array, "R N T"], teacher_weight: Float[Array, "R N T"]
) -> Float[Array, "R T"]:
    """Weighted sum of the teacher's own entropies in nats, for each request.

        -p · log(p) - (1 - p) · log(1 - p),  with 0 · log(0) = 0

    It is the least that any student's `teacher_bce` can be, and what separates it from the
    Kullback-Leibler divergence: teacher_kl = teacher_bce - entropy.
    """
    entropies = _entropy(teacher_probability)
    return jnp.where(teacher_weight > 0, teacher_weight * entropies, 0.0).sum(axis=1)


def teacher_kl_sums(
    student_probability: Float[Array, "R N T"],
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
) -> Float[Array, "R T"]:
    """Weighted sum of the Kullback-Leibler divergences from the teacher in nats, for each request.

    Cross entropy less entropy, subtracted before they are summed: the digits of a student that is
    close to its teacher would be lost in the difference of two large sums.
    """
    losses = binary_cross_entropy(student_probability, teacher_probability)
    divergences = losses - _entropy(teacher_probability)
    return jnp.where(teacher_weight > 0, teacher_weight * divergences, 0.0).sum(axis=1)


def _entropy(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return -xlogy(p, p) - xlogy(1 - p, 1 - p)


def alignment_ratio(
    student_user_bce: Float[np.ndarray, "T"],
    teacher_user_bce: Float[np.ndarray, "T"],
    distance: Float[np.ndarray, "T"],
) -> float:
    """(user BCE of the student - user BCE of the teacher) / distance, averaged over tasks.

    The distance is that of the student from the teacher, its `teacher_kl` or its `teacher_bce`. All
    in nats and on the same items: the share of their disagreement that costs on users. Near 0, a
    student predicts users as well as the teacher does and still disagrees with it; near 1, the
    student only lacks what the teacher knows; below 0, it predicts users better. NaN where a task's
    distance is 0 to rounding (`NO_DISTANCE`), as of an exact copy, and where it is not known.
    """
    there = np.where(distance > NO_DISTANCE, distance, np.nan)
    return float(np.mean((student_user_bce - teacher_user_bce) / there))
