"""One pass over evaluation batches to one row of results: sums on the device, division at the end.

    total = None
    for evaluation_batch in batches:
        total = add(total, request_sums(student_probability, ..., evaluation_batch, ...))
    row = summarise(total, tasks, report_at)

Axes: `R` requests, `N` candidates, `T` tasks, `B` bins of predicted probability.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kd_ranker.batch import EvaluationBatch, Stage
from kd_ranker.evaluation import alignment, funnel, label_metrics

CALIBRATION_BINS = 20


@flax.struct.dataclass
class Sums:
    """Sums over requests, from which `summarise` makes the results. Adding two means adding fields.

    Attributes:
      user_bce: weighted cross entropies against user labels, in nats.
      label_weight: weights of the user labels.
      user_auc: areas under the ROC curve of the requests that have both labels.
      user_auc_requests: how many those are.
      predicted: weighted probabilities of shown candidates.
      observed: weighted user labels.
      bin_weight: weights of the labels in each of 20 equal bins of probability, closed below.
      bin_predicted: weighted probabilities in each bin.
      bin_observed: weighted user labels in each bin.
      teacher_bce: weighted cross entropies against the teacher, in nats.
      teacher_entropy: weighted entropies of the teacher, in nats.
      teacher_weight: weights of the teacher's probabilities.
      survival: shares of the teacher's top that survive, for k = 1..N.
      funnel_requests: how many requests have a candidate that the teacher knows.
      value_captured: teacher value of what is shown, for k = 1..N; the last entry is the most.
      true_value_captured: true value of the same; NaN where the dataset does not know it.
      shown_kept: shown candidates that the top k keeps, for k = 1..N, of the requests whose logged
        funnel has shown some candidates and not all; the last entry is all of them.
      requests: how many requests.
      candidates: how many candidates they have.
      unseen_users: how many of the requests are of a user that the model never met in training; NaN
        where the model is not known.
      unseen_items: how many of the candidates are such items.
    """

    user_bce: Float[Array | np.ndarray, "T"]
    label_weight: Float[Array | np.ndarray, "T"]
    user_auc: Float[Array | np.ndarray, "T"]
    user_auc_requests: Float[Array | np.ndarray, "T"]
    predicted: Float[Array | np.ndarray, "T"]
    observed: Float[Array | np.ndarray, "T"]
    bin_weight: Float[Array | np.ndarray, "T B"]
    bin_predicted: Float[Array | np.ndarray, "T B"]
    bin_observed: Float[Array | np.ndarray, "T B"]
    teacher_bce: Float[Array | np.ndarray, "T"]
    teacher_entropy: Float[Array | np.ndarray, "T"]
    teacher_weight: Float[Array | np.ndarray, "T"]
    survival: Float[Array | np.ndarray, "N"]
    funnel_requests: Float[Array | np.ndarray, ""]
    value_captured: Float[Array | np.ndarray, "N"]
    true_value_captured: Float[Array | np.ndarray, "N"]
    shown_kept: Float[Array | np.ndarray, "N"]
    requests: Float[Array | np.ndarray, ""]
    candidates: Float[Array | np.ndarray, ""]
    unseen_users: Float[Array | np.ndarray, ""]
    unseen_items: Float[Array | np.ndarray, ""]


def request_sums(
    student_probability: Float[Array, "R N T"],
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    shown: int,
    labelled: int,
    met: Mapping[str, Bool[Array, "..."]] | None = None,
) -> Sums:
    """The sums of one batch; pure, to be compiled with `shown` and `labelled` static.

    Requests outside `request_mask` and candidates of stage `PADDING` never count. For the funnel
    every other candidate is retrieved; one whose teacher probability has weight 0 for any task
    has no known teacher value and is never chosen by the teacher.

    Args:
      student_probability: the serving probabilities of the model under evaluation.
      teacher_probability: the final ranker's; may hold anything where its weight is 0. They come
        beside the batch because a live teacher computes them.
      teacher_weight: 0 where the teacher's probability is not known.
      evaluation_batch: the requests; the teacher's values inside it are not read.
      value_weights: what a ranker sorts by, see `funnel.value`.
      shown: number of items shown.
      labelled: at least as many as a request has candidates with a label; measuring only those is
        what makes the metrics against user labels cheap.
      met: whether training met the ids of the lookups `user` and `item`; None if nobody knows.
    """
    # In bfloat16, sums would lose their digits and 1 - MARGIN would be 1.
    student_probability = student_probability.astype(jnp.float32)
    teacher_probability = teacher_probability.astype(jnp.float32)
    batch = evaluation_batch.batch
    mask = batch.candidate_mask & evaluation_batch.request_mask[:, None]
    label_weight = jnp.where(mask, batch.label_weight, 0.0)
    teacher_weight = jnp.where(mask[..., None], teacher_weight, 0.0)

    # Which those are does not depend on the student, so the students of a group share this sort.
    with_label = jnp.argsort(label_weight <= 0, axis=1, stable=True)[:, :labelled]

    def of_labelled(values: Float[Array, "R N ..."]) -> Float[Array, "R L ..."]:
        return jax.vmap(lambda of_request, places: of_request[places])(values, with_label)

    labels = tuple(map(of_labelled, (student_probability, batch.user_label, label_weight)))
    user_bce, weight = label_metrics.user_bce_sums(*labels)
    area, area_counts = label_metrics.user_auc(*labels)
    predicted, observed = label_metrics.user_calibration_sums(*labels)
    bin_weight, bin_predicted, bin_observed = _calibration_bins(*labels)
    teacher_bce, teacher_weights = alignment.teacher_bce_sums(
        student_probability, teacher_probability, teacher_weight
    )
    teacher_known = jnp.all(teacher_weight > 0, axis=-1)
    curves = funnel.funnel_curves(
        student_value=funnel.value(student_probability, value_weights),
        teacher_value=jnp.where(
            teacher_known, funnel.value(teacher_probability, value_weights), jnp.nan
        ),
        candidate_mask=mask,
        shown=shown,
        true_value=funnel.value(evaluation_batch.true_probability, value_weights),
        was_shown=mask & (batch.stage == Stage.SHOWN),
    )
    # Everything below is 0 on the requests that do not count, so a plain sum leaves them out.
    return Sums(
        user_bce=user_bce.sum(axis=0),
        label_weight=weight.sum(axis=0),
        user_auc=area.sum(axis=0),
        user_auc_requests=area_counts.sum(axis=0).astype(area.dtype),
        predicted=predicted.sum(axis=0),
        observed=observed.sum(axis=0),
        bin_weight=bin_weight,
        bin_predicted=bin_predicted,
        bin_observed=bin_observed,
        teacher_bce=teacher_bce.sum(axis=0),
        teacher_entropy=alignment.teacher_entropy_sums(teacher_probability, teacher_weight).sum(0),
        teacher_weight=teacher_weights.sum(axis=0),
        survival=curves.survival.sum(axis=0),
        funnel_requests=curves.counts.sum().astype(curves.survival.dtype),
        value_captured=curves.value_captured.sum(axis=0),
        true_value_captured=curves.true_value_captured.sum(axis=0),
        shown_kept=curves.shown_kept.sum(axis=0),
        requests=evaluation_batch.request_mask.sum().astype(jnp.float32),
        candidates=mask.sum().astype(jnp.float32),
        unseen_users=_number_unseen(met, "user", evaluation_batch.request_mask),
        unseen_items=_number_unseen(met, "item", mask),
    )


def _number_unseen(
    met: Mapping[str, Bool[Array, "..."]] | None, lookup: str, counts: Bool[Array, "..."]
) -> Float[Array, ""]:
    if met is None or lookup not in met:
        return jnp.float32(jnp.nan)
    return (counts & ~met[lookup]).sum().astype(jnp.float32)


def teacher_request_sums(
    teacher_probability: Float[Array, "R N T"],
    teacher_weight: Float[Array, "R N T"],
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    shown: int,
    labelled: int,
    met: Mapping[str, Bool[Array, "..."]] | None = None,
) -> Sums:
    """`request_sums` of the teacher itself, judged only where its probabilities are known.

    With a live teacher that is everywhere, and this equals `request_sums` with the teacher as
    the student. Logs may have holes; a shown candidate in one has no teacher probability to judge.
    """
    known = jnp.all(teacher_weight > 0, axis=-1)
    batch = evaluation_batch.batch
    batch = dataclasses.replace(batch, label_weight=jnp.where(known, batch.label_weight, 0.0))
    return request_sums(
        # The funnel ranks NaN behind all candidates that the teacher knows.
        jnp.where(teacher_weight > 0, teacher_probability, jnp.nan),
        teacher_probability,
        teacher_weight,
        dataclasses.replace(evaluation_batch, batch=batch),
        value_weights,
        shown,
        labelled,
        met,
    )


def _calibration_bins(
    probability: Float[Array, "R N T"],
    label: Float[Array, "R N T"],
    label_weight: Float[Array, "R N"],
) -> tuple[Float[Array, "T B"], Float[Array, "T B"], Float[Array, "T B"]]:
    """Weights, weighted probabilities and weighted labels in each bin. NaN falls into none."""
    place = jnp.clip(jnp.floor(probability * CALIBRATION_BINS), 0, CALIBRATION_BINS - 1)
    weight = jnp.broadcast_to(label_weight[..., None], probability.shape)
    # Comparison and sum, not a scatter: accelerators scatter in no fixed order, and the last digits
    # would differ from run to run.
    inside: Bool[Array, "R N T B"] = place[..., None] == jnp.arange(CALIBRATION_BINS)
    inside = inside & (weight > 0)[..., None]

    def summed(entries: Float[Array, "R N T"]) -> Float[Array, "T B"]:
        return jnp.where(inside, entries[..., None], 0.0).sum(axis=(0, 1))

    return summed(weight), summed(weight * probability), summed(weight * label)


def add(total: Sums | None, more: Sums) -> Sums:
    """The sum of two, on the host and in float64, so that a long evaluation loses no digits."""
    more = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), more)
    return more if total is None else jax.tree.map(np.add, total, more)


def summarise(
    sums: Sums,
    tasks: Sequence[str],
    report_at: Sequence[int],
    teacher_user_bce: Mapping[str, float] | None = None,
    teacher_signal: str = "probability",
) -> dict[str, float]:
    """The measured columns of `results.csv`, in their order; NaN where there is nothing to measure.

    Args:
      sums: of all batches, from `add`.
      tasks: names of the tasks, in the order of the T axis.
      report_at: the values of k to report; one beyond the number of candidates means all of them.
      teacher_user_bce: `user_bce` of the teacher by task, for `alignment_ratio`; NaN without it.
      teacher_signal: one of `batch.TEACHER_SIGNALS`. Of positions only the order means something,
        so what is measured in nats against them is NaN.
    """
    sums = add(None, sums)
    user_bce = _ratio(sums.user_bce, sums.label_weight)
    teacher_bce = _ratio(sums.teacher_bce, sums.teacher_weight)
    if teacher_signal == "rank":
        teacher_bce = np.full_like(teacher_bce, np.nan)
    of_tasks = {
        "user_bce": user_bce,
        "user_auc": _ratio(sums.user_auc, sums.user_auc_requests),
        "user_calibration": _ratio(sums.predicted, sums.observed),
        "teacher_bce": teacher_bce,
        "teacher_kl": teacher_bce - _ratio(sums.teacher_entropy, sums.teacher_weight),
    }
    row = {
        f"{name}/{task}": float(number)
        for name, numbers in of_tasks.items()
        for task, number in zip(tasks, numbers, strict=True)
    }
    teacher = teacher_user_bce or {}
    row["alignment_ratio"] = alignment.alignment_ratio(
        user_bce, np.array([teacher.get(task, np.nan) for task in tasks]), teacher_bce
    )
    curve_of = curves(sums)
    for name, curve in curve_of.items():
        row |= {f"{name}@{k}": float(curve[min(k, curve.size) - 1]) for k in report_at}
    row["passed_for_99"] = funnel.passed_for_99(curve_of["value_captured"])
    row["unseen_users"] = float(sums.unseen_users / sums.requests)
    row["unseen_items"] = float(sums.unseen_items / sums.candidates)
    return row


def curves(sums: Sums) -> dict[str, Float[np.ndarray, "N"]]:
    """The funnel's curves by column name; index `k - 1` belongs to k passed. See `funnel`."""
    sums = add(None, sums)
    return {
        "survival": _ratio(sums.survival, sums.funnel_requests),
        "value_captured": funnel.captured_share(np.asarray(sums.value_captured)),
        "true_value_captured": funnel.captured_share(np.asarray(sums.true_value_captured)),
        "shown_recall": funnel.captured_share(np.asarray(sums.shown_kept)),
    }


def calibration_table(sums: Sums) -> dict[str, Float[np.ndarray, "T B"]]:
    """For each task and bin of probability: `weight`, mean `predicted`, mean `observed` label.

    The means are NaN in an empty bin.
    """
    sums = add(None, sums)
    return {
        "weight": np.asarray(sums.bin_weight),
        "predicted": _ratio(sums.bin_predicted, sums.bin_weight),
        "observed": _ratio(sums.bin_observed, sums.bin_weight),
    }


def _ratio(
    numerator: Array | np.ndarray, denominator: Array | np.ndarray
) -> Float[np.ndarray, "*shape"]:
    """Numerator over denominator in float64, NaN where the denominator is 0."""
    below = np.asarray(denominator, np.float64)
    return np.asarray(numerator, np.float64) / np.where(below == 0, np.nan, below)
