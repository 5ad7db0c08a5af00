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

from kd_ranker.evaluation import saving
from kd_ranker.evaluation.evaluate import PerRequest
from kd_ranker.evaluation.live_test import RequestsNeeded, number_needed
from kd_ranker.evaluation.metrics.metric import Metric, ReportAt, Sums, ratio
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
# with less were compared with the truth (docs/decisions.md).
COVERED = 0.35
# `passed_for_alike` at the target of the criterion.
ALIKE = at_target("passed_for_alike")
_NOWHERE = OverDraws((), np.zeros((1, 0)), 0)

# The numbers of a ranker on the test requests, and then on each draw of them: [1+B] by column of
# `results.csv`, and [1+B, K] by column of `curves.csv`, at `Estimates._ks`.
_Drawn = dict[str, Float[np.ndarray, "1+B ..."]]


class _Resampled(NamedTuple):
    """The sums of a ranker over the test requests, and then over each draw of them, [..., 1+B]."""

    sums: Sums
    curves: Sums  # at the kept k, [K, ..., 1+B]


class Estimates:
    """The estimates of a study, which share their draws of the requests.

    A `setting` is one of `settings`: of `study.chosen`, a reference, or "teacher".
    """

    def __init__(self, study: Study):
        """Take the study, which is not changed."""
        self.study = study
        # A report asks for most numbers several times.
        self._measured = functools.cache(self._measured_anew)
        self._points = _points(study)
        self.targets = self._points.targets
        self._test_rows = pd.concat(
            [study.tested, saving.of_split(study.references, "test"), study.teachers]
        )
        self._rows = {
            str(setting): rows.set_index("repeat")
            for setting, rows in self._test_rows.groupby("setting", sort=False)
        }
        # FLOPs per candidate; NaN without a teacher.
        self._teacher_flops = float(study.teachers["flops_per_candidate"].mean())

    @property
    def num_requests(self) -> int:
        """The number of test requests; 0 if their own numbers were not kept."""
        if not self.study.kept_requests:
            return 0
        return _count_requests(self.study.kept_requests[0].by_ranker)

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
        difference = combined(
            np.subtract, self._measured(setting, measure), self._measured(other, measure)
        )
        return crossed_interval(difference)

    def candidates_saved(self, setting: str, other: str) -> Interval:
        """Return how many fewer candidates a setting needs for `TARGET`, as a share of another's.

        1 − `passed_for_99` / `passed_for_99` of the other, over the repeats that both have. It is
        the saving of two rankers that cost the same, before a final ranker that costs far more.
        """
        return crossed_interval(self._draws_of_candidates_saved(setting, other))

    def _draws_of_candidates_saved(self, setting: str, other: str) -> OverDraws:
        return combined(
            _share_saved, self._measured(setting, CRITERION), self._measured(other, CRITERION)
        )

    def cost_saved(self, setting: str, target: float = TARGET, over: str | None = None) -> Interval:
        """Return the share of another ranker's cost that a setting saves, each at a target.

        Args:
          setting: a student or a reference.
          target: the share of the final value to keep, one of `targets`.
          over: the other ranker; by default the baseline.
        """
        return crossed_interval(
            self._draws_of_cost_saved(setting, over or self.study.baseline, target)
        )

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
        return crossed_interval(self.saved_over_draws(setting))

    def saved_over_draws(self, setting: str) -> OverDraws:
        """Return the same for each repeat, on the test requests and on each draw of them."""
        if self.study.saved_unit == "candidates" and self.study.baseline is not None:
            return self._draws_of_candidates_saved(setting, self.study.baseline)
        return self._draws_of_cost_saved(setting, self.study.baseline)

    def cost_share(self, setting: str) -> Interval:
        """Return the cost of a request at `TARGET`, over the teacher's own on all candidates."""
        teacher_only = self.study.costs._replace(student=0.0, student_request=0.0)

        def share(cost: Any, candidates: Any) -> Any:
            teacher_cost = saving.funnel_cost(
                candidates, candidates, 0.0, self._teacher_flops, teacher_only
            )
            return cost / teacher_cost

        cost = self._cost(setting, TARGET)
        candidates = self._measured(setting, "candidates")
        return crossed_interval(combined(share, cost, candidates))

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
        lines = []
        if drawn.repeats:
            for k, numbers in zip(self._ks, np.moveaxis(drawn.numbers, -1, 0), strict=True):
                value = crossed_interval(drawn._replace(numbers=numbers))
                lines.append((int(k), value.mean, value.low, value.high))
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
        per_request = self._labels_per_request()
        if per_request is None:
            return None
        config = self.study.config
        value = np.asarray(per_request @ np.asarray(config.value_weights))
        survival = f"survival@{self.study.passed}"
        missed = (1 - self.of(setting, survival).mean) + (1 - self.of(other, survival).mean)
        missed = min(1.0, missed)
        mean = float(value.mean())
        if not (mean > 0 and missed > 0):
            return None
        variance = float(value.var(ddof=1))
        shown = config.funnel.shown
        credit_variance = 2 * shown * missed * (variance / shown + (mean / shown) ** 2)
        change = effect * mean
        return RequestsNeeded(
            ab=number_needed(4 * variance, change),
            interleaved=number_needed(credit_variance, change),
        )

    def _labels_per_request(self) -> Float[np.ndarray, "N T"] | None:
        """Return the positive labels of each test request, by task; None if not kept."""
        for _, by_ranker in self.study.kept_requests:
            for (run, _), per_request in by_ranker.each.items():
                # The teacher's own row counts only labels of candidates that it has scored.
                if run != TEACHER:
                    return np.asarray(per_request.curves["positives_kept"][:, -1])
        return None

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
        a student with scores agrees more. So they can show only its loss (`docs/decisions.md`).

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

    def _measured_anew(self, setting: str, measure: str) -> OverDraws:
        if measure in saving.SAVINGS:
            return self._draws_of_cost_saved(setting, self.study.baselines.get(measure))
        rows = self._rows.get(setting, pd.DataFrame())
        if measure not in rows:
            return _NOWHERE
        values = rows[measure].dropna().astype(float)
        on_test = values.to_numpy()[None]
        drawn = self._stacked(setting, values.index, measure)
        if not drawn.repeats:
            return OverDraws(tuple(values.index), on_test, 0)
        # The first row has the digits of `results.csv`.
        return drawn._replace(numbers=np.concatenate([on_test, drawn.numbers[1:]]))

    def _draws_of_cost_saved(
        self, setting: str, other: str | None, target: float = TARGET
    ) -> OverDraws:
        if other is None:
            return _NOWHERE
        return combined(_share_saved, self._cost(setting, target), self._cost(other, target))

    def _cost(self, setting: str, target: float) -> OverDraws:
        """Return the mean cost of a request at a target."""
        row = self._rows[setting].iloc[0].to_dict()
        flops, costs = saving.costs_as_early_ranker(row, self.study.costs)
        (scored_column,) = METRICS["scored_for"].columns((), ReportAt(targets=(target,)))

        def cost(candidates: Any, scored: Any) -> Any:
            return saving.funnel_cost(candidates, scored, flops, self._teacher_flops, costs)

        return combined(
            cost, self._measured(setting, "candidates"), self._measured(setting, scored_column)
        )

    def _stacked(self, setting: str, repeats: Iterable[Any], column: str) -> OverDraws:
        """Return a column of each repeat, [1+B, R, ...]; no repeat if the draws of one lack it."""
        repeats = tuple(repeats)
        numbers = []
        for repeat in repeats:
            drawn = self._drawn.get((setting, repeat), {})
            if column not in drawn:
                return _NOWHERE
            numbers.append(drawn[column])
        if not numbers:
            return _NOWHERE
        return OverDraws(repeats, np.stack(numbers, axis=1), self.num_requests)

    @functools.cached_property
    def _ks(self) -> Int[np.ndarray, "K"]:
        """The k of the curves in draws: those that the first sweep kept, and those of the columns.

        The other sweeps of a study may have kept other k.
        """
        kept = self.study.kept_requests[0].by_ranker.ks
        return np.union1d(kept, np.minimum(self._points.ks, kept[-1])).astype(int)

    @functools.cached_property
    def _drawn(self) -> dict[tuple[str, str], _Drawn]:
        """The draws by setting and repeat, where the requests were kept."""
        study = self.study
        by_setting_and_repeat: dict[tuple[str, str], _Drawn] = {}
        for source, by_ranker in study.kept_requests:
            rows = self._test_rows[self._test_rows["source"] == source]
            runs = {run for run, _ in by_ranker.each}
            seeds = rows.loc[(rows["role"] == "student") & rows["run"].isin(runs), "seed"]
            counts = intervals.request_counts(_count_requests(by_ranker), DRAWS)
            counts = counts.astype(np.float64)
            teacher = _resampled(by_ranker.each[TEACHER, "user"], counts)
            for (run, serve), per_request in by_ranker.each.items():
                ranker_rows = rows[(rows["run"] == run) & (rows["serve"] == serve)]
                if study.num_teachers > 1:
                    # Teachers and references have the same names under every teacher; their
                    # seeds tell them apart.
                    ranker_rows = ranker_rows[ranker_rows["seed"].isin(seeds)]
                if ranker_rows.empty:
                    continue
                drawn = self._measure(_resampled(per_request, counts), teacher, by_ranker.ks)
                for key in zip(ranker_rows["setting"], ranker_rows["repeat"], strict=True):
                    by_setting_and_repeat[key] = drawn
        return by_setting_and_repeat

    def _measure(
        self, ranker: _Resampled, teacher: _Resampled, kept_ks: Int[np.ndarray, "K"]
    ) -> _Drawn:
        """Return a ranker's measures, means over tasks where a metric has one, and curves."""
        sums_at_ks = [_sums_at(self._ks, resampled, kept_ks) for resampled in (ranker, teacher)]
        sums_at_every_k = [_SumsAtEveryK(resampled, kept_ks) for resampled in (ranker, teacher)]
        drawn: _Drawn = {}
        for metric in METRICS.values():
            if metric.final is None:
                continue
            # A metric that was added later has no sums here.
            with contextlib.suppress(KeyError):
                if "target" in metric.per:
                    # It searches all k for the first that reaches a target.
                    final = metric.final(*sums_at_every_k)
                    drawn |= self._numbers(metric, final, self._points)
                elif "k" in metric.per:
                    final = metric.final(*sums_at_ks)
                    drawn |= self._numbers(metric, final, self._points_among_ks)
                    drawn |= self._curves(metric, final)
                else:
                    final = metric.final(*sums_at_ks)
                    drawn |= self._numbers(metric, final, self._points)
        return drawn

    @property
    def _points_among_ks(self) -> ReportAt:
        """The reported k by their places among `_ks`, as if these were 1, 2, ..."""
        reported = np.minimum(self._points.ks, self._ks[-1])
        return ReportAt(tuple((np.searchsorted(self._ks, reported) + 1).tolist()))

    def _numbers(self, metric: Metric, final: Any, points: ReportAt) -> _Drawn:
        """Return the columns of one metric, if the study has them, and their mean over tasks.

        `final` is the metric's result, and `points` are those of its curve to read.
        """
        columns = metric.columns(self.study.config.tasks, self._points)
        if not columns or not set(columns) <= set(self.study.rows):
            return {}
        numbers = metric.numbers(final, points)
        drawn = dict(zip(columns, numbers, strict=True))
        if metric.averaged:
            is_known = ~np.isnan(numbers)
            total = np.where(is_known, numbers, 0.0).sum(axis=0)
            drawn[metric.name] = ratio(total, is_known.sum(axis=0))
        return drawn

    def _curves(self, metric: Metric, final: Any) -> _Drawn:
        """Return the columns of a metric in `curves.csv`, each [1+B, K]; `final` is at `_ks`."""
        columns = metric.curve_columns(self.study.config.tasks)
        curves = np.asarray(final).reshape(len(self._ks), len(columns), -1)
        return dict(zip(columns, curves.transpose(1, 2, 0), strict=True))


def _points(study: Study) -> ReportAt:
    """Return the points of the curves that the study's columns have."""
    ks = set()
    targets = []
    for column in map(str, study.rows):
        if k := re.search(r"@(\d+)", column):
            ks.add(int(k[1]))
        if percent := re.fullmatch(r"passed_for_([\d.]+)", column):
            targets.append(round(float(percent[1]) / 100, 10))
    return ReportAt(tuple(sorted(ks)), tuple(targets))


def _share_saved(number: Any, number_of_other: Any) -> Any:
    return 1 - number / number_of_other


def _count_requests(by_ranker: PerRequestByRanker) -> int:
    return len(by_ranker.each[TEACHER, "user"].sums["funnel_requests"])


def _resampled(per_request: PerRequest, counts: Float[np.ndarray, "1+B N"]) -> _Resampled:
    """Return the sums of a ranker in each draw, [..., 1+B]."""
    sums = _sums_in_draws({**per_request.sums, **per_request.curves}, counts)
    curves = {name: sums.pop(name) for name in per_request.curves}
    return _Resampled(sums, curves)


def _sums_at(
    ks: Int[np.ndarray, "K2"], resampled: _Resampled, kept_ks: Int[np.ndarray, "K"]
) -> Sums:
    """Return all sums in each draw, with the curves at `ks`; they were kept at `kept_ks`."""
    matrix = _interpolation(kept_ks, ks)
    curves = {name: np.tensordot(matrix, curve, axes=1) for name, curve in resampled.curves.items()}
    return resampled.sums | curves


class _SumsAtEveryK(Sums):
    """All sums in each draw, with the curves at every k = 1..N.

    A curve is interpolated when it is first read: it becomes thirty times as long, and few are.
    """

    def __init__(self, resampled: _Resampled, kept_ks: Int[np.ndarray, "K"]):
        """Start with the curves at `kept_ks`."""
        super().__init__(resampled.sums | resampled.curves)
        self._to_interpolate = set(resampled.curves)
        self._matrix = _interpolation(kept_ks, np.arange(1, kept_ks[-1] + 1))

    def __getitem__(self, name: str) -> Any:
        """Return a sum; KeyError if there is none."""
        if name in self._to_interpolate:
            self._to_interpolate.remove(name)
            self[name] = np.tensordot(self._matrix, super().__getitem__(name), axes=1)
        return super().__getitem__(name)


def _interpolation(
    kept_ks: Int[np.ndarray, "K"], ks: Int[np.ndarray, "K2"]
) -> Float[np.ndarray, "K2 K"]:
    """Return the matrix that interpolates a curve linearly, from the kept k to others."""
    return np.stack([np.interp(ks, kept_ks, point) for point in np.eye(len(kept_ks))], axis=1)


def _sums_in_draws(terms: Sums, counts: Float[np.ndarray, "1+B N"]) -> Sums:
    """Return the sums of arrays [N, ...] over the requests of each draw, [..., 1+B].

    One matrix product for all arrays takes a small part of the time of one for each.
    """
    requests = counts.shape[1]
    flat = [np.asarray(array, np.float64).reshape(requests, -1) for array in terms.values()]
    summed = np.concatenate(flat, axis=1).T @ counts.T
    ends = np.cumsum([array.shape[1] for array in flat])[:-1]
    return {
        name: part.reshape(*np.shape(array)[1:], len(counts))
        for (name, array), part in zip(terms.items(), np.split(summed, ends), strict=True)
    }
