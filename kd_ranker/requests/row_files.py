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
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from numpy.lib.stride_tricks import sliding_window_view

from kd_ranker.batch import FIELDS, STORED, FeatureSpec, Owner, Request
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Counts, Rows, Windows, row_type, width_of
from kd_ranker.requests.request import Block, block_of, ranges, starts_of

# The kinds of rows of a request, in the order in which they are stored, by the owners of their
# fields. Histories and the teacher's values are last in a row, so that `needed` can drop them.
_KINDS: Sequence[Sequence[Owner]] = [
    ("request", "event"),
    ("shown",),
    ("candidate", "scored"),
    ("known",),
]
PLACES = len(_KINDS)
"""The number of columns of a counts file that are places in the rows."""

_FIELD = {field.name: field for field in FIELDS}
# The largest gap between two ranges that are fetched as one, in numbers.
_GAP = 2**14
# The golden ratio's fractional part.
_GOLDEN = (5**0.5 - 1) / 2


class Flat(NamedTuple):
    """Requests as the numbers of their rows, and their counts with the places among these."""

    numbers: Int32[np.ndarray, "numbers"]
    counts: Int64[np.ndarray, "n columns"]


def pack(block: Block, spec: FeatureSpec, for_training: bool = False) -> Flat:
    """Return at least one request as the numbers of its rows; see above for those of training."""
    retrieved = block.numbers["candidate"]
    shown = block.numbers["shown"]
    is_positive: Any = block.values["user_label"].any(axis=1)
    request_of_label = np.repeat(np.arange(len(shown)), shown)
    counts = Counts(
        request_id=block.values["request_id"],
        retrieved=retrieved,
        # Stored as it was logged: fewer passed than shown, or more than there are.
        passed=np.minimum(np.maximum(block.values["num_passed"], shown), retrieved),
        shown=shown,
        scored=block.numbers["scored"],
        positives=np.bincount(request_of_label[is_positive], minlength=len(shown)),
        known=np.zeros_like(shown) if for_training else block.numbers["known"],
        time=block.values["time"],
    )
    types = [row_type(spec, *owners) for owners in _KINDS]
    widths = [width_of(row) for row in types]
    # Of each request and kind: how many rows, how many numbers, and where these begin.
    num_rows = np.stack([np.ones_like(shown), shown, retrieved, counts.known], axis=1)
    sizes = num_rows * widths
    ends = np.cumsum(sizes).reshape(sizes.shape)
    places = ends - sizes
    flat = np.empty(ends[-1, -1], np.int32)
    order = sampling_order(counts, is_positive) if for_training else {}
    for kind, owners in enumerate(_KINDS):
        if num_rows[:, kind].any():
            rows = _rows(types[kind], num_rows[:, kind].sum(), block, spec)
            if owners[0] in order:
                rows = rows[order[owners[0]]]
            window = sliding_window_view(flat, widths[kind], writeable=True)
            window[ranges(places[:, kind], num_rows[:, kind], widths[kind])] = rows
    return Flat(flat, np.concatenate([places, np.stack(counts, axis=1)], axis=1))


def _rows(
    row: np.dtype, number: int, block: Block, spec: FeatureSpec
) -> Int32[np.ndarray, "number W"]:
    """Return the rows of one kind of a block, as numbers."""
    rows = np.empty(number, row)
    for name in row.names or ():
        rows[name] = _entries(name, block, spec).reshape(rows[name].shape)
    return rows.view(np.int32).reshape(number, width_of(row))


def _entries(name: str, block: Block, spec: FeatureSpec) -> Shaped[np.ndarray, "n ..."]:
    """Return a field of all requests; histories and scores are padded at the end."""
    field = _FIELD[name]
    numbers = block.numbers[field.of]
    if name == "history_mask":
        values = np.ones(numbers.sum(), np.bool_)
    elif name == "teacher_probability":
        values = proper_probability(block, spec.teacher_version)
    else:
        values = block.values[name]
    if field.of not in ("event", "scored"):
        return values
    if field.of == "event":
        padded_numbers = np.full_like(numbers, spec.history_length)
    else:
        padded_numbers = block.numbers["candidate"]
    # Of more entries than there is room for, the last ones remain.
    remaining = np.minimum(numbers, padded_numbers)
    from_rows = ranges(starts_of(numbers)[1:] - remaining, remaining)
    to_rows = ranges(starts_of(padded_numbers)[:-1], remaining)
    padded = np.full((padded_numbers.sum(), *values.shape[1:]), field.nothing, values.dtype)
    padded[to_rows] = values[from_rows]
    return padded


def proper_probability(block: Block, version: str) -> Float[np.ndarray, "A T"]:
    """Return the teacher's probabilities, NaN where they were not logged properly.

    A proper probability was written according to the log, by the right model version, and is a
    number in [0, 1].
    """
    probability = block.values["teacher_probability"]
    has_version = (block.values["teacher_version"] == version) & bool(version)
    is_written = np.repeat(has_version, block.numbers["scored"])
    is_written &= block.values["teacher_weight"] > 0
    # A comparison with NaN is False, so NaN needs no separate test.
    is_in_range = (probability >= 0) & (probability <= 1)
    return np.where(is_in_range & is_written[:, None], probability, np.float32(np.nan))


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """Return an order of n places in which every stretch is spread evenly over all places.

    The j-th place is the rank of j · φ mod 1 among those of all n, with the golden ratio φ. Any
    stretch of a Kronecker sequence is spread evenly (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def sampling_order(
    counts: Counts, positive: Bool[np.ndarray, "labels"]
) -> dict[Owner, Int[np.ndarray, "sum"]]:
    """Return the order of candidates, and of labels, in which any stretch is a good sample.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest. Each of these four groups is in `spread_order`.
    """
    shown = counts.shown
    starts = starts_of(counts.retrieved)[:-1]
    # The size of each of the four groups in a request, and where it begins.
    ends = np.stack([counts.positives, shown, counts.passed, counts.retrieved], axis=1)
    sizes = np.diff(ends, axis=1, prepend=0)
    group_starts = starts[:, None] + ends - sizes
    # The spread order of each size occurs once; all groups of that size take it.
    distinct_sizes, which_size = np.unique(sizes.ravel(), return_inverse=True)
    spread_orders = np.concatenate([spread_order(size) for size in distinct_sizes.tolist()])
    spread_starts = starts_of(distinct_sizes)[:-1][which_size]
    order_in_group = spread_orders[ranges(spread_starts, sizes.ravel())]
    order = np.repeat(group_starts.ravel(), sizes.ravel()) + order_in_group
    # The log mixes the first two groups. So sort the labels of each request, positives first, and
    # take the spread order of both groups from that list. A label has an index among all labels,
    # and its candidate one among all candidates.
    candidate_of_label = ranges(starts, shown)
    label_of_candidate = np.empty(len(order), np.int64)
    label_of_candidate[candidate_of_label] = np.arange(len(positive))
    request = np.repeat(np.arange(len(shown)), shown)
    positives_first = np.argsort(2 * request + ~positive, kind="stable")
    label_order = positives_first[label_of_candidate[order[candidate_of_label]]]
    order[candidate_of_label] = candidate_of_label[label_order]
    return {"candidate": order, "shown": label_order}


def columns_of(
    requests: Sequence[Request], spec: FeatureSpec, for_training: bool = False
) -> Columns:
    """Return the columns of at least one request, in memory."""
    return columns_of_block(block_of(requests, spec), spec, for_training)


def columns_of_block(block: Block, spec: FeatureSpec, for_training: bool = False) -> Columns:
    """Return the columns of a block, in memory."""
    padding = _padding(spec)
    numbers, counts = pack(block, spec, for_training)
    counts[:, :PLACES] += len(padding)
    return _columns([np.concatenate([padding, numbers])], counts, spec)


def block_at(columns: Columns, spec: FeatureSpec, requests: slice) -> Block:
    """Return some requests of a split as a block; training requests in their stored order.

    Teacher probabilities that do not count are NaN.
    """
    counts = columns.counts.of(requests)
    request_fields = columns.requests.fields(requests, np.ones_like(counts.shown))
    is_event = request_fields["history_mask"] > 0
    candidates = columns.candidates.fields(requests, counts.retrieved)
    scored = ranges(starts_of(counts.retrieved)[:-1], counts.scored)
    probability = candidates["teacher_probability"][scored]
    values: dict[str, Any] = {
        **request_fields,
        "history_id": request_fields["history_id"][is_event],
        "history_features": request_fields["history_features"][is_event],
        **candidates,
        **columns.labels.fields(requests, counts.shown),
        **columns.known.fields(requests, counts.known),
        "request_id": counts.request_id,
        "time": counts.time,
        "num_passed": counts.passed,
        "teacher_probability": probability,
        "teacher_weight": (~np.isnan(probability)).any(axis=1),
        "teacher_version": np.where(counts.scored > 0, spec.teacher_version, ""),
    }
    numbers: dict[Owner, Any] = {
        "request": np.ones_like(counts.shown),
        "event": is_event.sum(axis=1),
        "candidate": counts.retrieved,
        "shown": counts.shown,
        "scored": counts.scored,
        "known": counts.known,
    }
    stored = {}
    for field in STORED:
        dtype = object if field.stored is str else field.stored
        stored[field.name] = values[field.name].astype(dtype)
    return Block(stored, numbers)


def _padding(spec: FeatureSpec) -> Int32[np.ndarray, "numbers"]:
    """Return the padding rows of labels, of candidates and of the facts for the evaluation."""
    row = row_type(spec, *itertools.chain(*_KINDS[1:]))
    padding = np.zeros(1, row)
    for name in row.names or ():
        padding[name] = _FIELD[name].nothing
    return padding.view(np.int32)


def _columns(
    arrays: Sequence[Int32[np.ndarray, "_"]],
    counts: Int64[np.ndarray, "n columns"],
    spec: FeatureSpec,
) -> Columns:
    """Return the columns of requests from the arrays of their numbers."""
    types = [row_type(spec, *owners) for owners in _KINDS]
    widths = [width_of(row) for row in types]
    # A request is never padding.
    padding = [0, *starts_of(np.array(widths[1:]))[:-1].tolist()]
    requests, labels, candidates, known = (
        Rows(
            windows=Windows(arrays, widths[kind]),
            type=types[kind],
            first=counts[:, kind],
            stride=widths[kind],
            nothing=padding[kind],
        )
        for kind in range(PLACES)
    )
    return Columns(requests, candidates, labels, known, Counts(*counts.T[PLACES:]))


def paths(folder: Path, split: str, part: int = 0) -> tuple[Path, Path]:
    """Return the files of a part of a split: its rows, and their places."""
    name = f"{split}-{part}" if part else split
    return folder / f"rows-{name}.bin", folder / f"counts-{name}.npy"


def all_paths(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the files of all parts of a split."""
    parts = []
    for part in itertools.count():
        rows_path, counts_path = paths(folder, split, part)
        if not rows_path.exists():
            break
        parts.append((rows_path, counts_path))
    return parts


def link(file: Path, to: Path) -> None:
    """Link a file to another path, or copy it: to another disk, or to one without links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


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
    padding = _padding(spec)
    counts_of_parts = []
    num_written = len(padding)
    with rows_path.open("wb") as file:
        file.write(padding.data)
        for numbers, counts in parts:
            counts[:, :PLACES] += num_written
            counts_of_parts.append(counts)
            file.write(numbers.data)  # `tofile` would not report why it fails
            num_written += len(numbers)
            report(len(counts))
    all_counts = np.concatenate(counts_of_parts)
    np.save(counts_path, all_counts)
    return len(all_counts)


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> Any:
    """Load the array of a file; UserError for one that holds something else, such as a pickle."""
    try:
        loaded = np.load(path, mmap_mode=mmap_mode)
    except (ValueError, EOFError) as error:
        # Without the text of NumPy, which advises to load a pickle.
        raise UserError(
            f"{path} is damaged: it is no array of numbers; remove the folder {path.parent} and "
            "make it again"
        ) from error
    return loaded


def open_columns(folder: Path, spec: FeatureSpec, split: str) -> Columns:
    """Return the requests of a split, backed by their files."""
    files = []
    arrays = []
    counts_of_files = []
    for rows_path, counts_path in all_paths(folder, split):
        file = rows_path.open("rb")
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        # A read far from the last one must not read ahead.
        mapped.madvise(mmap.MADV_RANDOM)
        files.append(file)
        arrays.append(np.frombuffer(mapped, np.int32))
        counts_of_files.append(np.asarray(load_array(counts_path, mmap_mode="r")))
    file_starts = starts_of(np.array([len(array) for array in arrays]))[:-1]
    counts = counts_of_files[0]
    if len(counts_of_files) > 1:
        counts = np.concatenate(counts_of_files)
        num_requests = [len(counts_of_file) for counts_of_file in counts_of_files]
        counts[:, :PLACES] += np.repeat(file_starts, num_requests)[:, None]
    columns = _columns(arrays, counts, spec)
    if not hasattr(os, "posix_fadvise"):  # on macOS
        return columns
    prefetch = functools.partial(_prefetch, files, file_starts, columns)
    return dataclasses.replace(columns, expect=prefetch)


def _prefetch(
    files: Sequence[BinaryIO],
    file_starts: Int[np.ndarray, "files"],
    columns: Columns,
    requests: Int[np.ndarray, "R"],
    num_candidates: Int[np.ndarray, "R"],
) -> None:
    """Start the reads of many requests, which the disk does during other work.

    Places count through all files, one after the other; requests that are close together in a file
    are read as one range.
    """
    begin = columns.requests.first[requests]
    end = columns.candidates.first[requests] + num_candidates * columns.candidates.stride
    file_index = np.searchsorted(file_starts, begin, side="right") - 1
    gap = begin[1:] - end[:-1]
    # True between two ranges, before the first one and after the last one.
    is_boundary = np.ones(len(begin) + 1, np.bool_)
    is_boundary[1:-1] = (gap < 0) | (gap > _GAP) | (np.diff(file_index) > 0)
    is_first = is_boundary[:-1]
    is_last = is_boundary[1:]
    file_index = file_index[is_first]
    offsets = 4 * (begin[is_first] - file_starts[file_index])
    sizes = 4 * (end[is_last] - begin[is_first])
    for index, offset, size in zip(
        file_index.tolist(), offsets.tolist(), sizes.tolist(), strict=True
    ):
        os.posix_fadvise(files[index].fileno(), offset, size, os.POSIX_FADV_WILLNEED)
