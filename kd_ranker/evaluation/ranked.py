"""A batch as a ranker and the teacher see it: the input of each metric.

Axes: `R` requests, `N` candidates, `T` tasks, `L` candidates with a label.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Stage
from kd_ranker.evaluation import funnel
from kd_ranker.evaluation.funnel import Orders

Probability = Float[Array, "R N T"]


class Scored(NamedTuple):
    """The scores of a ranker on a batch.

    Attributes:
      probability: the probabilities that it ranks by; NaN where a teacher has none.
      value: the value of each candidate by these, see `funnel.value`.
      seen: for the ids of "user" [R] and "item" [R, N]: 1 if training included the id, 0 if it did
        not, NaN if that is not known.
    """

    probability: Probability
    value: Float[Array, "R N"]
    seen: dict[str, Float[Array, "..."]]

    @classmethod
    def of(
        cls,
        probability: Probability,
        seen: Mapping[str, Bool[Array, "..."]],
        batch: CandidateBatch,
        value_weights: Float[Array, "T"],
    ) -> "Scored":
        """Build scores from the outputs of a model; some lookups may be absent."""
        ids = {"user": batch.user_id, "item": batch.item_id}
        unknown = {
            name: jnp.full(values.shape, jnp.nan, jnp.float32) for name, values in ids.items()
        }
        known = {
            name: was_seen.astype(jnp.float32) for name, was_seen in seen.items() if name in ids
        }
        # In bfloat16, sums would lose their digits.
        probability = probability.astype(jnp.float32)
        return cls(probability, funnel.value(probability, value_weights), unknown | known)

    @classmethod
    def by_teacher(
        cls,
        batch: CandidateBatch,
        seen: Mapping[str, Bool[Array, "..."]],
        value_weights: Float[Array, "T"],
    ) -> "Scored":
        """Build the scores of the teacher itself, from those in a batch."""
        known = batch.teacher_weight > 0
        probability = jnp.where(known, batch.teacher_probability, jnp.nan)
        return cls.of(probability, seen, batch, value_weights)


class Sizes(NamedTuple):
    """Static choices of a program that measures."""

    shown: int
    num_labeled: int  # L, the most candidates with a label
    passed: int  # the most candidates that the logged funnel passed
    are_partly_scored: bool = False  # whether to measure the bounds of a log that lacks scores
    labels_beyond_shown: bool = False  # whether to measure the final ranker's lists by user labels


class Ranked(NamedTuple):
    """A batch with the scores of a ranker and of the teacher, from `rank_batch`.

    Entries that do not count are left out: padding, requests that only fill the batch, and for a
    teacher the candidates without its scores.
    """

    batch: CandidateBatch  # the requests without the fields for the evaluation only
    evaluation_batch: EvaluationBatch  # with the scores of the teacher, logged or of a live one
    sizes: Sizes
    scored: Scored
    mask: Bool[Array, "R N"]  # False on padding, and on requests that only fill the batch
    probability: Probability  # that it serves; NaN, which ranks last, where a teacher has none
    teacher_probability: Probability  # arbitrary where the weight is 0
    teacher_weight: Probability  # 0 where the probability is not known or does not count
    teacher_knows: Bool[Array, "R N"]  # the probability of each task that counts in the value
    label_weight: Float[Array, "R N"]  # of user labels; 0 where a label does not count
    value: Float[Array, "R N"]  # the ranker's value of each candidate
    orders: Orders  # by the value and by the teacher's
    teacher_value: Float[Array, "R N"]  # NaN where it is not known
    true_value: Float[Array, "R N"]  # NaN where the dataset does not know it
    user_value: Float[Array, "R N"]  # of the user labels; 0 without them
    positive: Bool[Array, "R N T"]  # whether a user label counts and is 1
    was_passed: Bool[Array, "R N"]  # by the logged funnel
    is_measured: Bool[Array, "R"]  # whether the funnel is measured on the request
    with_label: Int[Array, "R L"]  # places of the candidates that have a label

    def of_labeled(self, values: Float[Array, "R N ..."]) -> Float[Array, "R L ..."]:
        """The values of the candidates that have a label, in their order."""
        return jax.vmap(lambda of_request, places: of_request[places])(values, self.with_label)

    @property
    def labels(self) -> tuple[Float[Array, "R L T"], Float[Array, "R L T"], Float[Array, "R L T"]]:
        """Probability, user label and label weight of the candidates that have a label."""
        probability, label, weight = map(
            self.of_labeled, (self.probability, self.batch.user_label, self.label_weight)
        )
        return probability, label, jnp.broadcast_to(weight[..., None], probability.shape)


def candidates_of(evaluation_batch: EvaluationBatch) -> Bool[Array, "R N"]:
    """Return a mask that is False on padding, and on requests that only fill the batch."""
    return evaluation_batch.batch.candidate_mask & evaluation_batch.request_mask[:, None]


def with_scores_of_candidates(evaluation_batch: EvaluationBatch) -> EvaluationBatch:
    """Return a batch whose teacher weights are 0 on all but candidates.

    A program of its own should do so. In one with `rank_batch`, a CPU would do it again for each
    ranker, in the midst of the loops over probabilities, which then take nine times as long.
    """
    batch = evaluation_batch.batch
    is_candidate = candidates_of(evaluation_batch)[..., None]
    weight = jnp.where(is_candidate, batch.teacher_weight, 0.0)
    batch = dataclasses.replace(batch, teacher_weight=weight)
    return dataclasses.replace(evaluation_batch, batch=batch)


def rank_batch(
    scored: Scored,
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    sizes: Sizes,
    is_teacher: bool | Bool[Array, ""] = False,
    orders: Orders | None = None,
) -> Ranked:
    """Join a batch with the scores of a ranker, and with the orders of both if they are known.

    The batch is one of `with_scores_of_candidates`. The teacher itself is measured only where its
    scores are known. A live teacher's are known everywhere; logs may have holes.
    """
    batch = evaluation_batch.batch
    mask = candidates_of(evaluation_batch)
    teacher_probability = batch.teacher_probability.astype(jnp.float32)
    teacher_weight = batch.teacher_weight
    teacher_knows = jnp.all((teacher_weight > 0) | (value_weights == 0), axis=-1)
    counts = mask & (teacher_knows | ~jnp.asarray(is_teacher))
    label_weight = jnp.where(counts, batch.label_weight, 0.0)
    positive = (label_weight > 0)[..., None] & (batch.user_label > 0.5)
    teacher_value = funnel.value(teacher_probability, value_weights)
    teacher_value = jnp.where(teacher_knows, teacher_value, jnp.nan)
    if orders is None:
        orders = funnel.orders_of(scored.value, teacher_value, mask)
    is_measured = evaluation_batch.request_mask
    if evaluation_batch.whole is not None:
        is_measured = is_measured & evaluation_batch.whole
    return Ranked(
        batch=batch,
        evaluation_batch=evaluation_batch,
        sizes=sizes,
        scored=scored,
        mask=mask,
        probability=scored.probability,
        teacher_probability=teacher_probability,
        teacher_weight=teacher_weight,
        teacher_knows=teacher_knows,
        label_weight=label_weight,
        value=scored.value,
        orders=orders,
        teacher_value=teacher_value,
        true_value=funnel.value(evaluation_batch.true_probability, value_weights),
        user_value=funnel.value(positive.astype(jnp.float32), value_weights),
        positive=positive,
        was_passed=mask & (batch.stage >= Stage.PASSED),
        is_measured=is_measured,
        # They do not depend on the ranker, so all rankers of a program share this.
        with_label=_first(mask & (batch.label_weight > 0), sizes.num_labeled),
    )


def covered_funnel(ranked: Ranked) -> dict[str, Float[Array, "R N"]]:
    """Return the user values of the items shown by a funnel of the candidates that were passed.

    Of a request's n candidates, the logged funnel passed c. In the funnel of index k − 1, the
    student passes its first ⌈k · c / n⌉ of these c, and the teacher shows m · c / n of them. If the
    log passed candidates at random, it would be as strict as the whole funnel. If it showed m, the
    teacher's errors would count for less.

    Returns:
      covered_user_value: the summed `user_value` of these items.
      ips_user_value: the same over the propensity of each label; a label without one counts 0.
    """
    by_propensity = ranked.user_value / ranked.evaluation_batch.propensity
    has_weight = (ranked.label_weight > 0) & ~jnp.isnan(by_propensity)
    user_values = {
        "covered_user_value": ranked.user_value,
        "ips_user_value": jnp.where(has_weight, by_propensity, 0.0),
    }
    places = _first(ranked.was_passed, ranked.sizes.passed)

    def among_passed(array: Any) -> Any:
        return jnp.take_along_axis(array, places, axis=1)

    value = among_passed(ranked.value)
    teacher_value = among_passed(ranked.teacher_value)
    mask = among_passed(ranked.was_passed)
    passed = ranked.was_passed.sum(axis=1)
    candidates = ranked.mask.sum(axis=1)
    slot_weights = funnel.slots_of_part(ranked.sizes.shown, passed, candidates)
    k = jnp.arange(1, ranked.mask.shape[1] + 1)
    k_of_passed = -(-k * passed[:, None] // jnp.maximum(candidates, 1)[:, None])
    index = jnp.clip(k_of_passed, 1, jnp.maximum(passed, 1)[:, None]) - 1

    def curve(numbers: Float[Array, "R N"]) -> Float[Array, "R N"]:
        sums = funnel.list_sums(value, teacher_value, mask, among_passed(numbers), slot_weights)
        return jnp.take_along_axis(sums, index, axis=1)

    return {name: curve(numbers) for name, numbers in user_values.items()}


def _first(which: Bool[Array, "R N"], number: int) -> Int[Array, "R number"]:
    """The places of some candidates, in their order, before others."""
    return funnel.first_of(which)[:, :number]
