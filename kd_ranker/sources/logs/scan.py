"""The rows of a log as they lie there: how many, and how far from the order of time."""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.typed import seconds_of


class Scan(NamedTuple):
    """Numbers of a log.

    Attributes:
      rows: of the log.
      entries: its candidates; a row without any counts as one.
      steps_back: how many rows have an earlier time than the row before.
    """

    rows: int
    entries: int
    steps_back: int


def scan(engine: Engine, layout: LogLayout, log: ir.Table) -> Scan:
    """Counts the rows of a log."""
    entries: ir.Value = ibis.literal(1)
    if layout.by_request:
        entries = ibis.greatest(ibis.coalesce(log[layout.columns["item"]].length(), 0), 1)
    time = seconds_of(log[layout.columns["time"]], layout.units_per_second)
    rows = log.select("file", "row", time=time, entries=entries)
    counts = rows.agg(rows=rows.count(), entries=rows.entries.sum())
    (whole,) = engine.fetch(counts).to_pylist()
    timed = rows.filter(rows.time.notnull())
    before = timed.time.lag().over(order_by=["file", "row"])
    back = timed.mutate(before=before)
    steps = engine.count(back.filter(back.time < back.before))
    return Scan(int(whole["rows"]), int(whole["entries"] or 0), steps)
