"""Many requests as packed rows. A batch is cut from them without a loop over its requests.

A row holds the numbers of an entry, 32 bits each: of a request with its history, of a candidate
with the teacher's values, of the labels of a candidate, or of the facts for the evaluation about
one. A NumPy type per kind of row has the place of each field. All fields of an entry are in one
row, so that one read returns them. A compiled program pays for each gather and for each array
argument, however small: a wide row costs about as much as a narrow one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Shaped
from numpy.lib.stride_tricks import sliding_window_view

from kd_ranker.batch import FIELDS, FeatureSpec, Field, Owner, Stage
from kd_ranker.requests.request import ranges, starts_of

LEAST_WHOLE = 0.9
"""The share of a request's candidates with a score from which it counts as scored whole.

A few writes get lost.
"""

# The number of rows that are copied at a time, so that their index arrays stay small.
_ROWS_AT_A_TIME = 2**20


def row_type(spec: FeatureSpec, *owners: Owner) -> np.dtype:
    """Return the type of a row with the fields of some owners, float32 or int32.

    The events of a history are in the row of their request.
    """
    fields: list[Any] = []
    for owner in owners:
        for field in FIELDS:
            if field.of == owner and _is_in_rows(field):
                is_float = (field.stored or field.dtype) is np.float32
                events = (spec.history_length,) if owner == "event" else ()
                shape = (*events, *field.shape(spec))
                fields.append((field.name, np.float32 if is_float else np.int32, shape))
    return np.dtype(fields)


def _is_in_rows(field: Field) -> bool:
    # A batch also has the stage and the teacher's weight, which are computed.
    if field.name in ("stage", "teacher_weight"):
        return False
    return field.dtype is not None or field.of == "known"


def width_of(row: np.dtype) -> int:
    """Return the numbers in a row."""
    return row.itemsize // 4


def unpack_rows(rows: Int[Array, "*shape W"], row: np.dtype) -> dict[str, Any]:
    """Return the fields of some rows by name, dictionaries of those that are rows themselves.

    NumPy in and out, or JAX.
    """
    unpacked: dict[str, Any] = {}
    for name, place in (row.fields or {}).items():
        dtype, start = place[:2]  # the start is in bytes
        entry = rows[..., start // 4 : (start + dtype.itemsize) // 4]
        shape = (*rows.shape[:-1], *dtype.shape)
        if dtype.base.names:
            inner_rows = entry.reshape(*shape, width_of(dtype.base))
            unpacked[name] = unpack_rows(inner_rows, dtype.base)
        elif dtype.base == np.float32:
            unpacked[name] = entry.reshape(shape).view(np.float32)
        else:
            unpacked[name] = entry.reshape(shape)
    return unpacked


class Parts(NamedTuple):
    """The parts of a batch; each is read at once."""

    requests: Any  # with their histories
    candidates: Any  # with the values of the teacher
    labels: Any  # of the candidates that were shown, by users


class Counts(NamedTuple):
    """The counts by which requests are read and sampled; int64, one entry per request.

    They count candidates. Those that were passed, shown or scored are the leading ones: `scored` is
    0, `shown`, `passed` or `retrieved`, so this also holds in the order of `sampling_order`.
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
        if stage == Stage.PASSED:
            return self.passed
        return self.retrieved


class Windows:
    """The rows at all places among the numbers of some arrays, one array after the other."""

    def __init__(self, arrays: Sequence[Int32[np.ndarray, "_"]], width: int) -> None:
        self.arrays = arrays
        self._width = width
        self._starts = starts_of(np.array([len(array) for array in arrays]))
        self._windows = [sliding_window_view(array, width) for array in arrays]

    def __getitem__(self, places: Int[np.ndarray, "*shape"]) -> Int32[np.ndarray, "*shape width"]:
        """Return copies of the rows that begin at some places."""
        if len(self._windows) == 1:
            return self._windows[0][places]
        rows = np.empty((*places.shape, self._width), np.int32)
        for windows, (start, stop) in zip(self._windows, pairwise(self._starts), strict=True):
            is_inside = (places >= start) & (places < stop)
            rows[is_inside] = windows[places[is_inside] - start]
        return rows


class Rows(NamedTuple):
    """Packed rows of one kind, grouped by request."""

    windows: Windows
    type: np.dtype  # of a row
    first: Int[np.ndarray, "n"]  # the place of each request's first row
    stride: int  # numbers from one row of a request to its next
    nothing: int = 0  # the place of the padding row
    column: "Rows | None" = None  # the last fields of each row, stored elsewhere

    def at(
        self, requests: Int[np.ndarray, "*R"], places: Int[np.ndarray, "*R N"]
    ) -> Int[np.ndarray, "*R N W"]:
        """Return the rows at places in the entries of requests, the padding row for places < 0."""
        starts = self.first[requests][..., None] + places.astype(np.int64) * self.stride
        rows = self.windows[np.where(places < 0, self.nothing, starts)]
        if self.column is None:
            return rows
        return np.concatenate([rows, self.column.at(requests, places)], axis=-1)

    def firsts(
        self, requests: slice | Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]
    ) -> Int[np.ndarray, "sum W"]:
        """Return the first `numbers[i]` rows of each request `i`, grouped by request."""
        rows = self.windows[ranges(self.first[requests], numbers, self.stride)]
        if self.column is None:
            return rows
        return np.concatenate([rows, self.column.firsts(requests, numbers)], axis=-1)

    def fields(
        self, requests: slice | Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]
    ) -> dict[str, Shaped[np.ndarray, "sum ..."]]:
        """Return `firsts` by the names of fields."""
        rows: Any = self.firsts(requests, numbers)
        return unpack_rows(rows, self.type)

    def prefixes(
        self, numbers: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "rows W"]]:
        """Copy the first `numbers[i]` entries of each request `i` into one array in memory.

        Return the first row of each request in it, and the rows, which begin with a padding row.
        """
        first = 1 + starts_of(numbers)
        rows = np.empty((first[-1], width_of(self.type)), np.int32)
        rows[:1] = self.at(np.zeros((), np.int64), np.array([-1]))
        for requests in slices(numbers):
            begin = first[requests.start]
            end = first[requests.stop]
            rows[begin:end] = self.firsts(requests, numbers[requests])
        return first[:-1], rows

    def first_fields(self, row: np.dtype) -> "Rows":
        """Keep the first fields of a row, those of the type `row`."""
        windows = Windows(self.windows.arrays, width_of(row))
        return self._replace(windows=windows, type=row, column=None)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The rows of n requests on the host, in memory or in a file (see `row_files`).

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
        """Return the number of requests."""
        return len(self.counts.retrieved)

    @property
    def parts(self) -> Parts:
        """The rows that a model may see."""
        return Parts(self.requests, self.candidates, self.labels)

    @property
    def types(self) -> Parts:
        """The type of each of these rows."""
        return Parts(*(part.type for part in self.parts))


def needed(columns: Columns, spec: FeatureSpec, logged: Stage | None, history: bool) -> Columns:
    """Drop the teacher's probabilities if `logged` is None, and histories, which get the length 0.

    Otherwise a score counts if its candidate reached the stage `logged`. Scores that do not count
    stay with their candidates, and `cutting` leaves them out.
    """
    counts = columns.counts
    requests = columns.requests
    candidates = columns.candidates
    if logged is None:
        counts = counts._replace(scored=np.zeros_like(counts.scored))
        candidates = candidates.first_fields(row_type(spec, "candidate"))
    else:
        counts = counts._replace(scored=np.minimum(counts.scored, counts.reached(logged)))
    if not history:
        without = dataclasses.replace(spec, history_length=0)
        requests = requests.first_fields(row_type(without, "request", "event"))
    return dataclasses.replace(columns, requests=requests, candidates=candidates, counts=counts)


def counting(counts: Counts, stage: Stage) -> Int[np.ndarray, "n"]:
    """Return the number of leading candidates that training may keep; see `kept_kinds`."""
    kept = kept_kinds(counts, stage)
    number = np.where(kept.others, counts.passed, counts.shown)
    return np.where(kept.rest, counts.retrieved, number)


class KeptKinds(NamedTuple):
    """The kinds of drawn candidates that training keeps of each request, beside labeled ones."""

    others: Bool[np.ndarray, "*n"]  # were passed, and are not drawn with a label
    rest: Bool[np.ndarray, "*n"]  # were not passed


def kept_kinds(counts: Counts, stage: Stage) -> KeptKinds:
    """Return the kinds that reached `stage`, or of which the log has scores.

    A log has scores of the first candidates of a request. So it has some of the others that were
    passed if it has more scores than candidates were shown, and some of the rest if it has more
    than were passed. Where all that were passed were shown, the others are only shown candidates
    whose label is not drawn; these are kept if all of the shown have scores.
    """
    others_have_scores = np.where(
        counts.passed == counts.shown,
        (counts.scored > 0) & (counts.scored >= counts.shown),
        counts.scored > counts.shown,
    )
    rest_have_scores = counts.scored > counts.passed
    return KeptKinds(
        others=others_have_scores | (stage <= Stage.PASSED),
        rest=rest_have_scores | (stage <= Stage.RETRIEVED),
    )


def slices(numbers: Int[np.ndarray, "n"]) -> Iterator[slice]:
    """Yield slices of consecutive requests, with about `_ROWS_AT_A_TIME` entries each."""
    block = np.cumsum(numbers) // _ROWS_AT_A_TIME
    inner_ends = (np.flatnonzero(np.diff(block)) + 1).tolist()
    for start, stop in pairwise([0, *inner_ends, len(numbers)]):
        yield slice(start, stop)
