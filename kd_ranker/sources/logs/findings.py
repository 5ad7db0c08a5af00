"""Faults of a log as a whole: findings that prevent a dataset, and features that reveal a label."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float64, Int

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import OWNERS, TIME_UNITS, LogLayout

# A larger share of the candidates points at a fault of the log or of the config.
_MOST_REJECTED = 0.1
# The least share of the passed candidates in the test with a teacher's value.
_LEAST_COVERED = 0.5
# In test or validation; fewer cannot show a difference between rankers.
_LEAST_POSITIVES = 100
# Times outside of this range were read in the wrong unit.
_EARLIEST, _LATEST = (np.datetime64(f"{year}-01-01", "s") for year in (1990, 2100))
_SHOWN = "shown"
# Largest shares of the uncertainty of being shown, and of a label, that a feature may remove. The
# score of the current ranker is known before the request, and removes much of the first.
REVEALS_SHOWN, REVEALS_LABEL = 0.9, 0.5
# Least rank correlation of a copy of a teacher's score. Scores of earlier stages agree less.
_COPIES_TEACHER = 0.95
_BINS, _FEW_VALUES = 20, 50
_LEAST_ANSWERS = 30
_LEVEL = 1e-3
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


def find_leaks(database: Database, layout: LogLayout) -> dict[str, dict[str, float]]:
    """Find features that reveal a label, what was shown, or a teacher's order of candidates.

    Args:
      database: holds `sampled`, some 100,000 candidates of whole requests.
      layout: of the log.

    Returns:
      Feature -> label, or "shown" -> the share of its uncertainty removed, where that is too much;
      or teacher -> the rank correlation with its score.
    """
    features = [of for of in layout.of(*OWNERS) if of.kind in ("dense", "category")]
    features = [of for of in features if of.place is None]
    if not features:
        return {}
    rows = database.fetch("SELECT * FROM sampled").to_pandas()
    values = rows[[f"feature:{of.name}" for of in features]]
    values.columns = [of.name for of in features]
    answers = {_SHOWN: (rows["stage"] == Stage.SHOWN).astype(float)}
    answers |= {f"label of {of}": rows[f"label:{of}"].astype(float) for of in layout.tasks}
    teachers = {f"teacher of {of}": rows[f"teacher:{of}"] for of in layout.scored_tasks}
    numbers = values[[of.name for of in features if of.kind == "dense"]].astype(float)
    found = copies_of_teachers(numbers, rows["number"], teachers)
    for feature in features:
        bins = bins_of(values[feature.name])
        for name, answer in answers.items():
            share = share_revealed(bins, answer)
            if share >= (REVEALS_SHOWN if name == _SHOWN else REVEALS_LABEL):
                found.setdefault(feature.name, {})[name] = share
    return found


def bins_of(values: pd.Series) -> Int[np.ndarray, "n"]:
    """The bin of each value: 20 of about as many numbers, or one per value if these are few.

    Missing values have a bin, which texts of more than 50 values share: their information cannot be
    distinguished from chance.
    """
    codes, distinct = pd.factorize(values, sort=True)
    if len(distinct) <= _FEW_VALUES:
        return codes
    if not pd.api.types.is_numeric_dtype(values):
        return np.full(len(codes), -1)
    number = np.bincount(codes[codes >= 0])
    middle = np.cumsum(number) - number / 2
    places = np.floor(_BINS * middle / number.sum()).astype(int)
    return np.append(places, -1)[codes]


def share_revealed(bins: Int[np.ndarray, "n"], answer: pd.Series) -> float:
    """The share of the uncertainty of an answer that bins remove: I(bin; answer) / H(answer).

    I is the estimate from counts, less its bias of about (bins − 1) / 2n (Miller, 1955). 0 where a
    G-test at the level of 0.001 does not distinguish it from chance, and with fewer than 30 answers
    of one kind.

    Args:
      bins: the bin of each row, from -1.
      answer: 1, 0, or NaN for none.

    >>> bins = np.repeat([0, 1], 100)
    >>> round(share_revealed(bins, pd.Series(bins, dtype=float)), 2)
    1.0
    >>> share_revealed(bins, pd.Series(np.tile([0.0, 1.0], 100)))
    0.0
    """
    known = answer.notna().to_numpy()
    cells = 2 * (bins[known] + 1) + (answer[known] == 1)
    counts = np.bincount(cells, minlength=2 * (bins.max(initial=-1) + 2)).reshape(-1, 2)
    counts = counts[counts.any(axis=1)]
    if len(counts) < 2 or counts.sum(axis=0).min() < _LEAST_ANSWERS:
        return 0.0
    test = scipy.stats.chi2_contingency(counts, correction=False, lambda_="log-likelihood")
    if test.pvalue > _LEVEL:
        return 0.0
    information = max(test.statistic - test.dof, 0.0) / 2 / counts.sum()
    return float(information / scipy.stats.entropy(counts.sum(axis=0)))


def copies_of_teachers(
    numbers: pd.DataFrame, request: pd.Series, teachers: Mapping[str, pd.Series]
) -> dict[str, dict[str, float]]:
    """Column -> teacher with the same order of scores -> Spearman's correlation within requests.

    Args:
      numbers: columns of numbers, one row per candidate.
      request: the request of each.
      teachers: name -> scores; NaN where a candidate was not scored.
    """
    copies: dict[str, dict[str, float]] = {}
    for teacher, score in teachers.items():
        by = request[score.notna()]
        ranks = numbers.loc[by.index].groupby(by).rank()
        ranks -= ranks.groupby(by).transform("mean")
        own = score.loc[by.index].groupby(by).rank()
        own -= own.groupby(by).transform("mean")
        enough = ranks.columns[ranks.notna().sum() >= _LEAST_ANSWERS]
        found = ranks[enough].corrwith(own).abs()
        for column, correlation in found[found >= _COPIES_TEACHER].items():
            copies.setdefault(str(column), {})[teacher] = float(correlation)
    return copies
