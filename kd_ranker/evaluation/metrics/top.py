"""Metrics of a ranker's own top m of all retrieved, by the truth where the dataset knows it."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kd_ranker.evaluation.metrics.metric import Metric, Ratio, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked


def top_sums(ranked: Ranked, first: Int[Array, "R m"]) -> Sums:
    """Return the value of a ranker's own top m, promised and true, and the most that any m have.

    `first` are the indices of the top m. A candidate with a value of NaN is never chosen, and a
    request with only these counts for nothing. Sums [R] are NaN where the dataset does not know a
    true value.
    """
    promised = jnp.take_along_axis(ranked.value, first, axis=1)
    true = jnp.take_along_axis(ranked.true_value, first, axis=1)
    is_candidate = jnp.take_along_axis(ranked.mask, first, axis=1)
    chosen = is_candidate & ~jnp.isnan(promised)
    known = ranked.mask & ~jnp.isnan(ranked.true_value)
    best, _ = lax.top_k(jnp.where(known, ranked.true_value, -jnp.inf), first.shape[1])
    counted = jnp.isfinite(best) & chosen.any(axis=1, keepdims=True)
    unknown = jnp.any(ranked.mask & ~known, axis=1)
    return {
        "top_promised": jnp.where(unknown, jnp.nan, jnp.sum(promised, axis=1, where=chosen)),
        "top_true": jnp.where(unknown, jnp.nan, jnp.sum(true, axis=1, where=chosen)),
        "top_best": jnp.where(unknown, jnp.nan, jnp.sum(best, axis=1, where=counted)),
    }


def _regret(sums: Sums, teacher: Sums) -> Float[np.ndarray, "*draws"]:
    return 1 - ratio(sums["top_true"], sums["top_best"])


# Their sums are among those of `funnel.funnel_sums`, which has the order of the candidates.
METRICS = (
    Metric(
        name="regret",
        formula="1 − Σ true value of the ranker's own top m, out of all retrieved, over Σ true "
        "value of the m that are truly best; empty where the dataset does not know it",
        final=_regret,
        better="lower",
    ),
    Metric(
        name="top_calibration",
        formula="Σ value that the ranker gives its own top m over Σ their true value: above 1, it "
        "promises too much where it chooses; empty where the dataset does not know it",
        final=Ratio("top_promised", "top_true"),
        better="one",
        title="calibration of the top",
        digits=3,
        probabilities_of=("ranker",),
    ),
)
