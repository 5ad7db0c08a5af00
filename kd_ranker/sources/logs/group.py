"""The third pass, a bucket at a time: rows become requests, with their candidates in funnel order.

What is wrong with a row only beside others is found here. Nothing depends on the order of the log's
rows but which of two rows is the first, where they contradict each other.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from kd_ranker.batch import Stage
from kd_ranker.distillation.teacher_signal import probability_of_rank
from kd_ranker.sources.logs import candidate_rows, frames, statistics
from kd_ranker.sources.logs.frames import Frame, array_of, num_rows, take_rows
from kd_ranker.sources.logs.keys import look_up, share_of
from kd_ranker.sources.logs.layout import Layout
from kd_ranker.sources.logs.reasons import Reason, count_by_reason, rejected, save
from kd_ranker.sources.logs.statistics import Requests, Statistics


class Grouped(NamedTuple):
    """What the third pass makes of a bucket.

    Attributes:
      heads: the path of the requests.
      rows: the path of their candidates.
      num_requests: in train and in test.
      candidate_rows: split -> the path of where its candidates were in the log.
      rejected: the path of records.
      counts: how many candidates each reason has cost.
      used: how many candidates are left.
      statistics: of what is left.
    """

    heads: str
    rows: str
    num_requests: dict[str, int]
    candidate_rows: dict[str, str]
    rejected: str
    counts: Int64[np.ndarray, "reasons"]
    used: int
    statistics: Statistics


def group_bucket(
    layout: Layout,
    cutoff: int | None,
    row_runs: list[tuple[str, int]],
    head_runs: list[tuple[str, int]],
    folder: Path,
    name: str,
) -> Grouped:
    """Groups a bucket; what is written to `folder` ends in `name`."""
    requests = group_rows(layout, cutoff, frames.read_runs(row_runs), frames.read_runs(head_runs))
    heads, rows = folder / f"requests-{name}.arrow", folder / f"candidates-{name}.arrow"
    path = save(folder / f"rejected-bucket-{name}.npy", [requests.rejected])
    found = statistics.collect(layout, requests)
    frames.write_frame(heads, requests.heads)
    frames.write_frame(rows, statistics.without_item_features(layout, requests.rows))
    in_test = int(requests.heads["in_test"].sum())  # type: ignore[union-attr]
    places = candidate_rows.write_candidate_rows(requests.heads, requests.rows, folder, name)
    return Grouped(
        heads=str(heads),
        rows=str(rows),
        num_requests={"train": num_rows(requests.heads) - in_test, "test": in_test},
        candidate_rows=places,
        rejected=path,
        counts=count_by_reason(requests.rejected),
        used=num_rows(requests.rows),
        statistics=found,
    )


def group_rows(layout: Layout, cutoff: int | None, rows: Frame, heads: Frame) -> Requests:
    """Groups the rows and heads of a bucket, given in the order of the log."""
    request, item, user = array_of(rows, "request"), array_of(rows, "item"), array_of(rows, "user")
    keys, first, index = np.unique(request, return_index=True, return_inverse=True)

    # A request is made by one user.
    user_of = _users(index, user, first)
    reason = np.where(user != user_of[index], Reason.SEVERAL_USERS, 0).astype(np.int8)
    num_several_users = len(np.unique(index[reason > 0]))

    # An item is a candidate once.
    order = np.lexsort((item, index))
    order = order[reason[order] == 0]
    again = (index[order][1:] == index[order][:-1]) & (item[order][1:] == item[order][:-1])
    reason[order[1:][again]] = Reason.DUPLICATE_ITEM

    # Requests in the order of time, candidates in that of the funnel.
    time = np.zeros(len(keys), np.int64)
    time[index] = array_of(rows, "time")
    by_time = np.lexsort((keys, time))
    rank = np.empty_like(by_time)
    rank[by_time] = np.arange(len(keys))
    kept = np.flatnonzero(reason == 0)
    stage = array_of(rows, "stage")
    position = array_of(rows, "position")[kept]
    position = np.where(np.isnan(position), np.inf, position)
    place = rank[index[kept]] * 4 + (Stage.SHOWN - stage[kept])
    kept = kept[np.lexsort((item[kept], position, place))]
    number = np.bincount(rank[index[kept]], minlength=len(keys))
    within = np.arange(len(kept)) - np.repeat(np.cumsum(number) - number, number)
    reason[kept[within >= layout.retrieved]] = Reason.BEYOND_RETRIEVED
    kept = kept[within < layout.retrieved]

    bad = np.flatnonzero(reason)
    records = rejected(
        array_of(rows, "file")[bad],
        array_of(rows, "row")[bad],
        array_of(rows, "place")[bad],
        1,
        reason[bad],
    )
    owner = rank[index[kept]]
    rows = take_rows(rows, kept)
    moved = np.bincount(owner, weights=array_of(rows, "moved"), minlength=len(keys)) > 0
    of_request, varying = _heads(layout, heads, keys, user_of, by_time)
    of_request |= {
        "request": keys[by_time],
        "time": time[by_time],
        "user": user_of[by_time],
        "in_test": _in_test(layout, cutoff, keys, user_of, time)[by_time],
        "moved": moved.astype(np.int8),
        **_stage_counts(layout, rows, owner, len(keys)),
    }
    if layout.teacher_signal == "rank":
        rows |= _ranks(layout, rows, owner)
    return Requests(of_request, rows, records, num_several_users, varying)


def _users(
    index: Int[np.ndarray, "n"], user: Int64[np.ndarray, "n"], first: Int[np.ndarray, "requests"]
) -> Int64[np.ndarray, "requests"]:
    """The user of each request: that of most of its rows, the one of the least key among equals."""
    users = user[first]
    others = np.flatnonzero(user != users[index])
    if not len(others):
        return users
    rows = np.flatnonzero(np.isin(index, index[others]))
    pairs, number = np.unique(np.stack([index[rows], user[rows]]), axis=1, return_counts=True)
    order = np.lexsort((-pairs[1], number, pairs[0]))
    request, chosen = pairs[0][order], pairs[1][order]
    last = np.append(request[1:] != request[:-1], True)
    users[request[last]] = chosen[last]
    return users


def _in_test(
    layout: Layout,
    cutoff: int | None,
    request: Int64[np.ndarray, "n"],
    user: Int64[np.ndarray, "n"],
    time: Int64[np.ndarray, "n"],
) -> np.ndarray:
    """int8, whether each request belongs to the split `test`."""
    if layout.split == "time":
        assert cutoff is not None
        return (time >= cutoff).astype(np.int8)
    key = request if layout.split == "request" else user
    return (share_of(key, layout.seed) < layout.test_share).astype(np.int8)


def _heads(
    layout: Layout,
    heads: Frame,
    keys: Int64[np.ndarray, "requests"],
    user_of: Int64[np.ndarray, "requests"],
    by_time: Int[np.ndarray, "requests"],
) -> tuple[Frame, dict[str, int]]:
    """The features of each request, from the first row of its user, and how often they vary."""
    index, _ = look_up(keys, array_of(heads, "request"))
    same_user = np.flatnonzero(array_of(heads, "user") == user_of[index])
    _, first = np.unique(index[same_user], return_index=True)
    first = same_user[first]
    varying = {}
    for feature in layout.of("user", "context"):
        if feature.kind in ("dense", "category"):
            value = array_of(heads, f"feature:{feature.name}")
            here, there = value[same_user], value[first[index[same_user]]]
            differs = (here != there) & ((here == here) | (there == there))
            varying[feature.name] = len(np.unique(index[same_user][differs]))
    features = {name: column for name, column in heads.items() if name.startswith("feature:")}
    return take_rows(features, first[by_time]), varying


def _stage_counts(
    layout: Layout, rows: Frame, owner: Int[np.ndarray, "n"], requests: int
) -> dict[str, Int64[np.ndarray, "requests"]]:
    """How many candidates of each request came how far, and for how many the teacher was logged."""
    stage = array_of(rows, "stage")

    def count(chosen: Bool[np.ndarray, "n"]) -> Int64[np.ndarray, "requests"]:
        return np.bincount(owner[chosen], minlength=requests).astype(np.int64)

    counts = {
        "candidates": count(stage >= Stage.RETRIEVED),
        "passed": count(stage >= Stage.PASSED),
        "shown": count(stage >= Stage.SHOWN),
    }
    if not layout.scored_tasks:
        return counts | {"scored": np.zeros(requests, np.int64)}
    written = np.any(
        [~np.isnan(array_of(rows, f"teacher:{t}")) for t in layout.scored_tasks], axis=0
    )
    beyond = count(written & (stage < Stage.PASSED)) > 0
    return counts | {"scored": np.where(beyond, counts["candidates"], counts["passed"])}


def _ranks(
    layout: Layout, rows: Frame, owner: Int[np.ndarray, "n"]
) -> dict[str, Float32[np.ndarray, "n"]]:
    """Positions as numbers in (0, 1), by how many of the request's candidates stand before."""
    columns = {}
    for task in layout.scored_tasks:
        position = array_of(rows, f"teacher:{task}")
        proper = np.flatnonzero(
            (position >= 0) & np.isfinite(position) & (array_of(rows, "teacher_weight") > 0)
        )
        result = np.full(len(position), np.nan, np.float32)
        order = proper[np.lexsort((position[proper], owner[proper]))]
        request, place = owner[order], position[order]
        # Runs of the same position share the mean of their places.
        starts = np.append(True, (request[1:] != request[:-1]) | (place[1:] != place[:-1]))
        run = np.cumsum(starts[: len(order)]) - 1
        begin = np.searchsorted(request, request)
        within = np.arange(len(order)) - begin
        mean = np.bincount(run, weights=within) / np.maximum(np.bincount(run), 1)
        result[order] = probability_of_rank(mean[run])
        columns[f"teacher:{task}"] = result
    return columns
