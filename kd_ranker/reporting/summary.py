"""The table for a terminal: a row per method, on the main measures, in at most 100 columns."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from tabulate import MIN_PADDING, SEPARATING_LINE, tabulate

from kd_ranker.evaluation.baselines import LISTS, NEED_SCORES
from kd_ranker.evaluation.metrics.registry import title_of
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.evaluation.saving import best
from kd_ranker.reporting.estimates import Estimates
from kd_ranker.reporting.intervals import Interval
from kd_ranker.reporting.study import Study
from kd_ranker.reporting.tables import bounds_text, mean_text, number, percents

WIDTH = 100
# The first column gets the width that the others leave, and at least this.
_LEAST_WIDTH = 20
# Headers are wrapped to lines of this width; tabulate separates columns by a gap.
_HEADER_WIDTH = 8
_GAP = 2


class _Line(NamedTuple):
    """A ranker of the table."""

    words: str  # how it was trained, or which baseline it is
    setting: str
    needs_scores: bool


def summary(study: Study, estimates: Estimates) -> str:
    """Return the chosen setting of each method, fewest candidates first, and the baselines below.

    Rankers of other architectures are among the methods.
    """
    headers = [
        "early ranker",
        "needs scores",
        title_of(CRITERION),
        "saving",
        title_of(study.users_measures[0]),
        title_of(f"user_auc/{study.config.tasks[0]}"),
    ]
    students = [_cells(study, estimates, line) for line in _students(study, estimates)]
    baselines = [_cells(study, estimates, line) for line in _baselines(study, estimates)]
    rows: list[Any] = [*_wrap_first_cells(headers, [*students, *baselines])]
    if baselines:
        rows.insert(len(students), SEPARATING_LINE)
    wrapped_headers = ["\n".join(_header_lines(header)) for header in headers[1:]]
    table = tabulate(
        rows,
        headers=[headers[0], *wrapped_headers],
        colalign=["left", "left", *["right"] * (len(headers) - 2)],
        disable_numparse=True,
    )
    note = textwrap.fill(
        "Of each method the setting that is best on validation, read on test requests; ± and "
        f"brackets are 95% intervals. The saving is of the funnel's {study.saved_unit}, against "
        "the baseline.",
        WIDTH,
    )
    return f"{table}\n\n{note}"


def _students(study: Study, estimates: Estimates) -> list[_Line]:
    by_setting = study.tested.drop_duplicates("setting").set_index("setting")
    lines = []
    for method, setting in study.chosen.items():
        needs_scores = bool(by_setting.loc[setting, "needs_scores"])
        lines.append(_Line(study.in_words[method], setting, needs_scores))
    lines += [_Line(name, name, needs_scores) for name, needs_scores in study.rivals.items()]
    return _fewest_first(lines, estimates)


def _baselines(study: Study, estimates: Estimates) -> list[_Line]:
    """Return today's early ranker, and the list of either kind that is best on validation."""
    lines = []
    if study.incumbent is not None:
        lines.append(_Line("today's early ranker", study.incumbent, needs_scores=False))
    for needs_scores in (False, True):
        names = [
            name
            for name in LISTS
            if name in estimates.settings and (name in NEED_SCORES) == needs_scores
        ]
        best_list = best(study.references, names) if names else None
        if best_list is not None:
            lines.append(_Line(f"list of items: {best_list}", best_list, needs_scores))
    return _fewest_first(lines, estimates)


def _fewest_first(lines: Sequence[_Line], estimates: Estimates) -> list[_Line]:
    passed = [estimates.of(line.setting, CRITERION).mean for line in lines]
    order = pd.Series(passed, dtype=float).sort_values(kind="stable", na_position="last").index
    return [lines[index] for index in order]


def _cells(study: Study, estimates: Estimates, line: _Line) -> list[str]:
    passed = mean_text(estimates.of(line.setting, CRITERION), 0)
    saving = "baseline"
    if line.setting != study.baseline:
        saving = _saving_text(estimates.saved(line.setting))
    if estimates.are_partly_scored:
        bounds = estimates.passed_bounds(line.setting)
        passed = bounds_text(bounds)
        if math.isnan(bounds.high):
            saving = ""
    return [
        line.words,
        "yes" if line.needs_scores else "no",
        passed,
        saving,
        mean_text(estimates.of(line.setting, study.users_measures[0]), 4),
        number(estimates.of(line.setting, f"user_auc/{study.config.tasks[0]}").mean, 3),
    ]


def _saving_text(saving: Interval) -> str:
    """Return a saving in percent with its interval.

    >>> _saving_text(Interval(0.252, 0.055, 0.45, 3))
    '25% (6 to 45)'
    """
    mean, low, high = percents(saving)
    if not mean:
        return ""
    return f"{mean}% ({low} to {high})" if low else f"{mean}%"


def _wrap_first_cells(headers: Sequence[str], rows: Sequence[list[str]]) -> list[list[str]]:
    """Return rows with their first cell wrapped, so that the table has at most `WIDTH` columns."""
    width_of_others = 0
    for column in range(1, len(headers)):
        # tabulate pads headers.
        header_width = max(map(len, _header_lines(headers[column]))) + MIN_PADDING
        widths = [len(row[column]) for row in rows]
        width_of_others += _GAP + max([header_width, *widths])
    width = max(_LEAST_WIDTH, WIDTH - width_of_others)
    return [[textwrap.fill(row[0], width), *row[1:]] for row in rows]


def _header_lines(header: str) -> list[str]:
    return textwrap.wrap(header, _HEADER_WIDTH, break_long_words=False)
