"""The data of the figures: one tidy table each, which `drawing` and `interactive` draw.

Every table has the columns `mode` (its colour) and `line` (the name of what is drawn as one line).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import by_repeat, of_split
from kd_ranker.report.estimates import Estimates
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


def figures(study: Study, estimates: Estimates) -> list[Figure]:
    """The figures of a study in their order."""
    makers: list[Callable[[Study, Estimates], Figure]] = [
        value_captured, users_value, survival, pareto, calibration, training,
    ]  # fmt: skip
    return [make(study, estimates) for make in makers]


def pareto(study: Study, estimates: Estimates) -> Figure:
    """User BCE against teacher BCE on validation, means over tasks: a curve a way.

    A point is the setting that was chosen for the way, or one that differs in the weight alone.
    Columns: mode, serve, line, setting, weight (NaN for mode none), and for `user_bce` and
    `teacher_bce` the mean over repeats with `_low` and `_high`.
    """
    rows = of_split(study.rows, "validation")
    settings = rows.drop_duplicates("setting")
    alike = [column for column in setting_columns(rows) if column != "distill_weight"]
    chosen = settings.loc[settings["setting"].isin(list(study.chosen.values())), alike]
    tables = {measure: by_repeat(rows, measure) for measure in ("user_bce", "teacher_bce")}
    lines = []
    for first in settings.merge(chosen.drop_duplicates(), on=alike).to_dict("records"):
        point = {name: first[name] for name in ("mode", "serve", "setting")}
        point["line"] = first["way"]
        distilled = pd.notna(first["distill_loss"])
        point["weight"] = first["distill_weight"] if distilled else np.nan
        for measure, table in tables.items():
            mean = interval(table[first["setting"]].to_numpy())
            point |= {measure: mean.mean, f"{measure}_low": mean.low, f"{measure}_high": mean.high}
        lines.append(point)
    columns = ["mode", "serve", "line", "setting", "weight"]
    columns += [measure + end for measure in tables for end in ("", "_low", "_high")]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["user_bce", "teacher_bce"])
    return Figure(
        "pareto",
        "Predicting users against following the teacher",
        "Binary cross entropy against user labels and against the teacher's probabilities, means "
        "over tasks, on validation; lower is better for both. One curve a way as the distill "
        "weight grows, all else as it was chosen; bars are 95% intervals over repeats.",
        data,
        "" if len(data) else "no student has both numbers",
    )


def value_captured(study: Study, estimates: Estimates) -> Figure:
    """Value captured against k, the chosen setting of each way.

    Columns: mode, serve, line, setting, k, `mean`, `low`, `high`, and `passed_for_99` (mean over
    repeats; the same all along a line).
    """
    return _over_k(
        study,
        estimates,
        "value_captured",
        "Value captured by candidates passed",
        "The share of the final value that is kept when k candidates are passed, on the test "
        "split; of each way the setting that did best on validation. The dashed line is 99%; "
        "marked is what each needs for it, the mean over repeats. Bands are 95% intervals.",
    )


def users_value(study: Study, estimates: Estimates) -> Figure:
    """True value captured against k: columns as in `value_captured`; empty if it is not known."""
    return _over_k(
        study,
        estimates,
        "true_value_captured",
        "True value captured by candidates passed",
        "The same items, valued by the true probabilities: the share of what they are worth if all "
        "retrieved reach the final ranker. It can exceed 1, where an early ranker keeps from the "
        "final ranker what that overrates. Bands are 95% intervals.",
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


def survival(study: Study, estimates: Estimates) -> Figure:
    """Survival against k: columns as in `value_captured`."""
    return _over_k(
        study,
        estimates,
        "survival",
        "Survival of the teacher's own top",
        "The share of the candidates that the teacher would show, out of all retrieved, that is "
        "among the k passed, on the test split. Bands are 95% intervals.",
    )


def _over_k(study: Study, estimates: Estimates, measure: str, title: str, caption: str) -> Figure:
    columns = ["mode", "serve", "line", "setting", "k", "mean", "low", "high", "passed_for_99"]
    chosen = study.tested.drop_duplicates("setting")
    passed = study.tested.groupby("setting")["passed_for_99"].mean()
    curves = [
        estimates.curve(first["setting"], measure).assign(
            **{name: first[name] for name in ("mode", "serve", "setting")},
            line=first["way"],
            passed_for_99=passed[first["setting"]],
        )
        for first in chosen.to_dict("records")
    ]
    data = pd.concat(curves)[columns] if curves else pd.DataFrame(columns=columns)
    data = data.dropna(subset=["mean"]).reset_index(drop=True)
    return Figure(measure, title, caption, data, _absence(study, "requests", data))


def _tested_members(study: Study) -> pd.DataFrame:
    """The members of the chosen settings, a row each."""
    kept = ["source", "member", "mode", "serve", "way", "repeat", "distill_loss"]
    return study.tested[kept]


def calibration(study: Study, estimates: Estimates) -> Figure:
    """Observed against predicted by bin, the chosen setting of each way, a panel a task.

    Columns: mode, serve, line, setting, task, bin, weight, predicted, observed. Bins of several
    repeats are joined: means by weight.
    """
    columns = ["mode", "serve", "line", "task", "bin", "weight", "predicted", "observed"]
    data = pd.DataFrame(columns=columns)
    if len(study.calibration):
        chosen = _tested_members(study).merge(study.calibration, on=["source", "member", "serve"])
        keys = ["mode", "serve", "way", "task", "bin"]
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
        data = sums.reset_index().rename(columns={"way": "line"})[columns]
        # Tasks in the order of the config.
        data["task"] = pd.Categorical(data["task"], study.tasks)
        data = data.sort_values(["task", "bin"], kind="stable").astype({"task": str})
    return Figure(
        "calibration",
        "Calibration",
        "Observed share of a label against its predicted probability, by bin of the prediction, on "
        "shown candidates of the test split, repeats joined. On the diagonal, what is "
        "predicted happens as often as predicted.",
        data,
        _absence(study, "calibration", data),
    )


def training(study: Study, estimates: Estimates) -> Figure:
    """User loss and distillation loss by step, the chosen setting of each way.

    Columns: mode, line, repeat ("mean" for the mean over repeats), kind, step, loss.
    """
    columns = ["mode", "line", "repeat", "kind", "step", "loss"]
    data = pd.DataFrame(columns=columns)
    if len(study.losses):
        each = _tested_members(study).merge(study.losses, on=["source", "member"])
        # A mode without a teacher logs a distillation loss of 0.
        each = each[each["distill_loss"].notna() | (each["kind"] != "distill_loss")]
        each = each.rename(columns={"way": "line"})[columns]
        count = each.groupby("line")["repeat"].transform("nunique")
        grouped = each.assign(of=count).groupby(["mode", "line", "kind", "step"], sort=False)
        mean = grouped.agg(loss=("loss", "mean"), n=("loss", "size"), of=("of", "first"))
        # Only steps that all repeats have logged.
        mean = mean[mean["n"] == mean["of"]].reset_index().assign(repeat="mean")
        data = pd.concat([each, mean[columns]], ignore_index=True)
    return Figure(
        "training",
        "Losses during training",
        "User loss and distillation loss of a training batch, the chosen setting of each way: the "
        "mean over repeats, and each repeat as a thin line.",
        data,
        _absence(study, "losses", data),
    )


def _absence(study: Study, kind: str, data: pd.DataFrame) -> str:
    missing = "; ".join(study.missing[kind])
    if data.empty and not missing:
        return "none of its files speaks of the members at their best settings"
    return missing
