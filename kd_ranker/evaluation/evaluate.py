"""One pass over the evaluation requests that measures the teacher and any number of students."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Items, Stage
from kd_ranker.distillation.modes import Mode, ToProbability
from kd_ranker.embedding.lookup import was_trained
from kd_ranker.evaluation.metrics import SumFunction, Sums, sum_functions
from kd_ranker.evaluation.ranked import ranked, ranked_by_teacher
from kd_ranker.evaluation.totals import Each, Summed, add, summed
from kd_ranker.models.model import Model, Parameters, score
from kd_ranker.training.mapping import shared_evenly
from kd_ranker.training.placing import MEMBERS, places, put, put_by_rows
from kd_ranker.training.state import Frozen

Probability = Float[Array, "R N T"]
Met = dict[str, Bool[Array, "..."]]

_FEW = 16


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
    """Compiles what a model says of a batch: (parameters, batch, items) -> `Served`.

    Equal models get the same function, so that each measurement finds the programs of those before.
    """
    return _make_serve(model, tuple(mode.serve.items()))


@functools.lru_cache(maxsize=64)
def _make_serve(model: Model, probabilities: tuple[tuple[str, ToProbability], ...]) -> Serve:
    def serve(parameters: Parameters, batch: CandidateBatch, items: Items) -> Served:
        logits = score(model, parameters, batch, items)
        return Served(
            {name: probability(logits) for name, probability in probabilities},
            was_trained(model.embedding, parameters.tables, batch, items),
        )

    return jax.jit(serve)


class _Asked(NamedTuple):
    """The questions to a pass; nothing of them is traced."""

    shown: int
    labelled: int
    passed: int
    functions: tuple[SumFunction, ...]
    ks: tuple[int, ...]


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
        *(asked.shown, asked.labelled, asked.passed, met),
    )
    return summed(batch, asked.functions, asked.ks)


@functools.partial(jax.jit, static_argnames=("serve", "sees_truth", "serves", "asked", "mesh"))
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
    mesh: Mesh | None,
) -> dict[str, Summed]:
    """By serve name, what one batch adds for each member of a group, which a mesh may share."""

    def of_members(
        parameters: Any, reference: Any, items: Items, value_weights: Float[Array, "T"]
    ) -> dict[str, Summed]:
        probability, weight, whole = reference
        seen = whole if sees_truth else whole.batch

        def of_member(parameters: Any) -> dict[str, Summed]:
            served = serve(parameters, seen, items)
            names = serves or tuple(served.probability)

            def of_serve(own: Probability) -> Summed:
                batch = ranked(
                    *(own, probability, weight, whole, value_weights),
                    *(asked.shown, asked.labelled, asked.passed, served.met),
                )
                return summed(batch, asked.functions, asked.ks)

            # One body for all of them, which is compiled once.
            of_all = jax.lax.map(of_serve, jnp.stack([served.probability[name] for name in names]))
            return {
                name: jax.tree.map(lambda of: of[index], of_all)  # noqa: B023
                for index, name in enumerate(names)
            }

        return jax.vmap(of_member)(parameters)

    if mesh:
        each, everywhere = PartitionSpec(MEMBERS), PartitionSpec()
        of_members = jax.shard_map(
            of_members,
            mesh=mesh,
            in_specs=(each, everywhere, everywhere, everywhere),
            out_specs=each,
            check_vma=False,
        )
    reference = teacher_probability, teacher_weight, evaluation_batch
    return of_members(parameters, reference, items, value_weights)


class _Group(NamedTuple):
    """A group on its devices, the items, and the mesh of devices with members of their own."""

    ranker: Ranker
    items: Items
    mesh: Mesh | None


def _on_devices(ranker: Ranker, items: Items, devices: Sequence[jax.Device]) -> _Group:
    """The group with its members spread over devices, the last one again in what is left over."""
    members = len(jax.tree.leaves(ranker.parameters)[0])
    of_each = -(-members // max(len(devices), 1))
    used = devices[: -(-members // of_each)]
    if len(used) <= 1:
        return _Group(ranker._replace(parameters=put(ranker.parameters)), items, None)
    mesh = Mesh(np.array(used), (MEMBERS,))
    evenly = shared_evenly(members, len(used))
    # On the host, as no device need hold them all.
    filled = jax.tree.map(lambda leaf: np.asarray(leaf)[evenly], ranker.parameters)
    split = NamedSharding(mesh, PartitionSpec(MEMBERS))
    spread = jax.device_put(filled, places(filled, split))
    return _Group(ranker._replace(parameters=spread), _everywhere(items, mesh), mesh)


def _everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """A pytree on all devices of a mesh; as it is without one."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec())) if mesh else tree


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
    keep: bool = False,
    devices: Sequence[jax.Device] = (),
    sharded: bool = False,
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
      ks: the values of k at which the curves of each request are cut.
      keep: whether to keep what each request adds. The program is the same.
      devices: those to spread the members of a group over; none takes the default one.
      sharded: whether to spread the rows of tables and items over them, in place of members.

    Returns:
      What is summed for the teacher, and for each group by serve name, with a leading axis of
      members, and maybe of some that are the last one again.
    """
    by_rows = sharded and len(devices) > 1
    to_devices = functools.partial(put_by_rows, devices=devices) if by_rows else jax.device_put
    held = to_devices(Frozen(items, teacher.parameters if teacher else None))
    weights = to_devices(jnp.asarray(value_weights, jnp.float32))
    on_devices = [
        _Group(group._replace(parameters=to_devices(group.parameters)), held.items, None)
        if by_rows
        else _on_devices(group, held.items, devices)
        for group in groups
    ]
    of_teacher = _Total(axis=0, keep=keep)
    of_groups: list[dict[str, _Total]] = [
        collections.defaultdict(lambda: _Total(axis=1, keep=keep)) for _ in groups
    ]
    names = serves or [None] * len(groups)
    # One device runs the programs of several threads at once; several keep one order of programs.
    threads = 1 if len(devices) > 1 else max(len(groups), 1)
    with ThreadPoolExecutor(threads) as pool:
        for evaluation_batch in batches:
            bounds = _bounds(evaluation_batch)
            asked = _Asked(shown, *bounds, sum_functions(), tuple(ks))
            evaluation_batch = to_devices(evaluation_batch)
            judged, met = _judged(teacher, held, evaluation_batch.batch)
            reference = *judged, evaluation_batch
            present = int(evaluation_batch.request_mask.sum())
            add_group = functools.partial(
                _add_group, reference=reference, weights=weights, asked=asked, present=present
            )
            of_batch = pool.map(add_group, on_devices, names, of_groups)
            of_teacher.add(_of_teacher(*reference, met, weights, asked), present)
            collections.deque(of_batch, maxlen=0)  # raises what a thread has raised
    if not of_teacher.sums:
        raise ValueError("there are no evaluation requests")
    return of_teacher.whole(), [
        {name: of.whole() for name, of in total.items()} for total in of_groups
    ]


def _add_group(
    group: _Group,
    serves: tuple[str, ...] | None,
    totals: Mapping[str, "_Total"],
    reference: tuple[Probability, Probability, EvaluationBatch],
    weights: Float[Array, "T"],
    asked: _Asked,
    present: int,
) -> None:
    """Adds what one batch adds for a group to its totals by serve name."""
    mesh = group.mesh
    shared = *_everywhere(reference, mesh), group.items, _everywhere(weights, mesh)
    for name, more in _of_group(*group.ranker, serves, *shared, asked, mesh).items():
        totals[name].add(more, present)


def _judged(
    teacher: Ranker | None, held: Frozen, batch: CandidateBatch
) -> tuple[tuple[Probability, Probability], Met | None]:
    """The teacher's probabilities with their weights, and which ids it has met in training."""
    if teacher is None:
        return (batch.teacher_probability, batch.teacher_weight.astype(jnp.float32)), None
    served = teacher.serve(held.teacher, batch, held.items)
    (probability,) = served.probability.values()
    weight = jnp.broadcast_to(batch.candidate_mask[..., None], probability.shape)
    return (probability, weight.astype(jnp.float32)), served.met


def lower_for_group(
    group: Ranker, batch: EvaluationBatch, items: Items, tasks: int, shown: int
) -> jax.stages.Lowered:
    """The program of `evaluate` for a group, which a logged teacher judges, lowered, not compiled.

    Args:
      group: its parameters may be abstract, as may `batch` and `items`; where these lie is where
        the program is for.
      batch: of the size of those to come.
      items: what is known of the items.
      tasks: T.
      shown: `config.funnel.shown`, of which all are labelled.
    """
    candidates = batch.batch
    judged = (candidates.teacher_probability, candidates.teacher_weight)
    weights = jax.ShapeDtypeStruct((tasks,), jnp.float32)
    labelled = _bound(shown, candidates.labelled)
    asked = _Asked(shown, labelled, candidates.stage.shape[1], sum_functions(), ())
    return _of_group.lower(*group, None, *judged, batch, items, weights, asked, None)


class _Total:
    """The sums of the batches so far, on the host."""

    def __init__(self, axis: int, keep: bool):
        """Takes the axis of requests, and whether to keep what each adds."""
        self._axis, self._keep, self._each = axis, keep, list[Each]()
        self.sums: Sums | None = None

    def add(self, more: Summed, present: int) -> None:
        """Adds a batch, of which the first `present` requests count."""
        self.sums = add(self.sums, more.sums)
        if not self._keep:
            return
        counting = (slice(None),) * self._axis + (slice(present),)
        self._each.append(jax.tree.map(lambda of: np.asarray(of)[counting], more.each))

    def whole(self) -> Summed:
        """All batches."""
        kept = self._each or [Each({}, {})]
        each = jax.tree.map(lambda *of: np.concatenate(of, self._axis), *kept)
        return Summed(self.sums or {}, each)


def _bounds(evaluation_batch: EvaluationBatch) -> tuple[int, int]:
    """Bounds on the candidates of a request that have a label, and that were passed."""
    batch = evaluation_batch.batch
    labelled, stage = np.asarray(batch.label_weight) > 0, np.asarray(batch.stage)
    return (
        _bound(int(labelled.sum(axis=1).max()), labelled.shape[1]),
        _bound(int((stage >= Stage.PASSED).sum(axis=1).max()), stage.shape[1]),
    )


def _bound(most: int, candidates: int) -> int:
    """A bound on a number of candidates: a power of 2, so that few programs are compiled."""
    return min(max(_FEW, 1 << (most - 1).bit_length() if most else 0), candidates)
