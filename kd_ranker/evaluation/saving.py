"""The best setting, the baseline, and what a student's funnel saves against it.

Rows are students of `results.csv` with two more columns: `setting`, a label of all that makes a
student but its seeds, and `repeat`, one of the seeds.
"""

from collections.abc import Sequence

import pandas as pd

from kd_ranker.evaluation.cost import funnel_cost, funnel_cost_saving

# By which settings are chosen: the smaller mean over repeats.
CRITERION = "passed_for_99"


def by_repeat(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure as a table: a line a repeat, a column a setting, NaN where it is not known."""
    if measure not in rows:
        rows = rows.assign(**{measure: float("nan")})
    table = rows.pivot(index="repeat", columns="setting", values=measure)
    # In the order of the file, not of the alphabet.
    return table.reindex(columns=rows["setting"].unique()).astype(float)


def settings_of(rows: pd.DataFrame, distilled: bool) -> list[str]:
    """The settings that distil, or those that do not."""
    return list(rows.loc[(rows["mode"] != "none") == distilled, "setting"].unique())


def best(rows: pd.DataFrame, settings: Sequence[str]) -> str | None:
    """The best of `settings` by `CRITERION`; of equals the first. None if none is measured."""
    return best_of(by_repeat(rows, CRITERION)[list(settings)])


def best_of(table: pd.DataFrame) -> str | None:
    """The column of a table of `by_repeat` with the smallest mean, as in `best`.

    Only settings measured on as many repeats as any of them take part: a mean over fewer repeats
    may be good by luck, and a setting that diverges on some is not one to choose.
    """
    repeats = table.notna().sum()
    if not len(repeats) or not repeats.max():
        return None
    return str(table.loc[:, repeats == repeats.max()].mean().idxmin())


def baseline(rows: pd.DataFrame) -> str | None:
    """The setting of mode `none` that all others are compared with; None if there is none.

    Of several (learning rates, say) it is the best, so that distillation has to beat what can be
    had without it.
    """
    return best(rows, settings_of(rows, distilled=False))


def with_savings(students: pd.DataFrame, teacher_flops: float, retrieved: int) -> pd.DataFrame:
    """The students with `funnel_cost_saving` against the baseline of the same repeat.

    It is NaN where the baseline was not measured.

    Args:
      students: rows.
      teacher_flops: FLOPs a candidate of the teacher.
      retrieved: `config.funnel.retrieved`.
    """
    costs = [
        funnel_cost(retrieved, passed, flops, teacher_flops)
        for passed, flops in zip(students[CRITERION], students["flops_per_candidate"], strict=True)
    ]
    undistilled = students["setting"] == baseline(students)
    of_repeat = {
        repeat: cost
        for repeat, cost, is_baseline in zip(students["repeat"], costs, undistilled, strict=True)
        if is_baseline
    }
    savings = [
        funnel_cost_saving(cost, of_repeat.get(repeat, float("nan")))
        for repeat, cost in zip(students["repeat"], costs, strict=True)
    ]
    return students.assign(funnel_cost_saving=savings)
