"""The data of the figures: one tidy table each, which `charts` draws.

Every table has the columns `mode` (its colour) and `line` (the name of what is drawn as one line).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import by_repeat, of_split
from kd_ranker.report.choices import best_of_sizes, best_with_scores, knows_truth, users_at_target
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import interval
from kd_ranker.report.study import Study

# Shares of the value to keep, closer to each other where the candidates to pass grow fast.
_TARGETS = (*np.arange(0.95, 0.989, 0.005), *np.arange(0.99, 0.9995, 0.001))
# Costs of a student's candidate, over the teacher's.
_COSTS = (0.001, *np.arange(0.01, 0.101, 0.01))
# The mode of what ranks without a model.
REFERENCE = "reference"


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
        waterfall, frontier, plane, value_captured, users_value, saving, survival, pareto,
        calibration, training,
    ]  # fmt: skip
    return [make(study, estimates) for make in makers]


def waterfall(study: Study, estimates: Estimates) -> Figure:
    """The candidates to pass today, without the final ranker's scores, and with them.

    Columns: mode, line (the step), setting, and `mean`, `low` and `high` of `passed_for_99`.
    """
    steps = {
        "today's early ranker": study.incumbent,
        "mode none": study.plain,
        "best without scores": study.baseline,
        "best with scores": best_with_scores(study),
    }
    lines = []
    for step, setting in steps.items():
        if setting is not None:
            found = estimates.of(setting, "passed_for_99")
            mode = {"mode none": "none", "best with scores": "aux"}.get(step, REFERENCE)
            lines.append(
                {"mode": mode, "line": step, "setting": setting, "mean": found.mean,
                 "low": found.low, "high": found.high}
            )  # fmt: skip
    columns = ["mode", "line", "setting", "mean", "low", "high"]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["mean"]).reset_index(drop=True)
    return Figure(
        "waterfall",
        "Candidates to pass, step by step",
        "Candidates per request that have to be passed for 99% of the final value, on the test "
        "split: with the early ranker that filled the log, with a student of plain mode none, with "
        "the best ranker that needs no scores of the final ranker, and with the best student that "
        "learns from them. Bars are 95% intervals.",
        data,
        "" if len(data) else "nothing is measured",
    )


def plane(study: Study, estimates: Estimates) -> Figure:
    """The saving against the change for users, a mark per way, against the best without scores.

    Columns: mode, serve, line, setting, and for `saving` and `users` the mean with `_low` and
    `_high`. `users` is the relative change of the first of `users_at_target`.
    """
    ends = ("", "_low", "_high")
    columns = [
        "mode",
        "serve",
        "line",
        "setting",
        *(of + end for of in ("saving", "users") for end in ends),
    ]
    lines = []
    measures = users_at_target(study)
    compared = study.tested[study.tested["setting"] != study.baseline]
    for first in compared.drop_duplicates("setting").to_dict("records") if measures else ():
        line = {name: first[name] for name in ("mode", "serve", "setting")} | {"line": first["way"]}
        found = {
            "saving": estimates.of(first["setting"], "funnel_cost_saving"),
            "users": estimates.relative_gap(first["setting"], str(study.baseline), measures[0]),
        }
        for name, of in found.items():
            line |= dict(zip([name + end for end in ends], of[:3], strict=True))
        lines.append(line)
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["saving", "users"])
    return Figure(
        "plane",
        "Saving against the change for users",
        f"Each way against {study.baseline}, the best ranker without the final ranker's scores, on "
        "the test split, with as many passed as each needs for 99% of the final value: the share "
        f"of the funnel's cost, {study.costs.unit}, that is saved, and the relative change of what "
        f"users have. The dashed line is the margin of {100 * study.margin:g}%. Bars are 95% "
        "intervals.",
        data.reset_index(drop=True).assign(margin=-study.margin),
        "" if len(data) else "the change for users is not known",
    )


def frontier(study: Study, estimates: Estimates) -> Figure:
    """Final quality against the funnel's cost: the best undistilled and distilled of each size.

    Both are curves over k. Columns: mode (`REFERENCE` of what ranks without a model), serve, line,
    size, k, cost (of a request, over that of the final ranker alone on all retrieved), `mean`,
    `low` and `high` of the value captured, and `passed_for_99` and `cost_for_99`, the same all
    along a line.
    """
    settings = best_of_sizes(study)
    references = of_split(study.references, "test").drop_duplicates("setting")
    references = references.assign(mode=REFERENCE, size="")
    data = _curves_of(pd.concat([settings, references]), estimates, "value_captured", ("size",))
    if (data["mode"] == REFERENCE).all():
        data = data[:0]
    lines = [
        of.assign(
            cost=estimates.cost_curve(str(setting)),
            cost_for_99=estimates.cost_share(str(setting), TARGET).mean,
        )
        for setting, of in data.groupby("setting", sort=False)
    ]
    priced = pd.concat(lines) if lines else data.assign(cost=np.nan, cost_for_99=np.nan)
    priced = priced.dropna(subset=["cost"]).reset_index(drop=True)
    no_cost = "what the teacher costs is not known" if len(data) > len(priced) else ""
    sizes = " of each size" if settings["size"].nunique() > 1 else ""
    return Figure(
        "frontier",
        "Cost of the funnel against final quality",
        f"The best undistilled and the best distilled student{sizes}, as more candidates are "
        f"passed, on the test split: what a request costs, {study.costs.unit}, as a share of what "
        "it costs if the final ranker ranks all candidates, and the share of the final "
        "value that is kept. Further left at the same height is cheaper at the same quality. The "
        "dashed line is 99%, and marked is what it costs. Grey are rankers without a model, which "
        "count as free. Bands are 95% intervals.",
        priced,
        no_cost or _absence(study, "requests", data),
    )


def saving(study: Study, estimates: Estimates) -> Figure:
    """The saving over the target and over the student's cost: the chosen setting of each way.

    Columns: mode, serve, line, over (`target` or `student's cost`), at (in percent), `mean`, `low`
    and `high` of the share that is saved.
    """
    settings = study.tested.drop_duplicates("setting")
    distilled = settings[settings["setting"] != study.baseline] if study.baseline else settings[:0]
    places = [("target", target, target, None) for target in _TARGETS]
    places += [("student's cost", cost, TARGET, cost) for cost in _COSTS]
    lines = []
    for first in distilled.to_dict("records"):
        for over, at, target, cost in places:
            found = estimates.saving(first["setting"], float(target), cost)
            lines.append(
                {
                    **{name: first[name] for name in ("mode", "serve")},
                    "line": first["way"], "over": over, "at": 100 * float(at),
                    "mean": found.mean, "low": found.low, "high": found.high,
                }
            )  # fmt: skip
    columns = ["mode", "serve", "line", "over", "at", "mean", "low", "high"]
    data = pd.DataFrame(lines, columns=columns).dropna(subset=["mean"]).reset_index(drop=True)
    return Figure(
        "saving",
        "Saving by target and by the student's cost",
        f"The share of the funnel's cost, {study.costs.unit}, that is saved against "
        f"{study.baseline}, on the test split: by the share of the final value to keep, at what "
        f"the student costs; and for {100 * TARGET:g}%, by what a candidate costs either student, "
        "over the teacher's. Bands are 95% intervals.",
        data,
        _absence(study, "requests", data) if len(distilled) else "there is nothing to compare",
    )


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
    """Users' side against k: the true value captured, or where that is not known the hit rates.

    Columns as in `value_captured`; of hit rates with `measure` and `task`.
    """
    if not knows_truth(study):
        return _hit_rates(study, estimates)
    return _over_k(
        study,
        estimates,
        "true_value_captured",
        "True value captured by candidates passed",
        "The same items, valued by the true probabilities: the share of what they are worth if all "
        "retrieved reach the final ranker. It can exceed 1, where an early ranker keeps from the "
        "final ranker what that overrates. Bands are 95% intervals.",
    )


def _hit_rates(study: Study, estimates: Estimates) -> Figure:
    settings = study.tested.drop_duplicates("setting")
    curves = [
        _curves_of(settings, estimates, f"{measure}/{task}").assign(measure=measure, task=task)
        for measure in ("hit_rate", "end_to_end_hit_rate")
        for task in study.tasks
    ]
    data = pd.concat(curves, ignore_index=True)
    return Figure(
        "hit_rates",
        "What users did, by candidates passed",
        "The share of the candidates with a positive label that is among the k passed (hit rate), "
        "and that is then shown (end-to-end hit rate), by task, on the test split; nothing of it "
        "is the teacher's opinion. What was never shown has no label. Bands are 95% intervals.",
        data,
        _absence(study, "requests", data),
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
    settings = study.tested.drop_duplicates("setting")
    known = of_split(study.references, "test").drop_duplicates("setting")
    known = known[known["setting"].isin([study.incumbent, study.baseline])]
    data = _curves_of(pd.concat([settings, known.assign(mode=REFERENCE)]), estimates, measure)
    if (data["mode"] == REFERENCE).all():
        data = data[:0]
    caption += " Grey are the early ranker that filled the log, and a list if none needs fewer."
    return Figure(measure, title, caption, data, _absence(study, "requests", data))


def _curves_of(
    settings: pd.DataFrame, estimates: Estimates, measure: str, more: Sequence[str] = ()
) -> pd.DataFrame:
    """The curves of settings, a row each: columns as in `value_captured`, and `more` of the row."""
    named = ["mode", "serve", "setting", *more]
    columns = [*named, "line", "k", "mean", "low", "high", "passed_for_99"]
    curves = [
        estimates.curve(first["setting"], measure).assign(
            **{name: first[name] for name in named},
            line=first["way"],
            passed_for_99=estimates.of(first["setting"], "passed_for_99").mean,
        )
        for first in settings.to_dict("records")
    ]
    data = pd.concat(curves)[columns] if curves else pd.DataFrame(columns=columns)
    return data.dropna(subset=["mean"]).reset_index(drop=True)


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
