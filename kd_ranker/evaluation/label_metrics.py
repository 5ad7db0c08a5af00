"""Metrics of probabilities against user labels: sums of each request, to be divided later.

Axes: `R` requests, `N` candidates, `T` tasks, `B` bins of predicted probability. Every function
takes `label_weight`, which is 0 where a candidate was not shown or is padding; what lies there, NaN
included, contributes exactly nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

MARGIN = float(np.finfo(np.float32).eps)
CALIBRATION_BINS = 20


def binary_cross_entropy(
    probability: Float[Array, "*shape"], target: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Cross entropy of a probability against a target in [0, 1], elementwise, in nats.

        -target · log(p) - (1 - target) · log(1 - p)

    `p` is the probability kept `MARGIN` (1.2e-7) away from 0 and 1, as scikit-learn's `log_loss`
    does with float32, so that a wrong certainty costs much but not infinitely much.

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
    promises more than users do.
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
    as in Hanley and McNeil 1982). Weights only say which candidates take part (weight above 0):
    within a request a sampled negative stands for others that rank as it does.

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

    The `CALIBRATION_BINS` bins are equal and closed below, the last one above as well. NaN falls
    into none.
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
