"""One pass over the evaluation requests that measures the teacher and any number of students."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kd_ranker.batch import CandidateBatch, EvaluationBatch
from kd_ranker.distillation.modes import Mode
from kd_ranker.evaluation import measures
from kd_ranker.evaluation.measures import Sums
from kd_ranker.models.model import Model, Parameters, score

Probability = Float[Array, "R N T"]
ServeProbability = Callable[[Parameters, CandidateBatch, Array], dict[str, Probability]]


_request_sums = jax.jit(measures.request_sums, static_argnames="shown")
_teacher_request_sums = jax.jit(measures.teacher_request_sums, static_argnames="shown")


class Ranker(NamedTuple):
    """A trained model as the evaluation sees it.

    Rankers that share one `probability` function share its compiled program.
    """

    probability: ServeProbability
    parameters: Parameters


def serve_probability(model: Model, mode: Mode) -> ServeProbability:
    """Compiles what a model may rank by: (parameters, batch, items) -> {serve name: [R, N, T]}."""

    def probability(
        parameters: Parameters, batch: CandidateBatch, item_features: Float[Array, "items F"]
    ) -> dict[str, Probability]:
        logits = score(model, parameters, batch, item_features)
        return {name: serve(logits) for name, serve in mode.serve.items()}

    return jax.jit(probability)


def evaluate(
    teacher: Ranker | None,
    students: Sequence[Ranker],
    batches: Iterable[EvaluationBatch],
    item_features: Float[np.ndarray, "items F"],
    value_weights: Sequence[float],
    shown: int,
) -> tuple[Sums, list[dict[str, Sums]]]:
    """Measures all rankers on the same requests, each read and scored by the teacher once.

    Args:
      teacher: the live teacher, which knows every candidate; None takes the logged probabilities.
      students: the students to measure.
      batches: the requests.
      item_features: the item feature matrix.
      value_weights: a weight a task.
      shown: `config.funnel.shown`.

    Returns:
      The teacher's sums, and for each student its sums by serve name.
    """
    weights = jnp.asarray(value_weights, jnp.float32)
    items = jnp.asarray(item_features)
    students = [
        student._replace(parameters=jax.device_put(student.parameters)) for student in students
    ]
    teacher_total: Sums | None = None
    totals: list[dict[str, Sums]] = [{} for _ in students]
    for evaluation_batch in batches:
        evaluation_batch = jax.device_put(evaluation_batch)
        batch = evaluation_batch.batch
        if teacher is None:
            probability, weight = batch.teacher_probability, batch.teacher_weight
        else:
            (probability,) = teacher.probability(teacher.parameters, batch, items).values()
            weight = jnp.broadcast_to(batch.candidate_mask[..., None], probability.shape)
        reference = (probability, weight.astype(jnp.float32), evaluation_batch, weights)
        teacher_total = measures.add(teacher_total, _teacher_request_sums(*reference, shown=shown))
        for student, total in zip(students, totals, strict=True):
            served = student.probability(student.parameters, batch, items)
            for name, student_probability in served.items():
                sums = _request_sums(student_probability, *reference, shown=shown)
                total[name] = measures.add(total.get(name), sums)
    if teacher_total is None:
        raise ValueError("there are no evaluation requests")
    return teacher_total, totals
