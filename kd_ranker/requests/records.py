"""A built dataset, opened for reading, and its requests one by one: for programs and for TFDS.

TFDS opens the folder of a dataset (`tfds.builder_from_directory(folder)`) and its records decode to
the fields of `Request`. The files of records are only an index: each record names a split and the
number of a request in it. `features.json` names the class `RequestFeatures`, which reads that
request from the rows that batches are cut from, see `row_files`. TFDS imports the class by its name
and therefore needs this package.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kd_ranker.batch import STORED, FeatureSpec, Items, Request
from kd_ranker.requests import row_files
from kd_ranker.requests.columns import Columns
from kd_ranker.requests.request import BLOCK, ReadBlock, requests_in
from kd_ranker.requests.row_files import block_at

# One record per group, since records are read one by one.
_RECORDS = "group_size:1,uncompressed"
_NAME, _FORMAT = "requests", "array_record"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A built dataset, opened for reading."""

    directory: Path
    # Under `dataset`, its name and the digest of its content. With the scores of a teacher
    # that was trained on it, their name and digest are under `scored`.
    provenance: Mapping[str, str]
    spec: FeatureSpec
    items: Items  # their features and categories, on the host
    columns: Mapping[str, Columns] = dataclasses.field(repr=False)  # split -> requests, in files
    # The identities of the datasets that it extends, the oldest first. Their ids come first.
    earlier: tuple[str, ...] = ()


def read_requests(dataset: Dataset, split: str) -> Iterator[Request]:
    """Return the requests of a split in stored order; see `row_files.block_at`."""
    return requests_in(blocks_of(dataset.columns[split], dataset.spec))


def blocks_of(columns: Columns, spec: FeatureSpec) -> Iterator[ReadBlock]:
    """Yield a function for each block of consecutive requests, which reads it."""
    for start in range(0, len(columns), BLOCK):
        yield functools.partial(block_at, columns, spec, slice(start, start + BLOCK))


def teacher_column(task: str) -> str:
    """Return the name of a task's teacher probability in a record."""
    return f"teacher_probability_{task}"


class RequestFeatures(tfds.features.FeaturesDict):
    """The fields of a request for TFDS, with one teacher column per task."""

    def load_metadata(self, data_dir: Any, feature_name: str | None = None) -> None:
        """Remember the folder of the dataset, which TFDS names here."""
        super().load_metadata(data_dir, feature_name)
        self._folder = Path(data_dir)
        self._spec = FeatureSpec.from_json((self._folder / "feature_spec.json").read_text())
        self._columns: dict[str, Columns] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files, which another process opens itself."""
        return {**vars(self), "_columns": {}}

    def deserialize_example_np(self, serialized_example: Any, *, decoders: Any = None) -> Any:
        """Return the fields of the request that a record names."""
        del decoders
        split, place = bytes(serialized_example).decode().split()
        if split not in self._columns:
            self._columns[split] = row_files.open_columns(self._folder, self._spec, split)
        own = slice(int(place), int(place) + 1)
        (request,) = block_at(self._columns[split], self._spec, own).requests()
        fields = dict(vars(request))
        for index, task in enumerate(self._spec.tasks):
            fields[teacher_column(task)] = fields["teacher_probability"][:, index]
        fields["teacher_version"] = fields["teacher_version"].encode()  # as TFDS returns texts
        # The empty index turns an array of one number into that number.
        return {name: np.asarray(fields[name], self[name].np_dtype)[()] for name in self}


def _features_of(spec: FeatureSpec) -> RequestFeatures:
    features: dict[str, tfds.features.FeatureConnector] = {}
    for field in STORED:
        number = () if field.of == "request" else (None,)
        shape = (*number, *field.shape(spec))
        if field.stored is str:
            features[field.name] = tfds.features.Text()
        elif field.name == "teacher_probability":
            of_task = tfds.features.Tensor(shape=number, dtype=field.stored)
            features |= {teacher_column(task): of_task for task in spec.tasks}
        elif not shape:
            features[field.name] = tfds.features.Scalar(field.stored)
        elif 0 not in shape:  # which TFDS cannot describe
            features[field.name] = tfds.features.Tensor(shape=shape, dtype=field.stored)
    return RequestFeatures(features)


def write_index(
    folder: Path,
    spec: FeatureSpec,
    num_requests: Mapping[str, int],
    version: str,
    earlier: Dataset | None = None,
) -> None:
    """Write the files by which TFDS reads the requests in a folder.

    Those for the training requests of an `earlier` dataset are the same, and are linked.
    """
    splits = []
    for split, number in num_requests.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=_NAME, split=split, filetype_suffix=_FORMAT
        )
        known, shards = [], []
        if earlier and split == "train":
            known = sorted(earlier.directory.glob(f"{_NAME}-{split}.{_FORMAT}-*"))
        *linked, path = map(Path, template.sharded_filepaths(num_shards=len(known) + 1))
        for before, now in zip(known, linked, strict=True):
            row_files.link(before, now)
            with contextlib.closing(ArrayRecordReader(str(before))) as reader:
                shards.append(reader.num_records())
        shards.append(number - sum(shards))
        with contextlib.closing(ArrayRecordWriter(str(path), _RECORDS)) as writer:
            for place in range(number - shards[-1], number):
                writer.write(f"{split} {place}".encode())
        size = sum(of.stat().st_size for of in (*linked, path))
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=shards, num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features_of(spec),
        split_infos=splits,
        version=version,
        check_data=False,  # checking the first example would need TensorFlow
        disable_shuffling=True,
    )
