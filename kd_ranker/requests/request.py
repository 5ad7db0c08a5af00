"""A dataset before it is built: requests one by one, and what belongs to all of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from kd_ranker.batch import FeatureSpec, Request
from kd_ranker.requests.block import Block
from kd_ranker.requests.pool import Runner, run_here

SPLITS = ("train", "validation", "test")
"""The parts of a dataset, the earliest first where there is time.

Models learn from the first, settings are chosen on the second, and the third is read once, for what
is reported.
"""

Shard = Callable[[], Iterator[Request] | Iterator[Block]]
"""Yields requests of a split, one by one or side by side; can be pickled."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset before it is built.

    Attributes:
      spec: the sizes of its features.
      item_features: float32 [num_items, F], what is known of each item; stored once.
      requests: split (one of `SPLITS`) -> its requests, the same ones at every call.
      num_requests: split -> how many requests `requests` yields, for progress bars.
      item_category: the category ids of each item, -1 where there is none; None without any.
      shards: split -> its requests part by part, none of them empty; each becomes a file of the
        dataset. None: `requests` alone.
      run: what writes shards, see `pool.open_pool`.
      resume: a folder that keeps finished shards until the dataset is whole, for a later run to go
        on with. All that decides what they hold must decide its name, and its parent folder is of
        this dataset alone: it is removed at the end. None keeps nothing.
      write_beside: writes into the dataset's folder what else is to lie there.
      close: lets go of what the source holds on disk; nothing can be read after it.
    """

    spec: FeatureSpec
    item_features: Float32[np.ndarray, "items F"]
    requests: Callable[[str], Iterator[Request]]
    num_requests: dict[str, int]
    item_category: Int32[np.ndarray, "items I"] | None = None
    shards: Callable[[str], Sequence[Shard]] | None = None
    run: Runner = run_here
    resume: Path | None = None
    write_beside: Callable[[Path], None] | None = None
    close: Callable[[], None] = lambda: None


def without_teacher(tasks: int) -> dict[str, Any]:
    """The fields of a request without a teacher's values and without a truth.

    >>> without_teacher(3)["teacher_probability"].shape
    (0, 3)
    """
    none = np.zeros((0, tasks), np.float32)
    return {
        "teacher_probability": none,
        "teacher_weight": none[:, 0],
        "teacher_version": "",
        "true_probability": none,
    }
