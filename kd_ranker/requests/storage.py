"""Requests on disk: write and open the folder of a dataset.

A built dataset is the folder `data.dir/requests/<name>/<version>`. Each request is in it once:

    feature_spec.json   the sizes of its features (`FeatureSpec`)
    rows-SPLIT.bin      with counts-SPLIT.npy, the requests of a split: see `row_files`
    earlier.json        in a dataset that extends others, their identities, the oldest first
    items.npy           float32 [num_items, F], the features of each item, stored once
    item_category.npy   int32 [num_items, I], the category ids of each item
    *.json, *record*    the index by which TFDS reads the requests, see `records`
    manifest.json       sizes and digests of all these files, see `manifest`; the digest of a
                        dataset is a digest of those of the files above, without the index

and the additional files of its source. It is written to a temporary folder that is renamed at the
end, so a dataset is complete or absent. Equal requests give equal files, byte for byte.

A teacher's probabilities for its candidates are a column in another folder:

    teacher-SPLIT.npy   float32 [1 + candidates, T]: NaN in the first row, which serves for padding,
                        then a row per candidate in stored order, NaN where it was not scored
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int

from kd_ranker import manifest
from kd_ranker.batch import STORED, FeatureSpec, Items, Stage
from kd_ranker.errors import UserError
from kd_ranker.progress import Progress, show_on_stderr
from kd_ranker.requests import row_files
from kd_ranker.requests.columns import Columns, Rows, Windows, row_type
from kd_ranker.requests.lock import hold
from kd_ranker.requests.records import Dataset, blocks_of, write_index
from kd_ranker.requests.request import SPLITS, Block, ReadBlock, starts_of
from kd_ranker.requests.row_files import Flat
from kd_ranker.requests.source import Source

FORMAT_VERSION = "2.2.0"
SPEC_FILE = "feature_spec.json"
_NAME = "requests"
_ITEMS_FILE = "items.npy"
_CATEGORY_FILE = "item_category.npy"
_EARLIER_FILE = "earlier.json"
# The features that a dataset must have, by the attributes of `FeatureSpec` with their widths.
_REQUIRED = (
    "user_features",
    "context_features",
    "history_features",
    "candidate_features",
    "item_features",
    "cheap_item_features",
)


def directory_of(name: str, data_dir: str) -> Path:
    """Return the folder of the dataset `name` (see `pipeline.datasets`), built or not."""
    return Path(data_dir) / _NAME / name / FORMAT_VERSION


def build(
    open_source: Callable[[], Source], name: str, data_dir: str, earlier: Dataset | None = None
) -> Path:
    """Write a source to disk unless the dataset `name` exists already, and return its folder.

    The folder is claimed before the source is opened, and the source is closed at the end. The
    leftovers of a build that was killed are removed. Requests of an `earlier` dataset come before
    these and become training requests; its ids are valid in the source.

    Raises:
      UserError: the source is at fault, or another process builds the same dataset.
    """
    directory = directory_of(name, data_dir)
    if directory.exists():
        return directory
    unfinished = directory.with_name(f".unfinished-{directory.name}")
    with hold(directory.parent):
        if directory.exists():  # another process has finished it meanwhile
            return directory
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.closing(open_source()) as source:
            _check(source, earlier)
            unfinished.mkdir()
            try:
                _write(source, unfinished, name, earlier)
                unfinished.rename(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _check(source: Source, earlier: Dataset | None) -> None:
    """Raise UserError for required features of width 0, and for a split without requests."""
    spec = source.spec
    for name in _REQUIRED:
        if getattr(spec, name) < 1:
            raise UserError(
                f"{spec.dataset}: {name} has no columns; give at least one column, of zeros"
            )
    for split in SPLITS:
        if not source.num_requests.get(split) and not (earlier and split == "train"):
            raise UserError(
                f"{spec.dataset} has no requests for its split {split!r}; give each of "
                f"{', '.join(SPLITS)} some"
            )


def _write(source: Source, folder: Path, name: str, earlier: Dataset | None) -> None:
    (folder / SPEC_FILE).write_text(source.spec.to_json())
    np.save(folder / _ITEMS_FILE, source.item_features)
    none = np.zeros((source.spec.num_items, 0), np.int32)
    category = none if source.item_category is None else source.item_category
    np.save(folder / _CATEGORY_FILE, category)
    known = {}
    if earlier:
        identities = [*earlier.earlier, earlier.provenance["dataset"]]
        (folder / _EARLIER_FILE).write_text(json.dumps(identities))
        entries = manifest.read(earlier.directory, "make it again")["files"]
        for path in itertools.chain(*row_files.all_paths(earlier.directory, "train")):
            row_files.link(path, folder / path.name)
            known[path.name] = entries[path.name]
    numbers = {
        split: _write_requests(source, split, folder, earlier if split == "train" else None)
        for split in SPLITS
    }
    write_index(folder, source.spec, numbers, FORMAT_VERSION, earlier)
    source.write_side_files(folder)
    manifest.write(folder, {"dataset": name}, known=known)


def _write_requests(source: Source, split: str, folder: Path, earlier: Dataset | None) -> int:
    """Write the requests of a split, after all those of an earlier dataset; return their number."""
    held_out = [earlier.columns[name] for name in SPLITS[1:]] if earlier else []
    moved = [blocks_of(columns, source.spec) for columns in held_out]
    expected = source.num_requests[split] + sum(map(len, held_out))
    pack = functools.partial(_pack, spec=source.spec, for_training=split == "train")
    parts = source.pack_blocks(pack, itertools.chain(*moved, source.blocks(split)))
    with Progress(show_on_stderr).bar(f"writing {split}", expected, "request") as bar:
        written = row_files.write(folder, split, source.spec, parts, bar.update)
    if written != expected:
        raise RuntimeError(f"{expected} requests in split {split!r}, {written} written")
    return written + (len(earlier.columns["train"]) if earlier else 0)


def _pack(read_block: ReadBlock, spec: FeatureSpec, for_training: bool) -> Flat:
    block = read_block()
    _check_ids(block, spec)
    return row_files.pack(block, spec, for_training)


def _check_ids(block: Block, spec: FeatureSpec) -> None:
    """Raise UserError for an id out of range, which a lookup on a device would not detect."""
    requests = block.values["request_id"]
    if requests.min(initial=0) < 0:  # it seeds the order of candidates in an evaluation
        raise UserError(f"request {requests.min()}: request_id must be at least 0")
    for field in STORED:
        values = block.values[field.name]
        if field.ids is None or not values.size:
            continue
        least = int(field.nothing)
        size = field.ids(spec)
        if values.min() < least or values.max() >= size:
            is_wrong = ((values < least) | (values >= size)).reshape(len(values), -1).any(axis=1)
            starts = starts_of(block.numbers[field.of])
            request = np.searchsorted(starts[1:], np.flatnonzero(is_wrong)[0], side="right")
            ids = values[starts[request] : starts[request + 1]]
            raise UserError(
                f"request {block.values['request_id'][request]}: {field.name} must lie in "
                f"[{least}, {size}), found {ids.min()} to {ids.max()}"
            )


def open_dataset(name: str, data_dir: str, made_by: str, thorough: bool = False) -> Dataset:
    """Open the dataset `name` of `config.data.dir`, made by the command `made_by`.

    Large files are checked only by their sizes, or `thorough` by their contents too.

    Raises:
      UserError: the dataset is missing, damaged, or another one; the message names the command.
    """
    directory = directory_of(name, data_dir)
    if not directory.exists():
        versions = ", ".join(sorted(path.name for path in directory.parent.glob("[0-9]*")))
        older = f", only one of another format ({versions})" if versions else ""
        raise UserError(f"no dataset at {directory}{older}; make it with: {made_by}")
    remedy = _remedy(directory, made_by)
    manifest.check(directory, remedy, {"dataset": name}, thorough)
    spec = FeatureSpec.from_json((directory / SPEC_FILE).read_text())
    earlier = directory / _EARLIER_FILE
    files = [SPEC_FILE, _ITEMS_FILE, _CATEGORY_FILE]
    for split in SPLITS:
        for rows_path, counts_path in row_files.all_paths(directory, split):
            files += [rows_path.name, counts_path.name]
    digest = manifest.digest_of_files(directory, files, remedy)
    return Dataset(
        directory=directory,
        provenance={"dataset": f"{name}/{digest}"},
        spec=spec,
        items=Items(
            row_files.load_array(directory / _ITEMS_FILE),
            row_files.load_array(directory / _CATEGORY_FILE),
        ),
        columns={split: row_files.open_columns(directory, spec, split) for split in SPLITS},
        earlier=tuple(json.loads(earlier.read_text())) if earlier.exists() else (),
    )


def _remedy(directory: Path, made_by: str) -> str:
    return f"remove the folder {directory} and make it again with: {made_by}"


def open_column(folder: Path, split: str, columns: Columns, spec: FeatureSpec) -> np.memmap:
    """Open a teacher's probabilities for a split to write to; new ones are NaN everywhere.

    Returns:
      float32 [1 + candidates, T]; the candidates of a request begin at its row of `first_rows`.
    """
    path = _column_path(folder, split)
    if not path.exists():
        shape = (1 + int(columns.counts.retrieved.sum()), len(spec.tasks))
        unfinished = path.with_name(f".{path.name}")
        column = np.lib.format.open_memmap(unfinished, "w+", np.float32, shape)
        column[:] = np.nan
        column.flush()
        unfinished.replace(path)
    return np.lib.format.open_memmap(path, "r+")


def first_rows(columns: Columns) -> Int[np.ndarray, "n"]:
    """Return the row of the first candidate of each request in a column."""
    return 1 + starts_of(columns.counts.retrieved)[:-1]


def with_column(
    dataset: Dataset, folder: Path, made_by: str, version: str, stage: Stage
) -> Dataset:
    """Return a dataset with the probabilities of a teacher in place of those of its log.

    The folder has the column of each split. Of training requests, the teacher has scored the
    candidates that reached `stage`; of other splits, all.

    Raises:
      UserError: the column is missing or damaged, of another teacher than `version`, or of another
        content of the dataset.
    """
    if not folder.exists():
        raise UserError(f"no scores of teacher {version} at {folder}; make them with: {made_by}")
    remedy = _remedy(folder, made_by)
    provenance = manifest.check(folder, remedy)
    if provenance.get("ranker") != version:
        raise UserError(
            f"{folder} has the scores of teacher {provenance.get('ranker')}, and the teacher is "
            f"{version}; {remedy}"
        )
    scored_dataset = provenance.get("dataset")
    if scored_dataset != dataset.provenance["dataset"]:
        raise UserError(
            f"{folder} has the scores of {scored_dataset}, and the dataset is now "
            f"{dataset.provenance['dataset']}; {remedy}"
        )
    files = [_column_path(folder, split).name for split in SPLITS]
    digest = manifest.digest_of_files(folder, files, remedy)
    columns = {}
    for split, logged in dataset.columns.items():
        stored = row_files.load_array(_column_path(folder, split), mmap_mode="r")
        values = np.asarray(stored).view(np.int32)
        num_tasks = values.shape[1]
        column = Rows(
            windows=Windows([values.reshape(-1)], num_tasks),
            type=row_type(dataset.spec, "scored"),
            first=num_tasks * first_rows(logged),
            stride=num_tasks,
        )
        candidates = logged.candidates.first_fields(row_type(dataset.spec, "candidate"))
        scored_stage = stage if split == "train" else Stage.RETRIEVED
        columns[split] = dataclasses.replace(
            logged,
            candidates=candidates._replace(type=logged.candidates.type, column=column),
            counts=logged.counts._replace(scored=logged.counts.reached(scored_stage)),
        )
    spec = dataclasses.replace(dataset.spec, teacher_version=version, teacher_signal="probability")
    provenance = {**dataset.provenance, "scored": f"{folder.name}/{digest}"}
    return dataclasses.replace(dataset, provenance=provenance, spec=spec, columns=columns)


def _column_path(folder: Path, split: str) -> Path:
    return folder / f"teacher-{split}.npy"
