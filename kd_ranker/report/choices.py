"""The distilled setting that the answer speaks of, and what users have of it."""

from kd_ranker.evaluation.saving import best
from kd_ranker.report.study import Study


def best_distilled(study: Study) -> str | None:
    """The best setting of all ways that distil, chosen on validation; None if there is none."""
    distilled = study.tested.loc[study.tested["mode"] != "none", "setting"]
    return best(study.rows, list(distilled.unique())) if len(distilled) else None


def users_measures(study: Study) -> list[str]:
    """The columns that tell what users have of what is passed: nothing of them is the teacher's.

    The true value where it is known; else, for each task, the share of what users did that is shown
    in the end.
    """
    true_value = f"true_value_captured@{study.passed}"
    if true_value in study.tested and study.tested[true_value].notna().any():
        return [true_value]
    return [f"end_to_end_hit_rate@{study.passed}/{task}" for task in study.tasks]
