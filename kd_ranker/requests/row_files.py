"""The requests of a split in a file that is read in place: in any order, a few rows at a time.

    rows-SPLIT.bin    int32, packed: the padding rows of labels, of candidates and of the facts for
                      the evaluation; then, for each request, its own row, its labels, its
                      candidates and their facts for the evaluation
    counts-SPLIT.npy  int64 [n, 12]: the place of each of the four in that file, and `Counts`

A dataset that extends another has the files of that one, and its own requests in further parts,
`rows-SPLIT-1.bin` and so on, each with its own counts.

A request is stored in one piece, so reading it is one access to the disk. The parts that count in
every training come first. The candidates of training requests are in sampling order, without facts
for the evaluation; all others are in the order of their source.
"""

import dataclasses
import functools
import itertools
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64
from numpy.lib.stride_tricks import sliding_window_view

from kd_ranker.batch import FeatureSpec
from kd_ranker.requests.columns import Columns, Counts, Rows, columns_of
from kd_ranker.requests.request import runs, starts_of

PLACES = 4
"""The number of columns of a counts file that are places in the rows."""

# The largest gap in bytes between two ranges that are fetched as one.
_GAP = 2**16
# The golden ratio's fractional part.
_GOLDEN = (5**0.5 - 1) / 2


class Flat(NamedTuple):
    """Requests as the numbers of their rows, and their counts with the places among these."""

    numbers: Int32[np.ndarray, "numbers"]
    counts: Int64[np.ndarray, "n columns"]


def paths(folder: Path, split: str, part: int = 0) -> tuple[Path, Path]:
    """Return the files of a part of a split: its rows, and their places."""
    name = f"{split}-{part}" if part else split
    return folder / f"rows-{name}.bin", folder / f"counts-{name}.npy"


def all_paths(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the files of all parts of a split."""
    every = (paths(folder, split, part) for part in itertools.count())
    return list(itertools.takewhile(lambda pair: pair[0].exists(), every))


def link(folder: Path, to: Path, split: str) -> list[str]:
    """Link the files of a split into another folder, or copy them; return their names."""
    found = list(itertools.chain(*all_paths(folder, split)))
    for path in found:
        try:
            os.link(path, to / path.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, to / path.name)
    return [path.name for path in found]


def flat(columns: Columns, for_training: bool) -> Flat:
    """Return at least one request as `write` takes it."""
    counts = columns.counts
    if for_training:
        columns, counts = in_sampling_order(columns), counts._replace(known=0 * counts.known)
    parts = (columns.requests, columns.labels, columns.candidates, columns.known)
    numbers = (np.ones_like(counts.known), counts.shown, counts.retrieved, counts.known)
    widths = [part.width for part in parts]
    sizes = np.stack(numbers, axis=1) * widths
    ends = np.cumsum(sizes).reshape(sizes.shape)
    first = ends - sizes
    whole = np.empty(ends[-1, -1], np.int32)
    for part, of_each, to, width in zip(parts, numbers, first.T, widths, strict=True):
        if of_each.any():
            window = sliding_window_view(whole, width, writeable=True)
            window[runs(to, of_each, width)] = part.firsts(slice(None), of_each)
    return Flat(whole, np.concatenate([first, np.stack(counts, axis=1)], axis=1))


def write(
    folder: Path,
    split: str,
    spec: FeatureSpec,
    parts: Iterable[Flat],
    report: Callable[[int], Any],
) -> int:
    """Write at least one part of requests after those of a split, and return their number.

    The number of requests of each part goes to `report` after the part is written.
    """
    rows_path, counts_path = paths(folder, split, len(all_paths(folder, split)))
    none = columns_of([], spec)
    nothing = np.concatenate([of.values[0] for of in (none.labels, none.candidates, none.known)])
    written, before = [], len(nothing)
    with rows_path.open("wb") as file:
        file.write(nothing.data)
        for numbers, counts in parts:
            counts[:, :PLACES] += before
            written.append(counts)
            before += len(numbers)
            file.write(numbers.data)  # `tofile` would not report why it fails
            report(len(counts))
    whole = np.concatenate(written)
    np.save(counts_path, whole)
    return len(whole)


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """Return an order of n places in which every run is spread evenly over all places.

    The j-th place is the rank of j · φ mod 1 among those of all n, with the golden ratio φ. Any run
    of a Kronecker sequence is spread evenly (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def in_sampling_order(columns: Columns) -> Columns:
    """Reorder candidates so that any run of them is a good sample.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest. Each of these four groups is in `spread_order`. Facts for the
    evaluation keep their order.
    """
    counts, shown = columns.counts, columns.counts.shown
    request = np.repeat(np.arange(len(columns)), shown)
    positive = columns.labels.fields(slice(None), shown)["user_label"].any(axis=1)
    # The size of each of the four groups in a request, and where it begins.
    ends = np.stack([counts.positives, shown, counts.passed, counts.retrieved], axis=1)
    sizes = np.diff(ends, axis=1, prepend=0)
    distinct, which = np.unique(sizes.ravel(), return_inverse=True)
    spread = np.concatenate([spread_order(size) for size in distinct.tolist()])
    within = spread[runs(starts_of(distinct)[:-1][which], sizes.ravel())]
    order = np.repeat((ends - sizes).ravel(), sizes.ravel()) + within
    # The first two groups are mixed, in the order in which they were shown.
    start = starts_of(shown)[:-1]
    by_label = np.argsort(2 * request + ~positive, kind="stable") - start[request]
    of_shown = runs(starts_of(counts.retrieved)[:-1], shown)
    order[of_shown] = by_label[start[request] + order[of_shown]]

    def moved(rows: Rows, numbers: Int[np.ndarray, "n"], order: Int[np.ndarray, "sum"]) -> Rows:
        """Return the rows in the new order; labels cover a prefix of the candidates."""
        which = np.repeat(rows.first, numbers) + rows.stride * order
        first = 1 + starts_of(numbers)[:-1]
        return Rows(rows.values[np.append(rows.nothing, which)], rows.spans, first)

    return dataclasses.replace(
        columns,
        candidates=moved(columns.candidates, counts.retrieved, order),
        labels=moved(columns.labels, shown, order[of_shown]),
    )


def open_columns(folder: Path, spec: FeatureSpec, split: str) -> Columns:
    """Return the requests of a split, backed by their files."""
    files, values, counted = [], [], []
    for rows_path, counts_path in all_paths(folder, split):
        files.append(rows_path.open("rb"))
        mapped = mmap.mmap(files[-1].fileno(), 0, prot=mmap.PROT_READ)
        # A read far from the last one must not read ahead.
        mapped.madvise(mmap.MADV_RANDOM)
        values.append(np.frombuffer(mapped, np.int32))
        counted.append(np.asarray(np.load(counts_path, mmap_mode="r")))
    starts = starts_of(np.array(list(map(len, values))))[:-1]
    numbers = counted[0]
    if len(counted) > 1:
        numbers = np.concatenate(counted)
        numbers[:, :PLACES] += np.repeat(starts, list(map(len, counted)))[:, None]
    none = columns_of([], spec)
    like = (none.labels, none.candidates, none.known)
    nothing = starts_of(np.array([of.width for of in like])).tolist()

    def rows(like: Rows, first: Int[np.ndarray, "n"], nothing: int = 0) -> Rows:
        windows = [sliding_window_view(of, like.width) for of in values]
        every: Any = _Chain(windows, starts) if len(windows) > 1 else windows[0]
        return Rows(every, like.spans, first, like.width, nothing)

    first, counts = numbers.T[:PLACES], Counts(*numbers.T[PLACES:])
    requests = rows(none.requests, first[0])
    labels, candidates, known = map(rows, like, first[1:], nothing[:-1])

    def expect(which: Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]) -> None:
        """Start the reads of many requests, which the disk does during other work."""
        begin = 4 * first[0][which]
        end = 4 * (first[2][which] + numbers * candidates.width)
        gap = begin[1:] - end[:-1]
        splits = (gap < 0) | (gap > _GAP)
        begins, ends = begin[:1].tolist() + begin[1:][splits].tolist(), end[:-1][splits].tolist()
        of_file = np.searchsorted(4 * starts, begins, side="right") - 1
        ranges = zip(of_file.tolist(), begins, ends + end[-1:].tolist(), strict=True)
        for file, start, stop in ranges:
            place = start - 4 * int(starts[file])
            os.posix_fadvise(files[file].fileno(), place, stop - start, os.POSIX_FADV_WILLNEED)

    opened = Columns(requests, candidates, labels, known, counts)
    can_expect = hasattr(os, "posix_fadvise")  # not on macOS
    return dataclasses.replace(opened, expect=expect) if can_expect else opened


class _Chain:
    """The rows of several files, read like one array by row numbers.

    The rows of a file are windows over its numbers, so a row number is a place among the numbers of
    all files.
    """

    def __init__(self, windows: Sequence[Any], starts: Int64[np.ndarray, "files"]) -> None:
        self.windows, self.starts = windows, starts

    def __getitem__(self, index: Any) -> Any:
        """Return copies of rows, int32 [*index, W], or with slices a chain of fewer columns."""
        if isinstance(index, tuple):
            return _Chain([of[index] for of in self.windows], self.starts)
        index = np.asarray(index)
        rows = np.empty((*index.shape, self.windows[0].shape[1]), np.int32)
        of_file = np.searchsorted(self.starts, index, side="right") - 1
        for file, windows in enumerate(self.windows):
            chosen = of_file == file
            if chosen.any():
                rows[chosen] = windows[index[chosen] - self.starts[file]]
        return rows
