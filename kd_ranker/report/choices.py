"""The best setting of each mode, and what choosing the best of all costs; see `saving.best`."""

from typing import NamedTuple

import pandas as pd

from kd_ranker.evaluation.saving import CRITERION, baseline, best, best_of, by_repeat, settings_of


class CrossValidated(NamedTuple):
    """The result, on the repeat left out, of a setting chosen on the other repeats.

    Attributes:
      chosen: the setting chosen for each repeat that was left out.
      passed: mean of the chosen settings' `passed_for_99` on the repeats that were left out.
      fewer: mean of what the baseline needs more than that.
      saving: mean of their `funnel_cost_saving`.
    """

    chosen: list[str]
    passed: float
    fewer: float
    saving: float


def best_of_modes(rows: pd.DataFrame) -> dict[str, str]:
    """The best setting of each mode, over weights, serving choices and whatever else varies."""
    of_modes = {
        str(mode): best(rows, list(of_mode["setting"].unique()))
        for mode, of_mode in rows.groupby("mode", sort=False)
    }
    return {mode: setting for mode, setting in of_modes.items() if setting is not None}


def cross_validated(rows: pd.DataFrame) -> CrossValidated | None:
    """Chooses the distilled setting on all repeats but one, reads it on that one, and averages.

    That takes out the luck of a setting with the repeats it was chosen on (Stone, J. R. Stat. Soc.
    B 1974). It does not take out the luck with test requests, which all repeats share.

    Returns:
      None below two repeats, or without a baseline or a distilled setting.
    """
    undistilled, distilled = baseline(rows), settings_of(rows, distilled=True)
    if undistilled is None or not distilled:
        return None
    table, savings = by_repeat(rows, CRITERION), by_repeat(rows, "funnel_cost_saving")
    table = table[table[undistilled].notna()]
    if len(table) < 2:
        return None
    read = []
    for repeat in table.index:
        setting = best_of(table.drop(index=repeat)[distilled])
        if setting is not None and pd.notna(table.loc[repeat, setting]):
            read.append((repeat, setting))
    if not read:
        return None
    chosen = [setting for _, setting in read]
    passed = pd.Series([table.loc[at] for at in read], dtype=float)
    without = pd.Series([table.loc[repeat, undistilled] for repeat, _ in read], dtype=float)
    return CrossValidated(
        chosen=chosen,
        passed=float(passed.mean()),
        fewer=float((without - passed).mean()),
        saving=float(pd.Series([savings.loc[at] for at in read], dtype=float).mean()),
    )
