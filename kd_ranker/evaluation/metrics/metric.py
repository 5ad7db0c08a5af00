"""A metric: a formula, the sums that it needs of each request, and the number that follows.

Axes: `R` requests, `N` candidates, `T` tasks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from kd_ranker.evaluation.ranked import Ranked

# By name: of each request of a batch, [R, ...], or over all requests of a batch or a pass, [...].
Sums = dict[str, Float[Array | np.ndarray, "..."]]
SumFunction = Callable[[Ranked], Sums]
# (sums over the requests of a pass, those of the teacher on the same requests) -> the number.
Final = Callable[[Sums, Sums], Any]
Better = Literal["lower", "higher", "one"]


class ReportAt(NamedTuple):
    """The points of a curve that are reported."""

    ks: Sequence[int] = ()  # candidates passed, at least 1; one beyond their number means all
    targets: Sequence[float] = ()  # shares in (0, 1) to reach


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of `results.csv`, or one for each task, k or target.

    Attributes:
      name: of its columns `name`, `name/<task>`, `name@<k>`, `name@<k>/<task>`, `name_<percent>`.
      formula: in Markdown, for the docs.
      sums: a function of a batch that returns sums of each request by name, arrays [R, ...]. Those
        of a metric with a number for each k or target may be curves, [R, N, ...]. Metrics may share
        a function: it is called once per batch. None if the sums of other metrics suffice.
      final: a function of the sums over the requests of a pass, and of those of the teacher on the
        same. It returns, by `per`:
          ()                 one number
          ("task",)          an array [T]
          ("k",)             a curve [N], whose index `k - 1` belongs to k
          ("k", "task")      an array [N, T]
          ("target",)        a curve [N], of which the first k at or above a target is reported; or
                             an `AtTarget`
        NaN means that there is nothing to measure. Sums and numbers may have one more axis, the
        last, of draws of the requests: do not reduce it. None if `results` fills in the column.
      better: the better direction; None if there is none.
      per: what it has a number for.
      title: in tables and figures; by default `name` with spaces.
      digits: after the decimal point, in tables.
      probabilities_of: the rankers that must give probabilities, not only an order.
      of_teacher: whether it is defined for the teacher itself.
      averaged: whether a report has the mean over tasks too, under `name`.
      compared: whether a report compares settings on it.
    """

    name: str
    formula: str
    sums: SumFunction | None = None
    final: Final | None = None
    better: Better | None = None
    per: tuple[Literal["k", "task", "target"], ...] = ()
    title: str = ""
    digits: int = 4
    probabilities_of: tuple[Literal["ranker", "teacher"], ...] = ()
    of_teacher: bool = True
    averaged: bool = False
    compared: bool = True

    def columns(self, tasks: Sequence[str], report_at: ReportAt) -> list[str]:
        """Return its columns in `results.csv`."""
        if "k" in self.per:
            points = [f"@{k}" for k in report_at.ks]
        elif "target" in self.per:
            points = [f"_{percent(target)}" for target in report_at.targets]
        else:
            points = [""]
        ends = self._ends(tasks)
        return [f"{self.name}{point}{end}" for point in points for end in ends]

    def curve_columns(self, tasks: Sequence[str]) -> list[str]:
        """Return its columns in `curves.csv`, where a line is a k; none if it has no curve."""
        if "k" not in self.per:
            return []
        return [f"{self.name}{end}" for end in self._ends(tasks)]

    def _ends(self, tasks: Sequence[str]) -> list[str]:
        return [f"/{task}" for task in tasks] if "task" in self.per else [""]

    def numbers(self, final: Any, report_at: ReportAt) -> Float[np.ndarray, "columns *draws"]:
        """Return the numbers of a result of `self.final`, in the order of `columns`."""
        if "target" in self.per:
            curve = final.captured if isinstance(final, AtTarget) else final
            passed = np.array([passed_for(curve, target) for target in report_at.targets])
            return _values_at(final.curve, passed) if isinstance(final, AtTarget) else passed
        array = np.asarray(final, np.float64)
        if "k" in self.per:
            array = array[[min(k, len(array)) - 1 for k in report_at.ks]]
        draws = array.shape[len(self.per) :]  # () without an axis of draws
        return array.reshape(-1, *draws)


def percent(share: float) -> str:
    """Return a share in percent, without superfluous digits.

    >>> percent(0.99), percent(0.995), percent(0.07)
    ('99', '99.5', '7')
    """
    # Rounded, for 100 · 0.07 is not 7.
    return f"{100 * share:.10g}"


def passed_for(captured: Float[np.ndarray, "N *draws"], share: Any) -> Float[np.ndarray, "*draws"]:
    """Return the smallest k at which a curve over k = 1..N is at least a share; NaN if none is.

    >>> passed_for(np.array([0.5, 0.9, 0.99, 1.0]), 0.9)
    array(2.)
    """
    reached = captured >= share
    return np.where(reached.any(axis=0), reached.argmax(axis=0) + 1.0, np.nan)


class AtTarget(NamedTuple):
    """A curve, to be read at the first k at which the value captured reaches a target."""

    captured: Float[np.ndarray, "N *draws"]
    curve: Float[np.ndarray, "N *draws"]


def _values_at(
    curve: Float[np.ndarray, "N *draws"], k: Float[np.ndarray, "targets *draws"]
) -> Float[np.ndarray, "targets *draws"]:
    """Return the values of a curve at each k; NaN where k is."""
    index = np.nan_to_num(k, nan=1).astype(int) - 1
    return np.where(np.isnan(k), np.nan, np.take_along_axis(np.asarray(curve), index, axis=0))


def ratio(
    numerator: Array | np.ndarray, denominator: Array | np.ndarray
) -> Float[np.ndarray, "*shape"]:
    """Numerator over denominator in float64, NaN where the denominator is 0."""
    below = np.asarray(denominator, np.float64)
    return np.asarray(numerator, np.float64) / np.where(below == 0, np.nan, below)


# The finals that several metrics share. Each is an object that is called with the sums.


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One sum over another."""

    numerator: str
    denominator: str

    def __call__(self, sums: Sums, teacher: Sums) -> Float[np.ndarray, "..."]:
        """Return the ratio; `teacher` is not used."""
        return ratio(sums[self.numerator], sums[self.denominator])


@dataclasses.dataclass(frozen=True)
class Captured:
    """A curve over its last entry: a ratio of sums, not the mean of the ratios of requests."""

    curve: str

    def __call__(self, sums: Sums, teacher: Sums) -> Float[np.ndarray, "N ..."]:
        """Return the shares; `teacher` is not used."""
        return ratio(sums[self.curve], sums[self.curve][-1])


@dataclasses.dataclass(frozen=True)
class IfSummed:
    """Another final where a sum was measured; else NaN, in the shape of the sum `like`."""

    name: str
    final: Final
    like: str = "value_captured"

    def __call__(self, sums: Sums, teacher: Sums) -> Any:
        """Return the result of `final`, or NaN."""
        if self.name in sums:
            return self.final(sums, teacher)
        return np.full_like(sums[self.like], np.nan, np.float64)
