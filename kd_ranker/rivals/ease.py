"""EASE: a linear autoencoder of users' histories, in closed form.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, arXiv:1905.03375. Let X
[users, items] be 1 where a user took an item, and P = (XᵀX + λI)⁻¹. The weights that predict each
item from the others are B = I − P · diag(1 / diag P), and a user with the history x, a row like
those of X, ranks item j by (x B)_j.
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Bool, Float, Float32, Int

from kd_ranker.batch import Stage
from kd_ranker.requests.records import Dataset
from kd_ranker.rivals.candidates import Candidates, in_parts

REGULARIZATIONS = (300.0, 1000.0, 3000.0, 10000.0)
"""Values of λ."""

MOST_ITEMS = 20_000
"""The items of the largest dataset that EASE is fitted to: B has their square."""

# Requests that are scored at a time.
_REQUESTS = 512


@dataclasses.dataclass(frozen=True)
class Ease:
    """The fitted weights, and the items that each user took in training.

    The history of a request has these items of its user, and the events of the request.
    """

    weights: Float32[np.ndarray, "items items"]  # B
    taken: Any  # X, a `scipy.sparse.csr_array` [users, items]

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the score of each candidate: the summed weights of the items of its history."""
        user_id = candidates.of_requests["user_id"]
        history = _events(candidates, self.taken.shape[1]) + self.taken[user_id]
        history.data[:] = 1
        scores = np.empty(len(candidates))
        for start in range(0, len(user_id), _REQUESTS):
            item_scores = history[start : start + _REQUESTS] @ self.weights
            is_in_block = (candidates.request >= start) & (candidates.request < start + _REQUESTS)
            request = candidates.request[is_in_block] - start
            scores[is_in_block] = item_scores[request, candidates.item_id[is_in_block]]
        return scores

    @property
    def operations(self) -> float:
        """The additions for a candidate: one per item of its user's history, by the training."""
        return float(self.taken.nnz / self.taken.shape[0])


def taken_items(dataset: Dataset) -> Any:
    """Return X [users, items]: the events of training histories, and the positive labels."""
    taken = scipy.sparse.csr_array((dataset.spec.num_users, dataset.spec.num_items), dtype="f4")
    for candidates in in_parts(dataset, "train", reached=Stage.SHOWN):
        user_id = candidates.of_requests["user_id"]
        wanted = candidates.user_value([1.0] * len(dataset.spec.tasks)) > 0
        user_of_wanted = user_id[candidates.request[wanted]]
        taken += _ones(user_of_wanted, candidates.item_id[wanted], taken.shape)
        events = _events(candidates, taken.shape[1]).tocoo()
        taken += _ones(user_id[events.row], events.col, taken.shape)
    taken.data[:] = 1
    return taken


def _ones(row: Int[np.ndarray, "n"], column: Int[np.ndarray, "n"], shape: tuple[int, int]) -> Any:
    """Return a sparse matrix with 1 added at each place."""
    return scipy.sparse.csr_array((np.ones(len(row), np.float32), (row, column)), shape)


def _events(candidates: Candidates, num_items: int) -> Any:
    """Return the history of each request as a row, [requests, items]."""
    history_id = candidates.of_requests["history_id"]
    is_event: Bool[np.ndarray, "requests H"] = candidates.of_requests["history_mask"] > 0
    request = np.repeat(np.arange(len(history_id)), is_event.sum(axis=1))
    return _ones(request, history_id[is_event], (len(history_id), num_items))


def fit(taken: Any, regularization: float) -> Ease:
    """Fit EASE to the items that each user took, X of 0 and 1, with λ = `regularization`."""
    gram = (taken.T @ taken).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += regularization
    inverse = scipy.linalg.inv(gram, overwrite_a=True, check_finite=False)
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return Ease(weights.astype(np.float32), taken)
