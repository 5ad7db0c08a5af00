"""Every setting on every measure: means, differences to the baseline, and which is the best."""

import pandas as pd

from kd_ranker.evaluation.metrics import Better, main_columns, metric_of
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import baseline, by_repeat
from kd_ranker.report.intervals import Interval, difference, interval
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
        column in rows and rows[column].notna().any() for rows in (study.rows, study.teachers)
    )


def comparison(study: Study) -> pd.DataFrame:
    """Every setting on every measure, one row each, numbers not rounded.

    Its columns: the dataset, the setting and what makes it, the measure; `mean`, `low`, `high`
    and `n` over repeats; the same of the paired difference to the baseline (`pairs` counts its
    repeats); and `best`, whether the setting is marked in its column (see `marked`).
    """
    undistilled = baseline(study.rows)
    keys = {
        first["setting"]: {name: first[name] for name in setting_columns(study.rows)}
        for first in study.rows.drop_duplicates("setting").to_dict("records")
    }
    lines = []
    for measure in compared_columns(study):
        table = by_repeat(study.rows, measure)
        metric = metric_of(measure)
        winner = marked(table, metric.better if metric else None)
        for setting in map(str, table):
            beside = (
                difference(table, setting, undistilled)
                if undistilled not in (None, setting)
                else Interval(float("nan"), float("nan"), float("nan"), 0)
            )
            lines.append(
                {
                    "dataset": study.dataset,
                    "setting": setting,
                    **keys[setting],
                    "measure": measure,
                    **interval(table[setting].to_numpy())._asdict(),
                    "difference": beside.mean,
                    "difference_low": beside.low,
                    "difference_high": beside.high,
                    "pairs": beside.n,
                    "best": setting == winner,
                }
            )
    columns = [
        *(
            "dataset",
            "setting",
            *setting_columns(study.rows),
            "measure",
            "mean",
            "low",
            "high",
            "n",
        ),
        *("difference", "difference_low", "difference_high", "pairs", "best"),
    ]
    return pd.DataFrame(lines, columns=columns)


def marked(table: pd.DataFrame, direction: Better | None) -> str | None:
    """The setting that may be called the best in its column, or None.

    The rule: the setting with the best mean, if the 95% interval of its paired difference to
    *every* other setting excludes 0, the runner-up included. Without two repeats nothing is marked.

    On multiple comparisons: the winner is picked by looking, yet no correction for the number of
    settings is needed to say that the winner is the best. For independent normal means of equal
    variance, a two-sided test of the winner against the runner-up keeps its level however many
    there are (Hung and Fithian, "Rank verification for exponential families", Ann. Stat. 2019):
    the more equals are in the race, the less often one stands out from the next. Here variances
    differ and are estimated from few repeats, so the winner has to be told from every other
    setting, not from the runner-up alone. A test draws equal settings and counts how often one is
    marked. Each column stands for itself: of twenty columns of noise, one may carry a mark.

    Args:
      table: of `by_repeat`.
      direction: which way is better; None marks nothing.
    """
    if direction is None:
        return None
    score = {"lower": -table, "higher": table, "one": -(table - 1).abs()}[direction]
    score = score.dropna(axis="columns", how="all")
    if score.shape[1] < 2:
        return None
    winner = str(score.mean().idxmax())
    others = [difference(score, winner, other) for other in map(str, score) if other != winner]
    return winner if all(gap.low > 0 for gap in others) else None
