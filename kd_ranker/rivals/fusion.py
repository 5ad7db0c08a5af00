"""Scores that a log has before the final ranker runs: one, fused by rank, and as a sum."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from kd_ranker.rivals.candidates import Candidates, places_by

RANK_CONSTANTS = (1, 10, 60)
"""Values of k0; 60 is that of Cormack, Clarke and Büttcher."""

WEIGHTS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""Weights of one score in the sum, relative to the others."""


@dataclasses.dataclass(frozen=True)
class OneScore:
    """The order by one early score."""

    index: int

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the score; candidates without one come last."""
        return candidates.early_scores[:, self.index].astype(float)


@dataclasses.dataclass(frozen=True)
class RankFusion:
    """Reciprocal rank fusion: Σ over scores of 1 / (k0 + place), 0 for a missing score.

    Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank
    Learning Methods", SIGIR 2009. The first place is 1.
    """

    constant: int  # k0

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the fused score."""
        fused = np.zeros(len(candidates))
        for scores in candidates.early_scores.T:
            place = 1 + mean_places(scores.astype(float), candidates.sizes)
            fused += np.where(np.isnan(scores), 0.0, 1 / (self.constant + place))
        return fused


@dataclasses.dataclass(frozen=True)
class ScoreSum:
    """A weighted sum of the early scores.

    A missing score counts as the least known one of its request.
    """

    weights: tuple[float, ...]  # one per score

    def score(self, candidates: Candidates) -> Float[np.ndarray, "n"]:
        """Return the sum."""
        total = np.zeros(len(candidates))
        for weight, scores in zip(self.weights, candidates.early_scores.T, strict=True):
            total += weight * _filled(scores.astype(float), candidates)
        return total


def _filled(scores: Float[np.ndarray, "n"], candidates: Candidates) -> Float[np.ndarray, "n"]:
    """Replace missing scores by the least of their request, or by 0 if it has none."""
    least = np.full(len(candidates.sizes), np.inf)
    np.minimum.at(least, candidates.request, np.where(np.isnan(scores), np.inf, scores))
    least[np.isinf(least)] = 0.0  # no score of the request is known
    return np.where(np.isnan(scores), least[candidates.request], scores)


def mean_places(
    scores: Float[np.ndarray, "n"], sizes: Int[np.ndarray, "requests"]
) -> Float[np.ndarray, "n"]:
    """Return the place of each candidate in its request, 0 for the largest score.

    Equal scores share the mean of their places, so that the order of a file decides nothing.
    """
    known = ~np.isnan(scores)
    request = np.repeat(np.arange(len(sizes)), sizes)
    number = np.bincount(request[known], minlength=len(sizes))[request]
    # Counted from either end, equal scores are in the order of the file: the mean of both places
    # does not depend on that order.
    from_first = places_by(scores, sizes)
    from_last = number - 1 - places_by(-scores, sizes)
    return (from_first + from_last) / 2
