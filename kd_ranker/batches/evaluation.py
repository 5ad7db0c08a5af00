"""Batches for evaluation: one pass over a split."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from kd_ranker.batch import CandidateBatch, EvaluationBatch, FeatureSpec, Request
from kd_ranker.batches import cutting
from kd_ranker.batches.columns import columns_of
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset, read_split


def evaluation_batches(
    dataset: Dataset, split: str, *, requests: int, candidates: int, limit: int = 0
) -> Iterator[EvaluationBatch]:
    """One pass over a split, with every candidate of each request.

    Args:
      dataset: the dataset.
      split: one of `SPLITS`.
      requests: requests a batch; the last one is filled up by repeating, masked out.
      candidates: N to fill up to, `config.funnel.retrieved`.
      limit: how many requests to read from the start; 0 reads all.

    Raises:
      UserError: a request has more candidates than `candidates`.
    """
    records, decode = read_split(dataset, split, with_true_probability=True)
    total = _num_evaluation_requests(records, limit)
    for start in range(0, total, requests):
        present = min(requests, total - start)
        rows = [decode(records[start + offset % present]) for offset in range(requests)]
        fields, true_probability = _evaluation_fields(rows, dataset.spec, candidates)
        yield EvaluationBatch(
            batch=CandidateBatch(**fields),
            true_probability=jnp.asarray(true_probability),
            request_mask=jnp.arange(requests) < present,
        )


def num_evaluation_batches(dataset: Dataset, split: str, *, requests: int, limit: int = 0) -> int:
    """The number of batches that `evaluation_batches` yields."""
    records, _ = read_split(dataset, split, with_true_probability=True)
    return math.ceil(_num_evaluation_requests(records, limit) / requests)


def _num_evaluation_requests(records: Sequence[bytes], limit: int) -> int:
    return min(limit, len(records)) if limit else len(records)


def _evaluation_fields(
    requests: Sequence[Request], spec: FeatureSpec, candidates: int
) -> tuple[dict[str, Any], Float32[np.ndarray, "R N T"]]:
    true_probability = np.full((len(requests), candidates, len(spec.tasks)), np.nan, np.float32)
    places = np.full((len(requests), candidates), -1)
    for row, request in enumerate(requests):
        number = len(request.item_id)
        if number > candidates:
            raise UserError(
                f"funnel.retrieved={candidates} is less than the {number} candidates of request "
                f"{request.request_id}"
            )
        # Stored in funnel order: a ranker that cannot tell two candidates apart must not get the
        # one that the logged policy preferred for free. Item ids tell of popularity in some
        # datasets, so ties fall by a fixed permutation.
        order = np.random.default_rng(request.request_id).permutation(number)
        places[row, :number] = order
        if len(request.true_probability):
            true_probability[row, :number] = request.true_probability[order]
    return cutting.all_fields(columns_of(requests, spec), places), true_probability
