"""One pass over evaluation batches to numbers: sums on the device, division at the end.

    total = None
    for evaluation_batch in batches:
        batch = ranked(student_probability, ..., evaluation_batch, ...)
        total = add(total, summed(batch, sum_functions(), ks).sums)
    row = summarise(total, total_of_teacher, tasks, report_at)

Axes: `R` requests, `N` candidates, `K` values of k, `T` tasks, `B` bins of predicted probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation import agreement, metrics
from kd_ranker.evaluation.metrics import METRICS, ReportAt, SumFunction, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked


class Each(NamedTuple):
    """The terms of the sums, one per request, without the bins of the calibration.

    Attributes:
      alone: arrays [R, ...] without an axis of k.
      curves: arrays over k, cut to a few values of it, [R, K, ...].
    """

    alone: Sums
    curves: Sums


class Summed(NamedTuple):
    """The sums of a batch, or of a pass, for a ranker.

    Attributes:
      sums: over all requests by name, with those of `calibration_table`.
      each: of each request. For the members of a group both have a leading axis of these.
    """

    sums: Sums
    each: Each


def summed(batch: Ranked, functions: Sequence[SumFunction], ks: Sequence[int]) -> Summed:
    """The sums over the requests of one batch, and their terms; pure.

    Args:
      batch: the batch.
      functions: those of the metrics, see `metrics.sum_functions`.
      ks: at least 1; the curves over k of each request are cut to these. One beyond the number of
        candidates means all of them, which is the denominator of a captured share.

    Raises:
      ValueError: two functions sum different things under one name.
    """
    bins, kept = _bins(batch), np.asarray(ks, int)
    alone: Sums = {}
    curves: Sums = {}
    for function in functions:
        for name, array in function(batch).items():
            if name in bins | alone | curves:
                raise ValueError(f"two sums of the metrics are named {name}")
            over_k = array.ndim > 1 and metrics.sums_curves(function)
            (curves if over_k else alone)[name] = array
    sums = {name: array.sum(axis=0) for name, array in (alone | curves).items()}
    cut = {name: array[:, np.minimum(kept, array.shape[1]) - 1] for name, array in curves.items()}
    return Summed(sums | bins, Each(alone, cut))


def _bins(batch: Ranked) -> Sums:
    weight, predicted, observed = agreement.calibration_bin_sums(*batch.labels)
    return {"bin_weight": weight, "bin_predicted": predicted, "bin_observed": observed}


def add(total: Sums | None, more: Sums) -> Sums:
    """The sum of two, on the host and in float64, so that a long evaluation loses no digits."""
    more = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), more)
    return more if total is None else jax.tree.map(np.add, total, more)


def summarise(
    sums: Sums,
    teacher: Sums | None,
    tasks: Sequence[str],
    report_at: ReportAt,
    signal: str = "probability",
) -> dict[str, float]:
    """The measured columns of `results.csv`, in their order; NaN where there is nothing to measure.

    Args:
      sums: of a ranker over all batches, from `add`.
      teacher: those of the teacher; None where `sums` are its own.
      tasks: names of the tasks, in the order of the T axis.
      report_at: the points of the curves to report.
      signal: what is known of the teacher, one of `batch.TEACHER_SIGNALS`. Of positions only the
        order means something, so what takes them for probabilities is NaN.
    """
    row: dict[str, float] = {}
    for metric in METRICS.values():
        if metric.ends is None:
            continue
        columns = metrics.result_columns(metric, tasks, report_at)
        if metrics.is_measurable(metric, teacher is None, signal):
            ended = metric.ends(sums, teacher or sums)
            numbers = metrics.numbers(metric, ended, report_at).tolist()
        else:
            numbers = [float("nan")] * len(columns)
        row |= zip(columns, numbers, strict=True)
    return row


def curves(sums: Sums, tasks: Sequence[str]) -> dict[str, Float[np.ndarray, "N"]]:
    """The curves by their columns in `curves.csv`; index `k - 1` belongs to k passed."""
    curves: dict[str, Float[np.ndarray, "N"]] = {}
    for metric in METRICS.values():
        columns = metrics.curve_columns(metric, tasks)
        if columns and metric.ends:
            ended = np.asarray(metric.ends(sums, sums))
            curves |= zip(columns, ended.reshape(len(ended), -1).T, strict=True)
    return curves


def calibration_table(sums: Sums) -> dict[str, Float[np.ndarray, "T B"]]:
    """For each task and bin of probability: `weight`, mean `predicted`, mean `observed` label.

    The means are NaN in an empty bin.
    """
    return {
        "weight": np.asarray(sums["bin_weight"]),
        "predicted": ratio(sums["bin_predicted"], sums["bin_weight"]),
        "observed": ratio(sums["bin_observed"], sums["bin_weight"]),
    }
