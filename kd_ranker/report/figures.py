"""The data of the figures: one tidy table each, which `drawing` and `interactive` draw.

Every table has the columns `mode` (its colour) and `line` (the name of what is drawn as one line).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.saving import by_repeat
from kd_ranker.report.choices import best_of_modes
from kd_ranker.report.intervals import interval
from kd_ranker.report.study import Study


class Figure(NamedTuple):
    """A figure before it is drawn.

    Attributes:
      name: of its files.
      title: what it shows.
      caption: how to read it.
      data: its table; empty where it is left out.
      absent: why it is left out, or what of it is; "" if it is whole.
    """

    name: str
    title: str
    caption: str
    data: pd.DataFrame
    absent: str


def figures(study: Study) -> list[Figure]:
    """The figures of a study in their order."""
    makers: list[Callable[[Study], Figure]] = [
        pareto, value_captured, survival, calibration, training,
    ]  # fmt: skip
    return [make(study) for make in makers]


def pareto(study: Study) -> Figure:
    """User BCE against teacher BCE, means over tasks: a point a setting.

    Columns: mode, serve, line, setting, weight (NaN for mode none), and for `user_bce` and
    `teacher_bce` the mean over repeats with `_low` and `_high`.
    """
    settings = study.rows.drop_duplicates("setting").set_index("setting")
    tables = {measure: by_repeat(study.rows, measure) for measure in ("user_bce", "teacher_bce")}
    lines = []
    for setting, first in settings.iterrows():
        point = {
            "mode": first["mode"],
            "serve": first["serve"],
            "line": _without_weight(str(setting)),
            "setting": setting,
            "weight": first["distill_weight"] if pd.notna(first["distill_loss"]) else np.nan,
        }
        for measure, table in tables.items():
            mean = interval(table[setting].to_numpy())
            point |= {measure: mean.mean, f"{measure}_low": mean.low, f"{measure}_high": mean.high}
        lines.append(point)
    columns = ["mode", "serve", "line", "setting", "weight"]
    columns += [measure + end for measure in tables for end in ("", "_low", "_high")]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["user_bce", "teacher_bce"])
    return Figure(
        "pareto",
        "Predicting users against following the teacher",
        "Binary cross entropy against user labels and against the teacher's probabilities, means "
        "over tasks; lower is better for both. One curve a mode and serving choice as the distill "
        "weight grows; bars are 95% intervals over repeats.",
        data,
        "" if len(data) else "no student has both numbers",
    )


def _without_weight(setting: str) -> str:
    return ", ".join(part for part in setting.split(", ") if not part.startswith("weight "))


def value_captured(study: Study) -> Figure:
    """Value captured against k, each mode at its best setting.

    Columns: mode, serve, line, setting, k, `mean`, `low`, `high`, and `passed_for_99` (mean over
    repeats; the same all along a line).
    """
    return _over_k(
        study,
        "value_captured",
        "Value captured by candidates passed",
        "The share of the final value that is kept when k candidates are passed, each mode at its "
        "best setting (fewest passed for 99%). The dashed line is 99%; marked is what each mode "
        "needs for it, the mean over repeats. Bands are 95% intervals.",
    )


def window(data: pd.DataFrame) -> tuple[float, float, float]:
    """The part of the captured curves that is worth seeing: lowest k, highest k, lowest value.

    The curves start far below 99%, so the figure starts where the best of them has come near it.
    """
    low = max(0.0, min(0.9, float(data["mean"].median()) - 0.1))
    near = data.loc[data["mean"] >= low, "k"]
    return float(near.min()), float(data["k"].max()), low


def ticks(low: float, high: float) -> list[int]:
    """Round numbers for a logarithmic axis of k.

    >>> ticks(30, 2000)
    [50, 100, 200, 500, 1000, 2000]
    """
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def survival(study: Study) -> Figure:
    """Survival against k, each mode at its best setting: columns as in `value_captured`."""
    return _over_k(
        study,
        "survival",
        "Survival of the teacher's own top",
        "The share of the candidates that the teacher would show, out of all retrieved, that is "
        "among the k passed; each mode at its best setting. Bands are 95% intervals.",
    )


def _over_k(study: Study, measure: str, title: str, caption: str) -> Figure:
    columns = ["mode", "serve", "line", "setting", "k", "mean", "low", "high", "passed_for_99"]
    lines = []
    if len(study.curves):
        chosen = _members_at_best(study).merge(study.curves, on=["source", "member", "serve"])
        for setting, curves in chosen.groupby("setting", sort=False):
            first = curves.iloc[0]
            table = curves.pivot(index="k", columns="repeat", values=measure)
            # Members keep the k that they need themselves: only what all of them have is averaged.
            for k, values in table.dropna().iterrows():
                mean = interval(values.to_numpy(float))
                lines.append(
                    {
                        **{name: first[name] for name in ("mode", "serve", "setting")},
                        "line": setting,
                        "k": k,
                        **mean._asdict(),
                        "passed_for_99": first["passed_mean"],
                    }
                )
    data = pd.DataFrame(lines, columns=columns)
    return Figure(measure, title, caption, data, _absence(study, "curves", data))


def _members_at_best(study: Study) -> pd.DataFrame:
    """The members of each mode's best setting: a row each, with the mean of `passed_for_99`."""
    chosen = best_of_modes(study.rows)
    rows = study.rows[study.rows["setting"].isin(list(chosen.values()))]
    means = rows.groupby("setting")["passed_for_99"].mean()
    kept = rows[["source", "member", "mode", "serve", "setting", "repeat", "distill_loss"]]
    return kept.assign(passed_mean=rows["setting"].map(means))


def calibration(study: Study) -> Figure:
    """Observed against predicted by bin, each mode at its best setting, a panel a task.

    Columns: mode, serve, line, setting, task, bin, weight, predicted, observed. Bins of several
    repeats are joined: means by weight.
    """
    columns = ["mode", "serve", "line", "task", "bin", "weight", "predicted", "observed"]
    data = pd.DataFrame(columns=columns)
    if len(study.calibration):
        chosen = _members_at_best(study).merge(study.calibration, on=["source", "member", "serve"])
        keys = ["mode", "serve", "setting", "task", "bin"]
        sums = (
            chosen.assign(
                predicted=chosen["predicted"] * chosen["weight"],
                observed=chosen["observed"] * chosen["weight"],
            )
            .groupby(keys, sort=False)[["weight", "predicted", "observed"]]
            .sum()
        )
        for name in ("predicted", "observed"):
            sums[name] /= sums["weight"]
        data = sums.reset_index().rename(columns={"setting": "line"})[columns]
        # Tasks in the order of the config.
        data["task"] = pd.Categorical(data["task"], study.tasks)
        data = data.sort_values(["task", "bin"], kind="stable").astype({"task": str})
    return Figure(
        "calibration",
        "Calibration",
        "Observed share of a label against its predicted probability, by bin of the prediction, on "
        "shown candidates; each mode at its best setting, repeats joined. On the diagonal, what is "
        "predicted happens as often as predicted.",
        data,
        _absence(study, "calibration", data),
    )


def training(study: Study) -> Figure:
    """User loss and distillation loss by step, each mode at its best setting.

    Columns: mode, line, repeat ("mean" for the mean over repeats), kind, step, loss.
    """
    columns = ["mode", "line", "repeat", "kind", "step", "loss"]
    data = pd.DataFrame(columns=columns)
    if len(study.losses):
        each = _members_at_best(study).merge(study.losses, on=["source", "member"])
        # A mode without a teacher logs a distillation loss of 0.
        each = each[each["distill_loss"].notna() | (each["kind"] != "distill_loss")]
        each = each.rename(columns={"setting": "line"})[columns]
        count = each.groupby("line")["repeat"].transform("nunique")
        grouped = each.assign(of=count).groupby(["mode", "line", "kind", "step"], sort=False)
        mean = grouped.agg(loss=("loss", "mean"), n=("loss", "size"), of=("of", "first"))
        # Only steps that all repeats have logged.
        mean = mean[mean["n"] == mean["of"]].reset_index().assign(repeat="mean")
        data = pd.concat([each, mean[columns]], ignore_index=True)
    return Figure(
        "training",
        "Losses during training",
        "User loss and distillation loss of a training batch, each mode at its best setting: the "
        "mean over repeats, and each repeat as a thin line.",
        data,
        _absence(study, "losses", data),
    )


def _absence(study: Study, kind: str, data: pd.DataFrame) -> str:
    missing = "; ".join(study.missing[kind])
    if data.empty and not missing:
        return "none of its files speaks of the members at their best settings"
    return missing
