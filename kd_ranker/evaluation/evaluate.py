"""One pass over the evaluation requests that measures the teacher and any number of students."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Items
from kd_ranker.distillation.modes import Mode
from kd_ranker.embedding.lookup import was_trained
from kd_ranker.evaluation.metrics import SumFunction, Sums, sum_functions
from kd_ranker.evaluation.ranked import ranked, ranked_by_teacher
from kd_ranker.evaluation.totals import add, request_sums
from kd_ranker.models.model import Model, Parameters, score

Probability = Float[Array, "R N T"]
Met = dict[str, Bool[Array, "..."]]

_STATIC = ("shown", "labelled", "functions")
_FEW_LABELS = 16


class Served(NamedTuple):
    """The probabilities that a model serves for a batch.

    Attributes:
      probability: what it may rank by, by serve name.
      met: for each of its lookups, whether training met each id; see `lookup.was_trained`.
    """

    probability: dict[str, Probability]
    met: Met


# Of parameters, a batch and the items; see `Ranker` for the types of the first two.
Serve = Callable[[Any, Any, Items], Served]


class Ranker(NamedTuple):
    """A trained model, or a group of them, as the evaluation sees it.

    Rankers that share one `serve` function share its compiled program.

    Attributes:
      serve: what one model says of a `CandidateBatch`.
      parameters: of one model, `Parameters`; for a group, stacked with a leading axis of members.
        What a reference has in their place is its own, see `references`.
      sees_truth: whether `serve` takes the whole `EvaluationBatch`, as only a reference may.
    """

    serve: Serve
    parameters: Any
    sees_truth: bool = False


def make_serve(model: Model, mode: Mode) -> Serve:
    """Compiles what a model says of a batch: (parameters, batch, items) -> `Served`."""

    def serve(parameters: Parameters, batch: CandidateBatch, items: Items) -> Served:
        logits = score(model, parameters, batch, items)
        return Served(
            {name: probability(logits) for name, probability in mode.serve.items()},
            was_trained(model.embedding, parameters.tables, batch, items),
        )

    return jax.jit(serve)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _teacher_sums(
    teacher_probability: Probability,
    teacher_weight: Probability,
    evaluation_batch: EvaluationBatch,
    met: Met | None,
    value_weights: Float[Array, "T"],
    shown: int,
    labelled: int,
    functions: tuple[SumFunction, ...],
) -> Sums:
    """The teacher's sums of one batch."""
    batch = ranked_by_teacher(
        teacher_probability, teacher_weight, evaluation_batch, value_weights, shown, labelled, met
    )
    return request_sums(batch, functions)


@functools.partial(jax.jit, static_argnames=("serve", "sees_truth", *_STATIC))
def _group_sums(
    serve: Serve,
    parameters: Any,
    sees_truth: bool,
    teacher_probability: Probability,
    teacher_weight: Probability,
    evaluation_batch: EvaluationBatch,
    items: Items,
    value_weights: Float[Array, "T"],
    shown: int,
    labelled: int,
    functions: tuple[SumFunction, ...],
) -> dict[str, Sums]:
    """By serve name, the sums of one batch, each with a leading axis of members."""
    seen = evaluation_batch if sees_truth else evaluation_batch.batch

    def member_sums(parameters: Any) -> dict[str, Sums]:
        served = serve(parameters, seen, items)
        return {
            name: request_sums(
                ranked(
                    student_probability,
                    teacher_probability,
                    teacher_weight,
                    evaluation_batch,
                    value_weights,
                    shown,
                    labelled,
                    served.met,
                ),
                functions,
            )
            for name, student_probability in served.probability.items()
        }

    return jax.vmap(member_sums)(parameters)


def evaluate(
    teacher: Ranker | None,
    groups: Sequence[Ranker],
    batches: Iterable[EvaluationBatch],
    items: Items,
    value_weights: Sequence[float],
    shown: int,
) -> tuple[Sums, list[dict[str, Sums]]]:
    """Measures all rankers on the same requests, each read and scored by the teacher once.

    Args:
      teacher: the live teacher, which knows every candidate; None takes the logged probabilities.
      groups: the groups of students to measure.
      batches: the requests.
      items: what is known of the items.
      value_weights: a weight a task.
      shown: `config.funnel.shown`.

    Returns:
      The teacher's sums, and for each group its sums by serve name, with a leading axis of members.
    """
    weights = jnp.asarray(value_weights, jnp.float32)
    functions = sum_functions()
    items = jax.device_put(items)
    groups = [group._replace(parameters=jax.device_put(group.parameters)) for group in groups]
    teacher_total: Sums | None = None
    totals: list[dict[str, Sums]] = [{} for _ in groups]
    for evaluation_batch in batches:
        labelled = _number_labelled(evaluation_batch)
        evaluation_batch = jax.device_put(evaluation_batch)
        batch = evaluation_batch.batch
        static = {"shown": shown, "labelled": labelled, "functions": functions}
        if teacher is None:
            probability, weight = batch.teacher_probability, batch.teacher_weight
            met = None
        else:
            served_by_teacher = teacher.serve(teacher.parameters, batch, items)
            (probability,), met = served_by_teacher.probability.values(), served_by_teacher.met
            weight = jnp.broadcast_to(batch.candidate_mask[..., None], probability.shape)
        reference = (probability, weight.astype(jnp.float32), evaluation_batch)
        teacher_total = add(teacher_total, _teacher_sums(*reference, met, weights, **static))
        for group, total in zip(groups, totals, strict=True):
            served = _group_sums(*group, *reference, items, weights, **static)
            for name, sums in served.items():
                total[name] = add(total.get(name), sums)
    if teacher_total is None:
        raise ValueError("there are no evaluation requests")
    return teacher_total, totals


def _number_labelled(evaluation_batch: EvaluationBatch) -> int:
    """A bound on the labelled candidates of a request: a power of 2, so that few are compiled."""
    label_weight = np.asarray(evaluation_batch.batch.label_weight)
    most = int((label_weight > 0).sum(axis=1).max())
    return min(max(_FEW_LABELS, 1 << (most - 1).bit_length() if most else 0), label_weight.shape[1])
