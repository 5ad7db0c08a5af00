"""Findings that prevent a dataset unless `data.allow` names them."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

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
    texts = {
        "rejected": _rejected(report["candidates"]),
        "times": _times(report),
        "one_candidate": _one_candidate(report),
        "one_label": _one_label(report),
        "few_positives": _few_positives(report),
        "teacher_coverage": _teacher_coverage(report),
    }
    if texts["times"]:
        texts["times"] += time_hint()
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


def _hints(report: Report, section: str) -> dict[str, str]:
    """Return a hint in brackets on invalid values, by task."""
    prefix = f"data.{section}."
    return {
        column["key"].removeprefix(prefix): f" (its column holds {column['hint']})"
        for column in report["columns"]
        if column["key"].startswith(prefix) and column.get("hint")
    }


def _rejected(candidates: dict) -> str:
    rejected, number = candidates["rejected"], candidates["in_the_log"]
    if rejected <= _MOST_REJECTED * number:
        return ""
    return f"{rejected:,} of {number:,} candidates ({rejected / number:.1%}) are rejected"


def _times(report: Report) -> str:
    for column in report["columns"]:
        if column["key"] == "data.columns.time":
            bad, number = column["out_of_range"], column["values"]
            if bad > _MOST_REJECTED * number:
                return f"{bad:,} of {number:,} values of column {column['column']!r} are not times"
    if "splits" not in report:
        return ""
    ends = ("first", "last")
    dates = [np.datetime64(of[end]) for of in report["splits"].values() for end in ends]
    if min(dates) >= _EARLIEST and max(dates) < _LATEST:
        return ""
    first, last = (str(date)[:-9] for date in (min(dates), max(dates)))
    return f"they are between {first} and {last}"


def _one_candidate(report: Report) -> str:
    sizes = report.get("requests", {}).get("candidates_a_request")
    if not sizes or sizes["quantiles"]["0.5"] > 1:
        return ""
    return (
        "half of the requests have one candidate, which leaves nothing to rank; is the column of "
        "data.columns.request the id of a row?"
    )


def _one_label(report: Report) -> str:
    hints, tasks = _hints(report, "labels"), []
    missing = {column["key"] for column in report["columns"] if column.get("missing")}
    for task in report.get("tasks", ()):
        rates = {split: of[f"rate/{task}"] for split, of in report["splits"].items()}
        texts = [
            f"no label of {task} in {split}"
            if rate is None
            else f"every label of {task} in {split} is {rate:.0f}"
            for split, rate in rates.items()
            if rate in (None, 0, 1)
        ]
        if texts:
            tasks.append(f"{', '.join(texts)}{hints.get(task, '')}")
            if rates.get("train") == 1 and f"data.labels.{task}" in missing:
                tasks[-1] += " (if a missing label means 0, write it by data.sql)"
    return ", ".join(tasks)


def _few_positives(report: Report) -> str:
    few = []
    for task in report.get("tasks", ()):
        numbers = {
            split: of[f"positives/{task}"]
            for split, of in report["splits"].items()
            if split != "train"
        }
        low = [f"{n:,} in {split}" for split, n in numbers.items() if n < _LEAST_POSITIVES]
        if low:
            few.append(f"{task} has {' and '.join(low)}")
    return f"positives below {_LEAST_POSITIVES}: {', '.join(few)}" if few else ""


def _teacher_coverage(report: Report) -> str:
    test = report.get("splits", {}).get("test")
    if not test:
        return ""
    hints, tasks = _hints(report, "teacher"), []
    # Shown candidates were passed, too.
    number = test["passed"] + test["shown"]
    for task in report["teacher"]["tasks"]:
        shares = {of: test[f"coverage/{task}/{of}"] or 0 for of in ("passed", "shown")}
        covered = sum(share * test[of] for of, share in shares.items())
        if covered < _LEAST_COVERED * number:
            share = f"{covered / number:.1%}"
            tasks.append(
                f"that of {task} covers {share} of the passed candidates in test"
                f"{hints.get(task, '')}"
            )
    return ", ".join(tasks)
