"""Estimates of measures on the test split, with intervals over its requests and over repeats.

A measure of a setting is the mean over its repeats. Its interval comes from `bootstrap`, for which
each measure is taken anew of many draws of the test requests. What is not measured on requests (a
count of FLOPs), and studies without the requests' own numbers, have intervals over repeats alone.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from kd_ranker.evaluation import metrics
from kd_ranker.evaluation.cost import funnel_cost, funnel_cost_saving, whole_cost
from kd_ranker.evaluation.kept import Kept
from kd_ranker.evaluation.metrics import METRICS, ReportAt, Sums, curve_columns, result_columns
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.totals import Each
from kd_ranker.report.bootstrap import (
    Measured,
    combined,
    crossed_interval,
    passed_for,
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
      curves: by column of `curves.csv`, at the kept k: on the test requests, and below in each draw
        of them.
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
        self._read = pd.concat([study.tested, study.references])
        self._rows = {
            str(setting): rows.set_index("repeat")
            for setting, rows in self._read.groupby("setting", sort=False)
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
          target: the share of the final value to keep; of one that is none of `targets` nothing is
            known without the requests.
          student_cost: cost of a candidate for the student, over the teacher's; None takes what
            the models cost.
        """
        return _interval(self._saving(setting, target, student_cost))

    def cost_share(self, setting: str, target: float) -> Interval:
        """The cost of a request at a target, over that of the teacher alone on all retrieved.

        Args:
          setting: one of `study.chosen`, or a reference, which costs nothing.
          target: as in `saving`.
        """
        passed = self._passed(setting, target)
        return _interval(_combined(lambda k: self.share_of_whole(setting, k), passed))

    def at_target(self, setting: str, target: float, curve: str) -> Interval:
        """The value of a curve where as many are passed as a target takes.

        Args:
          setting: one of `study.chosen`.
          target: as in `saving`.
          curve: a column of `curves.csv`; nothing is known of it without the requests.
        """
        return _interval(self._at_target(setting, target, curve))

    def gap_at_target(self, setting: str, other: str, target: float, curve: str) -> Interval:
        """The paired difference `setting` − `other` of what `at_target` has of each."""
        pair = (self._at_target(name, target, curve) for name in (setting, other))
        return _interval(_combined(np.subtract, *pair))

    def _at_target(self, setting: str, target: float, curve: str) -> Measured:
        passed = self._passed(setting, target)
        known = self._drawn_of(setting, passed.repeats)
        if not known or not len(passed.drawn):
            return _NOWHERE
        needed = np.concatenate([passed.each[None], passed.drawn])
        each = [
            [np.interp(k, of.ks, values) for k, values in zip(ks, of.curves[curve], strict=True)]
            for of, ks in zip(known, needed.T, strict=True)
        ]
        numbers = np.array(each).T
        return passed._replace(each=numbers[0], drawn=numbers[1:])

    def share_of_whole(self, setting: str, passed: Any) -> Any:
        """The same when so many are passed, a number or an array; NaN without a teacher's cost."""
        study = self.study
        return self._cost(setting, passed) / whole_cost(
            study.retrieved, self._teacher_flops, study.costs
        )

    def curve(self, setting: str, name: str) -> pd.DataFrame:
        """A curve over k with its interval: the columns k, mean, low, high.

        Args:
          setting: one of `study.chosen`, or a reference.
          name: a column of `curves.csv`.

        Returns:
          No line where the requests of a repeat were not kept.
        """
        repeats = tuple(self._rows[setting].index)
        known = [of for of in self._drawn_of(setting, repeats) if name in of.curves]
        lines = []
        for place, k in enumerate(known[0].ks if known else ()):
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
        known = self._drawn_of(setting, values.index)
        if not known or any(measure not in of.measures for of in known):
            return _of_repeats(tuple(values.index), values.to_numpy())
        numbers = np.stack([of.measures[measure] for of in known], axis=1)
        return Measured(tuple(values.index), values.to_numpy(), numbers, known[0].requests)

    def _saving(self, setting: str, target: float, student_cost: float | None) -> Measured:
        if self.baseline is None:
            return _NOWHERE
        pair = (setting, self.baseline)
        return _combined(
            lambda *passed: funnel_cost_saving(
                *(self._cost(name, k, student_cost) for name, k in zip(pair, passed, strict=True))
            ),
            *(self._passed(name, target) for name in pair),
        )

    def _passed(self, setting: str, target: float) -> Measured:
        """The candidates to pass for a target: as measured, else between the kept k."""
        (column,) = result_columns(METRICS["passed_for"], (), ReportAt((), (target,)))
        if column in self.study.rows:
            return self._measured(setting, column)
        repeats = tuple(self._rows[setting].index)
        known = self._drawn_of(setting, repeats)
        if not known:
            return _NOWHERE
        needed = [passed_for(of.curves["value_captured"], of.ks, target) for of in known]
        numbers = np.stack(needed, axis=1)
        return Measured(repeats, numbers[0], numbers[1:], known[0].requests)

    def _cost(self, setting: str, passed: Any, student_cost: float | None = None) -> Any:
        """The cost of a request when so many are passed."""
        costs, of_teacher = self.study.costs, self._teacher_flops
        row = self._rows[setting].iloc[0]
        flops = float(row["flops_per_candidate"])
        if row["role"] == "reference":
            flops, costs = 0.0, costs._replace(student=0.0, student_request=0.0)
        elif student_cost is not None:
            flops, costs = student_cost * of_teacher, costs._replace(student=0.0)
        return funnel_cost(self.study.retrieved, passed, flops, of_teacher, costs)

    @property
    def _teacher_flops(self) -> float:
        """FLOPs a candidate; NaN where no teacher was read."""
        return float(self.study.teachers["flops_per_candidate"].mean())

    def _drawn_of(self, setting: str, repeats: Iterable[Any]) -> list[_Drawn]:
        """The draws of these repeats; none if those of one are missing."""
        drawn = [self._drawn.get((setting, repeat)) for repeat in repeats]
        known = [of for of in drawn if of is not None]
        return known if len(known) == len(drawn) else []

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, str], _Drawn]:
        """By setting and repeat, without those of which no requests were kept."""
        study, points = self.study, _points(self.study)
        found = {}
        for source, kept in study.kept:
            rows = self._read[self._read["source"] == source]
            teacher = kept.each[TEACHER, "user"]
            counts = request_counts(len(teacher.alone["funnel_requests"]), DRAWS)
            of_teacher = _resampled(kept, teacher, counts, study.retrieved)
            for row in rows.to_dict("records"):
                each = kept.each.get((row["member"], row["serve"]))
                if each is not None:
                    sums = _resampled(kept, each, counts, study.retrieved)
                    found[row["setting"], row["repeat"]] = _Drawn(
                        _numbers(sums, of_teacher, study, points),
                        _curves(each, sums, kept.ks, study.tasks),
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
    each: Each, sums: Sums, ks: Int[np.ndarray, "K"], tasks: Sequence[str]
) -> dict[str, Float[np.ndarray, "1+B K"]]:
    """The curves at the kept k: of the test requests, then of each draw of them."""

    def with_draws(of: Any, drawn: Any) -> Float[np.ndarray, "*shape 1+B"]:
        whole = np.asarray(of, np.float64).sum(axis=0)
        return np.concatenate([whole[..., None], drawn], axis=-1)

    joined: Sums = {name: with_draws(of, sums[name]) for name, of in each.alone.items()}
    joined |= {name: with_draws(of, sums[name][ks - 1]) for name, of in each.curves.items()}
    found: dict[str, np.ndarray] = {}
    for metric in METRICS.values():
        columns = curve_columns(metric, tasks)
        if not columns or metric.ends is None:
            continue
        # A metric that was put into the table since has no sums here.
        with contextlib.suppress(KeyError):
            ended = np.asarray(metric.ends(joined, joined))
            by_column = ended.reshape(len(ks), len(columns), -1)
            found |= zip(columns, by_column.transpose(1, 2, 0), strict=True)
    return found
