"""Agreement of a ranker with user labels, and with the teacher's probabilities and order.

Axes: `R` requests, `N` candidates, `T` tasks, `B` bins of predicted probability, `m` items shown.
Most functions return sums of each request, to be divided after a pass. An entry of weight 0 (not
shown, padding, teacher unknown) contributes exactly 0, even if it is NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float

MARGIN = float(np.finfo(np.float32).eps)
CALIBRATION_BINS = 20
# A mean divergence in nats that float32 probabilities cannot distinguish from 0.
NO_DISTANCE = 1e-6
# The number of following candidates that `teacher_tau` pairs with a candidate.
NEIGHBOURS = 8


def binary_cross_entropy(
    probability: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross entropy of a probability against a target in [0, 1], elementwise, in nats.

        -target · log(p) - (1 - target) · log(1 - p)

    `p` is the probability kept `MARGIN` (1.2e-7) away from 0 and 1, as scikit-learn's `log_loss`
    does with float32, so that a certain but wrong probability has a finite cost.

    >>> losses = binary_cross_entropy(jnp.array([0.5, 0.8]), jnp.array([1.0, 0.0]))
    >>> [f"{loss:.3f}" for loss in losses]
    ['0.693', '1.609']
    """
    kept_inside = jnp.clip(probability, MARGIN, 1 - MARGIN)
    return -target * jnp.log(kept_inside) - (1 - target) * jnp.log1p(-kept_inside)


def user_bce_sums(
    probability: Float[Array, "R N T"],
    label: Float[Array, "R N T"],
    label_weight: Float[Array, "R N"],
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Weighted sum of the cross entropies in nats and the sum of the weights, for each request.

    `user_bce` is the first over the second, each summed over requests.
    """
    weight = jnp.broadcast_to(label_weight[..., None], probability.shape)
    losses = jnp.where(weight > 0, weight * binary_cross_entropy(probability, label), 0.0)
    return losses.sum(axis=1), weight.sum(axis=1)


def user_calibration_sums(
    probability: Float[Array, "R N T"],
    label: Float[Array, "R N T"],
    label_weight: Float[Array, "R N"],
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Weighted sum of the probabilities and weighted sum of the labels, for each request.

    `user_calibration` is the first over the second, each summed over requests: above 1, the model
    overestimates.
    """
    weight = label_weight[..., None]
    predicted = jnp.where(weight > 0, weight * probability, 0.0)
    observed = jnp.where(weight > 0, weight * label, 0.0)
    return predicted.sum(axis=1), observed.sum(axis=1)


def user_auc(
    probability: Float[Array, "R N T"],
    label: Float[Array, "R N T"],
    label_weight: Float[Array, "R N"],
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """Area under the ROC curve within each request, and whether the request counts.

    The share of the pairs (one candidate with label 1, one with label 0) in which the former has
    the higher probability; a tie counts one half (Mann and Whitney's U over the number of pairs,
    as in Hanley and McNeil 1982). Weights only select candidates (weight above 0): within a request
    a sampled negative represents others that rank as it does.

    Returns:
      The area, in [0, 1], 0 where the request does not count, NaN where a probability is NaN;
      and True where the request has both labels.
    """
    takes_part = jnp.broadcast_to(label_weight[..., None] > 0, probability.shape)
    over_tasks = jax.vmap(_auc_of_list, in_axes=-1)
    return jax.vmap(over_tasks)(probability, label, takes_part)


def _auc_of_list(
    probability: Float[Array, "N"], label: Float[Array, "N"], takes_part: Bool[Array, "N"]
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The area of one list by one sort: pairs would need N² memory, and N may be thousands."""
    positive = takes_part & (label > 0.5)
    negative = takes_part & ~positive
    key = jnp.where(takes_part, probability, jnp.inf)
    key, positives, negatives = lax.sort(
        (key, positive.astype(jnp.int32), negative.astype(jnp.int32)), num_keys=1
    )
    up_to_here = lax.cumsum(negatives)
    changes = key[1:] != key[:-1]
    edge = jnp.ones(1, bool)
    begins_tie = jnp.concatenate([edge, changes])
    ends_tie = jnp.concatenate([changes, edge])
    # Counts only grow along the list, so the value at the begin (end) of a group of equal
    # probabilities reaches its members as a running maximum (a running minimum from the end).
    below = lax.cummax(jnp.where(begins_tie, up_to_here - negatives, 0))
    below_or_tied = lax.cummin(jnp.where(ends_tie, up_to_here, key.size), reverse=True)
    won_twice = (positives * (below + below_or_tied)).sum()
    pairs = positives.sum() * negatives.sum()
    area = won_twice / (2 * jnp.maximum(pairs, 1))
    area = jnp.where(jnp.any(takes_part & jnp.isnan(probability)), jnp.nan, area)
    counts = pairs > 0
    return jnp.where(counts, area, 0.0).astype(probability.dtype), counts


def calibration_bin_sums(
    probability: Float[Array, "R N T"],
    label: Float[Array, "R N T"],
    label_weight: Float[Array, "R N"],
) -> tuple[Float[Array, "T B"], Float[Array, "T B"], Float[Array, "T B"]]:
    """Weights, weighted probabilities and weighted labels in each bin, over all requests.

    The `CALIBRATION_BINS` bins are equal and closed below; the last one is also closed above. NaN
    is in no bin.
    """
    place = jnp.clip(jnp.floor(probability * CALIBRATION_BINS), 0, CALIBRATION_BINS - 1)
    weight = jnp.broadcast_to(label_weight[..., None], probability.shape)
    # Comparison and sum, not a scatter: accelerators scatter in no fixed order, and the last digits
    # would differ from run to run.
    inside: Bool[Array, "R N T B"] = place[..., None] == jnp.arange(CALIBRATION_BINS)
    inside = inside & (weight > 0)[..., None]

    def summed(entries: Float[Array, "R N T"]) -> Float[Array, "T B"]:
        return jnp.where(inside, entries[..., None], 0.0).sum(axis=(0, 1))

    return summed(weight), summed(weight * probability), summed(weight * label)


def teacher_bce_sums(
    student_probability: Float[Array, "R N T"],
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Weighted sum of the cross entropies against the teacher, in nats, and sum of the weights.

    `teacher_bce` is the first over the second, each summed over requests.
    """
    losses = binary_cross_entropy(student_probability, teacher_probability)
    losses = jnp.where(teacher_weight > 0, teacher_weight * losses, 0.0)
    return losses.sum(axis=1), teacher_weight.sum(axis=1)


def teacher_entropy_sums(
    teacher_probability: Float[Array, "R N T"], teacher_weight: Float[Array, "R N T"]
) -> Float[Array, "R T"]:
    """Weighted sum of the teacher's own entropies in nats, for each request.

        -p · log(p) - (1 - p) · log(1 - p),  with 0 · log(0) = 0

    It is the minimum of any student's `teacher_bce`, and teacher_kl = teacher_bce - entropy, the
    Kullback-Leibler divergence.
    """
    entropies = _entropy(teacher_probability)
    return jnp.where(teacher_weight > 0, teacher_weight * entropies, 0.0).sum(axis=1)


def teacher_kl_sums(
    student_probability: Float[Array, "R N T"],
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
) -> Float[Array, "R T"]:
    """Weighted sum of the Kullback-Leibler divergences from the teacher in nats, for each request.

    Cross entropy minus entropy, subtracted before summing: the difference of two large sums would
    lose the digits of a student that is close to its teacher.
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
    with the next `NEIGHBOURS` of them in the order of the request, which must be independent of
    their values (an evaluation batch has a fixed random permutation). Up to
    `NEIGHBOURS` + 1 known candidates those are all pairs; all pairs of 2,000 would cost more than
    the rest of the evaluation. The measure with its ties is Kendall's (Biometrika 1945).

    Args:
      student_value: what the student sorts by; NaN on a known candidate makes the request NaN.
      teacher_value: what the teacher sorts by; NaN where it is not known.
      candidate_mask: False on padding.

    Returns:
      A number in [-1, 1], 0 where the student ties all pairs and where the request does not
      count; and False where the teacher ties all pairs.
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
        # Known candidates come first, so a pair is known where its second candidate is.
        of_student = jnp.sign(student[:, other] - student[:, :candidates]) * there[:, other]
        of_teacher = jnp.sign(teacher[:, other] - teacher[:, :candidates]) * there[:, other]
        agreed += of_student * of_teacher
        student_differ += jnp.abs(of_student)
        teacher_differ += jnp.abs(of_teacher)
    pairs = teacher_differ.sum(axis=1)
    scale = jnp.sqrt(jnp.maximum(student_differ.sum(axis=1), 1) * jnp.maximum(pairs, 1))
    counts = pairs > 0
    return jnp.where(counts, agreed.sum(axis=1) / scale, 0.0), counts
