"""Every setting on every measure: means, differences to the baseline, and which is the best."""

import re
from typing import Literal, NamedTuple

import pandas as pd

from kd_ranker.report.choices import baseline
from kd_ranker.report.statistics import Interval, by_repeat, difference, interval
from kd_ranker.report.study import SETTING, Study

Better = Literal["lower", "higher", "one"]

# By the part of a column's name before the task or the k. What is not here is not marked: the
# alignment ratio, for one, is small for a student that predicts users well as for one that strays.
_BETTER: dict[str, Better] = {
    "user_bce": "lower",
    "user_auc": "higher",
    "user_calibration": "one",
    "teacher_bce": "lower",
    "teacher_kl": "lower",
    "survival": "higher",
    "value_captured": "higher",
    "true_value_captured": "higher",
    "shown_recall": "higher",
    "passed_for_99": "lower",
    "flops_per_candidate": "lower",
    "cost_ratio": "lower",
    "funnel_cost_saving": "higher",
}
_UNMARKED = ("alignment_ratio",)


COLUMNS = (
    *("dataset", "setting", *SETTING, "measure", "mean", "low", "high", "n"),
    *("difference", "difference_low", "difference_high", "pairs", "best"),
)


class Measure(NamedTuple):
    """A column of `results.csv` as tables show it."""

    column: str
    title: str
    digits: int


def better(column: str) -> Better | None:
    """Which way a column is better: lower, higher, or closer to one; None for neither."""
    return _BETTER.get(re.split("[/@]", column)[0])


def important_measures(study: Study) -> list[Measure]:
    """The measures of a paper's table, as far as they were measured at all: the funnel's first."""
    measures = [
        Measure("passed_for_99", "passed for 99%", 0),
        Measure("funnel_cost_saving", "saving", 3),
        Measure("cost_ratio", "cost ratio", 4),
        Measure(f"survival@{study.passed}", f"survival@{study.passed}", 3),
        Measure(f"value_captured@{study.passed}", f"value@{study.passed}", 4),
        Measure("teacher_kl", "teacher KL", 4),
        Measure("alignment_ratio", "alignment ratio", 3),
        *(Measure(f"user_auc/{task}", f"AUC {task}", 4) for task in study.tasks),
        *(Measure(f"user_bce/{task}", f"user BCE {task}", 4) for task in study.tasks),
    ]
    return [measure for measure in measures if _is_known(study, measure.column)]


def every_measure(study: Study) -> list[str]:
    """All columns that hold a measure, in the order of `results.csv`."""
    names = (*_BETTER, *_UNMARKED)
    return [str(column) for column in study.rows if re.split("[/@]", str(column))[0] in names]


def _is_known(study: Study, column: str) -> bool:
    return any(
        column in rows and rows[column].notna().any() for rows in (study.rows, study.teachers)
    )


def comparison(study: Study) -> pd.DataFrame:
    """Every setting on every measure, one row each, numbers not rounded.

    Its `COLUMNS`: the dataset, the setting and what makes it, the measure; `mean`, `low`, `high`
    and `n` over repeats; the same of the paired difference to the baseline (`pairs` counts its
    repeats); and `best`, whether the setting is marked in its column (see `marked`).
    """
    undistilled = baseline(study.rows)
    keys = {
        first["setting"]: {name: first[name] for name in SETTING}
        for first in study.rows.drop_duplicates("setting").to_dict("records")
    }
    lines = []
    for measure in every_measure(study):
        table = by_repeat(study.rows, measure)
        winner = marked(table, better(measure))
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
    return pd.DataFrame(lines, columns=list(COLUMNS))


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
