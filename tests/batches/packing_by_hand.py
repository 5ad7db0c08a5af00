"""From requests to training batches, all on the host."""

import numpy as np

from kd_ranker.batch import CandidateBatch, Stage
from kd_ranker.batches import cutting, sampling
from kd_ranker.batches.columns import Columns, in_sampling_order
from kd_ranker.batches.cutting import Layout, PackedBatches
from kd_ranker.batches.sampling import Slots


def prepared(
    columns: Columns,
    candidates: int,
    negative_rate: float = 1.0,
    passed_share: float = 0.5,
    stage: Stage = Stage.RETRIEVED,
) -> tuple[Columns, np.ndarray, Slots]:
    """What batches are cut from, the kinds of candidates, and the fewest slots that do."""
    columns, positives = in_sampling_order(columns)
    kinds, slots = sampling.kinds_of(
        columns, positives, stage, candidates, passed_share, negative_rate
    )
    return columns, kinds, slots


def starts_of(kinds: np.ndarray, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """What is random about batches of the requests `rows` [requests, steps]."""
    start = np.random.default_rng(seed).random((*rows.shape, sampling.KINDS))
    return sampling.draw(rows, start, kinds)


def packed(columns: Columns, starts: np.ndarray, slots: Slots) -> PackedBatches:
    """The batches of all steps."""
    drawn = cutting.gather(columns.rows, sampling.chosen(starts, slots))
    return cutting.pack_batches(drawn, Layout(columns.spans, slots))


def unpacked(batches: PackedBatches) -> list[CandidateBatch]:
    """The batch of each step by itself."""
    return [cutting.unpack(batches, step) for step in range(batches.rows.shape[1])]
