"""From records on disk to batches: Grain pipelines for training and for one pass over a split."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from kd_ranker.batch import CandidateBatch, EvaluationBatch, FeatureSpec
from kd_ranker.data import sampling
from kd_ranker.data.builder import Dataset, from_record, record_features
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


@dataclasses.dataclass(frozen=True)
class _SampleCandidates(grain.transforms.RandomMap):
    """Draws the candidates of one record; the generator depends on seed and position alone."""

    spec: FeatureSpec
    candidates: int
    passed_share: float
    negative_rate: float

    def random_map(self, request: Request, generator: np.random.Generator) -> sampling.Fields:
        return sampling.training_fields(
            request,
            self.spec,
            self.candidates,
            self.passed_share,
            self.negative_rate,
            generator,
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
) -> grain.IterDataset:
    """An endless dataset of training batches.

    Each epoch has its own order and its own draw of candidates. The iterator's position
    (`get_state`, `set_state`) stands at the batch last handed out, however many were prefetched.

    Args:
      dataset: the dataset; its split `train` is read, without true probabilities.
      requests: requests a batch over all processes.
      candidates: candidates a request.
      passed_share: see `sampling.training_fields`.
      negative_rate: see `sampling.training_fields`.
      seed: of the order and of the draws.
      process_index: this process among those that share the work.
      process_count: their number.
      to_device: puts a host batch on the devices; runs ahead in a thread of its own.

    Raises:
      UserError: the split has fewer requests than processes.
    """
    records, decode = read_split(dataset, "train", with_true_probability=False)
    if len(records) < process_count:
        raise UserError(
            f"{dataset.directory} has {len(records)} training requests "
            f"for {process_count} processes"
        )
    samples = (
        grain.MapDataset.source(records)
        .seed(seed)
        .shuffle()
        .slice(slice(process_index, None, process_count))
        .repeat()
        .map(decode)
        .random_map(_SampleCandidates(dataset.spec, candidates, passed_share, negative_rate))
        .batch(requests // process_count, drop_remainder=True)
    )
    batches = samples.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)).map(
        lambda fields: to_device(CandidateBatch(**fields))
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
        rows = [
            _evaluation_row(decode(records[start + offset % present]), dataset.spec, candidates)
            for offset in range(requests)
        ]
        fields, true_probability = zip(*rows, strict=True)
        yield EvaluationBatch(
            batch=CandidateBatch(**sampling.stack(fields)),
            true_probability=jnp.asarray(np.stack(true_probability)),
            request_mask=jnp.arange(requests) < present,
        )


def num_evaluation_batches(dataset: Dataset, *, requests: int, limit: int = 0) -> int:
    """How many batches `evaluation_batches` yields."""
    records, _ = read_split(dataset, "test", with_true_probability=True)
    return math.ceil(_num_evaluation_requests(records, limit) / requests)


def _num_evaluation_requests(records: Sequence[bytes], limit: int) -> int:
    return min(limit, len(records)) if limit else len(records)


def _evaluation_row(
    request: Request, spec: FeatureSpec, candidates: int
) -> tuple[sampling.Fields, np.ndarray]:
    number = len(request.item_id)
    if number > candidates:
        raise UserError(
            f"funnel.retrieved={candidates} is less than the {number} candidates of request "
            f"{request.request_id}"
        )
    true_probability = np.full((candidates, len(spec.tasks)), np.nan, np.float32)
    true_probability[: len(request.true_probability)] = request.true_probability
    fields = sampling.full_fields(request, spec, candidates)
    # Stored in funnel order: a ranker that cannot tell two candidates apart must not get the one
    # that the logged policy preferred for free. Item ids tell of popularity in some datasets, so
    # ties fall by a fixed permutation.
    order = np.arange(candidates)
    order[:number] = np.random.default_rng(request.request_id).permutation(number)
    per_candidate = {
        name: field[order] for name, field in fields.items() if name in sampling.PER_CANDIDATE
    }
    return fields | per_candidate, true_probability[order]
