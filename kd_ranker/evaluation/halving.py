"""Successive halving: the settings of each method that are behind on validation stop early.

Jamieson and Talwalkar (AISTATS 2016), within each method: each is tuned by the same rule, and
keeps at least one setting. All repeats of a setting stop together.
"""

import pandas as pd

from kd_ranker.evaluation import saving
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.setting_names import with_labels


def runs_behind(rows: pd.DataFrame) -> set[str]:
    """Return the runs of the worse half of each method's settings.

    Args:
      rows: those of `results.csv` of the students on validation, one per run.

    The order is that of the mean of `CRITERION` over repeats. A setting without it in a repeat, as
    of a student that diverged, comes last. Of an odd number of settings, the one in the middle
    stays.
    """
    labeled = with_labels(rows)
    behind = set[str]()
    for _, of_method in labeled.groupby("method", sort=False):
        means = saving.by_repeat(of_method, CRITERION).mean(skipna=False)
        order = means.sort_values(kind="stable", na_position="last").index
        stopping = order[(len(order) + 1) // 2 :]
        behind |= {*of_method.loc[of_method["setting"].isin(stopping), "run"]}
    return behind
