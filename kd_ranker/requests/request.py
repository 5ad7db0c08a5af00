"""A dataset before it is built: its requests, and the data that they share."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32

from kd_ranker.batch import FeatureSpec, Request
from kd_ranker.requests.block import Block
from kd_ranker.requests.pool import Runner, run_here
from kd_ranker.requests.records import Dataset

SPLITS = ("train", "validation", "test")
"""The splits of a dataset, the earliest first if requests have times.

Models learn from the first. Settings are chosen on the second. The third is read once, for the
reported results.
"""

Shard = Callable[[], Iterator[Request] | Iterator[Block]]
"""Yields requests of a split, one by one or in blocks."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset before it is built.

    Attributes:
      spec: the sizes of its features.
      item_features: float32 [num_items, F], the features of each item; stored once.
      requests: split (one of `SPLITS`) -> its requests, the same ones at every call.
      num_requests: split -> the number of requests that `requests` yields, for progress bars.
      item_category: the category ids of each item, -1 for a missing one; None without any.
      shards: split -> its requests in nonempty parts, which `run` writes. With None, only
        `requests` is read.
      run: the runner that writes shards, see `pool.open_pool`.
      write_beside: writes additional files into the dataset's folder.
      earlier: a dataset of requests that come before these and become training requests; its ids
        are valid here.
      close: releases the files of the source; nothing can be read after it.
    """

    spec: FeatureSpec
    item_features: Float32[np.ndarray, "items F"]
    requests: Callable[[str], Iterator[Request]]
    num_requests: dict[str, int]
    item_category: Int32[np.ndarray, "items I"] | None = None
    shards: Callable[[str], Sequence[Shard]] | None = None
    run: Runner = run_here
    write_beside: Callable[[Path], None] | None = None
    earlier: Dataset | None = None
    close: Callable[[], None] = lambda: None
