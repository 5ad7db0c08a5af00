"""A block of requests in the layout in which they are stored; `Request` describes one."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int64, Shaped

from kd_ranker.batch import STORED, FeatureSpec, Field, Owner, Request
from kd_ranker.requests.ragged import starts_of

# The number of single requests that are combined into one block.
_CHUNK = 256

# The number of entries that a `Request` has, by owner.
_NUMBERS: Mapping[Owner, Callable[[Request], int]] = {
    "request": lambda request: 1,
    "event": lambda request: len(request.history_id),
    "candidate": lambda request: len(request.item_id),
    "shown": lambda request: len(request.user_label),
    "scored": lambda request: len(request.teacher_probability),
    "known": lambda request: len(request.true_probability),
}


class Block(NamedTuple):
    """A block of n requests.

    Attributes:
      values: stored field -> its entries, grouped by request; of width 0 if the dataset lacks the
        field.
      numbers: owner -> the number of entries of each request.
    """

    values: Mapping[str, Shaped[np.ndarray, "sum ..."]]
    numbers: Mapping[Owner, Int64[np.ndarray, "n"]]

    def of_each(self, field: Field) -> list[Any]:
        """Return a stored field of each request: its entries, or its only entry."""
        values = self.values[field.name]
        if field.of == "request":
            return list(values) if field.width else values.tolist()
        starts = starts_of(self.numbers[field.of]).tolist()
        return [values[first:end] for first, end in itertools.pairwise(starts)]

    def requests(self) -> Iterator[Request]:
        """Yield the requests one by one; their arrays are views of the arrays of the block."""
        fields = [field for field in STORED if 0 not in self.values[field.name].shape[1:]]
        for values in zip(*map(self.of_each, fields), strict=True):
            yield Request(**dict(zip((field.name for field in fields), values, strict=True)))


def block_of(requests: Sequence[Request], spec: FeatureSpec) -> Block:
    """Combine requests into one block."""
    numbers = {
        of: np.array([number(request) for request in requests], np.int64)
        for of, number in _NUMBERS.items()
    }
    return Block({field.name: _joined(field, requests, spec) for field in STORED}, numbers)


def _joined(
    field: Field, requests: Sequence[Request], spec: FeatureSpec
) -> Shaped[np.ndarray, "sum ..."]:
    dtype = object if field.stored is str else field.stored
    values = [getattr(request, field.name) for request in requests]
    if not requests or values[0] is None:
        number = sum(map(_NUMBERS[field.of], requests))
        return np.full((number, *field.shape(spec)), field.nothing, dtype)
    if field.of == "request":
        return np.array(values, dtype)
    return np.concatenate(values)


def blocks_of(parts: Iterator[Request] | Iterator[Block], spec: FeatureSpec) -> Iterator[Block]:
    """Group single requests into blocks, and pass blocks through unchanged."""
    for first in parts:
        if isinstance(first, Block):
            yield first
            continue
        others = itertools.islice(cast(Iterator[Request], parts), _CHUNK - 1)
        yield block_of([first, *others], spec)
