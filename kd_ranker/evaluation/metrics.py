"""The metrics, one entry each: `METRICS`.

An entry defines everything about a metric: the columns of `results.csv` and `curves.csv`, the sums
over a pass, marks, titles and places in tables derive from it. Their
formulas on one batch are in `agreement` and `funnel`. To try a metric of your own,
put it into `METRICS` before you call a function of `kd_ranker.api`.

Axes: `R` requests, `N` candidates, `T` tasks.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kd_ranker.evaluation import agreement, funnel
from kd_ranker.evaluation.ranked import Ranked

# By name: of each request of a batch, [R, ...], or over all of a batch or a pass, [...].
Sums = dict[str, Float[Array | np.ndarray, "..."]]
SumFunction = Callable[[Ranked], Sums]
Better = Literal["lower", "higher", "one"]
Tasks = Literal["each", "first", "mean"]


# The share of the value that a funnel must keep to be as good as the whole: that of the criterion.
TARGET = 0.99


class ReportAt(NamedTuple):
    """The points of a curve that are reported.

    Attributes:
      ks: how many are passed, at least 1; one beyond the number of candidates means all of them.
      targets: shares in (0, 1) to reach.
    """

    ks: Sequence[int] = ()
    targets: Sequence[float] = ()


class Metric(NamedTuple):
    """A column of `results.csv`, or one for each task or k.

    Attributes:
      name: of its columns: `name`, `name/<task>`, `name@<k>`, `name@<k>/<task>` or
        `name_<percent>`.
      formula: its definition, in Markdown.
      title: its name in tables and figures.
      digits: behind the point, in tables.
      better: the way in which it is better: lower, higher or closer to one; None for neither.
      per: there is a number for each of these.
      sums: functions from a batch to sums of each of its requests by name, arrays [R, ...]: what
        `totals` adds up over requests. Those of a metric with a number for each k may be curves,
        [R, N, ...]. Metrics share a function by naming the same one; it is called once a batch.
      ends: from the sums of a pass over all requests, and those of the teacher on the same, to its
        numbers, NaN where there is nothing to measure: an array [N] (index `k - 1` belongs to k),
        [T] or [N, T], or one number. With a number for each target it is a curve [N]: the first k
        at or above the target is reported, or of a pair of curves the second one at that k. Sums
        may have one more axis, the last, of draws of the requests, which the numbers then have
        too: reduce only over the axes named here. None if the column is not measured on requests
        but filled in by `results`.
      probabilities_of: the rankers of which it needs probabilities, not only an order. If these
        are a teacher's positions, there is nothing to measure.
      of_teacher: whether it is defined for the teacher itself.
      averaged: whether a report has the mean over tasks too, under `name`.
      compared: whether a report compares settings on it.
      main: its place from the left in a report's main table, and of which tasks; None for none.
      summary: of which tasks the table in the terminal shows it; None for none.
      short: its title there, if that differs.
    """

    name: str
    formula: str
    title: str
    digits: int
    better: Better | None
    per: tuple[Literal["k", "task", "target"], ...] = ()
    sums: tuple[SumFunction, ...] = ()
    ends: Callable[[Sums, Sums], Any] | None = None
    probabilities_of: tuple[Literal["ranker", "teacher"], ...] = ()
    of_teacher: bool = True
    averaged: bool = False
    compared: bool = True
    main: tuple[int, Tasks] | None = None
    summary: Tasks | None = None
    short: str = ""


def ratio(
    numerator: Array | np.ndarray, denominator: Array | np.ndarray
) -> Float[np.ndarray, "*shape"]:
    """Numerator over denominator in float64, NaN where the denominator is 0."""
    below = np.asarray(denominator, np.float64)
    return np.asarray(numerator, np.float64) / np.where(below == 0, np.nan, below)


def _user_bce(ranked: Ranked) -> Sums:
    losses, weight = agreement.user_bce_sums(*ranked.labels)
    return {"user_bce": losses, "label_weight": weight}


def _user_auc(ranked: Ranked) -> Sums:
    area, counts = agreement.user_auc(*ranked.labels)
    return {"user_auc": area, "user_auc_requests": counts.astype(area.dtype)}


def _user_calibration(ranked: Ranked) -> Sums:
    predicted, observed = agreement.user_calibration_sums(*ranked.labels)
    return {"predicted": predicted, "observed": observed}


def _teacher_bce(ranked: Ranked) -> Sums:
    losses, weight = agreement.teacher_bce_sums(
        ranked.probability, ranked.teacher_probability, ranked.teacher_weight
    )
    return {"teacher_bce": losses, "teacher_weight": weight}


def _teacher_entropy(ranked: Ranked) -> Sums:
    return {
        "teacher_entropy": agreement.teacher_entropy_sums(
            ranked.teacher_probability, ranked.teacher_weight
        )
    }


def _on_shown(ranked: Ranked) -> Sums:
    """The student, the teacher and the users on the same items: shown, and known to the teacher."""
    student, teacher, weight = ranked.judged
    label = ranked.labels[1]
    # The same cross entropy, with weights per task.
    user_bce, _ = agreement.teacher_bce_sums(student, label, weight)
    teacher_bce, weights = agreement.teacher_bce_sums(student, teacher, weight)
    return {
        "shown_user_bce": user_bce,
        "shown_teacher_bce": teacher_bce,
        "shown_teacher_kl": agreement.teacher_kl_sums(student, teacher, weight),
        "shown_weight": weights,
    }


def _survival(ranked: Ranked) -> Sums:
    survival = ranked.curves.survival
    return {"survival": survival, "funnel_requests": ranked.curves.counts.astype(survival.dtype)}


def _value_captured(ranked: Ranked) -> Sums:
    return {"value_captured": ranked.curves.value_captured}


def _true_value_captured(ranked: Ranked) -> Sums:
    truth, by_propensity = jnp.moveaxis(ranked.curves.true_value_captured, -1, 0)
    return {"true_value_captured": truth, "ips_user_value": by_propensity}


def _covered(ranked: Ranked) -> Sums:
    shown = ranked.curves.positives_shown
    return {
        "covered_user_value": ranked.covered_user_value,
        "passed_shown": shown[..., -2],
        "all_shown": shown[..., -1],
    }


def _scored(ranked: Ranked) -> Sums:
    """Candidates that the teacher scores if k are passed: all of a request with fewer."""
    candidates = ranked.mask.sum(axis=1, keepdims=True)
    k = jnp.arange(1, ranked.mask.shape[1] + 1)
    return {"scored": jnp.minimum(k, candidates).astype(jnp.float32)}


def _shown_kept(ranked: Ranked) -> Sums:
    return {"shown_kept": ranked.curves.shown_kept}


def _positives(ranked: Ranked) -> Sums:
    curves = ranked.curves
    kept, shown = (of[..., :-2] for of in (curves.positives_kept, curves.positives_shown))
    return {"positives_kept": kept, "positives_shown": shown}


def _teacher_ndcg(ranked: Ranked) -> Sums:
    ndcg, counts = agreement.teacher_ndcg(ranked.curves.gain, ranked.curves.ideal_gain)
    return {"teacher_ndcg": ndcg, "teacher_ndcg_requests": counts.astype(ndcg.dtype)}


def _teacher_tau(ranked: Ranked) -> Sums:
    tau, counts = agreement.teacher_tau(ranked.value, ranked.teacher_value, ranked.mask)
    return {"teacher_tau": tau, "teacher_tau_requests": counts.astype(tau.dtype)}


def _own_top(ranked: Ranked) -> Sums:
    true_value = funnel.value(ranked.evaluation_batch.true_probability, ranked.value_weights)
    promised, found, best = funnel.top_values(ranked.value, true_value, ranked.mask, ranked.shown)
    return {"top_promised": promised, "top_true": found, "top_best": best}


def _unseen_users(ranked: Ranked) -> Sums:
    request_mask = ranked.evaluation_batch.request_mask
    return {
        "unseen_users": _unseen(ranked, "user", request_mask),
        "requests": request_mask.astype(jnp.float32),
    }


def _unseen_items(ranked: Ranked) -> Sums:
    return {
        "unseen_items": _unseen(ranked, "item", ranked.mask).sum(axis=1),
        "candidates": ranked.mask.sum(axis=1).astype(jnp.float32),
    }


def _unseen(ranked: Ranked, lookup: str, counts: Bool[Array, "*ids"]) -> Float[Array, "*ids"]:
    return jnp.where(counts, 1 - ranked.met[lookup], 0.0)


def _user_bce_of(sums: Sums) -> Float[np.ndarray, "T"]:
    return ratio(sums["user_bce"], sums["label_weight"])


def _teacher_bce_of(sums: Sums) -> Float[np.ndarray, "T"]:
    return ratio(sums["teacher_bce"], sums["teacher_weight"])


def _shown_mean(sums: Sums, of: str) -> Float[np.ndarray, "T"]:
    return ratio(sums[f"shown_{of}"], sums["shown_weight"])


def _alignment(sums: Sums, teacher: Sums, distance: str) -> Float[np.ndarray, "*draws"]:
    return agreement.alignment_ratio(
        _shown_mean(sums, "user_bce"),
        _shown_mean(teacher, "user_bce"),
        _shown_mean(sums, distance),
        np.asarray(sums["shown_weight"]) > 0,
    )


def _hit_rate(sums: Sums, name: str) -> Float[np.ndarray, "N T"]:
    return ratio(sums[name], sums["positives_kept"][-1])


def _end_to_end(sums: Sums) -> Float[np.ndarray, "N T"]:
    rate = _hit_rate(sums, "positives_shown")
    # Where the teacher knows no request, it shows no item: the rate is unknown, and not 0.
    return np.where(np.asarray(sums["funnel_requests"]) > 0, rate, np.nan)


Curve = Callable[[Sums, Sums], Float[np.ndarray, "N"]]


def _captured(name: str) -> Curve:
    """Ends a captured curve, which is summed under `name`."""
    return lambda sums, _: funnel.captured_share(np.asarray(sums[name]))


def _coverage(sums: Sums, _: Sums) -> Float[np.ndarray, "N"]:
    return ratio(sums["passed_shown"], sums["all_shown"])


def _mean(name: str) -> Curve:
    """Ends a curve that is summed under `name` as its mean over requests."""
    return lambda sums, _: ratio(sums[name], sums["requests"])


def _at_target(curve: Curve) -> Callable[[Sums, Sums], tuple[Any, Any]]:
    """Ends a curve at the k of `passed_for`."""
    return lambda sums, teacher: (
        _captured("value_captured")(sums, teacher),
        curve(sums, teacher),
    )


# In the order of the columns of `results.csv`.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="user_bce",
            formula="Σ w · (−y log p − (1 − y) log(1 − p)) / Σ w, in nats, over shown candidates",
            title="user BCE",
            digits=4,
            better="lower",
            per=("task",),
            sums=(_user_bce,),
            ends=lambda sums, _: _user_bce_of(sums),
            probabilities_of=("ranker",),
            averaged=True,
            main=(12, "each"),
        ),
        Metric(
            name="user_auc",
            formula="the share of pairs (label 1, label 0) *within a request* that p orders "
            "rightly, a tie counting ½; averaged over requests that have both labels",
            title="AUC",
            digits=4,
            better="higher",
            per=("task",),
            sums=(_user_auc,),
            ends=lambda sums, _: ratio(sums["user_auc"], sums["user_auc_requests"]),
            main=(11, "each"),
            summary="each",
        ),
        Metric(
            name="user_calibration",
            formula="Σ w p / Σ w y over shown candidates: above 1, the model promises too much",
            title="calibration",
            digits=3,
            better="one",
            per=("task",),
            sums=(_user_calibration,),
            ends=lambda sums, _: ratio(sums["predicted"], sums["observed"]),
            probabilities_of=("ranker",),
            summary="first",
            short="calib.",
        ),
        Metric(
            name="teacher_bce",
            formula="Σ w · (−q log p − (1 − q) log(1 − p)) / Σ w, over entries with teacher weight",
            title="teacher BCE",
            digits=4,
            better="lower",
            per=("task",),
            sums=(_teacher_bce,),
            ends=lambda sums, _: _teacher_bce_of(sums),
            probabilities_of=("ranker", "teacher"),
            averaged=True,
        ),
        Metric(
            name="teacher_kl",
            formula="`teacher_bce` less the teacher's own mean entropy: 0 for a perfect copy",
            title="teacher KL",
            digits=4,
            better="lower",
            per=("task",),
            sums=(_teacher_bce, _teacher_entropy),
            ends=lambda sums, _: (
                _teacher_bce_of(sums) - ratio(sums["teacher_entropy"], sums["teacher_weight"])
            ),
            probabilities_of=("ranker", "teacher"),
            averaged=True,
            main=(9, "mean"),
            summary="first",
            short="KL",
        ),
        Metric(
            name="teacher_kl_shown",
            formula="the same divergence over shown candidates of which the teacher knows every "
            "task, with label weights",
            title="teacher KL of the shown",
            digits=4,
            better="lower",
            per=("task",),
            sums=(_on_shown,),
            ends=lambda sums, _: _shown_mean(sums, "teacher_kl"),
            probabilities_of=("ranker", "teacher"),
            averaged=True,
        ),
        Metric(
            name="alignment_ratio",
            formula="mean over tasks of (user BCE of the student − user BCE of the teacher) / "
            "teacher KL of the student, all three on the items and with the weights of "
            "`teacher_kl_shown`; empty where that is not above 10⁻⁶",
            title="alignment ratio",
            digits=3,
            # It is small for a student that predicts users well as for one that strays.
            better=None,
            sums=(_on_shown,),
            ends=lambda sums, teacher: _alignment(sums, teacher, "teacher_kl"),
            probabilities_of=("ranker", "teacher"),
            of_teacher=False,
            main=(10, "each"),
            summary="each",
            short="alignment",
        ),
        Metric(
            name="alignment_ratio_bce",
            formula="the same with the student's teacher BCE on these items below the line, which "
            "counts the teacher's own entropy",
            title="alignment ratio (BCE)",
            digits=3,
            better=None,
            sums=(_on_shown,),
            ends=lambda sums, teacher: _alignment(sums, teacher, "teacher_bce"),
            probabilities_of=("ranker", "teacher"),
            of_teacher=False,
        ),
        Metric(
            name="survival",
            formula="the share of the teacher's own top m, out of all retrieved, that the "
            "student's top k keeps; mean over requests",
            title="survival",
            digits=3,
            better="higher",
            per=("k",),
            sums=(_survival,),
            ends=lambda sums, _: ratio(sums["survival"], sums["funnel_requests"]),
            main=(4, "each"),
            summary="each",
        ),
        Metric(
            name="value_captured",
            formula="Σ teacher value of the m items shown if the teacher ranks only the student's "
            "top k, over Σ of the same if it ranks all retrieved",
            title="value",
            digits=4,
            better="higher",
            per=("k",),
            sums=(_value_captured,),
            ends=_captured("value_captured"),
            main=(5, "each"),
            summary="each",
        ),
        Metric(
            name="true_value_captured",
            formula="the same items in both sums, valued by the true probabilities; empty where "
            "the dataset does not know them",
            title="true value",
            digits=4,
            better="higher",
            per=("k",),
            sums=(_true_value_captured,),
            ends=_captured("true_value_captured"),
            main=(6, "each"),
            summary="each",
        ),
        Metric(
            name="shown_recall",
            formula="Σ shown candidates in the student's top k, over Σ shown candidates; over the "
            "requests of which the logged funnel has shown some candidates and not all",
            title="shown recall",
            digits=3,
            better="higher",
            per=("k",),
            sums=(_shown_kept,),
            ends=_captured("shown_kept"),
        ),
        Metric(
            name="hit_rate",
            formula="Σ candidates with a positive label in the student's top k, over Σ candidates "
            "with a positive label; labels of weight 0 count for nothing",
            title="hit rate",
            digits=3,
            better="higher",
            per=("k", "task"),
            sums=(_positives,),
            ends=lambda sums, _: _hit_rate(sums, "positives_kept"),
            main=(7, "first"),
            summary="first",
            short="hits",
        ),
        Metric(
            name="end_to_end_hit_rate",
            formula="of the same candidates, the share that is among the m items shown if the "
            "teacher ranks only the student's top k",
            title="end-to-end hit rate",
            digits=3,
            better="higher",
            per=("k", "task"),
            sums=(_positives, _survival),
            ends=lambda sums, _: _end_to_end(sums),
            main=(8, "first"),
            summary="first",
            short="end hits",
        ),
        Metric(
            name="covered_user_value",
            formula="of a funnel of the candidates that the logged funnel passed: Σ value of the "
            "user labels of the m items shown if the teacher ranks the student's first ⌈k · c / n⌉ "
            "of these c, of n retrieved, over Σ of the same if it ranks all c",
            title="users' value (covered)",
            digits=4,
            better="higher",
            per=("k",),
            sums=(_covered,),
            ends=_captured("covered_user_value"),
        ),
        Metric(
            name="coverage",
            formula="Σ items shown that the logged funnel passed, over Σ items shown: only these "
            "could get a label",
            title="coverage",
            digits=3,
            better=None,
            per=("k",),
            sums=(_covered,),
            ends=_coverage,
        ),
        Metric(
            name="ips_user_value",
            formula="Σ value of the user labels of the items shown, each over its propensity, over "
            "Σ of the same if all retrieved are passed (Horvitz and Thompson 1952); empty without "
            "propensities. Unbiased only if the log could show every item",
            title="users' value (IPS)",
            digits=4,
            better="higher",
            per=("k",),
            sums=(_true_value_captured,),
            ends=_captured("ips_user_value"),
        ),
        Metric(
            name="teacher_ndcg",
            formula="NDCG of the student's first m with the teacher's value as gain, Σ gain / "
            "log2(1 + place) over the same in the teacher's own order; mean over requests",
            title="NDCG",
            digits=4,
            better="higher",
            sums=(_teacher_ndcg,),
            ends=lambda sums, _: ratio(sums["teacher_ndcg"], sums["teacher_ndcg_requests"]),
        ),
        Metric(
            name="teacher_tau",
            formula="Kendall's tau-b of the student's value against the teacher's, over a fixed "
            f"random sample of the pairs of each request, {agreement.NEIGHBOURS} times as many as "
            "the candidates that the teacher knows; mean over requests",
            title="tau",
            digits=4,
            better="higher",
            sums=(_teacher_tau,),
            ends=lambda sums, _: ratio(sums["teacher_tau"], sums["teacher_tau_requests"]),
        ),
        Metric(
            name="passed_for",
            formula="the smallest k with `value_captured@k` at or above this percentage",
            title="passed for",
            digits=0,
            better="lower",
            per=("target",),
            sums=(_value_captured,),
            ends=_captured("value_captured"),
            main=(1, "each"),
            summary="each",
        ),
        Metric(
            name="scored_for",
            formula="mean candidates of a request that the teacher scores at `passed_for`: min(k, "
            "candidates of the request)",
            title="scored for",
            digits=1,
            better="lower",
            per=("target",),
            sums=(_value_captured, _scored, _unseen_users),
            ends=_at_target(_mean("scored")),
        ),
        Metric(
            name="true_value_for",
            formula="`true_value_captured` at `passed_for`: where the saving is taken",
            title="true value for",
            digits=4,
            better="higher",
            per=("target",),
            sums=(_value_captured, _true_value_captured),
            ends=_at_target(_captured("true_value_captured")),
        ),
        Metric(
            name="candidates",
            formula="mean candidates of a request",
            title="candidates",
            digits=1,
            better=None,
            sums=(_unseen_items, _unseen_users),
            ends=lambda sums, _: ratio(sums["candidates"], sums["requests"]),
            compared=False,
        ),
        Metric(
            name="regret",
            formula="1 − Σ true value of the ranker's own top m, out of all retrieved, over Σ true "
            "value of the m that are truly best; empty where the dataset does not know it",
            title="regret",
            digits=4,
            better="lower",
            sums=(_own_top,),
            ends=lambda sums, _: 1 - ratio(sums["top_true"], sums["top_best"]),
            summary="each",
        ),
        Metric(
            name="top_calibration",
            formula="Σ value that the ranker gives its own top m over Σ their true value: above 1, "
            "it promises too much where it chooses; empty where the dataset does not know it",
            title="calibration of the top",
            digits=3,
            better="one",
            sums=(_own_top,),
            ends=lambda sums, _: ratio(sums["top_promised"], sums["top_true"]),
            probabilities_of=("ranker",),
        ),
        Metric(
            name="flops_per_candidate",
            formula="FLOPs of the model as compiled for a CPU, wherever it runs, on a request of "
            "N retrieved, over N; heads that `serve` does not read are not served, and not counted",
            title="FLOPs",
            digits=4,
            better="lower",
        ),
        Metric(
            name="cost_ratio",
            formula="`flops_per_candidate` of the student over the teacher's",
            title="cost ratio",
            digits=4,
            better="lower",
            main=(3, "each"),
            summary="each",
        ),
        Metric(
            name="funnel_cost_saving",
            formula="1 − cost / cost of the best ranker that needs no scores of the final ranker, "
            "in the same repeat, where cost = `candidates` · student FLOPs + `scored_for_99` · "
            "teacher FLOPs, or in the unit of `costs`; the best of students, lists and the "
            "incumbent, by mean `passed_for_99` on validation; filled in for a whole sweep",
            title="saving",
            digits=3,
            better="higher",
            main=(2, "each"),
            summary="each",
        ),
        Metric(
            name="saving_over_none",
            formula="the same against the best setting of plain mode `none`",
            title="saving over none",
            digits=3,
            better="higher",
        ),
        Metric(
            name="saving_over_incumbent",
            formula="the same against the early ranker that filled the log, at a cost of 0 for "
            "that ranker; empty where the log does not name it",
            title="saving over the incumbent",
            digits=3,
            better="higher",
        ),
        Metric(
            name="unseen_users",
            formula="the share of the test requests from users absent from the model's training, "
            "which the reserved row serves; empty where the model is not known",
            title="unseen users",
            digits=3,
            better=None,
            sums=(_unseen_users,),
            ends=lambda sums, _: ratio(sums["unseen_users"], sums["requests"]),
            compared=False,
        ),
        Metric(
            name="unseen_items",
            formula="the same of the test candidates",
            title="unseen items",
            digits=3,
            better=None,
            sums=(_unseen_items,),
            ends=lambda sums, _: ratio(sums["unseen_items"], sums["candidates"]),
            compared=False,
        ),
    )
}


def sum_functions() -> tuple[SumFunction, ...]:
    """All that is summed for `METRICS`, each once."""
    return tuple(dict.fromkeys(of for metric in METRICS.values() for of in metric.sums))


def sums_curves(function: SumFunction) -> bool:
    """Tests if a function of `Metric.sums` is that of a metric with a number for each k.

    Of what it returns, arrays of more than one axis are curves, [R, N, ...].
    """
    return any(
        function in metric.sums and {"k", "target"} & {*metric.per} for metric in METRICS.values()
    )


def result_columns(metric: Metric, tasks: Sequence[str], report_at: ReportAt) -> list[str]:
    """The metric's columns in `results.csv`.

    >>> result_columns(METRICS["survival"], ("watch", "like"), ReportAt(ks=(10, 50)))
    ['survival@10', 'survival@50']
    >>> result_columns(METRICS["passed_for"], (), ReportAt(targets=(0.99, 0.995)))
    ['passed_for_99', 'passed_for_99.5']
    """
    if "k" in metric.per:
        return _names(metric, [f"@{k}" for k in report_at.ks], tasks)
    if "target" in metric.per:
        # Rounded, for 100 · 0.07 is not 7.
        return _names(metric, [f"_{100 * target:.10g}" for target in report_at.targets], tasks)
    return _names(metric, [""], tasks)


def curve_columns(metric: Metric, tasks: Sequence[str]) -> list[str]:
    """The metric's columns in `curves.csv`, where a line is a k; none if it has no curve.

    >>> curve_columns(METRICS["survival"], ("watch", "like"))
    ['survival']
    """
    return _names(metric, [""], tasks) if "k" in metric.per else []


def _names(metric: Metric, at: Sequence[str], tasks: Sequence[str]) -> list[str]:
    of = [f"/{task}" for task in tasks] if "task" in metric.per else [""]
    return [f"{metric.name}{point}{task}" for point in at for task in of]


def metric_of(column: str) -> Metric | None:
    """The metric of a column, or of the mean over tasks that a report has; None if it has none."""
    name = re.split("[@/]", column)[0]
    of_target = METRICS.get(re.sub(r"_[\d.]+$", "", name))
    return of_target if of_target and "target" in of_target.per else METRICS.get(name)


def title_of(column: str, short: bool = False) -> str:
    """The title of a metric's column in tables; short in the terminal.

    >>> title_of("survival@200"), title_of("user_auc/watch"), title_of("teacher_kl")
    ('survival@200', 'AUC watch', 'teacher KL')
    >>> title_of("passed_for_99.5")
    'passed for 99.5%'
    """
    metric = metric_of(column)
    if metric is None:
        return column
    name = (metric.short if short else "") or metric.title
    rest = column.removeprefix(metric.name).replace("/", " ")
    return name + re.sub(r"^_(.*)", r" \1%", rest)


def main_columns(tasks: Sequence[str], passed: int) -> list[str]:
    """The columns of a report's main table from left to right, curves at one point only.

    That is `passed` for those over k, and `TARGET`.
    """
    placed = [(metric, *metric.main) for metric in METRICS.values() if metric.main]
    placed.sort(key=lambda entry: entry[1])
    return [
        column for metric, _, which in placed for column in _columns(metric, which, tasks, passed)
    ]


def summary_columns(tasks: Sequence[str], passed: int) -> list[str]:
    """The columns of the table in the terminal from left to right, curves as in `main_columns`."""
    return [
        column
        for metric in METRICS.values()
        if metric.summary
        for column in _columns(metric, metric.summary, tasks, passed)
    ]


def _columns(metric: Metric, which: Tasks, tasks: Sequence[str], passed: int) -> list[str]:
    if which == "mean" and "task" in metric.per:
        metric = metric._replace(per=tuple(axis for axis in metric.per if axis != "task"))
    report_at = ReportAt((passed,), (TARGET,))
    return result_columns(metric, tasks[:1] if which == "first" else tasks, report_at)


def numbers(metric: Metric, ended: Any, report_at: ReportAt) -> Float[np.ndarray, "columns *draws"]:
    """The numbers that a metric ends in, in the order of `result_columns`.

    Args:
      metric: the metric.
      ended: the result of its `ends`.
      report_at: the points to report.
    """
    if "target" in metric.per:
        captured, *other = ended if isinstance(ended, tuple) else (ended,)
        passed = np.array([funnel.passed_for(captured, target) for target in report_at.targets])
        return _at(other[0], passed) if other else passed
    array = np.asarray(ended, np.float64)
    if "k" in metric.per:
        array = array[[min(k, len(array)) - 1 for k in report_at.ks]]
    return array.reshape(-1, *array.shape[len(metric.per) :])


def _at(
    curve: Float[np.ndarray, "N *draws"], k: Float[np.ndarray, "targets *draws"]
) -> Float[np.ndarray, "targets *draws"]:
    """The values of a curve at each k; NaN where k is."""
    index = np.where(np.isnan(k), 1, k).astype(int) - 1
    return np.where(np.isnan(k), np.nan, np.take_along_axis(np.asarray(curve), index, axis=0))


def is_measurable(metric: Metric, of_teacher: bool, signal: str) -> bool:
    """Tests if there is anything to measure of a ranker.

    Args:
      metric: the metric.
      of_teacher: whether the ranker is the teacher itself.
      signal: what is known of the teacher, one of `batch.TEACHER_SIGNALS`.
    """
    positions = {"teacher", *(["ranker"] if of_teacher else [])} if signal == "rank" else set()
    return not positions.intersection(metric.probabilities_of) and (
        metric.of_teacher or not of_teacher
    )
