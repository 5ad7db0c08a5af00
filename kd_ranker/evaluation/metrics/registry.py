"""All metrics by name, and the columns and numbers of a ranker in the tables.

To try a metric of your own, put it into `METRICS`, and its columns into `MAIN`, before you call a
function of `kd_ranker.api`.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from kd_ranker.evaluation.metrics import costs, data, funnel, teacher, top, users
from kd_ranker.evaluation.metrics.metric import Metric, ReportAt, SumFunction, Sums
from kd_ranker.evaluation.metrics.target import at_target

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        *users.METRICS,
        *teacher.METRICS,
        *funnel.BY_K,
        funnel.TEACHER_NDCG,
        teacher.TEACHER_TAU,
        *funnel.BY_TARGET,
        data.CANDIDATES,
        *top.METRICS,
        *costs.METRICS,
        *data.METRICS,
    )
}
"""The metrics by name, in the order of the columns of `results.csv`."""

# The main table of a report, and at the terminal of `--wide` and of a single run, from left to
# right. `{task}` gives one column per
# task, and `{first}` for the first task; the mean over tasks has no task.
MAIN = [
    at_target("passed_for"),
    at_target("passed_for_alike"),
    at_target("passed_for_users"),
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
    """Return the sum functions of all metrics, each once."""
    functions = [metric.sums for metric in METRICS.values() if metric.sums]
    return tuple(dict.fromkeys(functions))


def sums_curves(function: SumFunction) -> bool:
    """Test whether the arrays of a sum function with more than one axis are curves, [R, N, ...]."""
    return any(
        metric.sums is function and ("k" in metric.per or "target" in metric.per)
        for metric in METRICS.values()
    )


def main_columns(tasks: Sequence[str], passed: int) -> list[str]:
    """The columns of `MAIN`, with `passed` candidates passed.

    >>> main_columns(("a", "b"), 200)[-4:]
    ['user_auc/a', 'user_auc/b', 'user_bce/a', 'user_bce/b']
    """
    columns = []
    for pattern in MAIN:
        columns += [pattern.format(k=passed, task=task, first=tasks[0]) for task in tasks]
    return list(dict.fromkeys(columns))


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


def summarize(
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
    is_teacher = teacher is None
    gives_none = set()
    if signal != "probability":
        gives_none.add("teacher")
    if only_order or (is_teacher and signal != "probability"):
        gives_none.add("ranker")
    row: dict[str, float] = {}
    for metric in METRICS.values():
        if metric.final is None:
            continue
        columns = metric.columns(tasks, report_at)
        is_defined = metric.of_teacher or not is_teacher
        if is_defined and not gives_none.intersection(metric.probabilities_of):
            final = metric.final(sums, teacher or sums)
            row |= zip(columns, metric.numbers(final, report_at).tolist(), strict=True)
        else:
            row |= dict.fromkeys(columns, float("nan"))
    return row


def curves(sums: Sums, tasks: Sequence[str]) -> dict[str, Float[np.ndarray, "N"]]:
    """The curves by their columns in `curves.csv`; index `k - 1` belongs to k passed."""
    curve_of_column: dict[str, Float[np.ndarray, "N"]] = {}
    for metric in METRICS.values():
        columns = metric.curve_columns(tasks)
        if columns and metric.final:
            final = np.asarray(metric.final(sums, sums))
            curve_of_column |= zip(columns, final.reshape(len(final), -1).T, strict=True)
    return curve_of_column
