"""The requests of a dataset, one by one and in blocks."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int64, Shaped

from kd_ranker.batch import STORED, FeatureSpec, Field, Owner, Request

SPLITS = ("train", "validation", "test")
"""The splits of a dataset, the earliest first if requests have times.

Models learn from the first. Settings are chosen on the second. The third is read once, for the
reported results.
"""

COUNTED_BY: Mapping[Owner, str] = {
    "event": "history_id",
    "candidate": "item_id",
    "shown": "user_label",
    "scored": "teacher_probability",
    "known": "true_probability",
}
"""Owner -> the field of a `Request` with as many entries as it has of that owner."""


def starts_of(lengths: Shaped[np.ndarray, "n"]) -> Int64[np.ndarray, "n+1"]:
    """Return where each of several concatenated lists begins, and where the last one ends.

    >>> starts_of(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(
    first: Int[np.ndarray, "n"], numbers: Int[np.ndarray, "n"], stride: int = 1
) -> Int[np.ndarray, "sum"]:
    """Return concatenated ranges: `numbers[i]` integers from `first[i]` in steps of `stride`.

    >>> ranges(np.array([5, 90]), np.array([3, 2])).tolist()
    [5, 6, 7, 90, 91]
    """
    start = starts_of(numbers)
    return np.repeat(first - stride * start[:-1], numbers) + stride * np.arange(start[-1])


BLOCK = 256
"""The number of single requests that are read or combined at a time."""


class Block(NamedTuple):
    """A block of n requests."""

    # Stored field -> its entries, grouped by request; of width 0 if the dataset lacks the field.
    values: Mapping[str, Shaped[np.ndarray, "sum ..."]]
    numbers: Mapping[Owner, Int64[np.ndarray, "n"]]  # of entries per request

    def requests(self) -> Iterator[Request]:
        """Yield the requests one by one; their arrays are views of the arrays of the block."""
        by_field = {
            field.name: self._split_by_request(field)
            for field in STORED
            if 0 not in self.values[field.name].shape[1:]
        }
        for values in zip(*by_field.values(), strict=True):
            yield Request(**dict(zip(by_field, values, strict=True)))

    def _split_by_request(self, field: Field) -> list[Any]:
        """Return a field of each request."""
        values = self.values[field.name]
        if field.of == "request":
            return list(values) if field.width else values.tolist()
        starts = starts_of(self.numbers[field.of]).tolist()
        return [values[start:stop] for start, stop in itertools.pairwise(starts)]


ReadBlock = Callable[[], Block]
"""A function that reads a block; sources return these before any request is read."""


def requests_in(blocks: Iterable[ReadBlock]) -> Iterator[Request]:
    """Yield the requests of blocks one by one; a block is read when its first request is due."""
    for read_block in blocks:
        yield from read_block().requests()


def block_of(requests: Sequence[Request], spec: FeatureSpec) -> Block:
    """Combine requests into one block."""
    numbers: dict[Owner, Int64[np.ndarray, "n"]] = {"request": np.ones(len(requests), np.int64)}
    for owner, name in COUNTED_BY.items():
        lengths = [len(getattr(request, name)) for request in requests]
        numbers[owner] = np.array(lengths, np.int64)
    values = {}
    for field in STORED:
        dtype = object if field.stored is str else field.stored
        entries = [getattr(request, field.name) for request in requests]
        if not requests or entries[0] is None:
            shape = (numbers[field.of].sum(), *field.shape(spec))
            values[field.name] = np.full(shape, field.nothing, dtype)
        elif field.of == "request":
            values[field.name] = np.array(entries, dtype)
        else:
            values[field.name] = np.concatenate(entries)
    return Block(values, numbers)
