"""The settings that the answer and the figures speak of, and what users have of them."""

import pandas as pd

from kd_ranker.evaluation.saving import best, best_of, by_repeat, of_split
from kd_ranker.report.study import Study, told


def best_distilled(study: Study) -> str | None:
    """The best setting of all ways that distil, chosen on validation; None if there is none."""
    distilled = study.tested.loc[study.tested["mode"] != "none", "setting"]
    return best(study.rows, list(distilled.unique())) if len(distilled) else None


def best_of_sizes(study: Study) -> pd.DataFrame:
    """The best undistilled and the best distilled setting of each size of the student.

    Chosen on validation: a row a setting of those on test, and `size`, which tells what of
    `student.*` a sweep has varied; "" where it has not.
    """
    columns = [column for column in study.varying if column.startswith("student.")]
    settings = study.tested.drop_duplicates("setting")
    sizes = [", ".join(told(row, columns)) for _, row in settings.iterrows()]
    settings = settings.assign(size=sizes, distilled=settings["mode"] != "none")
    chosen = {
        best(study.rows, list(of["setting"]))
        for _, of in settings.groupby(["size", "distilled"], sort=False)
    }
    return settings[settings["setting"].isin(chosen)]


def cheapest(study: Study, settings: list[str]) -> str | None:
    """The setting whose funnel costs least at `saving.CRITERION`, on validation.

    Returns:
      None if none is measured, or what the teacher costs is not known.
    """
    return best_of(by_repeat(of_split(study.rows, "validation"), "funnel_cost")[settings])


def users_measures(study: Study) -> list[str]:
    """The columns that tell what users have of what is passed: nothing of them is the teacher's.

    The true value where it is known; else, for each task, the share of what users did that is shown
    in the end.
    """
    if knows_truth(study):
        return [f"true_value_captured@{study.passed}"]
    return [f"end_to_end_hit_rate@{study.passed}/{task}" for task in study.tasks]


def users_curves(study: Study) -> list[str]:
    """The same as columns of `curves.csv`."""
    return [measure.replace(f"@{study.passed}", "") for measure in users_measures(study)]


def knows_truth(study: Study) -> bool:
    """True if the true value of what is shown was measured."""
    true_value = f"true_value_captured@{study.passed}"
    return true_value in study.tested and bool(study.tested[true_value].notna().any())
