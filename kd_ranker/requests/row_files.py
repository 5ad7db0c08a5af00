"""The requests of a split in a file that is read in place: in any order, a few rows at a time.

    rows-SPLIT.bin    int32, packed: the padding rows of labels, of candidates and of the facts for
                      the evaluation; then, for each request, its own row, its labels, its
                      candidates and their facts for the evaluation
    counts-SPLIT.npy  int64 [n, 12]: the place of each of the four in that file, and `Counts`

A request is stored in one piece, so reading it is one access to the disk. The parts that count in
every training come first. The candidates of training requests are in sampling order, without facts
for the evaluation; all others are in the order of their source.
"""

import dataclasses
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64
from numpy.lib.stride_tricks import sliding_window_view

from kd_ranker.batch import FeatureSpec
from kd_ranker.requests.block import Block
from kd_ranker.requests.columns import (
    Columns,
    Counts,
    Rows,
    columns_of,
    columns_of_block,
    in_sampling_order,
)
from kd_ranker.requests.ragged import runs

# The largest gap in bytes between two ranges that are fetched as one.
_GAP = 2**16


class _First(NamedTuple):
    """The place of each part of a request in a file, in numbers from its start."""

    requests: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    candidates: Int[np.ndarray, "n"]
    known: Int[np.ndarray, "n"]


PLACES = len(_First._fields)
"""The number of columns of a counts file that are places in the rows."""


def paths(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the files of a split: its rows, and their places."""
    return folder / f"rows-{split}.bin", folder / f"counts-{split}.npy"


def parts_of(shard: Path) -> tuple[Path, Path]:
    """Return the files of a shard, which `join` combines into those of the split."""
    return shard.with_name(f"{shard.name}.rows"), shard.with_name(f"{shard.name}.counts")


def flat(
    block: Block, spec: FeatureSpec, for_training: bool, before: int
) -> tuple[Int32[np.ndarray, "numbers"], Int64[np.ndarray, "n columns"]]:
    """Return the contents of both files for at least one request, after `before` numbers."""
    columns = columns_of_block(block, spec)
    if for_training:
        known = np.zeros_like(columns.counts.known)
        columns = dataclasses.replace(
            in_sampling_order(columns), counts=columns.counts._replace(known=known)
        )
    counts = columns.counts
    parts = (columns.requests, columns.labels, columns.candidates, columns.known)
    numbers = (np.ones_like(counts.known), counts.shown, counts.retrieved, counts.known)
    widths = [part.values.shape[1] for part in parts]
    sizes = np.stack(numbers, axis=1) * widths
    ends = np.cumsum(sizes).reshape(sizes.shape)
    first = ends - sizes
    whole = np.empty(ends[-1, -1], np.int32)
    for part, of_each, to, width in zip(parts, numbers, first.T, widths, strict=True):
        if of_each.any():
            window = sliding_window_view(whole, width, writeable=True)
            window[runs(to, of_each, width)] = part.values[runs(part.first, of_each, part.stride)]
    return whole, np.concatenate([first + before, np.stack(counts, axis=1)], axis=1)


def _nothing(spec: FeatureSpec) -> list[Rows]:
    """Return the padding rows, in the order in which they begin a file."""
    none = columns_of([], spec)
    return [none.labels, none.candidates, none.known]


def join(shards: Sequence[Path], folder: Path, split: str, spec: FeatureSpec) -> int:
    """Combine the files of shards into those of a split, and return the number of its requests."""
    rows_path, counts_path = paths(folder, split)
    nothing = np.concatenate([rows.values[0] for rows in _nothing(spec)])
    counts, before = [], len(nothing)
    with rows_path.open("wb") as file:
        file.write(nothing.tobytes())
        for rows, count in map(parts_of, shards):
            with rows.open("rb") as part:
                shutil.copyfileobj(part, file, 2**24)
            of_shard = np.fromfile(count, np.int64).reshape(-1, PLACES + len(Counts._fields))
            of_shard[:, :PLACES] += before
            counts.append(of_shard)
            before += rows.stat().st_size // 4
            rows.unlink()
            count.unlink()
    whole = np.concatenate(counts)
    np.save(counts_path, whole)
    return len(whole)


def open_columns(folder: Path, spec: FeatureSpec, split: str) -> Columns:
    """Return the requests of a split, backed by their files.

    Raises:
      ValueError: the files are incomplete.
    """
    rows_path, counts_path = paths(folder, split)
    numbers = np.asarray(np.load(counts_path, mmap_mode="r"))
    first, counts = _First(*numbers.T[:PLACES]), Counts(*numbers.T[PLACES:])
    file = rows_path.open("rb")
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    # A read far from the last one must not read ahead.
    mapped.madvise(mmap.MADV_RANDOM)
    values = np.frombuffer(mapped, np.int32)
    none = columns_of([], spec)
    places = np.cumsum([0, *(rows.values.shape[1] for rows in _nothing(spec))]).tolist()

    def rows(like: Rows, first: Int[np.ndarray, "n"], nothing: int = 0) -> Rows:
        width = like.values.shape[1]
        return Rows(sliding_window_view(values, width), like.spans, first, width, nothing)

    columns = Columns(
        requests=rows(none.requests, first.requests),
        labels=rows(none.labels, first.labels, places[0]),
        candidates=rows(none.candidates, first.candidates, places[1]),
        known=rows(none.known, first.known, places[2]),
        counts=counts,
        kept=counts.retrieved,
        expect=_fetching(file, first, none.candidates.values.shape[1]),
    )
    end = int(first.known[-1] + counts.known[-1] * columns.known.stride)
    if end != len(values):
        raise ValueError(f"{rows_path.name} has {len(values)} numbers of {end}")
    return columns


def _fetching(
    file: Any, first: _First, width: int
) -> Callable[[Int[np.ndarray, "R"], Int[np.ndarray, "R"]], None]:
    """Build `Columns.expect`, by which the disk reads many pieces at once during other work."""
    if not hasattr(os, "posix_fadvise"):
        return lambda *_: None

    def expect(requests: Int[np.ndarray, "R"], candidates: Int[np.ndarray, "R"]) -> None:
        begin = 4 * first.requests[requests]
        end = 4 * (first.candidates[requests] + candidates * width)
        gap = begin[1:] - end[:-1]
        apart = (gap < 0) | (gap > _GAP)
        begins, ends = begin[:1].tolist() + begin[1:][apart].tolist(), end[:-1][apart].tolist()
        for start, stop in zip(begins, ends + end[-1:].tolist(), strict=True):
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    return expect
