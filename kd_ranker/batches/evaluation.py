"""Batches for evaluation: one pass over a split."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from kd_ranker.batch import EvaluationBatch
from kd_ranker.batches import cutting
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import unpack_rows
from kd_ranker.requests.records import Dataset


def evaluation_batches(
    dataset: Dataset, split: str, *, requests: int, candidates: int, limit: int = 0
) -> Iterator[EvaluationBatch]:
    """Yield the batches of one pass over a split, with every candidate of each request.

    Args:
      dataset: the dataset.
      split: one of `SPLITS`.
      requests: requests per batch; the last batch is padded with repeated requests, masked out.
      candidates: N to pad to, `config.funnel.retrieved`.
      limit: number of requests to read from the start; 0 reads all.

    Raises:
      UserError: a request has more candidates than `candidates`.
    """
    columns = dataset.columns[split]
    total = min(limit or len(columns), len(columns))
    for start in range(0, total, requests):
        present = min(requests, total - start)
        numbers = start + np.arange(requests) % present
        ahead = np.arange(start + present, min(start + present + requests, total))
        columns.expect(ahead, columns.counts.retrieved[ahead])
        places = np.full((requests, candidates), -1)
        counts = columns.counts.of(numbers)
        for row, (request_id, number) in enumerate(zip(*counts[:2], strict=True)):
            if number > candidates:
                raise UserError(
                    f"funnel.retrieved={candidates} is less than the {number} candidates of "
                    f"request {request_id}"
                )
            # Stored in funnel order: in a tie, a ranker must not get the candidate that the logged
            # policy preferred for free. Item ids reveal popularity in some datasets, so a fixed
            # permutation breaks ties.
            places[row, :number] = np.random.default_rng(request_id).permutation(number)
        known = np.where(counts.known[:, None] > 0, places, -1)
        rows: Any = columns.known.at(numbers, known)
        facts = unpack_rows(rows, columns.known.spans)
        yield EvaluationBatch(
            batch=cutting.whole_batch(columns, numbers, places),
            **{name: jnp.asarray(fact) for name, fact in facts.items()},
            request_mask=jnp.arange(requests) < present,
        )


def num_evaluation_batches(dataset: Dataset, split: str, *, requests: int, limit: int = 0) -> int:
    """Return the number of batches that `evaluation_batches` yields."""
    stored = len(dataset.columns[split])
    return math.ceil(min(limit or stored, stored) / requests)
