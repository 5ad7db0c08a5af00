"""Distances of a student from the teacher's probabilities.

Axes: `R` requests, `N` candidates, `T` tasks.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from kd_ranker.evaluation.label_metrics import binary_cross_entropy


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
    p = teacher_probability
    entropies = -xlogy(p, p) - xlogy(1 - p, 1 - p)
    return jnp.where(teacher_weight > 0, teacher_weight * entropies, 0.0).sum(axis=1)


def alignment_ratio(
    student_user_bce: Float[np.ndarray, "T"],
    teacher_user_bce: Float[np.ndarray, "T"],
    student_teacher_bce: Float[np.ndarray, "T"],
) -> float:
    """(user BCE of the student - user BCE of the teacher) / teacher BCE of the student.

    All in nats; the ratio is taken for each task, then averaged over tasks. How much worse the
    student predicts users than the teacher does, measured in its distance from the teacher: a
    small ratio is a student as good as the teacher on users that still disagrees with it.
    """
    return float(np.mean((student_user_bce - teacher_user_bce) / student_teacher_bce))
