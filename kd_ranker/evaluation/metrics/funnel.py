"""Metrics of a funnel, by k: a student passes its top k, and the teacher shows m of these."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kd_ranker.batch import Stage
from kd_ranker.evaluation import agreement, funnel
from kd_ranker.evaluation.metrics.metric import (
    AtTarget,
    Captured,
    Final,
    IfSummed,
    Metric,
    Ratio,
    Sums,
    ratio,
)
from kd_ranker.evaluation.metrics.top import top_sums
from kd_ranker.evaluation.ranked import Ranked, covered_funnel


def funnel_sums(ranked: Ranked) -> Sums:
    """Return the sums of all funnels k = 1..N, [R, N], [R, N, T] or [R].

    One sort of the candidates serves all of them, and the sums of a ranker's own top.
    """
    mask = ranked.mask
    shown = ranked.sizes.shown
    is_measured = ranked.is_measured[:, None]
    candidates = mask.sum(axis=1, keepdims=True)
    passed = jnp.arange(1, mask.shape[1] + 1)
    was_shown = mask & (ranked.batch.stage == Stage.SHOWN)
    # Requests with all or none shown cannot distinguish students.
    differs = was_shown.sum(axis=1, keepdims=True) < candidates
    # A shown item without a chance of a label is one that the log did not pass: `known_shown` minus
    # `known_passed_shown`. A live final ranker would also score the `unscored` candidates, without
    # a score in the log, and may show any of them.
    funnels = funnel.funnel_curves(
        ranked.value,
        jnp.where(is_measured, ranked.teacher_value, jnp.nan),
        mask,
        shown,
        of_passed={
            "shown_kept": was_shown & differs,
            "positives_kept": ranked.positive,
            "unscored": is_measured & mask & ~ranked.teacher_knows & ~ranked.was_passed,
        },
        of_shown={
            "value_captured": ranked.teacher_value,
            "true_value_captured": ranked.true_value,
            "positives_shown": ranked.positive,
            "known_passed_shown": ranked.was_passed,
            "known_shown": mask,
        },
        orders=ranked.orders,
    )
    ndcg, ndcg_counts = agreement.ndcg(funnels.gain, funnels.ideal_gain)
    curves = dict(funnels.curves)
    not_passed = curves.pop("known_shown") - curves.pop("known_passed_shown")
    most_without_label = not_passed + curves.pop("unscored")
    slots = is_measured * jnp.minimum(jnp.minimum(passed, candidates), shown)
    sums = {
        **curves,
        "slots": slots,
        "slots_with_label": slots - jnp.minimum(slots, most_without_label),
        "funnel_requests": funnels.counts,
        **covered_funnel(ranked),
        # Candidates that the teacher scores if k are passed: all of a request with fewer.
        "scored": jnp.minimum(passed, candidates),
        "teacher_ndcg": ndcg,
        "teacher_ndcg_requests": ndcg_counts,
        **top_sums(ranked, funnels.first),
    }
    if ranked.sizes.are_partly_scored:
        sums |= _partly_scored_sums(ranked)
    if ranked.sizes.labels_beyond_shown:
        sums |= _served_list_sums(ranked)
    return sums


def _partly_scored_sums(ranked: Ranked) -> Sums:
    """Return the sums for requests of which the log has the scores of some candidates only."""
    mask = ranked.mask
    teacher_value = ranked.teacher_value
    num_scored = (mask & ranked.teacher_knows).sum(axis=1)
    slot_weights = funnel.slots_of_part(ranked.sizes.shown, num_scored, mask.sum(axis=1))
    captured = funnel.list_sums(
        ranked.value, teacher_value, mask, teacher_value, slot_weights, ranked.orders
    )
    passed_auc = funnel.share_of_pairs(ranked.value, mask, ranked.was_passed)
    return {
        "value_if_alike": captured,
        "passed_auc": jnp.nan_to_num(passed_auc),
        "passed_auc_requests": ~jnp.isnan(passed_auc),
    }


def _served_list_sums(ranked: Ranked) -> Sums:
    """NDCG by user labels of the lists that users get, of requests with a positive label."""
    shown = ranked.sizes.shown
    is_labeled = ranked.label_weight > 0
    gain = jnp.where(is_labeled, ranked.user_value, 0.0)
    discount = 1 / jnp.log2(jnp.arange(shown) + 2.0)
    best = -jnp.sort(-gain, axis=1)[:, :shown]
    ideal = jnp.sum(best * discount[: best.shape[1]], axis=1, keepdims=True)
    has_positive = ideal > 0
    slot_weights = jnp.broadcast_to(discount, (len(gain), shown))

    def ndcg(counted: Bool[Array, "R N"]) -> Float[Array, "R N"]:
        teacher_value = jnp.where(counted, ranked.teacher_value, jnp.nan)
        dcg = funnel.list_sums(
            ranked.value, teacher_value, ranked.mask, gain, slot_weights, ranked.orders
        )
        return jnp.where(has_positive, dcg / jnp.where(has_positive, ideal, 1.0), 0.0)

    return {
        "served_ndcg": ndcg(is_labeled),
        "served_ndcg_of_all": ndcg(ranked.mask),
        "served_requests": has_positive[:, 0],
    }


def _end_to_end(sums: Sums, teacher: Sums) -> Float[np.ndarray, "N T *draws"]:
    rate = ratio(sums["positives_shown"], sums["positives_measured"])
    # Where the teacher knows no request, it shows no item: the rate is unknown, and not 0.
    return np.where(np.asarray(sums["funnel_requests"]) > 0, rate, np.nan)


@dataclasses.dataclass(frozen=True)
class AtPassedFor:
    """Another curve, read where `passed_for` is."""

    curve: Final

    def __call__(self, sums: Sums, teacher: Sums) -> AtTarget:
        """Return both curves."""
        captured = Captured("value_captured")
        return AtTarget(captured(sums, teacher), self.curve(sums, teacher))


BY_K = (
    Metric(
        name="survival",
        formula="the share of the teacher's own top m, out of all retrieved, that the student's "
        "top k keeps; mean over requests",
        sums=funnel_sums,
        final=Ratio("survival", "funnel_requests"),
        better="higher",
        per=("k",),
        digits=3,
    ),
    Metric(
        name="value_captured",
        formula="Σ teacher value of the m items shown if the teacher ranks only the student's top "
        "k, over Σ of the same if it ranks all retrieved",
        sums=funnel_sums,
        final=Captured("value_captured"),
        better="higher",
        per=("k",),
        title="value",
    ),
    Metric(
        name="true_value_captured",
        formula="the same items in both sums, valued by the true probabilities; empty where the "
        "dataset does not know them",
        sums=funnel_sums,
        final=Captured("true_value_captured"),
        better="higher",
        per=("k",),
        title="true value",
    ),
    Metric(
        name="shown_recall",
        formula="Σ shown candidates in the student's top k, over Σ shown candidates; over the "
        "requests where the logged funnel has shown some candidates and not all",
        sums=funnel_sums,
        final=Captured("shown_kept"),
        better="higher",
        per=("k",),
        digits=3,
    ),
    Metric(
        name="hit_rate",
        formula="Σ candidates with a positive label in the student's top k, over Σ candidates with "
        "a positive label; labels of weight 0 count for nothing",
        sums=funnel_sums,
        final=Captured("positives_kept"),
        better="higher",
        per=("k", "task"),
        digits=3,
    ),
    Metric(
        name="end_to_end_hit_rate",
        formula="of the same candidates, the share that is among the m items shown if the teacher "
        "ranks only the student's top k",
        sums=funnel_sums,
        final=_end_to_end,
        better="higher",
        per=("k", "task"),
        title="end-to-end hit rate",
        digits=3,
    ),
    Metric(
        name="covered_user_value",
        formula="the funnel among the c candidates that the log passed, of n retrieved, since only "
        "these can have a label. All its numbers shrink by c / n: the student passes its first "
        "⌈k · c / n⌉ of them, and the teacher shows m · c / n. Σ value of the user labels of the "
        "shown, over Σ of the same if all c pass",
        sums=funnel_sums,
        final=Captured("covered_user_value"),
        better="higher",
        per=("k",),
        title="users' value (covered)",
    ),
    Metric(
        name="coverage",
        formula="Σ items shown that the logged funnel passed, over Σ items shown: only these could "
        "get a label. A lower bound where candidates have no score of the final ranker: each of "
        "these that was not passed counts as shown",
        sums=funnel_sums,
        final=Ratio("slots_with_label", "slots"),
        per=("k",),
        digits=3,
    ),
    Metric(
        name="ips_user_value",
        formula="the same as `covered_user_value` with each label over its propensity (Horvitz and "
        "Thompson 1952); empty without propensities",
        sums=funnel_sums,
        final=Captured("ips_user_value"),
        better="higher",
        per=("k",),
        title="users' value (IPS)",
    ),
    Metric(
        name="served_ndcg",
        formula="NDCG by the user labels of the list that the teacher makes of the ranker's first "
        "k, without the candidates that have no label; mean over requests with a positive label. "
        "Empty unless more candidates of a request have labels than the m shown: in a feed, only a "
        "list that was shown has labels",
        sums=funnel_sums,
        final=IfSummed("served_ndcg", Ratio("served_ndcg", "served_requests")),
        better="higher",
        per=("k",),
        title="NDCG of the list",
    ),
    Metric(
        name="served_ndcg_of_all",
        formula="the same with the candidates without a label, which count as not wanted",
        sums=funnel_sums,
        final=IfSummed("served_ndcg", Ratio("served_ndcg_of_all", "served_requests")),
        better="higher",
        per=("k",),
        title="NDCG of the whole list",
    ),
)

TEACHER_NDCG = Metric(
    name="teacher_ndcg",
    formula="NDCG of the student's first m with the teacher's value as gain, Σ gain / log2(1 + "
    "place) over the same in the teacher's own order; mean over requests",
    sums=funnel_sums,
    final=Ratio("teacher_ndcg", "teacher_ndcg_requests"),
    better="higher",
    title="NDCG",
)

BY_TARGET = (
    Metric(
        name="passed_for",
        formula="the smallest k with `value_captured@k` at or above this percentage",
        sums=funnel_sums,
        final=Captured("value_captured"),
        better="lower",
        per=("target",),
        digits=0,
    ),
    Metric(
        name="passed_for_alike",
        formula="the same if the candidates without a score are like those with one, and not worth "
        "nothing: of s scored among n retrieved, the teacher shows m · s / n; empty unless the log "
        "lacks the scores of many candidates",
        sums=funnel_sums,
        final=IfSummed("value_if_alike", Captured("value_if_alike")),
        better="lower",
        per=("target",),
        title="passed if alike",
        digits=0,
    ),
    Metric(
        name="passed_for_users",
        formula="the smallest k with `served_ndcg@k` at or above this percentage of that of all "
        "retrieved",
        sums=funnel_sums,
        final=IfSummed("served_ndcg", Captured("served_ndcg")),
        better="lower",
        per=("target",),
        title="passed for users'",
        digits=0,
    ),
    Metric(
        name="passed_auc",
        formula="the share of pairs (passed by the logged funnel, not passed) within a request "
        "that the ranker orders in this way; mean over requests; empty unless the log lacks the "
        "scores of many candidates",
        sums=funnel_sums,
        final=IfSummed("passed_auc", Ratio("passed_auc", "passed_auc_requests"), like="requests"),
        title="passed AUC",
        digits=3,
        compared=False,
    ),
    Metric(
        name="scored_for",
        formula="mean candidates of a request that the teacher scores at `passed_for`: min(k, "
        "candidates of the request)",
        sums=funnel_sums,
        final=AtPassedFor(Ratio("scored", "requests")),
        better="lower",
        per=("target",),
        digits=1,
    ),
    Metric(
        name="true_value_for",
        formula="`true_value_captured` at `passed_for`: where the saving is taken",
        sums=funnel_sums,
        final=AtPassedFor(Captured("true_value_captured")),
        better="higher",
        per=("target",),
    ),
)
