"""From the rows that a draw means to a batch in one array, and from that to the batch.

    Draw ─gather→ Parts ─join→ PackedBatch ─unpack→ CandidateBatch

The first two steps make the batches of many train steps at once, the last stands in the train step.
All run on NumPy arrays on the host and, compiled, on a device that holds the data.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from kd_ranker.batch import CandidateBatch
from kd_ranker.batches import packing, sampling
from kd_ranker.batches.columns import Columns, lengths
from kd_ranker.batches.packing import Packed, as_bits, as_floats
from kd_ranker.batches.sampling import Draw, Slots

# What a batch holds of a request itself, and of a candidate, as it stands in `Columns`.
_OF_REQUESTS = (
    *("user_id", "user_features", "context", "request_category"),
    *("history_id", "history_features", "history_mask"),
)
_OF_CANDIDATES = ("item_id", "candidate_features", "candidate_category")


@flax.struct.dataclass
class RequestData:
    """Requests as batches are cut from them: each part is one array, of which a row is one read.

    Attributes:
      requests: what is known of each request.
      candidates: of each candidate of each; row 0 stands for none.
      labels: the user labels of those that were shown; row 0 stands for none.
    """

    requests: Packed
    candidates: Packed
    labels: Packed


class Layout(NamedTuple):
    """What stands where in a packed batch; nothing that is traced."""

    requests: packing.Fields
    candidates: packing.Fields
    labels: packing.Fields
    slots: Slots

    @property
    def widths(self) -> tuple[int, ...]:
        """How many numbers a request takes, by the fields of `Parts`."""
        of_request, of_candidate, of_label = (fields[-1].columns.stop for fields in self[:3])
        candidates, labelled = self.slots.candidates, self.slots.labelled
        return (of_request, candidates * of_candidate, labelled * of_label, candidates, labelled)


class Parts(NamedTuple):
    """Some rows of `RequestData`, and what a draw adds to them."""

    requests: Int[Array, "*R Q"]
    candidates: Int[Array, "*R N C"]
    labels: Int[Array, "*R labelled L"]
    stage: Int8[Array, "*R N"]
    factor: Float[Array, "*R labelled"]


@flax.struct.dataclass
class PackedBatch:
    """A training batch as it reaches the train step: one array, 32 bits a number.

    A step that is handed one array starts sooner than one with an array a field.
    """

    rows: Int[Array, "R W"]
    layout: Layout = flax.struct.field(pytree_node=False)


def request_data(columns: Columns, logged: bool) -> RequestData:
    """The requests of `columns`, on the host, with the teacher's probabilities if `logged`."""
    of_candidates = {name: getattr(columns, name) for name in _OF_CANDIDATES}
    if logged:
        of_candidates["teacher_probability"] = _probability_of_all(columns)
    of_labels = {"user_label": columns.user_label, "label_weight": columns.label_weight}
    return RequestData(
        requests=packing.pack({name: getattr(columns, name) for name in _OF_REQUESTS}),
        candidates=packing.pack(
            of_candidates, nothing={"candidate_category": -1, "teacher_probability": np.nan}
        ),
        labels=packing.pack(of_labels, nothing={}),
    )


def _probability_of_all(columns: Columns) -> Float[np.ndarray, "candidates T"]:
    """The teacher's probabilities of all candidates, NaN for those that it has not scored."""
    probability = columns.teacher_probability
    of_all = np.full((len(columns.item_id), probability.shape[1]), np.nan, np.float32)
    before = columns.candidate_start[:-1] - columns.scored_start[:-1]
    of_all[np.arange(len(probability)) + np.repeat(before, columns.num_scored)] = probability
    return of_all


def layout_of(data: RequestData, slots: Slots) -> Layout:
    """How batches of these requests are packed."""
    return Layout(data.requests.fields, data.candidates.fields, data.labels.fields, slots)


def gather(data: RequestData, draw: Draw) -> Parts:
    """Reads what a draw means.

    In a program of its own each of the three is one gather. Together with what works out the row
    numbers, XLA on a CPU would do that anew for each number that it reads.
    """

    def read(packed: Packed, rows: Int[Array, "*shape"]) -> Int[Array, "*shape W"]:
        if isinstance(packed.rows, jax.Array):
            return packed.rows.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return packed.rows[rows]

    return Parts(
        read(data.requests, draw.request),
        read(data.candidates, draw.candidate),
        read(data.labels, draw.label),
        draw.stage,
        draw.factor,
    )


def join(parts: Parts, layout: Layout) -> list[PackedBatch]:
    """The batch of each step, where the axis of the steps follows that of the requests."""
    xp = parts.stage.__array_namespace__()  # type: ignore[attr-defined]
    numbers: Any = parts._replace(stage=parts.stage.astype(np.int32), factor=as_bits(parts.factor))
    flat = [part.reshape(*part.shape[:2], -1) for part in numbers]
    rows = xp.concatenate(flat, axis=2)
    return [PackedBatch(rows[:, step], layout) for step in range(rows.shape[1])]


def unpack(batch: PackedBatch) -> CandidateBatch:
    """The batch as the models know it."""
    ends = np.cumsum([0, *batch.layout.widths])
    flat = [batch.rows[:, start:end] for start, end in pairwise(ends)]
    slots = batch.layout.slots
    parts = Parts(
        requests=flat[0],
        candidates=flat[1].reshape(len(flat[1]), slots.candidates, -1),
        labels=flat[2].reshape(len(flat[2]), slots.labelled, -1),
        stage=flat[3].astype(np.int8),
        factor=as_floats(flat[4]),
    )
    return CandidateBatch(**fields_of(parts, batch.layout))


def fields_of(parts: Parts, layout: Layout) -> dict[str, Any]:
    """The fields of `CandidateBatch`."""
    xp = parts.stage.__array_namespace__()  # type: ignore[attr-defined]
    candidates: Mapping[str, Any] = packing.unpack(parts.candidates, layout.candidates)
    labels: Mapping[str, Any] = packing.unpack(parts.labels, layout.labels)
    label = labels["user_label"].astype(np.float32)
    if "teacher_probability" in candidates:
        probability = candidates["teacher_probability"][:, : layout.slots.judged]
    else:
        shape = (len(label), layout.slots.judged, label.shape[-1])
        probability = xp.full(shape, xp.nan, np.float32)
    # What stands for nothing is NaN, as is what was not logged properly.
    proper = ~xp.isnan(probability)
    return {
        **packing.unpack(parts.requests, layout.requests),
        **{name: candidates[name] for name in _OF_CANDIDATES},
        "stage": parts.stage,
        "user_label": label,
        "label_weight": parts.factor * labels["label_weight"],
        "teacher_probability": xp.where(proper, probability, np.float32(0)),
        "teacher_weight": proper.astype(np.float32),
    }


def all_fields(columns: Columns, places: Int[np.ndarray, "R N"]) -> dict[str, Any]:
    """The fields of `CandidateBatch` of all requests, on the host, with all that is known of them.

    Args:
      columns: the requests.
      places: which candidates of each, in the order of the batch; -1 for none.
    """
    data = request_data(columns, logged=True)
    requests: Any = np.arange(len(columns))
    factors: Any = (places >= 0).astype(np.float32)
    draw = sampling.rows_of(requests, places, factors, sampling.bounds_of(columns))  # type: ignore[arg-type]
    return fields_of(gather(data, draw), layout_of(data, Slots(*(places.shape[1],) * 3)))


def full_fields(columns: Columns, candidates: int) -> dict[str, Any]:
    """All candidates of all requests in their stored order, filled up to `candidates`."""
    index = np.arange(candidates)
    number = lengths(columns.candidate_start)
    return all_fields(columns, np.where(index < number[:, None], index, -1))
