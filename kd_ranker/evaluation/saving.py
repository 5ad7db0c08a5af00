"""The choice of settings on validation, the baseline, and what a funnel saves against it.

Rows are students of `results.csv` with three more columns: `setting`, a label of all that makes a
student but its seeds; `way`, the same without what is tuned; and `repeat`, one of the seeds.

Whatever is chosen is chosen on the rows of the split `validation`, so that those of `test` are of
requests which no choice has seen.
"""

from collections.abc import Sequence

import pandas as pd

from kd_ranker.evaluation.cost import FLOPS, Costs, funnel_cost, funnel_cost_saving

# By which settings are chosen: the smaller mean over repeats.
CRITERION = "passed_for_99"


def of_split(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """The rows of a split, one of `request.SPLITS`."""
    return rows[rows["split"] == split]


def by_repeat(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """A measure as a table: a line a repeat, a column a setting, NaN where it is not known.

    Args:
      rows: of one split.
      measure: a column.
    """
    if measure not in rows:
        rows = rows.assign(**{measure: float("nan")})
    table = rows.pivot(index="repeat", columns="setting", values=measure)
    # In the order of the file, not of the alphabet.
    return table.reindex(columns=rows["setting"].unique()).astype(float)


def settings_of(rows: pd.DataFrame, distilled: bool) -> list[str]:
    """The settings that distil, or those that do not."""
    return list(rows.loc[(rows["mode"] != "none") == distilled, "setting"].unique())


def best(rows: pd.DataFrame, settings: Sequence[str]) -> str | None:
    """The best of `settings` on validation by `CRITERION`; of equals the first.

    Returns:
      None if none is measured.
    """
    return best_of(by_repeat(of_split(rows, "validation"), CRITERION)[list(settings)])


def best_of_ways(rows: pd.DataFrame) -> dict[str, str]:
    """The best setting of each way that is measured, in the order in which ways occur.

    Every way is tuned alike: over serving choices, and over all values that a sweep has tried of
    keys that are `tuned`.
    """
    of_ways = {
        str(way): best(rows, list(of_way["setting"].unique()))
        for way, of_way in of_split(rows, "validation").groupby("way", sort=False)
    }
    return {way: setting for way, setting in of_ways.items() if setting is not None}


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


def with_savings(
    students: pd.DataFrame,
    undistilled: str | None,
    teacher_flops: float,
    retrieved: int,
    costs: Costs = FLOPS,
) -> pd.DataFrame:
    """The students with `funnel_cost`, and `funnel_cost_saving` against the baseline.

    The first is that of a request at `CRITERION`. The second is NaN where the baseline was not
    measured on the same split and repeat.

    Args:
      students: rows.
      undistilled: the setting that is the baseline; None if there is none.
      teacher_flops: FLOPs a candidate of the teacher.
      retrieved: `config.funnel.retrieved`.
      costs: what takes the place of FLOPs.
    """
    each = [
        funnel_cost(retrieved, passed, flops, teacher_flops, costs)
        for passed, flops in zip(students[CRITERION], students["flops_per_candidate"], strict=True)
    ]
    baselines = students["setting"] == undistilled
    where = list(zip(students["split"], students["repeat"], strict=True))
    of_baseline = {
        at: cost
        for at, cost, is_baseline in zip(where, each, baselines, strict=True)
        if is_baseline
    }
    savings = [
        funnel_cost_saving(cost, of_baseline.get(at, float("nan")))
        for at, cost in zip(where, each, strict=True)
    ]
    return students.assign(funnel_cost=each, funnel_cost_saving=savings)
