"""Which settings are compared: the baseline, the best, and what choosing the best costs.

A setting is chosen by the fewest candidates that have to be passed for 99% of the final value,
`passed_for_99`, on average over repeats.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from kd_ranker.report.statistics import by_repeat

CRITERION = "passed_for_99"


class CrossValidated(NamedTuple):
    """What choosing a setting on the other repeats gives on the repeat that was left out.

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


def settings_of(rows: pd.DataFrame, distilled: bool) -> list[str]:
    """The settings that distil, or those that do not."""
    return list(rows.loc[(rows["mode"] != "none") == distilled, "setting"].unique())


def baseline(rows: pd.DataFrame) -> str | None:
    """The setting of mode `none` that all others are compared with; None if there is none.

    Of several (learning rates, say) it is the best, so that distillation has to beat what can be
    had without it.
    """
    return best(rows, settings_of(rows, distilled=False))


def best(rows: pd.DataFrame, settings: Sequence[str]) -> str | None:
    """The best of `settings`; of equals the first. None if none of them is measured.

    Only settings measured on as many repeats as any of them take part: a mean over fewer repeats
    may be good by luck, and a setting that diverges on some is not one to choose.
    """
    return _best_of(by_repeat(rows, CRITERION)[list(settings)])


def _best_of(table: pd.DataFrame) -> str | None:
    repeats = table.notna().sum()
    if not len(repeats) or not repeats.max():
        return None
    return str(table.loc[:, repeats == repeats.max()].mean().idxmin())


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
        setting = _best_of(table.drop(index=repeat)[distilled])
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
