"""A table as cells, a row a value: what is asked of one column is asked so of all at once."""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

from kd_ranker.sources.logs.guess.ibis_leaks import number_of


def cells_of(table: ir.Table, names: Sequence[str], *keys: str) -> ir.Table:
    """The values of some columns, one below the other; missing ones are left out.

    A cell has `keys`, `column` (the place of its column in `names`), `code` (a hash of the value of
    64 bits, the same for equal values of a type) and `number` (the value; none where it is no
    number).
    """
    return ibis.union(*(_cells(table, name, place, keys) for place, name in enumerate(names)))


def elements_of(table: ir.Table, names: Sequence[str], *keys: str) -> ir.Table:
    """The elements of some columns of lists, as the values of `cells_of`."""
    lists = [table.select(*keys, **{name: table[name].unnest()}) for name in names]
    parts = zip(lists, names, strict=True)
    return ibis.union(*(_cells(of, name, place, keys) for place, (of, name) in enumerate(parts)))


def _cells(table: ir.Table, name: str, place: int, keys: Sequence[str]) -> ir.Table:
    known = table.filter(table[name].notnull())
    value = known[name]
    is_number = value.type().is_numeric() or value.type().is_boolean()
    number = number_of(value) if is_number else ibis.null("float64")
    column = ibis.literal(place, "int16")
    return known.select(*keys, column=column, code=value.hash(), number=number)
