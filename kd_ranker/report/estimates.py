"""Estimates of measures on the test split, with intervals over its requests and over repeats.

A measure of a setting is the mean over its repeats. Its interval comes from `bootstrap`, for which
each measure is taken anew of many draws of the test requests. What is not measured on requests (a
count of FLOPs), and studies without the requests' own numbers, have intervals over repeats alone.
"""

import functools
import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from kd_ranker.evaluation import metrics
from kd_ranker.evaluation.cost import funnel_cost, funnel_cost_saving
from kd_ranker.evaluation.kept import Kept
from kd_ranker.evaluation.metrics import METRICS, ReportAt, Sums, result_columns
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.totals import Each
from kd_ranker.report.bootstrap import (
    Measured,
    combined,
    crossed_interval,
    request_counts,
    resampled_sums,
)
from kd_ranker.report.intervals import CONFIDENCE, Interval, interval
from kd_ranker.report.study import Study

DRAWS = 500
_SAVING = "funnel_cost_saving"
_NOWHERE = Measured((), np.zeros(0), np.zeros((0, 0)), 0)


class _Drawn(NamedTuple):
    """The numbers of one ranker.

    Attributes:
      measures: by column, in each draw of the requests.
      curves: by name, at the kept k: on the test requests, and below in each draw of them.
      ks: these k.
      requests: the number of requests.
    """

    measures: dict[str, Float[np.ndarray, "B"]]
    curves: dict[str, Float[np.ndarray, "1+B K"]]
    ks: Int[np.ndarray, "K"]
    requests: int


class Estimates:
    """The estimates of a study; what was drawn for one is kept for the others."""

    def __init__(self, study: Study):
        """Takes the study, which is not changed."""
        self.study = study
        self.baseline = study.baseline
        self.targets = _points(study).targets
        self._rows = {
            str(setting): rows.set_index("repeat")
            for setting, rows in study.tested.groupby("setting", sort=False)
        }

    def of(self, setting: str, measure: str, confidence: float = CONFIDENCE) -> Interval:
        """The mean of a measure over the repeats of a chosen setting.

        Args:
          setting: one of `study.chosen`.
          measure: a column of `results.csv`, or the mean over tasks of one.
          confidence: of the interval.
        """
        return _interval(self._measured(setting, measure), confidence)

    def gap(
        self, setting: str, other: str, measure: str, confidence: float = CONFIDENCE
    ) -> Interval:
        """The paired difference `setting` − `other`, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return _interval(_combined(np.subtract, *pair), confidence)

    def relative_gap(self, setting: str, other: str, measure: str) -> Interval:
        """`setting` / `other` − 1, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return _interval(_combined(lambda a, b: a / b - 1, *pair))

    def saving(self, setting: str, target: float, student_cost: float | None = None) -> Interval:
        """The share of the baseline's compute that a setting saves at a target.

        Args:
          setting: one of `study.chosen`.
          target: the share of the final value to keep, one of `targets`.
          student_cost: cost of a candidate for the student, over the teacher's; None takes what
            the models cost.
        """
        return _interval(self._saving(setting, target, student_cost))

    def curve(self, setting: str, name: str) -> pd.DataFrame:
        """A curve over k with its interval: the columns k, mean, low, high.

        Args:
          setting: one of `study.chosen`.
          name: `value_captured`, `true_value_captured` or `survival`.

        Returns:
          No line where the requests of a repeat were not kept.
        """
        repeats = tuple(self._rows[setting].index)
        drawn = [self._drawn.get((setting, repeat)) for repeat in repeats]
        known = [of for of in drawn if of is not None]
        lines = []
        for place, k in enumerate(known[0].ks if len(known) == len(drawn) else ()):
            at = np.stack([of.curves[name][:, place] for of in known], axis=1)
            mean = _interval(Measured(repeats, at[0], at[1:], known[0].requests))
            lines.append({"k": int(k), "mean": mean.mean, "low": mean.low, "high": mean.high})
        return pd.DataFrame(lines, columns=["k", "mean", "low", "high"])

    def _measured(self, setting: str, measure: str) -> Measured:
        if measure == _SAVING:
            return self._saving(setting, metrics.TARGET, None)
        rows = self._rows[setting]
        if measure not in rows:
            return _NOWHERE
        values = rows[measure].dropna().astype(float)
        drawn = [self._drawn.get((setting, repeat)) for repeat in values.index]
        known = [of for of in drawn if of is not None and measure in of.measures]
        if not known or len(known) < len(drawn):
            return _of_repeats(tuple(values.index), values.to_numpy())
        numbers = np.stack([of.measures[measure] for of in known], axis=1)
        return Measured(tuple(values.index), values.to_numpy(), numbers, known[0].requests)

    def _saving(self, setting: str, target: float, student_cost: float | None) -> Measured:
        if self.baseline is None:
            return _NOWHERE
        (column,) = result_columns(METRICS["passed_for"], (), ReportAt((), (target,)))
        of_teacher = float(self.study.teachers["flops_per_candidate"].mean())

        def cost(name: str, passed: Any) -> Any:
            flops = float(self._rows[name]["flops_per_candidate"].iloc[0])
            student = flops if student_cost is None else student_cost * of_teacher
            return funnel_cost(self.study.retrieved, passed, student, of_teacher)

        pair = (setting, self.baseline)
        return _combined(
            lambda *passed: funnel_cost_saving(*map(cost, pair, passed)),
            *(self._measured(name, column) for name in pair),
        )

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, str], _Drawn]:
        """By setting and repeat, without those of which no requests were kept."""
        study, points = self.study, _points(self.study)
        found = {}
        for source, kept in study.kept:
            rows = study.tested[study.tested["source"] == source]
            teacher = kept.each[TEACHER, "user"]
            counts = request_counts(len(teacher.alone["funnel_requests"]), DRAWS)
            of_teacher = _resampled(kept, teacher, counts, study.retrieved)
            for row in rows.to_dict("records"):
                each = kept.each.get((row["member"], row["serve"]))
                if each is not None:
                    sums = _resampled(kept, each, counts, study.retrieved)
                    found[row["setting"], row["repeat"]] = _Drawn(
                        _numbers(sums, of_teacher, study, points),
                        _curves(each, sums, kept.ks),
                        kept.ks,
                        counts.shape[1],
                    )
        return found


def _points(study: Study) -> ReportAt:
    """The points of the curves that stand in the study's columns."""
    columns = [str(column) for column in study.rows]
    ks = {int(found[1]) for column in columns if (found := re.search(r"@(\d+)", column))}
    named = (re.fullmatch(r"passed_for_([\d.]+)", column) for column in columns)
    targets = tuple(round(float(found[1]) / 100, 10) for found in named if found)
    return ReportAt(tuple(sorted(ks)), targets)


def _interval(measured: Measured, confidence: float = CONFIDENCE) -> Interval:
    if not len(measured.drawn):
        return interval(measured.each, confidence)
    return crossed_interval(measured, confidence)


def _combined(function: Any, *settings: Measured) -> Measured:
    """As `combined`; without draws of one there are none of what is made of it."""
    if not all(len(setting.drawn) for setting in settings):
        settings = tuple(_of_repeats(setting.repeats, setting.each) for setting in settings)
    return combined(function, *settings)


def _of_repeats(repeats: tuple[Any, ...], each: Float[np.ndarray, "R"]) -> Measured:
    """A measure of which no draws are known."""
    return Measured(repeats, each, np.zeros((0, len(each))), 0)


def _resampled(kept: Kept, each: Each, counts: Int[np.ndarray, "B N"], retrieved: int) -> Sums:
    """The sums of a ranker in each draw, [..., B], curves at every k."""
    between = _between(kept.ks, retrieved)

    def drawn(of: Any) -> Any:
        return np.moveaxis(resampled_sums(np.asarray(of)[None], counts)[:, 0], 0, -1)

    alone: Sums = {name: drawn(of) for name, of in each.alone.items()}
    return alone | {
        name: np.tensordot(between, drawn(of), axes=1) for name, of in each.curves.items()
    }


def _between(ks: Int[np.ndarray, "K"], retrieved: int) -> Float[np.ndarray, "N K"]:
    """The weights that make of a curve at `ks` one at every k: a straight line between two."""
    every = np.arange(1, retrieved + 1)
    return np.stack([np.interp(every, ks, of) for of in np.eye(len(ks))], axis=1)


def _numbers(
    sums: Sums, of_teacher: Sums, study: Study, points: ReportAt
) -> dict[str, Float[np.ndarray, "B"]]:
    """The measures of a ranker by column, with the means over tasks of those that have one."""
    found: dict[str, np.ndarray] = {}
    for metric in METRICS.values():
        columns = result_columns(metric, study.tasks, points)
        # A metric that was put into the table since has no sums here.
        if not columns or metric.ends is None or not set(columns) <= set(study.rows):
            continue
        numbers = metrics.numbers(metric, metric.ends(sums, of_teacher), points)
        found |= zip(columns, numbers, strict=True)
        if metric.averaged:
            found[metric.name] = numbers.mean(axis=0)
    return found


def _curves(
    each: Each, sums: Sums, ks: Int[np.ndarray, "K"]
) -> dict[str, Float[np.ndarray, "1+B K"]]:
    """Shares at the kept k: of the test requests, then of each draw of them."""

    def with_draws(of: Any, drawn: Any) -> Float[np.ndarray, "*shape 1+B"]:
        whole = np.asarray(of, np.float64).sum(axis=0)
        return np.concatenate([whole[..., None], drawn], axis=-1)

    over_k = {
        name: with_draws(each.curves[name], sums[name][ks - 1])
        for name in ("value_captured", "true_value_captured", "survival")
    }
    requests = with_draws(each.alone["funnel_requests"], sums["funnel_requests"])
    whole = {name: of[-1] for name, of in over_k.items()} | {"survival": requests}
    return {name: metrics.ratio(of, whole[name]).T for name, of in over_k.items()}
