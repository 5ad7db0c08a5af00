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
_NAME = "requests"
_FORMAT = "array_record"


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
        split, index_text = bytes(serialized_example).decode().split()
        index = int(index_text)
        if split not in self._columns:
            self._columns[split] = row_files.open_columns(self._folder, self._spec, split)
        block = block_at(self._columns[split], self._spec, slice(index, index + 1))
        (request,) = block.requests()
        fields = dict(vars(request))
        for column, task in enumerate(self._spec.tasks):
            fields[teacher_column(task)] = fields["teacher_probability"][:, column]
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
            task_feature = tfds.features.Tensor(shape=number, dtype=field.stored)
            features |= {teacher_column(task): task_feature for task in spec.tasks}
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
        earlier_files: list[Path] = []
        if earlier and split == "train":
            earlier_files = sorted(earlier.directory.glob(f"{_NAME}-{split}.{_FORMAT}-*"))
        paths = [*map(Path, template.sharded_filepaths(num_shards=len(earlier_files) + 1))]
        lengths = []
        for file, path in zip(earlier_files, paths[:-1], strict=True):
            row_files.link(file, path)
            with contextlib.closing(ArrayRecordReader(str(file))) as reader:
                lengths.append(reader.num_records())
        num_earlier = sum(lengths)
        lengths.append(number - num_earlier)
        with contextlib.closing(ArrayRecordWriter(str(paths[-1]), _RECORDS)) as writer:
            for index in range(num_earlier, number):
                writer.write(f"{split} {index}".encode())
        num_bytes = sum(path.stat().st_size for path in paths)
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features_of(spec),
        split_infos=splits,
        version=version,
        check_data=False,  # checking the first example would need TensorFlow
        disable_shuffling=True,
    )
