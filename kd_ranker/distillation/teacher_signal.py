"""Signals: the targets that a loss learns from, as probabilities and weights.

    scores    the final ranker's scores of the candidate, logged or of the live teacher
    stage     last stage of the candidate in the logged funnel; needs no teacher

All code after the log expects probabilities, so other signals become pseudo-probabilities. The
candidate at position r = 0, 1, 2, … of the final ranker's list is stored with

    p(r) = 1 / (2 + r),    logit p(r) = −log(1 + r)

for every task. This keeps the order. So measures that depend only on the order (survival, the
members of the top k, the higher one of two) equal those with probabilities. A softmax over these
logits gives position r a share in proportion to 1 / (1 + r): Zipf's law. They are not meaningful as
probabilities of an action; `needs_probabilities` in `kd_ranker.distillation.losses.LOSSES` marks
the losses that need such probabilities.

A score s of the final ranker, as a logit, is stored with p(s) = σ(s), so losses on the order read
logit p(s) = s itself. Losses clip p to [1e-6, 1 − 1e-6], so |s| may be at most `LARGEST_SCORE`.

A stage is a grade: shown above passed above retrieved. Each represents the position at which it
would begin in a funnel that narrows tenfold at each stage, r = 0, 9 and 99, so

    p = 1/2, 1/11, 1/101,    logit p = 0, −log 10, −log 100

To add a signal, write a function from a batch to probabilities and weights, and name it in
`SIGNALS` with whether it needs the final ranker's scores.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from kd_ranker.batch import CandidateBatch, Stage

LARGEST_SCORE = 13.8
"""The largest absolute score of a final ranker that losses do not clip."""

Numbers = TypeVar("Numbers", float, np.ndarray, Array)


def probability_of_rank(rank: Numbers) -> Numbers:
    """Return the pseudo-probability in (0, 1/2] of positions r ≥ 0, of any shape; NaN where r is.

    In float32 neighbors differ up to r of some 10⁷.

    >>> probability_of_rank(np.array([0.0, 1.0, 8.0, np.nan]))
    array([0.5       , 0.33333333, 0.1       ,        nan])
    """
    return 1 / (2 + rank)


def probability_of_score(score: np.ndarray) -> np.ndarray:
    """Return the pseudo-probability in (0, 1) of scores of any shape, their logistic function.

    It is NaN for a score beyond `LARGEST_SCORE`, as for one that is NaN.

    >>> probability_of_score(np.array([0.0, 2.0, 583.0])).round(3)
    array([0.5  , 0.881,   nan])
    """
    return scipy.special.expit(np.where(np.abs(score) <= LARGEST_SCORE, score, np.nan))


def probability_of_stage(stage: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the pseudo-probability of each candidate's last `Stage`; NaN for padding.

    >>> probability_of_stage(jnp.array([Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED])).tolist()
    [0.5, 0.09090909361839294, 0.009900989942252636]
    """
    positions = {Stage.SHOWN: 0.0, Stage.PASSED: 9.0, Stage.RETRIEVED: 99.0}
    is_at_stage = [stage == reached for reached in positions]
    rank = jnp.select(is_at_stage, list(positions.values()), jnp.nan)
    return probability_of_rank(rank)


TeacherSignal = tuple[Float[Array, "R scored T"], Float[Array, "R scored T"]]
"""Teacher probabilities and weights of the first candidates of each request."""


def _scores(batch: CandidateBatch) -> TeacherSignal:
    return batch.teacher_probability, batch.teacher_weight


def _stage(batch: CandidateBatch) -> TeacherSignal:
    shape = (*batch.stage.shape, batch.user_label.shape[-1])
    probability = jnp.broadcast_to(probability_of_stage(batch.stage)[..., None], shape)
    weight = jnp.broadcast_to(batch.candidate_mask[..., None], shape).astype(jnp.float32)
    return probability, weight


class Signal(NamedTuple):
    """A signal.

    Attributes:
      read: a batch -> the probabilities and weights to learn from.
      needs_scores: whether `read` needs the scores of the final ranker. A student that learns from
        signals without them can be the baseline "without scores". They read stages, so their
        batches have candidates of every stage.
    """

    read: Callable[[CandidateBatch], TeacherSignal]
    needs_scores: bool


SCORES = "scores"

SIGNALS: dict[str, Signal] = {
    SCORES: Signal(_scores, needs_scores=True),
    "stage": Signal(_stage, needs_scores=False),
}
