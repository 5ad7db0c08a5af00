"""Times that are texts, and their formats where a log does not write ISO 8601."""

import itertools
from collections.abc import Sequence

import duckdb
import pyarrow as pa

from kd_ranker.errors import UserError
from kd_ranker.sources.logs.sql import literal

_DAYS = ("%d/%m/", "%m/%d/", "%d.%m.", "%m.%d.", "%d-%m-", "%m-%d-")
_CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M:%S %p")
# Years of two digits only with a clock: 1.2.24 may be the version of a model.
_REST = ("%Y", *(f"{year} {clock}" for year in ("%Y", "%y") for clock in _CLOCKS))
_OTHERS = (
    "%Y%m%d",
    "%Y%m%d%H%M%S",
    "%d %b %Y %H:%M:%S",
    "%d/%b/%Y:%H:%M:%S %z",  # of web servers
    "%a %b %d %H:%M:%S %z %Y",
)
FORMATS = (*map("".join, itertools.product(_DAYS, _REST)), *_OTHERS)
"""The formats that `find_formats` tries."""
# By a wrong format, a time is often far away.
_YEARS = "BETWEEN 1990 AND 2100"


def sql_of_time(text: str, time_format: str) -> str:
    """Return the SQL of the time that a text means, or NULL; the format "" is ISO 8601."""
    if not time_format:
        return f"try_cast({text} AS TIMESTAMPTZ)"
    return f"try_strptime({text}::VARCHAR, {literal(time_format)})"


def check_format(time_format: str) -> None:
    """Raise UserError for a `data.time_format` that no text can have."""
    try:
        with duckdb.connect() as connection:
            connection.execute(f"SELECT {sql_of_time('NULL', time_format)}")
        is_format = not time_format or "%" in time_format
    except duckdb.Error:
        is_format = False
    if not is_format:
        raise UserError(
            f"data.time_format={time_format!r} is no format; write it as for strptime, such as "
            "'%d/%m/%Y %H:%M:%S'"
        )


def find_formats(texts: Sequence[str], formats: Sequence[str] = FORMATS) -> list[str]:
    """Return the formats by which all of some texts are times.

    Days up to the 12th may be months as well; the format by which the times are closest is first.

    >>> find_formats(["24/12/2024 18:00:05"]), find_formats(["soon"])
    (['%d/%m/%Y %H:%M:%S'], [])
    >>> find_formats(["2/3/2024", "4/3/2024"])
    ['%d/%m/%Y', '%m/%d/%Y']
    """
    # Most texts are no times, and one of them tells.
    fitting = _fitting(texts[:1], formats)
    return _fitting(texts, fitting)


def _fitting(texts: Sequence[str], formats: Sequence[str]) -> list[str]:
    if not texts or not formats:
        return []
    selects = [
        f"SELECT {number} AS number, count(*) FILTER (year(time) {_YEARS}) AS times, "
        "epoch(max(time)) - epoch(min(time)) AS span "
        f"FROM (SELECT {sql_of_time('text', each)} AS time FROM texts)"
        for number, each in enumerate(formats)
    ]
    query = f"FROM ({' UNION ALL '.join(selects)}) WHERE times = {len(texts)} ORDER BY span, number"
    with duckdb.connect() as connection:
        connection.register("texts", pa.table({"text": pa.array(texts, pa.string())}))
        rows = connection.execute(query).fetchall()
    return [formats[number] for number, *_ in rows]
