"""The third pass, a bucket at a time: rows become requests, with their candidates in funnel order.

Faults of a row beside others are detected here. The order of the log's rows decides one thing: the
first of two rows that contradict each other counts.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int8, Int64

from kd_ranker.batch import Stage
from kd_ranker.distillation.teacher_signal import probability_of_rank
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs import candidate_rows, log_statistics, named_columns
from kd_ranker.sources.logs.layout import LogLayout
from kd_ranker.sources.logs.log_statistics import BucketRequests, Statistics
from kd_ranker.sources.logs.named_columns import NamedColumns, array_of, num_rows, take_rows
from kd_ranker.sources.logs.plan import Cutoffs
from kd_ranker.sources.logs.reasons import (
    Reason,
    Rejected,
    count_by_reason,
    rejected_records,
    save_rejected,
)
from kd_ranker.sources.logs.value_keys import share_of
from kd_ranker.sources.searching import look_up


class AssembledBucket(NamedTuple):
    """Files and numbers that the third pass leaves of a bucket.

    Attributes:
      requests: the path of the requests.
      candidates: the path of their candidates.
      num_requests: split -> the number of its requests.
      candidate_rows: split -> the path of the places that its candidates had in the log.
      rejected: the path of records.
      counts: how many candidates each reason has cost.
      used: how many candidates are left.
      statistics: of the rest.
    """

    requests: str
    candidates: str
    num_requests: dict[str, int]
    candidate_rows: dict[str, str]
    rejected: str
    counts: Int64[np.ndarray, "reasons"]
    used: int
    statistics: Statistics


def assemble_bucket(
    layout: LogLayout,
    cutoffs: Cutoffs | None,
    candidate_runs: list[tuple[str, int]],
    request_runs: list[tuple[str, int]],
    folder: Path,
    name: str,
) -> AssembledBucket:
    """Makes requests of a bucket; the files that it writes to `folder` end in `name`."""
    bucket = assemble_requests(
        layout,
        cutoffs,
        named_columns.read_runs(candidate_runs),
        named_columns.read_runs(request_runs),
    )
    requests, candidates = bucket.requests, bucket.candidates
    requests_path = folder / f"requests-{name}.arrow"
    candidates_path = folder / f"candidates-{name}.arrow"
    named_columns.write_columns(requests_path, requests)
    named_columns.write_columns(
        candidates_path, log_statistics.without_item_features(layout, candidates)
    )
    number = np.bincount(array_of(requests, "split"), minlength=len(SPLITS)).tolist()
    return AssembledBucket(
        requests=str(requests_path),
        candidates=str(candidates_path),
        num_requests=dict(zip(SPLITS, number, strict=True)),
        candidate_rows=candidate_rows.write_candidate_rows(requests, candidates, folder, name),
        rejected=save_rejected(folder / f"rejected-bucket-{name}.npy", [bucket.rejected]),
        counts=count_by_reason(bucket.rejected),
        used=num_rows(candidates),
        statistics=log_statistics.add_up_bucket(layout, bucket),
    )


def assemble_requests(
    layout: LogLayout,
    cutoffs: Cutoffs | None,
    candidates: NamedColumns,
    request_rows: NamedColumns,
) -> BucketRequests:
    """Makes requests of a bucket's rows, see `partition`, which come in the order of the log."""
    request, item, user = (array_of(candidates, name) for name in ("request", "item", "user"))
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
    time[index] = array_of(candidates, "time")
    by_time = np.lexsort((keys, time))
    rank = np.empty_like(by_time)
    rank[by_time] = np.arange(len(keys))
    kept = _in_funnel_order(candidates, rank[index], np.flatnonzero(reason == 0))
    number = np.bincount(rank[index[kept]], minlength=len(keys))
    within = np.arange(len(kept)) - np.repeat(np.cumsum(number) - number, number)
    reason[kept[within >= layout.retrieved]] = Reason.BEYOND_RETRIEVED
    kept = kept[within < layout.retrieved]

    records = _rejected_of(candidates, reason)
    owner = rank[index[kept]]
    candidates = take_rows(candidates, kept)
    moved = np.bincount(owner, weights=array_of(candidates, "moved"), minlength=len(keys)) > 0
    requests, varying = _request_features(layout, request_rows, keys, user_of, by_time)
    requests |= {
        "request": keys[by_time],
        "time": time[by_time],
        "user": user_of[by_time],
        "split": _splits(layout, cutoffs, keys, user_of, time)[by_time],
        "moved": moved.astype(np.int8),
        **_stage_counts(layout, candidates, owner, len(keys)),
    }
    if layout.teacher_signal == "rank":
        candidates |= _ranks(layout, candidates, owner)
    return BucketRequests(requests, candidates, records, num_several_users, varying)


def _in_funnel_order(
    candidates: NamedColumns, owner: Int[np.ndarray, "n"], kept: Int[np.ndarray, "kept"]
) -> Int[np.ndarray, "kept"]:
    """The rows `kept`, request by request: by stage, then position, then the item's key.

    Args:
      candidates: n rows.
      owner: the place of the request of each row in the order of time.
      kept: places of rows.
    """
    position = array_of(candidates, "position")[kept]
    position = np.where(np.isnan(position), np.inf, position)
    place = owner[kept] * 4 + (Stage.SHOWN - array_of(candidates, "stage")[kept])
    return kept[np.lexsort((array_of(candidates, "item")[kept], position, place))]


def _rejected_of(candidates: NamedColumns, reason: Int8[np.ndarray, "n"]) -> Rejected:
    """Records of the candidates that a reason rejects."""
    bad = np.flatnonzero(reason)
    file, row, place = (array_of(candidates, name)[bad] for name in ("file", "row", "place"))
    return rejected_records(file, row, place, 1, reason[bad])


def _users(
    index: Int[np.ndarray, "n"], user: Int64[np.ndarray, "n"], first: Int[np.ndarray, "requests"]
) -> Int64[np.ndarray, "requests"]:
    """The user of each request: that of most of its rows, of equals the one with the least key."""
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


def _splits(
    layout: LogLayout,
    cutoffs: Cutoffs | None,
    request: Int64[np.ndarray, "n"],
    user: Int64[np.ndarray, "n"],
    time: Int64[np.ndarray, "n"],
) -> Int8[np.ndarray, "n"]:
    """The place in `SPLITS` of the split of each request."""
    if layout.split == "time":
        assert cutoffs is not None
        return np.searchsorted(np.array(cutoffs), time, side="right").astype(np.int8)
    key = request if layout.split == "request" else user
    # The test's share comes first, so that it does not depend on the validation's.
    starts = np.cumsum([layout.test_share, layout.validation_share])
    order = np.array([SPLITS.index(split) for split in ("test", "validation", "train")], np.int8)
    return order[np.searchsorted(starts, share_of(key, layout.seed), side="right")]


def _request_features(
    layout: LogLayout,
    request_rows: NamedColumns,
    keys: Int64[np.ndarray, "requests"],
    user_of: Int64[np.ndarray, "requests"],
    by_time: Int[np.ndarray, "requests"],
) -> tuple[NamedColumns, dict[str, int]]:
    """The features of each request, from the first row of its user, and how often they vary."""
    index, _ = look_up(keys, array_of(request_rows, "request"))
    same_user = np.flatnonzero(array_of(request_rows, "user") == user_of[index])
    _, first = np.unique(index[same_user], return_index=True)
    first = same_user[first]
    varying = {}
    for feature in layout.of("user", "context"):
        if feature.kind in ("dense", "category"):
            value = array_of(request_rows, f"feature:{feature.name}")
            own, counting = value[same_user], value[first[index[same_user]]]
            differs = (own != counting) & ((own == own) | (counting == counting))
            varying[feature.name] = len(np.unique(index[same_user][differs]))
    features = {
        name: column for name, column in request_rows.items() if name.startswith("feature:")
    }
    return take_rows(features, first[by_time]), varying


def _stage_counts(
    layout: LogLayout, candidates: NamedColumns, owner: Int[np.ndarray, "n"], requests: int
) -> dict[str, Int64[np.ndarray, "requests"]]:
    """Numbers of candidates of each request: of each stage, and with a logged teacher."""
    stage = array_of(candidates, "stage")

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
        [~np.isnan(array_of(candidates, f"teacher:{t}")) for t in layout.scored_tasks], axis=0
    )
    beyond = count(written & (stage < Stage.PASSED)) > 0
    return counts | {"scored": np.where(beyond, counts["candidates"], counts["passed"])}


def _ranks(
    layout: LogLayout, candidates: NamedColumns, owner: Int[np.ndarray, "n"]
) -> dict[str, Float32[np.ndarray, "n"]]:
    """Positions as numbers in (0, 1), by the number of the request's candidates before."""
    columns = {}
    for task in layout.scored_tasks:
        position = array_of(candidates, f"teacher:{task}")
        proper = np.flatnonzero(
            (position >= 0) & np.isfinite(position) & (array_of(candidates, "teacher_weight") > 0)
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
