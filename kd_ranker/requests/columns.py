"""Many requests as a few packed arrays. A batch is cut from them without a loop over its requests.

All fields of an entry are in one row, so that one read returns them. A compiled program pays for
each gather and for each array argument, however small: a wide row costs about as much as a narrow
one.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from kd_ranker.batch import FIELDS, FeatureSpec, Field, Owner, Request, Stage
from kd_ranker.requests.request import Block, block_of, runs, starts_of

# The number of rows that are copied at a time, so that their index arrays stay small.
_ROWS = 2**20


class Span(NamedTuple):
    """The place of an array in a row: its first column, the shape of an entry, and its type."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def columns(self) -> slice:
        """The columns of the array."""
        return slice(self.start, self.start + math.prod(self.shape))


Spans = tuple[Span, ...]


def pack(
    arrays: Mapping[str, Shaped[np.ndarray, "n ..."]], nothing: Mapping[str, float]
) -> tuple[Int[np.ndarray, "n+1 W"], Spans]:
    """Pack arrays of equal length into rows, 32 bits per number, behind a padding row.

    Floats become float32, integers int32; booleans stay. The padding row has the values `nothing`.
    """
    parts, spans, width = [], [], 0
    for name, array in arrays.items():
        kind = {"f": "float32", "b": "bool"}.get(array.dtype.kind, "int32")
        first = np.full((1, *array.shape[1:]), nothing[name], array.dtype)
        array = np.concatenate([first, array])
        stored = array.astype(np.float32).view(np.int32) if kind == "float32" else array
        spans.append(Span(name, width, array.shape[1:], kind))
        parts.append(stored.reshape(len(array), math.prod(array.shape[1:])))
        width = spans[-1].columns.stop
    return np.concatenate(parts, axis=1, dtype=np.int32, casting="unsafe"), tuple(spans)


def unpack_rows(rows: Int[Array, "*shape W"], spans: Spans) -> dict[str, Shaped[Array, "..."]]:
    """Return the arrays of some rows by name; NumPy in and out, or JAX."""
    unpacked = {}
    for span in spans:
        entry = rows[..., span.columns].reshape(*rows.shape[:-1], *span.shape)
        is_float = span.dtype == "float32"
        unpacked[span.name] = entry.view(np.float32) if is_float else entry.astype(span.dtype)
    return unpacked


class Parts(NamedTuple):
    """The parts of a batch; each is read at once."""

    requests: Any  # with their histories
    candidates: Any  # with the values of the teacher
    labels: Any  # of the candidates that were shown, by users


class Counts(NamedTuple):
    """The counts by which requests are read and sampled; int64, one entry per request.

    They count candidates; those that were passed, shown or scored are the leading ones.
    """

    request_id: Int[np.ndarray, "*n"]
    retrieved: Int[np.ndarray, "*n"]
    passed: Int[np.ndarray, "*n"]  # including the shown ones
    shown: Int[np.ndarray, "*n"]
    scored: Int[np.ndarray, "*n"]  # by the teacher
    positives: Int[np.ndarray, "*n"]  # with a positive label
    known: Int[np.ndarray, "*n"]  # with facts for the evaluation: all or none
    time: Int[np.ndarray, "*n"]  # of the request, in seconds

    def of(self, requests: Any) -> "Counts":
        """Return the counts of some of the requests."""
        return Counts(*(numbers[requests] for numbers in self))

    def reached(self, stage: Stage) -> Int[np.ndarray, "*n"]:
        """Return the number of leading candidates that reached a stage of the funnel."""
        if stage == Stage.SHOWN:
            return self.shown
        return self.passed if stage == Stage.PASSED else self.retrieved


class Rows(NamedTuple):
    """Packed rows of one kind, grouped by request: W int32 numbers, V of them in one array."""

    values: Int[np.ndarray, "rows V"]
    spans: Spans  # the columns of each field among the W numbers of a row
    first: Int[np.ndarray, "n"]  # the row of each request's first entry
    stride: int = 1  # the number of rows from one entry of a request to its next
    nothing: int = 0  # the index of the padding row
    column: "Rows | None" = None  # the last W - V numbers of each row; None if V is W

    @property
    def width(self) -> int:
        """The W numbers of a row."""
        return self.spans[-1].columns.stop

    def at(
        self, requests: Int[np.ndarray, "*R"], places: Int[np.ndarray, "*R N"]
    ) -> Int[np.ndarray, "*R N W"]:
        """Return the rows at places in the entries of requests, the padding row for places < 0."""
        rows = self.first[requests][..., None] + places.astype(np.int64) * self.stride
        own = self.values[np.where(places < 0, self.nothing, rows)]
        if self.column is None:
            return own
        return np.concatenate([own, self.column.at(requests, places)], axis=-1)

    def firsts(
        self, requests: slice | Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]
    ) -> Int[np.ndarray, "sum W"]:
        """Return the first `numbers[i]` rows of each request `i`, grouped by request."""
        own = self.values[runs(self.first[requests], numbers, self.stride)]
        if self.column is None:
            return own
        return np.concatenate([own, self.column.firsts(requests, numbers)], axis=-1)

    def fields(
        self, requests: slice | Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]
    ) -> dict[str, Shaped[np.ndarray, "sum ..."]]:
        """Return `firsts` by the names of fields."""
        rows: Any = self.firsts(requests, numbers)
        fields: Any = unpack_rows(rows, self.spans)
        return fields

    def prefixes(self, numbers: Int[np.ndarray, "n"]) -> "Rows":
        """Copy the first `numbers[i]` entries of each request `i` into one array in memory."""
        first = 1 + starts_of(numbers)
        values = np.empty((first[-1], self.width), np.int32)
        (values[0],) = self.at(np.zeros((), np.int64), np.array([-1]))
        for some in slices(numbers):
            values[first[some.start] : first[some.stop]] = self.firsts(some, numbers[some])
        return Rows(values, self.spans, first[:-1])

    def without(self, fields: Collection[str]) -> "Rows":
        """Drop some fields, which must be the last ones of a row."""
        spans = tuple(span for span in self.spans if span.name not in fields)
        values = self.values[:, : spans[-1].columns.stop]
        return self._replace(values=values, spans=spans, column=None)

    def with_column(self, column: "Rows") -> "Rows":
        """Add the fields of an array with the same entries as the last ones of a row."""
        spans = (span._replace(start=self.width + span.start) for span in column.spans)
        return self._replace(spans=(*self.spans, *spans), column=column)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The arrays of n requests on the host, in memory or in a file (see `row_files`).

    Candidates are in funnel order, so labels are known for a prefix of them, see `Request`.
    """

    requests: Rows  # one entry per request, histories included
    candidates: Rows  # with the values of the teacher
    labels: Rows  # of the candidates that were shown, by users
    known: Rows  # facts for the evaluation about the candidates, if there are any
    counts: Counts
    # Announces the next requests to read, and the number of candidates of each, to prefetch them.
    expect: Callable[[Int[np.ndarray, "R"], Int[np.ndarray, "R"]], None] = lambda *_: None

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.counts.retrieved)

    def of(self, requests: slice) -> "Columns":
        """Return some of the requests."""
        rows = {name: getattr(self, name) for name in ("requests", "candidates", "labels", "known")}
        some = {name: of._replace(first=of.first[requests]) for name, of in rows.items()}
        return dataclasses.replace(self, **some, counts=self.counts.of(requests))

    @property
    def parts(self) -> Parts:
        """The rows that a model may see."""
        return Parts(self.requests, self.candidates, self.labels)

    @property
    def spans(self) -> Parts:
        """The `Spans` of each of these."""
        return Parts(*(part.spans for part in self.parts))


def _packed_fields(*owners: Owner) -> tuple[Field, ...]:
    # A batch also has the stage and the teacher's weight, which need no separate columns.
    return tuple(
        field
        for owner in owners
        for field in FIELDS
        if field.of == owner and (field.dtype or owner == "known")
        if field.name not in ("stage", "teacher_weight")
    )


_EVENT_FIELDS, _SCORED_FIELDS = (
    tuple(field.name for field in _packed_fields(owner)) for owner in ("event", "scored")
)


def columns_of(requests: Sequence[Request], spec: FeatureSpec) -> Columns:
    """Return the columns of requests, in memory. Without requests, only padding rows are left."""
    return columns_of_block(block_of(requests, spec), spec)


def columns_of_block(block: Block, spec: FeatureSpec) -> Columns:
    """Return the columns of a block, in memory."""
    retrieved, shown = block.numbers["candidate"], block.numbers["shown"]
    positive = np.repeat(np.arange(len(shown)), shown)[block.values["user_label"].any(axis=1)]
    counts = Counts(
        request_id=block.values["request_id"],
        retrieved=retrieved,
        # Stored as it was logged: fewer passed than shown, or more than there are.
        passed=np.minimum(np.maximum(block.values["num_passed"], shown), retrieved),
        shown=shown,
        scored=block.numbers["scored"],
        positives=np.bincount(positive, minlength=len(shown)),
        known=block.numbers["known"],
        time=block.values["time"],
    )

    def rows(numbers: Int[np.ndarray, "n"], *owners: Owner) -> Rows:
        fields = _packed_fields(*owners)
        arrays = {field.name: _entries(field, block, spec) for field in fields}
        packed = pack(arrays, {field.name: field.nothing for field in fields})
        return Rows(*packed, 1 + starts_of(numbers)[:-1])

    # Histories and the teacher's values are last in a row, so that `needed` can drop them.
    return Columns(
        requests=rows(np.ones_like(shown), "request", "event"),
        candidates=rows(retrieved, "candidate", "scored"),
        labels=rows(shown, "shown"),
        known=rows(counts.known, "known"),
        counts=counts,
    )


def _entries(field: Field, block: Block, spec: FeatureSpec) -> Shaped[np.ndarray, "n ..."]:
    """Return a field of all requests: one entry per request, history padded, or per candidate."""
    numbers = block.numbers[field.of]
    if field.name == "history_mask":
        values = np.ones(numbers.sum(), np.bool_)
    elif field.name == "teacher_probability":
        values = proper_probability(block, spec.teacher_version)
    else:
        values = block.values[field.name]
    if field.of not in ("event", "scored"):
        return values
    if field.of == "event":  # the last ones of each request, padded at the end
        kept = np.minimum(numbers, spec.history_length)
        values = values[runs(starts_of(numbers)[1:] - kept, kept)]
        numbers, padded = kept, np.full(len(numbers), spec.history_length)
    else:
        padded = block.numbers["candidate"]
    starts = starts_of(padded)
    filled = np.full((starts[-1], *values.shape[1:]), field.nothing, values.dtype)
    filled[runs(starts[:-1], numbers)] = values
    if field.of == "event":
        return filled.reshape(len(numbers), spec.history_length, *values.shape[1:])
    return filled


def proper_probability(block: Block, version: str) -> Float[np.ndarray, "A T"]:
    """Return the teacher's probabilities, NaN where they were not logged properly.

    A proper probability was written according to the log, by the right model version, and is a
    number in [0, 1].
    """
    probability = block.values["teacher_probability"]
    right = (block.values["teacher_version"] == version) & bool(version)
    written = np.repeat(right, block.numbers["scored"]) & (block.values["teacher_weight"] > 0)
    # A comparison with NaN is False, so NaN needs no separate test.
    in_range = (probability >= 0) & (probability <= 1)
    return np.where(in_range & written[:, None], probability, np.float32(np.nan))


def needed(columns: Columns, logged: Stage | None, history: bool) -> Columns:
    """Drop the teacher's probabilities if `logged` is None, and histories, which get the length 0.

    Otherwise a score counts if its candidate reached the stage `logged`. Scores that do not count
    stay with their candidates, and `cutting` leaves them out.
    """
    counts, requests, candidates = columns.counts, columns.requests, columns.candidates
    reached = 0 if logged is None else counts.reached(logged)
    counts = counts._replace(scored=np.minimum(counts.scored, reached))
    if logged is None:
        candidates = candidates.without(_SCORED_FIELDS)
    if not history:
        own = requests.without(_EVENT_FIELDS)
        none = (
            span._replace(start=own.width, shape=(0, *span.shape[1:]))
            for span in requests.spans
            if span.name in _EVENT_FIELDS
        )
        requests = own._replace(spans=(*own.spans, *none))
    return dataclasses.replace(columns, requests=requests, candidates=candidates, counts=counts)


def counting(counts: Counts, stage: Stage) -> Int[np.ndarray, "n"]:
    """Return the number of leading candidates that can count in training; see `what_counts`."""
    passed_count, rest_counts = what_counts(counts, stage)
    number = np.where(passed_count, counts.passed, counts.shown)
    return np.where(rest_counts, counts.retrieved, number)


def what_counts(
    counts: Counts, stage: Stage
) -> tuple[Bool[np.ndarray, "*n"], Bool[np.ndarray, "*n"]]:
    """Test for each request if its passed candidates count in training, and if the rest do.

    Candidates that reached `stage` or have a score count. Shown candidates count as passed, in
    addition to counting by their labels. A teacher that has scored only shown candidates makes no
    other passed candidate count.
    """
    beyond_shown = counts.scored >= np.minimum(counts.shown + 1, counts.passed)
    return (
        ((counts.scored > 0) & beyond_shown) | (stage <= Stage.PASSED),
        (counts.scored > counts.passed) | (stage <= Stage.RETRIEVED),
    )


def slices(numbers: Int[np.ndarray, "n"]) -> Iterator[slice]:
    """Yield slices of consecutive requests, with about `_ROWS` entries each."""
    block = np.cumsum(numbers) // _ROWS
    ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(numbers)]
    return (slice(*of) for of in pairwise([0, *ends]))
