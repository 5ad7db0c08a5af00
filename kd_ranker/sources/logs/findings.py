"""Faults of a log as a whole: findings that prevent a dataset, and features that reveal a label."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float64
from scipy.special import entr

from kd_ranker.batch import Stage
from kd_ranker.errors import UserError
from kd_ranker.sources.logs.data_report import Report
from kd_ranker.sources.logs.database import Database
from kd_ranker.sources.logs.layout import OWNERS, TIME_UNITS, Feature, LogLayout
from kd_ranker.sources.logs.written_after import ORDERS_SHOWN, known_ratio, share_shown_first

# A larger share of the candidates points at a fault of the log or of the config.
_MOST_REJECTED = 0.1
# The least share of the passed candidates in the test with a teacher's value.
_LEAST_COVERED = 0.5
# In test or validation; fewer cannot show a difference between rankers.
_LEAST_POSITIVES = 100
# Times outside of this range were read in the wrong unit.
_EARLIEST, _LATEST = (np.datetime64(f"{year}-01-01", "s") for year in (1990, 2100))
# Largest shares of the uncertainty of being shown, and of a label, that a feature may remove. The
# score of the current ranker is known before the request, and removes much of the first.
REVEALS_SHOWN, REVEALS_LABEL = 0.9, 0.5
# Least rank correlation of a copy of a teacher's score. Scores of earlier stages agree less.
_COPIES_TEACHER = 0.95
_BINS, _FEW_VALUES = 20, 50
_LEAST_ANSWERS = 30


class Finding(NamedTuple):
    """One of `layout.ALLOWABLE`, and a line with its numbers."""

    name: str
    text: str


def find(report: Report, time_hint: Callable[[], str] = lambda: "") -> list[Finding]:
    """Return the findings of a data report; `time_hint` explains times that are out of bounds."""
    found = [*_find_in_rows(report, time_hint)]
    if "splits" in report:
        if report["requests"]["candidates"]["0.5"] <= 1:
            text = (
                "half of the requests have one candidate, which leaves nothing to rank; is the "
                "column of data.columns.request the id of a row?"
            )
            found.append(Finding("one_candidate", text))
        of_tasks = [finding for task in report["tasks"] for finding in _find_in_task(report, task)]
        for name in dict.fromkeys(finding.name for finding in of_tasks):
            texts = ", ".join(finding.text for finding in of_tasks if finding.name == name)
            found.append(Finding(name, texts))
    return found


def _find_in_rows(report: Report, time_hint: Callable[[], str]) -> Iterator[Finding]:
    rejected, number = (report["candidates"][of] for of in ("rejected", "in_the_log"))
    if rejected > _MOST_REJECTED * number:
        share = f"{rejected / number:.1%}"
        yield Finding("rejected", f"{rejected:,} of {number:,} candidates ({share}) are rejected")
    time, splits = _column(report, "data.columns.time"), report.get("splits", {}).values()
    bad, number = time.get("out_of_range", 0), time.get("values", 0)
    dates = [np.datetime64(of[end]) for of in splits for end in ("first", "last")]
    if bad > _MOST_REJECTED * number:
        text = f"{bad:,} of {number:,} values of column {time['column']!r} are not times"
        yield Finding("times", text + time_hint())
    elif dates and (min(dates) < _EARLIEST or max(dates) >= _LATEST):
        first, last = (str(date)[:-9] for date in (min(dates), max(dates)))
        yield Finding("times", f"they are between {first} and {last}" + time_hint())


def _find_in_task(report: Report, task: str) -> Iterator[Finding]:
    label = _column(report, f"data.labels.{task}")
    splits = report["splits"]
    rates = {split: of[f"rate/{task}"] for split, of in splits.items()}
    texts = [
        f"no label of {task} in {split}"
        if rate is None
        else f"every label of {task} in {split} is {rate:.0f}"
        for split, rate in rates.items()
        if rate in (None, 0, 1)
    ]
    if texts:
        is_missing = rates.get("train") == 1 and label.get("missing")
        advice = " (if a missing label means 0, write it by data.sql)" * bool(is_missing)
        yield Finding("one_label", f"{', '.join(texts)}{_range(label)}{advice}")
    for split in ("validation", "test"):
        positives = splits.get(split, {}).get(f"positives/{task}", _LEAST_POSITIVES)
        if positives < _LEAST_POSITIVES:
            text = f"{positives:,} of {_LEAST_POSITIVES} needed positives of {task} in {split}"
            yield Finding("few_positives", text)
    train = splits.get("train", {})
    lowest, highest = train.get(f"lowest/{task}"), train.get(f"highest/{task}")
    if lowest is not None and lowest == highest:
        text = f"that of {task} is {lowest:.6g} for every candidate in train: it orders nothing"
        yield Finding("constant_teacher", text + _range(_column(report, f"data.teacher.{task}")))
    if (test := splits.get("test")) and task in report["teacher"]["tasks"]:
        stages = ("passed", "shown")  # shown candidates were passed, too
        number = sum(test[of] for of in stages)
        covered = sum((test[f"coverage/{task}/{of}"] or 0) * test[of] for of in stages)
        if covered < _LEAST_COVERED * number:
            text = f"that of {task} covers {covered / number:.1%} of the passed candidates in test"
            column = _column(report, f"data.teacher.{task}")
            yield Finding("teacher_coverage", text + _range(column))


def _column(report: Report, key: str) -> dict[str, Any]:
    return next((column for column in report["columns"] if column["key"] == key), {})


def _range(column: dict[str, Any]) -> str:
    return f" (its column holds {column['hint']})" if column.get("hint") else ""


def time_hint(numbers: Float64[np.ndarray, "n"], layout: LogLayout) -> str:
    """Return the unit in which numbers of the time column are recent, in words.

    It is "" if that is the unit of the config, or if there are no numbers.
    """
    if not len(numbers):
        return ""
    middle = np.median(numbers)
    earliest, latest = (limit.astype(np.int64) for limit in (_EARLIEST, _LATEST))
    for unit, per_second in (TIME_UNITS | {"ns": 10**9}).items():
        if earliest <= middle / per_second < latest:
            if per_second == layout.units_per_second:
                return ""
            if unit == "ns":
                return "; its numbers look like nanoseconds: make them timestamps"
            return f"; its numbers look like times in {unit}: try --config.data.time_unit={unit}"
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


def find_leaks(database: Database, layout: LogLayout) -> dict[str, dict[str, float]]:
    """Find features that reveal a label, what was shown or passed, or a teacher's order.

    Args:
      database: holds `sampled`, some 100,000 candidates of whole requests.
      layout: of the log.

    Returns:
      Feature -> label, or "shown" -> the share of its uncertainty removed, where that is too much;
      or teacher -> the rank correlation with its score. Of a feature of candidates without these,
      "order" -> see `share_shown_first`; "known_passed" or "known_shown" -> see `known_ratio`.
    """
    features = [of for of in layout.of(*OWNERS) if of.kind in ("dense", "category")]
    features = [of for of in features if of.place is None]
    if not features:
        return {}
    rows = database.fetch("SELECT * FROM sampled").to_pandas()
    found: dict[str, dict[str, float]] = {of.name: {} for of in features}
    dense = {of.name: rows[f"feature:{of.name}"] for of in features if of.kind == "dense"}
    numbers = pd.DataFrame(dense, rows.index).astype(float)
    for task in layout.scored_tasks:
        correlations = rank_correlations(numbers, rows["number"], rows[f"teacher:{task}"])
        for name, correlation in correlations[correlations >= _COPIES_TEACHER].items():
            found[str(name)][f"teacher of {task}"] = float(correlation)
    answers = {"shown": ((rows["stage"] == Stage.SHOWN).astype(float), REVEALS_SHOWN)}
    for task in layout.tasks:
        answers[f"label of {task}"] = rows[f"label:{task}"].astype(float), REVEALS_LABEL
    for feature in features:
        for name, (answer, limit) in answers.items():
            share = share_revealed(rows[f"feature:{feature.name}"], answer)
            if share >= limit:
                found[feature.name][name] = share
    for feature in features:
        if feature.of == "candidate" and not found[feature.name]:
            found[feature.name] = _signs_of_ranking(rows, feature)
    return {name: reveals for name, reveals in found.items() if reveals}


def _signs_of_ranking(rows: pd.DataFrame, feature: Feature) -> dict[str, float]:
    """Return the signs that a feature was written after the ranking, {} for none."""
    column = f"feature:{feature.name}"
    signs: dict[str, float] = {}
    for name, stage in (("known_passed", Stage.PASSED), ("known_shown", Stage.SHOWN)):
        ratio = known_ratio(rows[column].notna(), rows["stage"] >= stage)
        if ratio < 1 and not signs:
            signs[name] = ratio
    if feature.kind == "dense":
        numbers = rows[[column]].astype(float)
        share = share_shown_first(numbers, rows["number"], rows["stage"] == Stage.SHOWN)[column]
        if share >= ORDERS_SHOWN:
            signs["order"] = float(share)
    return signs


def share_revealed(values: pd.Series, answer: pd.Series) -> float:
    """The share of the uncertainty of an answer that values remove: I(values; answer) / H(answer).

    I is the estimate from counts, less its bias of about (bins − 1) / 2n (Miller, 1955). Numbers of
    more than 50 values have 20 bins of about as many rows. Of texts with more than 50 values, only
    the missing ones are distinguished. It is 0 with fewer than 30 answers of one kind.

    Args:
      values: numbers or texts.
      answer: 1, 0, or NaN for none.

    >>> values = pd.Series(np.repeat([0, 1], 100))
    >>> round(share_revealed(values, values.astype(float)), 2)
    1.0
    >>> share_revealed(values, pd.Series(np.tile([0.0, 1.0], 100)))
    0.0
    """
    values, answer = values[answer.notna()], answer.dropna()
    bins, distinct = pd.factorize(values)
    if len(distinct) > _FEW_VALUES:
        is_number = pd.api.types.is_numeric_dtype(values)
        places = (values.rank() - 0.5) / values.count() if is_number else None
        bins, _ = pd.factorize(values.isna() if places is None else np.floor(_BINS * places))
    cells = 2 * (bins + 1) + (answer == 1).to_numpy()
    counts = np.bincount(cells, minlength=2 * (bins.max(initial=-1) + 2)).reshape(-1, 2)
    counts = counts[counts.any(axis=1)]
    if counts.sum(axis=0).min() < _LEAST_ANSWERS:
        return 0.0
    shares = counts / counts.sum()
    of_answer, of_bins, of_both = (
        entr(of).sum() for of in (shares.sum(axis=0), shares.sum(axis=1), shares)
    )
    bias = (len(counts) - 1) / (2 * counts.sum())
    information = of_answer + of_bins - of_both - bias
    return float(max(information, 0.0) / of_answer)


def rank_correlations(numbers: pd.DataFrame, request: pd.Series, score: pd.Series) -> pd.Series:
    """Column -> absolute value of Spearman's correlation with a score within requests.

    Args:
      numbers: columns of numbers, one row per candidate; those with fewer than 30 are left out.
      request: the request of each.
      score: NaN where a candidate was not scored.
    """
    is_scored = score.notna()
    by = request[is_scored]
    ranks = numbers.assign(**{"": score})[is_scored].groupby(by).rank()
    ranks -= ranks.groupby(by).transform("mean")
    enough = numbers.columns[ranks[numbers.columns].notna().sum() >= _LEAST_ANSWERS]
    return ranks.corr()[""][enough].abs()
