"""Sizes of a log's funnel, retrieved, passed and shown, and of batches that suit it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from kd_ranker.batch import Stage
from kd_ranker.sources.logs.guess import evidence
from kd_ranker.sources.logs.guess.ids import Facts
from kd_ranker.sources.logs.guess.roles import Roles

_LEAST_CANDIDATES = 32
_SHOWN_OF_ALL = 10


class Size(NamedTuple):
    """A number, the reason for it, and a doubt about it, "" for none."""

    number: int
    why: str
    check: str = ""


class FunnelSizes(NamedTuple):
    """The sizes of a funnel, and those of batches that suit it."""

    retrieved: Size
    passed: Size
    shown: Size
    candidates: Size  # of a batch of the student's
    teacher_candidates: Size  # of a batch of the teacher's

    @property
    def report_at(self) -> tuple[int, ...]:
        """The k of `survival@k` and its like: about the shown and the passed."""
        shown, passed, retrieved = self.shown.number, self.passed.number, self.retrieved.number
        wanted = (shown, passed // 4, passed // 2, passed, 2 * passed)
        return tuple(sorted({k for k in wanted if shown <= k <= retrieved}))


def find_funnel_sizes(facts: Facts, roles: Roles) -> FunnelSizes:
    """Counts the candidates of requests that the sample holds whole."""
    whole, doubt = _whole_requests(facts)
    counts = evidence.counts_by(facts.request, whole)
    is_whole = counts > 0
    most = int(counts.max())
    number = int(is_whole.sum())
    retrieved = Size(most, f"the most of {number:,} requests")
    if counts[is_whole].min() < most:
        spread = f"{int(np.median(counts[is_whole])):,} at the median"
        check = "the sample may lack larger requests, which would lose candidates"
        retrieved = Size(most, f"the most of {number:,} requests; {spread}", check)
    if doubt:
        retrieved = retrieved._replace(check=doubt)
    shown = _median_size(facts, roles.shown, whole, is_whole, "shown")
    passed = None
    if roles.level is not None and (roles.level == Stage.PASSED).any():
        passed = _median_size(facts, roles.level >= Stage.PASSED, whole, is_whole, "passed")
    elif roles.teacher:
        known = [facts.columns[guess.column].known for guess in roles.teacher.values()]
        scored = np.any(known, axis=0)
        if not scored.all():
            passed = _median_size(facts, scored, whole, is_whole, "scored by the teacher")
    if shown is None:
        check = "the log does not tell what was shown; how many does a page have?"
        shown = Size(min(_SHOWN_OF_ALL, max(1, most // 4)), "a guess", check)
    shown = shown._replace(number=min(shown.number, most))
    if passed is None:
        guess = max(most // 10, 2 * shown.number)
        check = "the log does not tell what was passed; how many may the final ranker meet?"
        passed = Size(guess, "a guess", check)
    passed = passed._replace(number=int(np.clip(passed.number, shown.number, most)))
    return FunnelSizes(
        retrieved, passed, shown, _candidates(most, shown.number), _teacher_candidates(facts, roles)
    )


def _whole_requests(facts: Facts) -> tuple[Bool[np.ndarray, "rows"], str]:
    """Rows of requests that the sample holds from end to end, and a doubt about them."""
    cut = np.unique(facts.request[facts.sample.edge])
    whole = ~np.isin(facts.request, cut) & (facts.request >= 0)
    if len(facts.sample.edge) and not evidence.is_side_by_side(facts.request):
        everything = facts.request >= 0
        return everything, "the rows of a request lie scattered, and the sample may lack some"
    if not whole.any():
        return facts.request >= 0, "the sample holds no request from end to end"
    return whole, ""


def _median_size(
    facts: Facts,
    mask: Bool[np.ndarray, "rows"] | None,
    whole: Bool[np.ndarray, "rows"],
    is_whole: Bool[np.ndarray, "requests"],
    what: str,
) -> Size | None:
    if mask is None or not (mask & whole).any():
        return None
    counts = evidence.counts_by(facts.request, mask & whole)
    counts = np.pad(counts, (0, len(is_whole) - len(counts)))[is_whole]
    median = int(np.median(counts))
    span = f", {counts.min():,} to {counts.max():,}" if counts.min() < counts.max() else ""
    return Size(max(1, median), f"{what}: the median of {len(counts):,} requests{span}")


def _candidates(retrieved: int, shown: int) -> Size:
    """Smallest power of two that holds the shown ten times over, at most all candidates."""
    room = 2 ** int(np.ceil(np.log2(max(_LEAST_CANDIDATES, 10 * shown))))
    if room >= retrieved:
        return Size(retrieved, "all that are retrieved")
    return Size(room, f"{shown} shown and as many others as make {room}")


def _teacher_candidates(facts: Facts, roles: Roles) -> Size:
    if roles.shown is None:
        counts = evidence.counts_by(facts.request, facts.request >= 0)
        return Size(min(int(counts.max()), 128), "the teacher learns from labels: all have them")
    most = int(evidence.counts_by(facts.request, roles.shown).max(initial=1))
    return Size(max(1, most), "the teacher learns from labels: the most that were shown")
