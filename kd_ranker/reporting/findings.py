"""What each figure shows in a study, as one sentence; "" where nothing can be said."""

from typing import Any

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.study import Study


def fewer_candidates(study: Study, estimates: Estimates) -> str:
    """Say how many fewer candidates must pass with the scores."""
    if study.best_with_scores is None:
        return ""
    with_scores = estimates.of(study.best_with_scores, CRITERION).mean
    others = {"the best without": study.baseline, "today's early ranker": study.incumbent}
    parts = []
    for name, setting in others.items():
        if setting is not None:
            share = 1 - with_scores / estimates.of(setting, CRITERION).mean
            if np.isfinite(share):
                parts.append(f"{abs(share):.0%} {'fewer' if share >= 0 else 'more'} than {name}")
    return f"The best with scores needs {' and '.join(parts)}." if parts else ""


def saving_methods(data: pd.DataFrame, margin: float) -> str:
    """Say how many methods save, and how many of these keep users, by their whole intervals.

    Args:
      data: a row per method, with the lower ends `saving_low` and `users_low`.
      margin: the loss for users that counts as none, a share.
    """
    saves = data["saving_low"] > 0
    keeps_users = data["users_low"] > -margin
    return (
        f"Of {len(data)} methods besides the baseline, {saves.sum()} surely save, and of these "
        f"{(saves & keeps_users).sum()} surely keep users within {100 * margin:g}%."
    )


def share_kept(study: Study, estimates: Estimates, measure: str) -> str:
    """Say what the best rankers keep of a measure if `funnel.passed` candidates pass."""
    rankers = {"the best with scores": study.best_with_scores, "the best without": study.baseline}
    parts = []
    for name, setting in rankers.items():
        if setting is not None:
            value = estimates.of(setting, f"{measure}@{study.passed}").mean
            if np.isfinite(value):
                parts.append(f"{value:.4f} with {name}")
    return f"If {study.passed} pass, it is {' and '.join(parts)}." if parts else ""


def best_of_losses(data: pd.DataFrame) -> str:
    """Say which method predicts users best, and which follows the teacher best.

    `data` has a row per setting: its `method`, `user_bce` and `teacher_bce`.
    """
    methods = data["method"].to_numpy()
    users = methods[data["user_bce"].to_numpy().argmin()]
    teacher = methods[data["teacher_bce"].to_numpy().argmin()]
    if users == teacher:
        return f"“{users}” predicts users best, and follows the teacher best."
    return f"“{users}” predicts users best, and “{teacher}” follows the teacher best."


def falling_losses(data: pd.DataFrame, loss: str) -> str:
    """Say how many lines end lower than they begin; `data` has a row per `line` and `step`."""
    by_line = _by_line(data, loss)
    num_lower = int((by_line.last() < by_line.first()).sum())
    return f"The loss of {num_lower} of {by_line.ngroups} methods ends lower than it began."


def largest_rise(data: pd.DataFrame, norm: str) -> str:
    """Say by which factor a line rises most between two steps of the log."""
    by_step = data.sort_values("step", kind="stable")
    ratios = (by_step[norm] / _by_line(data, norm).shift()).to_numpy()
    if np.isnan(ratios).all():
        return ""
    place = int(np.nanargmax(ratios))
    line = by_step["line"].to_numpy()[place]
    factor = f"{ratios[place]:.1f}"
    return f"The largest rise between two logged steps is by a factor of {factor}: “{line}”."


def _by_line(data: pd.DataFrame, measure: str) -> Any:
    return data.sort_values("step", kind="stable").groupby("line")[measure]
