"""One pass over the evaluation requests that measures the teacher and any number of students.

Two kinds of programs run for each batch. A *serving* program computes the probabilities of one
ranker; all runs of a sweep with the same model and mode share it. One *measuring* program turns
those of a fixed number of rankers into sums. All rankers share it, so it compiles once, or a few
times if batches grow. `registry.summarize` of the metrics divides the sums.

Axes: `R` requests, `K` values of k, `C` rankers, `T` tasks.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float

from kd_ranker.batch import CandidateBatch, EvaluationBatch, Items, Stage
from kd_ranker.distillation.modes import Mode, ToProbability
from kd_ranker.embedding.lookup import was_trained
from kd_ranker.evaluation.agreement import calibration_bin_sums
from kd_ranker.evaluation.funnel import Orders, favorites_first_on_host
from kd_ranker.evaluation.metrics.metric import SumFunction, Sums
from kd_ranker.evaluation.metrics.registry import sum_functions, sums_curves
from kd_ranker.evaluation.ranked import (
    Probability,
    Ranked,
    Scored,
    Sizes,
    candidates_of,
    rank_batch,
    with_scores_of_candidates,
)
from kd_ranker.models.model import Model, Parameters, score
from kd_ranker.training.mapping import put, put_by_rows
from kd_ranker.training.state import Constants

# The least bound on a number of candidates.
_FEW = 16
# The rankers that one call of the measuring program takes, at least and at most. A CPU always takes
# the least, and threads run several calls at once; other devices would idle in small calls.
_LEAST_PER_CALL = 4
_MOST_PER_CALL = 32


class PerRequest(NamedTuple):
    """The sums of each request, without the bins of the calibration."""

    sums: Sums  # without an axis of k, [R, ...]
    curves: Sums  # over k, cut to a few values of it, [R, K, ...]


class RankerSums(NamedTuple):
    """The sums of a batch, or of a pass, for a ranker; of C rankers with a leading axis."""

    sums: Sums  # over all requests, with those of `metrics.calibration`
    each: PerRequest


class Served(NamedTuple):
    """The outputs of a model for a batch."""

    probability: dict[str, Probability]  # by serve name
    seen: dict[str, Bool[Array, "..."]]  # by lookup, see `lookup.was_trained`


# Of parameters, a batch and the items; see `Ranker` for the types of the first two.
Serve = Callable[[Any, Any, Items], Served]


class Ranker(NamedTuple):
    """A trained model.

    Rankers that share one `serve` function share its compiled program.
    """

    serve: Serve
    parameters: Any  # `Parameters`, or for references `baselines.Lists`
    sees_truth: bool = False  # whether `serve` takes the `EvaluationBatch`, as only a reference may
    serves: Collection[str] | None = None  # the probabilities to measure; None takes all


class Plan(NamedTuple):
    """The choices of a pass."""

    value_weights: Sequence[float]  # one per task
    shown: int
    ks: Sequence[int] = ()  # at which the curves of each request are kept
    keep: bool = False  # whether to keep the sums of each request; the program is the same
    devices: Sequence[jax.Device] = ()  # that share the work; none takes the default one
    sharded: bool = False  # whether to spread the rows of tables and items over them
    are_partly_scored: bool = False  # see `whole.Measurable`
    labels_beyond_shown: bool = False  # whether more candidates have labels than are shown


_Put = Callable[[Any], Any]  # a pytree on the devices of a place


class _Head(NamedTuple):
    """One of the probabilities that a ranker serves."""

    ranker: int  # its index among the rankers of a pass
    serve: str


def make_serve(model: Model, mode: Mode) -> Serve:
    """Compile what a model serves for a batch: (parameters, batch, items) -> `Served`.

    Equal models get the same function, so each measurement finds the programs of those before.
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


@functools.partial(jax.jit, static_argnames=("serve", "sees_truth", "sharding"))
def _score(
    serve: Serve,
    sees_truth: bool,
    parameters: Any,
    evaluation_batch: EvaluationBatch,
    items: Items,
    value_weights: Float[Array, "T"],
    sharding: Sharding | None,
) -> dict[str, Scored]:
    """Return the scores of a ranker by serve name."""
    batch = evaluation_batch.batch
    served = serve(parameters, evaluation_batch if sees_truth else batch, items)
    scored = {
        name: Scored.of(probability, served.seen, batch, value_weights)
        for name, probability in served.probability.items()
    }
    return _everywhere(scored, sharding)


@functools.partial(jax.jit, static_argnames=("serve", "sharding"))
def _score_by_teacher(
    serve: Serve | None,
    constants: Constants,
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    sharding: Sharding | None,
) -> tuple[Scored, EvaluationBatch]:
    """Return the teacher's scores as those of a ranker, and the batch with them."""
    batch = evaluation_batch.batch
    seen: dict[str, Any] = {}
    if serve:
        served = serve(constants.teacher, batch, constants.items)
        seen = served.seen
        (probability,) = served.probability.values()
        weight = jnp.broadcast_to(batch.candidate_mask[..., None], probability.shape)
        batch = dataclasses.replace(
            batch,
            teacher_probability=probability,
            teacher_weight=weight.astype(jnp.float32),
        )
    with_scores = with_scores_of_candidates(dataclasses.replace(evaluation_batch, batch=batch))
    scored = Scored.by_teacher(with_scores.batch, seen, value_weights)
    return _everywhere((scored, with_scores), sharding)


def _everywhere(tree: Any, sharding: Sharding | None) -> Any:
    """The results of a program that devices share, whole on each of them."""
    return jax.lax.with_sharding_constraint(tree, sharding) if sharding else tree


def sums_of_batch(batch: Ranked, functions: Sequence[SumFunction], ks: Sequence[int]) -> RankerSums:
    """The sums of `functions` over the requests of one batch, and their terms; pure.

    The curves of each request are cut to `ks`, at least 1; one beyond the candidates means all.

    Raises:
      ValueError: two functions return a sum of the same name.
    """
    names = ("bin_weight", "bin_predicted", "bin_observed")
    bins: Sums = dict(zip(names, calibration_bin_sums(*batch.labels), strict=True))
    single: Sums = {}
    curves: Sums = {}
    for function in functions:
        for name, array in function(batch).items():
            if name in bins | single | curves:
                raise ValueError(f"two sums of the metrics are named {name}")
            if array.ndim > 1 and sums_curves(function):
                curves[name] = array.astype(jnp.float32)
            else:
                single[name] = array.astype(jnp.float32)
    sums = {name: array.sum(axis=0) for name, array in (single | curves).items()}
    cut = {}
    for name, array in curves.items():
        index = np.minimum(np.asarray(ks, int), array.shape[1]) - 1
        cut[name] = array[:, index]
    return RankerSums(sums | bins, PerRequest(single, cut))


def add(total: Sums | None, more: Sums) -> Sums:
    """Add sums on the host and in float64, so that a long evaluation loses no digits."""
    more = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), more)
    if total is None:
        return more
    return jax.tree.map(np.add, total, more)


@functools.partial(jax.jit, static_argnames=("sizes", "functions", "ks"))
def _sums_of_rankers(
    rankers: Sequence[Scored],
    is_teacher: Bool[np.ndarray, "C"],
    orders: Orders | None,
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    *,
    sizes: Sizes,
    functions: tuple[SumFunction, ...],
    ks: tuple[int, ...],
) -> RankerSums:
    """The sums of one batch for C rankers, with a leading axis of these.

    `orders` has the order of each ranker, and one of the teacher; None computes them here.
    """

    def sums_of_ranker(scored: Scored, is_teacher: Any, orders: Orders | None) -> RankerSums:
        batch = rank_batch(scored, evaluation_batch, value_weights, sizes, is_teacher, orders)
        return sums_of_batch(batch, functions, ks)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rankers)
    order_axes: Any = None
    if orders is not None:
        order_axes = Orders(student=0, teacher=None)  # type: ignore[arg-type]
    in_axes = (0, 0, order_axes)
    return jax.vmap(sums_of_ranker, in_axes=in_axes)(stacked, is_teacher, orders)


def evaluate(
    teacher: Ranker | None,
    rankers: Sequence[Ranker],
    batches: Iterable[EvaluationBatch],
    items: Items,
    plan: Plan,
) -> tuple[RankerSums, list[dict[str, RankerSums]]]:
    """Measure rankers on the same requests; the teacher scores each request once.

    A live teacher knows every candidate; None takes the logged probabilities.

    Returns:
      The sums of the teacher, and those of each ranker by serve name.

    Raises:
      ValueError: there are no requests.
    """
    devices = [*plan.devices] or jax.local_devices()[:1]
    own_devices = [device for device in devices if device.process_index == jax.process_index()]
    places: list[_Put] = [functools.partial(put, device=device) for device in devices]
    sharding = None
    if plan.sharded and len(devices) > 1:
        places = [functools.partial(put_by_rows, devices=devices)]
        sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
    # The teacher scores at the first place only.
    teacher_parameters = teacher.parameters if teacher else None
    constants = [places[0](Constants(items, teacher_parameters))]
    constants += [place(Constants(items, None)) for place in places[1:]]
    # Rankers take the places in turn.
    place_of_ranker = [index % len(places) for index in range(len(rankers))]
    placed_rankers = []
    for ranker, place in zip(rankers, place_of_ranker, strict=True):
        parameters = ranker.parameters
        if len(devices) > 1:
            # Through the host, because they may be on another device.
            parameters = jax.device_get(parameters)
        placed_rankers.append(ranker._replace(parameters=places[place](parameters)))
    value_weights = np.asarray(plan.value_weights, np.float32)

    def score_heads(index: int, batch_at_places: Sequence[EvaluationBatch]) -> dict[_Head, Scored]:
        """Return the scores of the heads to measure of a ranker."""
        ranker = placed_rankers[index]
        place = place_of_ranker[index]
        scored_by_name = _score(
            ranker.serve,
            ranker.sees_truth,
            ranker.parameters,
            batch_at_places[place],
            constants[place].items,
            value_weights,
            sharding,
        )
        return {
            _Head(index, name): scored
            for name, scored in scored_by_name.items()
            if ranker.serves is None or name in ranker.serves
        }

    sizes = Sizes(plan.shown, 0, 0, plan.are_partly_scored, plan.labels_beyond_shown)
    heads: list[_Head] = []  # in the order of the sums, after the teacher
    sums: Sums | None = None
    per_request: list[PerRequest] = []
    with ThreadPoolExecutor() as pool:
        # Programs that share rows exchange them, so all devices must start them in one order.
        map_rankers = map if sharding else pool.map
        for evaluation_batch in batches:
            sizes = _sizes(evaluation_batch, sizes)
            batch_at_places = [place(evaluation_batch) for place in places]
            serve = teacher.serve if teacher else None
            teacher_scored, scored_batch = _score_by_teacher(
                serve, constants[0], batch_at_places[0], value_weights, sharding
            )
            scores: dict[_Head, Scored] = {}
            indices = range(len(rankers))
            for scores_of_ranker in map_rankers(
                score_heads, indices, itertools.repeat(batch_at_places)
            ):
                scores |= scores_of_ranker
            heads = list(scores)
            scored = [teacher_scored, *scores.values()]
            batch_sums = _sums_of_all(scored, scored_batch, plan, sizes, own_devices, pool)
            sums = add(sums, batch_sums.sums)
            if plan.keep:
                num_present = int(np.asarray(evaluation_batch.request_mask).sum())
                per_request.append(
                    jax.tree.map(lambda leaf, n=num_present: leaf[:, :n], batch_sums.each)
                )
    if sums is None:
        raise ValueError("there are no evaluation requests")
    terms = PerRequest({}, {})
    if per_request:
        terms = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *per_request)
    all_rankers = RankerSums(sums, terms)
    teacher_sums = jax.tree.map(operator.itemgetter(0), all_rankers)
    ranker_sums: list[dict[str, RankerSums]] = [{} for _ in rankers]
    for index, head in enumerate(heads, start=1):
        ranker_sums[head.ranker][head.serve] = jax.tree.map(operator.itemgetter(index), all_rankers)
    return teacher_sums, ranker_sums


def _sums_of_all(
    scored: Sequence[Scored],
    evaluation_batch: EvaluationBatch,
    plan: Plan,
    sizes: Sizes,
    devices: Sequence[jax.Device],
    pool: ThreadPoolExecutor,
) -> RankerSums:
    """The sums of one batch for all rankers, the teacher first, on the host.

    Devices call the measuring program in turn, and the last call repeats its last ranker. Only
    CPUs get the orders of rankers from NumPy, see `favorites_first_on_host`.
    """
    size = _LEAST_PER_CALL
    on_cpu = devices[0].platform == "cpu"
    if not on_cpu:
        per_device = -(-len(scored) // len(devices))
        # A power of 2, so that few programs are compiled.
        size = min(max(size, _power(per_device)), _MOST_PER_CALL)
    value_weights = np.asarray(plan.value_weights, np.float32)
    functions = sum_functions()

    def local(array: Any) -> Any:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array.addressable_data(0)
        return array

    # In this thread: JAX may fail if two threads read the shards of one array for the first time.
    def inputs_of_call(first: int, device: jax.Device) -> Any:
        indices = range(first, first + size)
        rankers = [scored[min(index, len(scored) - 1)] for index in indices]
        is_teacher = np.array([index == 0 for index in indices])
        inputs = jax.tree.map(local, (rankers, is_teacher, evaluation_batch, value_weights))
        return jax.device_put(inputs, device)

    mask = np.asarray(candidates_of(jax.tree.map(local, evaluation_batch)))

    def order_on_host(ranker: Scored) -> Any:
        return favorites_first_on_host(np.asarray(local(ranker.value)), mask)

    # The teacher is the first ranker, and every call needs its order.
    teacher_order: Any = order_on_host(scored[0]) if on_cpu else None

    def call(inputs: Any) -> RankerSums:
        rankers, is_teacher, *batch_and_weights = inputs
        orders = None
        if on_cpu:
            ranker_orders: Any = np.stack([order_on_host(ranker) for ranker in rankers])
            orders = Orders(student=ranker_orders, teacher=teacher_order)
        sums_on_device = _sums_of_rankers(
            rankers,
            is_teacher,
            orders,
            *batch_and_weights,
            sizes=sizes,
            functions=functions,
            ks=tuple(plan.ks),
        )
        return jax.device_get(sums_on_device)

    firsts = range(0, len(scored), size)
    calls = pool.map(call, map(inputs_of_call, firsts, itertools.cycle(devices)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(scored)], *calls)


def _sizes(evaluation_batch: EvaluationBatch, before: Sizes) -> Sizes:
    """The sizes of a batch, at least those of the batches before: few programs are compiled."""
    batch = evaluation_batch.batch
    num_labeled = _most(np.asarray(batch.label_weight) > 0)
    passed = _most(np.asarray(batch.stage) >= Stage.PASSED)
    return before._replace(
        num_labeled=max(before.num_labeled, num_labeled), passed=max(before.passed, passed)
    )


def _most(is_counted: Bool[np.ndarray, "R N"]) -> int:
    """Return a bound on the number of counted candidates of each request: few ones occur."""
    largest = int(is_counted.sum(axis=1).max())
    return min(max(_FEW, _power(largest)), is_counted.shape[1])


def _power(number: int) -> int:
    """The least power of 2 that is at least a number; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
