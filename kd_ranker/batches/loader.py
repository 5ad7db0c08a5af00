"""From records on disk to batches: Grain pipelines for training and for one pass over a split."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tensorflow_datasets as tfds
from jaxtyping import Float, Float32, Int

from kd_ranker.batch import STORED, CandidateBatch, EvaluationBatch, FeatureSpec, Stage
from kd_ranker.batches import cutting, sampling
from kd_ranker.batches.columns import (
    Columns,
    Parts,
    columns_of,
    in_sampling_order,
    joined,
    only_counting,
)
from kd_ranker.batches.cutting import Layout, PackedBatch
from kd_ranker.batches.sampling import Slots, Starts
from kd_ranker.errors import UserError
from kd_ranker.requests.request import Request
from kd_ranker.requests.storage import Dataset, from_record, record_features

# How an epoch reads the requests: each in an order of its own, or as they are stored, by time.
ORDERS = ("shuffled", "time")

# What training must not see; it is not even read from disk.
_EVALUATION_ONLY = [field.name for field in STORED if field.of == "known"]


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
# One thread makes batches ahead; another for the numbers behind them would only take turns with it.
_AS_ASKED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

# The most bytes of the batches that are made at a time, in one pass over the data.
_PASS = 2**26

# How much of the memory that is free the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
_CHUNK = 512


class Devices(Protocol):
    """How what the loader makes comes to the devices; `training.mapping` has them."""

    def replicate(self, tree: Any, /) -> Any:
        """A pytree of the host -> the same on all devices."""
        ...

    def shard(self, tree: Any, /) -> Any:
        """A pytree of the host, [requests, ...] -> the same, the requests split over devices."""
        ...

    def map_batches(self, function: Callable[[Any, Any], Any], /) -> Callable[[Any, Any], Any]:
        """A function of what is replicated and what is split -> the same, compiled."""
        ...


class _DefaultDevice(NamedTuple):
    replicate: Callable[[Any], Any]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


DEFAULT_DEVICE: Devices = _DefaultDevice(jax.device_put, jax.device_put, jax.jit)
"""The one that JAX takes when it is told nothing."""


def _read(
    dataset: Dataset, stage: Stage, logged: bool, history: bool
) -> Callable[[Sequence[int]], Columns]:
    """What reads some requests of the split `train`, by their numbers; see `training_batches`."""
    records, decode = read_split(dataset, "train", with_true_probability=False)
    spec = dataset.spec if history else dataclasses.replace(dataset.spec, history_length=0)

    def read(numbers: Sequence[int]) -> Columns:
        # All at once, which the record files answer in parallel.
        found = records.__getitems__(list(numbers))  # type: ignore[attr-defined]
        requests = [decode(record) for record in found]
        return only_counting(columns_of(requests, spec, logged), stage)

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
class _ForEach(grain.experimental.FlatMapTransform):
    """An element -> what it is split into."""

    split: Callable[[Any], Sequence[Any]]
    max_fan_out: int = BLOCK

    def flat_map(self, element: Any) -> Sequence[Any]:
        return self.split(element)


class _FromBlock(grain.IterDataset):
    """An endless dataset, known by what it is from any block of steps on.

    Its position is the number of elements handed out, whatever happens behind it: a run that
    started with the requests in memory may go on without that.
    """

    def __init__(self, from_block: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._from_block = from_block

    def __iter__(self) -> grain.DatasetIterator:
        return _CountingIterator(self._from_block)


class _CountingIterator(grain.DatasetIterator):
    def __init__(self, from_block: Callable[[int], grain.IterDataset]):
        super().__init__()
        self._from_block = from_block
        self._taken, self._elements = 0, iter(from_block(0))

    def __next__(self) -> Any:
        element = next(self._elements)
        self._taken += 1
        return element

    def get_state(self) -> dict[str, int]:
        return {"taken": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        block, of_block = divmod(state["taken"], BLOCK)
        self._taken, self._elements = state["taken"], iter(self._from_block(block))
        for _ in range(of_block):
            next(self._elements)


def _flattened(
    dataset: grain.IterDataset, split: Callable[[Any], Sequence[Any]]
) -> grain.IterDataset:
    return grain.experimental.FlatMapIterDataset(dataset, _ForEach(split))


def training_batches(
    dataset: Dataset,
    *,
    requests: int,
    candidates: int,
    passed_share: float,
    negative_rate: float,
    seed: int,
    order: str = "shuffled",
    stage: Stage = Stage.RETRIEVED,
    logged: bool = True,
    history: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    devices: Devices = DEFAULT_DEVICE,
    copies: int = 1,
    resident: bool | None = None,
) -> grain.IterDataset:
    """An endless dataset of training batches, each a `PackedBatch` on the devices.

    Each epoch has its own draw of candidates. The requests are read and decoded once, before the
    first batch, where memory can hold them: then the batches are cut from them on the devices, many
    in one pass. Else each batch is read and cut on the host. The batches are the same, but for
    slots that nothing fills. The position of the dataset (`get_state`, `set_state`) is the number
    of batches handed out, however many are made ahead.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      requests: requests a batch over all processes.
      candidates: candidates a request.
      passed_share: see `sampling.kinds_of`.
      negative_rate: see `sampling.kinds_of`.
      seed: of the order and of the draws.
      order: one of `ORDERS`.
      stage: what came less far in the funnel is left out of the batches, unless it was shown or is
        `logged`. The rest of a batch is drawn as if it were there.
      logged: whether batches hold the logged teacher probabilities, and what has one.
      history: whether batches hold the users' histories; if not, H is 0.
      process_index: this process among those that share the work.
      process_count: their number.
      devices: what puts and makes batches on the devices; runs ahead in a thread of its own.
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
    read = _read(dataset, stage, logged, history)

    def kinds_of(columns: Columns, positives: Any) -> tuple[np.ndarray, Slots]:
        return sampling.kinds_of(columns, positives, stage, candidates, passed_share, negative_rate)

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
        columns, positives = in_sampling_order(joined([read(chunk) for chunk in chunks]))
        kinds, slots = kinds_of(columns, positives)
        layout = Layout(columns.spans, slots)
        make, steps = _batches_of_draws(columns.rows, layout, requests // process_count, devices)

        # None of these holds the data of the host, which need not stay there.
        def draw(start: _Start) -> Starts:
            return sampling.draw(*start, kinds)

        def passes(starts: Starts) -> list[Starts]:
            return [starts[:, at : at + steps] for at in range(0, BLOCK, steps)]

        def from_block(block: int) -> grain.IterDataset:
            drawn = starts.slice(slice(block, None)).map(draw).to_iter_dataset(_AS_ASKED)
            made = _flattened(drawn, passes).map(make)
            ahead = grain.experimental.ThreadPrefetchIterDataset(made, prefetch_buffer_size=1)
            return _flattened(ahead, lambda batches: batches)

        return _FromBlock(from_block)

    def batch(start: _Start) -> PackedBatch:
        columns, positives = in_sampling_order(read(start.request[:, 0].tolist()))
        # What the requests of one batch need differs from batch to batch, as shapes must not.
        kinds, slots = kinds_of(columns, positives)[0], Slots(*(candidates,) * 3)
        request = np.arange(len(columns))[:, None]
        starts = sampling.draw(request, start.start, kinds)
        drawn = cutting.gather(columns.rows, sampling.chosen(starts, slots))
        return cutting.join(drawn, Layout(columns.spans, slots))[0]

    def steps_of(block: _Start) -> list[_Start]:
        at = [slice(step, step + 1) for step in range(BLOCK)]
        return [_Start(block.request[:, one], block.start[:, one]) for one in at]

    def read_from_block(block: int) -> grain.IterDataset:
        each = _flattened(starts.slice(slice(block, None)).to_iter_dataset(_AS_ASKED), steps_of)
        batches = each.map(batch).map(devices.shard)
        return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=4)

    return _FromBlock(read_from_block)


def _batches_of_draws(
    data: Parts, layout: Layout, requests: int, devices: Devices
) -> tuple[Callable[[Starts], list[PackedBatch]], int]:
    """What makes the batches of a few steps in a row on the devices, and how many steps these are.

    Args:
      data: the rows of the requests, on the host.
      layout: of a batch.
      requests: of a batch, over the devices of this process.
      devices: where to make them.
    """
    steps = BLOCK
    while steps > 1 and 4 * requests * sum(layout.widths) * steps > _PASS:
        steps //= 2
    on_devices = devices.replicate(data)
    # Three programs, each of which reads what the one before has written, see `cutting.gather`.
    choose = devices.map_batches(lambda _, starts: sampling.chosen(starts, layout.slots))
    gather = devices.map_batches(cutting.gather)
    join = devices.map_batches(lambda _, drawn: cutting.join(drawn, layout))

    def make(starts: Starts) -> list[PackedBatch]:
        return join((), gather(on_devices, choose((), devices.shard(starts))))

    return make, steps


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
) -> tuple[dict[str, Any], Float32[np.ndarray, "R N T"]]:
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
    return cutting.all_fields(columns_of(requests, spec), places), true_probability
