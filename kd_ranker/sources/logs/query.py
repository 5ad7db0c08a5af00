"""The SQL of a log: the templates, filled in by its layout and the types of its columns.

`templates/log.sql` holds the query and `templates/report.sql` the counts for the data report. A
value of the log becomes an id, a number, a time or a code by the expressions here, which depend on
the type of its column.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

import pyarrow as pa

from kd_ranker.requests.columns import LEAST_WHOLE
from kd_ranker.requests.request import SPLITS
from kd_ranker.requests.templates import templates_of
from kd_ranker.sources.logs.columns import (
    TEXTS,
    inner_type,
    is_list,
    is_text,
    kind_of,
    wanted_columns,
)
from kd_ranker.sources.logs.layout import LARGEST, NO_PLACE, Feature, LogLayout, early_score
from kd_ranker.sources.logs.sql import literal, quoted
from kd_ranker.sources.logs.times import sql_of_time

# Before the names of the log's columns in all tables.
PREFIX = "log:"
# Seconds since 1970 that NumPy and TFDS hold alike, some 30,000 years.
_LATEST = 10**12
# Beyond it, a float is not the integer that was meant.
_EXACT = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
# Rejected rows of a reason that are written to a file.
MOST_REPORTED = 100_000
# A row has one number in the log, that of its file times this plus its own.
_ROWS_OF_A_FILE = 2**40


def logged(column: str) -> str:
    """Return the name of a column of the log."""
    return quoted(PREFIX + column)


def raw(column: str) -> str:
    """Return the name of a column of the log next to the features."""
    return quoted(f"raw:{column}")


def vocabulary_table(feature: Feature) -> str:
    """Return the name of the table of a feature's values."""
    return quoted(f"values:{feature.name}")


@dataclasses.dataclass(frozen=True)
class Query:
    """The values that fill in the templates.

    Its methods return SQL for the value of a column, or of an expression of the type of a column.

    Attributes:
      layout: of the log.
      types: column of the log -> its type.
      known_size: where a dataset has ids already, `known_user`, `known_item` and, if values of
        features get ids here, each `known_feature:<name>` -> how many have ids.
    """

    layout: LogLayout
    types: Mapping[str, pa.DataType]
    known_size: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def statements(self, template: str) -> list[str]:
        """Return the statements of a template, in their order."""
        layout = self.layout
        item = layout.columns["item"]
        columns = wanted_columns(layout)
        # In the order of the config, each once.
        wanted = list(dict.fromkeys(column.column for column in columns))
        per_candidate = {column.column for column in columns if column.per_candidate}
        lists = [
            name
            for name in wanted
            if name in per_candidate and name != item and is_list(self.types[name])
        ]
        facts = list(layout.facts)
        merged = [*(f"label:{task}" for task in layout.tasks), "label_weight", "stage", *facts]
        methods = {name: getattr(self, name) for name in dir(Query) if not name.startswith("_")}
        templates = templates_of(__package__, "--")
        text = templates.get_template(template).render(
            methods,
            name=quoted,
            logged=logged,
            raw=raw,
            vocabulary=vocabulary_table,
            names=_names,
            and_names=_and_names,
            and_features=_and_features,
            length=_length,
            digest=_digest,
            layout=layout,
            columns=collections.defaultdict(str, layout.columns),
            labels=collections.defaultdict(str, layout.labels),
            known_size=self.known_size,
            wanted=wanted,
            lists=lists,
            nested=[name for name in lists if pa.types.is_list(self.types[name].value_type)],
            scalars=[name for name in wanted if name not in (item, *lists)],
            facts=facts,
            early_scores={early_score(column): column for column in layout.early_scores},
            merged=list(map(quoted, merged)),
            rows_of_a_file=_ROWS_OF_A_FILE,
            split_codes={split: place for place, split in enumerate(SPLITS, start=1)},
            vocabularies=[
                feature
                for feature in layout.vocabularies
                if not self.known_size or f"known_feature:{feature.name}" in self.known_size
            ],
            largest=LARGEST,
            no_place=NO_PLACE,
            least_whole=LEAST_WHOLE,
            most_reported=MOST_REPORTED,
            # A missing position comes last.
            funnel_order="stage DESC, position NULLS LAST, item",
        )
        statements = [part.strip() for part in re.split(r";\s*\n", text + "\n")]
        return [statement for statement in statements if statement]

    def _inner(self, column: str) -> pa.DataType:
        return inner_type(self.types[column])

    def is_number(self, column: str) -> bool:
        """True if the values of a column are integers or floats."""
        return pa.types.is_integer(self._inner(column)) or self.is_float(column)

    def is_float(self, column: str) -> bool:
        """True if the values of a column are floats."""
        return pa.types.is_floating(self._inner(column))

    def id(self, column: str, value: str = "") -> str:
        """An id, or NULL: integers, truth values and texts are ids; "" is not."""
        value, type_ = value or logged(column), self._inner(column)
        if kind_of(type_) == TEXTS:
            return f"nullif({value}::VARCHAR, '')"
        if self.is_float(column):
            whole = f"abs({value}) <= {_EXACT[type_]} AND floor({value}) = {value}"
            return f"CASE WHEN {whole} THEN {value}::BIGINT END"
        return value if pa.types.is_uint64(type_) else f"{value}::BIGINT"

    def number(self, column: str, value: str = "") -> str:
        """A number, or NULL, as for NaN."""
        return f"nullif({value or logged(column)}::DOUBLE, 'nan'::DOUBLE)"

    def seconds(self, column: str) -> str:
        """Seconds since 1970 (UTC), rounded down, or NULL."""
        value, type_ = logged(column), self._inner(column)
        number = f"{self.number(column)} / {self.layout.units_per_second}"
        if is_text(type_):
            number = f"epoch({sql_of_time(value, self.layout.time_format)})"
        elif pa.types.is_timestamp(type_) or pa.types.is_date(type_):
            number = f"epoch({value})"
        return f"CASE WHEN abs({number}) <= {_LATEST} THEN floor({number})::BIGINT END"

    def has_zones(self, column: str) -> bool:
        """True if the times in a column may differ in having a time zone: texts of no format."""
        return is_text(self._inner(column)) and not self.layout.time_format

    def has_zone(self, column: str) -> str:
        """The condition for the text of a time that has a time zone."""
        zone = "[0-9]:[0-9]{2}.*([zZ]|UTC|[+-][0-9]{2}(:?[0-9]{2})?)$"
        return f"regexp_matches(trim({logged(column)}::VARCHAR), '{zone}')"

    def code(self, column: str, codes: Mapping[str, int]) -> str:
        """The code of a text, an integer or a truth value; 0 for one without a code."""
        value = logged(column)
        if pa.types.is_boolean(self._inner(column)):
            value = f"CASE WHEN {value} THEN 'True' WHEN NOT {value} THEN 'False' END"
        cases = " ".join(f"WHEN {literal(text)} THEN {code}" for text, code in codes.items())
        return f"CASE {value}::VARCHAR {cases} ELSE 0 END::TINYINT" if codes else "0::TINYINT"

    def label_number(self, column: str) -> str:
        """The number of a label, or NULL; texts such as true and no are 1 and 0, and others 2."""
        if not is_text(self._inner(column)):
            return self.number(column)
        text = f"trim({logged(column)}::VARCHAR)"
        return f"CASE WHEN {text} <> '' THEN coalesce(try_cast({text} AS BOOLEAN)::TINYINT, 2) END"

    def other_version(self) -> str:
        """The condition for a version of the teacher that does not count; "" if all count."""
        layout = self.layout
        column = layout.columns.get("teacher_version")
        if not (layout.teacher_version and column and layout.teacher):
            return ""
        return f"{self.code(column, {layout.teacher_version: 1})} <> 1"

    def ids_in(self, column: str, value: str) -> str:
        """The ids in a list, without the missing ones."""
        ids = f"list_transform({value}, lambda each: {self.id(column, 'each')})"
        return f"list_filter({ids}, lambda each: each IS NOT NULL)"

    def is_aligned(self, value: str, history: str = "") -> str:
        """The condition for a list with an entry for each id of the history."""
        (feature,) = self.layout.of(kind="history")
        ids = self.ids_in(feature.column, history or f"log.{logged(feature.column)}")
        return f"array_length({value}) = array_length({ids})"

    def feature_value(self, feature: Feature, value: str = "") -> str:
        """The value of a feature: a number, an id, or a list of ids, cut to its length."""
        column, value = feature.column, value or logged(feature.column)
        if feature.of == "event":
            numbers = f"list_transform({value}, lambda each: {self._dense(feature, 'each')})"
            cut = f"[-{self.layout.history_length}:]"
            return f"CASE WHEN {self.is_aligned(value)} THEN {numbers}{cut} END"
        if feature.kind == "dense":
            return self._dense(feature, value)
        if feature.kind == "category":
            return self.id(column, value)
        # The most recent events are last in a history; a bag has no order, so its first will do.
        cut = f"-{feature.length}:" if feature.kind == "history" else f":{feature.length}"
        return f"({self.ids_in(column, value)})[{cut}]"

    def _dense(self, feature: Feature, value: str) -> str:
        if feature.place is not None:
            in_list = f"array_length({value}) = {feature.length}"
            value = f"(CASE WHEN {in_list} THEN {value}[{feature.place + 1}] END)"
        number = self.number(feature.column, value)
        return f"CASE WHEN abs({number}) <= {LARGEST!r} THEN {number} END"

    def raw_and_features(self, features: list[Feature]) -> str:
        """Columns of the table `log` as `raw:<column>`, and the features that are made of them."""
        columns = dict.fromkeys(feature.column for feature in features)
        selected = [f"log.{logged(column)} AS {raw(column)}" for column in columns]
        for feature in features:
            value = self.feature_value(feature, f"log.{logged(feature.column)}")
            selected.append(f"{value} AS {quoted(f'feature:{feature.name}')}")
        return "".join(f",\n        {expression}" for expression in selected)


def _names(columns: Iterable[str]) -> str:
    return ", ".join(map(logged, columns))


def _and_names(columns: Iterable[str]) -> str:
    return "".join(f", {logged(column)}" for column in columns)


def _and_features(features: Iterable[Feature]) -> str:
    return "".join(f", {quoted(f'feature:{feature.name}')}" for feature in features)


def _length(column: str) -> str:
    return f"array_length({logged(column)})"


def _digest(share: float) -> str:
    """Return a share of all MD5 digests as the first one beyond it, in 13 hex digits."""
    return f"{int(share * 2**52):013x}"
