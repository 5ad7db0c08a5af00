"""The rows of a log as they lie there."""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.layout import LogLayout


class Scan(NamedTuple):
    """Numbers of a log.

    Attributes:
      rows: of the log.
      entries: its candidates; a row without any counts as one.
    """

    rows: int
    entries: int


def scan(engine: Engine, layout: LogLayout, log: ir.Table) -> Scan:
    """Counts the rows of a log."""
    entries = log.count()
    if layout.by_request:
        lengths = ibis.coalesce(log[layout.columns["item"]].length(), 0)
        entries = ibis.greatest(lengths, 1).sum()
    (found,) = engine.fetch(log.agg(rows=log.count(), entries=entries)).to_pylist()
    return Scan(int(found["rows"]), int(found["entries"] or 0))
