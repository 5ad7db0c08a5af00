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

from kd_ranker.batch import STORED, FeatureSpec, Request
from kd_ranker.errors import UserError, check_choice
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import COUNTED_BY, SPLITS, block_of
from kd_ranker.requests.source import RequestSource, Source

NAME = "requests"
NO_REQUESTS = "requests must be mappings, kd.Request or a table, or a mapping of splits to these"
MADE_BY = "kd.Dataset.from_requests"

_NEEDED = ("user_id", "item_id", "user_label")


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Raise UserError: `write_requests` has written the dataset, or it was removed."""
    raise UserError(f"no requests at {data.path}; make them with {MADE_BY}")


def check_fits(dataset: Dataset, data: ConfigDict, tasks: Sequence[str], retrieved: int) -> None:
    """Raise UserError for other tasks, or a request of more than `retrieved` candidates."""
    if tuple(tasks) != dataset.spec.tasks:
        raise UserError(
            f"tasks={tuple(tasks)}, and the requests at {data.path} have {dataset.spec.tasks}, in "
            "that order"
        )
    most = max(int(columns.counts.retrieved.max()) for columns in dataset.columns.values())
    if most > retrieved:
        raise UserError(
            f"funnel.retrieved={retrieved}, and a request at {data.path} has {most} candidates"
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
    spec, numbers = dataclasses.replace(spec, dataset=NAME), itertools.count()
    requests = {
        split: [request_of(fields, next(numbers), spec) for fields in _rows(of_split)]
        for split, of_split in splits.items()
    }
    _check_distinct(itertools.chain(*requests.values()))
    if "" in requests:
        requests = _split(requests[""], *shares)
    shape = (spec.num_items, spec.item_features)
    features = np.zeros(shape) if item_features is None else item_features
    features = _array(features, np.float32, shape, "item_features")
    if item_category is not None:
        shape = (spec.num_items, spec.category_width("item"))
        item_category = _array(item_category, np.int32, shape, "item_category")
        if ((item_category < -1) | (item_category >= spec.num_categories)).any():
            raise UserError(f"item_category must lie in [-1, {spec.num_categories})")
    source = RequestSource(
        spec=spec,
        item_features=features,
        item_category=item_category,
        requests=lambda split: iter(requests[split]),
        num_requests={split: len(of_split) for split, of_split in requests.items()},
    )
    path = storage.build(lambda: source, f"given-{_digest(source)}", data.dir)
    data.path, data.labels = str(path), ConfigDict({task: task for task in spec.tasks})
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
    """The rows of a table as mappings; other requests as they are."""
    if isinstance(requests, pd.DataFrame):  # a cell may hold a matrix, which Arrow does not take
        return requests.to_dict("records")
    if is_table(requests):
        return arrow_of(requests).to_pylist()
    if not isinstance(requests, Iterable):
        raise UserError(NO_REQUESTS)
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
        if any(getattr(of.type, "value_type", None) == pa.string_view() for of in rows.schema):
            # Parquet takes no dictionary of these, as polars has it.
            rows = duckdb.from_arrow(rows).to_arrow_table()
    except (pa.ArrowException, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"a {kind} cannot be read as a table: {line}") from error
    if not rows.num_rows:
        raise UserError(f"a {kind} has no rows")
    return rows


def _digest(source: RequestSource) -> str:
    """Eight hex digits that differ where the contents differ."""
    digest = hashlib.sha256(source.spec.to_json().encode())
    arrays = [source.item_features]
    if source.item_category is not None:
        arrays.append(source.item_category)
    for split in SPLITS:
        requests = [*source.requests(split)] if split in source.num_requests else []
        block = block_of(requests, source.spec)
        arrays += [*block.values.values(), *block.numbers.values()]
    for array in arrays:
        digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.hexdigest()[:8]


def _split(
    requests: Iterable[Request], validation_share: float, test_share: float
) -> dict[str, list[Request]]:
    """Split requests by time; those of the same time stay together, in the later of two splits."""
    ordered = sorted(requests, key=lambda request: (request.time, request.request_id))
    times = [request.time for request in ordered]
    places = (round(len(times) * (1 - of)) for of in (validation_share + test_share, test_share))
    cuts = [int(np.searchsorted(times, times[at])) if at < len(times) else at for at in places]
    ends = itertools.pairwise((0, *cuts, len(ordered)))
    return {split: ordered[start:end] for split, (start, end) in zip(SPLITS, ends, strict=True)}


def funnel_of(requests: Iterable[Request]) -> dict[str, Any]:
    """The sizes of a funnel of requests; where all were passed, it passes half of them."""
    sizes = [
        (len(request.item_id), request.num_passed, len(request.user_label)) for request in requests
    ]
    retrieved, passed, shown = map(max, zip(*sizes, strict=True))
    if passed == retrieved:
        passed = max(shown, retrieved // 2)
    report_at = tuple(sorted({shown, passed, retrieved}))
    return dict(retrieved=retrieved, passed=passed, shown=shown, report_at=report_at)


def request_of(fields: Request | Mapping[str, Any], place: int, spec: FeatureSpec) -> Request:
    """Return a request from its fields by name; most have defaults.

    `request_id` and `time` default to its place. All candidates were passed, and labels and the
    teacher's probabilities weigh 1. The teacher's version is the one that counts. Features are 0,
    and there are no events, no teacher's probabilities and no facts for the evaluation.

    UserError names a field that is unknown, missing, or has another shape than that of `Request`.
    """
    if not isinstance(fields, (Request, Mapping)):
        raise UserError(NO_REQUESTS)
    given: dict[str, Any] = dict(vars(fields) if isinstance(fields, Request) else fields)
    who = f"request {given.get('request_id', place)}"
    if wrong := {*given}.difference(known := {field.name for field in STORED}):
        check_choice(f"{who}: field", min(wrong), known)
    if lacking := [name for name in _NEEDED if given.get(name) is None]:
        raise UserError(f"{who} lacks {lacking[0]}")

    def length(name: str) -> int:
        return len(given[name]) if hasattr(given.get(name), "__len__") else 0

    defaults = dict(request_id=place, time=place, num_passed=length("item_id"))
    given = defaults | {"teacher_version": spec.teacher_version} | given
    numbers = {owner: length(name) for owner, name in COUNTED_BY.items()}
    numbers["known"] = numbers["known"] or max(
        map(length, ("incumbent", "propensity", "early_scores"))
    )
    values: dict[str, Any] = {}
    for field in STORED:
        name, value, of_request = field.name, given.get(field.name), field.of == "request"
        shape = (() if of_request else (numbers[field.of],)) + field.shape(spec)
        if value is None:
            default = 1 if name.endswith("_weight") else max(field.nothing, -1)
            values[name] = np.full(shape, default, field.stored)
        elif field.stored is str:
            values[name] = str(value)
        else:
            array = _array(value, field.stored, shape, f"{who}: {name}", np.isnan(field.nothing))
            values[name] = array if shape or not of_request else int(array)
    request = Request(**values)
    shown, passed, all_ = len(request.user_label), request.num_passed, len(request.item_id)
    if not 0 < shown <= passed <= all_:
        raise UserError(
            f"{who}: {shown} labels, num_passed={passed} and {all_} items; the shown are first "
            "among the passed, and these among all, so 0 < labels ≤ num_passed ≤ items"
        )
    if (request.user_label > 1).any():
        raise UserError(f"{who}: user_label holds {request.user_label.max()}; labels are 0 or 1")
    for name in ("label_weight", "teacher_weight"):
        if (weight := values[name]).min(initial=0) < 0:
            raise UserError(f"{who}: {name} is {weight.min():g}; a weight is at least 0")
    items, times = np.unique(request.item_id, return_counts=True)
    if len(items) < all_:
        raise UserError(
            f"{who}: item_id holds {items[times > 1][0]} several times; an item is one candidate "
            "of a request"
        )
    propensity = values["propensity"][:shown]
    if (bad := (propensity <= 0) | (propensity > 1)).any():
        raise UserError(f"{who}: propensity is {propensity[bad][0]:g}; it must be in (0, 1]")
    return request


def _array(
    value: Any, dtype: Any, shape: tuple[int, ...], what: str, takes_any: bool = False
) -> np.ndarray:
    """An array of a user's values; refuse one that changes them or, by default, is not finite."""
    try:
        given = np.asarray(value)
        with np.errstate(invalid="ignore"):  # of NaN as a whole number, which is refused below
            array = given.astype(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{what}: {error}") from error
    if array.shape != shape:
        raise UserError(f"{what} has the shape {array.shape}, and should have {shape}")
    is_whole = np.issubdtype(dtype, np.integer)
    wrong = array != given if is_whole else ~np.isfinite(array)
    if wrong.any() and not takes_any:
        kind = "whole" if is_whole else "finite"
        raise UserError(f"{what} holds {given[wrong][0]}, and takes {kind} numbers")
    return array
