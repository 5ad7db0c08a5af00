"""The data of the figures: one tidy table per figure, which `charts` draws.

Every table has the columns `mode` (which gives the color), `line` (the name in the legend) and,
except the waterfall, `plain` (False for variants of mode `none`, which have other colors).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_ranker.evaluation.metrics import TARGET
from kd_ranker.evaluation.results import setting_columns
from kd_ranker.evaluation.saving import by_repeat, of_split
from kd_ranker.report.choices import best_of_sizes, best_with_scores, knows_truth, users_at_target
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.report.study import Study

# Shares of the value to keep, denser where the number of candidates to pass grows fast.
_TARGETS = (*np.arange(0.95, 0.989, 0.005), *np.arange(0.99, 0.9995, 0.001))
# Costs of a student per candidate, over the teacher's.
_COSTS = (0.001, *np.arange(0.01, 0.101, 0.01))
# The mode of rankers without a model.
REFERENCE = "reference"
# The columns of a curve or of bars: a mean and the ends of its interval.
_ENDS = ("mean", "low", "high")


class Figure(NamedTuple):
    """A figure before it is drawn.

    Attributes:
      name: of its files.
      title: its content.
      caption: how to read it.
      data: its table; empty if it is left out.
      absent: why the figure, or a part of it, is left out; "" if it is complete.
    """

    name: str
    title: str
    caption: str
    data: pd.DataFrame
    absent: str


def figures(study: Study, estimates: Estimates) -> list[Figure]:
    """Return the figures of a study in their order."""
    makers: list[Callable[[Study, Estimates], Figure]] = [
        waterfall, frontier, plane, value_captured, users_value, saving, survival, pareto,
        calibration, training,
    ]  # fmt: skip
    return [make(study, estimates) for make in makers]


def waterfall(study: Study, estimates: Estimates) -> Figure:
    """Candidates to pass: today, without the final ranker's scores, and with them.

    Columns: mode, line (the step), setting, and `mean`, `low` and `high` of `passed_for_99`.
    """
    steps = {
        "today's early ranker": (REFERENCE, study.incumbent),
        "mode none": ("none", study.plain),
        "best without scores": (REFERENCE, study.baseline),
        "best with scores": ("aux", best_with_scores(study)),
    }
    data = _table(
        ["mode", "line", "setting", *_ENDS],
        (
            {"mode": mode, "line": step, "setting": setting}
            | estimates.of(setting, "passed_for_99")._asdict()
            for step, (mode, setting) in steps.items()
            if setting is not None
        ),
    )
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
    """Saving against change for users, both against the best ranker without scores.

    Columns: `_LINE`, margin, and `saving` and `users`, each with `_low` and
    `_high`. `users` is the relative change of the first of `users_at_target`.
    """
    compared = study.tested[study.tested["setting"] != study.baseline]
    data = _table(
        [*_LINE, *_ends("saving"), *_ends("users")],
        (
            line
            | _ends("saving", estimates.of(line["setting"], "funnel_cost_saving"))
            | _ends("users", estimates.relative_gap(line["setting"], str(study.baseline), measure))
            for measure in users_at_target(study)[:1]
            for line in _lines(compared)
        ),
    )
    return Figure(
        "plane",
        "Saving against the change for users",
        f"Each way against {study.baseline}, the best ranker without the final ranker's scores, on "
        "the test split, with as many passed as each needs for 99% of the final value: the share "
        f"of the funnel's cost, {study.costs.unit}, that is saved, and the relative change of the "
        f"value for users. The dashed line is the margin of {100 * study.margin:g}%. Bars are 95% "
        "intervals.",
        data.assign(margin=-study.margin),
        "" if len(data) else "the change for users is not known",
    )


def frontier(study: Study, estimates: Estimates) -> Figure:
    """Final quality against the funnel's cost, of the best students with and without scores.

    Curves over k, per size of the student. Columns: as in `value_captured`, size, cost (of a
    request, over that of only the final ranker on all candidates), and `cost_for_99`, which is
    constant along a line.
    """
    settings = best_of_sizes(study)
    references = of_split(study.references, "test").assign(mode=REFERENCE, size="")
    data = _curves(pd.concat([settings, references]), estimates, "value_captured", ("size",))
    costs = [
        of.assign(
            cost=estimates.cost_curve(str(setting)),
            cost_for_99=estimates.cost_share(str(setting), TARGET).mean,
        )
        for setting, of in data.groupby("setting", sort=False)
    ]
    priced = pd.concat(costs) if costs else data.assign(cost=np.nan, cost_for_99=np.nan)
    priced = priced.dropna(subset=["cost"]).reset_index(drop=True)
    no_cost = "what the teacher costs is not known" if len(data) > len(priced) else ""
    sizes = " of each size" if settings["size"].nunique() > 1 else ""
    return Figure(
        "frontier",
        "Cost of the funnel against final quality",
        f"The best student without the final ranker's scores and the best with them{sizes}, as "
        f"more candidates are passed, on the test split: the cost of a request, {study.costs.unit},"
        " as a share of its cost if the final ranker ranks all candidates, and the share of the "
        "final value that is kept. Further left at the same height is cheaper at the same quality. "
        "The dashed line is 99%; marks show its cost. Gray are rankers without a model, which "
        "count as free. Bands are 95% intervals.",
        priced,
        no_cost or _absence(study, "requests", data),
    )


def saving(study: Study, estimates: Estimates) -> Figure:
    """Saving by target and by the student's cost, for the chosen setting of each way.

    Columns: `_LINE`, over (`target` or `student's cost`), at (in percent), and
    `mean`, `low` and `high` of the share that is saved.
    """
    compared = study.tested[study.tested["setting"] != study.baseline]
    lines = _lines(compared) if study.baseline else []
    places: list[tuple[str, float, float, float | None]] = [
        *(("target", float(target), float(target), None) for target in _TARGETS),
        *(("student's cost", float(cost), TARGET, float(cost)) for cost in _COSTS),
    ]
    data = _table(
        [*_LINE, "over", "at", *_ENDS],
        (
            line
            | {"over": over, "at": 100 * at}
            | estimates.saving(line["setting"], target, cost)._asdict()
            for line in lines
            for over, at, target, cost in places
        ),
    )
    return Figure(
        "saving",
        "Saving by target and by the student's cost",
        f"The share of the funnel's cost, {study.costs.unit}, that is saved against "
        f"{study.baseline}, on the test split: by the share of the final value to keep, at the "
        f"student's own cost; and for {100 * TARGET:g}%, by the cost of either student per "
        "candidate, over the teacher's. Bands are 95% intervals.",
        data,
        _absence(study, "requests", data) if lines else "there is nothing to compare",
    )


def pareto(study: Study, estimates: Estimates) -> Figure:
    """User BCE against teacher BCE on validation, means over tasks: one curve per way.

    The points of a way are its chosen setting and those that differ from it only in the weight.
    Columns: `_LINE`, weight (NaN in mode none), and `user_bce` and
    `teacher_bce`, means over repeats, each with `_low` and `_high`.
    """
    rows = of_split(study.rows, "validation")
    alike = [column for column in setting_columns(rows) if column != "distill_weight"]
    chosen = rows.loc[rows["setting"].isin(list(study.chosen.values())), alike].drop_duplicates()
    points = rows.drop_duplicates("setting").merge(chosen, on=alike)
    points["weight"] = points["distill_weight"].where(points["distill_loss"].notna())
    tables = {measure: by_repeat(rows, measure) for measure in ("user_bce", "teacher_bce")}
    data = _table(
        [*_LINE, "weight", *(column for measure in tables for column in _ends(measure))],
        (
            point
            | _ends("user_bce", interval(tables["user_bce"][point["setting"]].to_numpy()))
            | _ends("teacher_bce", interval(tables["teacher_bce"][point["setting"]].to_numpy()))
            for point in _lines(points, "weight")
        ),
    )
    return Figure(
        "pareto",
        "Predicting users against following the teacher",
        "Binary cross entropy against user labels and against the teacher's probabilities, means "
        "over tasks, on validation; lower is better for both. One curve per way as the distill "
        "weight grows, all else as it was chosen; bars are 95% intervals over repeats.",
        data,
        "" if len(data) else "no student has both numbers",
    )


def value_captured(study: Study, estimates: Estimates) -> Figure:
    """Value captured against k, for the chosen setting of each way.

    Columns: `_LINE`, k, `mean`, `low`, `high`, and `passed_for_99` (mean over
    repeats, constant along a line).
    """
    return _over_k(
        study,
        estimates,
        "value_captured",
        "Value captured by candidates passed",
        "The share of the final value that is kept when k candidates are passed, on the test "
        "split; of each way the setting that did best on validation. The dashed line is 99%; "
        "marks show what each needs for it, the mean over repeats. Bands are 95% intervals.",
    )


def users_value(study: Study, estimates: Estimates) -> Figure:
    """True value captured against k, or hit rates where the truth is not known.

    Columns as in `value_captured`; hit rates also have `measure` and `task`.
    """
    if not knows_truth(study):
        return _hit_rates(study, estimates)
    return _over_k(
        study,
        estimates,
        "true_value_captured",
        "True value captured by candidates passed",
        "The same items, valued by the true probabilities: the share of the value if all retrieved "
        "candidates reach the final ranker. It can exceed 1 if an early ranker drops candidates "
        "that the final ranker overrates. Bands are 95% intervals.",
    )


def _hit_rates(study: Study, estimates: Estimates) -> Figure:
    curves = [
        _curves(study.tested, estimates, f"{measure}/{task}").assign(measure=measure, task=task)
        for measure in ("hit_rate", "end_to_end_hit_rate")
        for task in study.tasks
    ]
    data = pd.concat(curves, ignore_index=True)
    return Figure(
        "hit_rates",
        "What users did, by candidates passed",
        "The share of the candidates with a positive label that is among the k passed (hit rate), "
        "and that is then shown (end-to-end hit rate), by task, on the test split; none of it "
        "depends on the teacher's opinion. Items that were never shown have no label. Bands are "
        "95% intervals.",
        data,
        _absence(study, "requests", data),
    )


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


def calibration(study: Study, estimates: Estimates) -> Figure:
    """Observed against predicted by bin, for the chosen setting of each way, one panel per task.

    Columns: mode, plain, serve, line, task, bin, weight, predicted, observed. Bins of
    the repeats are joined: means by weight.
    """
    columns = ["mode", "plain", "serve", "line", "task", "bin", "weight", "predicted", "observed"]
    data = pd.DataFrame(columns=columns)
    if len(study.calibration):
        bins = _members(study).merge(study.calibration, on=["source", "member", "serve"])
        means = ["predicted", "observed"]
        bins[means] = bins[means].mul(bins["weight"], axis=0)
        sums = bins.groupby(columns[:6], sort=False)[columns[6:]].sum()
        data = sums.assign(**{name: sums[name] / sums["weight"] for name in means}).reset_index()
        # Tasks in the order of the config.
        data["task"] = pd.Categorical(data["task"], study.tasks)
        data = data.sort_values(["task", "bin"], kind="stable").astype({"task": str})
    return Figure(
        "calibration",
        "Calibration",
        "Observed share of a label against its predicted probability, by bin of the prediction, on "
        "shown candidates of the test split, repeats joined. On the diagonal, labels are as "
        "frequent as predicted.",
        data,
        _absence(study, "calibration", data),
    )


def training(study: Study, estimates: Estimates) -> Figure:
    """User loss and distillation loss by step, for the chosen setting of each way.

    Columns: mode, plain, line, repeat ("mean" for the mean over repeats), kind, step, loss.
    """
    columns = ["mode", "plain", "line", "repeat", "kind", "step", "loss"]
    data = pd.DataFrame(columns=columns)
    if len(study.losses):
        each = _members(study).merge(study.losses, on=["source", "member"])
        # A mode without a teacher logs a distillation loss of 0.
        each = each[each["distill_loss"].notna() | (each["kind"] != "distill_loss")]
        count = each.groupby("line")["repeat"].transform("nunique")
        grouped = each.assign(of=count).groupby(
            ["mode", "plain", "line", "kind", "step"], sort=False
        )
        mean = grouped.agg(loss=("loss", "mean"), n=("loss", "size"), of=("of", "first"))
        # Only steps that all repeats have logged.
        mean = mean[mean["n"] == mean["of"]].reset_index().assign(repeat="mean")
        data = pd.concat([each[columns], mean[columns]], ignore_index=True)
    return Figure(
        "training",
        "Losses during training",
        "User loss and distillation loss of a training batch, the chosen setting of each way: the "
        "mean over repeats, and each repeat as a thin line.",
        data,
        _absence(study, "losses", data),
    )


_LINE = ("mode", "plain", "serve", "line", "setting")


def _lines(rows: pd.DataFrame, *more: str) -> list[dict[str, Any]]:
    """Return `_LINE` and more columns of each setting; the line is named by the way."""
    settings = rows.drop_duplicates("setting").rename(columns={"way": "line"})
    return settings[[*_LINE, *more]].to_dict("records")  # type: ignore[return-value]


def _members(study: Study) -> pd.DataFrame:
    """Return the members of the chosen settings, one row each."""
    kept = ["source", "member", "mode", "plain", "serve", "way", "repeat", "distill_loss"]
    return study.tested[kept].rename(columns={"way": "line"})


def _ends(name: str, mean: Interval | None = None) -> dict[str, float]:
    """Return a mean and the ends of its interval by column."""
    ends = mean[:3] if mean else (np.nan,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _table(columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return the lines in which every mean is known."""
    table = pd.DataFrame(list(lines), columns=list(columns))
    means = [name for name in columns if name == "mean" or f"{name}_low" in columns]
    return table.dropna(subset=means).reset_index(drop=True)


def _over_k(study: Study, estimates: Estimates, measure: str, title: str, caption: str) -> Figure:
    known = of_split(study.references, "test").assign(mode=REFERENCE)
    known = known[known["setting"].isin([study.incumbent, study.baseline])]
    data = _curves(pd.concat([study.tested, known]), estimates, measure)
    caption += " Gray are the early ranker that filled the log, and a list if none needs fewer."
    return Figure(measure, title, caption, data, _absence(study, "requests", data))


def _curves(
    rows: pd.DataFrame, estimates: Estimates, measure: str, more: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the curves of settings, as in `value_captured`; none if they are all references."""
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


def _absence(study: Study, kind: str, data: pd.DataFrame) -> str:
    missing = "; ".join(study.missing[kind])
    if data.empty and not missing:
        return "its files contain none of the members at their best settings"
    return missing
