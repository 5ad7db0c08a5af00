"""Metrics against the final ranker's probabilities and order."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation import agreement
from kd_ranker.evaluation.agreement import weighted_sum
from kd_ranker.evaluation.metrics.metric import Metric, Ratio, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked

# A mean divergence in nats that float32 probabilities cannot distinguish from 0.
_NO_DISTANCE = 1e-6


def teacher_sums(ranked: Ranked) -> Sums:
    """Return the sums over all candidates with a teacher weight, [R, T] or [R]."""
    teacher = ranked.teacher_probability
    weight = ranked.teacher_weight
    losses = agreement.binary_cross_entropy(ranked.probability, teacher)
    tau, tau_counts = agreement.teacher_tau(ranked.value, ranked.teacher_value, ranked.mask)
    return {
        "teacher_bce": weighted_sum(losses, weight),
        "teacher_weight": weight.sum(axis=1),
        "teacher_entropy": weighted_sum(agreement.entropy(teacher), weight),
        "teacher_tau": tau,
        "teacher_tau_requests": tau_counts,
    }


def shown_sums(ranked: Ranked) -> Sums:
    """Return the sums of student, teacher and users on the same items, [R, T].

    These are the candidates that were shown and that the teacher knows.
    """
    student, label, weight = ranked.labels
    teacher = ranked.of_labeled(ranked.teacher_probability)
    known = (ranked.teacher_weight > 0) & ranked.teacher_knows[..., None]
    weight = jnp.where(ranked.of_labeled(known), weight, 0.0)
    against_user = agreement.binary_cross_entropy(student, label)
    against_teacher = agreement.binary_cross_entropy(student, teacher)
    return {
        "shown_user_bce": weighted_sum(against_user, weight),
        "shown_teacher_bce": weighted_sum(against_teacher, weight),
        "shown_teacher_kl": weighted_sum(agreement.divergence(student, teacher), weight),
        "shown_weight": weight.sum(axis=1),
    }


def _kl(sums: Sums, teacher: Sums) -> Float[np.ndarray, "T *draws"]:
    cross_entropy = ratio(sums["teacher_bce"], sums["teacher_weight"])
    return cross_entropy - ratio(sums["teacher_entropy"], sums["teacher_weight"])


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How much of a student's distance to the teacher costs it on users; a mean over tasks.

    Near 0, a student predicts users as well as the teacher does; near 1, it only lacks the
    teacher's knowledge; below 0, it predicts users better. `distance` is the sum of the distance.
    """

    distance: str

    def __call__(self, sums: Sums, teacher: Sums) -> Float[np.ndarray, "*draws"]:
        """Return the mean over the tasks that are known."""
        user_bce = Ratio("shown_user_bce", "shown_weight")
        distance = Ratio(self.distance, "shown_weight")(sums, teacher)
        known = np.asarray(sums["shown_weight"]) > 0
        lost = user_bce(sums, teacher) - user_bce(teacher, teacher)
        of_tasks = lost / np.where(distance > _NO_DISTANCE, distance, np.nan)
        return ratio(np.where(known, of_tasks, 0.0).sum(axis=0), known.sum(axis=0))


METRICS = (
    Metric(
        name="teacher_bce",
        formula="Σ w · (−q log p − (1 − q) log(1 − p)) / Σ w, over entries with teacher weight",
        sums=teacher_sums,
        final=Ratio("teacher_bce", "teacher_weight"),
        better="lower",
        per=("task",),
        title="teacher BCE",
        probabilities_of=("ranker", "teacher"),
        averaged=True,
    ),
    Metric(
        name="teacher_kl",
        formula="`teacher_bce` less the teacher's own mean entropy: 0 for a perfect copy",
        sums=teacher_sums,
        final=_kl,
        better="lower",
        per=("task",),
        title="teacher KL",
        probabilities_of=("ranker", "teacher"),
        averaged=True,
    ),
    Metric(
        name="teacher_kl_shown",
        formula="the same divergence over shown candidates where the teacher knows every task, "
        "with label weights",
        sums=shown_sums,
        final=Ratio("shown_teacher_kl", "shown_weight"),
        better="lower",
        per=("task",),
        title="teacher KL of the shown",
        probabilities_of=("ranker", "teacher"),
        averaged=True,
    ),
    # Small for a student that predicts users well as for one that strays: neither way is better.
    Metric(
        name="alignment_ratio",
        formula="mean over tasks of (user BCE of the student − user BCE of the teacher) / teacher "
        "KL of the student, all three on the items and with the weights of `teacher_kl_shown`; "
        "empty where that is not above 10⁻⁶",
        sums=shown_sums,
        final=Alignment("shown_teacher_kl"),
        digits=3,
        probabilities_of=("ranker", "teacher"),
        of_teacher=False,
    ),
    Metric(
        name="alignment_ratio_bce",
        formula="the same with the student's teacher BCE on these items below the line, which "
        "counts the teacher's own entropy",
        sums=shown_sums,
        final=Alignment("shown_teacher_bce"),
        title="alignment ratio (BCE)",
        digits=3,
        probabilities_of=("ranker", "teacher"),
        of_teacher=False,
    ),
)

TEACHER_TAU = Metric(
    name="teacher_tau",
    formula="Kendall's tau-b of the student's value against the teacher's, over a fixed random "
    f"sample of the pairs of each request, {agreement.NEIGHBOURS} times as many as the "
    "candidates that the teacher knows; mean over requests",
    sums=teacher_sums,
    final=Ratio("teacher_tau", "teacher_tau_requests"),
    better="higher",
    title="tau",
)
