"""One pass over the evaluation requests that measures the teacher and any number of students.

Two kinds of programs run for each batch. A *serving* program per group of students computes their
probabilities. One *measuring* program, which all rankers share, turns the probabilities of a fixed
number of rankers into sums, so it compiles once for a dataset.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
from kd_ranker.evaluation.metrics import SumFunction, Sums, sum_functions
from kd_ranker.evaluation.ranked import Probability, Scored, TeacherScores, ranked
from kd_ranker.evaluation.totals import Each, Summed, add, summed
from kd_ranker.models.model import Model, Parameters, score
from kd_ranker.training.placing import put, put_by_rows
from kd_ranker.training.state import Frozen

# The least bound on a number of candidates.
_FEW = 16
# The rankers that one call of the measuring program takes, at least and at most. A CPU always takes
# the least, and threads run several calls at once; other devices would idle in small calls.
_PER_CALL = 4, 32


class Served(NamedTuple):
    """The probabilities that a model serves for a batch.

    Attributes:
      probability: by serve name, the probabilities that it may rank by.
      met: for each of its lookups, whether training included each id; see `lookup.was_trained`.
    """

    probability: dict[str, Probability]
    met: dict[str, Bool[Array, "..."]]


# Of parameters, a batch and the items; see `Ranker` for the types of the first two.
Serve = Callable[[Any, Any, Items], Served]


class Ranker(NamedTuple):
    """A trained model, or a group of them, as the evaluation sees it.

    Rankers that share one `serve` function share its compiled program.

    Attributes:
      serve: maps parameters, a `CandidateBatch` and the items to the outputs of one model.
      parameters: `Parameters` of one model; of a group, stacked with a leading axis of members.
        A reference has statistics instead, see `references`.
      sees_truth: whether `serve` takes the whole `EvaluationBatch`, as only a reference may.
      serves: the serve names to measure of each member; None takes all.
    """

    serve: Serve
    parameters: Any
    sees_truth: bool = False
    serves: Sequence[Collection[str]] | None = None


class Plan(NamedTuple):
    """The choices of a pass.

    Attributes:
      value_weights: one weight per task.
      shown: `config.funnel.shown`.
      ks: the values of k at which the curves of each request are kept.
      keep: whether to keep the sums of each request. The program is the same.
      devices: the devices that share the work; none takes the default one.
      sharded: whether to spread the rows of tables and items over them while serving.
    """

    value_weights: Sequence[float]
    shown: int
    ks: Sequence[int] = ()
    keep: bool = False
    devices: Sequence[jax.Device] = ()
    sharded: bool = False


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
def _serve_group(
    serve: Serve,
    sees_truth: bool,
    parameters: Any,
    evaluation_batch: EvaluationBatch,
    items: Items,
    sharding: Sharding | None,
) -> list[dict[str, Scored]]:
    """Return the scores of each member of a group by serve name, as separate arrays."""
    batch = evaluation_batch if sees_truth else evaluation_batch.batch
    served = jax.vmap(lambda parameters: serve(parameters, batch, items))(parameters)
    members = range(len(jax.tree.leaves(parameters)[0]))

    def of_member(member: int) -> dict[str, Scored]:
        own = jax.tree.map(lambda leaf: leaf[member], served)
        return {
            name: Scored.of(probability, own.met, evaluation_batch.batch)
            for name, probability in own.probability.items()
        }

    return _everywhere([of_member(member) for member in members], sharding)


@functools.partial(jax.jit, static_argnames=("serve", "sharding"))
def _score_by_teacher(
    serve: Serve | None, held: Frozen, batch: CandidateBatch, sharding: Sharding | None
) -> tuple[TeacherScores, Scored]:
    """The teacher's scores: as the reference of all rankers, and as those of a ranker."""
    if serve is None:
        served = Served({"logged": batch.teacher_probability}, {})
        weight = batch.teacher_weight
    else:
        served = serve(held.teacher, batch, held.items)
        weight = batch.candidate_mask[..., None]
    (probability,) = served.probability.values()
    weight = jnp.broadcast_to(weight, probability.shape).astype(jnp.float32)
    own = Scored.of(probability, served.met, batch)
    return _everywhere((TeacherScores(probability, weight), own), sharding)


def _everywhere(tree: Any, sharding: Sharding | None) -> Any:
    """The results of a program that devices share, whole on each of them."""
    return jax.lax.with_sharding_constraint(tree, sharding) if sharding else tree


class _Asked(NamedTuple):
    """The static choices of the measuring program; see `ranked.Ranked`."""

    shown: int
    labelled: int
    passed: int
    functions: tuple[SumFunction, ...]
    ks: tuple[int, ...]


@functools.partial(jax.jit, static_argnames="asked")
def _measure(
    rankers: Sequence[Scored],
    is_teacher: Bool[np.ndarray, "C"],
    teacher: TeacherScores,
    evaluation_batch: EvaluationBatch,
    value_weights: Float[Array, "T"],
    asked: _Asked,
) -> Summed:
    """The sums of one batch for C rankers, with a leading axis of these."""

    def of_ranker(scored: Scored, is_teacher: Any) -> Summed:
        batch = ranked(
            *(scored, teacher, evaluation_batch, value_weights),
            *(asked.shown, asked.labelled, asked.passed, is_teacher),
        )
        return summed(batch, asked.functions, asked.ks)

    stacked = jax.tree.map(lambda *of: jnp.stack(of), *rankers)
    return jax.vmap(of_ranker)(stacked, is_teacher)


class _Slot(NamedTuple):
    """A measured ranker: a member of a group by a serve name; the teacher has group -1."""

    group: int
    member: int
    serve: str


_TEACHER = _Slot(-1, 0, "")


class _Place(NamedTuple):
    """A place for serving programs: a device, or all devices if these share the rows of tables.

    Attributes:
      put: puts arrays of the host there.
      held: the items, and the live teacher at the first place.
      sharding: that of results which each of several devices needs whole.
    """

    put: Callable[[Any], Any]
    held: Frozen
    sharding: Sharding | None


def _places(
    teacher: Ranker | None, items: Items, devices: Sequence[jax.Device], sharded: bool
) -> list[_Place]:
    puts: list[Callable[[Any], Any]] = [functools.partial(put, device=of) for of in devices]
    sharding = None
    if sharded and len(devices) > 1:
        puts = [functools.partial(put_by_rows, devices=devices)]
        sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
    of_teacher = [teacher.parameters if teacher else None] + [None] * (len(puts) - 1)
    return [
        _Place(put, put(Frozen(items, parameters)), sharding)
        for put, parameters in zip(puts, of_teacher, strict=True)
    ]


class _Part(NamedTuple):
    """The members of a group that one serving program serves.

    Attributes:
      group: the number of the group.
      members: their numbers in the group.
      place: the number of the place where they are.
      ranker: its parameters may repeat the last member.
    """

    group: int
    members: range
    place: int
    ranker: Ranker

    def scores(
        self, places: Sequence[_Place], there: Sequence[EvaluationBatch]
    ) -> dict[_Slot, Scored]:
        """The scores to measure, of a batch that is at each place."""
        ranker, place, batch = self.ranker, places[self.place], there[self.place]
        served = _serve_group(
            *(ranker.serve, ranker.sees_truth, ranker.parameters),
            *(batch, place.held.items, place.sharding),
        )
        return {
            _Slot(self.group, member, name): scored
            for member, by_name in zip(self.members, served, strict=False)
            for name, scored in by_name.items()
            if ranker.serves is None or name in ranker.serves[member]
        }


def _parts(number: int, group: Ranker, places: Sequence[_Place]) -> Iterator[_Part]:
    """The members of a group, shared by the places."""
    members = num_members(group)
    if len(places) == 1:
        parameters = places[0].put(group.parameters)
        yield _Part(number, range(members), 0, group._replace(parameters=parameters))
        return
    size = -(-members // len(places))
    for place, first in enumerate(range(0, members, size)):
        chosen = np.minimum(np.arange(first, first + size), members - 1)
        # On the host, because no device need hold all members.
        parameters = jax.tree.map(operator.itemgetter(chosen), jax.device_get(group.parameters))
        ranker = group._replace(parameters=places[place].put(parameters))
        yield _Part(number, range(first, min(first + size, members)), place, ranker)


def num_members(group: Ranker) -> int:
    """The number of members of a group."""
    return len(jax.tree.leaves(group.parameters)[0])


def evaluate(
    teacher: Ranker | None,
    groups: Sequence[Ranker],
    batches: Iterable[EvaluationBatch],
    items: Items,
    plan: Plan,
) -> tuple[Summed, list[list[dict[str, Summed]]]]:
    """Measure all rankers on the same requests; the teacher scores each request once.

    Args:
      teacher: the live teacher, which knows every candidate; None takes the logged probabilities.
      groups: the groups of students to measure.
      batches: the requests.
      items: the features and categories of the items.
      plan: the choices of the pass.

    Returns:
      The sums of the teacher, and for each group those of each member by serve name.

    Raises:
      ValueError: there are no requests.
    """
    devices = [*plan.devices] or jax.local_devices()[:1]
    places = _places(teacher, items, devices, plan.sharded)
    parts = [part for number, group in enumerate(groups) for part in _parts(number, group, places)]
    own_devices = [device for device in devices if device.process_index == jax.process_index()]
    weights = np.asarray(plan.value_weights, np.float32)
    totals = _Totals(plan.keep)
    bounds = 0, 0
    with ThreadPoolExecutor() as pool:
        # Programs that share rows exchange them, so all devices must start them in one order.
        map_parts = map if places[0].sharding else pool.map
        for evaluation_batch in batches:
            bounds = _bounds(evaluation_batch, bounds)
            there = [place.put(evaluation_batch) for place in places]
            judged, own = _score_by_teacher(
                *(teacher.serve if teacher else None, places[0].held),
                *(there[0].batch, places[0].sharding),
            )
            scored = {_TEACHER: own}
            for more in map_parts(
                functools.partial(_Part.scores, places=places, there=there), parts
            ):
                scored |= more
            calls = _calls(scored, own_devices)
            measure = functools.partial(
                _measured,
                reference=(judged, there[0], weights),
                asked=_Asked(plan.shown, *bounds, sum_functions(), tuple(plan.ks)),
            )
            present = int(np.asarray(evaluation_batch.request_mask).sum())
            totals.add([call.slots for call in calls], pool.map(measure, calls), present)
    found = totals.whole()
    if not found:
        raise ValueError("there are no evaluation requests")
    of_groups: list[list[dict[str, Summed]]] = [
        [{} for _ in range(num_members(group))] for group in groups
    ]
    for slot, of_ranker in found.items():
        if slot != _TEACHER:
            of_groups[slot.group][slot.member][slot.serve] = of_ranker
    return found[_TEACHER], of_groups


class _Call(NamedTuple):
    """One call of the measuring program.

    Attributes:
      slots: the rankers.
      scored: their scores; further ones repeat the last.
      device: the device that measures.
    """

    slots: list[_Slot]
    scored: list[Scored]
    device: jax.Device


def _calls(scored: Mapping[_Slot, Scored], devices: Sequence[jax.Device]) -> list[_Call]:
    """The rankers in calls of equal sizes, in turn for each device."""
    least, most = _PER_CALL
    each = -(-len(scored) // len(devices))
    # A power of 2, so that few programs are compiled.
    size = least if devices[0].platform == "cpu" else min(max(least, _power(each)), most)
    slots = list(scored)
    starts = range(0, len(slots), size)
    chosen = [slots[first : first + size] for first in starts]
    return [
        _Call(some, [scored[slot] for slot in [*some, *some[-1:] * (size - len(some))]], device)
        for some, device in zip(chosen, itertools.cycle(devices), strict=False)
    ]


def _measured(call: _Call, reference: tuple[Any, ...], asked: _Asked) -> Summed:
    """The sums of one batch for the rankers of a call, on the host."""
    is_teacher = np.zeros(len(call.scored), bool)
    is_teacher[: len(call.slots)] = [slot == _TEACHER for slot in call.slots]
    arguments = (call.scored, is_teacher, *reference)
    return jax.device_get(_measure(*_on(call.device, arguments), asked))


def _on(device: jax.Device, tree: Any) -> Any:
    """Arrays on a device, from the host or from devices, of which each holds them whole."""

    def here(array: Any) -> Any:
        whole = isinstance(array, jax.Array) and not array.is_fully_addressable
        return array.addressable_data(0) if whole else array

    return jax.device_put(jax.tree.map(here, tree), device)


def lower_for_group(
    group: Ranker, evaluation_batch: EvaluationBatch, items: Items
) -> jax.stages.Lowered:
    """Lower the serving program of a group without compiling it.

    Args:
      group: its parameters may be abstract, as may the batch and the items; their shardings are
        those of the program.
      evaluation_batch: of the size of those to come.
      items: the features and categories of the items.
    """
    return _serve_group.lower(
        group.serve, group.sees_truth, group.parameters, evaluation_batch, items, None
    )


class _Totals:
    """The sums of the batches so far, on the host."""

    def __init__(self, keep: bool):
        """Take whether to keep the terms of each request."""
        self._keep = keep
        self._slots: list[list[_Slot]] = []
        self._sums: list[Sums | None] = []
        self._each: list[list[Each]] = []

    def add(self, slots: list[list[_Slot]], calls: Iterable[Summed], present: int) -> None:
        """Add a batch, of which the first `present` requests count; its slots never change."""
        if not self._slots:
            self._slots = slots
            self._sums, self._each = [None] * len(slots), [[] for _ in slots]
        for number, more in enumerate(calls):
            self._sums[number] = add(self._sums[number], more.sums)
            if self._keep:
                self._each[number].append(jax.tree.map(lambda of: of[:, :present], more.each))

    def whole(self) -> dict[_Slot, Summed]:
        """The sums of each ranker; none before the first batch."""
        whole = {}
        for slots, sums, kept in zip(self._slots, self._sums, self._each, strict=True):
            each = jax.tree.map(lambda *of: np.concatenate(of, axis=1), *kept or [Each({}, {})])
            for place, slot in enumerate(slots):
                whole[slot] = jax.tree.map(operator.itemgetter(place), Summed(sums or {}, each))
        return whole


def _bounds(evaluation_batch: EvaluationBatch, least: tuple[int, int]) -> tuple[int, int]:
    """Bounds on the candidates of a request that have a label, and that were passed.

    They are at least those of the batches before, so that few programs are compiled.
    """
    batch = evaluation_batch.batch
    reached = np.asarray(batch.label_weight) > 0, np.asarray(batch.stage) >= Stage.PASSED
    labelled, passed = (_bound(int(of.sum(axis=1).max()), of.shape[1]) for of in reached)
    return max(labelled, least[0]), max(passed, least[1])


def _bound(most: int, candidates: int) -> int:
    """A bound on a number of candidates: a power of 2, so that few programs are compiled."""
    return min(max(_FEW, _power(most)), candidates)


def _power(number: int) -> int:
    """The least power of 2 that is at least a number; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
