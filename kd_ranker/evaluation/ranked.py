"""A batch as a ranker and the teacher see it: the input of each metric.

Axes: `R` requests, `N` candidates, `T` tasks, `L` candidates with a label.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Stage
from kd_ranker.evaluation import funnel

Probability = Float[Array, "R N T"]


class Scored(NamedTuple):
    """The scores of a ranker on a batch.

    Attributes:
      probability: the probabilities that it ranks by.
      seen: for the ids of "user" [R] and "item" [R, N]: 1 if training included the id, 0 if it did
        not, NaN if that is not known.
    """

    probability: Probability
    seen: dict[str, Float[Array, "..."]]

    @classmethod
    def of(
        cls, probability: Probability, seen: Mapping[str, Bool[Array, "..."]], batch: CandidateBatch
    ) -> "Scored":
        """Build scores from the outputs of a model; some lookups may be absent."""
        ids = {"user": batch.user_id, "item": batch.item_id}
        unknown = {name: jnp.full(of.shape, jnp.nan, jnp.float32) for name, of in ids.items()}
        known = {name: of.astype(jnp.float32) for name, of in seen.items() if name in ids}
        return cls(probability, unknown | known)


class Sizes(NamedTuple):
    """Static sizes of a program that measures; two bound the numbers of any request."""

    shown: int
    labelled: int  # L, candidates with a label
    passed: int  # candidates that the logged funnel passed


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """A batch with the scores of a ranker and of the teacher.

    Properties leave out entries that do not count: padding, requests that only fill the batch,
    and for a teacher the candidates without its scores. They are computed at first use and kept.
    An object exists within one trace of the program that measures.

    Attributes:
      scored: the scores of the ranker.
      evaluation_batch: the requests with the scores of the teacher, logged or of a live one.
      value_weights: the weights of the value that a ranker sorts by, see `funnel.value`.
      sizes: the static sizes.
      is_teacher: whether the ranker is the teacher itself, which is measured only where its scores
        are known. A live teacher's are known everywhere; logs may have holes.
    """

    scored: Scored
    evaluation_batch: EvaluationBatch
    value_weights: Float[Array, "T"]
    sizes: Sizes
    is_teacher: bool | Bool[Array, ""] = False

    @property
    def batch(self) -> CandidateBatch:
        """The requests without the fields for the evaluation only."""
        return self.evaluation_batch.batch

    @functools.cached_property
    def mask(self) -> Bool[Array, "R N"]:
        """False on padding, and on requests that only fill the batch."""
        return self.batch.candidate_mask & self.evaluation_batch.request_mask[:, None]

    @functools.cached_property
    def probability(self) -> Probability:
        """The serving probabilities; NaN, which ranks last, where a teacher has none."""
        unknown = self.is_teacher & ~(self.batch.teacher_weight > 0)
        # In bfloat16, sums would lose their digits and 1 - MARGIN would be 1.
        return jnp.where(unknown, jnp.nan, self.scored.probability).astype(jnp.float32)

    @functools.cached_property
    def teacher_probability(self) -> Probability:
        """The teacher's probabilities; arbitrary where their weight is 0."""
        return self.batch.teacher_probability.astype(jnp.float32)

    @functools.cached_property
    def teacher_weight(self) -> Probability:
        """0 where the teacher's probability is not known or does not count."""
        return jnp.where(self.mask[..., None], self.batch.teacher_weight, 0.0)

    @functools.cached_property
    def teacher_knows(self) -> Bool[Array, "R N"]:
        """True where the teacher's probability of each task that counts in the value is known."""
        return jnp.all((self.teacher_weight > 0) | (self.value_weights == 0), axis=-1)

    @functools.cached_property
    def label_weight(self) -> Float[Array, "R N"]:
        """Weights of the user labels; 0 where a label does not count."""
        counts = self.mask & (self.teacher_knows | ~jnp.asarray(self.is_teacher))
        return jnp.where(counts, self.batch.label_weight, 0.0)

    @functools.cached_property
    def value(self) -> Float[Array, "R N"]:
        """The ranker's value of each candidate."""
        return funnel.value(self.probability, self.value_weights)

    @functools.cached_property
    def teacher_value(self) -> Float[Array, "R N"]:
        """The teacher's value of each candidate; NaN where it is not known."""
        value = funnel.value(self.teacher_probability, self.value_weights)
        return jnp.where(self.teacher_knows, value, jnp.nan)

    @functools.cached_property
    def true_value(self) -> Float[Array, "R N"]:
        """The true value of each candidate; NaN where the dataset does not know it."""
        return funnel.value(self.evaluation_batch.true_probability, self.value_weights)

    @functools.cached_property
    def user_value(self) -> Float[Array, "R N"]:
        """The value of each candidate's user labels; 0 where it has none."""
        return funnel.value(self._positive.astype(jnp.float32), self.value_weights)

    def of_labelled(self, values: Float[Array, "R N ..."]) -> Float[Array, "R L ..."]:
        """The values of the candidates that have a label, in their order."""
        return jax.vmap(lambda of_request, places: of_request[places])(values, self._with_label)

    @functools.cached_property
    def labels(self) -> tuple[Float[Array, "R L T"], Float[Array, "R L T"], Float[Array, "R L T"]]:
        """Probability, user label and label weight of the candidates that have a label."""
        probability, label, weight = map(
            self.of_labelled, (self.probability, self.batch.user_label, self.label_weight)
        )
        return probability, label, jnp.broadcast_to(weight[..., None], probability.shape)

    @functools.cached_property
    def curves(self) -> funnel.FunnelCurves:
        """The funnel's curves of each request; every candidate is retrieved.

        The true values have two columns: the true value, and the value of user labels over the
        propensity of the label. The positives have two more columns than tasks: candidates that
        the logged funnel passed, and every candidate.
        """
        weighted = self.user_value / self.evaluation_batch.propensity
        # A slot that was not filled at random has no propensity, and no weight.
        weighted = jnp.where((self.label_weight > 0) & ~jnp.isnan(weighted), weighted, 0.0)
        more = jnp.stack([self._was_passed, self.mask], axis=-1)
        return funnel.funnel_curves(
            student_value=self.value,
            teacher_value=self.teacher_value,
            candidate_mask=self.mask,
            shown=self.sizes.shown,
            true_value=jnp.stack([self.true_value, weighted], axis=-1),
            was_shown=self.mask & (self.batch.stage == Stage.SHOWN),
            positive=jnp.concatenate([self._positive, more], axis=-1),
        )

    @functools.cached_property
    def covered_user_value(self) -> Float[Array, "R N"]:
        """Summed `user_value` of the items shown by a funnel of the candidates that were passed.

        Of a request's n candidates, the logged funnel passed c. In the funnel of index k − 1, the
        student passes its first ⌈k · c / n⌉ of these c, and the teacher shows m of them.
        """
        was_passed = self._was_passed
        places = _first(was_passed, self.sizes.passed)
        value, teacher_value, mask, user_value = (
            jnp.take_along_axis(of, places, axis=1)
            for of in (self.value, self.teacher_value, was_passed, self.user_value)
        )
        curves = funnel.funnel_curves(value, teacher_value, mask, self.sizes.shown, user_value)
        passed, candidates = (of.sum(axis=1)[:, None] for of in (was_passed, self.mask))
        k = jnp.arange(1, self.mask.shape[1] + 1)
        of_passed = -(-k * passed // jnp.maximum(candidates, 1))
        index = jnp.clip(of_passed, 1, jnp.maximum(passed, 1)) - 1
        return jnp.take_along_axis(curves.true_value_captured, index, axis=1)

    @functools.cached_property
    def _positive(self) -> Bool[Array, "R N T"]:
        return (self.label_weight > 0)[..., None] & (self.batch.user_label > 0.5)

    @functools.cached_property
    def _was_passed(self) -> Bool[Array, "R N"]:
        return self.mask & (self.batch.stage >= Stage.PASSED)

    @functools.cached_property
    def _with_label(self) -> Int[Array, "R L"]:
        # They do not depend on the ranker, so all rankers of a program share this sort.
        return _first(self.mask & (self.batch.label_weight > 0), self.sizes.labelled)


def _first(which: Bool[Array, "R N"], number: int) -> Int[Array, "R number"]:
    """The places of some candidates, in their order, before others."""
    return jnp.argsort(~which, axis=1, stable=True)[:, :number]
