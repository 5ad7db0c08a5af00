"""Reasons for rejecting rows of a log, and records of the rejected rows."""

import enum
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped


class Reason(enum.IntEnum):
    """Reason for rejecting a row; where several apply, the first of them."""

    LISTS_DIFFER = 1
    NO_CANDIDATES = 2
    MISSING_REQUEST = 3
    MISSING_TIME = 4
    MISSING_USER = 5
    MISSING_ITEM = 6
    UNKNOWN_STAGE = 7
    BAD_LABEL = 8
    REQUEST_TOO_LARGE = 9
    SEVERAL_USERS = 10
    DUPLICATE_ITEM = 11
    BEYOND_RETRIEVED = 12


MEANING = {
    Reason.LISTS_DIFFER: "its lists differ in length",
    Reason.NO_CANDIDATES: "its list of items is empty or missing",
    Reason.MISSING_REQUEST: "the request's id is missing or is no id",
    Reason.MISSING_TIME: "the time is missing or is no time",
    Reason.MISSING_USER: "the user's id is missing or is no id",
    Reason.MISSING_ITEM: "the item's id is missing or is no id",
    Reason.UNKNOWN_STAGE: "the stage is missing or is none of data.stages",
    Reason.BAD_LABEL: "a label is neither 0 nor 1",
    Reason.REQUEST_TOO_LARGE: "its request has more rows than half of data.rows_in_memory",
    Reason.SEVERAL_USERS: "its request is another user's, by most of its rows",
    Reason.DUPLICATE_ITEM: "the request has the item already, in a row before",
    Reason.BEYOND_RETRIEVED: "its request has more candidates than funnel.retrieved",
}

# `place` is that of the candidate in the row's lists, -1 for the whole row; `entries` counts the
# candidates that are rejected with it.
DTYPE = np.dtype(
    [("file", "i4"), ("row", "i8"), ("place", "i4"), ("entries", "i4"), ("reason", "i1")]
)
Rejected = Shaped[np.ndarray, "n"]


def rejected_records(
    file: Int[np.ndarray, "n"] | int,
    row: Int[np.ndarray, "n"],
    place: Int[np.ndarray, "n"] | int,
    entries: Int[np.ndarray, "n"] | int,
    reason: Int[np.ndarray, "n"] | int,
) -> Rejected:
    """Records of `DTYPE`."""
    records = np.zeros(len(row), DTYPE)
    for name, value in (
        ("file", file),
        ("row", row),
        ("place", place),
        ("entries", entries),
        ("reason", reason),
    ):
        records[name] = value
    return records


def save_rejected(path: Path, parts: Sequence[Rejected]) -> str:
    """Writes records in the order of the log; returns the path."""
    records = np.concatenate([np.zeros(0, DTYPE), *parts])
    np.save(path, records[np.lexsort([records[name] for name in ("place", "row", "file")])])
    return str(path)


def count_by_reason(records: Rejected) -> Int[np.ndarray, "reasons"]:
    """The number of candidates that each reason has cost; index 0 is no reason."""
    counts = np.zeros(max(Reason) + 1, np.int64)
    np.add.at(counts, records["reason"], records["entries"])
    return counts
