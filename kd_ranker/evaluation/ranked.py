"""A batch as a ranker and the teacher see it, which is all that a metric is summed over.

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
      met: for the ids of users [R] and items [R, N], by lookup name: 1 if training included the
        id, 0 if it did not, NaN if that is not known.
    """

    probability: Probability
    met: dict[str, Float[Array, "..."]]

    @classmethod
    def of(
        cls, probability: Probability, met: Mapping[str, Bool[Array, "..."]], batch: CandidateBatch
    ) -> "Scored":
        """Build scores from the outputs of a model; some lookups may be absent."""
        ids = {"user": batch.user_id, "item": batch.item_id}
        unknown = {name: jnp.full(of.shape, jnp.nan, jnp.float32) for name, of in ids.items()}
        known = {name: of.astype(jnp.float32) for name, of in met.items() if name in ids}
        return cls(probability, unknown | known)


class TeacherScores(NamedTuple):
    """The scores of the teacher on a batch.

    Attributes:
      probability: may hold anything where its weight is 0.
      weight: 0 where the probability is not known.
    """

    probability: Probability
    weight: Probability


@dataclasses.dataclass(frozen=True, eq=False)
class Ranked:
    """A batch with the probabilities of a ranker and of the teacher; see `ranked`.

    Values that several metrics need are properties, computed at first use and then kept. An object
    exists within one trace of the program that measures.

    Attributes:
      probability: the serving probabilities of the ranker under evaluation.
      teacher_probability: the final ranker's; arbitrary where its weight is 0.
      teacher_weight: 0 where the teacher's probability is not known or does not count.
      label_weight: weights of the user labels; 0 where a label does not count.
      mask: False on padding, and on requests that only fill the batch.
      evaluation_batch: the requests; do not read the teacher's values in it.
      value_weights: the weights of the value that a ranker sorts by, see `funnel.value`.
      shown: number of items shown.
      labelled: L, at least as many as a request has candidates with a label.
      passed: at least as many as a request has candidates that the logged funnel passed.
      met: whether training included each id, see `Scored`.
    """

    probability: Float[Array, "R N T"]
    teacher_probability: Float[Array, "R N T"]
    teacher_weight: Float[Array, "R N T"]
    label_weight: Float[Array, "R N"]
    mask: Bool[Array, "R N"]
    evaluation_batch: EvaluationBatch
    value_weights: Float[Array, "T"]
    shown: int
    labelled: int
    passed: int
    met: Mapping[str, Float[Array, "..."]]

    @property
    def batch(self) -> CandidateBatch:
        """The requests without what only the evaluation may see."""
        return self.evaluation_batch.batch

    @functools.cached_property
    def labels(self) -> tuple[Float[Array, "R L T"], Float[Array, "R L T"], Float[Array, "R L"]]:
        """Probability, user label and label weight of the candidates that have a label.

        The metrics against user labels are cheap because they measure only these.
        """
        return (
            self._of_labelled(self.probability),
            self._of_labelled(self.batch.user_label),
            self._of_labelled(self.label_weight),
        )

    @functools.cached_property
    def judged(
        self,
    ) -> tuple[Float[Array, "R L T"], Float[Array, "R L T"], Float[Array, "R L T"]]:
        """Ranker's and teacher's probability, and weight, of the candidates that have a label.

        The weight is that of the label, and 0 where the teacher's value is not known, or its
        probability: on these items all three can be compared.
        """
        known = self._of_labelled((self.teacher_weight > 0) & self._teacher_knows[..., None])
        probability, _, label_weight = self.labels
        return (
            probability,
            self._of_labelled(self.teacher_probability),
            jnp.where(known, label_weight[..., None], 0.0),
        )

    def _of_labelled(self, values: Float[Array, "R N ..."]) -> Float[Array, "R L ..."]:
        return jax.vmap(lambda of_request, places: of_request[places])(values, self._with_label)

    @functools.cached_property
    def _with_label(self) -> Int[Array, "R L"]:
        """The places of the candidates with a label, before others.

        They do not depend on the ranker, so all rankers of a program share this sort.
        """
        has_label = self.mask & (self.batch.label_weight > 0)
        return jnp.argsort(~has_label, axis=1, stable=True)[:, : self.labelled]

    @functools.cached_property
    def value(self) -> Float[Array, "R N"]:
        """The ranker's value of each candidate."""
        return funnel.value(self.probability, self.value_weights)

    @functools.cached_property
    def teacher_value(self) -> Float[Array, "R N"]:
        """The teacher's value of each candidate; NaN where it is not known."""
        value = funnel.value(self.teacher_probability, self.value_weights)
        return jnp.where(self._teacher_knows, value, jnp.nan)

    @functools.cached_property
    def _teacher_knows(self) -> Bool[Array, "R N"]:
        return knows_value(self.teacher_weight, self.value_weights)

    @functools.cached_property
    def user_value(self) -> Float[Array, "R N"]:
        """The value of each candidate's user labels; 0 where it has none."""
        has_label = (self.label_weight > 0)[..., None] & (self.batch.user_label > 0.5)
        return funnel.value(has_label.astype(jnp.float32), self.value_weights)

    @functools.cached_property
    def was_passed(self) -> Bool[Array, "R N"]:
        """True for candidates that the logged funnel passed: only they could get a label."""
        return self.mask & (self.batch.stage >= Stage.PASSED)

    @functools.cached_property
    def curves(self) -> funnel.FunnelCurves:
        """The funnel's curves of each request.

        Every candidate is retrieved. The teacher never chooses a candidate without a known teacher
        value. The true values of the curves have two columns: the true value, and the value of
        user labels over the propensity of the label. The positives have two more columns than
        tasks: `was_passed`, and every candidate.
        """
        truth = funnel.value(self.evaluation_batch.true_probability, self.value_weights)
        weighted = self.user_value / self.evaluation_batch.propensity
        # A slot that was not filled at random has no propensity, and no weight.
        weighted = jnp.where((self.label_weight > 0) & ~jnp.isnan(weighted), weighted, 0.0)
        positive = (self.label_weight > 0)[..., None] & (self.batch.user_label > 0.5)
        more = jnp.stack([self.was_passed, self.mask], axis=-1)
        return funnel.funnel_curves(
            student_value=self.value,
            teacher_value=self.teacher_value,
            candidate_mask=self.mask,
            shown=self.shown,
            true_value=jnp.stack([truth, weighted], axis=-1),
            was_shown=self.mask & (self.batch.stage == Stage.SHOWN),
            positive=jnp.concatenate([positive, more], axis=-1),
        )

    @functools.cached_property
    def covered_user_value(self) -> Float[Array, "R N"]:
        """Summed `user_value` of the items shown by a funnel of the candidates that were passed.

        Of a request's n candidates, the logged funnel passed c. In the funnel of index k − 1, the
        student passes its first ⌈k · c / n⌉ of these c, and the teacher shows m of them.
        """
        places = jnp.argsort(~self.was_passed, axis=1, stable=True)[:, : self.passed]
        value, teacher_value, mask, user_value = (
            jnp.take_along_axis(of, places, axis=1)
            for of in (self.value, self.teacher_value, self.was_passed, self.user_value)
        )
        curves = funnel.funnel_curves(value, teacher_value, mask, self.shown, true_value=user_value)
        passed, candidates = (of.sum(axis=1)[:, None] for of in (self.was_passed, self.mask))
        k = jnp.arange(1, self.mask.shape[1] + 1)
        of_passed = -(-k * passed // jnp.maximum(candidates, 1))
        index = jnp.clip(of_passed, 1, jnp.maximum(passed, 1)) - 1
        return jnp.take_along_axis(curves.true_value_captured, index, axis=1)


def knows_value(
    teacher_weight: Float[Array, "R N T"], value_weights: Float[Array, "T"]
) -> Bool[Array, "R N"]:
    """True where the teacher's probability of every task that counts in the value is known."""
    return jnp.all((teacher_weight > 0) | (value_weights == 0), axis=-1)


def ranked(
    scored: Scored,
    teacher: TeacherScores,
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    shown: int,
    labelled: int,
    passed: int,
    is_teacher: bool | Bool[Array, ""] = False,
) -> Ranked:
    """A batch under a ranker and the teacher, without what does not count.

    Requests outside `request_mask` and candidates of stage `PADDING` get weights of 0. The
    teacher's scores come separately from the batch because a live teacher computes them.

    Args:
      scored: the scores of the ranker.
      teacher: those of the teacher.
      evaluation_batch: the requests.
      value_weights: one weight per task.
      shown: number of items shown.
      labelled: see `Ranked`.
      passed: see `Ranked`.
      is_teacher: whether the ranker is the teacher itself, which is judged only where its scores
        are known. A live teacher's are known everywhere; logs may have holes.
    """
    batch = evaluation_batch.batch
    mask = batch.candidate_mask & evaluation_batch.request_mask[:, None]
    knows = teacher.weight > 0
    counts = mask & (knows_value(teacher.weight, value_weights) | ~jnp.asarray(is_teacher))
    # The funnel ranks NaN behind all candidates that the teacher knows.
    probability = jnp.where(is_teacher & ~knows, jnp.nan, scored.probability)
    return Ranked(
        # In bfloat16, sums would lose their digits and 1 - MARGIN would be 1.
        probability=probability.astype(jnp.float32),
        teacher_probability=teacher.probability.astype(jnp.float32),
        teacher_weight=jnp.where(mask[..., None], teacher.weight, 0.0),
        label_weight=jnp.where(counts, batch.label_weight, 0.0),
        mask=mask,
        evaluation_batch=evaluation_batch,
        value_weights=value_weights,
        shown=shown,
        labelled=labelled,
        passed=passed,
        met=scored.met,
    )
