"""Batches under a student and a teacher, drawn at random, and their measures as NumPy has them."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import kl_div
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score

from kd_ranker.batch import EvaluationBatch, Stage, empty_batch
from kd_ranker.evaluation import evaluate
from kd_ranker.evaluation.evaluate import RankerSums
from kd_ranker.evaluation.metrics import registry
from kd_ranker.evaluation.metrics.metric import ReportAt, Sums
from kd_ranker.evaluation.metrics.registry import sum_functions
from kd_ranker.evaluation.ranked import Scored, Sizes, rank_batch, with_scores_of_candidates
from tests import random_batches

TASKS = ("watch", "like")
SPEC = dataclasses.replace(random_batches.SPEC, tasks=TASKS)
SHOWN = 3
TARGETS = (0.53, 0.97)


@functools.partial(jax.jit, static_argnames=("functions", "ks", "of_teacher", "more"))
def _summed(student: Any, batch: Any, weights: Any, functions: Any, ks: Any,
            of_teacher: bool, more: tuple[bool, bool]) -> RankerSums:  # fmt: skip
    batch = with_scores_of_candidates(batch)
    sizes = Sizes(SHOWN, *[student.shape[1]] * 2, *more)
    if of_teacher:
        scored = Scored.by_teacher(batch.batch, {}, weights)
    else:
        scored = Scored.of(student, {}, batch.batch, weights)
    return evaluate.sums_of_batch(
        rank_batch(scored, batch, weights, sizes, of_teacher), functions, ks
    )


@dataclasses.dataclass
class Case:
    """The input of `ranked`, as arrays of NumPy: R requests, N candidates, T tasks."""

    student: np.ndarray
    teacher: np.ndarray
    teacher_weight: np.ndarray
    stage: np.ndarray
    label: np.ndarray
    label_weight: np.ndarray
    true: np.ndarray
    request_mask: np.ndarray
    propensity: np.ndarray
    value_weights: np.ndarray
    whole: np.ndarray | None = None  # of requests: whether the funnel is measured on it
    are_partly_scored: bool = False
    labels_beyond_shown: bool = False

    def summed(self, ks: tuple[int, ...] = (), is_teacher: bool = False) -> RankerSums:
        student = self.teacher if is_teacher else self.student
        batch = empty_batch(SPEC, *self.stage.shape).replace(
            stage=self.stage,
            user_label=self.label,
            label_weight=self.label_weight,
            teacher_probability=self.teacher,
            teacher_weight=self.teacher_weight,
        )
        unknown = np.full(self.stage.shape, np.nan, np.float32)
        batch = EvaluationBatch(
            batch, self.true, unknown, self.propensity, self.request_mask, self.whole
        )
        weights = jnp.asarray(self.value_weights)
        return _summed(
            *(jnp.asarray(student), batch, weights, sum_functions(), ks, is_teacher),
            (self.are_partly_scored, self.labels_beyond_shown),
        )

    def sums(self, is_teacher: bool = False) -> Sums:
        return evaluate.add(None, self.summed(is_teacher=is_teacher).sums)

    def row(self, ks: Sequence[int], of_teacher: bool = False, **how: Any) -> dict[str, float]:
        teacher = None if of_teacher else self.sums(is_teacher=True)
        return registry.summarize(
            self.sums(is_teacher=of_teacher), teacher, TASKS, ReportAt(ks, TARGETS), **how
        )


def random_case(
    seed: int = 0,
    requests: int = 6,
    candidates: int = 40,
    levels: int = 10**6,
    holes: float = 0.0,
    padding: float = 0.0,
    weights: Sequence[float] = (1.0, 2.0),
) -> Case:
    """Probabilities of some levels; a share of holes in the teacher's, and of padding."""
    generator = np.random.default_rng(seed)
    entries = (requests, candidates, len(TASKS))
    # No value is 0: it would be a request without value.
    student, teacher, true = generator.integers(1, levels + 1, size=(3, *entries)) / levels
    weight = generator.random(entries) >= holes
    stage = generator.choice([s.value for s in Stage if s], size=entries[:2])
    stage = np.where(generator.random(entries[:2]) < padding, Stage.PADDING, stage).astype(np.int8)
    shown = stage == Stage.SHOWN
    there = (stage > 0)[..., None]
    return Case(
        # Padding, and unknown probabilities, hold anything.
        student=np.where(there, student, np.nan).astype(np.float32),
        teacher=np.where(there & weight, teacher, np.nan).astype(np.float32),
        teacher_weight=weight.astype(np.float32),
        stage=stage,
        label=generator.integers(0, 2, size=entries).astype(np.float32),
        label_weight=(generator.choice([1.0, 2.0, 0.0], size=stage.shape) * shown).astype("f4"),
        true=np.where(there, true, np.nan).astype(np.float32),
        request_mask=np.ones(requests, bool),
        propensity=np.where(shown, generator.uniform(0.2, 1, stage.shape), np.nan).astype("f4"),
        value_weights=np.array(weights, np.float32),
    )


def _ratio(numerator: Any, denominator: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(denominator) == 0, np.nan, np.divide(numerator, denominator))


def _best(values: np.ndarray, among: Sequence[int], number: int | None = None) -> list[int]:
    """The first places of some by value; of equal ones the first, and NaN last."""
    values = np.nan_to_num(values, nan=-np.inf)
    return sorted(among, key=lambda place: (-values[place], place))[:number]


def _gain(gains: Any) -> float:
    return sum(gain / math.log2(2 + place) for place, gain in enumerate(gains))


def restated(case: Case, of_teacher: bool = False) -> dict[str, float]:
    """The row of a case at every k, from the definitions: request by request, k after k."""
    weights, size = case.value_weights, case.stage.shape[1]

    def value_of(probability: np.ndarray) -> np.ndarray:
        return np.where(weights > 0, probability * weights, 0).astype(np.float32).sum(axis=-1)

    there = (case.stage > 0) & case.request_mask[:, None]
    known = there[..., None] & (case.teacher_weight > 0)
    knows = there & (known | (weights == 0)).all(axis=-1)
    p = np.where(known, case.teacher, np.nan) if of_teacher else case.student
    value = value_of(p)
    teacher = value_of(case.teacher)
    true = value_of(case.true)
    labeled = np.where(knows if of_teacher else there, case.label_weight, 0)
    positive = (labeled > 0)[..., None] & (case.label > 0.5)
    users = value_of(positive)
    weighted = np.nan_to_num(np.where(labeled > 0, users / case.propensity, 0))
    row = _of_probabilities(case, p, labeled, known, known & knows[..., None])

    curves: dict[str, np.ndarray] = {}
    means: dict[str, list[float]] = {name: [] for name in ("user_ndcg", "teacher_ndcg", "tau")}
    totals, numbers = np.zeros(3), []
    scored_shares: list[float] = []
    passed_first: list[float] = []
    measured = case.request_mask if case.whole is None else case.request_mask & case.whole
    measured_positives = np.zeros(len(TASKS))

    def add(name: str, k: int, number: Any) -> None:
        curves.setdefault(name, np.zeros((size, *np.shape(number))))[k - 1] += number

    for r in np.flatnonzero(case.request_mask):

        def chosen_of(passed: Sequence[int], r: int = r) -> list[int]:
            return _best(teacher[r], [place for place in passed if knows[r, place]], SHOWN)

        def shown_of(passed: Sequence[int], r: int = r) -> list[int]:
            return chosen_of(passed, r) if measured[r] else []

        candidates = np.flatnonzero(there[r]).tolist()
        passed = [place for place in candidates if case.stage[r, place] >= Stage.PASSED]
        was_shown = {place for place in candidates if case.stage[r, place] == Stage.SHOWN}
        was_shown = was_shown if len(was_shown) < len(candidates) else set()
        order, own = _best(value[r], candidates), shown_of(candidates)
        numbers.append(len(candidates))
        if measured[r]:
            scored_shares.append(knows[r].sum() / max(len(candidates), 1))
            measured_positives += positive[r].sum(axis=0)
        for k in range(1, size + 1):
            top, shown = order[:k], shown_of(order[:k])
            part = math.ceil(min(k, len(candidates)) * len(passed) / max(len(candidates), 1))
            covered = chosen_of(_best(value[r], passed, part))
            add("survival", k, [len({*own} & {*top}) / max(len(own), 1), bool(own)])
            add("value_captured", k, teacher[r, shown].sum())
            slots = SHOWN * knows[r].sum() / max(len(candidates), 1)
            best = teacher[r, chosen_of(top)]
            share = np.clip(slots - np.arange(len(best)), 0, 1)
            add("value_if_alike", k, best @ share)
            gain = np.where(labeled[r] > 0, users[r], 0)
            ideal = _gain(np.sort(gain)[::-1][:SHOWN])
            if ideal > 0:
                top_labeled = [place for place in top if labeled[r, place] > 0]
                dcg_of_labeled = _gain(gain[chosen_of(top_labeled)])
                dcg_of_all = _gain(gain[chosen_of(top)])
                add("served_ndcg", k, [dcg_of_labeled / ideal, dcg_of_all / ideal, 1])
            else:
                add("served_ndcg", k, [0, 0, 0])
            add("true_value_captured", k, true[r, shown].sum())
            add("shown_recall", k, len(was_shown & {*top}))
            add("hit_rate", k, positive[r, top].sum(axis=0))
            add("end_to_end_hit_rate", k, positive[r, shown].sum(axis=0))
            slots = SHOWN * len(passed) / max(len(candidates), 1)
            share = np.clip(slots - np.arange(len(covered)), 0, 1)
            add("covered_user_value", k, users[r, covered] @ share)
            add("ips_user_value", k, weighted[r, covered] @ share)
            # Any of the candidates without a score may be shown, and has no label if it was not
            # passed.
            unscored = [place for place in top if not knows[r, place] and place not in passed]
            slots = min(len(top), SHOWN)
            without_label = min(slots, len({*shown} - {*passed}) + len(unscored))
            add("coverage", k, np.array([slots - without_label, slots]) * measured[r])
        judged = np.flatnonzero(labeled[r] > 0).tolist()
        if ideal := _gain(users[r, _best(users[r], judged, SHOWN)]):
            means["user_ndcg"].append(_gain(users[r, _best(value[r], judged, SHOWN)]) / ideal)
        others = [place for place in candidates if place not in passed]
        if others and passed:
            first = [order.index(a) < order.index(b) for a in passed for b in others]
            passed_first.append(float(np.mean(first)))
        if own:
            gain = np.where(knows[r], teacher[r], 0)
            means["teacher_ndcg"].append(_gain(gain[order[:SHOWN]]) / _gain(gain[own]))
        if len({*teacher[r, knows[r]]}) > 1:
            tau = kendalltau(value[r, knows[r]], teacher[r, knows[r]]).statistic
            means["tau"].append(np.nan_to_num(tau))
        valued = [place for place in candidates if not np.isnan(value[r, place])]
        mine = _best(value[r], valued, SHOWN)
        of_best = true[r, _best(true[r], candidates, SHOWN) if mine else []]
        totals += [value[r, mine].sum(), true[r, mine].sum(), of_best.sum()]

    alike, served = curves.pop("value_if_alike"), curves.pop("served_ndcg")
    served = served if case.labels_beyond_shown else np.full_like(served, np.nan)
    curves["served_ndcg"] = _ratio(served[:, 0], served[:, 2])
    curves["served_ndcg_of_all"] = _ratio(served[:, 1], served[:, 2])
    for name, curve in curves.items():
        if name.startswith("served"):
            pass
        elif name in ("survival", "coverage"):
            curve = _ratio(curve[:, 0], curve[:, 1])
        elif name == "end_to_end_hit_rate":
            curve = _ratio(curve, measured_positives)
            curve = curve if knows[measured].any() else np.full_like(curve, np.nan)
        else:
            curve = _ratio(curve, curve[-1])
        curves[name] = curve
        for k, number in enumerate(curve, start=1):
            tasks = [f"/{task}" for task in TASKS] if np.ndim(number) else [""]
            row |= dict(
                zip((f"{name}@{k}{task}" for task in tasks), np.atleast_1d(number), strict=True)
            )
    for target in TARGETS:
        reached = np.flatnonzero(curves["value_captured"] >= target)
        k = reached[0] + 1 if len(reached) else math.nan
        true_there = curves["true_value_captured"][k - 1] if len(reached) else math.nan
        row |= {
            f"passed_for_{100 * target:.0f}": k,
            f"true_value_for_{100 * target:.0f}": true_there,
        }
        reached = np.flatnonzero(_ratio(alike, alike[-1]) >= target)
        row[f"passed_for_alike_{100 * target:.0f}"] = (
            reached[0] + 1 if len(reached) and case.are_partly_scored else math.nan
        )
        reached = np.flatnonzero(_ratio(served[:, 0], served[-1, 0]) >= target)
        row[f"passed_for_users_{100 * target:.0f}"] = reached[0] + 1 if len(reached) else math.nan
        row[f"scored_for_{100 * target:.0f}"] = np.minimum(numbers, k).mean()
    for name, by_request in means.items():
        column = "teacher_tau" if name == "tau" else name
        row[column] = np.mean(by_request) if by_request else math.nan
    row["candidates"] = np.mean(numbers)
    row["scored_share"] = float(np.mean(scored_shares)) if scored_shares else math.nan
    is_known = bool(passed_first) and case.are_partly_scored
    row["passed_auc"] = float(np.mean(passed_first)) if is_known else math.nan
    row["measured_requests"] = int(measured.sum())
    row["regret"] = 1 - _ratio(totals[1], totals[2])
    return row | {"top_calibration": _ratio(totals[0], totals[1])}


def _of_probabilities(
    case: Case, p: np.ndarray, labeled: np.ndarray, known: np.ndarray, known_shown: np.ndarray
) -> dict[str, float]:
    """The measures of the probabilities p, task by task."""
    row, ratios = {}, []
    eps = np.finfo(np.float32).eps

    def bce(p: np.ndarray, target: np.ndarray) -> np.ndarray:
        inside = np.clip(p.astype(np.float64), eps, 1 - eps)
        return -target * np.log(inside) - (1 - target) * np.log(1 - inside)

    def mean(values: np.ndarray, weight: np.ndarray) -> Any:
        return _ratio((values * weight)[weight > 0].sum(), weight.sum())

    for task, name in enumerate(TASKS):
        own = p[..., task]
        teacher = case.teacher[..., task]
        label = case.label[..., task]
        weight = labeled
        logged = known[..., task] * 1.0
        inside = np.clip(own.astype(np.float64), eps, 1 - eps)
        kl = kl_div(teacher, inside) + kl_div(1 - teacher, 1 - inside)
        shown = np.where(known_shown[..., task], labeled, 0)
        areas = []
        for r, is_labeled in enumerate(labeled > 0):
            labels = label[r, is_labeled]
            probabilities = own[r, is_labeled]
            if len({*labels}) == 2:
                is_finite = np.isfinite(probabilities).all()
                areas.append(roc_auc_score(labels, probabilities) if is_finite else math.nan)
        distance = {"": mean(kl, shown), "_bce": mean(bce(own, teacher), shown)}
        gap = mean(bce(own, label), shown) - mean(bce(teacher, label), shown)
        if shown.any():
            ratios.append([gap / to if to > 1e-6 else math.nan for to in distance.values()])
        row |= {
            f"user_bce/{name}": mean(bce(own, label), weight),
            f"user_auc/{name}": np.mean(areas) if areas else math.nan,
            f"user_calibration/{name}": _ratio(
                (own * weight)[weight > 0].sum(), (label * weight)[weight > 0].sum()
            ),
            f"teacher_bce/{name}": mean(bce(own, teacher), logged),
            f"teacher_kl/{name}": mean(kl, logged),
            f"teacher_kl_shown/{name}": distance[""],
        }
    both = np.mean(ratios, axis=0) if ratios else [math.nan] * 2
    return row | dict(zip(("alignment_ratio", "alignment_ratio_bce"), both, strict=True))
