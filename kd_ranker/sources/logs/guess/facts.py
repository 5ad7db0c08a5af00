"""Tables of facts on the columns of a sample, which the engine counts: a row a column.

Each question is asked of the cells of all columns at once, see `cells`. The owner of a candidate is
the request, the user or the item that it belongs to, as the code of that column's value.
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pandas as pd
from ibis import _

from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.guess import names
from kd_ranker.sources.logs.guess.cells import cells_of, elements_of
from kd_ranker.sources.logs.guess.sample import AT, element_kind, kind_of
from kd_ranker.sources.logs.layout import TIME_UNITS

_EARLIEST, _LATEST = 9.5e8, 2.5e9  # 2000 and 2049, in seconds since 1970
# Disagreements that chance would have brought, below which their absence says little: e⁻⁵ < 1%.
_ENOUGH_EXPECTED = 5.0
# Logs have faults, and features of a user may change now and then.
NEARLY_ALWAYS = 0.98
# Values on which agreement within owners is measured: columns × owners × rows.
_MOST_PAIRS = 24_000_000


# A `pandas.DataFrame`, of whose columns no type checker knows.
Table = Any
# Facts on lists, beside those that stand below the names of columns.
ELEMENTS, ZERO_ONE = " elements", " zero_one"


class Cells(NamedTuple):
    """The cells of a table, and the facts on its columns, which stand in the order of their places.

    Attributes:
      engine: what the cells are on.
      table: see `cells.cells_of`.
      facts: of each column by itself: `kind` and `element` (see `sample.kind_of`); `rows` of the
        table, `known` ones, `distinct` values; `same`, the chance that two values are the same one,
        Σ p²; `alone`, values whose rows lie side by side; the least number, `low`, and the largest;
        how many numbers are `zeros`, `ones`, `inside` [0, 1], `whole`, or days of this century in
        `s`, `ms` or `us` since 1970; `places`, the sum of those of known rows; of texts, the mean
        number of `words`, and `digits` if all are numbers. What follows from these is worked out in
        `_with_conclusions`.
    """

    engine: Engine
    table: ir.Table
    facts: Table

    def fetch(self, found: ir.Table, *keys: str) -> Table:
        """A table by some of its columns, places of columns that become the names of these."""
        # Sums of whole numbers come in 128 bits, which pandas takes for objects.
        rows = self.engine.fetch(found).to_pandas().astype(float)
        for key in keys:
            rows[key] = self.facts.index[rows[key].astype(int)]
        return rows.set_index(list(keys))

    def owners(self, *names: str) -> ir.Table:
        """`AT`, `by` (the place of one of these columns) and `owner`, the code of its value."""
        places = np.flatnonzero(self.facts.index.isin(names)).tolist()
        cells = self.table.filter(self.table.column.isin(places))
        return cells.select(AT, by=cells.column, owner=cells.code)

    def thin(self, owners: int) -> "Cells":
        """Some slices of the rows, for the agreement of all columns within so many owners."""
        rows = int(self.facts.rows.max())
        slices = -(-rows * len(self.facts) * owners // _MOST_PAIRS)
        size = -(-rows // (12 * slices))
        return self._replace(table=self.table.filter((self.table[AT] // size) % slices == 0))

    def within(self, owners: ir.Table, columns: pd.Index | None = None) -> Table:
        """Measures how far each column is the same in all rows of an owner.

        A column that mostly holds the same value agrees within any owner, so agreement counts only
        as far as it exceeds that of rows drawn at random.

        Args:
          owners: see `owners`.
          columns: those to tell of, None for all; nothing is known of what these cells lack.

        Returns:
          By `by` of the owners and the column: `owners` that have two values or more; `expected`,
          how many values chance would have differ from that of most rows of their owner, (1 − Σ p²)
          of all but one of each owner; `kappa`, 1 − differing / expected (Cohen, 1960); `told`, if
          there was occasion to differ; `constant`, if it hardly ever does; `repeats`, the share of
          values that an owner has more than once; and `counting`, the share of owners whose values
          are 0 to n − 1, or 1 to n, in some order.
        """
        each = self.table.join(owners, AT).group_by("by", "column", "owner", "code")
        each = each.agg(times=_.count(), number=_.number.min())
        each = each.group_by("by", "column", "owner").agg(
            rows=_.times.sum(),
            most=_.times.max(),
            kinds=_.count(),
            low=_.number.min(),
            span=_.number.max() - _.number.min(),
        )
        several = each.rows > 1
        counts = several & (each.kinds == each.rows) & (each.span == each.rows - 1)
        found = each.group_by("by", "column").agg(
            rows=each.rows.sum(),
            owners=several.sum(),
            later=(each.rows - 1).sum(),
            differing=(each.rows - each.most).sum(),
            kinds=each.kinds.sum(),
            counting=(counts & each.low.isin((0.0, 1.0))).sum(),
        )
        t = self.fetch(found, "by", "column")
        by = t.index.get_level_values("by").unique()
        columns = self.facts.index if columns is None else columns
        t = t.reindex(pd.MultiIndex.from_product([by, columns])).fillna(0)
        expected = t.later * (
            1 - self.facts.same.reindex(columns).reindex(t.index, level=1)
        ).fillna(0)
        kappa = (1 - t.differing / expected.where(expected > 0)).fillna(0)
        told = expected >= _ENOUGH_EXPECTED
        return pd.DataFrame(
            {
                "owners": t.owners.astype(int),
                "expected": expected,
                "kappa": kappa,
                "told": told,
                "constant": told & (kappa >= NEARLY_ALWAYS),
                "repeats": (1 - t.kinds / t.rows.where(t.rows > 0)).fillna(0),
                "counting": t.counting / t.owners.clip(lower=1),
            }
        )

    def where(self, flags: ir.Table | None) -> Table:
        """Counts each column where `is_so` holds of `flags`, which has each `AT`, and elsewhere.

        Returns:
          All is 0 or false without flags.
          `rows_inside` and `rows_outside`; how many of them are known, `inside` and `outside`, and
          1, `ones_inside` and `ones_outside`; `alone`, if it is known nearly only inside, and often
          there; `nothing`, if one value stands for "nothing" outside, and often not inside;
          `anywhere`, if it is about as often 1 outside.
        """
        if flags is None:
            flags = self.table.filter(False).select(AT, is_so=ibis.literal(True))
        each = self.table.join(flags, AT)
        inside = each.is_so.cast("int64")
        values = each.group_by("column", "code").agg(
            number=each.number.min(), inside=inside.sum(), outside=(1 - inside).sum()
        )
        usual = ibis.struct({"outside": values.outside, "inside": values.inside}).max()
        found = values.group_by("column").agg(
            inside=values.inside.sum(),
            outside=values.outside.sum(),
            ones_inside=values.inside.sum(where=values.number == 1),
            ones_outside=values.outside.sum(where=values.number == 1),
            usual_inside=usual["inside"],
            usual_outside=usual["outside"],
        )
        t = self.fetch(found, "column").reindex(self.facts.index).fillna(0).astype(int)
        (rows,) = self.engine.fetch(flags.agg(all=_.count(), inside=_.is_so.sum())).to_pylist()
        t["rows_inside"] = int(rows["inside"] or 0)
        t["rows_outside"] = rows["all"] - t.rows_inside
        t["alone"] = (t.rows_outside > 0) & (t.outside <= 0.01 * t.rows_outside)
        t["alone"] &= (t.inside > 0) & (t.inside >= 0.5 * t.rows_inside)
        t["nothing"] = (t.outside >= 1000) & (t.usual_outside >= 0.999 * t.outside)
        t["nothing"] &= (t.inside > 0) & (t.inside - t.usual_inside >= 0.2 * t.inside)
        rates = t.ones_inside / t.inside.clip(lower=1), t.ones_outside / t.outside.clip(lower=1)
        t["anywhere"] = (t.outside > 0) & (rates[1] >= 0.2 * rates[0])
        return t


def make_cells(engine: Engine, table: ir.Table, name: str) -> Cells:
    """The cells of a table with `AT`, kept under a name, and what each column is by itself."""
    kinds = {of: kind_of(table[of].type()) for of in table.columns if not of.startswith(" ")}
    kinds = {of: kind for of, kind in kinds.items() if kind and element_kind(table, of) != "list"}
    facts = pd.DataFrame({"kind": kinds, "element": {of: element_kind(table, of) for of in kinds}})
    cells = Cells(engine, engine.keep(name, cells_of(table, list(kinds), AT)), facts)
    values = cells.table.group_by("column", "code").agg(
        rows=_.count(), number=_.number.min(), places=_[AT].sum(), span=_[AT].max() - _[AT].min()
    )
    number, times = values.number, values.rows
    # The floor of a number beyond these is out of the engine's range.
    exact = ibis.ifelse(number.abs() < 2.0**53, number, None)
    conditions = {
        "zeros": number == 0,
        "ones": number == 1,
        "inside": number.between(0, 1),
        "whole": exact == exact.floor(),
    } | {unit: number.between(_EARLIEST * by, _LATEST * by) for unit, by in TIME_UNITS.items()}
    counts = {of: times.sum(where=condition) for of, condition in conditions.items()}
    found = values.group_by("column").agg(
        known=times.sum(),
        distinct=values.count(),
        same=(times.cast("float64") * times).sum(),
        alone=(values.span + 1 == times).sum(),
        low=number.min(),
        high=number.max(),
        places=values.places.sum(),
        **counts,
    )
    t = facts.join(cells.fetch(found, "column").reindex(facts.index).fillna(0))
    whole = ["known", "distinct", "alone", *counts]
    t[whole] = t[whole].astype(int)
    t["same"] = (t.same / t.known.where(t.known > 0) ** 2).fillna(1)
    asked: dict[str, ir.Value] = {"rows": table.count()}
    for of in t.index[(t.kind == "string") & (t.known > 0)]:
        spaces = table[of].length() - table[of].replace(" ", "").length()
        is_number = table[of].re_search(r"^\s*-?\d+(\.\d+)?\s*$")
        asked |= {f"words {of}": spaces.mean() + 1, f"digits {of}": is_number.cast("int8").min()}
    (row,) = engine.fetch(table.agg(**asked)).to_pylist()
    t["rows"] = row["rows"]
    t["words"] = [float(row.get(f"words {of}") or 0) for of in t.index]
    t["digits"] = [bool(row.get(f"digits {of}")) for of in t.index]
    return cells._replace(facts=_with_conclusions(t))


def _with_conclusions(t: Table) -> Table:
    """Facts with what follows from them, and from names.

    `is_number`; `is_whole` for whole numbers, or floats as pandas makes of these beside nulls;
    `unit`, in which they count days since 1970; `is_time` and `is_id`, if they may be such;
    `nonsense`, the share that is neither 0 nor 1, and `is_binary` without; `per_value`, the rows of
    a value on average; `side_by_side`, if the rows of nearly all values are; `role`, if the name is
    just that of one; `series`, how many columns are called alike but for a number.
    """
    t["is_number"] = t.kind.isin(["bool", "integer", "float"])
    t["is_whole"] = t.is_number & (t.known > 0) & (t.known == t.whole)
    is_count = t.is_whole & (t.kind != "bool")
    of_unit = t[list(TIME_UNITS)].ge(0.98 * t.known, axis=0)
    t["unit"] = of_unit.idxmax(axis=1).where(of_unit.any(axis=1) & is_count, "")
    t["is_time"] = (t.kind == "time") | (t.unit != "")
    t["is_id"] = is_count | ((t.kind == "string") & (t.known > 0))
    right = (t.zeros + t.ones).where(t.is_number, 0)
    t["nonsense"] = (1 - right / t.known.where(right > 0)).fillna(1)
    t["is_binary"] = t.nonsense == 0
    t["per_value"] = t.known / t.distinct.clip(lower=1)
    t["side_by_side"] = t.alone >= 0.9 * t.distinct
    t["role"] = [names.role_of(of) for of in t.index]
    alike = pd.Series([re.sub(r"\d+", "#", of) for of in t.index], t.index)
    t["series"] = alike.map(alike.value_counts())
    return t


def find_lists(cells: Cells, table: ir.Table, among: Collection[str]) -> Table:
    """Counts what some columns of lists hold; those that hold no element are left out.

    Args:
      cells: those with whose values elements are compared.
      table: of the lists.
      among: columns of the table; of these, those of lists are read.

    Returns:
      By column: how many different `ELEMENTS` its lists hold; `ZERO_ONE`, if these are 0 and 1
      alone; and below the name of each other column, the share of elements that are values of that.
    """
    lists = [of for of in cells.facts.index if of in among and element_kind(table, of)]
    if not lists:
        return pd.DataFrame(columns=[ELEMENTS, ZERO_ONE])
    counts = elements_of(table, lists).group_by("column", "code")
    counts = counts.agg(times=_.count(), number=_.number.min())
    facts = counts.group_by("column").agg(
        times=_.times.sum(),
        **{ELEMENTS: _.count(), ZERO_ONE: _.number.isin((0.0, 1.0)).sum() == _.count()},
    )
    values = cells.table.select(other="column", code="code").distinct()
    shared = counts.join(values, "code").group_by("column", "other").agg(times=_.times.sum())
    t, of_others = (cells.engine.fetch(of).to_pandas().astype(float) for of in (facts, shared))
    t = t.set_index("column")
    listed = of_others.pivot(index="column", columns="other", values="times").div(t.times, axis=0)
    listed.columns = cells.facts.index[listed.columns.astype(int)]
    t = t.drop(columns="times").join(listed).fillna(0)
    return t.set_axis([lists[int(place)] for place in t.index])
