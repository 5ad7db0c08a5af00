"""Many requests as a few arrays, from which a batch is cut without a loop over its requests."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from kd_ranker.batch import FIELDS, FeatureSpec, Field, Owner, Request, Stage
from kd_ranker.batches import packing

Of = TypeVar("Of")


class Parts(NamedTuple, Generic[Of]):
    """The three that a batch is put together of, each of which is read at once.

    Attributes:
      requests: of requests themselves, histories included.
      candidates: of their candidates, with what the teacher says of them.
      labels: of their candidates that were shown, what users did.
    """

    requests: Of
    candidates: Of
    labels: Of


def _packed_fields(*owners: Owner) -> tuple[Field, ...]:
    # A batch has the stage and the teacher's weight besides, which need no place of their own.
    return tuple(
        field
        for field in FIELDS
        if field.dtype and field.of in owners and field.name not in ("stage", "teacher_weight")
    )


_FIELDS = Parts(
    _packed_fields("request", "event"),
    _packed_fields("candidate", "scored"),
    _packed_fields("shown"),
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Requests side by side, on the host; n of them.

    Candidates stand in funnel order, so labels are known for a prefix of them, see `Request`. They
    may be a prefix of all that were retrieved, see `only_counting`.

    Attributes:
      rows: int32 [rows, numbers], 32 bits a number. Row 0 of `candidates` and of `labels` stands
        for none.
      spans: which numbers of a row are of which field.
      candidate_start: the candidates of request i are the rows from `candidate_start[i]` to
        `candidate_start[i + 1]`.
      label_start: the same for its labels.
      num_passed: how many candidates were passed, as it is stored.
      num_retrieved: how many candidates there were.
      num_scored: how many candidates, the first ones, the teacher has scored.
    """

    rows: Parts[Int[np.ndarray, "rows W"]]
    spans: Parts[packing.Spans]
    candidate_start: Int[np.ndarray, "n+1"]
    label_start: Int[np.ndarray, "n+1"]
    num_passed: Int[np.ndarray, "n"]
    num_retrieved: Int[np.ndarray, "n"]
    num_scored: Int[np.ndarray, "n"]

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.num_passed)

    @property
    def num_shown(self) -> Int[np.ndarray, "n"]:
        """The number of shown candidates of each request."""
        return np.diff(self.label_start)

    @property
    def num_candidates(self) -> Int[np.ndarray, "n"]:
        """The number of candidates of each request that are kept here."""
        return np.diff(self.candidate_start)


def columns_of(
    requests: Sequence[Request], spec: FeatureSpec, logged: Stage | None = Stage.RETRIEVED
) -> Columns:
    """The columns of some requests, at least one, on the host.

    Args:
      requests: the requests.
      spec: their sizes; with a `history_length` of 0, their histories are left out.
      logged: what the teacher has scored counts for candidates that came so far in the funnel; with
        None it counts for none, and its probabilities are left out.
    """
    if logged is not None:
        requests = [_scored_from(logged, request) for request in requests]

    def packed(fields: Sequence[Field], ragged: bool) -> tuple[Any, packing.Spans]:
        arrays = {
            field.name: _side_by_side(field, requests, spec)
            for field in fields
            if logged is not None or field.of != "scored"
        }
        nothing = {field.name: field.nothing for field in fields}
        return packing.pack(arrays, nothing if ragged else None)

    rows, spans = zip(*map(packed, _FIELDS, (False, True, True)), strict=True)
    scored = [0 if logged is None else len(request.teacher_probability) for request in requests]
    return Columns(
        rows=Parts(*rows),
        spans=Parts(*spans),
        candidate_start=_starts(len(request.item_id) for request in requests),
        label_start=_starts(len(request.user_label) for request in requests),
        num_passed=np.array([request.num_passed for request in requests], np.int64),
        num_retrieved=np.array([len(request.item_id) for request in requests], np.int64),
        num_scored=np.array(scored, np.int64),
    )


def _scored_from(stage: Stage, request: Request) -> Request:
    """The request as if its teacher had scored only candidates that came so far in the funnel."""
    number = request.num_reached(stage)
    if len(request.teacher_probability) <= number:
        return request
    return dataclasses.replace(
        request,
        teacher_probability=request.teacher_probability[:number],
        teacher_weight=request.teacher_weight[:number],
    )


def _side_by_side(
    field: Field, requests: Sequence[Request], spec: FeatureSpec
) -> Shaped[np.ndarray, "n ..."]:
    """A field of all requests: an entry a request, with a padded history, or one a candidate."""
    values = [_value(field, request, spec) for request in requests]
    if field.of == "event":
        length = spec.history_length
        recent = (value[max(len(value) - length, 0) :] for value in values)
        return np.stack([_filled(value, length, field.nothing) for value in recent])
    if field.of == "scored":
        number = (len(request.item_id) for request in requests)
        values = [_filled(*of, field.nothing) for of in zip(values, number, strict=True)]
    return np.stack(values) if field.of == "request" else np.concatenate(values)


def _value(field: Field, request: Request, spec: FeatureSpec) -> Shaped[np.ndarray, "..."]:
    """The value of a field, stored or worked out; an array of width 0 where there is none."""
    if field.name == "history_mask":
        return np.ones(len(request.history_id), np.bool_)
    if field.name == "teacher_probability":
        return proper_probability(request, spec.teacher_version)
    value = getattr(request, field.name)
    if value is None:
        number = {"request": (), "event": request.history_id.shape}
        return np.zeros((*number.get(field.of, request.item_id.shape), 0), field.stored)
    return np.asarray(value)


def _filled(
    values: Shaped[np.ndarray, "few ..."], length: int, nothing: float
) -> Shaped[np.ndarray, "length ..."]:
    filled = np.full((length, *values.shape[1:]), nothing, values.dtype)
    filled[: len(values)] = values
    return filled


def proper_probability(request: Request, version: str) -> Float[np.ndarray, "A T"]:
    """The teacher's probabilities, NaN where they were not logged properly.

    Proper is what the log says was written, by the right model version, as a number in [0, 1].
    """
    probability = request.teacher_probability
    if not version or request.teacher_version != version:
        return np.full_like(probability, np.nan)
    # A comparison with NaN is False, so NaN needs no test of its own.
    in_range = (probability >= 0) & (probability <= 1)
    written = (request.teacher_weight > 0)[:, None]
    return np.where(in_range & written, probability, np.float32(np.nan))


def joined(parts: Sequence[Columns]) -> Columns:
    """The requests of all parts, in their order, on the host."""

    def rows_of(name: str, nothing: int) -> Int[np.ndarray, "rows W"]:
        first, *others = (getattr(part.rows, name) for part in parts)
        return np.concatenate([first, *(rows[nothing:] for rows in others)])

    def numbers(name: str) -> Int[np.ndarray, "n"]:
        return np.concatenate([getattr(part, name) for part in parts])

    return Columns(
        rows=Parts(rows_of("requests", 0), rows_of("candidates", 1), rows_of("labels", 1)),
        spans=parts[0].spans,
        candidate_start=_starts(numbers("num_candidates")),
        label_start=_starts(numbers("num_shown")),
        num_passed=numbers("num_passed"),
        num_retrieved=numbers("num_retrieved"),
        num_scored=numbers("num_scored"),
    )


def only_counting(columns: Columns, stage: Stage) -> Columns:
    """The same requests without the candidates that cannot count in training.

    Those that were shown always count, for they may have labels. Whether the others that were
    passed count is decided for all of a request at once, and so for the rest.

    Args:
      columns: the requests, with all their candidates.
      stage: what came so far in the funnel counts.
    """
    passed_count, rest_counts = what_counts(columns, stage)
    number = np.where(passed_count, passed_of(columns), columns.num_shown)
    number = np.where(rest_counts, columns.num_retrieved, number)
    start = _starts(number)
    index = np.arange(start[-1])
    index[1:] += np.repeat(columns.candidate_start[:-1] - start[:-1], number)
    rows = columns.rows._replace(candidates=columns.rows.candidates[index])
    return dataclasses.replace(columns, rows=rows, candidate_start=start)


def what_counts(
    columns: Columns, stage: Stage
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Tests for each request of `only_counting` if its passed candidates count, and if the rest do.

    Those that were shown count as passed, beside what they count for by their labels. A teacher
    that has scored none but the shown makes no other passed one count.
    """
    passed, scored = passed_of(columns), columns.num_scored
    beyond_shown = scored >= np.minimum(columns.num_shown + 1, passed)
    return (
        ((scored > 0) & beyond_shown) | (stage <= Stage.PASSED),
        (scored > passed) | (stage <= Stage.RETRIEVED),
    )


def passed_of(columns: Columns) -> Int[np.ndarray, "n"]:
    """The number of passed candidates of each request, the shown ones included."""
    return np.clip(columns.num_passed, columns.num_shown, columns.num_retrieved)


# The golden ratio's fractional part.
_GOLDEN = (5**0.5 - 1) / 2


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """An order of n places in which every run, wherever it begins, is spread evenly over all.

    The j-th is the rank of j · φ mod 1 among those of all n, with the golden ratio φ: any run of a
    Kronecker sequence is spread so (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def in_sampling_order(columns: Columns) -> tuple[Columns, Int[np.ndarray, "n"]]:
    """The same requests, their candidates in an order from which runs are good samples.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest; each of these four in `spread_order`.

    Returns:
      The columns, and how many candidates of each request have a positive label.
    """
    shown, candidates = columns.num_shown, columns.num_candidates
    request = np.repeat(np.arange(len(columns)), shown)
    labels: Any = packing.unpack_rows(columns.rows.labels[1:], columns.spans.labels)  # type: ignore[arg-type]
    positive = labels["user_label"].any(axis=1)
    positives = np.bincount(request[positive], minlength=len(columns))
    passed = np.clip(columns.num_passed, shown, candidates)
    # Of the shown: positives, then negatives, as they stood.
    first_label = columns.label_start - 1
    by_label = np.argsort(2 * request + ~positive, kind="stable") - first_label[request]

    def order_of(index: int) -> Int[np.ndarray, "N"]:
        """The places of a request's candidates in the new order."""
        ends = [0, positives[index], shown[index], passed[index], candidates[index]]
        order = np.concatenate([at + spread_order(int(to - at)) for at, to in pairwise(ends)])
        first = slice(*first_label[[index, index + 1]])
        order[: shown[index]] = by_label[first][order[: shown[index]]]
        return order

    orders = [order_of(index) for index in range(len(columns))]

    def moved(
        rows: Int[np.ndarray, "rows W"], start: Int[np.ndarray, "n+1"]
    ) -> Int[np.ndarray, "rows W"]:
        """The rows in the new order; labels are of a prefix of the candidates."""
        places = [
            at + order[:of] for at, order, of in zip(start, orders, np.diff(start), strict=False)
        ]
        return rows[np.concatenate([[0], *places])]

    rows = columns.rows._replace(
        candidates=moved(columns.rows.candidates, columns.candidate_start),
        labels=moved(columns.rows.labels, columns.label_start),
    )
    return dataclasses.replace(columns, rows=rows), positives


def _starts(numbers: Iterable[int]) -> Int[np.ndarray, "n+1"]:
    """The first row of each request, and the end of the last one's; row 0 is a filler."""
    return np.concatenate([[1], 1 + np.cumsum(list(numbers), dtype=np.int64)])
