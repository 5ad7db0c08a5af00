"""Numbers of the requests on which rankers are measured."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation.metrics.metric import Metric, Ratio, Sums
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.ranked import Ranked


def request_sums(ranked: Ranked) -> Sums:
    """Return numbers of each request, [R] or [R, T]."""
    requests = ranked.evaluation_batch.request_mask
    seen = ranked.scored.seen
    num_scored = ranked.teacher_knows.sum(axis=1)
    num_candidates = ranked.mask.sum(axis=1)
    return {
        "requests": requests,
        "unseen_users": jnp.where(requests, 1 - seen["user"], 0.0),
        "candidates": num_candidates,
        "measured_requests": ranked.is_measured,
        "positives_measured": ranked.is_measured[:, None] * ranked.positive.sum(axis=1),
        "scored_share": ranked.is_measured * num_scored / jnp.maximum(num_candidates, 1),
        "unseen_items": jnp.where(ranked.mask, 1 - seen["item"], 0.0).sum(axis=1),
    }


def _measured_requests(sums: Sums, teacher: Sums) -> Float[np.ndarray, "*draws"]:
    return np.asarray(sums["measured_requests"], np.float64)


CANDIDATES = Metric(
    name="candidates",
    formula="mean candidates of a request",
    sums=request_sums,
    final=Ratio("candidates", "requests"),
    digits=1,
    compared=False,
)

METRICS = (
    Metric(
        name="scored_share",
        formula="the share of a test request's candidates with a known value of the final ranker, "
        "mean over measured requests. Below 1, those without one count as worth nothing, so "
        f"`{CRITERION}` is a lower bound for the ranker that chose which ones were scored",
        sums=request_sums,
        final=Ratio("scored_share", "measured_requests"),
        digits=3,
        compared=False,
    ),
    Metric(
        name="measured_requests",
        formula="the requests on which the funnel is measured: those that the final ranker scored "
        "whole (nine tenths of the candidates), if the log has some; else all",
        sums=request_sums,
        final=_measured_requests,
        digits=0,
        compared=False,
    ),
    Metric(
        name="unseen_users",
        formula="the share of the test requests from users absent from the model's training, which "
        "the reserved row serves; empty where the model is not known",
        sums=request_sums,
        final=Ratio("unseen_users", "requests"),
        digits=3,
        compared=False,
    ),
    Metric(
        name="unseen_items",
        formula="the same of the test candidates",
        sums=request_sums,
        final=Ratio("unseen_items", "candidates"),
        digits=3,
        compared=False,
    ),
)
