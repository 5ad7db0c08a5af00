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
from kd_ranker.sources.logs.times import find_formats
from kd_ranker.sources.logs.written_after import ORDERS_SHOWN, known_ratio, share_shown_first

# A larger share of the candidates points at a fault of the log or of the config.
_MOST_REJECTED = 0.1
# The least share of the passed candidates in the test with a teacher's value.
_LEAST_COVERED = 0.5
# In test or validation; fewer cannot show a difference between rankers.
_LEAST_POSITIVES = 100
# Times outside of this range were read in the wrong unit.
_EARLIEST = np.datetime64("1990-01-01", "s")
_LATEST = np.datetime64("2100-01-01", "s")
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
    findings = [*_find_in_rows(report, time_hint)]
    if "splits" not in report:
        return findings
    if report["requests"]["candidates"]["0.5"] <= 1:
        text = (
            "half of the requests have one candidate, which leaves nothing to rank; is the "
            "column of data.columns.request the id of a row?"
        )
        findings.append(Finding("one_candidate", text))
    # A finding has one text for all tasks.
    texts: dict[str, list[str]] = {}
    for task in report["tasks"]:
        for finding in _find_in_task(report, task):
            texts.setdefault(finding.name, []).append(finding.text)
    return findings + [Finding(name, ", ".join(of_tasks)) for name, of_tasks in texts.items()]


def _find_in_rows(report: Report, time_hint: Callable[[], str]) -> Iterator[Finding]:
    rejected = report["candidates"]["rejected"]
    number = report["candidates"]["in_the_log"]
    if rejected > _MOST_REJECTED * number:
        share = f"{rejected / number:.1%}"
        yield Finding("rejected", f"{rejected:,} of {number:,} candidates ({share}) are rejected")
    time = _column(report, "data.columns.time")
    bad = time.get("out_of_range", 0)
    number = time.get("values", 0)
    splits = report.get("splits", {}).values()
    dates = [np.datetime64(split[end]) for split in splits for end in ("first", "last")]
    if bad > _MOST_REJECTED * number:
        text = f"{bad:,} of {number:,} values of column {time['column']!r} are not times"
        yield Finding("times", text + time_hint())
    elif dates and (min(dates) < _EARLIEST or max(dates) >= _LATEST):
        first, last = min(dates).astype("datetime64[D]"), max(dates).astype("datetime64[D]")
        yield Finding("times", f"they are between {first} and {last}{time_hint()}")


def _find_in_task(report: Report, task: str) -> Iterator[Finding]:
    yield from _find_in_labels(report, task)
    yield from _find_in_teacher(report, task)


def _find_in_labels(report: Report, task: str) -> Iterator[Finding]:
    label = _column(report, f"data.labels.{task}")
    splits = report["splits"]
    rates = {name: split[f"rate/{task}"] for name, split in splits.items()}
    texts = []
    for name, rate in rates.items():
        if rate is None:
            texts.append(f"no label of {task} in {name}")
        elif rate in (0, 1):
            texts.append(f"every label of {task} in {name} is {rate:.0f}")
    if texts:
        text = f"{', '.join(texts)}{_range(label)}"
        if rates.get("train") == 1 and label.get("missing"):
            text += " (if a missing label means 0, write it by data.sql)"
        yield Finding("one_label", text)
    for name in ("validation", "test"):
        positives = splits.get(name, {}).get(f"positives/{task}", _LEAST_POSITIVES)
        if positives < _LEAST_POSITIVES:
            text = f"{positives:,} of {_LEAST_POSITIVES} needed positives of {task} in {name}"
            yield Finding("few_positives", text)


def _find_in_teacher(report: Report, task: str) -> Iterator[Finding]:
    column = _column(report, f"data.teacher.{task}")
    train = report["splits"].get("train", {})
    lowest, highest = train.get(f"lowest/{task}"), train.get(f"highest/{task}")
    if lowest is not None and lowest == highest:
        text = f"that of {task} is {lowest:.6g} for every candidate in train: it orders nothing"
        yield Finding("constant_teacher", text + _range(column))
    test = report["splits"].get("test")
    if test and task in report["teacher"]["tasks"]:
        number, covered = 0, 0.0
        for stage in ("passed", "shown"):  # shown candidates were passed, too
            number += test[stage]
            covered += (test[f"coverage/{task}/{stage}"] or 0) * test[stage]
        if covered < _LEAST_COVERED * number:
            text = f"that of {task} covers {covered / number:.1%} of the passed candidates in test"
            yield Finding("teacher_coverage", text + _range(column))


def _column(report: Report, key: str) -> dict[str, Any]:
    return next((column for column in report["columns"] if column["key"] == key), {})


def _range(column: dict[str, Any]) -> str:
    return f" (its column holds {column['hint']})" if column.get("hint") else ""


def time_hint(numbers: Float64[np.ndarray, "n"], texts: Sequence[str], layout: LogLayout) -> str:
    """Return how the time column is to be read, in words; "" if as the config says.

    Args:
      numbers: some of the column, to find the unit in which they are recent; none of another type.
      texts: likewise, to find the format by which they are times.
      layout: of the log.
    """
    if texts:
        formats = [each for each in find_formats(texts) if each != layout.time_format]
        remedy = "write their format, as for strptime, in data.time_format"
        if formats:
            remedy = f"try --config.data.time_format='{formats[0]}'"
        return f"; one is {texts[0]!r}: {remedy}"
    if not len(numbers):
        return ""
    middle = np.median(numbers)
    earliest, latest = _EARLIEST.astype(np.int64), _LATEST.astype(np.int64)
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
    if why := refusal([Finding(**finding) for finding in report["allowed"]], allow):
        raise UserError(f"{where}: {why}")


def refusal(findings: Sequence[Finding], allow: Collection[str]) -> str:
    """Return the findings that are not allowed, with the flag that allows them; "" for none."""
    refused = [finding for finding in findings if finding.name not in allow]
    if not refused:
        return ""
    texts = "; ".join(f"{name}: {text}" for name, text in refused)
    names = tuple(sorted({*allow, *(finding.name for finding in refused)}))
    remedy = f'if this is expected, add --config.data.allow="{names}"'
    if len(refused) > 2:
        remedy = f"first check the columns in the config, which one fault may explain; {remedy}"
    return f"{texts}; {remedy}"


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
    features = [
        feature
        for feature in layout.of(*OWNERS)
        if feature.kind in ("dense", "category") and feature.place is None
    ]
    if not features:
        return {}
    rows = database.fetch("SELECT * FROM sampled").to_pandas()
    leaks: dict[str, dict[str, float]] = {feature.name: {} for feature in features}
    dense = {
        feature.name: rows[f"feature:{feature.name}"]
        for feature in features
        if feature.kind == "dense"
    }
    numbers = pd.DataFrame(dense, rows.index).astype(float)
    for task in layout.scored_tasks:
        correlations = rank_correlations(numbers, rows["number"], rows[f"teacher:{task}"])
        for name, correlation in correlations[correlations >= _COPIES_TEACHER].items():
            leaks[str(name)][f"teacher of {task}"] = float(correlation)
    is_shown = (rows["stage"] == Stage.SHOWN).astype(float)
    for feature in features:
        values = rows[f"feature:{feature.name}"]
        share = share_revealed(values, is_shown)
        if share >= REVEALS_SHOWN:
            leaks[feature.name]["shown"] = share
        for task in layout.tasks:
            share = share_revealed(values, rows[f"label:{task}"].astype(float))
            if share >= REVEALS_LABEL:
                leaks[feature.name][f"label of {task}"] = share
    for feature in features:
        if feature.of == "candidate" and not leaks[feature.name]:
            leaks[feature.name] = _signs_of_ranking(rows, feature)
    return {name: reveals for name, reveals in leaks.items() if reveals}


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
    """Return the share of an answer's uncertainty that values remove.

    It is I(values; answer) / H(answer).

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
    values = values[answer.notna()]
    answer = answer.dropna()
    bins, distinct = pd.factorize(values)
    if len(distinct) > _FEW_VALUES:
        if pd.api.types.is_numeric_dtype(values):
            quantiles = (values.rank() - 0.5) / values.count()
            bins, _ = pd.factorize(np.floor(_BINS * quantiles))
        else:
            bins, _ = pd.factorize(values.isna())
    cells = 2 * (bins + 1) + (answer == 1).to_numpy()
    counts = np.bincount(cells, minlength=2 * (bins.max(initial=-1) + 2)).reshape(-1, 2)
    counts = counts[counts.any(axis=1)]
    if counts.sum(axis=0).min() < _LEAST_ANSWERS:
        return 0.0
    shares = counts / counts.sum()
    entropy_of_answer = entr(shares.sum(axis=0)).sum()
    entropy_of_bins = entr(shares.sum(axis=1)).sum()
    joint_entropy = entr(shares).sum()
    bias = (len(counts) - 1) / (2 * counts.sum())
    information = entropy_of_answer + entropy_of_bins - joint_entropy - bias
    return float(max(information, 0.0) / entropy_of_answer)


def rank_correlations(numbers: pd.DataFrame, request: pd.Series, score: pd.Series) -> pd.Series:
    """Return the absolute value of Spearman's correlation with a score within requests, by column.

    Args:
      numbers: columns of numbers, one row per candidate; those with fewer than 30 are left out.
      request: the request of each.
      score: NaN where a candidate was not scored.
    """
    is_scored = score.notna()
    request = request[is_scored]
    ranks = numbers.assign(**{"": score})[is_scored].groupby(request).rank()
    ranks -= ranks.groupby(request).transform("mean")
    has_enough = ranks[numbers.columns].notna().sum() >= _LEAST_ANSWERS
    return ranks.corr()[""][numbers.columns[has_enough]].abs()
