"""From a draw to the batches of some steps in one array, and from that array to each batch.

    Draw ─read→ Draw ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

The first two make the batches of many train steps at once. The last runs before each train step,
in the same program. `pack_batches` and `unpack` take arrays of NumPy or of JAX. `training` reads
the rows of data that devices hold. Evaluation batches are cut on the host, and never packed.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kd_ranker.batch import IN_BATCH, CandidateBatch, EvaluationBatch, Stage
from kd_ranker.batches import sampling
from kd_ranker.batches.sampling import Draw, Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Parts, unpack_rows
from kd_ranker.requests.records import Dataset


class Layout(NamedTuple):
    """The places of the fields in a packed batch; all of it is static under tracing."""

    spans: Parts  # `Columns.spans`
    slots: Slots  # of a request
    logged: Stage = Stage.RETRIEVED  # at which a candidate's teacher probabilities count

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


def read(columns: Columns, draw: Draw) -> Draw:
    """Replace the places of a draw by their rows, on the host, from memory or from a file."""
    requests, candidates, labels = map(np.asarray, draw.rows)
    own = columns.requests
    rows = Parts(
        own.values[own.first[requests]],
        columns.candidates.at(requests, candidates),
        columns.labels.at(requests, labels),
    )
    return draw._replace(rows=rows)


def pack_batches(draw: Draw, layout: Layout) -> PackedBatches:
    """Pack the batches of all steps of a draw with its rows, [R, steps, ...]."""
    xp = draw.stage.__array_namespace__()  # type: ignore[attr-defined]
    parts = (*draw.rows, draw.stage.astype(np.int32), draw.factor.view(np.int32))
    flat = [part.reshape(*part.shape[:2], -1) for part in parts]
    return PackedBatches(xp.concatenate(flat, axis=2), layout)


def unpack(batches: PackedBatches, step: int | Int[Array, ""]) -> CandidateBatch:
    """Return the batch of a step, counted from 0, in the form that models take."""
    of_step, slots = batches.rows[:, step], batches.layout.slots
    ends = np.cumsum([0, *batches.layout.widths])
    requests, candidates, labels, stage, factor = (
        of_step[:, start:end] for start, end in pairwise(ends)
    )
    rows = Parts(
        requests=requests,
        candidates=candidates.reshape(len(candidates), slots.candidates, -1),
        labels=labels.reshape(len(labels), slots.labelled, -1),
    )
    return _batch_of(Draw(rows, stage.astype(np.int8), factor.view(np.float32)), batches.layout)


def _batch_of(draw: Draw, layout: Layout) -> CandidateBatch:
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
    arrays = {field.name: xp.asarray(fields[field.name], field.dtype) for field in IN_BATCH}
    return CandidateBatch(**arrays)


def whole_batch(
    columns: Columns, requests: Int[np.ndarray, "R"], places: Int[np.ndarray, "R N"]
) -> CandidateBatch:
    """Return a batch of all fields of some requests, on the host, in the order of `places`.

    These are the numbers of the candidates of each request, -1 for none.
    """
    counts, factors = columns.counts.of(requests), (places >= 0).astype(np.float32)
    draw = sampling.draw_of(requests, places, factors, counts.passed, counts.shown)
    layout = Layout(columns.spans, Slots(*(places.shape[1],) * 3))
    return _batch_of(read(columns, draw), layout)


def evaluation_batches(
    dataset: Dataset, split: str, *, requests: int, candidates: int, limit: int = 0
) -> Iterator[EvaluationBatch]:
    """Yield the batches of one pass over a split, with every candidate of each request.

    A batch has `requests` requests; the last one is padded with repeated ones, masked out. Their
    candidates are padded to `candidates`, `config.funnel.retrieved`. With a `limit`, only that
    number of requests is read, from the start.

    Raises:
      UserError: a request has more candidates than `candidates`.
    """
    columns = dataset.columns[split]
    total = min(limit or len(columns), len(columns))
    for start in range(0, total, requests):
        present = min(requests, total - start)
        numbers = start + np.arange(requests) % present
        ahead = np.arange(start + present, min(start + present + requests, total))
        columns.expect(ahead, columns.counts.retrieved[ahead])
        places = np.full((requests, candidates), -1)
        counts = columns.counts.of(numbers)
        for row, (request_id, number) in enumerate(zip(*counts[:2], strict=True)):
            if number > candidates:
                raise UserError(
                    f"funnel.retrieved={candidates} is less than the {number} candidates of "
                    f"request {request_id}"
                )
            # Stored in funnel order: in a tie, a ranker must not get the candidate that the logged
            # policy preferred for free. Item ids reveal popularity in some datasets, so a fixed
            # permutation breaks ties.
            places[row, :number] = np.random.default_rng(request_id).permutation(number)
        known = np.where(counts.known[:, None] > 0, places, -1)
        rows: Any = columns.known.at(numbers, known)
        facts = unpack_rows(rows, columns.known.spans)
        yield EvaluationBatch(
            batch=whole_batch(columns, numbers, places),
            **{name: jnp.asarray(fact) for name, fact in facts.items()},
            request_mask=jnp.arange(requests) < present,
        )


def num_evaluation_batches(dataset: Dataset, split: str, *, requests: int, limit: int = 0) -> int:
    """Return the number of batches that `evaluation_batches` yields."""
    stored = len(dataset.columns[split])
    return math.ceil(min(limit or stored, stored) / requests)
