"""Estimates of measures on the test split, with intervals over its requests and over repeats.

A measure of a setting is the mean over its repeats. Its interval comes from `bootstrap`, for which
each measure is taken anew of many draws of the test requests. What is not measured on requests (a
count of FLOPs), and studies without the requests' own numbers, have intervals over repeats alone.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from kd_ranker.evaluation import metrics
from kd_ranker.evaluation.cost import funnel_cost, funnel_cost_saving
from kd_ranker.evaluation.kept import Kept, Who
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


class Estimates:
    """The estimates of a study; what was drawn for one is kept for the others."""

    def __init__(self, study: Study):
        """Takes the study, which is not changed."""
        self.study = study
        self._points = _points(study)

    @property
    def targets(self) -> Sequence[float]:
        """The shares of the final value for which it was measured how many have to be passed."""
        return self._points.targets

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
        return _interval(combined(np.subtract, *pair), confidence)

    def relative_gap(self, setting: str, other: str, measure: str) -> Interval:
        """`setting` / `other` − 1, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return _interval(combined(lambda a, b: a / b - 1, *pair))

    def saving(self, setting: str, target: float, student_cost: float | None = None) -> Interval:
        """The share of the baseline's compute that a setting saves at a target.

        Args:
          setting: one of `study.chosen`.
          target: the share of the final value to keep, one of those that were measured.
          student_cost: cost of a candidate for the student, over the teacher's; None takes what
            the models cost.
        """
        return _interval(self._saving(setting, target, student_cost))

    def curve(self, setting: str, name: str) -> pd.DataFrame:
        """A curve over k with its interval: the columns k, mean, low, high."""
        shares = [
            self._curves(row.source, (row.member, row.serve))[name]
            for row in self._rows(setting).itertuples()
        ]
        by_k = np.moveaxis(np.stack(shares), 2, 0)
        repeats = tuple(self._rows(setting)["repeat"])
        points = [
            _interval(Measured(repeats, at[:, 0], at[:, 1:].T, self._requests))._asdict()
            for at in by_k
        ]
        return pd.DataFrame(points).assign(k=self._ks)

    @functools.cache  # noqa: B019 - it lives as long as a report is written
    def _rows(self, setting: str) -> pd.DataFrame:
        """The rows of a setting on the test split, one a repeat."""
        return self.study.tested[self.study.tested["setting"] == setting]

    @functools.cache  # noqa: B019
    def _measured(self, setting: str, measure: str) -> Measured:
        if measure == _SAVING:
            return self._saving(setting, metrics.TARGET, None)
        rows = self._rows(setting)
        values = rows.set_index("repeat").get(measure, pd.Series(dtype=float)).dropna()
        drawn = [self._drawn(setting, str(repeat)).get(measure) for repeat in values.index]
        whole = [of for of in drawn if of is not None]
        repeats, each = tuple(values.index), values.to_numpy(float)
        if not whole or len(whole) < len(drawn):
            return Measured(repeats, each, np.zeros((0, len(each))), 0)
        return Measured(repeats, each, np.stack(whole, axis=1), self._requests)

    def _saving(self, setting: str, target: float, student_cost: float | None) -> Measured:
        baseline = self.study.baseline
        assert baseline is not None, "a saving needs a baseline"
        (column,) = result_columns(METRICS["passed_for"], (), ReportAt((), (target,)))
        of_teacher = float(self.study.teachers["flops_per_candidate"].iloc[0])

        def cost(name: str, passed: Any) -> Any:
            student = (
                self._rows(name)["flops_per_candidate"].iloc[0]
                if student_cost is None
                else student_cost * of_teacher
            )
            return funnel_cost(self.study.retrieved, passed, student, of_teacher)

        def saved(passed: Any, before: Any) -> Any:
            return funnel_cost_saving(cost(setting, passed), cost(baseline, before))

        return combined(saved, *(self._measured(name, column) for name in (setting, baseline)))

    @property
    def _requests(self) -> int:
        """The number of test requests, which all sweeps of a study share."""
        return int(self._counts(next(iter(self.study.kept))).shape[1])

    @functools.cached_property
    def _ks(self) -> list[int]:
        kept = next(iter(self.study.kept.values()), None)
        return [] if kept is None else kept.ks.tolist()

    @functools.cache  # noqa: B019
    def _drawn(self, setting: str, repeat: str) -> dict[str, Float[np.ndarray, "B"]]:
        """The measures of a setting in a repeat, on each draw of the requests."""
        rows = self._rows(setting)
        row = rows[rows["repeat"] == repeat].iloc[0]
        kept = self.study.kept.get(row["source"])
        who = (str(row["member"]), str(row["serve"]))
        if kept is None or who not in kept.each:
            return {}
        sums = self._sums(row["source"], who)
        of_teacher = self._sums(row["source"], (TEACHER, "user"))
        return _numbers(sums, of_teacher, self.study.tasks, self._points)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _sums(self, source: int, who: Who) -> Sums:
        """The sums of a ranker in each draw, [..., B], curves at every k."""
        kept = self.study.kept[source]
        return _resampled(kept, kept.each[who], self._counts(source), self.study.retrieved)

    @functools.cache  # noqa: B019
    def _counts(self, source: int) -> np.ndarray:
        each = next(iter(self.study.kept[source].each.values()))
        return request_counts(len(next(iter(each.alone.values()))), DRAWS)

    @functools.cache  # noqa: B019
    def _curves(self, source: int, who: Who) -> dict[str, Float[np.ndarray, "draws K"]]:
        """Captured shares at the kept k: of the test requests, then of each draw of them."""
        kept = self.study.kept[source]
        counts = self._counts(source)
        whole = np.concatenate([np.ones_like(counts[:1]), counts])
        of_curves = kept.each[who].curves
        shares = {}
        for name in ("value_captured", "true_value_captured"):
            sums = resampled_sums(np.asarray(of_curves[name])[None], whole)[:, 0]
            shares[name] = metrics.ratio(sums, sums[:, -1:])
        survived = resampled_sums(np.asarray(of_curves["survival"])[None], whole)[:, 0]
        requests = np.asarray(kept.each[who].alone["funnel_requests"])
        counting = resampled_sums(requests[None], whole)
        shares["survival"] = metrics.ratio(survived, counting)
        return shares


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


def _resampled(kept: Kept, each: Each, counts: np.ndarray, retrieved: int) -> Sums:
    between = _between(kept.ks, retrieved)

    def drawn(of: Any) -> Any:
        return np.moveaxis(resampled_sums(of[None], counts)[:, 0], 0, -1)

    alone: Sums = {name: drawn(of) for name, of in each.alone.items()}
    return alone | {
        name: np.tensordot(between, drawn(of), axes=1) for name, of in each.curves.items()
    }


def _between(ks: np.ndarray, retrieved: int) -> Float[np.ndarray, "N K"]:
    """The weights that make of a curve at `ks` one at every k: a straight line between two."""
    every = np.arange(1, retrieved + 1)
    return np.stack([np.interp(every, ks, of) for of in np.eye(len(ks))], axis=1)


def _numbers(
    sums: Sums, of_teacher: Sums, tasks: Sequence[str], points: ReportAt
) -> dict[str, Float[np.ndarray, "B"]]:
    """The measures of a ranker by column, with the means over tasks of those that have one."""
    found: dict[str, np.ndarray] = {}
    for metric in METRICS.values():
        if metric.ends is None:
            continue
        columns = result_columns(metric, tasks, points)
        numbers = metrics.numbers(metric, metric.ends(sums, of_teacher), points)
        found |= zip(columns, numbers, strict=True)
        if metric.averaged:
            found[metric.name] = numbers.mean(axis=0)
    return found
