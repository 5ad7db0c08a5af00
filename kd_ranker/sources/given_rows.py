"""A DataFrame of a row a candidate, as notebooks have it, as requests for `given`.

What its columns hold is said by name, field by field; no other column is read.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int, Int8

from kd_ranker.batch import STORED, FeatureSpec, Owner, Stage
from kd_ranker.errors import UserError, check_choice
from kd_ranker.requests.ragged import starts_of

Columns = Mapping[str, str | Sequence[str]]
"""Field -> the column that holds it, or those whose numbers stand side by side."""

_STAGE, _OF_ITEMS = "stage", {"item_features": 0.0, "item_category": -1.0}
# The stages of rows say how many were passed.
_FIELDS = {field.name: field for field in STORED if field.name != "num_passed"}
_NEEDED = ("request_id", "user_id", "item_id", "user_label")
_STAGES = {stage.name.lower(): stage for stage in Stage if stage > Stage.PADDING}


def requests_of(frame: pd.DataFrame, columns: Columns) -> Iterator[dict[str, Any]]:
    """The requests of a frame, in the order of their first rows, for `given.request_of`.

    The rows of a request need not stand together. They come in funnel order, and within a stage in
    that of the frame. Without a column for the stage, rows with any label were shown and all others
    passed. A shown row that lacks a label has none that count. Teacher's probabilities are those of
    the passed, or of all in a request where one that was not passed has any.

    Args:
      frame: one that `items_of` has checked.
      columns: the names of its columns.

    Raises:
      UserError: a row lacks its request, or those of a request differ in what belongs to it.
    """
    (request,) = _names(columns, "request_id")
    number, _ = pd.factorize(frame[request])  # in the order in which they appear
    if (number < 0).any():
        raise UserError(
            f"row {np.argmin(number)} of the frame has no {request!r}, its request's id"
        )
    of_request = [name for name in columns if name in _FIELDS and _is_of_request(name)]
    _check_same(frame, columns, of_request, request, number)
    values = {name: _values(frame, columns, name) for name in columns if name in _FIELDS}
    if not pd.api.types.is_integer_dtype(frame[request]):
        del values["request_id"]
    label, weight = values["user_label"], values.get("label_weight", np.ones(len(frame)))
    values["label_weight"] = np.where(np.isnan(label).any(axis=1), 0, weight)
    values["user_label"] = np.nan_to_num(label)
    stage = _stages(frame, columns, ~np.isnan(label).all(axis=1))
    order = np.lexsort((-stage, number))
    for first, end in itertools.pairwise(starts_of(np.bincount(number))):
        rows = order[first:end]
        yield _request({name: of[rows] for name, of in values.items()}, stage[rows])


def items_of(frames: Iterable[Any], columns: Columns, spec: FeatureSpec) -> dict[str, np.ndarray]:
    """Arrays of what frames say of items, a row an item; of those that they lack 0, or -1.

    Returns:
      `item_features` and `item_category` of `spec.num_items` rows, where columns hold them.

    Raises:
      UserError: a frame lacks a column, an id is out of range, or the rows of an item differ.
    """
    frames = [_checked(frame, columns) for frame in frames]
    named = [name for name in _OF_ITEMS if name in columns]
    frame = pd.concat(frames, ignore_index=True)
    (item,) = _names(columns, "item_id")
    ids = _values(frame, columns, "item_id")
    if named and not ((ids >= 0) & (ids < spec.num_items)).all():
        raise UserError(f"{item!r} must lie in [0, {spec.num_items}), as ids of items do")
    _check_same(frame, columns, named, item, pd.factorize(ids)[0])
    found = {}
    for name in named:
        of_rows = _values(frame, columns, name)
        found[name] = np.full((spec.num_items, of_rows.shape[1]), _OF_ITEMS[name])
        found[name][ids.astype(np.int64)] = of_rows
    return found


def _checked(frame: Any, columns: Columns) -> pd.DataFrame:
    """The same; raises UserError unless it is a frame with these columns, of known fields."""
    if not isinstance(frame, pd.DataFrame):
        raise UserError(
            f"columns= names those of a DataFrame of a row a candidate, and this is a "
            f"{type(frame).__name__}"
        )
    for field in columns:
        check_choice("a field in columns=", field, (*_FIELDS, _STAGE, *_OF_ITEMS))
    if lacking := [field for field in _NEEDED if field not in columns]:
        raise UserError(f"columns= does not say which one holds {lacking[0]}")
    for field in columns:
        names = _names(columns, field)
        if missing := [name for name in names if name not in frame]:
            raise UserError(f"columns= names {missing[0]!r} for {field}, which the frame lacks")
        if len(names) != 1 and not _is_matrix(field):
            raise UserError(f"columns= names {len(names)} columns for {field}, which takes one")
    return frame


def _request(values: Mapping[str, np.ndarray], stage: Int8[np.ndarray, "N"]) -> dict[str, Any]:
    """The fields of a request from its rows, which stand in funnel order."""

    def has_any(name: str, first: int) -> bool:
        return name in values and not np.isnan(values[name][first:]).all()

    every, shown, passed = (int((stage >= of).sum()) for of in (0, Stage.SHOWN, Stage.PASSED))
    numbers: dict[Owner, int] = {
        "candidate": every,
        "shown": shown,
        "scored": every if has_any("teacher_probability", passed) else passed,
        "known": every * any(has_any(name, 0) for name, of in _FIELDS.items() if of.of == "known"),
    }
    fields: dict[str, Any] = {"num_passed": passed}
    for name, of in values.items():
        owner = _FIELDS[name].of
        fields[name] = of[0] if _is_of_request(name) else of[: numbers[owner]]
        if owner == "event" and np.ndim(fields[name]) == 0 and pd.isna(fields[name]):
            fields[name] = None  # a list that is missing is one of no events
    return fields


def _is_of_request(name: str) -> bool:
    return _FIELDS[name].of in ("request", "event")


def _names(columns: Columns, field: str) -> Sequence[str]:
    names = columns[field]
    return [names] if isinstance(names, str) else names


def _is_matrix(name: str) -> bool:
    """True for a field of several numbers a row."""
    field = _FIELDS.get(name)
    return name in _OF_ITEMS or bool(field and field.width and field.of != "event")


def _values(frame: pd.DataFrame, columns: Columns, name: str) -> np.ndarray:
    """A field of each row: its cells, or numbers side by side; a cell may hold a vector of them.

    A missing number is NaN, a missing category id -1.
    """
    names = _names(columns, name)
    if not _is_matrix(name) and _is_of_request(name):
        return frame[names[0]].to_numpy(object)
    sides = []
    for column in names:
        cells = frame[column].astype(object).where(frame[column].notna(), np.nan)
        try:
            sides.append(np.array(cells.tolist(), np.float64).reshape(len(frame), -1))
        except (TypeError, ValueError) as error:
            raise UserError(f"{column!r}, which holds {name}: {error}") from error
    matrix = np.concatenate(sides, axis=1)
    if name.endswith("_category"):
        matrix = np.nan_to_num(matrix, nan=-1)
    return matrix if _is_matrix(name) else matrix[:, 0]


def _stages(
    frame: pd.DataFrame, columns: Columns, is_labelled: Bool[np.ndarray, "rows"]
) -> Int8[np.ndarray, "rows"]:
    if _STAGE not in columns:
        return np.where(is_labelled, Stage.SHOWN, Stage.PASSED).astype(np.int8)
    (column,) = _names(columns, _STAGE)
    stage = frame[column].map(_STAGES)
    if stage.isna().any():
        wrong = frame[column][stage.isna()].iloc[0]
        raise UserError(f"{column!r} holds {wrong!r}, and a stage is one of: {', '.join(_STAGES)}")
    return stage.to_numpy(np.int8)


def _check_same(
    frame: pd.DataFrame,
    columns: Columns,
    fields: Sequence[str],
    by: str,
    number: Int[np.ndarray, "rows"],
) -> None:
    """Raises UserError unless rows of the same number have the same values of these fields."""
    _, first = np.unique(number, return_index=True)
    for column in dict.fromkeys(name for field in fields for name in _names(columns, field)):
        cells = frame[column]
        if cells.dtype == object:  # lists among them have no hash
            cells = cells.map(lambda cell: repr(np.asarray(cell).tolist()))
        codes, _ = pd.factorize(cells)  # of missing values -1
        if (differs := codes != codes[first[number]]).any():
            at = int(np.argmax(differs))
            one, other = frame[column].iloc[[first[number[at]], at]]
            raise UserError(
                f"{by} {frame[by].iloc[at]} has rows whose {column!r} is {one} and {other}, and it "
                "has to be the same in all of them"
            )
