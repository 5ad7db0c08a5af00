"""The metrics, one entry each: `METRICS`.

The columns of `results.csv` and `curves.csv`, marks and titles derive from an entry. Formulas on
one batch are in `agreement` and `funnel`. To try a metric of your own, put it into `METRICS`, and
its columns into `MAIN`, before you call a function of `kd_ranker.api`.

Axes: `R` requests, `N` candidates, `T` tasks, `B` bins of predicted probability.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import Stage
from kd_ranker.evaluation import agreement, funnel
from kd_ranker.evaluation.agreement import weighted_sum
from kd_ranker.evaluation.ranked import Ranked, covered_funnel

# By name: of each request of a batch, [R, ...], or over all of a batch or a pass, [...].
Sums = dict[str, Float[Array | np.ndarray, "..."]]
SumFunction = Callable[[Ranked], Sums]
Ends = Callable[[Sums, Sums], Any]
Better = Literal["lower", "higher", "one"]

# The share of the value that a funnel must keep to be as good as the whole: that of the criterion.
TARGET = 0.99
# A mean divergence in nats that float32 probabilities cannot distinguish from 0.
_NO_DISTANCE = 1e-6


class ReportAt(NamedTuple):
    """The points of a curve that are reported."""

    ks: Sequence[int] = ()  # candidates passed, at least 1; one beyond their number means all
    targets: Sequence[float] = ()  # shares in (0, 1) to reach


class Metric(NamedTuple):
    """A column of `results.csv`, or one for each task or k.

    Attributes:
      name: of its columns `name`, `name/<task>`, `name@<k>`, `name@<k>/<task>`, `name_<percent>`.
      ends: from the sums over the requests of a pass, and those of the teacher on the same, to
        its numbers, NaN where there is nothing to measure: an array [N] (index `k - 1` belongs to
        k), [T] or [N, T], or one number. For targets it is a curve [N]; the first k at or above the
        target is reported. Of a pair of curves, it is the value of the second at that k. Sums and
        numbers may have one more axis, the last, of draws of the requests: do not reduce it. None
        if the column is not measured on requests but filled in by `results`.
      sums: functions of a batch, in addition to `SUMS`, that return sums of each request by name,
        arrays [R, ...]. Those of a metric with a number for each k or target may be curves,
        [R, N, ...]. Metrics may share a function: it is called once per batch.
    """

    name: str
    formula: str  # in Markdown
    better: Better | None = None
    per: tuple[Literal["k", "task", "target"], ...] = ()  # a number for each
    ends: Ends | None = None
    sums: tuple[SumFunction, ...] = ()
    title: str = ""  # in tables and figures; by default `name` with spaces
    digits: int = 4  # after the decimal point, in tables
    # The rankers that must give probabilities, not only an order.
    probabilities_of: tuple[Literal["ranker", "teacher"], ...] = ()
    of_teacher: bool = True  # whether it is defined for the teacher itself
    averaged: bool = False  # whether a report has the mean over tasks too, under `name`
    compared: bool = True  # whether a report compares settings on it


def _of_users(ranked: Ranked) -> Sums:
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
    """NDCG of the labelled candidates; equal values keep the order of the candidates."""
    gain, value, weight = map(
        ranked.of_labelled, (ranked.user_value, ranked.value, ranked.label_weight)
    )
    found = funnel.funnel_curves(value, gain, weight > 0, ranked.sizes.shown)
    return agreement.ndcg(found.gain, found.ideal_gain)


def _of_teacher(ranked: Ranked) -> Sums:
    teacher, weight = ranked.teacher_probability, ranked.teacher_weight
    losses = agreement.binary_cross_entropy(ranked.probability, teacher)
    tau, tau_counts = agreement.teacher_tau(ranked.value, ranked.teacher_value, ranked.mask)
    return {
        "teacher_bce": weighted_sum(losses, weight),
        "teacher_weight": weight.sum(axis=1),
        "teacher_entropy": weighted_sum(agreement.entropy(teacher), weight),
        "teacher_tau": tau,
        "teacher_tau_requests": tau_counts,
    }


def _on_shown(ranked: Ranked) -> Sums:
    """The student, the teacher and the users on the same items: shown, and known to the teacher."""
    student, label, weight = ranked.labels
    teacher = ranked.of_labelled(ranked.teacher_probability)
    known = (ranked.teacher_weight > 0) & ranked.teacher_knows[..., None]
    weight = jnp.where(ranked.of_labelled(known), weight, 0.0)
    against_user = agreement.binary_cross_entropy(student, label)
    against_teacher = agreement.binary_cross_entropy(student, teacher)
    return {
        "shown_user_bce": weighted_sum(against_user, weight),
        "shown_teacher_bce": weighted_sum(against_teacher, weight),
        "shown_teacher_kl": weighted_sum(agreement.divergence(student, teacher), weight),
        "shown_weight": weight.sum(axis=1),
    }


def _of_funnel(ranked: Ranked) -> Sums:
    mask, shown = ranked.mask, ranked.sizes.shown
    is_measured = ranked.is_measured[:, None]
    candidates = mask.sum(axis=1, keepdims=True)
    passed = jnp.arange(1, mask.shape[1] + 1)
    was_shown = mask & (ranked.batch.stage == Stage.SHOWN)
    # Requests with all or none shown cannot distinguish students.
    differs = was_shown.sum(axis=1, keepdims=True) < candidates
    found = funnel.funnel_curves(
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
            "passed_shown": ranked.was_passed,
            "all_shown": mask,
        },
    )
    ndcg, ndcg_counts = agreement.ndcg(found.gain, found.ideal_gain)
    curves = dict(found.curves)
    # The final ranker of a live funnel would score all that are passed to it. Any of those without
    # a score in the log may be shown then, in place of one that the log has passed.
    slots = is_measured * jnp.minimum(jnp.minimum(passed, candidates), shown)
    without_label = curves["all_shown"] - curves["passed_shown"] + curves.pop("unscored")
    curves["all_shown"] = slots
    curves["passed_shown"] = slots - jnp.minimum(slots, without_label)
    return {
        **curves,
        "funnel_requests": found.counts,
        **covered_funnel(ranked),
        # Candidates that the teacher scores if k are passed: all of a request with fewer.
        "scored": jnp.minimum(passed, candidates),
        "teacher_ndcg": ndcg,
        "teacher_ndcg_requests": ndcg_counts,
        **_of_top(ranked, found.first),
        **(_of_partly_scored(ranked) if ranked.sizes.are_partly_scored else {}),
        **(_of_served_lists(ranked) if ranked.sizes.labels_beyond_shown else {}),
    }


def _of_served_lists(ranked: Ranked) -> Sums:
    """NDCG by user labels of the lists that users get, of requests with a positive label."""
    shown, is_labelled = ranked.sizes.shown, ranked.label_weight > 0
    gain = jnp.where(is_labelled, ranked.user_value, 0.0)
    discount = 1 / jnp.log2(jnp.arange(shown) + 2.0)
    best = -jnp.sort(-gain, axis=1)[:, :shown]
    ideal = jnp.sum(best * discount[: best.shape[1]], axis=1, keepdims=True)
    slot_weights = jnp.broadcast_to(discount, (len(gain), shown))

    def ndcg(counted: Bool[Array, "R N"]) -> Float[Array, "R N"]:
        teacher_value = jnp.where(counted, ranked.teacher_value, jnp.nan)
        dcg = funnel.list_sums(ranked.value, teacher_value, ranked.mask, gain, slot_weights)
        return jnp.where(ideal > 0, dcg / jnp.where(ideal > 0, ideal, 1.0), 0.0)

    return {
        "served_ndcg": ndcg(is_labelled),
        "served_ndcg_of_all": ndcg(ranked.mask),
        "served_requests": ideal[:, 0] > 0,
    }


def _of_partly_scored(ranked: Ranked) -> Sums:
    """The sums for requests of which the log has the scores of some candidates only."""
    mask, teacher_value = ranked.mask, ranked.teacher_value
    num_scored = (mask & ranked.teacher_knows).sum(axis=1)
    slot_weights = funnel.slots_of_part(ranked.sizes.shown, num_scored, mask.sum(axis=1))
    captured = funnel.list_sums(ranked.value, teacher_value, mask, teacher_value, slot_weights)
    passed_auc = funnel.share_of_pairs(ranked.value, mask, ranked.was_passed)
    return {
        "value_if_alike": captured,
        "passed_auc": jnp.nan_to_num(passed_auc),
        "passed_auc_requests": ~jnp.isnan(passed_auc),
    }


def _of_top(ranked: Ranked, first: Int[Array, "R m"]) -> Sums:
    """The value of a ranker's own top m, promised and true, and the most that any m have.

    A candidate with a value of NaN is never chosen, and a request with only these counts for
    nothing. Sums are NaN where the dataset does not know a true value.
    """
    promised, true, there = (
        jnp.take_along_axis(of, first, axis=1)
        for of in (ranked.value, ranked.true_value, ranked.mask)
    )
    chosen = there & ~jnp.isnan(promised)
    known = ranked.mask & ~jnp.isnan(ranked.true_value)
    best, _ = lax.top_k(jnp.where(known, ranked.true_value, -jnp.inf), first.shape[1])
    counted = jnp.isfinite(best) & chosen.any(axis=1, keepdims=True)
    unknown = jnp.any(ranked.mask & ~known, axis=1)
    sums = {"promised": (promised, chosen), "true": (true, chosen), "best": (best, counted)}
    return {
        f"top_{name}": jnp.where(unknown, jnp.nan, jnp.sum(of, axis=1, where=where))
        for name, (of, where) in sums.items()
    }


def _of_requests(ranked: Ranked) -> Sums:
    requests, seen = ranked.evaluation_batch.request_mask, ranked.scored.seen
    return {
        "requests": requests,
        "unseen_users": jnp.where(requests, 1 - seen["user"], 0.0),
        "candidates": ranked.mask.sum(axis=1),
        "measured_requests": ranked.is_measured,
        "positives_measured": ranked.is_measured[:, None] * ranked.positive.sum(axis=1),
        "scored_share": ranked.is_measured
        * ranked.teacher_knows.sum(axis=1)
        / jnp.maximum(ranked.mask.sum(axis=1), 1),
        "unseen_items": jnp.where(ranked.mask, 1 - seen["item"], 0.0).sum(axis=1),
    }


# The functions of the sums that every metric may use; the curves are those of `_of_funnel`.
SUMS = (_of_users, _of_teacher, _on_shown, _of_funnel, _of_requests)


def ratio(
    numerator: Array | np.ndarray, denominator: Array | np.ndarray
) -> Float[np.ndarray, "*shape"]:
    """Numerator over denominator in float64, NaN where the denominator is 0."""
    below = np.asarray(denominator, np.float64)
    return np.asarray(numerator, np.float64) / np.where(below == 0, np.nan, below)


def _ratio(numerator: str, denominator: str) -> Ends:
    return lambda sums, _: ratio(sums[numerator], sums[denominator])


def _captured(name: str) -> Ends:
    """A curve over its last entry: a ratio of sums, not the mean of the ratios of requests."""
    return lambda sums, _: ratio(sums[name], sums[name][-1])


def _at_target(curve: Ends) -> Ends:
    """A curve at the k of `passed_for`."""
    captured = _captured("value_captured")
    return lambda sums, teacher: (captured(sums, teacher), curve(sums, teacher))


def _alignment(distance: str) -> Ends:
    """A mean over the tasks that are known.

    Near 0, a student predicts users as well as the teacher does; near 1, it only lacks the
    teacher's knowledge; below 0, it predicts users better.
    """
    bce, of_distance = (_ratio(name, "shown_weight") for name in ("shown_user_bce", distance))

    def ends(sums: Sums, teacher: Sums) -> Float[np.ndarray, "*draws"]:
        away, known = of_distance(sums, teacher), np.asarray(sums["shown_weight"]) > 0
        each = (bce(sums, teacher) - bce(teacher, teacher)) / np.where(
            away > _NO_DISTANCE, away, np.nan
        )
        return ratio(np.where(known, each, 0.0).sum(axis=0), known.sum(axis=0))

    return ends


def _if_summed(name: str, ends: Ends, like: str = "value_captured") -> Ends:
    """The same ends where the sum `name` was measured; else NaN, in the shape of the sum `like`."""

    def or_nothing(sums: Sums, teacher: Sums) -> Any:
        if name in sums:
            return ends(sums, teacher)
        return np.full_like(sums[like], np.nan, np.float64)

    return or_nothing


def _end_to_end(sums: Sums, _: Sums) -> Float[np.ndarray, "N T"]:
    rate = ratio(sums["positives_shown"], sums["positives_measured"])
    # Where the teacher knows no request, it shows no item: the rate is unknown, and not 0.
    return np.where(np.asarray(sums["funnel_requests"]) > 0, rate, np.nan)


# Kinds of metrics: losses against the teacher, a number for each task; and curves of a gain.
_loss = functools.partial(
    Metric,
    better="lower",
    per=("task",),
    probabilities_of=("ranker", "teacher"),
    averaged=True,
)
_gain = functools.partial(Metric, better="higher", per=("k",))
_at_passed_for = functools.partial(Metric, per=("target",))
_candidates_for = functools.partial(Metric, per=("target",), digits=0, better="lower")
# Small for a student that predicts users well as for one that strays: neither way is better.
_aligned = functools.partial(
    Metric, digits=3, probabilities_of=("ranker", "teacher"), of_teacher=False
)
# Filled in for a whole sweep.
_saving = functools.partial(Metric, digits=3, better="higher")
_of_data = functools.partial(Metric, digits=3, compared=False)

# In the order of the columns of `results.csv`.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _loss(
            name="user_bce",
            formula="Σ w · (−y log p − (1 − y) log(1 − p)) / Σ w, in nats, over shown candidates",
            title="user BCE",
            ends=_ratio("user_bce", "label_weight"),
            probabilities_of=("ranker",),
        ),
        Metric(
            name="user_auc",
            formula="the share of pairs (label 1, label 0) *within a request* that p orders "
            "rightly, a tie counting ½; averaged over requests that have both labels",
            title="AUC",
            better="higher",
            per=("task",),
            ends=_ratio("user_auc", "user_auc_requests"),
        ),
        Metric(
            name="user_ndcg",
            formula="NDCG of the ranker's first m of the candidates with a label, with the value "
            "of the user labels as gain, Σ gain / log2(1 + place) over the same in the best "
            "order; mean over requests with a positive label",
            title="users' NDCG",
            better="higher",
            ends=_ratio("user_ndcg", "user_ndcg_requests"),
        ),
        Metric(
            name="user_calibration",
            formula="Σ w p / Σ w y over shown candidates: above 1, the model promises too much",
            title="calibration",
            digits=3,
            better="one",
            per=("task",),
            ends=_ratio("predicted", "observed"),
            probabilities_of=("ranker",),
        ),
        _loss(
            name="teacher_bce",
            formula="Σ w · (−q log p − (1 − q) log(1 − p)) / Σ w, over entries with teacher weight",
            title="teacher BCE",
            ends=_ratio("teacher_bce", "teacher_weight"),
        ),
        _loss(
            name="teacher_kl",
            formula="`teacher_bce` less the teacher's own mean entropy: 0 for a perfect copy",
            title="teacher KL",
            ends=lambda sums, _: (
                ratio(sums["teacher_bce"], sums["teacher_weight"])
                - ratio(sums["teacher_entropy"], sums["teacher_weight"])
            ),
        ),
        _loss(
            name="teacher_kl_shown",
            formula="the same divergence over shown candidates where the teacher knows every "
            "task, with label weights",
            title="teacher KL of the shown",
            ends=_ratio("shown_teacher_kl", "shown_weight"),
        ),
        _aligned(
            name="alignment_ratio",
            formula="mean over tasks of (user BCE of the student − user BCE of the teacher) / "
            "teacher KL of the student, all three on the items and with the weights of "
            "`teacher_kl_shown`; empty where that is not above 10⁻⁶",
            ends=_alignment("shown_teacher_kl"),
        ),
        _aligned(
            name="alignment_ratio_bce",
            formula="the same with the student's teacher BCE on these items below the line, which "
            "counts the teacher's own entropy",
            title="alignment ratio (BCE)",
            ends=_alignment("shown_teacher_bce"),
        ),
        _gain(
            name="survival",
            formula="the share of the teacher's own top m, out of all retrieved, that the "
            "student's top k keeps; mean over requests",
            digits=3,
            ends=_ratio("survival", "funnel_requests"),
        ),
        _gain(
            name="value_captured",
            formula="Σ teacher value of the m items shown if the teacher ranks only the student's "
            "top k, over Σ of the same if it ranks all retrieved",
            title="value",
            ends=_captured("value_captured"),
        ),
        _gain(
            name="true_value_captured",
            formula="the same items in both sums, valued by the true probabilities; empty where "
            "the dataset does not know them",
            title="true value",
            ends=_captured("true_value_captured"),
        ),
        _gain(
            name="shown_recall",
            formula="Σ shown candidates in the student's top k, over Σ shown candidates; over the "
            "requests where the logged funnel has shown some candidates and not all",
            digits=3,
            ends=_captured("shown_kept"),
        ),
        _gain(
            name="hit_rate",
            formula="Σ candidates with a positive label in the student's top k, over Σ candidates "
            "with a positive label; labels of weight 0 count for nothing",
            digits=3,
            per=("k", "task"),
            ends=_captured("positives_kept"),
        ),
        _gain(
            name="end_to_end_hit_rate",
            formula="of the same candidates, the share that is among the m items shown if the "
            "teacher ranks only the student's top k",
            title="end-to-end hit rate",
            digits=3,
            per=("k", "task"),
            ends=_end_to_end,
        ),
        _gain(
            name="covered_user_value",
            formula="of a funnel of the candidates that the logged funnel passed: Σ value of the "
            "user labels of the best m · c / n, by the teacher, of the student's first ⌈k · c / n⌉ "
            "of these c, of n retrieved, over Σ of the same of all c",
            title="users' value (covered)",
            ends=_captured("covered_user_value"),
        ),
        Metric(
            name="coverage",
            formula="Σ items shown that the logged funnel passed, over Σ items shown: only these "
            "could get a label. A lower bound where candidates have no score of the final ranker: "
            "each of these that was not passed counts as shown",
            digits=3,
            per=("k",),
            ends=_ratio("passed_shown", "all_shown"),
        ),
        _gain(
            name="ips_user_value",
            formula="the same with each label over its propensity (Horvitz and Thompson 1952); "
            "empty without propensities. Agreement with the final ranker cannot win it: labels of "
            "random slots represent all passed candidates",
            title="users' value (IPS)",
            ends=_captured("ips_user_value"),
        ),
        _gain(
            name="served_ndcg",
            formula="NDCG by the user labels of the list that the teacher makes of the ranker's "
            "first k, without the candidates that have no label; mean over requests with a "
            "positive label. Empty unless more candidates of a request have labels than the m "
            "shown: in a feed, only a list that was shown has labels",
            title="NDCG of the list",
            ends=_if_summed("served_ndcg", _ratio("served_ndcg", "served_requests")),
        ),
        _gain(
            name="served_ndcg_of_all",
            formula="the same with the candidates without a label, which count as not wanted",
            title="NDCG of the whole list",
            ends=_if_summed("served_ndcg", _ratio("served_ndcg_of_all", "served_requests")),
        ),
        Metric(
            name="teacher_ndcg",
            formula="NDCG of the student's first m with the teacher's value as gain, Σ gain / "
            "log2(1 + place) over the same in the teacher's own order; mean over requests",
            title="NDCG",
            better="higher",
            ends=_ratio("teacher_ndcg", "teacher_ndcg_requests"),
        ),
        Metric(
            name="teacher_tau",
            formula="Kendall's tau-b of the student's value against the teacher's, over a fixed "
            f"random sample of the pairs of each request, {agreement.NEIGHBOURS} times as many as "
            "the candidates that the teacher knows; mean over requests",
            title="tau",
            better="higher",
            ends=_ratio("teacher_tau", "teacher_tau_requests"),
        ),
        _candidates_for(
            name="passed_for",
            formula="the smallest k with `value_captured@k` at or above this percentage",
            ends=_captured("value_captured"),
        ),
        _candidates_for(
            name="passed_for_alike",
            formula="the same if the candidates without a score are like those with one, and not "
            "worth nothing: of s scored among n retrieved, the teacher shows m · s / n; empty "
            "unless the log lacks the scores of many candidates",
            title="passed if alike",
            ends=_if_summed("value_if_alike", _captured("value_if_alike")),
        ),
        _candidates_for(
            name="passed_for_users",
            formula="the smallest k with `served_ndcg@k` at or above this percentage of that of "
            "all retrieved",
            title="passed for users'",
            ends=_if_summed("served_ndcg", _captured("served_ndcg")),
        ),
        Metric(
            name="passed_auc",
            formula="the share of pairs (passed by the logged funnel, not passed) within a request "
            "that the ranker orders in this way; mean over requests; empty unless the log lacks "
            "the scores of many candidates",
            title="passed AUC",
            digits=3,
            ends=_if_summed("passed_auc", _ratio("passed_auc", "passed_auc_requests"), "requests"),
            compared=False,
        ),
        _at_passed_for(
            name="scored_for",
            formula="mean candidates of a request that the teacher scores at `passed_for`: min(k, "
            "candidates of the request)",
            digits=1,
            better="lower",
            ends=_at_target(_ratio("scored", "requests")),
        ),
        _at_passed_for(
            name="true_value_for",
            formula="`true_value_captured` at `passed_for`: where the saving is taken",
            better="higher",
            ends=_at_target(_captured("true_value_captured")),
        ),
        _of_data(
            name="candidates",
            formula="mean candidates of a request",
            digits=1,
            ends=_ratio("candidates", "requests"),
        ),
        Metric(
            name="regret",
            formula="1 − Σ true value of the ranker's own top m, out of all retrieved, over Σ true "
            "value of the m that are truly best; empty where the dataset does not know it",
            better="lower",
            ends=lambda sums, _: 1 - ratio(sums["top_true"], sums["top_best"]),
        ),
        Metric(
            name="top_calibration",
            formula="Σ value that the ranker gives its own top m over Σ their true value: above 1, "
            "it promises too much where it chooses; empty where the dataset does not know it",
            title="calibration of the top",
            digits=3,
            better="one",
            ends=_ratio("top_promised", "top_true"),
            probabilities_of=("ranker",),
        ),
        Metric(
            name="flops_per_candidate",
            formula="FLOPs of the model as compiled for a CPU, wherever it runs, on a request of "
            "N retrieved, over N; heads that `serve` does not read are not served, and not counted",
            title="FLOPs",
            better="lower",
        ),
        Metric(
            name="cost_ratio",
            formula="`flops_per_candidate` of the student over the teacher's",
            better="lower",
        ),
        _saving(
            name="funnel_cost_saving",
            formula="1 − cost / cost of the best ranker that needs no scores of the final ranker, "
            "in the same repeat, where cost = `candidates` · student FLOPs + `scored_for_99` · "
            "teacher FLOPs, or in the unit of `costs`; the best of students, lists, rivals "
            "and the incumbent has the cheapest funnel on validation; filled in for a whole sweep",
            title="saving",
        ),
        _saving(
            name="saving_over_none",
            formula="the same against the best setting of plain mode `none`",
        ),
        _saving(
            name="saving_over_incumbent",
            formula="the same against the early ranker that filled the log, at a cost of 0 for "
            "that ranker; empty where the log does not name it",
            title="saving over the incumbent",
        ),
        _of_data(
            name="scored_share",
            formula="the share of a test request's candidates with a known value of the final "
            "ranker, mean over measured requests. Below 1, those without one count as worth "
            "nothing, so `passed_for_99` is a lower bound for the ranker that chose which ones "
            "were scored",
            ends=_ratio("scored_share", "measured_requests"),
        ),
        _of_data(
            name="measured_requests",
            formula="the requests on which the funnel is measured: those that the final ranker "
            "scored whole (nine tenths of the candidates), if the log has some; else all",
            digits=0,
            ends=lambda sums, _: np.asarray(sums["measured_requests"], np.float64),
        ),
        _of_data(
            name="unseen_users",
            formula="the share of the test requests from users absent from the model's training, "
            "which the reserved row serves; empty where the model is not known",
            ends=_ratio("unseen_users", "requests"),
        ),
        _of_data(
            name="unseen_items",
            formula="the same of the test candidates",
            ends=_ratio("unseen_items", "candidates"),
        ),
    )
}


# The main table of a report and of the terminal, from left to right. `{task}` gives one column per
# task, and `{first}` for the first task; the mean over tasks has no task.
MAIN = [
    "passed_for_99",
    "passed_for_alike_99",
    "passed_for_users_99",
    "funnel_cost_saving",
    "cost_ratio",
    "survival@{k}",
    "value_captured@{k}",
    "true_value_captured@{k}",
    "hit_rate@{k}/{first}",
    "end_to_end_hit_rate@{k}/{first}",
    "teacher_kl",
    "alignment_ratio",
    "user_ndcg",
    "user_auc/{task}",
    "user_bce/{task}",
]


def sum_functions() -> tuple[SumFunction, ...]:
    """Return `SUMS` and the further functions of `METRICS`, each once."""
    return tuple(dict.fromkeys([*SUMS, *(of for metric in METRICS.values() for of in metric.sums)]))


def sums_curves(function: SumFunction) -> bool:
    """Test whether the arrays of a function with more than one axis are curves, [R, N, ...]."""
    return function is _of_funnel or any(
        function in metric.sums and {"k", "target"} & {*metric.per} for metric in METRICS.values()
    )


def result_columns(metric: Metric, tasks: Sequence[str], report_at: ReportAt) -> list[str]:
    """The metric's columns in `results.csv`.

    >>> result_columns(METRICS["survival"], ("watch", "like"), ReportAt(ks=(10, 50)))
    ['survival@10', 'survival@50']
    >>> result_columns(METRICS["passed_for"], (), ReportAt(targets=(0.99, 0.995)))
    ['passed_for_99', 'passed_for_99.5']
    """
    points = {
        "k": [f"@{k}" for k in report_at.ks],
        # Rounded, for 100 · 0.07 is not 7.
        "target": [f"_{100 * target:.10g}" for target in report_at.targets],
    }
    at = next((points[per] for per in metric.per if per in points), [""])
    return [f"{metric.name}{point}{task}" for point in at for task in _of_tasks(metric, tasks)]


def curve_columns(metric: Metric, tasks: Sequence[str]) -> list[str]:
    """The metric's columns in `curves.csv`, where a line is a k; none if it has no curve.

    >>> curve_columns(METRICS["survival"], ("watch", "like"))
    ['survival']
    """
    return [metric.name + task for task in _of_tasks(metric, tasks) if "k" in metric.per]


def _of_tasks(metric: Metric, tasks: Sequence[str]) -> list[str]:
    return [f"/{task}" for task in tasks] if "task" in metric.per else [""]


def metric_of(column: str) -> Metric | None:
    """The metric of a column, or of the mean over tasks that a report has; None if it has none."""
    name = re.split("[@/]", column)[0]
    of_target = METRICS.get(re.sub(r"_[\d.]+$", "", name))
    return of_target if of_target and "target" in of_target.per else METRICS.get(name)


def title_of(column: str) -> str:
    """The title of a metric's column in tables.

    >>> title_of("survival@200"), title_of("user_auc/watch"), title_of("teacher_kl")
    ('survival@200', 'AUC watch', 'teacher KL')
    >>> title_of("passed_for_99.5")
    'passed for 99.5%'
    """
    metric = metric_of(column)
    if metric is None:
        return column
    name = metric.title or metric.name.replace("_", " ")
    rest = column.removeprefix(metric.name).replace("/", " ")
    return name + re.sub(r"^_(.*)", r" \1%", rest)


def main_columns(tasks: Sequence[str], passed: int) -> list[str]:
    """The columns of `MAIN`, with `passed` candidates passed.

    >>> main_columns(("a", "b"), 200)[-4:]
    ['user_auc/a', 'user_auc/b', 'user_bce/a', 'user_bce/b']
    """
    filled = [of.format(k=passed, task=task, first=tasks[0]) for of in MAIN for task in tasks]
    return list(dict.fromkeys(filled))


def passed_for(captured: Float[np.ndarray, "N *draws"], share: Any) -> Float[np.ndarray, "*draws"]:
    """Return the smallest k at which a curve over k = 1..N is at least a share; NaN if none is.

    >>> passed_for(np.array([0.5, 0.9, 0.99, 1.0]), 0.9)
    array(2.)
    """
    reached = captured >= share
    return np.where(reached.any(axis=0), reached.argmax(axis=0) + 1.0, np.nan)


def numbers(metric: Metric, ended: Any, report_at: ReportAt) -> Float[np.ndarray, "columns *draws"]:
    """The numbers of `ended`, the result of `metric.ends`, in the order of `result_columns`."""
    if "target" in metric.per:
        captured, *other = ended if isinstance(ended, tuple) else (ended,)
        passed = np.array([passed_for(captured, target) for target in report_at.targets])
        return _at(other[0], passed) if other else passed
    array = np.asarray(ended, np.float64)
    if "k" in metric.per:
        array = array[[min(k, len(array)) - 1 for k in report_at.ks]]
    return array.reshape(-1, *array.shape[len(metric.per) :])


def _at(
    curve: Float[np.ndarray, "N *draws"], k: Float[np.ndarray, "targets *draws"]
) -> Float[np.ndarray, "targets *draws"]:
    """The values of a curve at each k; NaN where k is."""
    index = np.nan_to_num(k, nan=1).astype(int) - 1
    return np.where(np.isnan(k), np.nan, np.take_along_axis(np.asarray(curve), index, axis=0))


def summarise(
    sums: Sums,
    teacher: Sums | None,
    tasks: Sequence[str],
    report_at: ReportAt,
    signal: str = "probability",
    only_order: bool = False,
) -> dict[str, float]:
    """The measured columns of `results.csv`, in their order; NaN where there is nothing to measure.

    `sums` are those of a ranker over all batches. `teacher` are those of the teacher, or None where
    `sums` are its own. `signal` is one of `batch.TEACHER_SIGNALS`; the ranker with `only_order`
    gives no probabilities.
    """
    of_teacher, is_order = teacher is None, signal != "probability"
    without: set[str] = {"teacher"} if is_order else set()
    if only_order or (of_teacher and is_order):
        without.add("ranker")
    row: dict[str, float] = {}
    for metric in METRICS.values():
        columns = result_columns(metric, tasks, report_at)
        known = metric.of_teacher or not of_teacher
        if metric.ends and known and not without.intersection(metric.probabilities_of):
            found = numbers(metric, metric.ends(sums, teacher or sums), report_at).tolist()
            row |= zip(columns, found, strict=True)
        elif metric.ends:
            row |= dict.fromkeys(columns, float("nan"))
    return row


def curves(sums: Sums, tasks: Sequence[str]) -> dict[str, Float[np.ndarray, "N"]]:
    """The curves by their columns in `curves.csv`; index `k - 1` belongs to k passed."""
    curves: dict[str, Float[np.ndarray, "N"]] = {}
    for metric in METRICS.values():
        columns = curve_columns(metric, tasks)
        if columns and metric.ends:
            ended = np.asarray(metric.ends(sums, sums))
            curves |= zip(columns, ended.reshape(len(ended), -1).T, strict=True)
    return curves


def calibration(sums: Sums, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `calibration.csv`: mean probability and mean label of each bin with a weight."""
    weight = np.asarray(sums["bin_weight"])
    predicted, observed = (ratio(sums[f"bin_{of}"], weight) for of in ("predicted", "observed"))
    return [
        {"task": tasks[task], "bin": place, "weight": float(weight[task, place])}
        | {"predicted": float(predicted[task, place]), "observed": float(observed[task, place])}
        for task, place in np.argwhere(weight).tolist()
    ]
