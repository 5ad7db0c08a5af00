"""Counts of values that differ where a log should say the same: in a request, and of an item."""

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.grouped import Grouped
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.typed import features_of, id_of


def count_varying(
    engine: Engine, layout: LogLayout, log: ir.Table, unfolded: ir.Table, grouped: Grouped
) -> dict[str, int]:
    """Feature -> how many requests, or items, have several values of it."""
    of_requests = [of for of in layout.of("user", "context") if of.kind in ("dense", "category")]
    ids = {name: id_of(log[layout.columns[name]]) for name in ("request", "user")}
    rows = log.select(**ids, **features_of(log, of_requests))
    rows = rows.join(grouped.requests.select("request", "user"), ["request", "user"])
    items = unfolded.select(
        item=id_of(unfolded[layout.columns["item"]]), **features_of(unfolded, layout.of("item"))
    )
    found: dict[str, int] = {}
    for table, key, features in (
        (rows, "request", of_requests),
        (items.filter(items.item.notnull()), "item", layout.of("item")),
    ):
        if features:
            varies = table.group_by(key).agg(**{of.name: _varies(table, of) for of in features})
            counts = varies.agg(**{of.name: varies[of.name].sum() for of in features})
            (row,) = engine.fetch(counts).to_pylist()
            found |= {name: int(number or 0) for name, number in row.items()}
    return found


def _varies(table: ir.Table, feature: Feature) -> ir.BooleanValue:
    value = table[f"feature:{feature.name}"]
    if feature.kind == "bag":  # which has no order
        value = ibis.ifelse(value.length() > 0, value, None).sort()
    some_missing = (value.count() > 0) & (value.isnull().sum() > 0)
    return ((value.min() != value.max()) | some_missing).fill_null(False)
