"""Write in-memory requests as a dataset, which `data.path` then names."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from ml_collections import ConfigDict

from kd_ranker.batch import STORED, FeatureSpec, Owner, Request
from kd_ranker.errors import UserError, check_choice
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import COUNTED_BY, SPLITS, block_of
from kd_ranker.requests.source import RequestSource, Source

NAME = "requests"
GIVE_REQUESTS = (
    "give a list of mappings or kd.Request, or a table, or a mapping of train, validation and test "
    "to these"
)
MADE_BY = "kd.Dataset.from_requests"

_NEEDED = ("user_id", "item_id", "user_label")


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Raise UserError: `write_requests` has written the dataset, or it was removed."""
    raise UserError(f"no requests at {data.path}; make them with {MADE_BY}")


def check_fits(dataset: Dataset, data: ConfigDict, tasks: Sequence[str], retrieved: int) -> None:
    """Raise UserError for other tasks, or a request of more than `retrieved` candidates."""
    if tuple(tasks) != dataset.spec.tasks:
        raise UserError(
            f"tasks={tuple(tasks)}, and the requests at {data.path} have {dataset.spec.tasks}; "
            "set tasks to these, in that order"
        )
    most = max(int(columns.counts.retrieved.max()) for columns in dataset.columns.values())
    if most > retrieved:
        raise UserError(
            f"funnel.retrieved={retrieved}, and a request at {data.path} has {most} candidates; "
            "raise it to that"
        )


def write_requests(
    splits: Mapping[str, Any],
    spec: FeatureSpec,
    item_features: Any,
    item_category: Any,
    data: ConfigDict,
    shares: tuple[float, float],
) -> tuple[Path, tuple[str, ...], dict[str, Any]]:
    """Write a dataset that is named by the content of its requests, and set the keys that name it.

    `splits` maps "" to requests to split by time, with the `shares` of validation and test;
    `kd.Dataset.from_requests` describes the others. Changes `data` to name the dataset.

    Returns:
      The folder, the tasks, and the sizes of a funnel of the requests.
    """
    _check_shares(*shares)
    spec = dataclasses.replace(spec, dataset=NAME)
    number = itertools.count()  # of a request, over all splits
    requests = {}
    for split, rows in splits.items():
        requests[split] = [make_request(fields, next(number), spec) for fields in _rows(rows)]
    _check_distinct(itertools.chain(*requests.values()))
    if "" in requests:
        requests = _split(requests[""], *shares)
    shape = (spec.num_items, spec.item_features)
    features = np.zeros(shape) if item_features is None else item_features
    features = _array(features, np.float32, shape, "item_features")
    if item_category is not None:
        shape = (spec.num_items, spec.category_width("item"))
        item_category = _array(item_category, np.int32, shape, "item_category")
        is_wrong = (item_category < -1) | (item_category >= spec.num_categories)
        if is_wrong.any():
            raise UserError(
                f"item_category holds {item_category[is_wrong][0]}; it must lie in "
                f"[-1, {spec.num_categories})"
            )
    source = RequestSource(
        spec=spec,
        item_features=features,
        item_category=item_category,
        requests=lambda split: iter(requests[split]),
        num_requests={split: len(of_split) for split, of_split in requests.items()},
    )
    path = storage.build(lambda: source, f"given-{_digest(source)}", data.dir)
    data.path = str(path)
    data.labels = ConfigDict({task: task for task in spec.tasks})
    return path, spec.tasks, funnel_of(itertools.chain(*requests.values()))


def _check_shares(validation_share: Any, test_share: Any) -> None:
    """Raise UserError for a share outside [0, 1), or if none is left for training."""
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not isinstance(share, (int, float, np.number)) or not 0 <= share < 1:
            raise UserError(f"{name}={share!r} must be a number in [0, 1)")
    if validation_share + test_share >= 1:
        raise UserError(
            f"validation_share={validation_share} and test_share={test_share} leave no requests "
            "for training; lower one of them"
        )


def _check_distinct(requests: Iterable[Request]) -> None:
    """Raise UserError if two requests of any splits have the same id."""
    seen: set[int] = set()
    for request in requests:
        if request.request_id in seen:
            raise UserError(
                f"several requests have request_id {request.request_id}; give each its own, or "
                "leave request_id out"
            )
        seen.add(request.request_id)


def _rows(requests: Any) -> Iterable[Any]:
    """Return the rows of a table as mappings, and other requests as they are."""
    if isinstance(requests, pd.DataFrame):  # a cell may hold a matrix, which Arrow does not take
        return requests.to_dict("records")
    if is_table(requests):
        return arrow_of(requests).to_pylist()
    if not isinstance(requests, Iterable):
        raise UserError(f"requests have the type {type(requests).__name__}; {GIVE_REQUESTS}")
    return requests


def is_table(value: Any) -> bool:
    """Return True for a DataFrame of pandas or polars, and for an Arrow table."""
    return hasattr(value, "iloc") or hasattr(value, "__arrow_c_stream__")


def arrow_of(table: Any) -> pa.Table:
    """Return a table of pandas, without its index, of polars or of Arrow as an Arrow table.

    Raises:
      UserError: it is not a table, has no rows, or a column holds values of several types.
    """
    kind = type(table).__name__
    if isinstance(table, pd.Series):
        raise UserError("a Series is not a table; give a DataFrame")
    try:
        is_pandas = hasattr(table, "iloc")
        rows = pa.Table.from_pandas(table, preserve_index=False) if is_pandas else pa.table(table)
        value_types = [getattr(field.type, "value_type", None) for field in rows.schema]
        if pa.string_view() in value_types:
            # Parquet takes no dictionary of these, as polars has it.
            rows = duckdb.from_arrow(rows).to_arrow_table()
    except (pa.ArrowException, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"a {kind} cannot be read as a table: {line}; give each column one type"
        ) from error
    if not rows.num_rows:
        raise UserError(f"a {kind} has no rows; give one with at least one")
    return rows


def _digest(source: RequestSource) -> str:
    """Return eight hex digits that differ where the contents differ."""
    digest = hashlib.sha256(source.spec.to_json().encode())
    arrays = [source.item_features]
    if source.item_category is not None:
        arrays.append(source.item_category)
    for split in SPLITS:
        requests = list(source.requests(split)) if split in source.num_requests else []
        block = block_of(requests, source.spec)
        arrays += [*block.values.values(), *block.numbers.values()]
    for array in arrays:
        is_text = array.dtype == object
        digest.update(repr(array.tolist()).encode() if is_text else array.tobytes())
    return digest.hexdigest()[:8]


def _split(
    requests: Iterable[Request], validation_share: float, test_share: float
) -> dict[str, list[Request]]:
    """Split requests by time; those of the same time stay together, in the later of two splits."""
    ordered = sorted(requests, key=lambda request: (request.time, request.request_id))
    times = [request.time for request in ordered]

    def start(later_share: float) -> int:
        """Return the first request of the splits that have this share together."""
        first = round(len(times) * (1 - later_share))
        return int(np.searchsorted(times, times[first])) if first < len(times) else first

    validation_start = start(validation_share + test_share)
    test_start = start(test_share)
    return {
        "train": ordered[:validation_start],
        "validation": ordered[validation_start:test_start],
        "test": ordered[test_start:],
    }


def funnel_of(requests: Iterable[Request]) -> dict[str, Any]:
    """Return the sizes of a funnel of requests; where all were passed, it passes half of them."""
    retrieved = passed = shown = 0
    for request in requests:
        retrieved = max(retrieved, len(request.item_id))
        passed = max(passed, request.num_passed)
        shown = max(shown, len(request.user_label))
    if passed == retrieved:
        passed = max(shown, retrieved // 2)
    report_at = tuple(sorted({shown, passed, retrieved}))
    return dict(retrieved=retrieved, passed=passed, shown=shown, report_at=report_at)


def make_request(fields: Request | Mapping[str, Any], number: int, spec: FeatureSpec) -> Request:
    """Return a request from its fields by name; most have defaults.

    `request_id` and `time` default to its number. All candidates were passed, and labels and the
    teacher's probabilities weigh 1. The teacher's version is the one that counts. Features are 0,
    and there are no events, no teacher's probabilities and no facts for the evaluation.

    UserError names a field that is unknown, missing, or has another shape than that of `Request`.
    """
    if not isinstance(fields, (Request, Mapping)):
        raise UserError(f"request {number} has the type {type(fields).__name__}; {GIVE_REQUESTS}")
    present: dict[str, Any] = dict(vars(fields) if isinstance(fields, Request) else fields)
    who = f"request {present.get('request_id', number)}"
    _check_names(present, who)
    defaults = {
        "request_id": number,
        "time": number,
        "num_passed": _length(present.get("item_id")),
        "teacher_version": spec.teacher_version,
    }
    present = defaults | present
    num_entries = _num_entries(present)
    values: dict[str, Any] = {}
    for field in STORED:
        value = present.get(field.name)
        shape = field.shape(spec)
        if field.of != "request":
            shape = (num_entries[field.of], *shape)
        if value is None:
            default = 1 if field.name.endswith("_weight") else max(field.nothing, -1)
            values[field.name] = np.full(shape, default, field.stored)
        elif field.stored is str:
            values[field.name] = str(value)
        else:
            may_be_nan = bool(np.isnan(field.nothing))
            array = _array(value, field.stored, shape, f"{who}: {field.name}", may_be_nan)
            values[field.name] = array if shape else int(array)
    request = Request(**values)
    _check_request(request, who)
    return request


def _check_names(present: Mapping[str, Any], who: str) -> None:
    """Raise UserError for a field that does not exist, or that has no default and is missing."""
    known = {field.name for field in STORED}
    unknown = set(present) - known
    if unknown:
        check_choice(f"{who}: field", min(unknown), known)
    for name in _NEEDED:
        if present.get(name) is None:
            raise UserError(f"{who} lacks {name}; every request needs {', '.join(_NEEDED)}")


def _length(value: Any) -> int:
    """Return the number of entries of a field, 0 for a missing field and for a number."""
    return len(value) if hasattr(value, "__len__") else 0


def _num_entries(present: Mapping[str, Any]) -> dict[Owner, int]:
    """Return the number of entries by the owner of a field."""
    numbers = {owner: _length(present.get(name)) for owner, name in COUNTED_BY.items()}
    if not numbers["known"]:
        others = ("incumbent", "propensity", "early_scores")
        numbers["known"] = max(_length(present.get(name)) for name in others)
    return numbers


def _check_request(request: Request, who: str) -> None:
    """Raise UserError for values that do not fit each other or their ranges."""
    num_shown = len(request.user_label)
    num_retrieved = len(request.item_id)
    if not 0 < num_shown <= request.num_passed <= num_retrieved:
        raise UserError(
            f"{who}: {num_shown} labels, num_passed={request.num_passed} and {num_retrieved} "
            "items; the shown are first among the passed, and these among all, so 0 < labels ≤ "
            "num_passed ≤ items"
        )
    if (request.user_label > 1).any():
        raise UserError(f"{who}: user_label holds {request.user_label.max()}; labels are 0 or 1")
    for name in ("label_weight", "teacher_weight"):
        least = getattr(request, name).min(initial=0)
        if least < 0:
            raise UserError(f"{who}: {name} is {least:g}; a weight is at least 0")
    items, counts = np.unique(request.item_id, return_counts=True)
    if len(items) < num_retrieved:
        raise UserError(
            f"{who}: item_id holds {items[counts > 1][0]} several times; an item is one candidate "
            "of a request"
        )
    assert request.propensity is not None  # `make_request` fills all fields
    propensity = request.propensity[:num_shown]
    is_wrong = (propensity <= 0) | (propensity > 1)
    if is_wrong.any():
        raise UserError(f"{who}: propensity is {propensity[is_wrong][0]:g}; it must be in (0, 1]")


def _array(
    value: Any, dtype: Any, shape: tuple[int, ...], what: str, takes_any: bool = False
) -> np.ndarray:
    """Return a user's values as an array.

    UserError: the shape or the dtype changes them or, without `takes_any`, one is not finite.
    """
    try:
        original = np.asarray(value)
        with np.errstate(invalid="ignore"):  # of NaN as a whole number, which is refused below
            array = original.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what} must be an array of numbers: {error}") from error
    if array.shape != shape:
        raise UserError(f"{what} has the shape {array.shape}, and should have {shape}")
    is_whole = np.issubdtype(dtype, np.integer)
    wrong = array != original if is_whole else ~np.isfinite(array)
    if wrong.any() and not takes_any:
        kind = "whole" if is_whole else "finite"
        raise UserError(f"{what} holds {original[wrong][0]}, and takes {kind} numbers")
    return array
