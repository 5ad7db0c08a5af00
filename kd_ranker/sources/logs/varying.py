"""Counts of values that differ where a log should say the same: in a request, and of an item."""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.grouped import Grouped
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.typed import features_of, id_of, raw_name


def count_varying(
    engine: Engine, layout: LogLayout, log: ir.Table, unfolded: ir.Table, grouped: Grouped
) -> dict[str, int]:
    """Feature -> how many requests, or items, have several values of it."""
    of_requests = [of for of in layout.of("user", "context") if of.kind in ("dense", "category")]
    keys = [name for name in ("request", "user") if name in layout.columns]
    ids = {name: id_of(log[layout.columns[name]]) for name in keys}
    rows = log.select(**ids, **_raw(log, of_requests))
    owners = grouped.requests.select(keys)
    of_items = layout.of("item")
    item = id_of(unfolded[layout.columns["item"]])
    items = unfolded.select(item=item, **_raw(unfolded, of_items))
    items = items.filter(items.item.notnull())
    return _count(engine, rows, of_requests, owners) | _count(engine, items, of_items, None)


def _count(
    engine: Engine, rows: ir.Table, features: Sequence[Feature], owners: ir.Table | None
) -> dict[str, int]:
    """The numbers for rows of `raw:<name>` and of what they are of.

    Args:
      engine: what has read the log.
      rows: all of them.
      features: which have names in them.
      owners: those whose rows count; None for all.
    """
    if not features:
        return {}
    keys = [name for name in rows.columns if not name.startswith("raw:")]
    # Most have one value of all features: the hash of these says so at a look at each row.
    names = dict.fromkeys(map(raw_name, features))
    whole = ibis.struct({name: rows[name] for name in names}).hash()
    some = rows.group_by(keys).agg(low=whole.min(), high=whole.max())
    some = some.filter(some.low != some.high).select(keys)
    some = engine.keep(
        f"varying_{keys[0]}", some if owners is None else some.semi_join(owners, keys)
    )
    if not engine.count(some):
        return {feature.name: 0 for feature in features}
    rows = rows.semi_join(some, keys)
    typed = rows.mutate(**features_of(rows, features, raw_name))
    varies = typed.group_by(keys).agg(**{of.name: _varies(typed, of) for of in features})
    (row,) = engine.fetch(
        varies.agg(**{of.name: varies[of.name].sum() for of in features})
    ).to_pylist()
    return {name: int(number or 0) for name, number in row.items()}


def _raw(table: ir.Table, features: Sequence[Feature]) -> dict[str, ir.Value]:
    return {raw_name(feature): table[feature.column] for feature in features}


def _varies(table: ir.Table, feature: Feature) -> ir.BooleanValue:
    value = table[f"feature:{feature.name}"]
    if feature.kind == "bag":  # which has no order
        value = ibis.ifelse(value.length() > 0, value, None).sort()
    some_missing = (value.count() > 0) & (value.isnull().sum() > 0)
    return ((value.min() != value.max()) | some_missing).fill_null(False)
