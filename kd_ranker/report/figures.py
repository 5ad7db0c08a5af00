"""The figures of a report: `ENTRIES`, one per figure, and the tidy table of each.

Each table has the columns `mode` (which gives the color), `line` (the name in the legend) and,
except the waterfall, `plain` (False for variants of mode `none`, which have other colors).
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import CRITERION, SAVINGS, by_repeat, of_split
from kd_ranker.report import charts
from kd_ranker.report.charts import REFERENCE, Entry, Figure
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import Study

# Shares of the value to keep, denser where the number of candidates to pass grows fast.
_TARGETS = (*np.arange(0.95, 0.989, 0.005), *np.arange(0.99, 0.9995, 0.001))
# The columns of a line, and those of a curve or of bars: a mean and the ends of its interval.
_LINE = ("mode", "plain", "serve", "line", "setting")
_ENDS = ("mean", "low", "high")


def figures(study: Study, estimates: Estimates) -> list[Figure]:
    """Return the figures of a study in their order."""
    return [figure(name, study, estimates) for name, of in ENTRIES.items() if of.shown(study)]


def figure(name: str, study: Study, estimates: Estimates) -> Figure:
    """Return one figure; `name` is a key of `ENTRIES`."""
    entry = ENTRIES[name]
    caption = entry.caption.format(
        baseline=study.baseline,
        unit=study.costs.unit,
        margin=f"{100 * study.margin:g}%",
        sizes=" of each size" if study.best_of_sizes["size"].nunique() > 1 else "",
    )
    return Figure(name, entry, caption, entry.data(study, estimates))


def _waterfall(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return mode, line (the step), setting, and mean, low and high of `CRITERION`."""
    steps = {
        "today's early ranker": (REFERENCE, study.incumbent),
        "mode none": ("none", study.plain),
        "best without scores": (REFERENCE, study.baseline),
        "best with scores": ("aux", study.best_with_scores),
    }
    lines = (
        {"mode": mode, "line": step, "setting": setting}
        | estimates.of(setting, CRITERION)._asdict()
        for step, (mode, setting) in steps.items()
        if setting is not None
    )
    return _table(["mode", "line", "setting", *_ENDS], lines)


def _plane(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return `_LINE`, margin, and saving and users with the ends of their intervals.

    `users` is the change of the first of `users_at_target`.
    """
    lines = (
        line
        | _ends("saving", estimates.of(line["setting"], SAVINGS[0]))
        | _ends("users", estimates.gap(line["setting"], str(study.baseline), measure))
        for measure in study.users_at_target[:1]
        for line in _compared(study)
    )
    data = _table([*_LINE, *_ends("saving"), *_ends("users")], lines)
    return data.assign(margin=-study.margin)


def _frontier(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return curves over k of the best students with and without scores, and of references.

    The students are the best of each size. The columns are those of `_curves`, size, cost (of a
    request, over that of only the final ranker on all candidates), and `cost_for_99`, which is
    constant along a line.
    """
    rows = _with_references(study, study.best_of_sizes)
    data = _curves(rows, estimates, "value_captured", ("size",))
    data = data.assign(cost=np.nan, cost_for_99=np.nan)
    for setting, places in data.groupby("setting").groups.items():
        data.loc[places, "cost"] = estimates.cost_curve(str(setting))
        data.loc[places, "cost_for_99"] = estimates.cost_share(str(setting), TARGET).mean
    return data.dropna(subset=["cost"]).reset_index(drop=True)


def _saving(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return `_LINE`, target (in percent), and the saving."""
    lines = (
        line | {"target": 100 * target} | estimates.saving(line["setting"], float(target))._asdict()
        for line in _compared(study)
        for target in _TARGETS
    )
    return _table([*_LINE, "target", *_ENDS], lines)


def _pareto(study: Study, estimates: Estimates) -> pd.DataFrame:
    """Return `_LINE`, weight (NaN in mode none), and the user and teacher BCE on validation.

    The points of a way are its chosen setting and those that differ from it only in the weight.
    """
    rows = of_split(study.rows, "validation")
    alike = [column for column in setting_columns(rows) if column != "distill_weight"]
    chosen = rows.loc[rows["setting"].isin(list(study.chosen.values())), alike].drop_duplicates()
    points = rows.drop_duplicates("setting").merge(chosen, on=alike)
    points["weight"] = points["distill_weight"].where(points["distill_loss"].notna())
    tables = {measure: by_repeat(rows, measure) for measure in ("user_bce", "teacher_bce")}
    data = pd.DataFrame(_lines(points, "weight"), columns=[*_LINE, "weight"])
    for measure, table in tables.items():
        means = [interval(table[setting].to_numpy())[:3] for setting in data["setting"]]
        data[[*_ends(measure)]] = np.reshape(means, (-1, 3))
    return data.dropna(subset=[*tables]).reset_index(drop=True)


def _over_k(study: Study, estimates: Estimates, measure: str) -> pd.DataFrame:
    """Return the curves of the chosen settings, and of references except for the covered value."""
    if measure == "covered_user_value":
        # That of the incumbent would be far too low.
        return _curves(study.tested, estimates, measure)
    return _curves(_with_references(study, study.tested), estimates, measure)


def _with_references(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, and those of the incumbent and of a baseline that is a list of items."""
    known = of_split(study.references, "test").assign(mode=REFERENCE, size="")
    return pd.concat([rows, known[known["setting"].isin([study.incumbent, study.baseline])]])


def _lines(rows: pd.DataFrame, *more: str) -> list[dict[str, Any]]:
    """Return `_LINE` and more columns of each setting; the line is named by the way."""
    settings = rows.drop_duplicates("setting").rename(columns={"way": "line"})
    return settings[[*_LINE, *more]].to_dict("records")  # type: ignore[return-value]


def _compared(study: Study) -> list[dict[str, Any]]:
    """Return the lines of the chosen settings to compare with the baseline; none without one."""
    if study.baseline is None:
        return []
    return _lines(study.tested[study.tested["setting"] != study.baseline])


def _ends(name: str, mean: Interval | None = None) -> dict[str, float]:
    """Return a mean and the ends of its interval by column."""
    ends = mean[:3] if mean else (np.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _table(columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return the lines in which every mean is known."""
    table = pd.DataFrame(list(lines), columns=list(columns))
    means = [name for name in columns if name == "mean" or f"{name}_low" in columns]
    return table.dropna(subset=means).reset_index(drop=True)


def _curves(
    rows: pd.DataFrame, estimates: Estimates, measure: str, more: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the curves of settings; none if they are all references.

    The columns are `_LINE`, `more`, k, mean, low, high, and `passed_for_99`, which is the mean over
    repeats and constant along a line.
    """
    curves = [
        estimates.curve(line["setting"], measure).assign(
            **line, passed_for_99=estimates.of(line["setting"], "passed_for_99").mean
        )
        for line in _lines(rows, *more)
    ]
    columns = [*_LINE, *more, "k", *_ENDS, "passed_for_99"]
    data = pd.concat(curves)[columns] if curves else pd.DataFrame(columns=columns)
    data = data.dropna(subset=["mean"]).reset_index(drop=True)
    return data[:0] if (data["mode"] == REFERENCE).all() else data


_GRAY = " Gray are the early ranker that filled the log, and a list if none needs fewer."


ENTRIES = {
    "waterfall": Entry(
        _waterfall,
        charts.waterfall,
        "Candidates to pass, step by step",
        "Candidates per request that have to be passed for 99% of the final value, on the test "
        "split: with the early ranker that filled the log, with a student of plain mode none, with "
        "the best ranker that needs no scores of the final ranker, and with the best student that "
        "learns from them. Bars are 95% intervals.",
        empty="nothing is measured",
        height=110,
    ),
    "frontier": Entry(
        _frontier,
        charts.frontier,
        "Cost of the funnel against final quality",
        "The best student without the final ranker's scores and the best with them{sizes}, as "
        "more candidates are passed, on the test split: the cost of a request, {unit}, as a share "
        "of its cost if the final ranker ranks all candidates, and the share of the final value "
        "that is kept. Further left at the same height is cheaper at the same quality. "
        "The dashed line is 99%; marks and the legend show its cost. Bands are 95% intervals."
        + _GRAY
        + " Both count as free.",
        empty="the cost of the teacher, or the requests of the best students, are not known",
    ),
    "plane": Entry(
        _plane,
        charts.plane,
        "Saving against the change for users",
        "Each way against {baseline}, the best ranker without the final ranker's scores, on "
        "the test split, with as many passed as each needs for 99% of the final value: the share "
        "of the funnel's cost, {unit}, that is saved, and the change of the value for users, as a "
        "share of that if all are passed. The dashed line is the margin of {margin}. Bars are 95% "
        "intervals.",
        empty="the change for users is not known",
        marked=True,
    ),
    "value_captured": Entry(
        functools.partial(_over_k, measure="value_captured"),
        functools.partial(
            charts.over_k, measure="value_captured", rule=TARGET, crossing=("passed_for_99", ".0f")
        ),
        "Value captured by candidates passed",
        "The share of the final value that is kept when k candidates are passed, on the test "
        "split; of each way the setting that did best on validation. The dashed line is 99%; "
        "marks and the legend show what each needs for it, the mean over repeats. Bands are 95% "
        "intervals." + _GRAY,
    ),
    "true_value_captured": Entry(
        functools.partial(_over_k, measure="true_value_captured"),
        functools.partial(charts.over_k, measure="true_value_captured", rule=1.0),
        "True value captured by candidates passed",
        "The same items, valued by the true probabilities: the share of the value if all retrieved "
        "candidates reach the final ranker. It can exceed 1 if an early ranker drops candidates "
        "that the final ranker overrates. Bands are 95% intervals." + _GRAY,
        shown=lambda study: study.knows_truth,
    ),
    "covered_user_value": Entry(
        functools.partial(_over_k, measure="covered_user_value"),
        functools.partial(charts.over_k, measure="covered_user_value"),
        "Users' value by candidates passed",
        "Of a funnel of the candidates that the logged funnel passed: the value of the user labels "
        "of the items that are shown, as a share of that if all of these are passed, on the test "
        "split. Differences have a sign and no size. Bands are 95% intervals.",
        shown=lambda study: not study.knows_truth,
    ),
    "saving": Entry(
        _saving,
        charts.saving,
        "Saving by target",
        "The share of the funnel's cost, {unit}, that is saved against {baseline}, on the test "
        "split, by the share of the final value to keep. Bands are 95% intervals.",
        empty="there is nothing to compare",
    ),
    "survival": Entry(
        functools.partial(_over_k, measure="survival"),
        functools.partial(charts.over_k, measure="survival", whole=True),
        "Survival of the teacher's own top",
        "The share of the candidates that the teacher would show, out of all retrieved, that is "
        "among the k passed, on the test split. Bands are 95% intervals." + _GRAY,
    ),
    "pareto": Entry(
        _pareto,
        charts.pareto,
        "Predicting users against following the teacher",
        "Binary cross entropy against user labels and against the teacher's probabilities, means "
        "over tasks, on validation; lower is better for both. One curve per way as the distill "
        "weight grows, all else as it was chosen; bars are 95% intervals over repeats.",
        empty="no student has both numbers",
        marked=True,
    ),
}
