"""Guesses at what the numbers of a column are that do not fit what the config takes them for."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.files import Log
from kd_ranker.sources.logs.layout import TIME_UNITS, LogLayout

# Of the times of a feed: what lies outside was read in the wrong unit.
EARLIEST, LATEST = (np.datetime64(f"{year}-01-01", "s") for year in (1990, 2100))
# Numbers that are enough to tell.
_SOME = 1000
# Times the median, beyond which the largest request is a remark.
_FAR = 5
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}


def time_hint(log: Log, layout: LogLayout) -> str:
    """The unit that makes recent times of the numbers of the time column, in words.

    It is "" where that is the unit that they are read in, or where these are no numbers.
    """
    numbers = _some_numbers(log, layout.columns["time"])
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
    return f"; its numbers, such as {middle:.10g}, look like no time"


def probability_hint(log: Log, column: str) -> str:
    """The kind of numbers that a column holds that should be probabilities, in words."""
    numbers = _some_numbers(log, column)
    if not len(numbers):
        return ""
    low, high = numbers.min(), numbers.max()
    told = f"{low:.4g} to {high:.4g}"
    if low < 0:
        return f"{told}: logits? then take their sigmoid"
    return f"{told}: percentages? then divide by 100" if high <= 100 else told


def label_hint(log: Log, column: str) -> str:
    """The number that a column of labels holds most, 0 and 1 apart, in words."""
    numbers = _some_numbers(log, column)
    others, times = np.unique(numbers[(numbers != 0) & (numbers != 1)], return_counts=True)
    return f"{others[times.argmax()]:.4g}, say" if len(others) else ""


def _some_numbers(log: Log, column: str) -> Float64[np.ndarray, "n"]:
    """The first numbers of a column that are there and finite; none if it holds something else."""
    found, number = [np.zeros(0)], 0
    if column not in log.names:  # one that folders give
        return found[0]
    for _, _, batch in files.read_parts(log, log.parts, [column], _SOME):
        array = batch.column(0)
        while files.is_list(array.type):
            array = array.flatten()
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            break
        values = array.drop_null().to_numpy(zero_copy_only=False).astype(np.float64)
        found.append(values[np.isfinite(values)])
        number += len(found[-1])
        if number >= _SOME:
            break
    return np.concatenate(found)


def size_hint(median: float, high: float, most: float) -> str:
    """A remark on the candidates of requests if the largest is far from the rest, else "".

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
