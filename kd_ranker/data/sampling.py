"""From many requests to a training batch of some, with a fixed number of candidates each.

What is drawn at random is a handful of whole numbers a request (`Starts`). Which candidates these
mean is arithmetic (`Draw`), and the batch is gathered from `Columns`. The same functions run on
NumPy arrays on the host and, compiled, on a device that holds the columns: the arithmetic for many
steps at once, the gathering within the train step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from kd_ranker.batch import CandidateBatch, Stage
from kd_ranker.data import packing
from kd_ranker.data.columns import Columns, in_sampling_order, lengths
from kd_ranker.data.packing import Packed

Fields = dict[str, Any]
Places = Int[Array, "R N"]

# The kinds of candidates that a batch holds, in the order in which it holds them.
POSITIVES, NEGATIVES, OTHERS, REST = range(KINDS := 4)

# What a batch holds of a request itself, and of a candidate, as it stands in `Columns`.
_FIELDS_OF_REQUESTS = (
    *("user_id", "user_features", "context", "request_category"),
    *("history_id", "history_features", "history_mask"),
)
_FIELDS_OF_CANDIDATES = ("item_id", "candidate_features", "candidate_category")


@flax.struct.dataclass
class RequestData:
    """Requests as a batch is cut from them: each part is one array, of which a row is one read.

    Attributes:
      requests: what is known of each request: fields of `CandidateBatch`, where its candidates,
        labels and teacher probabilities begin, and how many there are.
      candidates: what is known of each candidate of each request.
      labels: the user labels of those that were shown.
      teacher: the teacher's probabilities of those that it scored.
    """

    requests: Packed
    candidates: Packed
    labels: Packed
    teacher: Packed


class Slots(NamedTuple):
    """How many of a request's slots in a batch, counted from the first, can hold what.

    Attributes:
      candidates: N, a candidate.
      labelled: a user label that counts.
      judged: a teacher probability, or a candidate that was passed.
    """

    candidates: int
    labelled: int
    judged: int


@flax.struct.dataclass
class TrainingData:
    """Requests to train on, and what a batch can hold of each.

    Attributes:
      data: the requests, their candidates as `in_sampling_order` puts them.
      slots: of a batch.
    """

    data: RequestData
    slots: Slots = flax.struct.field(pytree_node=False)


class Kinds(NamedTuple):
    """How many candidates of each kind there are, and how many of them a batch holds.

    The kinds are those that were shown and have a positive label; those that were shown and have
    none; the others that were passed, where a shown one whose labels were not drawn counts as
    passed; and the rest of the retrieved.
    """

    numbers: Int[np.ndarray, "*requests kinds"]
    wanted: Int[np.ndarray, "*requests kinds"]

    def of(self, request: Int[np.ndarray, "*shape"]) -> "Kinds":
        """Those of some requests."""
        return Kinds(self.numbers[request], self.wanted[request])


@flax.struct.dataclass
class Starts:
    """What is random about the batches of a few steps in a row.

    Attributes:
      request: which of the requests, for each of the steps.
      kinds: of these requests.
      offset: the place at which the sample of each kind starts, in [0, number of that kind); 0 if
        there are none. A run of places from a uniform one on draws each place with the same
        probability, and none twice: systematic sampling (Madow and Madow, 1944).
    """

    request: Int[Array, "*R steps"]
    kinds: Kinds
    offset: Int[Array, "*R steps kinds"]


@flax.struct.dataclass
class Draw:
    """The candidates of the batches of a few steps in a row.

    Attributes:
      request: which of the requests, for each of the steps.
      place: which candidates of each, -1 where there is none.
      factor: on the label weight of each that may have labels; 0 for what is not to be learned
        from labels.
    """

    request: Int[Array, "R steps"]
    place: Int[Array, "R steps N"]
    factor: Float[Array, "R steps labelled"]


def training_data(
    columns: Columns, candidates: int, passed_share: float, negative_rate: float
) -> tuple[TrainingData, Kinds]:
    """Decides how many candidates of each kind a batch holds of each request.

    Shown ones come first: all positives, and of the n negatives a share `negative_rate`, k in
    number, each of which then counts n / k times, so that weighted sums over the labels keep their
    expectation; what does not fit is thinned and reweighted the same way. The slots that are left
    are filled from the passed and from the rest; where one of the two runs out the other fills up.

    Args:
      columns: the requests, on the host.
      candidates: `config.batch.candidates`, the most to hold.
      passed_share: the share of the slots left after the shown that the passed fill.
      negative_rate: the share of the shown candidates without any positive label to keep.

    Returns:
      The data, on the host, and the kinds of each request, for `draw`.
    """
    columns, positives = in_sampling_order(columns)
    shown, retrieved = columns.num_shown, lengths(columns.candidate_start)
    passed = np.maximum(columns.num_passed, shown)
    negatives = shown - positives
    kept_positives, kept_negatives = _labelled_numbers(
        positives, negatives, negative_rate, candidates
    )
    labelled = kept_positives + kept_negatives
    others, rest = passed - labelled, retrieved - passed
    slots = np.minimum(candidates - labelled, others + rest)
    from_others = np.minimum(np.rint(passed_share * slots).astype(np.int64), others)
    from_others = np.maximum(from_others, slots - rest)
    kinds = Kinds(
        numbers=np.stack([positives, negatives, others, rest], axis=1),
        wanted=np.stack([kept_positives, kept_negatives, from_others, slots - from_others], axis=1),
    )
    judged = candidates
    if (columns.num_scored <= passed).all():
        judged = max(int((labelled + from_others).max()), 1)
    slots_of = Slots(candidates, max(int(labelled.max()), 1), judged)
    return TrainingData(request_data(columns), slots_of), kinds


def request_data(columns: Columns) -> RequestData:
    """The requests of `columns`, on the host."""
    of_requests = (
        *_FIELDS_OF_REQUESTS,
        *("num_passed", "num_shown", "num_scored"),
    )
    starts = {
        name: getattr(columns, name)[:-1]
        for name in ("candidate_start", "shown_start", "scored_start")
    }
    return RequestData(
        requests=packing.pack({name: getattr(columns, name) for name in of_requests} | starts),
        candidates=packing.pack(
            {name: getattr(columns, name) for name in _FIELDS_OF_CANDIDATES},
            nothing={"candidate_category": -1},
        ),
        labels=packing.pack(
            {"user_label": columns.user_label, "label_weight": columns.label_weight}
        ),
        teacher=packing.pack(
            {"teacher_probability": columns.teacher_probability},
            nothing={"teacher_probability": np.nan},
        ),
    )


def _labelled_numbers(
    positives: Int[np.ndarray, "n"],
    negatives: Int[np.ndarray, "n"],
    negative_rate: float,
    slots: int,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """How many positive and negative candidates a batch keeps with their labels."""
    wanted = np.rint(negative_rate * negatives).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), negatives)
    total = positives + wanted
    # Where they do not fit, both are thinned in proportion, and neither to nothing; a single slot
    # goes to a positive.
    reserved = np.minimum(wanted, 1) if slots > 1 else np.zeros_like(wanted)
    share = np.rint(slots * positives / np.maximum(total, 1)).astype(np.int64)
    fewer = np.minimum(np.minimum(np.maximum(share, 1), np.maximum(slots - reserved, 0)), positives)
    thinned = total > slots
    kept = np.where(thinned, fewer, positives)
    return kept, np.where(thinned, np.minimum(slots - kept, wanted), wanted)


def draw(
    request: Int[np.ndarray, "R steps"],
    start: Float[np.ndarray, "R steps kinds"],
    kinds: Kinds,
) -> Starts:
    """What uniform numbers mean.

    Args:
      request: which of the requests.
      start: uniform in [0, 1).
      kinds: of these requests.
    """
    # A product with a number next to 1 may be rounded up.
    offset = np.minimum((start * kinds.numbers).astype(np.int32), np.maximum(kinds.numbers - 1, 0))
    narrow: Any = [array.astype(np.int32) for array in (request, *kinds, offset)]
    return Starts(narrow[0], Kinds(*narrow[1:3]), narrow[3])


def around(index: Int[Array, "..."], number: Int[Array, "..."]) -> Int[Array, "..."]:
    """`index`, in [0, 2 · number), on a circle of `number` places.

    >>> around(np.arange(6), 4).tolist()
    [0, 1, 2, 3, 0, 1]
    """
    return index - number * (index >= number)


def chosen(starts: Starts, slots: Slots) -> Draw:
    """The candidates that a draw means, for all of its steps.

    On arrays of NumPy or of JAX, whichever they are. In a compiled program this is of its own, it
    is one pass over few numbers; within the step XLA on a CPU would do it anew for each number that
    is gathered.
    """
    kinds: Any = starts.kinds
    place, factor = _places(kinds.numbers, kinds.wanted, starts.offset, slots.candidates)
    return Draw(starts.request, place, factor[..., : slots.labelled])


def cut_batch(data: TrainingData, draw: Draw, step: int | Int[Array, ""] = 0) -> CandidateBatch:
    """The batch that a draw means for one of its steps: shown candidates first, padding last.

    On arrays of NumPy or of JAX, whichever they are.
    """
    requests = packing.take(data.data.requests, draw.request[:, step])

    def of_candidates() -> Fields:
        place, factor = draw.place[:, step], draw.factor[:, step]
        return candidate_fields(data.data, requests, place, factor, data.slots)

    return CandidateBatch(**request_fields(requests), **_computed_once(of_candidates, step))


def _computed_once(compute: Callable[[], Fields], step: int | Int[Array, ""]) -> Fields:
    """`compute()`, which a compiled program works out before anything reads it.

    XLA on a CPU would work out anew, within each pass that reads a candidate, which one it is, and
    a barrier does not stop it; a branch does. It is always the first: no step is negative.
    """
    if not isinstance(step, jax.Array):
        return compute()

    def nothing() -> Fields:
        return jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), jax.eval_shape(compute))

    return jax.lax.cond(step >= 0, compute, nothing)


def _places(
    numbers: Int[Array, "*R kinds"],
    wanted: Int[Array, "*R kinds"],
    offset: Int[Array, "*R kinds"],
    candidates: int,
) -> tuple[Int[Array, "*R N"], Float[Array, "*R N"]]:
    """Which candidates of each request a draw means.

    Returns:
      Places in a request's list of candidates, -1 where there is none; and the factor on the label
      weight of each, 0 for what is not to be learned from labels.
    """
    xp = _namespace(offset)
    slot = xp.arange(candidates, dtype=offset.dtype)
    # Sums of four, one by one: a compiled scan over so few costs more.
    ends = [wanted[..., [POSITIVES]]]
    for kind in (NEGATIVES, OTHERS, REST):
        ends.append(ends[-1] + wanted[..., [kind]])

    def pick(of_kinds: Any) -> Int[Array, "*R N"]:
        """The number of each slot's kind: a choice among four costs less than a gather."""
        picked = of_kinds[REST]
        for kind in (OTHERS, NEGATIVES, POSITIVES):
            picked = xp.where(slot < ends[kind], of_kinds[kind], picked)
        return picked

    def of_kind(array: Int[Array, "*R kinds"]) -> Int[Array, "*R N"]:
        return pick([array[..., [kind]] for kind in range(KINDS)])

    # A sample is a run of places on the circle of its kind; what it leaves out follows it there.
    number, k, begin = of_kind(numbers), of_kind(wanted), pick([0 * ends[0], *ends[:-1]])
    sampled = around(of_kind(offset) + slot - begin, number)

    # Among the others, those shown ones that were not drawn come first: positives, negatives.
    positives, negatives = numbers[..., [POSITIVES]], numbers[..., [NEGATIVES]]
    drawn_positives, drawn_negatives = wanted[..., [POSITIVES]], wanted[..., [NEGATIVES]]
    after_positives = sampled - (positives - drawn_positives)
    left_positive = around(offset[..., [POSITIVES]] + drawn_positives + sampled, positives)
    left_negative = around(offset[..., [NEGATIVES]] + drawn_negatives + after_positives, negatives)
    after_negatives = after_positives - (negatives - drawn_negatives)
    other = xp.where(after_positives < 0, left_positive, positives + left_negative)
    other = xp.where(after_negatives < 0, other, positives + negatives + after_negatives)
    passed = numbers[..., [OTHERS]] + drawn_positives + drawn_negatives
    place = pick([sampled, positives + sampled, other, passed + sampled])
    stands_for = number.astype(xp.float32) / xp.maximum(k, 1).astype(xp.float32)
    factor = xp.where(slot < ends[NEGATIVES], stands_for, xp.float32(0))
    return xp.where(slot < ends[REST], place, -1), factor


def whole_batch(
    batch: CandidateBatch | Draw, data: TrainingData | None, done: Int[Array, ""]
) -> CandidateBatch:
    """The batch itself, or the one that a draw from `data` means after so many steps."""
    if not isinstance(batch, Draw):
        return batch
    assert data is not None, "a draw needs the data that it is of"
    return cut_batch(data, batch, done % batch.request.shape[1])


def request_fields(requests: Mapping[str, Shaped[Array, "R ..."]]) -> Fields:
    """The fields of `CandidateBatch` that are of a request itself."""
    return {name: requests[name] for name in _FIELDS_OF_REQUESTS}


def candidate_fields(
    data: RequestData,
    requests: Mapping[str, Shaped[Array, "R ..."]],
    places: Places,
    factors: Float[Array, "R labelled"],
    slots: Slots,
) -> Fields:
    """The fields of `CandidateBatch` that are of the chosen candidates.

    Args:
      data: the dataset.
      requests: what `data.requests` says of the chosen requests.
      places: which candidates of each, in the order of the batch; -1 for none.
      factors: on the label weights of the first, `slots.labelled` of them.
      slots: of the batch.
    """
    xp = _namespace(places)

    def of_slots(
        packed: Packed, part: str, number: str | None, width: int
    ) -> dict[str, Shaped[Array, "R slots ..."]]:
        """What `packed` holds of the first slots."""
        place = places[:, :width]
        is_there = place >= 0
        if number is not None:
            is_there = is_there & (place < requests[number][:, None])
        start = requests[f"{part}_start"][:, None]
        return packing.take(packed, xp.where(is_there, start + place, packed.nothing))

    labels = of_slots(data.labels, "shown", "num_shown", slots.labelled)
    teacher = of_slots(data.teacher, "scored", "num_scored", slots.judged)
    # What stands for nothing is NaN, as is what was not logged properly.
    probability = teacher["teacher_probability"]
    proper = ~xp.isnan(probability)
    stage = xp.int8(Stage.RETRIEVED)
    for name, reached in (("num_passed", Stage.PASSED), ("num_shown", Stage.SHOWN)):
        stage = xp.where(places < requests[name][:, None], xp.int8(reached), stage)
    stage = xp.where(places >= 0, stage, xp.int8(Stage.PADDING))
    return {
        **of_slots(data.candidates, "candidate", None, slots.candidates),
        "stage": stage,
        "user_label": labels["user_label"].astype(xp.float32),
        "label_weight": factors * labels["label_weight"],
        "teacher_probability": xp.where(proper, probability, xp.float32(0)),
        "teacher_weight": proper.astype(xp.float32),
    }


def all_fields(columns: Columns, places: Int[np.ndarray, "R N"]) -> Fields:
    """The fields of `CandidateBatch` of all requests, on the host, with all that is known of them.

    Args:
      columns: the requests.
      places: which candidates of each, in the order of the batch; -1 for none.
    """
    data = request_data(columns)
    requests = packing.take(data.requests, np.arange(len(columns)))  # type: ignore[arg-type]
    slots = Slots(*(places.shape[1],) * 3)
    factors = (places >= 0).astype(np.float32)
    of_candidates = candidate_fields(data, requests, places, factors, slots)  # type: ignore[arg-type]
    return request_fields(requests) | of_candidates


def full_fields(columns: Columns, candidates: int) -> Fields:
    """All candidates of all requests in their stored order, filled up to `candidates`."""
    index = np.arange(candidates)
    number = lengths(columns.candidate_start)
    return all_fields(columns, np.where(index < number[:, None], index, -1))


def _namespace(array: Any) -> Any:
    """The module that an array's functions live in: `numpy` or `jax.numpy`."""
    return array.__array_namespace__()
