"""Ids of users, items and values: whole numbers, the most frequent in training first."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis import _

from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.grouped import Grouped
from kd_ranker.sources.logs.layout import Feature, LogLayout
from kd_ranker.sources.logs.typed import features_of, raw_name

_TRAIN = SPLITS.index("train")
_PLACE = ("file", "row", "place")


class Numbered(NamedTuple):
    """The tables of what has ids.

    Attributes:
      users: `value`, `id`, `train` and `total`: in how many requests of training, and of all.
      items: the same in candidates, and the features of each, of its last row.
      requests: a row a request: those of `Grouped`, with its features, of its first row.
      values: categorical feature that is not hashed -> `value`, `id`, `train` and `total`. The ids
        count from 1, and rare values have none.
    """

    users: ir.Table
    items: ir.Table
    requests: ir.Table
    values: dict[str, ir.Table]


def number(
    engine: Engine,
    layout: LogLayout,
    log: ir.Table,
    unfolded: ir.Table,
    grouped: Grouped,
    known: Mapping[str, pa.Table] | None = None,
) -> Numbered:
    """Settles ids, from the training requests.

    Users and items get an id each, those of training requests first, the most frequent before the
    others, and then those that no training request has: so these keep their features, and are
    told from each other where ids are hashed. A model that looks ids up has no trained row for
    them and serves its reserved one. Of a categorical feature the `size` most frequent values of
    training requests are kept; those of an item count as often as it is a candidate.

    With `known`, the `value` and `id` of each `user` and `item` of an earlier log, these keep their
    ids, the others get those that follow, in the order of their values, and no values are counted.
    """

    def with_ids(counted: ir.Table, name: str) -> ir.Table:
        if known is None:
            return _with_ids(counted)
        table = engine.put(f"known_{name}", known[name].rename_columns(["value", "known"]))
        return _with_known_ids(counted, table, len(known[name]))

    users = engine.keep("users", with_ids(_counted(grouped.requests, "user"), "user"))
    items = _counted(grouped.candidates, "item", at=grouped.candidates["at"].max())
    items = with_ids(_with_last_place(items, grouped.candidates), "item")
    if layout.of("item"):
        items = _with_features(items, unfolded, layout.of("item"), _PLACE)
    items = engine.keep("items", items)
    features = layout.of("user", "context")
    requests = _with_features(grouped.requests, log, features, ("file", "row"))
    requests = engine.keep("request_rows", requests)
    tables = {"item": items, "candidate": grouped.candidates}
    values: dict[str, ir.Table] = {}
    for feature in layout.features if known is None else ():
        if feature.kind in ("category", "bag") and not feature.hashed:
            counted = _values(feature, tables.get(feature.of, requests))
            kept = ibis.row_number().over(order_by=[ibis.desc("train"), "value"])
            known = (kept < feature.size) & (counted.train > 0)
            values[feature.name] = engine.keep(
                f"values_{len(values)}",
                counted.mutate(id=ibis.ifelse(known, kept + 1, None)),
            )
    return Numbered(users, items, requests, values)


def _with_features(
    rows: ir.Table, log: ir.Table, features: Sequence[Feature], place: Sequence[str]
) -> ir.Table:
    """The rows with features as the log has them at their place, as `raw:<name>`, and typed."""
    raw = {raw_name(feature): log[feature.column] for feature in features}
    # Typed behind the join: lists of all rows would take longer than all else.
    joined = rows.join(log.select(*place, **raw), place)
    return joined.mutate(**features_of(joined, features, raw_name))


def _with_last_place(items: ir.Table, candidates: ir.Table) -> ir.Table:
    """The items with the place of the last row of each, which has the time `at`."""
    # Times first: the places of all rows would take much longer to compare.
    of_last = candidates.join(items, [candidates.item == items.value, "at"])
    place = ibis.struct({name: of_last[name] for name in _PLACE}).max()
    places = of_last.group_by("value").agg(place=place)
    items = items.join(places, "value")
    return items.mutate(**{name: items.place[name] for name in _PLACE}).drop("at")


def _counted(table: ir.Table, name: str, **more: ir.Value) -> ir.Table:
    in_train = (table.split == _TRAIN).cast("int64").sum()
    return table.group_by(value=table[name]).agg(train=in_train, total=_.count(), **more)


def _with_ids(counted: ir.Table) -> ir.Table:
    """The same with ids from 0; values that training lacks stand last, by how often they occur."""
    elsewhere = ibis.ifelse(counted.train > 0, 0, counted.total)
    order = [ibis.desc(counted.train), ibis.desc(elsewhere), counted.value]
    return counted.mutate(id=ibis.row_number().over(order_by=order))


def _with_known_ids(counted: ir.Table, known: ir.Table, size: int) -> ir.Table:
    """The same with the ids of those that are known, below `size`, and new ones for the others."""
    joined = counted.left_join(known, "value").drop("value_right")
    new = ibis.row_number().over(group_by=joined.known.isnull(), order_by=joined.value)
    return joined.mutate(id=ibis.coalesce(joined.known.cast("int64"), size + new)).drop("known")


def _values(feature: Feature, table: ir.Table) -> ir.Table:
    """The values of a feature, and how often they occur: an item's as often as that is."""
    weights = {
        "train": table.train if feature.of == "item" else (table.split == _TRAIN).cast("int64"),
        "total": table.total if feature.of == "item" else ibis.literal(1, "int64"),
    }
    values = table[f"feature:{feature.name}"]
    rows = table.select(value=values if feature.kind == "category" else values.unnest(), **weights)
    return (
        rows.filter(rows.value.notnull())
        .group_by("value")
        .agg(train=_.train.sum(), total=_.total.sum())
    )


def counts_of_ids(engine: Engine, numbered: Numbered) -> dict[str, int]:
    """The numbers of users and items, and of those that training lacks."""
    found: dict[str, int] = {}
    for name, table in (("users", numbered.users), ("items", numbered.items)):
        counts = table.agg(all=_.count(), other=(_.train == 0).sum())
        (row,) = engine.fetch(counts).to_pylist()
        found |= {name: row["all"], f"{name}_not_in_train": int(row["other"] or 0)}
    return found


def counts_of_values(engine: Engine, values: ir.Table) -> dict[str, int]:
    """The number of values of a feature in training, and how often kept ones and all occur."""
    elsewhere, kept = values.total - values.train, values.id.notnull()
    counts = values.agg(
        values_in_train=(values.train > 0).sum(),
        values_kept=kept.sum(),
        train=values.train.sum(),
        elsewhere=elsewhere.sum(),
        train_kept=values.train.sum(where=kept),
        elsewhere_kept=elsewhere.sum(where=kept),
    )
    (row,) = engine.fetch(counts).to_pylist()
    return {name: int(number or 0) for name, number in row.items()}


def counts_of_history(engine: Engine, layout: LogLayout, numbered: Numbered) -> dict[str, int]:
    """The number of events in histories, and of those whose item is never a candidate."""
    if layout.history is None:
        return {}
    events = numbered.requests[f"feature:{layout.history.name}"].unnest()
    events = numbered.requests.select(value=events)
    known = events.semi_join(numbered.items, "value")
    total = engine.count(events)
    return {
        "history_events": total,
        "history_events_of_unknown_items": total - engine.count(known),
    }
