"""One pass over evaluation batches to numbers: sums on the device, division at the end.

    total = None
    for evaluation_batch in batches:
        batch = ranked(student_probability, ..., evaluation_batch, ...)
        total = add(total, request_sums(batch, sum_functions()))
    row = summarise(total, total_of_teacher, tasks, report_at)

Axes: `R` requests, `N` candidates, `K` values of k, `T` tasks, `B` bins of predicted probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation import label_metrics, metrics
from kd_ranker.evaluation.metrics import METRICS, ReportAt, SumFunction, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked


def request_sums(batch: Ranked, functions: Sequence[SumFunction]) -> Sums:
    """The sums over the requests of one batch by name, with those of `calibration_table`; pure.

    Args:
      batch: the batch.
      functions: those of the metrics, see `metrics.sum_functions`.

    Raises:
      ValueError: two functions sum different things under one name.
    """
    sums = {name: of.sum(axis=0) for name, of in _of_each(batch, functions).items()}
    return _joined(sums, _bins(batch))


class Each(NamedTuple):
    """The terms of `request_sums`, one a request; the bins of the calibration are left out.

    Attributes:
      alone: arrays [R, ...] without an axis of k.
      curves: arrays over k, cut to a few values of it, [R, K, ...].
    """

    alone: Sums
    curves: Sums


def each_request(batch: Ranked, functions: Sequence[SumFunction], ks: Sequence[int]) -> Each:
    """The terms of `request_sums` of one batch, one a request; pure.

    Args:
      batch: the batch.
      functions: those of the metrics, see `metrics.sum_functions`.
      ks: at least 1; the curves over k are cut to these. One beyond the number of candidates means
        all of them, which is the denominator of a captured share.

    Raises:
      ValueError: two functions sum different things under one name.
    """
    over_k = [of for of in functions if metrics.sums_curves(of)]
    sums = _of_each(batch, over_k)
    curves = {
        name: array[:, np.minimum(ks, array.shape[1]) - 1]
        for name, array in sums.items()
        if array.ndim > 1
    }
    others = _of_each(batch, [of for of in functions if of not in over_k])
    alone = {name: array for name, array in sums.items() if array.ndim == 1}
    return Each(_joined(others, alone), curves)


def _of_each(batch: Ranked, functions: Sequence[SumFunction]) -> Sums:
    sums: Sums = {}
    for function in functions:
        sums = _joined(sums, function(batch))
    return sums


def _joined(sums: Sums, more: Sums) -> Sums:
    if twice := sums.keys() & more.keys():
        raise ValueError(f"two sums of the metrics are named {', '.join(sorted(twice))}")
    return sums | more


def _bins(batch: Ranked) -> Sums:
    weight, predicted, observed = label_metrics.calibration_bin_sums(*batch.labels)
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
