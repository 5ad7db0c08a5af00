"""From records on disk to batches: Grain pipelines for training and for one pass over a split."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import psutil
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int

from kd_ranker.batch import CandidateBatch, EvaluationBatch, FeatureSpec
from kd_ranker.data import sampling
from kd_ranker.data.builder import Dataset, from_record, record_features
from kd_ranker.data.columns import Columns, columns_of, joined
from kd_ranker.data.request import Request
from kd_ranker.errors import UserError

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


ColumnsOf = Callable[[Int[np.ndarray, "R"]], tuple[Columns, Int[np.ndarray, "R"]]]

# How much of the memory that is free the requests of the training split may take.
_SHARE_OF_MEMORY = 0.25
_CHUNK = 512


def training_columns(dataset: Dataset, resident: bool | None = None) -> ColumnsOf:
    """What gives the columns that hold some requests of the split `train`, and their places there.

    The requests are read and decoded once, before the first batch, and stay in memory, where a
    quarter of what is free can hold them; else each batch reads its own. The batches are the same.

    Args:
      dataset: the dataset.
      resident: whether they stay in memory; None decides by their size.
    """
    records, decode = read_split(dataset, "train", with_true_probability=False)
    if resident is None:
        # Decoded requests are about as large as their records.
        sizes = [len(records[index]) for index in range(0, len(records), len(records) // 16 + 1)]
        free = psutil.virtual_memory().available
        resident = float(np.mean(sizes)) * len(records) <= _SHARE_OF_MEMORY * free

    def read(numbers: Sequence[int]) -> Columns:
        # All at once, which the record files answer in parallel.
        found = records.__getitems__([int(number) for number in numbers])  # type: ignore[attr-defined]
        return columns_of([decode(record) for record in found], dataset.spec)

    if not resident:
        return lambda numbers: (read(numbers.tolist()), np.arange(len(numbers)))
    starts = range(0, len(records), _CHUNK)
    everything = joined([read(range(start, min(start + _CHUNK, len(records)))) for start in starts])
    return lambda numbers: (everything, numbers)


def _order(requests: int, seed: int) -> Callable[[int], Int[np.ndarray, "requests"]]:
    """The order of the requests in each epoch."""

    @functools.lru_cache(maxsize=2)
    def of_epoch(epoch: int) -> Int[np.ndarray, "requests"]:
        return np.random.default_rng((seed, epoch)).permutation(requests)

    return of_epoch


@dataclasses.dataclass(frozen=True)
class _CutBatch(grain.transforms.RandomMap):
    """Batch number -> the fields of the batch, a pure function of seed and number.

    A batch at a time: one request after the other would cost more than a train step.
    """

    columns_of: ColumnsOf
    order: Callable[[int], Int[np.ndarray, "requests"]]
    requests_of_epoch: int
    process_index: int
    process_count: int
    requests: int
    candidates: int
    passed_share: float
    negative_rate: float

    def random_map(self, number: int, generator: np.random.Generator) -> sampling.Fields:
        # This process's places in the endless sequence of epochs, whose remainders are left out.
        of_process = self.requests_of_epoch // self.process_count
        places = np.arange(number * self.requests, (number + 1) * self.requests)
        epochs, places = np.divmod(places, of_process)
        places = places * self.process_count + self.process_index
        numbers = np.concatenate(
            [self.order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        columns, where = self.columns_of(numbers)
        return sampling.training_fields(
            columns, where, self.candidates, self.passed_share, self.negative_rate, generator
        )


def training_batches(
    dataset: Dataset,
    *,
    requests: int,
    candidates: int,
    passed_share: float,
    negative_rate: float,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    to_device: Callable[[CandidateBatch], Any] = lambda batch: batch,
    resident: bool | None = None,
) -> grain.IterDataset:
    """An endless dataset of training batches.

    Each epoch has its own order and its own draw of candidates. The iterator's position
    (`get_state`, `set_state`) stands at the batch last handed out, however many were prefetched.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      requests: requests a batch over all processes.
      candidates: candidates a request.
      passed_share: see `sampling.draw_candidates`.
      negative_rate: see `sampling.draw_candidates`.
      seed: of the order and of the draws.
      process_index: this process among those that share the work.
      process_count: their number.
      to_device: puts a host batch on the devices; runs ahead in a thread of its own.
      resident: see `training_columns`.

    Raises:
      UserError: the split has fewer requests than processes.
    """
    number = dataset.builder.info.splits["train"].num_examples
    if number < process_count:
        raise UserError(
            f"{dataset.directory} has {number} training requests for {process_count} processes"
        )
    cut = _CutBatch(
        columns_of=training_columns(dataset, resident),
        order=_order(number, seed),
        requests_of_epoch=number,
        process_index=process_index,
        process_count=process_count,
        requests=requests // process_count,
        candidates=candidates,
        passed_share=passed_share,
        negative_rate=negative_rate,
    )
    # Endless to anyone who counts steps.
    batches = (
        grain.MapDataset.range(2**31)
        .seed(seed)
        .random_map(cut)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        .map(lambda fields: to_device(CandidateBatch(**fields)))
    )
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)


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
    places = np.zeros((len(requests), candidates), np.int64)
    real = np.zeros(places.shape, bool)
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
        places[row, :number], real[row, :number] = order, True
        if len(request.true_probability):
            true_probability[row, :number] = request.true_probability[order]
    fields = sampling.batch_fields(
        columns_of(requests, spec),
        np.arange(len(requests)),
        places,
        real,
        real.astype(np.float32),
        candidates,
    )
    return fields, true_probability
