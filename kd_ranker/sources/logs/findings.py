"""Findings that prevent a dataset unless `data.allow` names them."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.layout import TIME_UNITS, LogLayout

# A larger share of the candidates points at a fault of the log or of the config.
_MOST_REJECTED = 0.1
# The least share of the passed candidates in the test with a teacher's value.
_LEAST_COVERED = 0.5
# In test or validation; fewer cannot show a difference between rankers.
_LEAST_POSITIVES = 100
# Times outside of this range were read in the wrong unit.
_EARLIEST, _LATEST = (np.datetime64(f"{year}-01-01", "s") for year in (1990, 2100))
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}


class Finding(NamedTuple):
    """One of `layout.ALLOWABLE`, and a line with its numbers."""

    name: str
    text: str


def find(report: Report, time_hint: Callable[[], str] = lambda: "") -> list[Finding]:
    """Return the findings of a data report.

    Args:
      report: the report.
      time_hint: returns a hint for times that are out of bounds.
    """
    rejected, number = (report["candidates"][of] for of in ("rejected", "in_the_log"))
    texts = {}
    if rejected > _MOST_REJECTED * number:
        share = f"{rejected / number:.1%}"
        texts["rejected"] = f"{rejected:,} of {number:,} candidates ({share}) are rejected"
    if times := _times(report):
        texts["times"] = times + time_hint()
    if "splits" in report:
        if report["requests"]["candidates"]["0.5"] <= 1:
            texts["one_candidate"] = (
                "half of the requests have one candidate, which leaves nothing to rank; is the "
                "column of data.columns.request the id of a row?"
            )
        for name, of_task in _OF_TASKS.items():
            texts[name] = ", ".join(filter(None, (of_task(report, of) for of in report["tasks"])))
        if texts["few_positives"]:
            texts["few_positives"] = f"positives below {_LEAST_POSITIVES}: {texts['few_positives']}"
    return [Finding(name, text) for name, text in texts.items() if text]


def time_hint(numbers: Float64[np.ndarray, "n"], layout: LogLayout) -> str:
    """Return the unit in which numbers of the time column are recent, in words.

    It is "" if that is the unit of the config, or if there are no numbers.
    """
    if not len(numbers):
        return ""
    middle = np.median(numbers)
    earliest, latest = (limit.astype(np.int64) for limit in (_EARLIEST, _LATEST))
    for unit, per_second in (*TIME_UNITS.items(), ("ns", 10**9)):
        if earliest <= middle / per_second < latest:
            if per_second == layout.units_per_second:
                return ""
            if unit not in TIME_UNITS:
                return "; its numbers look like nanoseconds: make them timestamps"
            return f"; its numbers look like {_NAMES[unit]}: try --config.data.time_unit={unit}"
    return f"; its numbers, such as {middle:.10g}, do not look like times"


def check_allowed(report: Report, allow: Collection[str], where: str) -> None:
    """Raise UserError for findings that were allowed for the build of a dataset and are not now."""
    if why := refusal([Finding(**of) for of in report["allowed"]], allow):
        raise UserError(f"{where}: {why}")


def refusal(found: Sequence[Finding], allow: Collection[str]) -> str:
    """Return the findings that are not allowed, with the flag that allows them; "" for none."""
    refused = [finding for finding in found if finding.name not in allow]
    if not refused:
        return ""
    texts = "; ".join(f"{name}: {text}" for name, text in refused)
    names = tuple(sorted({*allow, *(finding.name for finding in refused)}))
    return f'{texts}; if this is expected, add --config.data.allow="{names}"'


def _times(report: Report) -> str:
    time = _column(report, "data.columns.time")
    bad, number = time.get("out_of_range", 0), time.get("values", 0)
    if bad > _MOST_REJECTED * number:
        return f"{bad:,} of {number:,} values of column {time['column']!r} are not times"
    splits = report.get("splits", {}).values()
    dates = [np.datetime64(of[end]) for of in splits for end in ("first", "last")]
    if not dates or (min(dates) >= _EARLIEST and max(dates) < _LATEST):
        return ""
    first, last = (str(date)[:-9] for date in (min(dates), max(dates)))
    return f"they are between {first} and {last}"


def _column(report: Report, key: str) -> dict[str, Any]:
    return next((column for column in report["columns"] if column["key"] == key), {})


def _hint(column: dict[str, Any]) -> str:
    return f" (its column holds {column['hint']})" if column.get("hint") else ""


def _one_label(report: Report, task: str) -> str:
    rates = {split: of[f"rate/{task}"] for split, of in report["splits"].items()}
    texts = [
        f"no label of {task} in {split}"
        if rate is None
        else f"every label of {task} in {split} is {rate:.0f}"
        for split, rate in rates.items()
        if rate in (None, 0, 1)
    ]
    if not texts:
        return ""
    column = _column(report, f"data.labels.{task}")
    is_missing = rates.get("train") == 1 and column.get("missing")
    advice = " (if a missing label means 0, write it by data.sql)" if is_missing else ""
    return f"{', '.join(texts)}{_hint(column)}{advice}"


def _few_positives(report: Report, task: str) -> str:
    splits = {split: of for split, of in report["splits"].items() if split != "train"}
    numbers = {split: of[f"positives/{task}"] for split, of in splits.items()}
    low = [f"{n:,} in {split}" for split, n in numbers.items() if n < _LEAST_POSITIVES]
    return f"{task} has {' and '.join(low)}" if low else ""


def _teacher_coverage(report: Report, task: str) -> str:
    test = report["splits"].get("test")
    if not test or task not in report["teacher"]["tasks"]:
        return ""
    # Shown candidates were passed, too.
    stages = ("passed", "shown")
    covered = sum((test[f"coverage/{task}/{of}"] or 0) * test[of] for of in stages)
    number = sum(test[of] for of in stages)
    if covered >= _LEAST_COVERED * number:
        return ""
    hint = _hint(_column(report, f"data.teacher.{task}"))
    return f"that of {task} covers {covered / number:.1%} of the passed candidates in test{hint}"


_OF_TASKS: dict[str, Callable[[Report, str], str]] = {
    "one_label": _one_label,
    "few_positives": _few_positives,
    "teacher_coverage": _teacher_coverage,
}
