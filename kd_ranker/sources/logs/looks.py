"""Hints on a column with numbers that do not fit its use in the config."""

import numpy as np
from jaxtyping import Float64

from kd_ranker.sources.logs.layout import TIME_UNITS, LogLayout

# Times outside of this range were read in the wrong unit.
EARLIEST, LATEST = (np.datetime64(f"{year}-01-01", "s") for year in (1990, 2100))
# The largest request has a remark beyond this multiple of the median.
_FAR = 5
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}


def time_hint(numbers: Float64[np.ndarray, "n"], layout: LogLayout) -> str:
    """Return the unit in which numbers of the time column are recent, in words.

    It is "" if that is the unit of the config, or if there are no numbers.
    """
    if not len(numbers):
        return ""
    middle = np.median(numbers)
    earliest, latest = (limit.astype(np.int64) for limit in (EARLIEST, LATEST))
    for unit, per_second in (*TIME_UNITS.items(), ("ns", 10**9)):
        if earliest <= middle / per_second < latest:
            if per_second == layout.units_per_second:
                return ""
            if unit not in TIME_UNITS:
                return "; its numbers look like nanoseconds: make them timestamps"
            return f"; its numbers look like {_NAMES[unit]}: try --config.data.time_unit={unit}"
    return f"; its numbers, such as {middle:.10g}, do not look like times"


def probability_hint(numbers: Float64[np.ndarray, "n"]) -> str:
    """Return the range of numbers that should be probabilities, in words."""
    if not len(numbers):
        return ""
    low, high = numbers.min(), numbers.max()
    found = f"{low:.4g} to {high:.4g}"
    if low < 0:
        return f"{found}: logits? then take their sigmoid, or set data.teacher_signal='score'"
    return f"{found}: percentages? then divide by 100" if high <= 100 else found


def label_hint(numbers: Float64[np.ndarray, "n"]) -> str:
    """Return the most frequent number of a column of labels except 0 and 1, in words."""
    others, times = np.unique(numbers[(numbers != 0) & (numbers != 1)], return_counts=True)
    return f"for example {others[times.argmax()]:.4g}" if len(others) else ""


def size_hint(median: float, high: float, most: float) -> str:
    """Return a remark if the largest request is far larger than the others, else "".

    Args:
      median: the median of their numbers.
      high: the 99.9% quantile.
      most: the largest number.
    """
    if most <= _FAR * median:
        return ""
    return (
        f"the largest request has {most:,.0f} candidates; the median is {median:,.0f}, the 99.9% "
        f"quantile {high:,.0f}: if it is an error, set config.funnel.retrieved={high:.0f}, which "
        "rejects the candidates beyond"
    )
