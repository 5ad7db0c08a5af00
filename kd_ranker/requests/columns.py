"""Many requests as a few arrays. A batch is cut from them without a loop over its requests."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from kd_ranker.batch import FIELDS, FeatureSpec, Field, Owner, Request, Stage
from kd_ranker.requests import packing
from kd_ranker.requests.block import Block, block_of
from kd_ranker.requests.ragged import runs, starts_of

Of = TypeVar("Of")

# The number of rows that are copied at a time, so that their index arrays stay small.
_ROWS = 2**20


class Parts(NamedTuple, Generic[Of]):
    """The three parts of a batch, each of which is read at once.

    Attributes:
      requests: of the requests themselves, histories included.
      candidates: of their candidates, with the values of the teacher.
      labels: the user labels of the candidates that were shown.
    """

    requests: Of
    candidates: Of
    labels: Of


class Counts(NamedTuple):
    """The counts by which requests are read and sampled; int64, one entry per request.

    Attributes:
      request_id: the stored id.
      retrieved: the number of candidates.
      passed: the number of leading candidates that were passed, including the shown ones.
      shown: the number of leading candidates that were shown.
      scored: the number of leading candidates that the teacher has scored.
      positives: the number of candidates with a positive label.
      known: the number of candidates with facts for the evaluation: all or none.
      time: the time of the request, in seconds.
    """

    request_id: Int[np.ndarray, "*n"]
    retrieved: Int[np.ndarray, "*n"]
    passed: Int[np.ndarray, "*n"]
    shown: Int[np.ndarray, "*n"]
    scored: Int[np.ndarray, "*n"]
    positives: Int[np.ndarray, "*n"]
    known: Int[np.ndarray, "*n"]
    time: Int[np.ndarray, "*n"]

    def of(self, requests: Any) -> "Counts":
        """Return the counts of some of the requests."""
        return Counts(*(numbers[requests] for numbers in self))

    def reached(self, stage: Stage) -> Int[np.ndarray, "*n"]:
        """Return the number of leading candidates that reached a stage of the funnel."""
        if stage == Stage.SHOWN:
            return self.shown
        return self.passed if stage == Stage.PASSED else self.retrieved


class Rows(NamedTuple):
    """Packed rows of one kind, grouped by request.

    Attributes:
      values: int32 [rows, V], 32 bits per number.
      spans: the columns of each field among the W numbers of a row.
      first: the row of each request's first entry.
      stride: the number of rows from one entry of a request to its next.
      nothing: the index of the padding row.
      column: the last W - V numbers of each row, from a separate array; None if V is W.
    """

    values: Int[np.ndarray, "rows V"]
    spans: packing.Spans
    first: Int[np.ndarray, "n"]
    stride: int = 1
    nothing: int = 0
    column: "Rows | None" = None

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
        fields: Any = packing.unpack_rows(rows, self.spans)
        return fields

    def prefixes(self, numbers: Int[np.ndarray, "n"]) -> "Rows":
        """Copy the first `numbers[i]` entries of each request `i` into one array in memory."""
        ends = 1 + np.cumsum(numbers)
        first = ends - numbers
        values = np.empty((1 + int(numbers.sum()), self.width), np.int32)
        (values[0],) = self.at(np.zeros((), np.int64), np.array([-1]))
        for some in slices(numbers):
            values[first[some][0] : ends[some][-1]] = self.firsts(some, numbers[some])
        return Rows(values, self.spans, first)

    def without(self, fields: Collection[str]) -> "Rows":
        """Drop some fields, which must be the last ones of a row."""
        spans = tuple(span for span in self.spans if span.name not in fields)
        values = self.values[:, : spans[-1].columns.stop]
        return self._replace(values=values, spans=spans, column=None)

    def with_column(self, column: "Rows") -> "Rows":
        """Add the fields of an array with the same entries as the last ones of a row."""
        width = self.width
        spans = (span._replace(start=width + span.start) for span in column.spans)
        return self._replace(spans=(*self.spans, *spans), column=column)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The arrays of n requests on the host, in memory or in a file (see `row_files`).

    Candidates are in funnel order, so labels are known for a prefix of them, see `Request`. They
    may be a prefix of all that were retrieved, see `only_counting`.

    Attributes:
      requests: the requests themselves, histories included; one entry per request.
      candidates: the candidates, with the values of the teacher.
      labels: the user labels of the candidates that were shown.
      known: the facts for the evaluation about the candidates, if there are any.
      counts: the counts of the requests.
      kept: the number of leading candidates of each request that are kept here.
      expect: announces the next requests to read, and the number of candidates of each, so that
        a file can prefetch them.
    """

    requests: Rows
    candidates: Rows
    labels: Rows
    known: Rows
    counts: Counts
    kept: Int[np.ndarray, "n"]
    expect: Callable[[Int[np.ndarray, "R"], Int[np.ndarray, "R"]], None] = lambda *_: None

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.kept)

    def of(self, requests: slice) -> "Columns":
        """Return some of the requests."""
        names = ("requests", "candidates", "labels", "known")
        rows = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self,
            **{name: of._replace(first=of.first[requests]) for name, of in rows.items()},
            counts=self.counts.of(requests),
            kept=self.kept[requests],
        )

    @property
    def parts(self) -> Parts[Rows]:
        """The parts that a model may see."""
        return Parts(self.requests, self.candidates, self.labels)

    @property
    def values(self) -> Parts[Int[np.ndarray, "rows W"]]:
        """The rows themselves."""
        return Parts(*(part.values for part in self.parts))

    @property
    def spans(self) -> Parts[packing.Spans]:
        """The place of each field in a row."""
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


# Histories and the teacher's values are last in a row, so that `needed` can drop them.
_OF_REQUEST = _packed_fields("request", "event")
_OF_CANDIDATE = _packed_fields("candidate", "scored")
_OF_LABEL = _packed_fields("shown")
_OF_KNOWN = _packed_fields("known")


def columns_of(requests: Sequence[Request], spec: FeatureSpec) -> Columns:
    """Return the columns of requests, in memory. Without requests, only padding rows are left."""
    return columns_of_block(block_of(requests, spec), spec)


def columns_of_block(block: Block, spec: FeatureSpec) -> Columns:
    """Return the columns of a block, in memory."""
    counts = _counts_of(block)

    def side_by_side(fields: Sequence[Field]) -> dict[str, Shaped[np.ndarray, "n ..."]]:
        return {field.name: _side_by_side(field, block, spec) for field in fields}

    def rows(fields: Sequence[Field], numbers: Int[np.ndarray, "n"]) -> Rows:
        nothing = {field.name: field.nothing for field in fields}
        packed = packing.pack(side_by_side(fields), nothing)
        return Rows(*packed, 1 + np.cumsum(numbers) - numbers)

    return Columns(
        requests=Rows(*packing.pack(side_by_side(_OF_REQUEST)), np.arange(len(counts.known))),
        candidates=rows(_OF_CANDIDATE, counts.retrieved),
        labels=rows(_OF_LABEL, counts.shown),
        known=rows(_OF_KNOWN, counts.known),
        counts=counts,
        kept=counts.retrieved,
    )


def _counts_of(block: Block) -> Counts:
    retrieved, shown = block.numbers["candidate"], block.numbers["shown"]
    positive = block.values["user_label"].any(axis=1)
    owner = np.repeat(np.arange(len(shown)), shown)
    return Counts(
        request_id=block.values["request_id"],
        retrieved=retrieved,
        # The same rule as in `Request.num_reached`.
        passed=np.minimum(np.maximum(block.values["num_passed"], shown), retrieved),
        shown=shown,
        scored=block.numbers["scored"],
        positives=np.bincount(owner[positive], minlength=len(shown)),
        known=block.numbers["known"],
        time=block.values["time"],
    )


def _side_by_side(field: Field, block: Block, spec: FeatureSpec) -> Shaped[np.ndarray, "n ..."]:
    """Return a field of all requests: one entry per request, history padded, or per candidate."""
    numbers = block.numbers[field.of]
    if field.of == "event":
        return _recent(field, block, spec.history_length)
    values = block.values[field.name]
    if field.of != "scored":
        return values
    if field.name == "teacher_probability":
        values = proper_probability(block, spec.teacher_version)
    candidates = block.numbers["candidate"]
    filled = np.full((candidates.sum(), *values.shape[1:]), field.nothing, values.dtype)
    filled[runs(starts_of(candidates)[:-1], numbers)] = values
    return filled


def _recent(field: Field, block: Block, length: int) -> Shaped[np.ndarray, "n H ..."]:
    """Return a field of the last events of each request, padded at the end."""
    numbers = block.numbers["event"]
    if field.name == "history_mask":
        values = np.ones(numbers.sum(), np.bool_)
    else:
        values = block.values[field.name]
    kept = np.minimum(numbers, length)
    last = values[runs(starts_of(numbers)[1:] - kept, kept)]
    filled = np.full((len(numbers) * length, *values.shape[1:]), field.nothing, values.dtype)
    filled[runs(np.arange(len(numbers)) * length, kept)] = last
    return filled.reshape(len(numbers), length, *values.shape[1:])


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
    """Drop the fields that are not needed.

    Args:
      columns: the requests, with all fields.
      logged: the funnel stage that a candidate must reach for its teacher score to count. With
        None no score counts, and the probabilities are dropped. Otherwise scores that do not
        count stay with their candidates, and `cutting` leaves them out.
      history: whether histories are needed; if not, they have the length 0.
    """
    counts = columns.counts
    reached = 0 if logged is None else counts.reached(logged)
    columns = dataclasses.replace(
        columns, counts=counts._replace(scored=np.minimum(counts.scored, reached))
    )
    if logged is None:
        names = [field.name for field in _packed_fields("scored")]
        columns = dataclasses.replace(columns, candidates=columns.candidates.without(names))
    if not history:
        columns = dataclasses.replace(columns, requests=_without_events(columns.requests))
    return columns


def _without_events(rows: Rows) -> Rows:
    """Return the same rows, with histories of length 0."""
    events = [field.name for field in _packed_fields("event")]
    own = rows.without(events)
    none = (
        span._replace(start=own.values.shape[1], shape=(0, *span.shape[1:]))
        for span in rows.spans
        if span.name in events
    )
    return own._replace(spans=(*own.spans, *none))


def only_counting(columns: Columns, stage: Stage) -> Columns:
    """Copy the requests to memory, without the candidates that cannot count in training.

    Candidates that were shown always count, since they may have labels. The other passed
    candidates of a request count all together or not at all, and so do the rest.

    Args:
      columns: the requests, with all their candidates.
      stage: candidates that reached this stage of the funnel count.
    """
    kept = counting(columns.counts, stage)
    return dataclasses.replace(
        columns,
        requests=columns.requests._replace(
            values=columns.requests.values[columns.requests.first], first=np.arange(len(columns))
        ),
        candidates=columns.candidates.prefixes(kept),
        labels=columns.labels.prefixes(columns.counts.shown),
        kept=kept,
    )


def counting(counts: Counts, stage: Stage) -> Int[np.ndarray, "n"]:
    """Return the number of leading candidates that can count in training; see `only_counting`."""
    passed_count, rest_counts = what_counts(counts, stage)
    number = np.where(passed_count, counts.passed, counts.shown)
    return np.where(rest_counts, counts.retrieved, number)


def what_counts(
    counts: Counts, stage: Stage
) -> tuple[Bool[np.ndarray, "*n"], Bool[np.ndarray, "*n"]]:
    """Test for each request if its passed candidates count, and if the rest do.

    See `only_counting`. Shown candidates count as passed, in addition to counting by their labels.
    A teacher that has scored only shown candidates makes no other passed candidate count.
    """
    beyond_shown = counts.scored >= np.minimum(counts.shown + 1, counts.passed)
    return (
        ((counts.scored > 0) & beyond_shown) | (stage <= Stage.PASSED),
        (counts.scored > counts.passed) | (stage <= Stage.RETRIEVED),
    )


# The golden ratio's fractional part.
_GOLDEN = (5**0.5 - 1) / 2


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """Return an order of n places in which every run is spread evenly over all places.

    The j-th place is the rank of j · φ mod 1 among those of all n, with the golden ratio φ. Any run
    of a Kronecker sequence is spread evenly (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def in_sampling_order(columns: Columns) -> Columns:
    """Reorder candidates so that any run of them is a good sample.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest. Each of these four groups is in `spread_order`. Facts for the
    evaluation keep their order.
    """
    counts, shown = columns.counts, columns.counts.shown
    request = np.repeat(np.arange(len(columns)), shown)
    positive = columns.labels.fields(slice(None), shown)["user_label"].any(axis=1)
    # The size of each of the four groups in a request, and where it begins.
    bounds = np.stack([counts.positives, shown, counts.passed, columns.kept], axis=1)
    ends = np.minimum(bounds, columns.kept[:, None])
    sizes = np.diff(ends, axis=1, prepend=0)
    order = np.repeat((ends - sizes).ravel(), sizes.ravel()) + _spread_orders(sizes.ravel())
    # The first two groups are mixed, in the order in which they were shown.
    start = starts_of(shown)[:-1]
    by_label = np.argsort(2 * request + ~positive, kind="stable") - start[request]
    of_shown = runs(starts_of(columns.kept)[:-1], shown)
    order[of_shown] = by_label[start[request] + order[of_shown]]

    def moved(rows: Rows, numbers: Int[np.ndarray, "n"], order: Int[np.ndarray, "sum"]) -> Rows:
        """Return the rows in the new order; labels cover a prefix of the candidates."""
        which = np.repeat(rows.first, numbers) + rows.stride * order
        first = 1 + starts_of(numbers)[:-1]
        return Rows(rows.values[np.append(rows.nothing, which)], rows.spans, first)

    return dataclasses.replace(
        columns,
        candidates=moved(columns.candidates, columns.kept, order),
        labels=moved(columns.labels, shown, order[of_shown]),
    )


def _spread_orders(sizes: Int[np.ndarray, "n"]) -> Int[np.ndarray, "sum"]:
    """Concatenate the `spread_order` of each size."""
    distinct, which = np.unique(sizes, return_inverse=True)
    orders = np.concatenate([spread_order(size) for size in distinct.tolist()])
    return orders[runs(starts_of(distinct)[:-1][which], sizes)]


def slices(numbers: Int[np.ndarray, "n"]) -> Iterator[slice]:
    """Yield slices of consecutive requests, with about `_ROWS` entries each."""
    block = np.cumsum(numbers) // _ROWS
    ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(numbers)]
    return (slice(*of) for of in pairwise([0, *ends]))
