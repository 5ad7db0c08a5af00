"""From requests to training batches, all on the host."""

import numpy as np

from kd_ranker.batch import CandidateBatch, Stage
from kd_ranker.batches import cutting, sampling
from kd_ranker.batches.cutting import PackedBatches, layout_of
from kd_ranker.batches.sampling import BatchConfig, Slots
from kd_ranker.requests.columns import Columns


def prepared(
    columns: Columns,
    candidates: int,
    negative_rate: float = 1.0,
    passed_share: float = 0.5,
    stage: Stage = Stage.RETRIEVED,
) -> tuple[Columns, np.ndarray, Slots]:
    """What batches are cut from, the kinds of candidates, and the fewest slots that do."""
    batch = BatchConfig(1, candidates, passed_share, negative_rate, seed=0)
    return columns, *sampling.kinds_of(columns.counts, stage, batch)


def starts_of(kinds: np.ndarray, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """What is random about batches of the requests `rows` [requests, steps]."""
    start = np.random.default_rng(seed).random((*rows.shape, sampling.KINDS))
    return sampling.draw_starts(rows, start, kinds[rows])


def packed(
    columns: Columns, starts: np.ndarray, slots: Slots, logged: Stage = Stage.RETRIEVED
) -> PackedBatches:
    """The batches of all steps."""
    drawn = cutting.read(columns, sampling.choose_places(starts, slots))
    return cutting.pack_batches(drawn, layout_of(columns.types, slots, logged))


def full_batch(columns: Columns, candidates: int) -> CandidateBatch:
    """All candidates of all requests in their stored order, padded to `candidates`."""
    index = np.arange(candidates)
    places = np.where(index < columns.counts.retrieved[:, None], index, -1)
    return cutting.whole_batch(columns, np.arange(len(columns)), places)
