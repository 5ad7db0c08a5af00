"""The records of requests, and a built dataset that reads them back."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float32, Int32, Shaped

from kd_ranker.batch import STORED, FeatureSpec, Field, Items, Request
from kd_ranker.errors import UserError
from kd_ranker.requests.block import Block
from kd_ranker.requests.columns import Columns
from kd_ranker.requests.ragged import starts_of


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A built dataset, opened for reading.

    Attributes:
      directory: its folder.
      identity: under `dataset`, its name and the fingerprint of its content. A copy that a teacher
        has scored has those of the original there, and its own under `scored`.
      made_by: the command that makes it, for messages.
      spec: the sizes of its features.
      item_features: the features of each item.
      item_category: the category ids of each item.
      builder: the TFDS builder that reads its records, which contain all that was logged.
      columns: split -> the columns that batches are cut from, in files.
    """

    directory: Path
    identity: Mapping[str, str]
    made_by: str
    spec: FeatureSpec
    item_features: Float32[np.ndarray, "items F"]
    item_category: Int32[np.ndarray, "items I"]
    builder: tfds.core.DatasetBuilder
    columns: Mapping[str, Columns] = dataclasses.field(repr=False)

    @property
    def items(self) -> Items:
        """The features and categories of the items, on the host."""
        features: Any = self.item_features  # typed for the device, where they are used
        category: Any = self.item_category
        return Items(features, category)


def teacher_column(task: str) -> str:
    """Return the name under which a task's teacher probability is stored."""
    return f"teacher_probability_{task}"


def record_features(spec: FeatureSpec) -> tfds.features.FeaturesDict:
    """Return the TFDS features of a stored request, with one teacher column per task."""

    def feature(field: Field, *shape: int) -> tfds.features.FeatureConnector:
        if field.stored is str:
            return tfds.features.Text()
        if field.of == "request" and not shape:
            return tfds.features.Scalar(field.stored)
        number = () if field.of == "request" else (None,)
        return tfds.features.Tensor(
            shape=(*number, *shape), dtype=field.stored, encoding=tfds.features.Encoding.BYTES
        )

    features: dict[str, tfds.features.FeatureConnector] = {}
    for field in STORED:
        shape = field.shape(spec)
        if field.name == "teacher_probability":
            features |= {teacher_column(task): feature(field) for task in spec.tasks}
        elif 0 not in shape:  # which TFDS cannot store
            features[field.name] = feature(field, *shape)
    return tfds.features.FeaturesDict(features)


def serialized(block: Block, spec: FeatureSpec) -> Iterator[bytes]:
    """Yield each request as the bytes that TFDS writes for `record_features`.

    They are a `tf.train.Example`. Its wire format is written here, one column at a time, in a
    twentieth of the time of the encoder of TFDS.
    """
    columns: dict[str, tuple[int, list[bytes]]] = {}
    for field in STORED:
        if 0 in field.shape(spec):
            continue
        values = block.values[field.name]
        if field.name == "teacher_probability":
            for index, task in enumerate(spec.tasks):
                of_task = _bytes_of_each(block, field, values[:, index])
                columns[teacher_column(task)] = _BYTES_LIST, of_task
        elif field.stored is str:
            columns[field.name] = _BYTES_LIST, [value.encode() for value in values]
        elif field.of == "request" and not field.width:
            columns[field.name] = _INT64_LIST, [_varint(value) for value in values.tolist()]
        else:
            columns[field.name] = _BYTES_LIST, _bytes_of_each(block, field, values)
    parts: list[list[bytes]] = []
    # In the order of names, as protobuf writes a map deterministically.
    for name, (kind, contents) in sorted(columns.items()):
        parts += [[_head(name, kind, len(content)) for content in contents], contents]
    for record in map(b"".join, zip(*parts, strict=True)):
        yield _key(1, len(record)) + record


# The fields of `tf.train.Feature`.
_BYTES_LIST, _INT64_LIST = 1, 3


@functools.lru_cache(maxsize=2**14)
def _head(name: str, kind: int, length: int) -> bytes:
    """Return the bytes before the only value of a feature, which itself has `length` bytes.

    A nested message is a key, its length and its content. `feature` of the map contains the name
    and the feature, the feature contains the list of its kind, and the list contains the value.
    """
    inner, encoded = _key(1, length), name.encode()
    inner = _key(kind, len(inner) + length) + inner
    inner = _key(1, len(encoded)) + encoded + _key(2, len(inner) + length) + inner
    return _key(1, len(inner) + length) + inner


@functools.lru_cache(maxsize=2**14)
def _key(number: int, length: int) -> bytes:
    """Return the key of a length-delimited field, and the length of its content."""
    return bytes((number << 3 | 2,)) + _varint(length)


def _varint(number: int) -> bytes:
    """Encode a 64-bit integer, seven bits per byte, the lowest bits first."""
    left, encoded = number & (2**64 - 1), bytearray()
    while left > 0x7F:
        encoded.append(left & 0x7F | 0x80)
        left >>= 7
    encoded.append(left)
    return bytes(encoded)


def _bytes_of_each(
    block: Block, field: Field, values: Shaped[np.ndarray, "sum ..."]
) -> list[bytes]:
    """Return the bytes of a field's entries for each request."""
    whole = np.ascontiguousarray(values, field.stored)
    size = whole.itemsize * math.prod(whole.shape[1:])
    content = whole.tobytes()
    ends = (starts_of(block.numbers[field.of]) * size).tolist()
    return [content[first:end] for first, end in itertools.pairwise(ends)]


def from_record(record: Mapping[str, Any], tasks: Sequence[str]) -> Request:
    """Return the request of a record that TFDS has read."""
    fields = dict(record)
    probability = np.stack([fields.pop(teacher_column(task)) for task in tasks], axis=-1)
    version = fields.pop("teacher_version")
    return Request(
        **fields,
        teacher_probability=probability,
        teacher_version=version.decode() if isinstance(version, bytes) else version,
    )


@contextlib.contextmanager
def damage(directory: Path, made_by: str, file: str = "") -> Iterator[None]:
    """Turn errors from reading damaged files into a UserError with the remedy.

    Args:
      directory: the folder of the dataset.
      made_by: the command that makes it.
      file: the file that is read, if the errors do not name it.
    """
    try:
        yield
    except UserError:
        raise
    # A RuntimeError comes from the checksums within files of records.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        why = f"{file}: {error}" if file else error
        raise UserError(
            f"the dataset at {directory} is damaged ({why}); remove that folder and rebuild it "
            f"with: {made_by}"
        ) from error


def read_split(dataset: Dataset, split: str) -> tuple[int, Callable[[int], Request]]:
    """Return the number of requests of a split, and a function that reads one by its place.

    The function raises a UserError for a damaged record.
    """
    features = record_features(dataset.spec)
    records = dataset.builder.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )

    info = dataset.builder.info.splits[split]
    files = [path.name for path in map(Path, info.filepaths)]
    ends = np.cumsum(info.shard_lengths)

    def read(place: int) -> Request:
        file = files[np.searchsorted(ends, place, side="right")]
        with damage(dataset.directory, dataset.made_by, file):
            record = features.deserialize_example_np(records[place])
        return from_record(record, dataset.spec.tasks)

    return len(records), read


def read_requests(dataset: Dataset, split: str) -> Iterator[Request]:
    """Yield the requests of a split in stored order, with all stored fields."""
    number, read = read_split(dataset, split)
    for place in range(number):
        yield read(place)
