"""Facts on the columns of a sample, which the engine counts: what a column is, and depends on.

Each question is asked of the cells of all columns at once, see `cells`. The owner of a candidate is
the request, the user or the item that it belongs to, as the code of that column's value.
"""

import dataclasses
import decimal
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
from ibis import _

from kd_ranker.sources.logs.cells import cells_of, elements_of
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.logs.guess.sample import AT, element_kind, kind_of
from kd_ranker.sources.logs.layout import TIME_UNITS

_EARLIEST, _LATEST = 9.5e8, 2.5e9  # 2000 and 2049, in seconds since 1970
# Disagreements that chance would have brought, below which their absence says little: e⁻⁵ < 1%.
_ENOUGH_EXPECTED = 5.0
# Logs have faults, and features of a user may change now and then.
NEARLY_ALWAYS = 0.98
# Values on which agreement within owners is measured: columns × owners × rows.
_MOST_PAIRS = 24_000_000


class Within(NamedTuple):
    """The extent to which a column is the same in all rows of an owner.

    Attributes:
      owners: owners with two values or more, null aside.
      expected: how many values chance would have differ from that of most rows of their owner:
        (1 − Σ p²) of all but one of each owner, with p the share of a value in the sample.
      differing: how many do.
      repeats: the share of values that an owner has more than once, counted after their first.
      counting: the share of `owners` whose values are 0 to n − 1, or 1 to n, in some order.
    """

    owners: int = 0
    expected: float = 0.0
    differing: int = 0
    repeats: float = 0.0
    counting: float = 0.0

    @property
    def kappa(self) -> float:
        """1 − differing / expected: 1 for a constant, 0 for what does not care about owners.

        It is Cohen's kappa (1960), of each value and that of most rows of its owner.
        """
        return 1 - self.differing / self.expected if self.expected > 0 else 0.0

    @property
    def is_known(self) -> bool:
        """True if there was occasion to differ."""
        return self.expected >= _ENOUGH_EXPECTED

    @property
    def is_constant(self) -> bool:
        """True if the column is constant within each owner, and might not have been."""
        return self.is_known and self.kappa >= NEARLY_ALWAYS


UNKNOWN = Within()


class Where(NamedTuple):
    """Counts of a column where something holds (inside), and elsewhere (outside).

    `ones` count the value 1, and `usual` the value that is the most frequent one outside.
    """

    rows_inside: int
    rows_outside: int
    inside: int = 0
    outside: int = 0
    ones_inside: int = 0
    ones_outside: int = 0
    usual_inside: int = 0
    usual_outside: int = 0

    @property
    def is_known_inside_alone(self) -> bool:
        """True if it is known nearly only inside, and often there."""
        is_alone = self.rows_outside > 0 and self.outside <= 0.01 * self.rows_outside
        return is_alone and 0 < 0.5 * self.rows_inside <= self.inside

    @property
    def is_nothing_outside(self) -> bool:
        """True if one value stands for "nothing" outside, and often not inside."""
        is_usual = self.outside >= 1000 and self.usual_outside >= 0.999 * self.outside
        return is_usual and 0 < 0.2 * self.inside <= self.inside - self.usual_inside

    @property
    def is_one_anywhere(self) -> bool:
        """True if it is about as often 1 outside: nobody can click on what is not shown."""
        rates = self.ones_inside / max(self.inside, 1), self.ones_outside / max(self.outside, 1)
        return self.outside > 0 and rates[1] >= 0.2 * rates[0]


@dataclasses.dataclass(frozen=True)
class Fact:
    """All that is known of a column; what is not known yet has its default.

    Attributes:
      name, kind, element: its name, see `sample.kind_of`, and the kind of the elements of lists.
      rows, known, distinct: of the table; of them, with a value; different values.
      same: the chance that two values, drawn at random, are the same one: Σ p².
      alone: values whose rows lie side by side.
      low, high: the least and the largest number; 0 without any.
      zeros, ones, inside, whole: how many numbers are 0, are 1, are in [0, 1], are whole.
      s, ms, us: how many are days of this century, in this unit since 1970.
      places: Σ of the places of known rows, to tell columns that are known in the same rows.
      words, digits: of texts, the mean number of words; True if all are numbers.
      match: `names.match` of its name for the role in question.
      of_request: True if it is the same for all candidates of a request.
      in_request, in_item, in_user: its agreement within these owners.
      follows: other columns that are constant within each of its values.
      time: one of them that may be a time.
      apart: True if another column never repeats within a value of it.
      listed: a column of lists of its values.
      words_mean: True if its values are words for stages.
      labelled: True if labels are known, or 1, for one value of it alone.
      shown, passed: where candidates were shown, or passed; None if the log does not tell.
      series: how many columns are called like it but for a number, itself among them.
      tests: how many columns may be labels.
      foretold: a score that foretells it.
      of, owners: whom it belongs to, and how many of these there are.
      told: label, or "shown" -> the share of its uncertainty that the column tells.
      against: a reason against a column of requests as a feature.
    """

    name: str
    kind: str
    element: str
    rows: int
    known: int = 0
    distinct: int = 0
    same: float = 1.0
    alone: int = 0
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    ones: int = 0
    inside: int = 0
    whole: int = 0
    s: int = 0
    ms: int = 0
    us: int = 0
    places: int = 0
    words: float = 0.0
    digits: bool = False
    match: int = 0
    of_request: bool = False
    in_request: Within = UNKNOWN
    in_item: Within = UNKNOWN
    in_user: Within = UNKNOWN
    follows: tuple[str, ...] = ()
    time: str = ""
    apart: bool = False
    listed: str = ""
    words_mean: bool = False
    labelled: bool = False
    shown: Where | None = None
    passed: Where | None = None
    tests: int = 1
    series: int = 1
    foretold: str = ""
    of: str = ""
    owners: int = 0
    told: Mapping[str, float] = dataclasses.field(default_factory=dict)
    against: str = ""

    def but(self, **changes: Any) -> "Fact":
        """The same column with more that is known of it."""
        return dataclasses.replace(self, **changes)

    @property
    def is_number(self) -> bool:
        """True for numbers and truth values."""
        return self.kind in ("bool", "integer", "float")

    @property
    def is_whole(self) -> bool:
        """True if the values are whole numbers, or floats as pandas makes of these beside nulls."""
        return self.is_number and 0 < self.known == self.whole

    def is_binary(self, nonsense: float = 0.0) -> bool:
        """True if values are 0 and 1, or truth values, but for a share of nonsense."""
        right = self.zeros + self.ones
        return self.is_number and right > 0 and right >= (1 - nonsense) * self.known

    @property
    def time_unit(self) -> str:
        """The unit in which numbers count from 1970 to a day of this century; "" if in none."""
        units = [unit for unit in TIME_UNITS if getattr(self, unit) >= 0.98 * self.known]
        return units[0] if units and self.is_whole and self.kind != "bool" else ""

    @property
    def may_be_time(self) -> bool:
        """True if it holds times: by its type, or as numbers of this century's days."""
        return self.kind == "time" or bool(self.time_unit)

    @property
    def may_be_id(self) -> bool:
        """True for whole numbers and texts."""
        is_number = self.is_whole and self.kind != "bool"
        return self.known > 0 and (is_number or self.kind == "string")

    @property
    def size(self) -> float:
        """Rows a value."""
        return self.known / max(self.distinct, 1)


class Cells(NamedTuple):
    """The cells of a table, and what each of its columns is, in the order of their places."""

    engine: Engine
    table: ir.Table
    columns: dict[str, Fact]

    def owners(self, *names: str) -> ir.Table:
        """`AT`, `by` (the place of one of these columns) and `owner`, the code of its value."""
        places = [place for place, name in enumerate(self.columns) if name in names]
        cells = self.table.filter(self.table.column.isin(places))
        return cells.select(AT, by=cells.column, owner=cells.code)

    def thin(self, owners: int) -> "Cells":
        """Some slices of the rows, for the agreement of all columns within so many owners."""
        rows = max(fact.rows for fact in self.columns.values())
        slices = -(-rows * len(self.columns) * owners // _MOST_PAIRS)
        size = -(-rows // (12 * slices))
        return self._replace(table=self.table.filter((self.table[AT] // size) % slices == 0))

    def named(self, found: ir.Table) -> list[dict]:
        """The rows of a table, with the names of columns for their places."""
        names = list(self.columns)
        rows = self.engine.fetch(found).to_pylist()
        # Sums of whole numbers come in 128 bits, which are decimals here.
        rows = [
            {key: int(x) if isinstance(x, decimal.Decimal) else x for key, x in row.items()}
            for row in rows
        ]
        return [
            row | {key: names[row[key]] for key in ("column", "by", "other") if key in row}
            for row in rows
        ]

    def within(self, owners: ir.Table) -> dict[str, dict[str, Within]]:
        """Measures how far each column is constant within each owner of `owners`, by `by`.

        A column that mostly holds the same value agrees within any owner, so agreement counts only
        as far as it exceeds that of rows drawn at random.
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
        result: dict[str, dict[str, Within]] = {}
        for row in self.named(found):
            of_owner = result.setdefault(row["by"], dict.fromkeys(self.columns, UNKNOWN))
            of_owner[row["column"]] = Within(
                owners=row["owners"],
                expected=row["later"] * (1 - self.columns[row["column"]].same),
                differing=row["differing"],
                repeats=1 - row["kinds"] / row["rows"],
                counting=(row["counting"] or 0) / max(row["owners"], 1),
            )
        return result

    def where(self, flags: ir.Table) -> dict[str, Where]:
        """Counts each column where `is_so` holds of `flags`, which has each `AT`, and elsewhere."""
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
        (rows,) = self.engine.fetch(flags.agg(all=_.count(), inside=_.is_so.sum())).to_pylist()
        rows_inside = int(rows["inside"] or 0)
        nothing = Where(rows_inside, rows["all"] - rows_inside)
        counted = {row.pop("column"): row for row in self.named(found)}
        return {
            name: nothing._replace(**{side: n or 0 for side, n in counted.get(name, {}).items()})
            for name in self.columns
        }


def make_cells(engine: Engine, table: ir.Table, name: str) -> Cells:
    """The cells of a table with `AT`, kept under a name, and what each column is by itself."""
    kinds = {of: kind_of(table[of].type()) for of in table.columns if not of.startswith(" ")}
    kinds = {of: kind for of, kind in kinds.items() if kind and element_kind(table, of) != "list"}
    cells, rows = engine.keep(name, cells_of(table, list(kinds), AT)), engine.count(table)
    columns = {of: Fact(of, kind, element_kind(table, of), rows) for of, kind in kinds.items()}
    values = cells.group_by("column", "code").agg(
        rows=_.count(), number=_.number.min(), places=_[AT].sum(), span=_[AT].max() - _[AT].min()
    )
    number, times = values.number, values.rows
    conditions = {
        "zeros": number == 0,
        "ones": number == 1,
        "inside": number.between(0, 1),
        "whole": (number.abs() < 2.0**53) & (number == number.floor()),
    } | {unit: number.between(_EARLIEST * by, _LATEST * by) for unit, by in TIME_UNITS.items()}
    facts = values.group_by("column").agg(
        known=times.sum(),
        distinct=values.count(),
        same=(times.cast("float64") * times).sum(),
        alone=(values.span + 1 == times).sum(),
        low=number.min(),
        high=number.max(),
        places=values.places.sum(),
        **{of: times.sum(where=condition) for of, condition in conditions.items()},
    )
    found = Cells(engine, cells, columns)
    alike = Counter(_series(of) for of in columns)
    for row in found.named(facts):
        counted = {key: value for key, value in row.items() if value is not None}
        fact = columns[counted.pop("column")]
        columns[fact.name] = fact.but(
            **counted
            | {"same": row["same"] / row["known"] ** 2, "series": alike[_series(fact.name)]}
        )
    texts = [of for of, fact in columns.items() if fact.kind == "string" and fact.known]
    asked: dict[str, ir.Value] = {}
    for of in texts:
        spaces = table[of].length() - table[of].replace(" ", "").length()
        is_number = table[of].re_search(r"^\s*-?\d+(\.\d+)?\s*$")
        asked |= {f"words {of}": spaces.mean() + 1, f"digits {of}": is_number.cast("int8").min()}
    (row,) = engine.fetch(table.agg(rows=_.count(), **asked)).to_pylist()
    for of in texts:
        columns[of] = columns[of].but(words=row[f"words {of}"], digits=bool(row[f"digits {of}"]))
    return found


def _series(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class Lists(NamedTuple):
    """A column of lists.

    Attributes:
      distinct: different elements.
      listed: other column -> the share of the elements that are values of it.
      is_binary: True if elements are 0 and 1 alone.
    """

    distinct: int
    listed: dict[str, float]
    is_binary: bool


def find_lists(cells: Cells, table: ir.Table, among: Collection[str]) -> dict[str, Lists]:
    """Counts what some columns of lists hold; those that hold no element are left out.

    Args:
      cells: those with whose values elements are compared.
      table: of the lists.
      among: columns of the table; of these, those of lists are read.
    """
    names = [name for name in cells.columns if name in among and element_kind(table, name)]
    if not names:
        return {}
    elements = elements_of(table, names)
    counts = elements.group_by("column", "code").agg(times=_.count(), number=_.number.min())
    facts = counts.group_by("column").agg(
        distinct=_.count(),
        times=_.times.sum(),
        binary=_.number.isin((0.0, 1.0)).sum(),
    )
    values = cells.table.select(other="column", code="code").distinct()
    shared = counts.join(values, "code").group_by("column", "other").agg(times=_.times.sum())
    found = {names[row["column"]]: row for row in cells.engine.fetch(facts).to_pylist()}
    listed: dict[str, dict[str, float]] = {name: {} for name in found}
    for row in cells.engine.fetch(shared).to_pylist():
        name, other = names[row["column"]], list(cells.columns)[row["other"]]
        listed[name][other] = float(row["times"]) / float(found[name]["times"])
    return {
        name: Lists(row["distinct"], listed[name], row["binary"] == row["distinct"])
        for name, row in found.items()
    }
