"""Agreement of a ranker with user labels, and with the teacher's probabilities and order.

Axes: `R` requests, `N` candidates, `T` tasks, `B` bins of predicted probability, `m` items shown.
Numbers are per request, and are summed over a pass before they are divided. An entry of weight 0
(not shown, padding, teacher unknown) contributes exactly 0, even if it is NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Bool, Float

from kd_ranker.evaluation.funnel import first_of

MARGIN = float(np.finfo(np.float32).eps)
CALIBRATION_BINS = 20
# The number of following candidates that `teacher_tau` pairs with a candidate.
NEIGHBOURS = 8


def weighted_sum(
    values: Float[Array, "R N T"], weight: Float[Array, "R N T"]
) -> Float[Array, "R T"]:
    """Σ weight · value over the candidates of each request with a weight above 0.

    >>> weighted_sum(jnp.array([[[1.0], [jnp.nan]]]), jnp.array([[[2.0], [0.0]]])).tolist()
    [[2.0]]
    """
    return jnp.where(weight > 0, weight * values, 0.0).sum(axis=1)


def binary_cross_entropy(
    probability: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross entropy in nats: −target · log(p) − (1 − target) · log(1 − p), target in [0, 1].

    `p` is the probability kept `MARGIN` (1.2e-7) away from 0 and 1, as scikit-learn's `log_loss`
    does with float32, so that a certain but wrong probability has a finite cost.

    >>> losses = binary_cross_entropy(jnp.array([0.5, 0.8]), jnp.array([1.0, 0.0]))
    >>> [f"{loss:.3f}" for loss in losses]
    ['0.693', '1.609']
    """
    kept_inside = jnp.clip(probability, MARGIN, 1 - MARGIN)
    return -target * jnp.log(kept_inside) - (1 - target) * jnp.log1p(-kept_inside)


def entropy(probability: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Entropy in nats: −p · log(p) − (1 − p) · log(1 − p), with 0 · log(0) = 0."""
    rest = 1 - probability
    return -xlogy(probability, probability) - xlogy(rest, rest)


def divergence(
    probability: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Kullback-Leibler divergence from a target in nats: cross entropy − entropy.

    Sum it after the subtraction: the difference of two large sums would lose the digits of a
    student that is close to its teacher.
    """
    return binary_cross_entropy(probability, target) - entropy(target)


def user_auc(
    probability: Float[Array, "R N T"], label: Float[Array, "R N T"], weight: Float[Array, "R N T"]
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """Area under the ROC curve within each request, and whether the request has both labels.

    The share of the pairs (label 1, label 0) in which the former has the higher probability; a tie
    counts one half (Hanley and McNeil 1982). A candidate takes part if its weight is above 0:
    within a request a sampled negative represents others that rank as it does. The area is in
    [0, 1], 0 where the request does not count, and NaN where a probability is NaN.
    """

    def of_list(
        probability: Float[Array, "N"], label: Float[Array, "N"], takes_part: Bool[Array, "N"]
    ) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        # By a sort: pairs would need N² memory, and N may be thousands.
        positive = takes_part & (label > 0.5)
        negative = takes_part & (label <= 0.5)
        negatives = jnp.sort(jnp.where(negative, probability, jnp.inf))
        below = jnp.searchsorted(negatives, probability, side="left")
        below_or_tied = jnp.searchsorted(negatives, probability, side="right")
        won_twice = jnp.sum(below + below_or_tied, where=positive)
        pairs = positive.sum() * negative.sum()
        area = jnp.where(pairs > 0, won_twice / (2 * jnp.maximum(pairs, 1)), 0.0)
        diverged = (pairs > 0) & jnp.any(takes_part & jnp.isnan(probability))
        return jnp.where(diverged, jnp.nan, area).astype(probability.dtype), pairs > 0

    return jax.vmap(jax.vmap(of_list, in_axes=-1))(probability, label, weight > 0)


def calibration_bin_sums(
    probability: Float[Array, "R N T"], label: Float[Array, "R N T"], weight: Float[Array, "R N T"]
) -> tuple[Float[Array, "T B"], Float[Array, "T B"], Float[Array, "T B"]]:
    """Weights, weighted probabilities and weighted labels in each bin, over all requests.

    The `CALIBRATION_BINS` bins are equal and closed below; the last one is also closed above. NaN
    is in no bin.
    """
    place = jnp.clip(jnp.floor(probability * CALIBRATION_BINS), 0, CALIBRATION_BINS - 1)
    # Comparison and sum, not a scatter: accelerators scatter in no fixed order, and the last digits
    # would differ from run to run.
    inside: Bool[Array, "R N T B"] = place[..., None] == jnp.arange(CALIBRATION_BINS)
    inside = inside & (weight > 0)[..., None]

    def summed(entries: Float[Array, "R N T"]) -> Float[Array, "T B"]:
        return jnp.where(inside, entries[..., None], 0.0).sum(axis=(0, 1))

    return summed(weight), summed(weight * probability), summed(weight * label)


def ndcg(
    gain: Float[Array, "R m"], ideal_gain: Float[Array, "R m"]
) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    """NDCG of a ranker's first m candidates, and whether the request counts.

        Σ_i gain_i / log2(1 + i)  over  the same of the ideal gains,  i = 1..m

    The gain, at least 0, has no exponent (Järvelin and Kekäläinen 2002). Both arrays are in the
    order of their ranker. The result is in [0, 1], and 0 where the ideal is 0: such a request does
    not count.
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

        Σ sign(s_i − s_j) · sign(t_i − t_j) / sqrt(#{s_i ≠ s_j} · #{t_i ≠ t_j})

    The pairs (i, j) are a sample, the same for all students: each candidate that the teacher knows
    with the next `NEIGHBOURS` of them in the order of the request, which must be independent of
    their values (an evaluation batch has a fixed random permutation). Up to `NEIGHBOURS` + 1 known
    candidates those are all pairs. The measure with its ties is Kendall's (Biometrika 1945).

    The teacher's value is NaN where it is not known; a student's NaN on a known candidate makes the
    request NaN. The result is in [-1, 1], and 0 where the student ties all pairs. A request in
    which the teacher ties all pairs does not count, and is 0 too.
    """
    known = candidate_mask & ~jnp.isnan(teacher_value)
    known_first = first_of(known)

    def in_their_order(values: Float[Array, "R N"]) -> Float[Array, "R N"]:
        return jnp.take_along_axis(jnp.where(known, values, 0.0), known_first, axis=1)

    student_value = in_their_order(student_value)
    teacher_value = in_their_order(teacher_value)
    # Known candidates come first, so a pair is known where its second candidate is.
    is_known = in_their_order(known.astype(jnp.float32))

    def signs(values: Float[Array, "R N"], distance: int) -> Float[Array, "R pairs"]:
        second = values[:, distance:]
        return jnp.sign(second - values[:, : second.shape[1]]) * is_known[:, distance:]

    agreed = student_differ = teacher_differ = jnp.zeros(len(known))
    for distance in range(1, 1 + NEIGHBOURS):
        student_signs = signs(student_value, distance)
        teacher_signs = signs(teacher_value, distance)
        agreed += (student_signs * teacher_signs).sum(axis=1)
        student_differ += jnp.abs(student_signs).sum(axis=1)
        teacher_differ += jnp.abs(teacher_signs).sum(axis=1)
    scale = jnp.sqrt(jnp.maximum(student_differ, 1) * jnp.maximum(teacher_differ, 1))
    counts = teacher_differ > 0
    return jnp.where(counts, agreed / scale, 0.0), counts
