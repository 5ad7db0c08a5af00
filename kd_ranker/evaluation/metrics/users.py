"""Metrics against the labels of users, over candidates with a label."""

from jaxtyping import Array, Bool, Float

from kd_ranker.evaluation import agreement, funnel
from kd_ranker.evaluation.agreement import weighted_sum
from kd_ranker.evaluation.metrics.metric import Metric, Ratio, Sums
from kd_ranker.evaluation.ranked import Ranked


def user_sums(ranked: Ranked) -> Sums:
    """Return the sums of a ranker against user labels, [R, T] or [R]."""
    probability, label, weight = ranked.labels
    area, has_both = agreement.user_auc(probability, label, weight)
    ndcg, has_positive = _user_ndcg(ranked)
    return {
        "user_bce": weighted_sum(agreement.binary_cross_entropy(probability, label), weight),
        "label_weight": weight.sum(axis=1),
        "predicted": weighted_sum(probability, weight),
        "observed": weighted_sum(label, weight),
        "user_auc": area,
        "user_auc_requests": has_both,
        "user_ndcg": ndcg,
        "user_ndcg_requests": has_positive,
    }


def _user_ndcg(ranked: Ranked) -> tuple[Float[Array, "R"], Bool[Array, "R"]]:
    """NDCG of the labeled candidates; equal values keep the order of the candidates."""
    gain = ranked.of_labeled(ranked.user_value)
    value = ranked.of_labeled(ranked.value)
    weight = ranked.of_labeled(ranked.label_weight)
    curves = funnel.funnel_curves(value, gain, weight > 0, ranked.sizes.shown)
    return agreement.ndcg(curves.gain, curves.ideal_gain)


METRICS = (
    Metric(
        name="user_bce",
        formula="Σ w · (−y log p − (1 − y) log(1 − p)) / Σ w, in nats, over shown candidates",
        sums=user_sums,
        final=Ratio("user_bce", "label_weight"),
        better="lower",
        per=("task",),
        title="user BCE",
        probabilities_of=("ranker",),
        averaged=True,
    ),
    Metric(
        name="user_auc",
        formula="the share of pairs (label 1, label 0) *within a request* that p orders rightly, a "
        "tie counting ½; averaged over requests that have both labels",
        sums=user_sums,
        final=Ratio("user_auc", "user_auc_requests"),
        better="higher",
        per=("task",),
        title="AUC",
    ),
    Metric(
        name="user_ndcg",
        formula="NDCG of the ranker's first m of the candidates with a label, with the value of "
        "the user labels as gain, Σ gain / log2(1 + place) over the same in the best order; mean "
        "over requests with a positive label",
        sums=user_sums,
        final=Ratio("user_ndcg", "user_ndcg_requests"),
        better="higher",
        title="users' NDCG",
    ),
    Metric(
        name="user_calibration",
        formula="Σ w p / Σ w y over shown candidates: above 1, the model promises too much",
        sums=user_sums,
        final=Ratio("predicted", "observed"),
        better="one",
        per=("task",),
        title="calibration",
        digits=3,
        probabilities_of=("ranker",),
    ),
)
