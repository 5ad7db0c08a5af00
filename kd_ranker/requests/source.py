"""A dataset before it is built: what `storage.build` reads from a source, and nothing else."""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from kd_ranker.batch import FeatureSpec, Request
from kd_ranker.requests.request import BLOCK, ReadBlock, block_of
from kd_ranker.requests.row_files import Flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A dataset before it is built: what it holds as a whole, and its requests in blocks."""

    spec: FeatureSpec
    item_features: Float32[np.ndarray, "items F"]
    item_category: Int32[np.ndarray, "items I"] | None = None  # -1 for a missing id
    num_requests: Mapping[str, int]  # split -> how many requests its blocks hold

    @abc.abstractmethod
    def blocks(self, split: str) -> Iterable[ReadBlock]:
        """Return a function for each block of a split, which reads it; the same at every call."""

    def pack_blocks(
        self, pack: Callable[[ReadBlock], Flat], blocks: Iterable[ReadBlock]
    ) -> Iterator[Flat]:
        """Yield each block as `pack` packs it, in order.

        Sources of many requests pack several blocks at once, in threads or on other machines.
        """
        return map(pack, blocks)

    def write_side_files(self, directory: Path) -> None:  # noqa: B027
        """Write more files into the dataset's folder; none by default."""

    def close(self) -> None:  # noqa: B027
        """Release what the source holds; nothing can be read after it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSource(Source):
    """A source that yields single requests.

    Attributes:
      requests: split -> its requests, the same ones at every call.
    """

    requests: Callable[[str], Iterable[Request]]

    def blocks(self, split: str) -> Iterator[ReadBlock]:
        """Yield a function for each block, which combines its requests."""
        requests = iter(self.requests(split))
        while chunk := list(itertools.islice(requests, BLOCK)):
            yield functools.partial(block_of, chunk, self.spec)
