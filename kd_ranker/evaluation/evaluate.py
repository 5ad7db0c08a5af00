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
from kd_ranker.evaluation.ranked import Ranked, ranked, ranked_by_teacher
from kd_ranker.evaluation.totals import Each, add, each_request, request_sums
from kd_ranker.models.model import Model, Parameters, score

Probability = Float[Array, "R N T"]
Met = dict[str, Bool[Array, "..."]]

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


class Summed(NamedTuple):
    """The sums of a pass for a ranker.

    Attributes:
      sums: over all requests.
      each: of each request; empty unless that is asked for. For the members of a group both have a
        leading axis of these.
    """

    sums: Sums
    each: Each


class _Asked(NamedTuple):
    """The questions to a pass; nothing of them is traced."""

    shown: int
    labelled: int
    functions: tuple[SumFunction, ...]
    ks: tuple[int, ...]


def _summed(batch: Ranked, asked: _Asked) -> Summed:
    each = each_request(batch, asked.functions, asked.ks) if asked.ks else Each({}, {})
    return Summed(request_sums(batch, asked.functions), each)


@functools.partial(jax.jit, static_argnames="asked")
def _of_teacher(
    teacher_probability: Probability,
    teacher_weight: Probability,
    evaluation_batch: EvaluationBatch,
    met: Met | None,
    value_weights: Float[Array, "T"],
    asked: _Asked,
) -> Summed:
    """The sums of one batch for the teacher."""
    batch = ranked_by_teacher(
        *(teacher_probability, teacher_weight, evaluation_batch, value_weights),
        *(asked.shown, asked.labelled, met),
    )
    return _summed(batch, asked)


@functools.partial(jax.jit, static_argnames=("serve", "sees_truth", "serves", "asked"))
def _of_group(
    serve: Serve,
    parameters: Any,
    sees_truth: bool,
    serves: tuple[str, ...] | None,
    teacher_probability: Probability,
    teacher_weight: Probability,
    evaluation_batch: EvaluationBatch,
    items: Items,
    value_weights: Float[Array, "T"],
    asked: _Asked,
) -> dict[str, Summed]:
    """By serve name, what one batch adds for each member of a group."""
    seen = evaluation_batch if sees_truth else evaluation_batch.batch

    def of_member(parameters: Any) -> dict[str, Summed]:
        served = serve(parameters, seen, items)

        def of_serve(name: str) -> Summed:
            batch = ranked(
                *(served.probability[name], teacher_probability, teacher_weight, evaluation_batch),
                *(value_weights, asked.shown, asked.labelled, served.met),
            )
            return _summed(batch, asked)

        return {name: of_serve(name) for name in serves or served.probability}

    return jax.vmap(of_member)(parameters)


def evaluate(
    teacher: Ranker | None,
    groups: Sequence[Ranker],
    batches: Iterable[EvaluationBatch],
    items: Items,
    value_weights: Sequence[float],
    shown: int,
    *,
    serves: Sequence[tuple[str, ...] | None] | None = None,
    ks: Sequence[int] = (),
) -> tuple[Summed, list[dict[str, Summed]]]:
    """Measures all rankers on the same requests, each read and scored by the teacher once.

    Args:
      teacher: the live teacher, which knows every candidate; None takes the logged probabilities.
      groups: the groups of students to measure.
      batches: the requests.
      items: what is known of the items.
      value_weights: a weight a task.
      shown: `config.funnel.shown`.
      serves: the serve names to measure of each group; None takes all.
      ks: the values of k at which the curves of each request are kept; none keeps no request.

    Returns:
      What is summed for the teacher, and for each group by serve name, with a leading axis of
      members.
    """
    weights = jnp.asarray(value_weights, jnp.float32)
    items = jax.device_put(items)
    groups = [group._replace(parameters=jax.device_put(group.parameters)) for group in groups]
    of_teacher = _Total(axis=0)
    of_groups: list[dict[str, _Total]] = [{} for _ in groups]
    for evaluation_batch in batches:
        asked = _Asked(shown, _number_labelled(evaluation_batch), sum_functions(), tuple(ks))
        evaluation_batch = jax.device_put(evaluation_batch)
        batch = evaluation_batch.batch
        if teacher is None:
            probability, weight = batch.teacher_probability, batch.teacher_weight
            met = None
        else:
            served_by_teacher = teacher.serve(teacher.parameters, batch, items)
            (probability,), met = served_by_teacher.probability.values(), served_by_teacher.met
            weight = jnp.broadcast_to(batch.candidate_mask[..., None], probability.shape)
        reference = (probability, weight.astype(jnp.float32), evaluation_batch)
        present = int(evaluation_batch.request_mask.sum())
        of_teacher.add(_of_teacher(*reference, met, weights, asked), present)
        for index, (group, total) in enumerate(zip(groups, of_groups, strict=True)):
            names = serves[index] if serves else None
            served = _of_group(*group, names, *reference, items, weights, asked)
            for name, summed in served.items():
                total.setdefault(name, _Total(axis=1)).add(summed, present)
    if not of_teacher.sums:
        raise ValueError("there are no evaluation requests")
    return of_teacher.whole(), [
        {name: of.whole() for name, of in total.items()} for total in of_groups
    ]


class _Total:
    """The sums of the batches so far, on the host."""

    def __init__(self, axis: int):
        """Takes the axis of requests."""
        self._axis, self._each = axis, list[Each]()
        self.sums: Sums | None = None

    def add(self, more: Summed, present: int) -> None:
        """Adds a batch, of which the first `present` requests count."""
        self.sums = add(self.sums, more.sums)
        counting = (slice(None),) * self._axis + (slice(present),)
        self._each.append(jax.tree.map(lambda of: np.asarray(of)[counting], more.each))

    def whole(self) -> Summed:
        """All batches."""
        each = jax.tree.map(lambda *of: np.concatenate(of, self._axis), *self._each)
        return Summed(self.sums or {}, each)


def _number_labelled(evaluation_batch: EvaluationBatch) -> int:
    """A bound on the labelled candidates of a request: a power of 2, so that few are compiled."""
    label_weight = np.asarray(evaluation_batch.batch.label_weight)
    most = int((label_weight > 0).sum(axis=1).max())
    return min(max(_FEW_LABELS, 1 << (most - 1).bit_length() if most else 0), label_weight.shape[1])
