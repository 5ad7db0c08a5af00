"""Sums over requests in their last order: moments of numbers, and further totals for the report.

A piece is added up after the other, in their order, so no bit of a sum depends on who adds up.
Moments are those of training requests alone, and rejected rows count nowhere.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int, Int64, Num

from kd_ranker.batch import Stage
from kd_ranker.requests.pool import Runner
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.ordered import Piece, read_piece

# How finely the teacher's probabilities are compared with labels.
TEACHER_BINS = 20


class Moments(NamedTuple):
    """Moments of the numbers of training requests, missing ones left out."""

    number: int
    mean: float
    squares: float  # Σ (x − mean)²
    low: float
    high: float

    @property
    def deviation(self) -> float:
        """The standard deviation, √(squares / number)."""
        return float(np.sqrt(self.squares / self.number)) if self.number else 0.0


NO_MOMENTS = Moments(0, 0.0, 0.0, float("inf"), float("-inf"))


class Statistics(NamedTuple):
    """Sums over all pieces.

    Attributes:
      moments: dense feature of user, context and candidates -> its moments.
      totals: further numbers.
      first: the earliest time in each split.
      last: the latest.
    """

    moments: dict[str, Moments]
    totals: dict[str, Num[np.ndarray, "..."]]
    first: Int64[np.ndarray, "splits"]
    last: Int64[np.ndarray, "splits"]


def add_up(layout: LogLayout, folder: Path, pieces: Sequence[Piece], run: Runner) -> Statistics:
    """Adds up the pieces of the files in a folder, in their order."""
    calls = [(layout, folder, piece) for piece in pieces]
    return functools.reduce(_both, run(_sums_of, calls, "adding up"))


def _sums_of(layout: LogLayout, folder: Path, piece: Piece) -> Statistics:
    """The sums over one piece."""
    requests, candidates = read_piece(folder, piece)
    moments = {}
    if piece.split == "train":
        for feature in layout.of("user", "context", "candidate", kind="dense"):
            table = requests if feature.of_request else candidates
            moments[feature.name] = moments_of(floats_of(table, f"feature:{feature.name}"))
    split, time = SPLITS.index(piece.split), requests["time"].to_numpy()
    latest = np.iinfo(np.int64)
    first, last = (np.full(len(SPLITS), of, np.int64) for of in (latest.max, latest.min))
    first[split], last[split] = time.min(), time.max()
    return Statistics(moments, _totals(layout, piece, requests, candidates), first, last)


def _both(one: Statistics, other: Statistics) -> Statistics:
    moments = one.moments | {
        name: merge_moments(one.moments.get(name, NO_MOMENTS), of)
        for name, of in other.moments.items()
    }
    totals = {name: total + other.totals[name] for name, total in one.totals.items()}
    first, last = np.minimum(one.first, other.first), np.maximum(one.last, other.last)
    return Statistics(moments, totals, first, last)


def floats_of(table: pa.Table, name: str) -> Float64[np.ndarray, "n"]:
    """A column of numbers, NaN where there is none."""
    column = table[name].combine_chunks().cast(pa.float64()).fill_null(float("nan"))
    return column.to_numpy(zero_copy_only=False)


def moments_of(number: Num[np.ndarray, "n"]) -> Moments:
    """The moments of the numbers that are not NaN."""
    number = number[~np.isnan(number)].astype(np.float64)
    if not len(number):
        return NO_MOMENTS
    mean = float(number.mean())
    squares = float(np.square(number - mean).sum())
    return Moments(len(number), mean, squares, float(number.min()), float(number.max()))


def merge_moments(one: Moments, other: Moments) -> Moments:
    """The moments of both (Chan, Golub and LeVeque, 1979)."""
    if not (one.number and other.number):
        return one if one.number else other
    number = one.number + other.number
    distance = other.mean - one.mean
    return Moments(
        number,
        one.mean + distance * other.number / number,
        one.squares + other.squares + distance**2 * one.number * other.number / number,
        min(one.low, other.low),
        max(one.high, other.high),
    )


def _totals(
    layout: LogLayout, piece: Piece, requests: pa.Table, candidates: pa.Table
) -> dict[str, np.ndarray]:
    split = SPLITS.index(piece.split)

    def of_split(total: Any) -> Num[np.ndarray, "splits ..."]:
        each = np.zeros((len(SPLITS), *np.shape(total)), np.asarray(total).dtype)
        each[split] = total
        return each

    stage = candidates["stage"].to_numpy()
    weight = floats_of(candidates, "label_weight")
    shown = stage == Stage.SHOWN
    labelled = shown & (weight > 0)
    # An array a task and a stage: sums over the rows of a narrow table take ten times as long.
    labels = [candidates[f"label:{task}"].to_numpy() for task in layout.tasks]
    positive = [label > 0 for label in labels]
    stages = [stage == of for of in [*Stage][1:]]
    owner = candidates["number"].to_numpy() - piece.requests[0]
    size, labels_of_request = (
        np.bincount(owner, weights=of, minlength=requests.num_rows) for of in (None, labelled)
    )
    counts = floats_of(candidates, "teacher_weight") > 0
    scored = [
        floats_of(candidates, f"teacher:{task}")
        if task in layout.scored_tasks
        else np.full(len(stage), np.nan)
        for task in layout.tasks
    ]
    with np.errstate(invalid="ignore"):
        proper = [(of >= 0) & (of <= layout.highest_teacher_value) & counts for of in scored]
    number = np.count_nonzero
    return {
        "requests": of_split(requests.num_rows),
        "candidates": of_split(len(stage)),
        "stages": of_split([number(of) for of in stages]),
        "without_label": of_split(number(labels_of_request == 0)),
        "several_times": requests["moved"].to_numpy(zero_copy_only=False).sum(),
        "several_users": (requests["users"].to_numpy() > 1).sum(),
        "candidates_a_request": np.bincount(size, minlength=layout.retrieved + 1),
        "labelled": of_split(number(labelled)),
        "positives": of_split([number(labelled & of) for of in positive]),
        "label_weight": of_split(weight[labelled].sum()),
        "weighted_positives": of_split([weight[labelled & of].sum() for of in positive]),
        "positives_not_shown": np.array([number(of & ~shown) for of in positive]),
        "teacher_proper": of_split([[number(of & at) for at in stages] for of in proper]),
        "calibration": np.stack(
            [
                _calibration(of, rows & labelled, label, weight)
                for of, rows, label in zip(scored, proper, labels, strict=True)
            ]
        ),
    }


def _calibration(
    probability: Float64[np.ndarray, "n"],
    chosen: Bool[np.ndarray, "n"],
    label: Int[np.ndarray, "n"],
    weight: Float64[np.ndarray, "n"],
) -> Float64[np.ndarray, "bins 3"]:
    """Σ w, Σ w p and Σ w y by bins of the probability p, for labels y of weight w."""
    p, w = probability[chosen], weight[chosen]
    place = np.minimum(p * TEACHER_BINS, TEACHER_BINS - 1).astype(int)
    sums = [
        np.bincount(place, weights=w * value, minlength=TEACHER_BINS)
        for value in (1.0, p, label[chosen])
    ]
    return np.stack(sums, axis=1)
