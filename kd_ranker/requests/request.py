"""What a source yields: one request on the host, and the source as a bundle of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from kd_ranker.batch import FeatureSpec
from kd_ranker.requests.pool import Runner, run_here

SPLITS = ("train", "test")
"""The parts of a dataset: what models learn from, and what they are measured on."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as it lies on disk, without padding.

    The N candidates stand in funnel order: the S shown ones first, then the rest of the P passed
    ones, then the rest of the retrieved. User labels are therefore known for a prefix of length S,
    and a teacher that scored only what was passed has logged a prefix of length P (L below: S ≤ P,
    and L is 0, P or N). Nothing here but labels, teacher probabilities and true probabilities may
    stem from after `time`.
    """

    request_id: int
    time: int  # seconds
    user_id: int
    user_features: Float32[np.ndarray, "U"]
    context: Float32[np.ndarray, "C"]
    history_id: Int32[np.ndarray, "H"]  # most recent last, at most `history_length` of them
    history_features: Float32[np.ndarray, "H E"]
    item_id: Int32[np.ndarray, "N"]
    candidate_features: Float32[np.ndarray, "N X"]
    num_passed: int
    user_label: UInt8[np.ndarray, "S T"]
    label_weight: Float32[np.ndarray, "S"]
    teacher_probability: Float32[np.ndarray, "L T"]  # as logged: NaN and nonsense included
    teacher_weight: Float32[np.ndarray, "L"]  # 0 where the log says that nothing was written
    teacher_version: str  # of the model that wrote `teacher_probability`
    true_probability: Float32[np.ndarray, "N T"]  # [0, T] in training requests and where unknown
    # Category ids, see `kd_ranker.batch`; None in a dataset without such features.
    request_category: Int32[np.ndarray, "K"] | None = None
    candidate_category: Int32[np.ndarray, "N L"] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset before it is built.

    Attributes:
      spec: the sizes of its features.
      item_features: float32 [num_items, F], what is known of each item; stored once.
      requests: split (one of `SPLITS`) -> its requests, the same ones at every call.
      num_requests: split -> how many requests `requests` yields, for progress bars.
      item_category: the category ids of each item, -1 where there is none; None without any.
      shards: split -> functions that yield its requests part by part, none of them empty; each
        becomes a file of the dataset, and they can be pickled. None: `requests` alone.
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
    shards: Callable[[str], Sequence[Callable[[], Iterator[Request]]]] | None = None
    run: Runner = run_here
    resume: Path | None = None
    write_beside: Callable[[Path], None] | None = None
    close: Callable[[], None] = lambda: None
