"""Estimates of measures on the test split, with intervals over its requests and over repeats.

A measure of a setting is the mean over its repeats. Its interval is a `crossed_interval`, for which
each measure is recomputed on many draws of the test requests. Measures that are not of requests (a
count of FLOPs), and studies without the requests' own numbers, have intervals over repeats only.
"""

import contextlib
import functools
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from kd_ranker.evaluation import saving
from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.live_test import RequestsNeeded, number_needed
from kd_ranker.evaluation.metrics.metric import ReportAt, Sums, ratio
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.evaluation.metrics.target import CRITERION, TARGET, at_target
from kd_ranker.evaluation.request_files import PerRequestByRanker
from kd_ranker.evaluation.results import TEACHER
from kd_ranker.evaluation.whole import Bounds, bounds
from kd_ranker.reporting import intervals
from kd_ranker.reporting.intervals import Interval, OverDraws, combined, crossed_interval
from kd_ranker.reporting.study import Study

DRAWS = 500
# The least coverage at which labels of a log show the sign of the change for users. No two students
# with less were compared with the truth (docs/report.md).
COVERED = 0.35
# `passed_for_alike` at the target of the criterion.
ALIKE = at_target("passed_for_alike")
_NOWHERE = OverDraws((), np.zeros((1, 0)), 0)

# The numbers of a ranker on the test requests, and then on each draw of them: [1+B] by column of
# `results.csv`, and [1+B, K] by column of `curves.csv`, at the kept k.
_Drawn = dict[str, Float[np.ndarray, "1+B ..."]]


class Estimates:
    """The estimates of a study, which share their draws of the requests.

    A `setting` is one of `settings`: of `study.chosen`, a reference, or "teacher".
    """

    def __init__(self, study: Study):
        """Take the study, which is not changed."""
        self.study = study
        self._points = _points(study)
        self.targets = self._points.targets
        self._read = pd.concat(
            [study.tested, saving.of_split(study.references, "test"), study.teachers]
        )
        self._rows = {
            str(setting): rows.set_index("repeat")
            for setting, rows in self._read.groupby("setting", sort=False)
        }
        # FLOPs per candidate; NaN without a teacher.
        self._teacher_flops = float(study.teachers["flops_per_candidate"].mean())

    @property
    def num_requests(self) -> int:
        """The number of test requests; 0 if their own numbers were not kept."""
        if not self.study.kept:
            return 0
        _, kept = self.study.kept[0]
        return len(kept.each[TEACHER, "user"].sums["funnel_requests"])

    @property
    def settings(self) -> Collection[str]:
        """The names of settings that the methods take."""
        return self._rows.keys()

    def of(self, setting: str, measure: str) -> Interval:
        """Return the mean over the repeats of a column of `results.csv`.

        The name of a measure without a task is its mean over tasks.
        """
        return crossed_interval(self._measured(setting, measure))

    def gap(self, setting: str, other: str, measure: str) -> Interval:
        """Return the paired difference `setting` − `other`, over the repeats that both have."""
        pair = (self._measured(name, measure) for name in (setting, other))
        return crossed_interval(combined(np.subtract, *pair))

    def fewer(self, setting: str, other: str) -> Interval:
        """Return how many fewer candidates a setting needs for `TARGET`, as a share of another's.

        1 − `passed_for_99` / `passed_for_99` of the other, over the repeats that both have. It is
        the saving of two rankers that cost the same, before a final ranker that costs far more.
        """
        pair = (self._measured(name, CRITERION) for name in (setting, other))
        return crossed_interval(combined(lambda own, of_other: 1 - own / of_other, *pair))

    def saving(self, setting: str, target: float = TARGET, over: str | None = None) -> Interval:
        """Return the share of another ranker's cost that a setting saves, each at a target.

        Args:
          setting: a student or a reference.
          target: the share of the final value to keep, one of `targets`.
          over: the other ranker; by default the baseline.
        """
        return crossed_interval(self._saving(setting, over or self.study.baseline, target))

    @property
    def are_partly_scored(self) -> bool:
        """True if the final ranker scored no test request whole: counts have bounds only."""
        tested = self.study.tested
        return ALIKE in tested and bool(tested[ALIKE].notna().any())

    def passed_bounds(self, setting: str) -> Bounds:
        """Return the bounds of the candidates to pass, see `whole.bounds`."""
        count = self.of(setting, CRITERION).mean
        if not self.are_partly_scored:
            return Bounds(count, count)
        return bounds(count, self.of(setting, ALIKE).mean, self.of(setting, "passed_auc").mean)

    def saved(self, setting: str) -> Interval:
        """Return what a setting saves of the baseline's `study.saved_unit`."""
        if self.study.saved_unit == "candidates" and self.study.baseline is not None:
            return self.fewer(setting, self.study.baseline)
        return self.saving(setting)

    def cost_share(self, setting: str) -> Interval:
        """Return the cost of a request at `TARGET`, over the teacher's own on all candidates."""
        alone = self.study.costs._replace(student=0.0, student_request=0.0)

        def share(cost: Any, candidates: Any) -> Any:
            whole = saving.funnel_cost(candidates, candidates, 0.0, self._teacher_flops, alone)
            return cost / whole

        parts = (self._cost(setting, TARGET), self._measured(setting, "candidates"))
        return crossed_interval(combined(share, *parts))

    def requests_for(self, setting: str, measure: str, width: float) -> float:
        """Return the test requests with which the 95% interval of a measure is ± `width` of it.

        The interval over requests only, as of one repeat: 1.96 standard deviations over the draws,
        which shrink with the root of the requests. NaN without draws.
        """
        measured = self._measured(setting, measure)
        means = measured.numbers.mean(axis=1)
        if len(means) < 2:
            return float("nan")
        relative = 1.96 * means[1:].std(ddof=1) / means[0]
        return float(measured.requests * (relative / width) ** 2)

    def curve(self, setting: str, name: str) -> pd.DataFrame:
        """Return a column of `curves.csv` with its interval: the columns k, mean, low, high.

        It is empty if the requests of a repeat were not kept.
        """
        drawn = self._stacked(setting, self._rows[setting].index, name)
        columns = (
            zip(self.study.kept[0][1].ks, np.moveaxis(drawn.numbers, -1, 0), strict=True)
            if drawn.repeats
            else ()
        )
        lines = [(int(k), *crossed_interval(drawn._replace(numbers=of))[:3]) for k, of in columns]
        return pd.DataFrame(lines, columns=["k", "mean", "low", "high"])

    def live_test(self, setting: str, other: str, effect: float) -> RequestsNeeded | None:
        """Return the requests that a live test of two funnels needs, each at `funnel.passed`.

        The value V of the labels of a logged list, over the test requests, has the mean and the
        variance of an arm of an A/B test. Two lists that keep the shares s and s' of the teacher's
        own top m differ by at most d = 2 m min((1 − s) + (1 − s'), 1) items. The credit of an
        interleaved test then has a variance of at most d · (Var V / m + (mean V / m)²), if labels
        of different items are independent. `effect` is the relative change of V to detect.

        Returns:
          None if the test requests or their labels are not known.
        """
        # The teacher's own row counts only labels of candidates that it has scored.
        rankers = (each for _, kept in self.study.kept for (run, _), each in kept.each.items()
                   if run != TEACHER)  # fmt: skip
        each = next(rankers, None)
        if each is None:
            return None
        config = self.study.config
        value = np.asarray(each.curves["positives_kept"][:, -1] @ np.asarray(config.value_weights))
        column, shown = f"survival@{self.study.passed}", config.funnel.shown
        missed = min(1.0, sum(1 - self.of(name, column).mean for name in (setting, other)))
        if not (value.mean() > 0 and missed > 0):
            return None
        mean, variance = float(value.mean()), float(value.var(ddof=1))
        credit = 2 * shown * missed * (variance / shown + (mean / shown) ** 2)
        change = effect * mean
        return RequestsNeeded(number_needed(4 * variance, change), number_needed(credit, change))

    def coverage(self, settings: Sequence[str]) -> float:
        """Return the least coverage of settings at `funnel.passed`, in [0, 1].

        1 where the truth is known. NaN for the incumbent without a truth: among the candidates that
        it has passed itself, its scores differ little, so its covered value is far too low.
        """
        if self.study.knows_truth:
            return 1.0
        if self.study.incumbent in settings:
            return float("nan")
        column = f"coverage@{self.study.passed}"
        return float(np.min([self.of(setting, column).mean for setting in settings]))

    @property
    def labels_are_chosen(self) -> bool:
        """True if the funnel of the log chose which candidates have labels.

        False if it showed all candidates of each request, as in public data with a label for each.
        """
        column = f"shown_recall@{self.study.passed}"
        tested = self.study.tested
        return column not in tested or bool(tested[column].notna().any())

    def why_unlabeled(self, settings: Sequence[str]) -> str:
        """Return why a log's labels cannot show the change for users between settings, else "".

        Labels of items that the final ranker chose count agreement with its mistakes as a gain, and
        a student with scores agrees more. So they can show only its loss (`docs/report.md`).

        Args:
          settings: a student that learns from the final ranker's scores, then the one before it.
        """
        # The final ranker did not choose these labels, and any candidate may have one.
        if self.study.has_labels_beyond_shown:
            return ""
        share = self.coverage(settings)
        if self.study.incumbent in settings and not self.study.knows_truth:
            return "candidates that today's early ranker left out have no labels"
        if np.isnan(share):
            return "the share of shown items that could have labels is unknown"
        if share < COVERED:
            return f"only {100 * share:.0f}% of the items that these funnels show could have labels"
        if self.study.knows_truth or not self.labels_are_chosen:
            return ""
        with_scores, before = settings
        (measure,) = self.study.users_measures
        if self.gap(with_scores, before, measure).high < 0:
            return ""
        return "labels that the final ranker chose show losses only, and here none"

    def _measured(self, setting: str, measure: str) -> OverDraws:
        if measure in saving.SAVINGS:
            return self._saving(setting, self.study.baselines.get(measure))
        rows = self._rows.get(setting, pd.DataFrame())
        if measure not in rows:
            return _NOWHERE
        values = rows[measure].dropna().astype(float)
        each, drawn = values.to_numpy()[None], self._stacked(setting, values.index, measure)
        if not drawn.repeats:
            return OverDraws(tuple(values.index), each, 0)
        # The first row has the digits of `results.csv`.
        return drawn._replace(numbers=np.concatenate([each, drawn.numbers[1:]]))

    def _saving(self, setting: str, other: str | None, target: float = TARGET) -> OverDraws:
        if other is None:
            return _NOWHERE
        pair = (self._cost(name, target) for name in (setting, other))
        return combined(lambda cost, of_other: 1 - cost / of_other, *pair)

    def _cost(self, setting: str, target: float) -> OverDraws:
        """Return the mean cost of a request at a target."""
        row, of_teacher = self._rows[setting].iloc[0].to_dict(), self._teacher_flops
        flops, costs = saving.student_cost(row, self.study.costs)
        (column,) = METRICS["scored_for"].columns((), ReportAt((), (target,)))
        return combined(
            lambda total, scored: saving.funnel_cost(total, scored, flops, of_teacher, costs),
            self._measured(setting, "candidates"),
            self._measured(setting, column),
        )

    def _stacked(self, setting: str, repeats: Iterable[Any], column: str) -> OverDraws:
        """Return a column of each repeat, [1+B, R, ...]; no repeat if the draws of one lack it."""
        repeats = tuple(repeats)
        numbers = [self._drawn.get((setting, repeat), {}).get(column) for repeat in repeats]
        known = [of for of in numbers if of is not None]
        if not known or len(known) < len(numbers):
            return _NOWHERE
        requests = len(self.study.kept[0][1].each[TEACHER, "user"].sums["funnel_requests"])
        return OverDraws(repeats, np.stack(known, axis=1), requests)

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, str], _Drawn]:
        """The draws by setting and repeat, where the requests were kept."""
        study = self.study
        found: dict[tuple[str, str], _Drawn] = {}
        for source, kept in study.kept:
            rows = self._read[self._read["source"] == source]
            runs = {run for run, _ in kept.each}
            seeds = rows.loc[(rows["role"] == "student") & rows["run"].isin(runs), "seed"]
            teacher = kept.each[TEACHER, "user"]
            counts = intervals.request_counts(len(teacher.sums["funnel_requests"]), DRAWS)
            of_teacher = _resampled(kept, teacher, counts)
            for (run, serve), each in kept.each.items():
                named = rows[(rows["run"] == run) & (rows["serve"] == serve)]
                if study.num_teachers > 1:
                    # Teachers and references have the same name under every teacher.
                    named = named[named["seed"].isin(seeds)]
                if named.empty:
                    continue
                drawn = self._numbers(_resampled(kept, each, counts), of_teacher)
                found |= dict.fromkeys(zip(named["setting"], named["repeat"], strict=True), drawn)
        return found

    def _numbers(self, sums: Sums, of_teacher: Sums) -> _Drawn:
        """Return a ranker's measures, means over tasks where a metric has one, and curves."""
        # The sweeps of a study may have kept other k. `sums` have every k.
        ks = self.study.kept[0][1].ks
        points, at = self._points, ks - 1
        tasks, known = self.study.config.tasks, set(self.study.rows)
        drawn: _Drawn = {}
        for metric in METRICS.values():
            # A metric that was added later has no sums here.
            with contextlib.suppress(KeyError):
                columns = metric.columns(tasks, points)
                is_drawn = columns or metric.curve_columns(tasks)
                ended = metric.final(sums, of_teacher) if metric.final and is_drawn else None
                if ended is not None and columns and set(columns) <= known:
                    numbers = metric.numbers(ended, points)
                    drawn |= zip(columns, numbers, strict=True)
                    if metric.averaged:
                        of_task = ~np.isnan(numbers)
                        whole = np.where(of_task, numbers, 0.0).sum(axis=0)
                        drawn[metric.name] = ratio(whole, of_task.sum(axis=0))
                if ended is not None and (columns := metric.curve_columns(tasks)):
                    by_column = np.asarray(ended)[at].reshape(len(ks), len(columns), -1)
                    drawn |= zip(columns, by_column.transpose(1, 2, 0), strict=True)
        return drawn


def _points(study: Study) -> ReportAt:
    """Return the points of the curves that the study's columns have."""
    columns = [str(column) for column in study.rows]
    ks = {int(found[1]) for column in columns if (found := re.search(r"@(\d+)", column))}
    named = (re.fullmatch(r"passed_for_([\d.]+)", column) for column in columns)
    targets = tuple(round(float(found[1]) / 100, 10) for found in named if found)
    return ReportAt(tuple(sorted(ks)), targets)


def _resampled(
    kept: PerRequestByRanker, each: PerRequest, counts: Int[np.ndarray, "1+B N"]
) -> Sums:
    """Return the sums of a ranker in each draw, [..., 1+B], curves interpolated at every k."""
    every, times = np.arange(1, kept.ks[-1] + 1), counts.astype(np.float64)
    between = np.stack([np.interp(every, kept.ks, of) for of in np.eye(len(kept.ks))], axis=1)

    def drawn(of: Any) -> Any:
        return np.tensordot(np.asarray(of, np.float64), times, (0, 1))

    single: Sums = {name: drawn(of) for name, of in each.sums.items()}
    return single | {
        name: np.tensordot(between, drawn(of), axes=1) for name, of in each.curves.items()
    }
