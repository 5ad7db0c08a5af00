"""From records on disk to batches: Grain pipelines for training and for one pass over a split."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, Int

from kd_ranker.batch import CandidateBatch, EvaluationBatch, FeatureSpec
from kd_ranker.data import sampling
from kd_ranker.data.builder import Dataset, from_record, record_features
from kd_ranker.data.columns import Columns, columns_of, joined
from kd_ranker.data.request import Request
from kd_ranker.data.sampling import Kinds, Starts, TrainingData
from kd_ranker.errors import UserError

# How an epoch reads the requests: each in an order of its own, or as they are stored, by time.
ORDERS = ("shuffled", "time")

# What training must not see; it is not even read from disk.
_EVALUATION_ONLY = ("true_probability",)


def read_split(
    dataset: Dataset, split: str, with_true_probability: bool
) -> tuple[Sequence[bytes], Callable[[bytes], Request]]:
    """A random-access source of the stored bytes of a split, and what decodes them to requests."""
    features = record_features(dataset.spec)
    if not with_true_probability:
        features = tfds.features.FeaturesDict(
            {name: feature for name, feature in features.items() if name not in _EVALUATION_ONLY}
        )
    records = dataset.builder.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )

    def decode(record: bytes) -> Request:
        return from_record(features.deserialize_example_np(record), dataset.spec.tasks)

    return records, decode


# Steps whose randomness is drawn at a time: a call a step would hold up the dispatch of steps.
BLOCK = 64
_READ_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

# How much of the memory that is free the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
_CHUNK = 512


class TrainingBatches(NamedTuple):
    """What a run trains on.

    Attributes:
      batches: an endless dataset: of whole batches, or of draws from `data`. Its position
        (`get_state`, `set_state`) stands at the one last handed out, however many were prefetched.
      data: what the draws are of, on the host; None where the batches come whole.
    """

    batches: grain.IterDataset
    data: TrainingData | None


def _read(dataset: Dataset) -> Callable[[Sequence[int]], Columns]:
    """What reads and decodes some requests of the split `train`, by their numbers."""
    records, decode = read_split(dataset, "train", with_true_probability=False)

    def read(numbers: Sequence[int]) -> Columns:
        # All at once, which the record files answer in parallel.
        found = records.__getitems__(list(numbers))  # type: ignore[attr-defined]
        return columns_of([decode(record) for record in found], dataset.spec)

    return read


def _fits(dataset: Dataset, copies: int) -> bool:
    """Whether the requests of the split `train` may stay in memory, so many times over."""
    records, _ = read_split(dataset, "train", with_true_probability=False)
    # Decoded requests are about as large as their records.
    sizes = [len(records[index]) for index in range(0, len(records), len(records) // 16 + 1)]
    free = psutil.virtual_memory().available
    return copies * float(np.mean(sizes)) * len(records) <= _SHARE_OF_MEMORY * free


def _order(requests: int, seed: int, order: str) -> Callable[[int], Int[np.ndarray, "requests"]]:
    """The order of the requests in each epoch; see `ORDERS`."""

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Int[np.ndarray, "requests"]:
        if order == "time":
            return np.arange(requests)
        return np.random.default_rng((seed, epoch)).permutation(requests)

    return of_epoch


class _Start(NamedTuple):
    """What is random about the batches of some steps in a row."""

    request: Int[np.ndarray, "R steps"]
    start: Float[np.ndarray, "R steps kinds"]


@dataclasses.dataclass(frozen=True)
class _DrawStarts(grain.transforms.RandomMap):
    """Number of a block of steps -> what is random about its batches."""

    order: Callable[[int], Int[np.ndarray, "requests"]]
    requests_of_epoch: int
    process_index: int
    process_count: int
    requests: int

    def random_map(self, block: int, generator: np.random.Generator) -> _Start:
        # This process's places in the endless sequence of epochs, whose remainders are left out.
        of_process, of_block = self.requests_of_epoch // self.process_count, self.requests * BLOCK
        epochs, places = np.divmod(np.arange(block * of_block, (block + 1) * of_block), of_process)
        places = places * self.process_count + self.process_index
        numbers = np.concatenate(
            [self.order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return _Start(
            numbers.reshape(BLOCK, self.requests).T,
            generator.random((self.requests, BLOCK, sampling.KINDS)),
        )


@dataclasses.dataclass(frozen=True)
class _ForEachStep(grain.experimental.FlatMapTransform):
    """A block of steps -> one element a step."""

    split: Callable[[Any], Sequence[Any]]
    max_fan_out: int = BLOCK

    def flat_map(self, element: Any) -> Sequence[Any]:
        return self.split(element)


def training_batches(
    dataset: Dataset,
    *,
    requests: int,
    candidates: int,
    passed_share: float,
    negative_rate: float,
    seed: int,
    order: str = "shuffled",
    process_index: int = 0,
    process_count: int = 1,
    to_device: Callable[[Any], Any] = lambda batch: batch,
    copies: int = 1,
    resident: bool | None = None,
) -> TrainingBatches:
    """An endless dataset of training batches.

    Each epoch has its own draw of candidates. The requests are read and decoded once, before the
    first batch, where memory can hold them: then what is handed out is draws, and the batches are
    cut from the data where that lies, on the devices. Else each batch is read and cut on the host.
    The batches are the same.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      requests: requests a batch over all processes.
      candidates: candidates a request.
      passed_share: see `sampling.training_data`.
      negative_rate: see `sampling.training_data`.
      seed: of the order and of the draws.
      order: one of `ORDERS`.
      process_index: this process among those that share the work.
      process_count: their number.
      to_device: puts a batch or a draw on the devices; runs ahead in a thread of its own.
      copies: how many times the memory of this machine will hold the data.
      resident: whether the data stays in memory; None decides by its size.

    Raises:
      UserError: the split has fewer requests than processes.
    """
    number = dataset.builder.info.splits["train"].num_examples
    if number < process_count:
        raise UserError(
            f"{dataset.directory} has {number} training requests for {process_count} processes"
        )
    read = _read(dataset)

    def data_of(columns: Columns) -> tuple[TrainingData, Kinds]:
        return sampling.training_data(columns, candidates, passed_share, negative_rate)

    starts = grain.MapDataset.range(2**31).seed(seed)  # endless to anyone who counts steps
    starts = starts.random_map(
        _DrawStarts(
            order=_order(number, seed, order),
            requests_of_epoch=number,
            process_index=process_index,
            process_count=process_count,
            requests=requests // process_count,
        )
    )
    if resident or (resident is None and _fits(dataset, copies)):
        chunks = (range(at, min(at + _CHUNK, number)) for at in range(0, number, _CHUNK))
        data, kinds = data_of(joined([read(chunk) for chunk in chunks]))

        # Neither of these two holds the data, which need not stay on the host.
        def draw(start: _Start) -> Starts:
            return sampling.draw(*start, kinds.of(start.request))

        chosen = jax.jit(functools.partial(sampling.chosen, slots=data.slots))

        # The same draw serves all steps of a block, each of which knows its own number.
        draws = starts.map(draw).to_iter_dataset(_READ_AHEAD).map(to_device).map(chosen)
        repeat = _ForEachStep(lambda draw: [draw] * BLOCK)
        return TrainingBatches(grain.experimental.FlatMapIterDataset(draws, repeat), data)

    def batch(start: _Start) -> CandidateBatch:
        data, kinds = data_of(read(start.request[:, 0].tolist()))
        # What the requests of one batch need differs from batch to batch, as shapes must not.
        slots = sampling.Slots(*(candidates,) * 3)
        request = np.arange(len(start.request))[:, None]
        starts = sampling.draw(request, start.start, kinds.of(request))
        return sampling.cut_batch(
            dataclasses.replace(data, slots=slots), sampling.chosen(starts, slots)
        )

    def steps(block: _Start) -> list[_Start]:
        at = [slice(step, step + 1) for step in range(BLOCK)]
        return [_Start(block.request[:, one], block.start[:, one]) for one in at]

    each = grain.experimental.FlatMapIterDataset(
        starts.to_iter_dataset(_READ_AHEAD), _ForEachStep(steps)
    )
    batches = each.map(batch).map(to_device)
    return TrainingBatches(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4), None
    )


def read_requests(dataset: Dataset, split: str) -> Iterator[Request]:
    """The requests of a split in stored order, with all that is stored."""
    records, decode = read_split(dataset, split, with_true_probability=True)
    for index in range(len(records)):
        yield decode(records[index])


def evaluation_batches(
    dataset: Dataset, *, requests: int, candidates: int, limit: int = 0
) -> Iterator[EvaluationBatch]:
    """One pass over the split `test`, with every candidate of each request.

    Args:
      dataset: the dataset.
      requests: requests a batch; the last one is filled up by repeating, masked out.
      candidates: N to fill up to, `config.funnel.retrieved`.
      limit: how many requests to read from the start; 0 reads all.

    Raises:
      UserError: a request has more candidates than `candidates`.
    """
    records, decode = read_split(dataset, "test", with_true_probability=True)
    total = _num_evaluation_requests(records, limit)
    for start in range(0, total, requests):
        present = min(requests, total - start)
        rows = [decode(records[start + offset % present]) for offset in range(requests)]
        fields, true_probability = _evaluation_fields(rows, dataset.spec, candidates)
        yield EvaluationBatch(
            batch=CandidateBatch(**fields),
            true_probability=jnp.asarray(true_probability),
            request_mask=jnp.arange(requests) < present,
        )


def num_evaluation_batches(dataset: Dataset, *, requests: int, limit: int = 0) -> int:
    """How many batches `evaluation_batches` yields."""
    records, _ = read_split(dataset, "test", with_true_probability=True)
    return math.ceil(_num_evaluation_requests(records, limit) / requests)


def _num_evaluation_requests(records: Sequence[bytes], limit: int) -> int:
    return min(limit, len(records)) if limit else len(records)


def _evaluation_fields(
    requests: Sequence[Request], spec: FeatureSpec, candidates: int
) -> tuple[sampling.Fields, Float32[np.ndarray, "R N T"]]:
    true_probability = np.full((len(requests), candidates, len(spec.tasks)), np.nan, np.float32)
    places = np.full((len(requests), candidates), -1)
    for row, request in enumerate(requests):
        number = len(request.item_id)
        if number > candidates:
            raise UserError(
                f"funnel.retrieved={candidates} is less than the {number} candidates of request "
                f"{request.request_id}"
            )
        # Stored in funnel order: a ranker that cannot tell two candidates apart must not get the
        # one that the logged policy preferred for free. Item ids tell of popularity in some
        # datasets, so ties fall by a fixed permutation.
        order = np.random.default_rng(request.request_id).permutation(number)
        places[row, :number] = order
        if len(request.true_probability):
            true_probability[row, :number] = request.true_probability[order]
    return sampling.all_fields(columns_of(requests, spec), places), true_probability
