"""Sizes of a log's funnel, and of batches and steps that suit it."""

import math
from typing import NamedTuple

import ibis.expr.types as ir
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_ranker.sources.logs.guess.ids import OWNER, Log
from kd_ranker.sources.logs.guess.roles import Roles, any_known
from kd_ranker.sources.logs.guess.sample import AT
from kd_ranker.sources.logs.looks import size_hint

_LEAST_CANDIDATES = 32
_SHOWN_OF_ALL = 10
# Passes over the training requests, and bounds of steps; but always one pass.
_PASSES, _LEAST_STEPS, _MOST_STEPS = 10, 200, 5_000


class Size(NamedTuple):
    """A number, or several; the reason for it, and a doubt about it, "" for none."""

    number: int | tuple[int, ...]
    why: str = ""
    check: str = ""


def find_sizes(log: Log, roles: Roles, template: ConfigDict) -> dict[str, Size]:
    """Key of the config -> its size, from the requests that the sample holds whole."""
    counts, doubt = _counts(log, roles)
    most, number = int(counts["all"].max()), len(counts)
    retrieved = Size(most, f"the most of {number:,} requests", doubt)
    if counts["all"].min() < most:
        why = f"the most of {number:,} requests; {counts['all'].median():,.0f} at the median"
        check = doubt or "the sample may lack larger requests, which would lose candidates"
        far = size_hint(*counts["all"].quantile([0.5, 0.999, 1], "lower"))
        retrieved = Size(most, why, "; ".join(filter(None, (far, check))))
    shown = _shown(counts, roles, most)
    top = shown.number
    assert isinstance(top, int)
    passed = Size(
        max(most // 10, 2 * top),
        "a guess",
        "the log does not tell what was passed; how many may the final ranker meet?",
    )
    for name, what in (("passed", "passed"), ("scored", "scored by the teacher")):
        if name in counts and 0 < counts[name].sum() < counts["all"].sum():
            passed = _median(counts[name], what)
            break
    passed = passed._replace(number=int(np.clip(passed.number, top, most)))
    k = passed.number
    assert isinstance(k, int)
    report_at = {of for of in (top, k // 4, k // 2, k, 2 * k) if top <= of <= most}
    room = 2 ** math.ceil(math.log2(max(_LEAST_CANDIDATES, 10 * top)))
    candidates = Size(room, f"{top} shown and as many others as make {room}")
    of_teacher = Size(min(most, 128), "the teacher learns from labels: all have them")
    if "shown" in counts:
        labelled = max(1, int(counts["shown"].max()))
        of_teacher = Size(labelled, "the teacher learns from labels: the most that were shown")
    return {
        "config.funnel.retrieved": retrieved,
        "config.funnel.passed": passed,
        "config.funnel.shown": shown,
        "config.funnel.report_at": Size(tuple(sorted(report_at))),
        "config.batch.candidates": (
            Size(most, "all that are retrieved") if room >= most else candidates
        ),
        "config.teacher.batch.candidates": of_teacher,
        "config.train.steps": _steps(log, template, float(counts["all"].mean())),
        "config.teacher.train.steps": _steps(log, template.teacher, float(counts["all"].mean())),
    }


def _counts(log: Log, roles: Roles) -> tuple[pd.DataFrame, str]:
    """Candidates of each request that the sample holds from end to end, and a doubt about these.

    Beside "all" it has how many are "shown", "passed" and "scored", where the log tells; and the
    highest and the lowest "position".
    """
    rows = log.candidates()
    told = (("shown", roles.shown), ("passed", roles.passed))
    flags = {name: flag for name, flag in told if flag is not None}
    for name, flag in flags.items():
        rows = rows.join(flag.rename(**{f" {name}": "is_so"}), AT)
    asked: dict[str, ir.Value] = {name: rows[f" {name}"].cast("int64").sum() for name in flags}
    asked |= {"all": rows.count(), "first": rows[AT].min(), "last": rows[AT].max()}
    if roles.teacher:
        scored = any_known(rows, [guess.column for guess in roles.teacher.values()])
        asked["scored"] = scored.cast("int64").sum()
    if position := roles.columns["position"].column:
        asked |= {"highest": rows[position].max(), "lowest": rows[position].min()}
    each = rows.group_by(OWNER).agg(**asked).drop(OWNER)
    counts = log.cells.engine.fetch(each).to_pandas().astype(float)
    edges = log.sample.edges
    if edges and (counts["last"] - counts["first"] + 1 != counts["all"]).mean() > 0.1:
        return counts, "the rows of a request lie scattered, and the sample may lack some"
    cut = np.isin(counts["first"], edges) | np.isin(counts["last"], edges)
    whole = counts[~cut]
    if not len(whole):
        return counts, "the sample holds no request from end to end"
    return whole, "" if log.columns["request"].column else "no requests are told"


def _shown(counts: pd.DataFrame, roles: Roles, most: int) -> Size:
    """The number of candidates that a page shows."""
    if "shown" in counts and counts["shown"].any():
        shown = _median(counts["shown"], "shown")
        return shown._replace(number=int(np.minimum(shown.number, most)))
    check = "the log does not tell what was shown; how many does a page have?"
    if roles.columns["position"].column:
        places = counts["highest"].max() - min(counts["lowest"].min(), 1) + 1
        if 1 <= places <= most:
            return Size(int(places), f"positions go up to {counts['highest'].max():.0f}", check)
    return Size(min(_SHOWN_OF_ALL, max(1, most // 4)), "a guess", check)


def _median(counts: "pd.Series[int]", what: str) -> Size:
    span = f", {counts.min():,.0f} to {counts.max():,.0f}" if counts.min() < counts.max() else ""
    why = f"{what}: the median of {len(counts):,} requests{span}"
    return Size(max(1, int(counts.median())), why)


def _steps(log: Log, of: ConfigDict, candidates: float) -> Size:
    """Ten passes over the training requests, within bounds."""
    rows = log.footers.num_rows
    requests = 0.8 * (rows if log.sample.requests is not None else rows / candidates)
    a_pass = max(1, math.ceil(requests / of.batch.requests))
    steps = max(_LEAST_STEPS, min(_PASSES * a_pass, max(_MOST_STEPS, a_pass)))
    passes = steps * of.batch.requests / requests
    why = f"{passes:.3g} passes over some {requests:,.0f} training requests"
    why += f", {of.batch.requests} a step"
    return Size(steps, why)
