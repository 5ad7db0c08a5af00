"""Requests on disk: a TFDS builder that writes ArrayRecord, and the folder that it makes.

A built dataset is `data.dir/requests/<name>/<version>` with the splits `train` and `test`, and
beside the records

    feature_spec.json   the sizes of its features (`FeatureSpec`)
    items.npy           float32 [num_items, F], what is known of each item, stored once
    item_category.npy   int32 [num_items, I], the category ids of each item

and what else its source puts there. TFDS writes into a temporary folder and renames it at the end,
so a dataset is whole or absent. Of a source with `resume`, the finished shards outlive a run that
was killed, and a later one writes the others.
"""

import contextlib
import dataclasses
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int32
from tensorflow_datasets.core.constants import INCOMPLETE_PREFIX
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.file_adapters import ADAPTER_FOR_FORMAT, FileFormat
from tqdm import tqdm

from kd_ranker.batch import STORED, FeatureSpec, Request
from kd_ranker.errors import UserError
from kd_ranker.requests.records import Dataset, record_features, to_record
from kd_ranker.requests.request import SPLITS, Source

FORMAT_VERSION = "1.1.0"
SPEC_FILE = "feature_spec.json"
_ITEMS_FILE, _CATEGORY_FILE = "items.npy", "item_category.npy"
_RECORDS = ADAPTER_FOR_FORMAT[FileFormat.ARRAY_RECORD]
# What the name of a shard starts with that is being written.
_UNFINISHED = ".unfinished-"


class Requests(tfds.core.GeneratorBasedBuilder):
    """Writes the requests of a source."""

    VERSION = tfds.core.Version(FORMAT_VERSION)
    name = "requests"

    def __init__(self, *, source: Source, config_name: str, data_dir: str):
        """Makes a builder that writes to `data_dir/requests/<config_name>/<version>`."""
        self._source = source
        super().__init__(
            data_dir=data_dir,
            config=tfds.core.BuilderConfig(name=config_name, version=self.VERSION),
            file_format="array_record",
        )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=record_features(self._source.spec),
            # A scored copy must keep the order, so that the same seed draws the same batches.
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        if self._source.shards is None:
            super()._download_and_prepare(dl_manager, download_config)
        else:
            self._write_items()
            self._write_shards()
        if self._source.write_beside:
            self._source.write_beside(Path(self.data_path))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager
        self._write_items()
        return {split: self._generate_examples(split) for split in SPLITS}

    def _write_items(self) -> None:
        (self.data_path / SPEC_FILE).write_text(self._source.spec.to_json())
        with (self.data_path / _ITEMS_FILE).open("wb") as file:
            np.save(file, self._source.item_features)
        with (self.data_path / _CATEGORY_FILE).open("wb") as file:
            np.save(file, _item_category(self._source))

    def _write_shards(self) -> None:
        """Writes a file a shard, where it is not kept from an earlier run.

        TFDS' own builder of shards would hold all of a shard's requests in memory, and write one
        shard after the other.
        """
        source, calls, shards_of = self._source, [], {}
        folder = source.resume or Path(self.data_path)
        for split in SPLITS:
            template = self._get_filename_template(split)
            shards = source.shards(split) if source.shards else []
            paths = [
                template.sharded_filepath(shard_index=index, num_shards=len(shards))
                for index in range(len(shards))
            ]
            shards_of[split] = template, paths
            calls += [
                (folder / path.name, shard, source.spec)
                for path, shard in zip(paths, shards, strict=True)
            ]
        missing = [call for call in calls if not call[0].exists()]
        for _ in source.run(write_shard, missing, "writing"):
            pass
        infos = []
        for split, (template, paths) in shards_of.items():
            lengths = [_RECORDS.num_examples(folder / path.name) for path in paths]
            if sum(lengths) != source.num_requests[split]:
                raise RuntimeError(
                    f"{source.num_requests[split]} requests in split {split!r}, {sum(lengths)} "
                    "written"
                )
            if source.resume:
                for path in paths:
                    _link(source.resume / path.name, Path(path))
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=sum(path.stat().length for path in paths),
                    filename_template=template,
                )
            )
        self.info.set_splits(tfds.core.SplitDict(infos))

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        requests = tqdm(
            self._source.requests(split),
            total=self._source.num_requests[split],
            desc=f"writing {split}",
            unit="request",
            disable=None,
        )
        for index, request in enumerate(requests):
            _check_ids(request, self._source.spec)
            yield index, to_record(request, self._source.spec.tasks)


def write_shard(path: Path, requests: Callable[[], Iterator[Request]], spec: FeatureSpec) -> None:
    """Writes requests to a file, which is whole or absent; it knows their number itself."""
    features = record_features(spec)
    serializer = ExampleSerializer(features.get_serialized_info())

    def records() -> Iterator[tuple[int, bytes]]:
        for number, request in enumerate(requests()):
            _check_ids(request, spec)
            record = features.encode_example(to_record(request, spec.tasks))
            example = serializer.get_tf_example(record)
            # Else the order of its fields differs from process to process.
            yield number, example.SerializeToString(deterministic=True)

    temporary = path.with_name(f"{_UNFINISHED}{path.name}.{os.getpid()}")
    try:
        _RECORDS.write_examples(temporary, records())
        # Else a machine that loses its power may keep the name and lose what it names.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(kept: Path, path: Path) -> None:
    """Gives a file a second name: the first one stays until all of the dataset is written."""
    try:
        os.link(kept, path)
    except OSError:  # a file system without such names
        shutil.copyfile(kept, path)


def _item_category(source: Source) -> Int32[np.ndarray, "items I"]:
    if source.item_category is None:
        return np.zeros((source.spec.num_items, 0), np.int32)
    return source.item_category


def _check_widths(spec: FeatureSpec) -> None:
    """Raises UserError for features of width 0 that every dataset has."""
    optional = {field.name for field in dataclasses.fields(Request) if field.default is None}
    widths = {field.name: field.width(spec) for field in STORED if field.width}
    widths |= {name: getattr(spec, name) for name in ("item_features", "cheap_item_features")}
    for name, width in widths.items():
        if width < 1 and name not in optional:
            raise UserError(
                f"{spec.dataset}: {name} has no columns; give at least one column, of zeros"
            )


def _check_ids(request: Request, spec: FeatureSpec) -> None:
    """Raises UserError for an id out of range: a lookup on a device could not complain."""
    for field in STORED:
        value = getattr(request, field.name)
        if field.ids is None or value is None:
            continue
        ids, least, size = np.asarray(value), int(field.nothing), field.ids(spec)
        if ids.size and not (ids.min() >= least and ids.max() < size):
            raise UserError(
                f"request {request.request_id}: {field.name} must lie in [{least}, {size}), "
                f"found {ids.min()} to {ids.max()}"
            )


def directory_of(name: str, data_dir: str) -> Path:
    """The folder of the dataset `name`, built or not."""
    return Path(data_dir) / Requests.name / name / FORMAT_VERSION


def build(source: Source, name: str, data_dir: str) -> Path:
    """Writes a source to disk unless it is there already, closes it, and returns its folder."""
    with contextlib.closing(source):
        return _build(source, name, data_dir)


@contextlib.contextmanager
def _resuming(source: Source, directory: Path) -> Iterator[None]:
    """Holds `source.resume` for this run alone, and removes it once the dataset is whole.

    A run that dies lets go of it. What it was about to write is removed here.

    Raises:
      UserError: another run holds it.
    """
    if source.resume is None or (directory.exists() and not source.resume.parent.exists()):
        yield
        return
    folder, whole = source.resume, source.resume.parent
    folder.mkdir(parents=True, exist_ok=True)
    with (whole / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing {directory}; wait for its end") from error
        for unfinished in folder.glob(f"{_UNFINISHED}*"):
            unfinished.unlink(missing_ok=True)
        for unfinished in directory.parent.glob(f"{INCOMPLETE_PREFIX}*"):
            shutil.rmtree(unfinished)
        if found := len(list(folder.iterdir())):
            number = sum(len(source.shards(split)) for split in SPLITS) if source.shards else 0
            logging.warning("%d of %d shards were found finished in %s", found, number, folder)
        yield
        shutil.rmtree(whole)


def _build(source: Source, name: str, data_dir: str) -> Path:
    directory = directory_of(name, data_dir)
    with _resuming(source, directory):
        if not directory.exists():
            _write(source, name, data_dir)
    return directory


def _write(source: Source, name: str, data_dir: str) -> None:
    _check_widths(source.spec)
    for split, number in source.num_requests.items():
        if not number:
            raise UserError(f"{source.spec.dataset} yields no requests for its split {split!r}")
    # TFDS' own bars do not know how many requests are to come; ours do.
    tfds.disable_progress_bar()
    # It announces a download, and there is none, and warns of configs that are not its own.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = Requests(source=source, config_name=name, data_dir=data_dir)
            builder.download_and_prepare()
    finally:
        logging.set_verbosity(verbosity)


def open_dataset(name: str, data_dir: str, made_by: str) -> Dataset:
    """Opens a built dataset.

    Args:
      name: see `dataset_name`.
      data_dir: `config.data.dir`.
      made_by: the command that makes the dataset, for the message if there is none.

    Raises:
      UserError: there is no such dataset.
    """
    directory = directory_of(name, data_dir)
    if not (directory / SPEC_FILE).exists():
        raise UserError(f"no dataset at {directory}; make it with: {made_by}")
    return Dataset(
        directory=directory,
        spec=FeatureSpec.from_json((directory / SPEC_FILE).read_text()),
        item_features=np.load(directory / _ITEMS_FILE),
        item_category=np.load(directory / _CATEGORY_FILE),
        builder=tfds.builder_from_directory(directory),
    )
