"""Requests on disk: write and open the folder of a dataset.

A built dataset is the folder `data.dir/requests/<name>/<version>`. Each request is in it once:

    feature_spec.json   the sizes of its features (`FeatureSpec`)
    rows-SPLIT.bin      with counts-SPLIT.npy, the requests of a split: see `row_files`
    earlier.json        in a dataset that extends others, their identities, the oldest first
    items.npy           float32 [num_items, F], the features of each item, stored once
    item_category.npy   int32 [num_items, I], the category ids of each item
    *.json, *record*    the index by which TFDS reads the requests, see `records`
    manifest.json       sizes and digests of all these files, see `manifest`; the fingerprint of a
                        dataset is a digest of those of the files above, without the index

and the additional files of its source. It is written to a temporary folder that is renamed at the
end, so a dataset is complete or absent. The next build removes the leftovers of a build that was
killed. Equal requests give equal files, byte for byte.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kd_ranker import manifest
from kd_ranker.batch import STORED, FeatureSpec, Request
from kd_ranker.errors import UserError
from kd_ranker.requests import row_files
from kd_ranker.requests.block import Block, blocks_of
from kd_ranker.requests.columns import Columns, columns_of_block, slices
from kd_ranker.requests.lock import hold
from kd_ranker.requests.records import Dataset, write_index
from kd_ranker.requests.request import SPLITS, Shard, Source

FORMAT_VERSION = "2.0.0"
SPEC_FILE = "feature_spec.json"
_NAME = "requests"
_ITEMS_FILE, _CATEGORY_FILE = "items.npy", "item_category.npy"
_EARLIER_FILE, _MOVED = "earlier.json", "moved"
# The splits that become training requests of a dataset that extends another.
_HELD_OUT = ("validation", "test")
# The prefix of the name of a folder that is being written.
_UNFINISHED = ".unfinished-"


def directory_of(name: str, data_dir: str) -> Path:
    """Return the folder of the dataset `name` (see `pipeline.datasets`), built or not."""
    return Path(data_dir) / _NAME / name / FORMAT_VERSION


def build(source: Source, name: str, data_dir: str) -> Path:
    """Write a source to disk unless it exists already, close it, and return its folder.

    Raises:
      UserError: the source is at fault, or another process builds the same dataset.
    """
    directory = directory_of(name, data_dir)
    with contextlib.closing(source):
        if not directory.exists():
            with building(name, data_dir):
                write(source, directory)
    return directory


@contextlib.contextmanager
def building(name: str, data_dir: str) -> Iterator[Path]:
    """Keep other processes from building a dataset, and yield its folder.

    The leftovers of a build that was killed are removed.

    Raises:
      UserError: another process builds it.
    """
    directory = directory_of(name, data_dir)
    with hold(directory.parent):
        for leftover in directory.parent.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        yield directory


def write(source: Source, directory: Path) -> None:
    """Write a source to a folder of `building`, unless the folder exists already.

    Raises:
      UserError: the source is at fault.
    """
    if not directory.exists():
        _check(source)
        unfinished = directory.with_name(f"{_UNFINISHED}{directory.name}")
        unfinished.mkdir()
        try:
            _write_items(source, unfinished)
            known = _write_requests(source, unfinished)
            needed = {*unfinished.rglob("*")}
            if source.write_beside:
                source.write_beside(unfinished)
            removable = [path for path in unfinished.rglob("*") if path not in needed]
            manifest.write(
                unfinished,
                {"dataset": directory.parent.name},
                removable=[path.relative_to(unfinished).as_posix() for path in removable],
                known=known,
            )
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _check(source: Source) -> None:
    """Raise UserError for a source that cannot be stored."""
    _check_widths(source.spec)
    for split in SPLITS:
        has_earlier = source.earlier is not None and split == "train"
        if not source.num_requests.get(split) and not has_earlier:
            raise UserError(f"{source.spec.dataset} yields no requests for its split {split!r}")


def _write_items(source: Source, folder: Path) -> None:
    (folder / SPEC_FILE).write_text(source.spec.to_json())
    np.save(folder / _ITEMS_FILE, source.item_features)
    none = np.zeros((source.spec.num_items, 0), np.int32)
    category = none if source.item_category is None else source.item_category
    np.save(folder / _CATEGORY_FILE, category)


def _write_requests(source: Source, folder: Path) -> dict[str, list]:
    """Write the shards of each split, join them, and write the index.

    A source without shards has one per split. The requests of an earlier dataset come first.

    Returns:
      The entries of the earlier dataset's files in its manifest.
    """
    linked = _link_earlier(source, folder)
    shards = {
        split: source.shards(split) if source.shards else [_whole_split(source, split)]
        for split in SPLITS
    }
    paths = {
        split: [folder / f"{split}-{index:05d}" for index in range(len(shards[split]))]
        for split in SPLITS
    }
    calls = [
        (path, shard, source.spec, split == "train")
        for split in SPLITS
        for path, shard in zip(paths[split], shards[split], strict=True)
    ]
    if source.shards is None:
        for call in calls:  # each shows its progress
            write_shard(*call)
    else:
        for _ in source.run(write_shard, calls, "writing"):
            pass
    expected = dict(source.num_requests)
    if source.earlier:
        paths["train"].insert(0, folder / _MOVED)
        expected["train"] += sum(len(source.earlier.columns[of]) for of in _HELD_OUT)
    for split, new in paths.items():
        written = row_files.join(new, folder, split, source.spec) if new else 0
        if written != expected[split]:
            raise RuntimeError(f"{expected[split]} requests in split {split!r}, {written} written")
    numbers = {split: row_files.number_of_requests(folder, split) for split in SPLITS}
    write_index(folder, source.spec, numbers, FORMAT_VERSION)
    return linked


def _link_earlier(source: Source, folder: Path) -> dict[str, list]:
    """Begin the training requests with those of an earlier dataset: link its rows, or write them.

    Returns:
      The entries of the linked files in the manifest of that dataset.
    """
    earlier = source.earlier
    if earlier is None:
        return {}
    (folder / _EARLIER_FILE).write_text(json.dumps([*earlier.earlier, earlier.identity["dataset"]]))
    linked = row_files.link(earlier.directory, folder, "train")
    # The order of candidates in training is another one.
    moved = (earlier.columns[split] for split in _HELD_OUT)
    parts = (of.of(some) for of in moved for some in slices(of.counts.retrieved))
    _write_columns(folder / _MOVED, parts, for_training=True)
    entries = manifest.read(earlier.directory, _remedy(earlier.directory, earlier.made_by))["files"]
    return {name: entries[name] for name in linked}


def _whole_split(source: Source, split: str) -> Callable[[], Iterator[Request]]:
    number, title = source.num_requests[split], f"writing {split}"

    def requests() -> Iterator[Request]:
        return iter(tqdm(source.requests(split), title, number, unit="request", disable=None))

    return requests


def write_shard(path: Path, requests: Shard, spec: FeatureSpec, for_training: bool) -> None:
    """Write the rows and the counts of requests to the two files of `row_files.parts_of`."""

    def checked() -> Iterator[Columns]:
        for block in blocks_of(requests(), spec):
            _check_ids(block, spec)
            yield columns_of_block(block, spec)

    _write_columns(path, checked(), for_training)


def _write_columns(path: Path, parts: Iterable[Columns], for_training: bool) -> None:
    rows_path, counts_path = row_files.parts_of(path)
    written = 0
    with rows_path.open("wb") as rows_file, counts_path.open("wb") as counts_file:
        for part in parts:
            numbers, counts = row_files.flat(part, for_training, written)
            written += len(numbers)
            # `tofile` would not report why it fails.
            rows_file.write(np.ascontiguousarray(numbers).data)
            counts_file.write(np.ascontiguousarray(counts).data)


def _check_widths(spec: FeatureSpec) -> None:
    """Raise UserError for required features of width 0."""
    optional = {field.name for field in dataclasses.fields(Request) if field.default is None}
    widths = {field.name: field.width(spec) for field in STORED if field.width}
    widths |= {name: getattr(spec, name) for name in ("item_features", "cheap_item_features")}
    for name, width in widths.items():
        if width < 1 and name not in optional:
            raise UserError(
                f"{spec.dataset}: {name} has no columns; give at least one column, of zeros"
            )


def _check_ids(block: Block, spec: FeatureSpec) -> None:
    """Raise UserError for an id out of range, which a lookup on a device would not detect."""
    for field in STORED:
        values = block.values[field.name]
        if field.ids is None or not values.size:
            continue
        least, size = int(field.nothing), field.ids(spec)
        if values.min() < least or values.max() >= size:
            wrong = ((values < least) | (values >= size)).reshape(len(values), -1).any(axis=1)
            ends = np.cumsum(block.numbers[field.of])
            place = np.searchsorted(ends, np.flatnonzero(wrong)[0], side="right")
            ids = values[ends[place] - block.numbers[field.of][place] : ends[place]]
            raise UserError(
                f"request {block.values['request_id'][place]}: {field.name} must lie in [{least}, "
                f"{size}), found {ids.min()} to {ids.max()}"
            )


def open_dataset(name: str, data_dir: str, made_by: str) -> Dataset:
    """Open a built dataset.

    Args:
      name: see `dataset_name`.
      data_dir: `config.data.dir`.
      made_by: the command that makes the dataset, for the message if it is missing.

    Raises:
      UserError: the dataset is missing or damaged.
    """
    directory = directory_of(name, data_dir)
    if not directory.exists():
        raise UserError(f"no dataset at {directory}; make it with: {made_by}")
    check_whole(directory, made_by)
    spec = FeatureSpec.from_json((directory / SPEC_FILE).read_text())
    earlier = directory / _EARLIER_FILE
    parts = itertools.chain.from_iterable(row_files.all_paths(directory, of) for of in SPLITS)
    rows = [path.name for path in itertools.chain.from_iterable(parts)]
    files = [SPEC_FILE, _ITEMS_FILE, _CATEGORY_FILE, *rows]
    fingerprint = manifest.fingerprint(directory, files, _remedy(directory, made_by))
    return Dataset(
        directory=directory,
        identity={"dataset": f"{name}/{fingerprint}"},
        made_by=made_by,
        spec=spec,
        item_features=np.load(directory / _ITEMS_FILE),
        item_category=np.load(directory / _CATEGORY_FILE),
        columns={split: row_files.open_columns(directory, spec, split) for split in SPLITS},
        earlier=tuple(json.loads(earlier.read_text())) if earlier.exists() else (),
    )


def check_whole(directory: Path, made_by: str, thorough: bool = False) -> None:
    """Check all files of a dataset against its manifest.

    Args:
      directory: of the dataset.
      made_by: the command that makes it, for the message.
      thorough: whether to read large files too.

    Raises:
      UserError: a file is damaged, or the folder holds another dataset.
    """
    made_of = {"dataset": directory.parent.name}
    manifest.check(directory, _remedy(directory, made_by), made_of, thorough)


def _remedy(directory: Path, made_by: str) -> str:
    return f"remove the folder {directory} and make it again with: {made_by}"
