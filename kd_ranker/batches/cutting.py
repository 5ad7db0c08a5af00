"""From a draw to the batches of some steps in one array, and from that array to each batch.

    Draw ─row_numbers, gather→ Draw ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

The first two make the batches of many train steps at once. The last runs before each train step,
in the same program. All run on NumPy arrays on the host and, compiled, on a device that holds the
data. `read` does the work of the first for data in files.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Int

from kd_ranker.batch import IN_BATCH, CandidateBatch, Stage
from kd_ranker.batches import sampling
from kd_ranker.batches.sampling import Draw, Slots
from kd_ranker.requests.columns import Columns, Parts, Spans, as_bits, as_floats, unpack_rows


class Layout(NamedTuple):
    """The places of the fields in a packed batch; all of it is static under tracing.

    Attributes:
      spans: of a row of each part.
      slots: of a request.
      logged: teacher probabilities count for candidates that reached this stage of the funnel.
    """

    spans: Parts[Spans]
    slots: Slots
    logged: Stage = Stage.RETRIEVED

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths per request: its row, candidates, labels, stages and factors."""
        of_request, of_candidate, of_label = (spans[-1].columns.stop for spans in self.spans)
        candidates, labelled = self.slots.candidates, self.slots.labelled
        return (of_request, candidates * of_candidate, labelled * of_label, candidates, labelled)


class Span(NamedTuple):
    """Consecutive steps among those that were made together; `stop` is exclusive."""

    start: int
    stop: int


@flax.struct.dataclass
class PackedBatches:
    """The training batches of consecutive steps, in one array, 32 bits per number.

    A program that takes one array starts sooner than one that takes one per field or per step.
    """

    rows: Int[Array, "R steps W"]
    layout: Layout = flax.struct.field(pytree_node=False)


def row_numbers(first: tuple[Any, Any], draw: Draw) -> Draw:
    """Replace the places of a draw by numbers of rows in memory, 0 for padding.

    Args:
      first: the rows of the first candidate and of the first labels of each request; the row of the
        request itself has its number.
      draw: as `sampling` returns it.
    """
    requests, candidates, labels = draw.rows
    xp = requests.__array_namespace__()

    def numbers(first: Int[Array, "n"], place: Int[Array, "*R N"]) -> Int[Array, "*R N"]:
        return xp.where(place >= 0, _at(first, requests)[..., None] + place, 0)

    rows = Parts(requests, numbers(first[0], candidates), numbers(first[1], labels))
    return draw._replace(rows=rows)


def gather(data: Parts, draw: Draw) -> Draw:
    """Read the rows of `row_numbers`.

    In a separate program each of the three is one gather. In one program with the computation of
    the row numbers, XLA on a CPU would repeat that computation for each number that it reads.

    Args:
      data: `Columns.values`, on the host or on a device.
      draw: as `row_numbers` returns it.

    Returns:
      The draw, with the rows as int32 [*R, Q], [*R, N, C] and [*R, labelled, L].
    """
    return draw._replace(rows=Parts(*map(_at, data, draw.rows)))


def _at(rows: Int[Array, "n ..."], which: Int[Array, "*shape"]) -> Int[Array, "..."]:
    if isinstance(rows, jax.Array):
        return rows.at[which].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows[which]


def read(columns: Columns, draw: Draw) -> Draw:
    """Read the rows of a draw of `sampling` on the host, from memory or from a file.

    The result is that of `gather`.
    """
    requests, candidates, labels = map(np.asarray, draw.rows)
    own = columns.requests
    rows: Any = Parts(
        own.values[own.first[requests]],
        columns.candidates.at(requests, candidates),
        columns.labels.at(requests, labels),
    )
    return draw._replace(rows=rows)


def pack_batches(draw: Draw, layout: Layout) -> PackedBatches:
    """Pack the batches of all steps of a draw, as `gather` returns it, [R, steps, ...]."""
    xp = draw.stage.__array_namespace__()  # type: ignore[attr-defined]
    parts: Any = (*draw.rows, draw.stage.astype(np.int32), as_bits(draw.factor))
    flat = [part.reshape(*part.shape[:2], -1) for part in parts]
    return PackedBatches(xp.concatenate(flat, axis=2), layout)


def unpack(batches: PackedBatches, step: int | Int[Array, ""]) -> CandidateBatch:
    """The batch of a step, counted from 0, in the form that models take."""
    of_step = batches.rows[:, step]
    ends = np.cumsum([0, *batches.layout.widths])
    requests, candidates, labels, stage, factor = (
        of_step[:, start:end] for start, end in pairwise(ends)
    )
    slots = batches.layout.slots
    rows = Parts(
        requests=requests,
        candidates=candidates.reshape(len(candidates), slots.candidates, -1),
        labels=labels.reshape(len(labels), slots.labelled, -1),
    )
    draw = Draw(rows, stage.astype(np.int8), as_floats(factor))
    return CandidateBatch(**fields_of(draw, batches.layout))


def fields_of(draw: Draw, layout: Layout) -> dict[str, Any]:
    """The fields of `CandidateBatch`, of a draw as `gather` returns it."""
    xp = draw.stage.__array_namespace__()  # type: ignore[attr-defined]
    requests, candidates, labels = map(unpack_rows, draw.rows, layout.spans)
    fields: dict[str, Any] = requests | candidates | labels
    if "teacher_probability" in fields:
        probability = fields["teacher_probability"][:, : layout.slots.judged]
    else:
        label = fields["user_label"]
        shape = (len(label), layout.slots.judged, label.shape[-1])
        probability = xp.full(shape, xp.nan, np.float32)
    # NaN marks missing values and values that were not logged properly.
    proper = ~xp.isnan(probability)
    if layout.logged > Stage.RETRIEVED:
        proper &= (draw.stage >= layout.logged)[:, : layout.slots.judged, None]
    fields |= {
        "stage": draw.stage,
        "label_weight": draw.factor * fields["label_weight"],
        "teacher_probability": xp.where(proper, probability, np.float32(0)),
        "teacher_weight": proper,
    }
    return {field.name: xp.asarray(fields[field.name], field.dtype) for field in IN_BATCH}


def all_fields(
    columns: Columns, requests: Int[np.ndarray, "R"], places: Int[np.ndarray, "R N"]
) -> dict[str, Any]:
    """All fields of `CandidateBatch` for some requests, on the host.

    Args:
      columns: all requests.
      requests: the numbers of the requests to read.
      places: the candidates of each, in the order of the batch; -1 for none.
    """
    factors: Any = (places >= 0).astype(np.float32)
    counts = columns.counts.of(requests)
    draw = sampling.draw_of(requests, places, factors, counts.passed, counts.shown)  # type: ignore[arg-type]
    layout = Layout(columns.spans, Slots(*(places.shape[1],) * 3))
    return fields_of(read(columns, draw), layout)
