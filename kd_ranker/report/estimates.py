"""Estimates of measures on the test split, with intervals over its requests and over repeats.

A measure of a setting is the mean over its repeats. Its interval is a `crossed_interval`, for which
each measure is recomputed on many draws of the test requests. Measures that are not of requests (a
count of FLOPs), and studies without the requests' own numbers, have intervals over repeats only.
"""

import contextlib
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from kd_ranker.evaluation import metrics
from kd_ranker.evaluation.evaluate import Each
from kd_ranker.evaluation.interleaving import RequestsNeeded, number_needed
from kd_ranker.evaluation.metrics import (
    METRICS,
    ReportAt,
    Sums,
    curve_columns,
    ratio,
    result_columns,
)
from kd_ranker.evaluation.results import TEACHER, Kept
from kd_ranker.evaluation.saving import (
    SAVINGS,
    funnel_cost,
    funnel_cost_saving,
    of_split,
    student_cost,
    whole_cost,
)
from kd_ranker.report.intervals import (
    CONFIDENCE,
    Interval,
    Measured,
    combined,
    crossed_interval,
    interval,
    passed_for,
    request_counts,
    resampled_sums,
)
from kd_ranker.report.study import Study

DRAWS = 500
_NOWHERE = Measured((), np.zeros(0), np.zeros((0, 0)), 0)


class _Drawn(NamedTuple):
    """The numbers of one ranker on draws of the requests.

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
    """The estimates of a study, which share their draws of the requests."""

    def __init__(self, study: Study):
        """Take the study, which is not changed."""
        self.study = study
        self.targets = _points(study).targets
        references = of_split(study.references, "test")
        self._read = pd.concat([study.tested, references, study.teachers])
        self._rows = {
            str(setting): rows.set_index("repeat")
            for setting, rows in self._read.groupby("setting", sort=False)
        }

    @property
    def settings(self) -> Collection[str]:
        """The names of settings that other methods take."""
        return self._rows.keys()

    def of(self, setting: str, measure: str, confidence: float = CONFIDENCE) -> Interval:
        """Return the mean of a measure over the repeats of a chosen setting.

        Args:
          setting: one of `study.chosen`, a reference, or "teacher".
          measure: a column of `results.csv`, or the mean over tasks of one.
          confidence: of the interval.
        """
        return _interval(self._measured(setting, measure), confidence)

    def gap(
        self, setting: str, other: str, measure: str, confidence: float = CONFIDENCE
    ) -> Interval:
        """Return the paired difference `setting` − `other`, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return _interval(_combined(np.subtract, *pair), confidence)

    def relative_gap(self, setting: str, other: str, measure: str) -> Interval:
        """Return `setting` / `other` − 1, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return _interval(_combined(lambda a, b: a / b - 1, *pair))

    def saving(
        self,
        setting: str,
        target: float,
        flops_ratio: float | None = None,
        column: str = "funnel_cost_saving",
    ) -> Interval:
        """Return the share of a baseline's cost that a setting saves at a target.

        Args:
          setting: one of `study.chosen`, or a reference.
          target: the share of the final value to keep. One that is not in `targets` needs the
            requests; without them the result is unknown.
          flops_ratio: cost of a candidate for a student, over the teacher's; None takes that of
            the models.
          column: which baseline, one of `saving.SAVINGS`.
        """
        return _interval(self._saving(setting, target, column, flops_ratio))

    def saving_over(self, setting: str, other: str) -> Interval:
        """Return the share of another ranker's cost that a setting saves, each at `TARGET`."""
        pair = (self._cost(name, metrics.TARGET) for name in (setting, other))
        return _interval(_combined(funnel_cost_saving, *pair))

    def cost_share(self, setting: str, target: float) -> Interval:
        """Return the cost of a request at a target, over the teacher's own on all candidates.

        Args:
          setting: one of `study.chosen`, or a reference, which costs nothing.
          target: as in `saving`.
        """
        return _interval(
            _combined(
                lambda cost, candidates: cost / self._whole(candidates),
                self._cost(setting, target),
                self._measured(setting, "candidates"),
            )
        )

    def cost_curve(self, setting: str) -> Float[np.ndarray, "K"]:
        """Return the same if k candidates are passed, at the k of `curve`; NaN if it is unknown.

        Args:
          setting: one of `study.chosen`, or a reference with known requests.
        """
        scored = self.curve(setting, "scored")["mean"].to_numpy()
        candidates = self.of(setting, "candidates").mean
        flops, costs = student_cost(self._rows[setting].iloc[0].to_dict(), self.study.costs)
        cost = funnel_cost(candidates, scored, flops, self._teacher_flops, costs)
        return np.asarray(cost / self._whole(candidates))

    def _whole(self, candidates: Any) -> Any:
        return whole_cost(candidates, self._teacher_flops, self.study.costs)

    def live_test(self, setting: str, other: str, effect: float) -> RequestsNeeded | None:
        """Return the requests that a live test of two funnels needs, each at `funnel.passed`.

        The value V of the labels of a logged list, over the test requests, has the mean and the
        variance of an arm of an A/B test. Two lists that keep the shares s and s' of the teacher's
        own top m differ by at most d = 2 m min((1 − s) + (1 − s'), 1) items. The credit of an
        interleaved test then has a variance of at most d · (Var V / m + (mean V / m)²), if labels
        of different items are independent.

        Args:
          setting: one of `study.chosen`, or a reference.
          other: another one.
          effect: relative change of V to detect.

        Returns:
          None if the test requests or their labels are not known.
        """
        # The teacher's own row counts only labels of candidates that it has scored.
        rankers = (each for _, kept in self.study.kept for (member, _), each in kept.each.items()
                   if member != TEACHER)  # fmt: skip
        each = next(rankers, None)
        if each is None:
            return None
        positives = each.curves["positives_kept"][:, -1]
        value = np.asarray(positives @ np.asarray(self.study.value_weights))
        column, shown = f"survival@{self.study.passed}", self.study.shown
        missed = min(1.0, sum(1 - self.of(name, column).mean for name in (setting, other)))
        if not (value.mean() > 0 and missed > 0):
            return None
        mean, variance = float(value.mean()), float(value.var(ddof=1))
        second = variance / shown + (mean / shown) ** 2
        change = effect * mean
        return RequestsNeeded(
            number_needed(4 * variance, change),
            number_needed(2 * shown * missed * second, change),
        )

    def curve(self, setting: str, name: str) -> pd.DataFrame:
        """Return a curve over k with its interval: the columns k, mean, low, high.

        Args:
          setting: one of `study.chosen`, or a reference.
          name: a column of `curves.csv`.

        Returns:
          An empty table if the requests of a repeat were not kept.
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
        if measure in SAVINGS:
            return self._saving(setting, metrics.TARGET, measure)
        rows = self._rows.get(setting, pd.DataFrame())
        if measure not in rows:
            return _NOWHERE
        values = rows[measure].dropna().astype(float)
        known = self._drawn_of(setting, values.index)
        if not known or any(measure not in of.measures for of in known):
            return _of_repeats(tuple(values.index), values.to_numpy())
        numbers = np.stack([of.measures[measure] for of in known], axis=1)
        return Measured(tuple(values.index), values.to_numpy(), numbers, known[0].requests)

    def _saving(
        self, setting: str, target: float, column: str, flops_ratio: float | None = None
    ) -> Measured:
        against = self.study.baselines.get(column)
        if against is None:
            return _NOWHERE
        pair = (self._cost(name, target, flops_ratio) for name in (setting, against))
        return _combined(funnel_cost_saving, *pair)

    def _cost(self, setting: str, target: float, flops_ratio: float | None = None) -> Measured:
        """Return the mean cost of a request at a target."""
        row, of_teacher = self._rows[setting].iloc[0].to_dict(), self._teacher_flops
        flops, costs = student_cost(row, self.study.costs)
        if flops_ratio is not None and row["role"] != "reference":
            flops, costs = flops_ratio * of_teacher, costs._replace(student=0.0)
        return _combined(
            lambda candidates, scored: funnel_cost(candidates, scored, flops, of_teacher, costs),
            self._measured(setting, "candidates"),
            self._scored(setting, target),
        )

    def _scored(self, setting: str, target: float) -> Measured:
        """Return the candidates that the teacher scores at a target, if need be between known k."""
        (column,) = result_columns(METRICS["scored_for"], (), ReportAt((), (target,)))
        if column in self.study.rows:
            return self._measured(setting, column)
        repeats = tuple(self._rows[setting].index)
        known = self._drawn_of(setting, repeats)
        if not known:
            return _NOWHERE
        numbers = np.stack([_scored_for(of, target) for of in known], axis=1)
        return Measured(repeats, numbers[0], numbers[1:], known[0].requests)

    @property
    def _teacher_flops(self) -> float:
        """FLOPs per candidate; NaN without a teacher."""
        return float(self.study.teachers["flops_per_candidate"].mean())

    def _drawn_of(self, setting: str, repeats: Iterable[Any]) -> list[_Drawn]:
        """Return the draws of these repeats; none if those of one are missing."""
        drawn = [self._drawn.get((setting, repeat)) for repeat in repeats]
        known = [of for of in drawn if of is not None]
        return known if len(known) == len(drawn) else []

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, str], _Drawn]:
        """The draws by setting and repeat, where the requests were kept."""
        study, points = self.study, _points(self.study)
        found: dict[tuple[str, str], _Drawn] = {}
        for source, kept in study.kept:
            rows = self._read[self._read["source"] == source]
            members = {member for member, _ in kept.each}
            seeds = rows.loc[(rows["role"] == "student") & rows["member"].isin(members), "seed"]
            teacher = kept.each[TEACHER, "user"]
            counts = request_counts(len(teacher.alone["funnel_requests"]), DRAWS)
            of_teacher = _resampled(kept, teacher, counts, study.retrieved)
            for (member, serve), each in kept.each.items():
                named = rows[(rows["member"] == member) & (rows["serve"] == serve)]
                if study.num_teachers > 1:
                    # Teachers and references have the same name under every teacher.
                    named = named[named["seed"].isin(seeds)]
                if named.empty:
                    continue
                sums = _resampled(kept, each, counts, study.retrieved)
                drawn = _Drawn(
                    _numbers(sums, of_teacher, study, points),
                    _curves(each, sums, kept.ks, study.tasks),
                    kept.ks,
                    counts.shape[1],
                )
                found |= dict.fromkeys(zip(named["setting"], named["repeat"], strict=True), drawn)
        return found


def _points(study: Study) -> ReportAt:
    """Return the points of the curves that the study's columns have."""
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
    """Return `combined`, without draws if one setting has none."""
    if not all(len(setting.drawn) for setting in settings):
        settings = tuple(_of_repeats(setting.repeats, setting.each) for setting in settings)
    return combined(function, *settings)


def _of_repeats(repeats: tuple[Any, ...], each: Float[np.ndarray, "R"]) -> Measured:
    """Return a measure without draws."""
    return Measured(repeats, each, np.zeros((0, len(each))), 0)


def _resampled(kept: Kept, each: Each, counts: Int[np.ndarray, "B N"], retrieved: int) -> Sums:
    """Return the sums of a ranker in each draw, [..., B], curves at every k."""
    between = _between(kept.ks, retrieved)

    def drawn(of: Any) -> Any:
        return np.moveaxis(resampled_sums(np.asarray(of)[None], counts)[:, 0], 0, -1)

    single: Sums = {name: drawn(of) for name, of in each.alone.items()}
    return single | {
        name: np.tensordot(between, drawn(of), axes=1) for name, of in each.curves.items()
    }


def _between(ks: Int[np.ndarray, "K"], retrieved: int) -> Float[np.ndarray, "N K"]:
    """Return the weights that interpolate a curve at `ks` linearly at every k."""
    every = np.arange(1, retrieved + 1)
    return np.stack([np.interp(every, ks, of) for of in np.eye(len(ks))], axis=1)


def _numbers(
    sums: Sums, of_teacher: Sums, study: Study, points: ReportAt
) -> dict[str, Float[np.ndarray, "B"]]:
    """Return the measures of a ranker by column, and means over tasks where a metric has one."""
    found: dict[str, np.ndarray] = {}
    for metric in METRICS.values():
        columns = result_columns(metric, study.tasks, points)
        # A metric that was added later has no sums here.
        if not columns or metric.ends is None or not set(columns) <= set(study.rows):
            continue
        numbers = metrics.numbers(metric, metric.ends(sums, of_teacher), points)
        found |= zip(columns, numbers, strict=True)
        if metric.averaged:
            found[metric.name] = _mean_of_known(numbers)
    return found


def _mean_of_known(numbers: Float[np.ndarray, "T B"]) -> Float[np.ndarray, "B"]:
    """Return the mean over tasks that have a number; NaN if none has."""
    known = ~np.isnan(numbers)
    return ratio(np.where(known, numbers, 0.0).sum(axis=0), known.sum(axis=0))


def _scored_for(of: _Drawn, target: float) -> Float[np.ndarray, "1+B"]:
    """Return the candidates scored at a target, on the test requests and in each draw."""
    needed = passed_for(of.curves["value_captured"], of.ks, target)
    each = zip(needed, of.curves["scored"], strict=True)
    return np.array([np.interp(k, of.ks, scored) for k, scored in each])


def _curves(
    each: Each, sums: Sums, ks: Int[np.ndarray, "K"], tasks: Sequence[str]
) -> dict[str, Float[np.ndarray, "1+B K"]]:
    """Return the curves at the kept k: of the test requests, then of each draw of them."""

    def with_draws(of: Any, drawn: Any) -> Float[np.ndarray, "*shape 1+B"]:
        whole = np.asarray(of, np.float64).sum(axis=0)
        return np.concatenate([whole[..., None], drawn], axis=-1)

    joined: Sums = {name: with_draws(of, sums[name]) for name, of in each.alone.items()}
    joined |= {name: with_draws(of, sums[name][ks - 1]) for name, of in each.curves.items()}
    found: dict[str, np.ndarray] = {"scored": ratio(joined["scored"], joined["requests"]).T}
    for metric in METRICS.values():
        columns = curve_columns(metric, tasks)
        if not columns or metric.ends is None:
            continue
        # A metric that was added later has no sums here.
        with contextlib.suppress(KeyError):
            ended = np.asarray(metric.ends(joined, joined))
            by_column = ended.reshape(len(ks), len(columns), -1)
            found |= zip(columns, by_column.transpose(1, 2, 0), strict=True)
    return found
