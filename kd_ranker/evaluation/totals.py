"""One pass over evaluation batches to numbers: sums on the device, division at the end.

    total = None
    for evaluation_batch in batches:
        batch = ranked(student_probability, ..., evaluation_batch, ...)
        total = add(total, request_sums(batch, sum_functions()))
    row = summarise(total, total_of_teacher, tasks, report_at)

Axes: `N` candidates, `T` tasks, `B` bins of predicted probability.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation import label_metrics, metrics
from kd_ranker.evaluation.metrics import METRICS, SumFunction, Sums, ratio
from kd_ranker.evaluation.ranked import Ranked


def request_sums(batch: Ranked, functions: Sequence[SumFunction]) -> Sums:
    """The sums of one batch by name, those of `calibration_table` among them; pure.

    Args:
      batch: the batch.
      functions: those of the metrics, see `metrics.sum_functions`.

    Raises:
      ValueError: two functions sum different things under one name.
    """
    sums: Sums = {}
    for function in (*functions, _bins):
        more = function(batch)
        if twice := sums.keys() & more.keys():
            raise ValueError(f"two sums of the metrics are named {', '.join(sorted(twice))}")
        sums |= more
    return sums


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
    report_at: Sequence[int],
    signal: str = "probability",
) -> dict[str, float]:
    """The measured columns of `results.csv`, in their order; NaN where there is nothing to measure.

    Args:
      sums: of a ranker over all batches, from `add`.
      teacher: those of the teacher; None where `sums` are its own.
      tasks: names of the tasks, in the order of the T axis.
      report_at: the values of k to report; one beyond the number of candidates means all of them.
      signal: what is known of the teacher, one of `batch.TEACHER_SIGNALS`. Of positions only the
        order means something, so what takes them for probabilities is NaN.
    """
    row: dict[str, float] = {}
    for metric in METRICS.values():
        if metric.ends is None:
            continue
        columns = metrics.result_columns(metric, tasks, report_at)
        if metrics.is_measurable(metric, teacher is None, signal):
            numbers = metrics.numbers(metric, metric.ends(sums, teacher or sums), report_at)
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
