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
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from numpy.lib.stride_tricks import sliding_window_view

from kd_ranker.batch import FIELDS, STORED, FeatureSpec, Owner, Request
from kd_ranker.errors import UserError
from kd_ranker.requests.columns import Columns, Counts, Rows, Windows, row_type, width_of
from kd_ranker.requests.request import Block, block_of, runs, starts_of

# The kinds of rows of a request, in the order in which they are stored, by the owners of their
# fields. Histories and the teacher's values are last in a row, so that `needed` can drop them.
_KINDS: Sequence[Sequence[Owner]] = (
    *(("request", "event"), ("shown",), ("candidate", "scored"), ("known",)),
)
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
    retrieved, shown = block.numbers["candidate"], block.numbers["shown"]
    positive: Any = block.values["user_label"].any(axis=1)
    counts = Counts(
        request_id=block.values["request_id"],
        retrieved=retrieved,
        # Stored as it was logged: fewer passed than shown, or more than there are.
        passed=np.minimum(np.maximum(block.values["num_passed"], shown), retrieved),
        shown=shown,
        scored=block.numbers["scored"],
        positives=np.bincount(np.repeat(np.arange(len(shown)), shown)[positive], None, len(shown)),
        known=0 * shown if for_training else block.numbers["known"],
        time=block.values["time"],
    )
    numbers = np.stack([np.ones_like(shown), shown, retrieved, counts.known], axis=1)
    types = [row_type(spec, *owners) for owners in _KINDS]
    sizes = numbers * list(map(width_of, types))
    ends = np.cumsum(sizes).reshape(sizes.shape)
    first, whole = ends - sizes, np.empty(ends[-1, -1], np.int32)
    order = sampling_order(counts, positive) if for_training else {}
    for owners, row, of_each, to in zip(_KINDS, types, numbers.T, first.T, strict=True):
        if of_each.any():
            rows = np.empty(of_each.sum(), row)
            for name in row.names or ():
                rows[name] = _entries(name, block, spec).reshape(rows[name].shape)
            width = width_of(row)
            packed = rows.view(np.int32).reshape(len(rows), width)
            window = sliding_window_view(whole, width, writeable=True)
            window[runs(to, of_each, width)] = packed[order.get(owners[0], slice(None))]
    return Flat(whole, np.concatenate([first, np.stack(counts, axis=1)], axis=1))


def _entries(name: str, block: Block, spec: FeatureSpec) -> Shaped[np.ndarray, "n ..."]:
    """Return a field of all requests; histories and scores are padded at the end."""
    field = _FIELD[name]
    numbers, candidates = block.numbers[field.of], block.numbers["candidate"]
    if name == "history_mask":
        values = np.ones(numbers.sum(), np.bool_)
    elif name == "teacher_probability":
        values = proper_probability(block, spec.teacher_version)
    else:
        values = block.values[name]
    if field.of not in ("event", "scored"):
        return values
    padded = np.full_like(numbers, spec.history_length) if field.of == "event" else candidates
    kept = np.minimum(numbers, padded)  # the last ones
    filled = np.full((padded.sum(), *values.shape[1:]), field.nothing, values.dtype)
    filled[runs(starts_of(padded)[:-1], kept)] = values[runs(starts_of(numbers)[1:] - kept, kept)]
    return filled


def proper_probability(block: Block, version: str) -> Float[np.ndarray, "A T"]:
    """Return the teacher's probabilities, NaN where they were not logged properly.

    A proper probability was written according to the log, by the right model version, and is a
    number in [0, 1].
    """
    probability = block.values["teacher_probability"]
    right = (block.values["teacher_version"] == version) & bool(version)
    written = np.repeat(right, block.numbers["scored"]) & (block.values["teacher_weight"] > 0)
    # A comparison with NaN is False, so NaN needs no separate test.
    in_range = (probability >= 0) & (probability <= 1)
    return np.where(in_range & written[:, None], probability, np.float32(np.nan))


@functools.lru_cache(maxsize=4096)
def spread_order(number: int) -> Int[np.ndarray, "number"]:
    """Return an order of n places in which every run is spread evenly over all places.

    The j-th place is the rank of j · φ mod 1 among those of all n, with the golden ratio φ. Any run
    of a Kronecker sequence is spread evenly (Sós, 1958, the three-distance theorem).

    >>> spread_order(8).tolist()
    [0, 5, 2, 7, 4, 1, 6, 3]
    """
    return np.argsort(np.argsort(np.arange(number) * _GOLDEN % 1.0))


def sampling_order(
    counts: Counts, positive: Bool[np.ndarray, "labels"]
) -> dict[Owner, Int[np.ndarray, "sum"]]:
    """Return the order of candidates, and of labels, in which any run is a good sample.

    Candidates with a positive label come first, then the others that were shown, then the others
    that were passed, then the rest. Each of these four groups is in `spread_order`.
    """
    shown, starts = counts.shown, starts_of(counts.retrieved)[:-1]
    # The size of each of the four groups in a request, and where it begins.
    ends = np.stack([counts.positives, shown, counts.passed, counts.retrieved], axis=1)
    sizes = np.diff(ends, axis=1, prepend=0)
    distinct, which = np.unique(sizes.ravel(), return_inverse=True)
    spread = np.concatenate([spread_order(size) for size in distinct.tolist()])
    within = spread[runs(starts_of(distinct)[:-1][which], sizes.ravel())]
    order = np.repeat((starts[:, None] + ends - sizes).ravel(), sizes.ravel()) + within
    # The first two groups are mixed, in the order in which they were shown.
    request = np.repeat(np.arange(len(shown)), shown)
    by_label = np.argsort(2 * request + ~positive, kind="stable")
    of_shown = runs(starts, shown)
    # Where the labels of a request begin, less where its candidates do.
    ahead = np.repeat(starts_of(shown)[:-1] - starts, shown)
    labels = by_label[order[of_shown] + ahead]
    order[of_shown] = labels - ahead
    return {"candidate": order, "shown": labels}


def columns_of(
    requests: Sequence[Request], spec: FeatureSpec, for_training: bool = False
) -> Columns:
    """Return the columns of at least one request, in memory."""
    return columns_of_block(block_of(requests, spec), spec, for_training)


def columns_of_block(block: Block, spec: FeatureSpec, for_training: bool = False) -> Columns:
    """Return the columns of a block, in memory."""
    nothing, (numbers, counts) = _padding(spec), pack(block, spec, for_training)
    counts[:, :PLACES] += len(nothing)
    return _columns([np.concatenate([nothing, numbers])], counts, spec)


def block_at(columns: Columns, spec: FeatureSpec, requests: slice) -> Block:
    """Return some requests of a split as a block; training requests in their stored order.

    Teacher probabilities that do not count are NaN.
    """
    counts = columns.counts.of(requests)
    own = columns.requests.fields(requests, np.ones_like(counts.shown))
    is_event = own["history_mask"] > 0
    candidates = columns.candidates.fields(requests, counts.retrieved)
    scored = runs(starts_of(counts.retrieved)[:-1], counts.scored)
    probability = candidates["teacher_probability"][scored]
    values: dict[str, Any] = {
        **own,
        **{name: own[name][is_event] for name in ("history_id", "history_features")},
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
    types = {field.name: object if field.stored is str else field.stored for field in STORED}
    return Block({name: values[name].astype(of) for name, of in types.items()}, numbers)


def _padding(spec: FeatureSpec) -> Int32[np.ndarray, "numbers"]:
    """Return the padding rows of labels, of candidates and of the facts for the evaluation."""
    row = row_type(spec, *itertools.chain(*_KINDS[1:]))
    nothing = np.zeros(1, row)
    for name in row.names or ():
        nothing[name] = _FIELD[name].nothing
    return nothing.view(np.int32)


def _columns(
    arrays: Sequence[Int32[np.ndarray, "_"]],
    counts: Int64[np.ndarray, "n columns"],
    spec: FeatureSpec,
) -> Columns:
    """Return the columns of requests from the arrays of their numbers."""
    types = [row_type(spec, *owners) for owners in _KINDS]
    # A request is never padding.
    nothing = [0, *starts_of(np.array(list(map(width_of, types[1:])))).tolist()]
    requests, labels, candidates, known = (
        Rows(Windows(arrays, width_of(row)), row, first, width_of(row), padding)
        for row, first, padding in zip(types, counts.T, nothing, strict=False)
    )
    return Columns(requests, candidates, labels, known, Counts(*counts.T[PLACES:]))


def paths(folder: Path, split: str, part: int = 0) -> tuple[Path, Path]:
    """Return the files of a part of a split: its rows, and their places."""
    name = f"{split}-{part}" if part else split
    return folder / f"rows-{name}.bin", folder / f"counts-{name}.npy"


def all_paths(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """Return the files of all parts of a split."""
    every = (paths(folder, split, part) for part in itertools.count())
    return list(itertools.takewhile(lambda pair: pair[0].exists(), every))


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
    nothing = _padding(spec)
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
    files, arrays, counted = [], [], []
    for rows_path, counts_path in all_paths(folder, split):
        files.append(rows_path.open("rb"))
        mapped = mmap.mmap(files[-1].fileno(), 0, prot=mmap.PROT_READ)
        # A read far from the last one must not read ahead.
        mapped.madvise(mmap.MADV_RANDOM)
        arrays.append(np.frombuffer(mapped, np.int32))
        counted.append(np.asarray(load_array(counts_path, mmap_mode="r")))
    starts = starts_of(np.array(list(map(len, arrays))))[:-1]
    counts = counted[0]
    if len(counted) > 1:
        counts = np.concatenate(counted)
        counts[:, :PLACES] += np.repeat(starts, list(map(len, counted)))[:, None]
    opened = _columns(arrays, counts, spec)

    def expect(which: Int[np.ndarray, "R"], numbers: Int[np.ndarray, "R"]) -> None:
        """Start the reads of many requests, which the disk does during other work."""
        begin = opened.requests.first[which]
        end = opened.candidates.first[which] + numbers * opened.candidates.stride
        of_file = np.searchsorted(starts, begin, side="right") - 1
        gap = begin[1:] - end[:-1]
        is_end = np.ones(len(begin) + 1, np.bool_)
        is_end[1:-1] = (gap < 0) | (gap > _GAP) | (np.diff(of_file) > 0)
        begin, end, of_file = begin[is_end[:-1]], end[is_end[1:]], of_file[is_end[:-1]]
        ranges = (of_file, 4 * (begin - starts[of_file]), 4 * (end - begin))
        for file, start, size in zip(*(of.tolist() for of in ranges), strict=True):
            os.posix_fadvise(files[file].fileno(), start, size, os.POSIX_FADV_WILLNEED)

    can_expect = hasattr(os, "posix_fadvise")  # not on macOS
    return dataclasses.replace(opened, expect=expect) if can_expect else opened
