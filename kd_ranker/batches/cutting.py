"""From a draw to the batches of some steps in one array, and from that array to each batch.

    Draw ─read→ Gathered ─pack_batches→ PackedBatches ─unpack→ CandidateBatch

The first two make the batches of many train steps at once. The last runs before each train step,
in the same program. `pack_batches` and `unpack` take arrays of NumPy or of JAX. `.training` reads
the rows of data that devices hold. Evaluation batches are cut on the host, and never packed.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kd_ranker.batch import IN_BATCH, CandidateBatch, EvaluationBatch, Stage
from kd_ranker.batches import sampling
from kd_ranker.batches.sampling import Draw, Gathered, Slots
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Parts, unpack_rows
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.request import starts_of


class Layout(NamedTuple):
    """The places of the fields in a packed batch; all of it is static under tracing."""

    row: np.dtype  # of a request: the arguments of `_batch_of`
    num_scored: int  # see `Slots`
    logged: Stage = Stage.RETRIEVED  # at which a candidate's teacher probabilities count


def layout_of(types: Parts, slots: Slots, logged: Stage = Stage.RETRIEVED) -> Layout:
    """Return the layout of batches of requests with these types of rows and slots."""
    fields: list[Any] = [
        ("requests", types.requests),
        ("candidates", types.candidates, (slots.candidates,)),
        ("labels", types.labels, (slots.num_labeled,)),
        ("stage", np.int32, (slots.candidates,)),
        ("factor", np.float32, (slots.num_labeled,)),
    ]
    return Layout(np.dtype(fields), slots.num_scored, logged)


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


def read(columns: Columns, draw: Draw) -> Gathered:
    """Read the rows of a draw, on the host, from memory or from a file."""
    requests, candidates, labels = map(np.asarray, draw.indices)
    rows = Parts(
        requests=columns.requests.windows[columns.requests.first[requests]],
        candidates=columns.candidates.at(requests, candidates),
        labels=columns.labels.at(requests, labels),
    )
    return Gathered(rows, draw.stage, draw.factor)


def pack_batches(gathered: Gathered, layout: Layout) -> PackedBatches:
    """Pack the batches of all steps of a draw, [R, steps, ...]."""
    xp = gathered.stage.__array_namespace__()  # type: ignore[attr-defined]
    parts = (*gathered.rows, gathered.stage.astype(np.int32), gathered.factor.view(np.int32))
    flat = [part.reshape(*part.shape[:2], -1) for part in parts]
    return PackedBatches(xp.concatenate(flat, axis=2), layout)


def unpack(batches: PackedBatches, step: int | Int[Array, ""]) -> CandidateBatch:
    """Return the batch of a step, counted from 0, in the form that models take."""
    layout = batches.layout
    return _batch_of(
        **unpack_rows(batches.rows[:, step], layout.row),
        num_scored=layout.num_scored,
        logged=layout.logged,
    )


def _batch_of(
    requests: dict[str, Any],
    candidates: dict[str, Any],
    labels: dict[str, Any],
    stage: Int[Array, "R N"],
    factor: Float[Array, "R labeled"],
    num_scored: int,
    logged: Stage,
) -> CandidateBatch:
    xp = stage.__array_namespace__()  # type: ignore[attr-defined]
    fields = requests | candidates | labels
    if "teacher_probability" in fields:
        probability = fields["teacher_probability"][:, :num_scored]
    else:
        label = fields["user_label"]
        probability = xp.full((len(label), num_scored, label.shape[-1]), xp.nan, np.float32)
    # NaN marks missing values and values that were not logged properly.
    is_proper = ~xp.isnan(probability)
    if logged > Stage.RETRIEVED:
        is_proper &= (stage >= logged)[:, :num_scored, None]
    fields |= {
        "stage": stage,
        "label_weight": factor * fields["label_weight"],
        "teacher_probability": xp.where(is_proper, probability, np.float32(0)),
        "teacher_weight": is_proper,
    }
    arrays = {field.name: xp.asarray(fields[field.name], field.dtype) for field in IN_BATCH}
    return CandidateBatch(**arrays)


def whole_batch(
    columns: Columns, requests: Int[np.ndarray, "R"], places: Int[np.ndarray, "R N"]
) -> CandidateBatch:
    """Return a batch of all fields of some requests, on the host, in the order of `places`.

    These are the numbers of the candidates of each request, -1 for none.
    """
    counts = columns.counts.of(requests)
    factors = (places >= 0).astype(np.float32)
    draw = sampling.draw_of(requests, places, factors, counts.passed, counts.shown)
    rows = read(columns, draw).rows
    return _batch_of(
        requests=unpack_rows(rows.requests, columns.requests.type),
        candidates=unpack_rows(rows.candidates, columns.candidates.type),
        labels=unpack_rows(rows.labels, columns.labels.type),
        stage=draw.stage,
        factor=draw.factor,
        num_scored=places.shape[1],
        logged=Stage.RETRIEVED,
    )


def batch_size(requests: int, available: int) -> int:
    """Return the requests of a batch: at most the available ones, rounded up to 1,024s.

    The others would only be padding, which takes memory and time.
    """
    return min(requests, 1024 * math.ceil(max(available, 1) / 1024))


def evaluation_batches(
    dataset: Dataset,
    split: str,
    *,
    requests: int,
    candidates: int,
    limit: int = 0,
    measured: Bool[np.ndarray, "n"] | None = None,
    rivals: Float[np.ndarray, "sum S"] | None = None,
) -> Iterator[EvaluationBatch]:
    """Yield the batches of one pass over a split, with every candidate of each request.

    A batch has `requests` requests; the last one is padded with repeated ones, masked out. Their
    candidates are padded to `candidates`, `config.funnel.retrieved`. With a `limit`, only that
    number of requests is read, from the start. The funnel is measured on the requests `measured`;
    None takes all. `rivals` has the numbers of the rivals for all candidates of the split, in
    stored order.

    Raises:
      UserError: a request has more candidates than `candidates`.
    """
    columns = dataset.columns[split]
    total = min(limit or len(columns), len(columns))
    first = starts_of(columns.counts.retrieved)[:-1]
    for start in range(0, total, requests):
        num_present = min(requests, total - start)
        numbers = start + np.arange(requests) % num_present
        stop = start + num_present
        next_requests = np.arange(stop, min(stop + requests, total))
        columns.expect(next_requests, columns.counts.retrieved[next_requests])
        places = np.full((requests, candidates), -1)
        counts = columns.counts.of(numbers)
        for row in range(requests):
            request_id = counts.request_id[row]
            number = counts.retrieved[row]
            if number > candidates:
                raise UserError(
                    f"funnel.retrieved={candidates} is less than the {number} candidates of "
                    f"request {request_id}; raise it to the most of any request"
                )
            # Stored in funnel order: in a tie, a ranker must not get the candidate that the logged
            # policy preferred for free. Item ids reveal popularity in some datasets, so a fixed
            # permutation breaks ties.
            places[row, :number] = np.random.default_rng(request_id).permutation(number)
        known = np.where(counts.known[:, None] > 0, places, -1)
        rows: Any = columns.known.at(numbers, known)
        facts = unpack_rows(rows, columns.known.type)
        # Only rivals read them, and these have their own numbers.
        del facts["early_scores"]
        batch = EvaluationBatch(
            batch=whole_batch(columns, numbers, places),
            **{name: jnp.asarray(fact) for name, fact in facts.items()},
            request_mask=jnp.arange(requests) < num_present,
        )
        if measured is not None:
            batch = dataclasses.replace(batch, whole=jnp.asarray(measured[numbers]))
        if rivals is not None:
            rows_of_places = np.where(places < 0, 0, first[numbers][:, None] + places)
            batch = dataclasses.replace(batch, rivals=jnp.asarray(rivals[rows_of_places]))
        yield batch
