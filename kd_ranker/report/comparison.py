"""Every chosen setting on every measure: means, differences to the baseline, and the best."""

from collections.abc import Mapping

import pandas as pd

from kd_ranker.evaluation.metrics import Better, main_columns, metric_of
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import NOTHING, Interval
from kd_ranker.report.study import Study


def important_columns(study: Study) -> list[str]:
    """The columns of a paper's table, as far as they were measured at all: the funnel's first."""
    columns = main_columns(study.tasks, study.passed)
    return [column for column in columns if _is_known(study, column)]


def compared_columns(study: Study) -> list[str]:
    """All columns on which settings are compared, in the order of `results.csv`."""
    of_columns = {str(column): metric_of(str(column)) for column in study.rows}
    return [column for column, metric in of_columns.items() if metric and metric.compared]


def _is_known(study: Study, column: str) -> bool:
    return any(
        column in rows and rows[column].notna().any() for rows in (study.tested, study.teachers)
    )


def comparison(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Every chosen setting on every measure of the test split, one row each, not rounded.

    Its columns: the dataset, the setting and what makes it, the measure; `mean`, `low`, `high`
    and `n` over repeats; the same of the paired difference to the baseline (`pairs` counts its
    repeats); and `best`, whether the setting is marked in its column (see `marked`).
    """
    keys = {
        first["setting"]: {name: first[name] for name in setting_columns(study.tested)}
        for first in study.tested.drop_duplicates("setting").to_dict("records")
    }
    lines = []
    for measure in compared_columns(study):
        metric = metric_of(measure)
        of_settings = {setting: estimates.of(setting, measure) for setting in keys}
        winner = marked(estimates, measure, of_settings, metric.better if metric else None)
        for setting, mean in of_settings.items():
            beside = (
                estimates.gap(setting, study.baseline, measure)
                if study.baseline not in (None, setting)
                else NOTHING
            )
            lines.append(
                {
                    "dataset": study.dataset,
                    "setting": setting,
                    **keys[setting],
                    "measure": measure,
                    **mean._asdict(),
                    "difference": beside.mean,
                    "difference_low": beside.low,
                    "difference_high": beside.high,
                    "pairs": beside.n,
                    "best": setting == winner,
                }
            )
    columns = [
        *("dataset", "setting", *setting_columns(study.tested), "measure"),
        *("mean", "low", "high", "n", "covers"),
        *("difference", "difference_low", "difference_high", "pairs", "best"),
    ]
    return pd.DataFrame(lines, columns=columns)


def marked(
    estimates: Estimates, measure: str, means: Mapping[str, Interval], direction: Better | None
) -> str | None:
    """The setting that may be called the best in its column, or None.

    The rule: the setting with the best mean, if the 95% interval of its paired difference to
    *every* other setting excludes 0, the runner-up included.

    On multiple comparisons: the winner is picked by looking, yet no correction for the number of
    settings is needed to say that the winner is the best. For independent normal means of equal
    variance, a two-sided test of the winner against the runner-up keeps its level however many
    there are (Hung and Fithian, "Rank verification for exponential families", Ann. Stat. 2019):
    the more equals are in the race, the less often one stands out from the next. Here variances
    differ and are estimated, so the winner has to be told from every other setting, not from the
    runner-up alone. Each column stands for itself: of twenty columns of noise, one may carry a
    mark.

    Args:
      estimates: of the study.
      measure: the column.
      means: of each setting.
      direction: which way is better; None and "one" mark nothing.
    """
    known = {setting: of.mean for setting, of in means.items() if of.n}
    if direction not in ("lower", "higher") or len(known) < 2:
        return None
    sign = 1 if direction == "higher" else -1
    winner = max(known, key=lambda setting: sign * known[setting])
    gaps = (estimates.gap(winner, other, measure) for other in known if other != winner)
    return winner if all(sign * gap.low > 0 and sign * gap.high > 0 for gap in gaps) else None
