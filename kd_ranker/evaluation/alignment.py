"""Distances of a student from the teacher's probabilities, and from its order.

Axes: `R` requests, `N` candidates, `T` tasks, `m` items shown.
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float

from kd_ranker.evaluation.label_metrics import binary_cross_entropy

# A mean divergence in nats, of float32 probabilities, that is none to rounding.
NO_DISTANCE = 1e-6
# How many of the candidates after it a candidate is paired with in `teacher_tau`.
NEIGHBOURS = 8


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
    student_user_bce: Float[np.ndarray, "T *more"],
    teacher_user_bce: Float[np.ndarray, "T *more"],
    distance: Float[np.ndarray, "T *more"],
    known: Bool[np.ndarray, "T *more"],
) -> Float[np.ndarray, "*more"]:
    """(user BCE of the student - user BCE of the teacher) / distance, averaged over known tasks.

    The distance is that of the student from the teacher, its `teacher_kl` or its `teacher_bce`. All
    in nats and on the same items: the share of their disagreement that costs on users. Near 0, a
    student predicts users as well as the teacher does and still disagrees with it; near 1, the
    student only lacks what the teacher knows; below 0, it predicts users better. NaN where a task's
    distance is 0 to rounding (`NO_DISTANCE`), as of an exact copy, and where it is not known.
    """
    there = np.where(distance > NO_DISTANCE, distance, np.nan)
    ratio = (student_user_bce - teacher_user_bce) / there
    tasks = known.sum(axis=0)
    return np.where(known, ratio, 0.0).sum(axis=0) / np.where(tasks > 0, tasks, np.nan)


def teacher_ndcg(
    gain: Float[Array, "R m"], ideal_gain: Float[Array, "R m"]
) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    """NDCG of the student's first m, with the teacher's value as gain, and whether it counts.

        Σ_i gain_i / log2(1 + i)  over  the same of the ideal gains,  i = 1..m

    The gain enters as it is, without an exponent (Järvelin and Kekäläinen 2002). See
    `funnel.FunnelCurves` for the arguments.

    Returns:
      A number in [0, 1], 0 where the request does not count; and False where the ideal is worth
      nothing, so that no order is better than another.
    """
    discount = 1 / jnp.log2(jnp.arange(gain.shape[-1]) + 2.0)
    ideal = (discount * ideal_gain).sum(axis=-1)
    counts = ideal > 0
    ratio = (discount * gain).sum(axis=-1) / jnp.where(counts, ideal, 1.0)
    return jnp.where(counts, ratio, 0.0), counts


def teacher_tau(
    student_value: Float[Array, "R N"],
    teacher_value: Float[Array, "R N"],
    candidate_mask: Bool[Array, "R N"],
) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    """Kendall's tau-b of the student's values against the teacher's, and whether it counts.

        Σ sign(s_i - s_j) · sign(t_i - t_j) / sqrt(#{s_i ≠ s_j} · #{t_i ≠ t_j})

    The pairs (i, j) are a sample, the same for all students: each candidate that the teacher knows
    with the next `NEIGHBOURS` of them in the order in which the request holds them, which has to
    tell nothing of their values (an evaluation batch holds a fixed random permutation). Up to
    `NEIGHBOURS` + 1 known candidates those are all pairs; all pairs of 2,000 would cost more than
    the rest of the evaluation. The measure with its ties is Kendall's (Biometrika 1945).

    Args:
      student_value: what the student sorts by; NaN on a known candidate makes the request NaN.
      teacher_value: what the teacher sorts by; NaN where it is not known.
      candidate_mask: False on padding.

    Returns:
      A number in [-1, 1], 0 where the student tells no pair apart and where the request does not
      count; and False where the teacher tells no pair apart.
    """
    known = candidate_mask & ~jnp.isnan(teacher_value)
    known_first = jnp.argsort(~known, axis=1, stable=True)

    def laid_out(values: Float[Array, "R N"]) -> Float[Array, "R N+neighbours"]:
        values = jnp.take_along_axis(jnp.where(known, values, 0.0), known_first, axis=1)
        return jnp.pad(values, ((0, 0), (0, NEIGHBOURS)))

    student, teacher, there = map(
        laid_out, (student_value, teacher_value, known.astype(jnp.float32))
    )
    candidates = known.shape[1]
    agreed = student_differ = teacher_differ = jnp.zeros(known.shape)
    for distance in range(1, NEIGHBOURS + 1):
        other = slice(distance, distance + candidates)
        # As the known stand first, a pair is known where its second candidate is.
        of_student = jnp.sign(student[:, other] - student[:, :candidates]) * there[:, other]
        of_teacher = jnp.sign(teacher[:, other] - teacher[:, :candidates]) * there[:, other]
        agreed += of_student * of_teacher
        student_differ += jnp.abs(of_student)
        teacher_differ += jnp.abs(of_teacher)
    pairs = teacher_differ.sum(axis=1)
    scale = jnp.sqrt(jnp.maximum(student_differ.sum(axis=1), 1) * jnp.maximum(pairs, 1))
    counts = pairs > 0
    return jnp.where(counts, agreed.sum(axis=1) / scale, 0.0), counts
