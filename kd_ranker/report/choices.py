"""The settings that the answer and the figures describe, and their measures for users."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import METRICS, TARGET, ReportAt, result_columns
from kd_ranker.evaluation.saving import best, best_of, by_repeat, of_split
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import Study, named_values

# The least coverage at which labels of a log show the sign of the change for users. No two students
# with less were compared with the truth (docs/report.md).
COVERED = 0.35


def best_with_scores(study: Study) -> str | None:
    """Return the cheapest setting that learns from the final ranker's scores, by validation.

    Settings with a `users_change` surely above −`report.margin` are preferred. Without any, all
    settings are considered. None if none is measured.
    """
    learned = study.tested[study.tested["needs_scores"]]
    settings = [str(setting) for setting in learned["setting"].unique()]
    kept = [setting for setting in settings if keeps_users(study, setting)] or settings
    return cheapest(study, kept) or best(study.rows, kept)


def keeps_users(study: Study, setting: str) -> bool:
    """Return True if the interval of `users_change` is above −`report.margin`, or unknown."""
    change = users_change(study, setting)
    return change is None or change.low > -study.margin


def users_change(study: Study, setting: str) -> Interval | None:
    """Return the change for users against the best ranker without scores, on validation.

    The paired difference in the measure of `users_at_target`, with a 95% interval over repeats.
    None if the truth is not known, or no ranker without scores is measured.
    """
    measures = users_at_target(study)
    if study.baseline is None or not measures:
        return None
    rows = of_split(pd.concat([study.rows, study.references]), "validation")
    table = by_repeat(rows[rows["setting"].isin([setting, study.baseline])], measures[0])
    return interval((table[setting] - table[study.baseline]).to_numpy())


def best_of_sizes(study: Study) -> pd.DataFrame:
    """Return the best settings of each size of the student, without scores and with them.

    Chosen on validation: one row per setting of those on test, and `size`, the values of
    `student.*` that a sweep has varied; "" if it has not.
    """
    columns = [column for column in study.varying if column.startswith("student.")]
    settings = study.tested.drop_duplicates("setting")
    sizes = [", ".join(named_values(row, columns)) for _, row in settings.iterrows()]
    settings = settings.assign(size=sizes)
    chosen = {
        best(study.rows, list(of["setting"]))
        for _, of in settings.groupby(["size", "needs_scores"], sort=False)
    }
    return settings[settings["setting"].isin(chosen)]


def cheapest(study: Study, settings: list[str]) -> str | None:
    """Return the setting of the cheapest funnel at `saving.CRITERION`, on validation.

    None if none is measured, or the teacher's cost is unknown.
    """
    return best_of(by_repeat(of_split(study.rows, "validation"), "funnel_cost")[settings])


def users_measure(study: Study) -> str:
    """Return the column that measures the value for users if `funnel.passed` are passed.

    The true value where it is known; else the value of user labels that a funnel keeps of the
    candidates that the logged funnel passed, which can have labels.
    """
    name = "true_value_captured" if knows_truth(study) else "covered_user_value"
    return f"{name}@{study.passed}"


def coverage(study: Study, estimates: Estimates, settings: Sequence[str]) -> float:
    """Return the least coverage of settings at `funnel.passed`, in [0, 1]; 1 with a known truth.

    NaN for the incumbent without a truth: among the candidates that it has passed itself, its
    scores differ little, so its covered value is far too low.
    """
    if knows_truth(study):
        return 1.0
    if study.incumbent in settings:
        return float("nan")
    column = f"coverage@{study.passed}"
    return float(np.min([estimates.of(setting, column).mean for setting in settings]))


def why_unlabelled(study: Study, estimates: Estimates, settings: Sequence[str]) -> str:
    """Return why a log's labels cannot show the change for users between settings, else ""."""
    share = coverage(study, estimates, settings)
    if share >= COVERED:
        return ""
    if study.incumbent in settings:
        return "candidates that today's early ranker left out have no labels"
    if np.isnan(share):
        return "the share of the items that it could have labels of is not known"
    seen = f"{100 * share:.0f}% of the items that these funnels would show"
    return f"it could have labels of only {seen}"


def users_at_target(study: Study) -> list[str]:
    """Return the columns of the same if each funnel passes as many as it needs for `TARGET`.

    Empty without a truth: labels of a log cannot compare funnels that pass different numbers.
    """
    if not knows_truth(study):
        return []
    return result_columns(METRICS["true_value_for"], (), ReportAt((), (TARGET,)))


def knows_truth(study: Study) -> bool:
    """Return True if the true value of the shown items was measured."""
    true_value = f"true_value_captured@{study.passed}"
    return true_value in study.tested and bool(study.tested[true_value].notna().any())
