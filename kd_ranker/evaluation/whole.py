"""The requests that a final ranker scored whole: only they show what it would have chosen.

Where it scored no more than was passed to it, the others count as worth nothing, and the early
ranker that filled the log needs too few candidates. So if a log has some requests with all scores,
the funnel is measured on these.
"""

import numpy as np
from jaxtyping import Bool

from kd_ranker.requests.columns import LEAST_WHOLE, Columns, slices


def whole_requests(columns: Columns) -> Bool[np.ndarray, "n"] | None:
    """Return which requests of a split have a score for nearly all candidates, passed or not.

    Requests of which all candidates were passed do not count, as they are the small ones. None if
    all requests of a split are scored whole, or no other one is: the funnel is then measured on
    all.
    """
    counts = columns.counts
    may_be_whole = counts.scored >= counts.retrieved
    if may_be_whole.all():
        return None
    may_be_whole &= counts.retrieved > counts.passed
    if not may_be_whole.any():
        return None
    is_whole = np.zeros(len(columns), bool)
    for part in slices(counts.retrieved):
        of_part = counts.of(part)
        values = columns.candidates.fields(part, of_part.retrieved)["teacher_probability"]
        request = np.repeat(np.arange(len(of_part.retrieved)), of_part.retrieved)
        is_known = ~np.isnan(values).any(axis=1)
        known = np.bincount(request, weights=is_known, minlength=len(of_part.retrieved))
        is_whole[part] = may_be_whole[part] & (known >= LEAST_WHOLE * of_part.retrieved)
    return is_whole if is_whole.any() else None
