"""RecFlow as requests: an industrial funnel logged at every stage, a day at a time.

Q. Liu, K. Zheng, R. Huang et al., "RecFlow: An Industrial Full Flow Recommendation Dataset", ICLR
2025. `docs/recflow.md` says how to get the files, what is known of their layout, and how near this
comes to the published experiments. `recflow_files` reads them.

A day of the log may be larger than memory. It is never held whole: its record batches are read one
by one, to find out which requests there are, then to list the videos, and then, for some requests
at a time, to make them.

A request has all rows that the log holds of it as candidates: those that were shown, then those
that the rank stage scored, by their position there, then the others, see `positions`. Or, with
`data.of_each_stage`, it has so many of each of `GRADES`, which then say how far they came. A
position is stored as `probability_of_rank` of it, the same for every task, with teacher weight 1;
candidates without one have weight 0.

Widths and order of the features:
  user: log(1 + effective views before the request) / log(51), of the last 50.
  context: sin and cos of the hour (UTC), weekday (UTC, one-hot from Monday), log(1 + days since the
    last effective view), whether there was none.
  history: log(1 + days since the view), log(1 + duration in seconds), time watched / duration.
  item: log(1 + duration in seconds), whether the duration is unknown.
  candidate: log(1 + days since the upload), whether that time is unknown.
Categories: gender, province and age group of the request; author (hashed), both levels of the
  category and type of upload of the item.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.batch import Category, FeatureSpec, Stage
from kd_ranker.distillation.teacher_signal import probability_of_rank
from kd_ranker.errors import UserError, check_choice, check_tasks
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.sources.hashing import hash_into
from kd_ranker.sources.recflow_files import (
    SEQUENCE_COLUMNS,
    Day,
    NamedArrays,
    date_of,
    find_days,
    read_batches,
    read_sequences,
)
from kd_ranker.sources.searching import look_up
from kd_ranker.sources.time_features import DAY, hour_features, weekday_features

# Task -> the column that says whether the user did it.
LABELS = {
    "watch": "long_view",
    "effective_view": "effective_view",
    "like": "like",
    "share": "forward",
    "follow": "follow",
    "comment": "comment",
}
TASKS = tuple(LABELS)
TEACHER_VERSION = "recflow"

# A row with one of these was scored by the stage `rank`, the final ranker here.
RANKED = ("rank_pos", "rank_neg", "rerank_pos", "rerank_neg")

# What the log kept of each stage, from the top, and what it counts as with `data.of_each_stage`.
GRADES = {
    "rank_pos": Stage.SHOWN,
    "rank_neg": Stage.PASSED,
    "coarse_neg": Stage.RETRIEVED,
    "prerank_neg": Stage.RETRIEVED,
}

# How many values each category has, as published. They count from 0; others share one place.
_VALUES = {
    "gender": 3,
    "province": 79,
    "age": 8,
    "category_level_one": 140,
    "category_level_two": 784,
    "upload_type": 40,
}
_OF_REQUEST = ("gender", "province", "age")
_OF_ITEM = ("category_level_one", "category_level_two", "upload_type")
# The first category id of each that is of a request; they come before those of items.
_REQUEST_STARTS = tuple(
    itertools.accumulate([_VALUES[name] + 2 for name in _OF_REQUEST[:-1]], initial=0)
)

_KEYS = ("request_id", "request_timestamp", "user_id")
_ITEM_COLUMNS = ("video_id", "author_id", *_OF_ITEM, "duration")
_ROW_COLUMNS = (
    *_KEYS,
    *_OF_REQUEST,
    *("video_id", "upload_timestamp", "realshow", *dict.fromkeys((*RANKED, *GRADES)), "rank_index"),
    *LABELS.values(),
)

USER_FEATURES, CONTEXT_FEATURES, HISTORY_FEATURES = 1, 11, 3
ITEM_FEATURES, CANDIDATE_FEATURES = 2, 2

# The number of rows that are held at a time, of the log or of lists made of it.
ROWS_AT_ONCE = 1 << 22

_LAST = np.iinfo(np.int64).max

WholeNumbers = Int64[np.ndarray, "rows"]


class DayPlan(NamedTuple):
    """The chosen requests of a day, n of them in the order of time, and the places of their rows.

    Attributes:
      request_id: as in the files.
      time: in milliseconds.
      user_id: as in the files.
      rows: the number of rows of each.
      ascending: their ids again, in ascending order.
      by_id: their places in this order.
      first: for each record batch of the log, the first request that it has a row of; n if none.
      last: the last one; -1 if none.
    """

    request_id: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]
    user_id: Int64[np.ndarray, "n"]
    rows: Int64[np.ndarray, "n"]
    ascending: Int64[np.ndarray, "n"]
    by_id: Int64[np.ndarray, "n"]
    first: Int64[np.ndarray, "batches"]
    last: Int64[np.ndarray, "batches"]


class Catalogue(NamedTuple):
    """The users of the chosen requests, and the videos of their candidates and histories.

    A user's or a video's place is its id here.
    """

    user_id: Int64[np.ndarray, "users"]  # ascending
    video_id: Int64[np.ndarray, "items"]  # ascending
    category: Int32[np.ndarray, "items 4"]
    features: Float32[np.ndarray, "items F"]


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Opens RecFlow as a source.

    Args:
      data: the source's part of the config.
      tasks: some of `TASKS`, in any order.
      funnel: `retrieved` must hold the candidates of any request.

    Returns:
      The source; each split comes day by day, and each day in the order of time.

    Raises:
      UserError: for files that are missing or malformed, and days or numbers that make no sense.
    """
    _check(data, tasks)
    days = find_days(data)
    plans = _plans([day for split in SPLITS for day in days[split]], data, funnel)
    catalogue = _catalogue(plans, int(data.authors))
    spec = FeatureSpec(
        dataset="recflow",
        tasks=tuple(tasks),
        num_users=len(catalogue.user_id),
        num_items=len(catalogue.video_id),
        user_features=USER_FEATURES,
        context_features=CONTEXT_FEATURES,
        candidate_features=CANDIDATE_FEATURES,
        item_features=ITEM_FEATURES,
        cheap_item_features=ITEM_FEATURES,
        history_length=int(data.history_length),
        history_features=HISTORY_FEATURES,
        teacher_version=TEACHER_VERSION,
        categories=categories(int(data.authors)),
        teacher_signal="rank",
    )
    starts = spec.category_starts[len(_OF_REQUEST) :]
    item_category = catalogue.category + np.array(starts, np.int32)
    item_category[catalogue.category < 0] = -1
    plans_of_split = {split: {day: plans[day] for day in days[split]} for split in SPLITS}
    return Source(
        spec,
        catalogue.features,
        functools.partial(
            _requests,
            plans_of_split,
            catalogue,
            tuple(tasks),
            int(data.history_length),
            int(data.of_each_stage),
        ),
        {
            split: sum(len(plan.request_id) for plan in plans_of_split[split].values())
            for split in SPLITS
        },
        item_category,
    )


def _plans(days: Sequence[Day], data: ConfigDict, funnel: ConfigDict) -> dict[Day, DayPlan]:
    """Looks through the log; raises UserError where the funnel cannot hold a request."""
    bar = tqdm(days, "looking through the log", unit="day", disable=None)
    of_each = int(data.of_each_stage)
    plans = {day: plan_day(day, int(data.max_requests_per_day), data.seed, of_each) for day in bar}
    for day, plan in plans.items():
        most = min(int(plan.rows.max()), len(GRADES) * of_each or _LAST)
        if most > funnel.retrieved:
            raise UserError(
                f"funnel.retrieved={funnel.retrieved} is less than the {most} candidates of a "
                f"request in {day.stages}; set it to {most} or more"
            )
    return plans


def _requests(
    plans: Mapping[str, Mapping[Day, DayPlan]],
    catalogue: Catalogue,
    tasks: Sequence[str],
    history_length: int,
    of_each: int,
    split: str,
) -> Iterator[Request]:
    """The requests of a split, day by day."""
    check_choice("split", split, SPLITS)
    for day, plan in plans[split].items():
        sequences = read_sequences(day, plan.request_id)
        for first, end in _portions(plan):
            yield from _requests_of(
                plan,
                first,
                end,
                rows=candidates_of(_rows(day, plan, first, end), of_each),
                events=events_of(plan, sequences, first, end),
                catalogue=catalogue,
                tasks=tasks,
                history_length=history_length,
            )


def categories(authors: int) -> tuple[Category, ...]:
    """The categorical features; value v of each has place v + 1, and place 0 is for the unknown."""
    return (
        *(Category(name, "request", _VALUES[name] + 2) for name in _OF_REQUEST),
        Category("author", "item", authors),
        *(Category(name, "item", _VALUES[name] + 2) for name in _OF_ITEM),
    )


def plan_day(day: Day, max_requests: int, seed: int, of_each: int) -> DayPlan:
    """Looks through a day's log for its requests, and draws `max_requests` of them if not 0.

    With `of_each`, rows outside `GRADES` are none, and requests without others neither.
    """

    def parts() -> Iterator[NamedArrays]:
        for _, table in read_batches(day.stages, (*_KEYS, *(GRADES if of_each else ()))):
            is_row = grades_of(table) < len(GRADES) if of_each else np.ones_like(table["user_id"])
            table = {name: table[name] for name in _KEYS}
            yield _by_request(table | {"rows": is_row.astype(np.int64)})

    requests = _folded(parts(), _by_request)
    chosen = np.flatnonzero(requests["rows"] if requests else [])
    if not len(chosen):
        which = f" of {', '.join(GRADES)}" if of_each else ""
        raise UserError(f"{day.stages} has no rows{which}")
    if 0 < max_requests < len(chosen):
        generator = np.random.default_rng([seed, date_of(day.name).toordinal()])
        chosen = generator.choice(chosen, max_requests, replace=False)
    time = requests["request_timestamp"]
    chosen = chosen[np.lexsort([requests["request_id"][chosen], time[chosen]])]
    request_id = requests["request_id"][chosen]
    by_id = np.argsort(request_id)
    plan = DayPlan(
        request_id=request_id,
        time=time[chosen],
        user_id=requests["user_id"][chosen],
        rows=requests["rows"][chosen],
        ascending=request_id[by_id],
        by_id=by_id,
        first=np.zeros(0, np.int64),
        last=np.zeros(0, np.int64),
    )
    first, last = [], []
    for _, table in read_batches(day.stages, ("request_id",)):
        place = request_places(plan, table["request_id"])
        place = place[place >= 0]
        first.append(place.min(initial=len(chosen)))
        last.append(place.max(initial=-1))
    return plan._replace(first=np.array(first), last=np.array(last))


def request_places(plan: DayPlan, request_id: WholeNumbers) -> WholeNumbers:
    """The place in the plan of the request of each row; -1 if it was not chosen."""
    place, known = look_up(plan.ascending, request_id)
    return np.where(known, plan.by_id[place], -1)


def stages_of(rows: NamedArrays) -> Int64[np.ndarray, "rows"]:
    """The furthest stage that the flags of each row tell.

    `realshow` → SHOWN; `rank_pos`, `rank_neg`, `rerank_pos` or `rerank_neg`, all of which the rank
    stage has scored → PASSED; the others, among them `coarse_neg` and `prerank_neg` → RETRIEVED.
    """
    ranked = np.any([rows[name] == 1 for name in RANKED], axis=0)
    stage = np.where(ranked, Stage.PASSED, Stage.RETRIEVED)
    return np.where(rows["realshow"] == 1, Stage.SHOWN, stage).astype(np.int64)


def grades_of(rows: NamedArrays) -> Int64[np.ndarray, "rows"]:
    """The place in `GRADES` of the first flag that each row has; their number if it has none."""
    flags = [rows[name] == 1 for name in GRADES]
    return np.select(flags, [*range(len(GRADES))], len(GRADES)).astype(np.int64)


def positions(
    request: WholeNumbers,
    rank_index: WholeNumbers,
    is_ranked: Bool[np.ndarray, "rows"],
    is_top: Bool[np.ndarray, "rows"],
) -> WholeNumbers:
    """The final ranker's position of each candidate in its request, without gaps; -1 for none.

    The smallest index of a request becomes 0, wherever the files begin to count, and each further
    one the next number; equal ones share a position.

    It is not documented what the files write where no position was logged, so an index counts only
    if it can be one: it is not negative, the rank stage scored the candidate, and unless the
    candidate is a `rank_pos` (which the final ranker put first) itself, one of the request stands
    before it.

    Args:
      request: the request of each candidate, in [0, n).
      rank_index: as in the files, -1 where missing.
      is_ranked: True if the rank stage scored the candidate.
      is_top: True if its `rank_pos` is set.

    >>> positions(np.zeros(5, int), np.array([7, 3, 4, 0, -1]), np.ones(5, bool), np.arange(5) == 1)
    array([ 2,  0,  1, -1, -1])
    """
    possible = is_ranked & (rank_index >= 0)
    best = np.full(request.max(initial=-1) + 1, _LAST)
    np.minimum.at(best, request[possible & is_top], rank_index[possible & is_top])
    known = possible & (best[request] < _LAST) & (is_top | (rank_index > best[request]))
    ordered = np.flatnonzero(known)
    ordered = ordered[np.lexsort([rank_index[ordered], request[ordered]])]
    index = rank_index[ordered]
    begins = np.diff(request[ordered], prepend=-1) != 0
    count = np.cumsum(begins | (np.diff(index, prepend=-1) != 0))
    result = np.full(len(request), -1)
    # The count where the candidate's request begins is taken off.
    result[ordered] = count - np.maximum.accumulate(np.where(begins, count, 0))
    return result


def candidates_of(rows: NamedArrays, of_each: int) -> NamedArrays:
    """The rows with `stage` and `position`, requests one after the other, each in funnel order.

    A video that a request has several rows of keeps the one that came furthest. Within a stage,
    those with a position come first, by it, and then the others by their video's id.

    Args:
      rows: rows of the log, with `request`, the number of the request of each.
      of_each: 0 takes all rows, and their stages are `stages_of`. Otherwise there are the first so
        many of each of `GRADES`, whose stage is that of the grade.
    """
    stages = [*GRADES.values()] if of_each else [Stage.SHOWN, Stage.PASSED, Stage.RETRIEVED]
    grade = grades_of(rows) if of_each else Stage.SHOWN - stages_of(rows)
    rows = _taken(rows | {"grade": grade}, np.flatnonzero(grade < len(stages)))
    index = np.where(rows["rank_index"] < 0, _LAST, rows["rank_index"])
    rows = _taken(rows, np.lexsort([index, rows["grade"], rows["video_id"], rows["request"]]))
    rows = _taken(rows, np.flatnonzero(_begins(rows["request"]) | _begins(rows["video_id"])))
    rows["stage"] = np.array(stages)[rows["grade"]]
    is_ranked = rows["stage"] >= Stage.PASSED
    position = positions(rows["request"], rows["rank_index"], is_ranked, rows["rank_pos"] == 1)
    last = np.where(position < 0, _LAST, position)
    order = np.lexsort([rows["video_id"], last, rows["grade"], rows["request"]])
    rows = _taken(rows | {"position": position}, order)
    start = np.flatnonzero(_begins(rows["request"]) | _begins(rows["grade"]))
    place = np.arange(len(order)) - np.repeat(start, np.diff(start, append=len(order)))
    return _taken(rows, np.flatnonzero(place < (of_each or _LAST)))


def _taken(rows: NamedArrays, places: WholeNumbers) -> NamedArrays:
    return {name: column[places] for name, column in rows.items()}


def _begins(values: WholeNumbers) -> Bool[np.ndarray, "rows"]:
    """True where a value differs from the one before it, and at the first."""
    begins = np.ones(len(values), bool)
    begins[1:] = np.diff(values) != 0
    return begins


def events_of(plan: DayPlan, sequences: dict[int, np.ndarray], first: int, end: int) -> NamedArrays:
    """The effective views before each of the requests [first, end), in the order of time.

    Returns:
      The `SEQUENCE_COLUMNS`, and `request`, counted from `first`. Empty places of the published
      sequences are left out, and so are views that were not strictly before the request.
    """
    none = np.zeros((0, len(SEQUENCE_COLUMNS)), np.int64)
    chosen = [sequences.get(place, none) for place in range(first, end)]
    request = np.repeat(np.arange(end - first), [len(sequence) for sequence in chosen])
    columns = np.concatenate(chosen).T
    events: NamedArrays = dict(zip(SEQUENCE_COLUMNS, columns, strict=True)) | {"request": request}
    time = events["request_timestamp"]
    real = (time > 0) & (time < plan.time[first:end][request]) & (events["video_id"] >= 0)
    kept = np.flatnonzero(real)
    kept = kept[np.lexsort([time[kept], request[kept]])]
    return {name: column[kept] for name, column in events.items()}


def item_features(duration: WholeNumbers) -> Float32[np.ndarray, "rows 2"]:
    """[log(1 + seconds), 0 if unknown; 1 if unknown] of durations in milliseconds."""
    unknown = duration <= 0
    return _features(np.log1p(np.where(unknown, 0, duration) / 1000), unknown)


def candidate_features(uploaded: WholeNumbers, time: WholeNumbers) -> Float32[np.ndarray, "rows 2"]:
    """[log(1 + days since the upload), 0 if unknown; 1 if unknown].

    Args:
      uploaded: in seconds since 1970.
      time: of the request, in milliseconds since 1970.
    """
    unknown = uploaded <= 0
    days = np.maximum(time / 1000 - uploaded, 0) / DAY
    return _features(np.log1p(np.where(unknown, 0, days)), unknown)


def context_features(
    time: Int64[np.ndarray, "n"], last: Int64[np.ndarray, "n"]
) -> Float32[np.ndarray, "n C"]:
    """Features of the moment.

    Args:
      time: of each request, in milliseconds since 1970, UTC.
      last: of the user's last effective view before; -1 if there is none.

    Returns:
      [sin and cos of the hour; weekday, one-hot from Monday; log(1 + days since the last effective
      view), 0 if there is none; 1 if there is none].
    """
    seconds = time // 1000
    pause = np.where(last < 0, 0, time - last) / (1000 * DAY)
    return np.concatenate(
        [
            hour_features(seconds),
            weekday_features(seconds),
            np.stack([np.log1p(pause), last < 0], axis=1),
        ],
        axis=1,
        dtype=np.float32,
    )


def history_features(events: NamedArrays, time: WholeNumbers) -> Float32[np.ndarray, "rows 3"]:
    """[log(1 + days since the view); log(1 + duration in seconds); share watched, at most 2].

    Args:
      events: see `events_of`; times watched and durations are in milliseconds.
      time: of the request that each event precedes, in milliseconds.
    """
    duration = np.maximum(events["duration"], 0)
    watched = np.maximum(events["playing_time"], 0) / np.maximum(duration, 1)
    days = (time - events["request_timestamp"]) / (1000 * DAY)
    return _features(np.log1p(days), np.log1p(duration / 1000), np.minimum(watched, 2))


def _features(*columns: Any) -> Float32[np.ndarray, "rows columns"]:
    return np.stack(columns, axis=-1).astype(np.float32)


class _Candidates(NamedTuple):
    """Candidates, one request after the other; those of request i begin at start[i]."""

    start: Int64[np.ndarray, "requests+1"]
    stage: Int64[np.ndarray, "n"]
    item_id: Int32[np.ndarray, "n"]
    features: Float32[np.ndarray, "n X"]
    label: UInt8[np.ndarray, "n T"]
    label_weight: Float32[np.ndarray, "n"]
    probability: Float32[np.ndarray, "n T"]
    weight: Float32[np.ndarray, "n"]
    request_category: Int32[np.ndarray, "requests K"]


class _Views(NamedTuple):
    """Effective views before requests; those before request i begin at start[i]."""

    start: Int64[np.ndarray, "requests+1"]
    item_id: Int32[np.ndarray, "events"]
    features: Float32[np.ndarray, "events E"]
    user_features: Float32[np.ndarray, "requests U"]
    context: Float32[np.ndarray, "requests C"]


def _requests_of(
    plan: DayPlan,
    first: int,
    end: int,
    *,
    rows: NamedArrays,
    events: NamedArrays,
    catalogue: Catalogue,
    tasks: Sequence[str],
    history_length: int,
) -> Iterator[Request]:
    """The requests [first, end) of a plan, from the rows of `candidates_of` and all events."""
    time = plan.time[first:end]
    candidates = _encoded_candidates(rows, time, catalogue, tasks)
    views = _encoded_views(events, time, catalogue)
    user_id = np.searchsorted(catalogue.user_id, plan.user_id[first:end])
    for request in range(end - first):
        own = slice(candidates.start[request], candidates.start[request + 1])
        shown = int((candidates.stage[own] == Stage.SHOWN).sum())
        passed = int((candidates.stage[own] >= Stage.PASSED).sum())
        logged = slice(own.start, own.start + passed)
        until = views.start[request + 1]
        latest = slice(max(views.start[request], until - history_length), until)
        yield Request(
            request_id=int(plan.request_id[first + request]),
            time=int(time[request] // 1000),
            user_id=int(user_id[request]),
            user_features=views.user_features[request],
            context=views.context[request],
            history_id=views.item_id[latest],
            history_features=views.features[latest],
            item_id=candidates.item_id[own],
            candidate_features=candidates.features[own],
            num_passed=passed,
            user_label=candidates.label[own][:shown],
            label_weight=candidates.label_weight[own][:shown],
            teacher_probability=candidates.probability[logged],
            teacher_weight=candidates.weight[logged],
            teacher_version=TEACHER_VERSION,
            true_probability=np.zeros((0, len(tasks)), np.float32),
            request_category=candidates.request_category[request],
        )


def _encoded_candidates(
    candidates: NamedArrays,
    time: Int64[np.ndarray, "requests"],
    catalogue: Catalogue,
    tasks: Sequence[str],
) -> _Candidates:
    """Ids, features and labels of the candidates of requests that were made at some times."""
    start = np.searchsorted(candidates["request"], np.arange(len(time) + 1))
    item_id, _ = _item_ids(catalogue, candidates["video_id"])
    label = np.stack([candidates[LABELS[task]] == 1 for task in tasks], axis=1)
    known = candidates["position"] >= 0
    probability = np.where(known, probability_of_rank(candidates["position"]), np.nan)
    values = [_places_of_values(name, candidates[name][start[:-1]]) for name in _OF_REQUEST]
    return _Candidates(
        start=start,
        stage=candidates["stage"],
        item_id=item_id,
        features=candidate_features(candidates["upload_timestamp"], time[candidates["request"]]),
        label=label.astype(np.uint8),
        label_weight=(candidates["realshow"] == 1).astype(np.float32),
        probability=np.tile(probability[:, None].astype(np.float32), len(tasks)),
        weight=known.astype(np.float32),
        request_category=(np.stack(values, axis=1) + _REQUEST_STARTS).astype(np.int32),
    )


def _encoded_views(
    events: NamedArrays, time: Int64[np.ndarray, "requests"], catalogue: Catalogue
) -> _Views:
    """Ids and features of the views before requests that were made at some times."""
    number = np.bincount(events["request"], minlength=len(time))
    last = np.full(len(time), -1)
    last[events["request"]] = events["request_timestamp"]  # of several, the latest stands last
    item_id, is_known = _item_ids(catalogue, events["video_id"])
    return _Views(
        start=np.searchsorted(events["request"][is_known], np.arange(len(time) + 1)),
        item_id=item_id[is_known],
        features=history_features(events, time[events["request"]])[is_known],
        user_features=_features(np.log1p(number) / np.log1p(50)),
        context=context_features(time, last),
    )


def _places_of_values(name: str, values: WholeNumbers) -> WholeNumbers:
    """The place of each value among those of its category; 0 for one that was not published."""
    return np.where((values >= 0) & (values <= _VALUES[name]), values + 1, 0)


def _item_ids(
    catalogue: Catalogue, video_id: WholeNumbers
) -> tuple[Int32[np.ndarray, "rows"], Bool[np.ndarray, "rows"]]:
    """The item id of each video, and True if it has one."""
    # In ascending order, searches that follow one another end nearby, in memory that is at hand.
    order = np.argsort(video_id)
    place, known = np.empty(len(video_id), np.int32), np.empty(len(video_id), bool)
    place[order], known[order] = look_up(catalogue.video_id, video_id[order])
    return place, known


def _catalogue(plans: dict[Day, DayPlan], authors: int) -> Catalogue:
    """All users, and all videos as the first row has them, candidates before views."""

    def parts() -> Iterator[NamedArrays]:
        days = tqdm(plans.items(), "listing the videos", unit="day", disable=None)
        for day, plan in days:
            touched = np.flatnonzero(plan.last >= 0)
            for _, table in read_batches(day.stages, ("request_id", *_ITEM_COLUMNS), touched):
                chosen = request_places(plan, table["request_id"]) >= 0
                yield _items({name: column[chosen] for name, column in table.items()}, authors)
            sequences = read_sequences(day, plan.request_id)
            for first, end in _portions(plan):
                yield _items(events_of(plan, sequences, first, end), authors)

    videos = _folded(parts(), lambda table: _first_of_each(table, "video_id"))
    users = np.unique(np.concatenate([plan.user_id for plan in plans.values()]))
    return Catalogue(users, **videos)


def _items(rows: NamedArrays, authors: int) -> NamedArrays:
    """The videos in the rows: ids, places in their categories, and features."""
    rows = _first_of_each({name: rows[name] for name in _ITEM_COLUMNS}, "video_id")
    author = hash_into(rows["author_id"], authors)
    places = [np.where(rows["author_id"] < 0, -1, author)]
    places += [_places_of_values(name, rows[name]) for name in _OF_ITEM]
    return {
        "video_id": rows["video_id"],
        "category": np.stack(places, axis=1).astype(np.int32),
        "features": item_features(rows["duration"]),
    }


def _portions(plan: DayPlan) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive requests with at most `ROWS_AT_ONCE` rows, or one request."""
    ends = np.cumsum(plan.rows)
    first = 0
    while first < len(ends):
        before = ends[first] - plan.rows[first]
        end = int(np.searchsorted(ends, before + ROWS_AT_ONCE, side="right"))
        end = max(end, first + 1)
        yield first, end
        first = end


def _rows(day: Day, plan: DayPlan, first: int, end: int) -> NamedArrays:
    """All rows of the requests [first, end), with `request`, counted from `first`."""
    touched = np.flatnonzero((plan.first < end) & (plan.last >= first))
    parts = []
    for _, table in read_batches(day.stages, _ROW_COLUMNS, touched):
        place = request_places(plan, table["request_id"])
        kept = (place >= first) & (place < end)
        part = {name: column[kept] for name, column in table.items()}
        parts.append(part | {"request": place[kept] - first})
    return _end_to_end(parts)


def _by_request(rows: NamedArrays) -> NamedArrays:
    """One row for each request: its time, its user, and the number of its rows."""
    order = np.argsort(rows["request_id"], kind="stable")
    request_id = rows["request_id"][order]
    start = np.flatnonzero(_begins(request_id))
    return {
        "request_id": request_id[start],
        "request_timestamp": np.minimum.reduceat(rows["request_timestamp"][order], start),
        "user_id": rows["user_id"][order][start],
        "rows": np.add.reduceat(rows["rows"][order], start),
    }


def _first_of_each(table: NamedArrays, key: str) -> NamedArrays:
    """The first row of each value of a column, in ascending order of it."""
    _, first = np.unique(table[key], return_index=True)
    return {name: column[first] for name, column in table.items()}


def _folded(
    parts: Iterable[NamedArrays], fold: Callable[[NamedArrays], NamedArrays]
) -> NamedArrays:
    """`fold` of all parts end to end, though they are never held all at once.

    It is applied whenever the waiting parts have outgrown the folded ones, so `fold` must give the
    same for parts of which some were folded before. Parts without rows are left out.

    Returns:
      {} if no part has a row.
    """
    held: list[NamedArrays] = []
    size, waiting = 0, 0
    for part in parts:
        rows = len(next(iter(part.values())))
        if not rows:
            continue
        held.append(part)
        waiting += rows
        if waiting > max(size, ROWS_AT_ONCE):
            held = [fold(_end_to_end(held))]
            size, waiting = len(next(iter(held[0].values()))), 0
    return fold(_end_to_end(held)) if held else {}


def _end_to_end(parts: Sequence[NamedArrays]) -> NamedArrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check(data: ConfigDict, tasks: Sequence[str]) -> None:
    check_tasks(tasks, TASKS)
    if not data.path:
        raise UserError(
            "data.path is empty; set it to the folder with the files of RecFlow, which have to be "
            "downloaded by hand (docs/recflow.md)"
        )
    for split in SPLITS:
        for name in data[f"{split}_days"]:
            try:
                date_of(name)
            except ValueError:
                raise UserError(
                    f"data.{split}_days holds {name!r}; give days like 2024-02-18"
                ) from None
        if not data[f"{split}_days"]:
            raise UserError(f"data.{split}_days is empty; name at least one day")
        if len(set(data[f"{split}_days"])) < len(data[f"{split}_days"]):
            raise UserError(f"data.{split}_days may name no day twice")
    for earlier, later in itertools.pairwise(SPLITS):
        last, first = max(data[f"{earlier}_days"]), min(data[f"{later}_days"])
        if last >= first:
            raise UserError(
                f"data.{earlier}_days reaches to {last} and data.{later}_days begins with {first}; "
                "neither training nor validation may look ahead"
            )
