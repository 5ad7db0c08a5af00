"""The columns that a log must have, and the checks of their names and types."""

import difflib
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
from absl import logging

from kd_ranker.errors import UserError, listed
from kd_ranker.sources.logs.layout import EARLY_SCORES, IDENTIFYING, OPEN, OPTIONAL, LogLayout

# The contents of ids, in words.
NUMBERS, TEXTS = "whole numbers", "texts"

_INTEGER = r"u?int\d+|bool|null"
_NUMBER = rf"{_INTEGER}|halffloat|float|double|decimal.*"
_TEXT = r"(large_)?(string|binary)(_view)?|fixed_size_binary.*|extension<arrow\.uuid>"
_WHOLE_NUMBER = r"u?int\d+|null"


class _Accepted(NamedTuple):
    """The types that the values of a column may have."""

    types: str  # a pattern of their names
    words: str  # in a message


# By the use of a column.
_ACCEPTED = {
    "id": _Accepted(f"{_NUMBER}|{_TEXT}", f"{NUMBERS} or {TEXTS}"),
    "number": _Accepted(_NUMBER, "numbers"),
    "label": _Accepted(f"{_NUMBER}|{_TEXT}", "numbers, or true and false"),
    "time": _Accepted(f"{_NUMBER}|{_TEXT}|(timestamp|date).*", "timestamps, numbers or ISO texts"),
    "text": _Accepted(f"{_INTEGER}|{_TEXT}", f"{TEXTS} or {NUMBERS}"),
}
# The use of the columns in `data.columns`; those that are not named here hold numbers.
_USE_OF_COLUMN = {
    "request": "id",
    "user": "id",
    "item": "id",
    "time": "time",
    "stage": "text",
    "teacher_version": "text",
    "split": "text",
}
_USE_OF_KIND = {"dense": "number", "category": "id", "bag": "id", "history": "id"}


class WantedColumn(NamedTuple):
    """A column that a key of the config names."""

    key: str
    column: str
    use: str  # a key of `_ACCEPTED`
    # How many lists are around a value: a list of bags has two.
    most_lists: int
    least_lists: int
    # Whether candidates have a value each; if a row is a request, the column holds a list of these.
    per_candidate: bool


def wanted_columns(layout: LogLayout) -> list[WantedColumn]:
    """Return the columns that a log must have, in the order of the config."""
    wanted = [
        *_columns_of_roles(layout),
        *_columns_of_tasks(layout),
        *_columns_of_features(layout),
    ]
    return list(dict.fromkeys(wanted))


def _columns_of_roles(layout: LogLayout) -> Iterator[WantedColumn]:
    lists = int(layout.by_request)
    for role in (*IDENTIFYING, *OPTIONAL):
        if role not in layout.columns:
            continue
        per_candidate = role not in ("request", "time", "user")
        most = lists if per_candidate else 0
        # Other columns need no list if all candidates of a request have the same value.
        needs_list = role in ("item", "stage", "position", "incumbent")
        yield WantedColumn(
            key=f"data.columns.{role}",
            column=layout.columns[role],
            use=_USE_OF_COLUMN.get(role, "number"),
            most_lists=most,
            least_lists=most if needs_list else 0,
            per_candidate=per_candidate,
        )
    for column in layout.early_scores:
        key = f"data.columns.{EARLY_SCORES}: {column}"
        yield WantedColumn(key, column, "number", lists, lists, per_candidate=True)


def _columns_of_tasks(layout: LogLayout) -> Iterator[WantedColumn]:
    lists = int(layout.by_request)
    for task, column in layout.labels.items():
        key = f"data.labels.{task}"
        yield WantedColumn(key, column, "label", lists, lists, per_candidate=True)
    for task, column in layout.teacher.items():
        key = f"data.teacher.{task}"
        yield WantedColumn(key, column, "number", lists, lists, per_candidate=True)


def _columns_of_features(layout: LogLayout) -> Iterator[WantedColumn]:
    for feature in layout.features:
        per_candidate = not feature.of_request
        reasons_for_a_list = (
            feature.kind in ("bag", "history"),
            feature.of == "event",
            feature.place is not None,
            layout.by_request and per_candidate,
        )
        lists = sum(reasons_for_a_list)
        yield WantedColumn(
            key=f"data.features.{feature.key}",
            column=feature.column,
            use=_USE_OF_KIND[feature.kind],
            most_lists=lists,
            least_lists=lists,
            per_candidate=per_candidate,
        )


def check_columns(layout: LogLayout, names: Mapping[str, Sequence[str]]) -> None:
    """Check the names of the columns in each file, and warn of features that some files lack.

    Raises:
      UserError: a column is missing, or two names differ only in case.
    """
    wanted = wanted_columns(layout)
    # A feature may begin with a later file.
    needed = [column for column in wanted if not column.key.startswith("data.features.")]
    for file, names_in_file in names.items():
        check_names(file, names_in_file)
        check_present(file, needed, names_in_file)
    names_in_log = list(dict.fromkeys(itertools.chain(*names.values())))
    check_present(layout.path, wanted, names_in_log)
    for column in wanted:
        lacking = sum(column.column not in names_in_file for names_in_file in names.values())
        if lacking:
            files = "file" if lacking == 1 else "files"
            missing = (
                f"is missing in {lacking:,} {files} of {len(names)}, where it is null; if that is "
                "wrong, write them again with it"
            )
            logging.warning("column %r (%s) %s", column.column, column.key, missing)


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names that the engine cannot distinguish, from others or from its own."""
    seen = {name: f"{name!r}, which the engine adds," for name in ("file_index", "file_row_number")}
    for name in names:
        if other := seen.get(name.lower()):
            raise UserError(
                f"{where} has columns {other} and {name!r}, and case does not count; rename one"
            )
        seen[name.lower()] = repr(name)


def check_present(where: str, wanted: Sequence[WantedColumn], names: Collection[str]) -> None:
    """Refuse a log that lacks columns; the message guesses which one was meant."""
    missing = [column for column in wanted if column.column not in names]
    if not missing:
        return
    for column in missing:
        if column.column == OPEN:
            raise UserError(
                f"{column.key} is open: write the column that a CHECK asks for, or '' for none"
            )
    named = ", ".join(dict.fromkeys(f"{column.column!r} ({column.key})" for column in missing))
    close = difflib.get_close_matches(missing[0].column, names, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"{where} has no column {named}; {hint}name one of: {listed(names)}")


def check_ids(layout: LogLayout, schemas: Mapping[str, pa.Schema]) -> None:
    """Refuse ids that are texts in one file and fractions in another: "5" is not "5.0"."""
    for wanted in wanted_columns(layout):
        if wanted.use != "id":
            continue
        file_of_type = {
            str(inner_type(schema.field(wanted.column).type)): file
            for file, schema in schemas.items()
            if wanted.column in schema.names
        }
        text, fraction = "", ""
        for type_ in file_of_type:
            if re.fullmatch(_TEXT, type_):
                text = text or type_
            elif not re.fullmatch(_WHOLE_NUMBER, type_):
                fraction = fraction or type_
        if text and fraction:
            raise UserError(
                f"column {wanted.column!r} ({wanted.key}) is {fraction} in "
                f"{file_of_type[fraction]} and {text} in {file_of_type[text]}; give it one type"
            )


def check_types(layout: LogLayout, types: Mapping[str, pa.DataType]) -> None:
    """Raise UserError for a column with a type, as the engine returns it, that is not allowed."""
    for wanted in wanted_columns(layout):
        _check_type(wanted, types[wanted.column])
    if not layout.history:
        return
    item, history = layout.columns["item"], layout.history.column
    kind_of_items, kind_of_events = kind_of(types[item]), kind_of(types[history])
    if kind_of_items and kind_of_events and kind_of_items != kind_of_events:
        raise UserError(
            f"column {history!r} (data.features.{layout.history.name}) holds {kind_of_events}, "
            f"and {item!r} (data.columns.item) {kind_of_items}; a history holds item ids"
        )


def _check_type(wanted: WantedColumn, type_: pa.DataType) -> None:
    name = f"column {wanted.column!r} ({wanted.key})"
    accepted = _ACCEPTED[wanted.use]
    inner, lists = _inner_and_lists(type_)
    if pa.types.is_null(inner):
        if wanted.use == "id" and wanted.most_lists:
            raise UserError(f"{name} holds nothing in any file; leave it out of the config")
        return
    has_right_type = re.fullmatch(accepted.types, str(inner))
    if has_right_type and wanted.least_lists <= lists <= wanted.most_lists:
        return
    lists_of = "lists of " * wanted.most_lists
    advice = ""
    if pa.types.is_nested(inner):
        advice = "; flatten it: make each of its fields a column"
    raise UserError(f"{name} is {type_}; it takes {lists_of}{accepted.words}{advice}")


def _inner_and_lists(type_: pa.DataType) -> tuple[pa.DataType, int]:
    """Return the type of the values of a column, and the number of lists around them."""
    lists = 0
    while is_list(type_) or pa.types.is_dictionary(type_):
        if is_list(type_):
            lists += 1
        type_ = type_.value_type
    return type_, lists


def inner_type(type_: pa.DataType) -> pa.DataType:
    """Return the type of the values of a column, without lists and dictionaries around them."""
    return _inner_and_lists(type_)[0]


def is_list(type_: pa.DataType) -> bool:
    """Return True for lists of any length."""
    return pa.types.is_list(type_) or pa.types.is_fixed_size_list(type_)


def is_text(type_: pa.DataType) -> bool:
    """Return True for texts, bytes and UUIDs."""
    return re.fullmatch(_TEXT, str(inner_type(type_))) is not None


def kind_of(type_: pa.DataType) -> str:
    """Return the kind of the ids that a type holds: `NUMBERS`, `TEXTS`, "" if unknown.

    Integers of more than 64 bits are texts.
    """
    inner = inner_type(type_)
    if pa.types.is_null(inner):
        return ""
    return TEXTS if is_text(inner) or pa.types.is_decimal(inner) else NUMBERS
