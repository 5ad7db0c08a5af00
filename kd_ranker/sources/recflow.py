"""RecFlow as requests: an industrial funnel logged at every stage, a day at a time.

Q. Liu, K. Zheng, R. Huang et al., "RecFlow: An Industrial Full Flow Recommendation Dataset", ICLR
2025. `docs/recflow.md` says how to get the files, what is known of their layout, and how near this
comes to the published experiments. `recflow_files` reads them.

A day of the log may be larger than memory. The engine goes through it, first for its requests and
the videos, then to put the rows of the chosen ones into order, of which some requests at a time
become requests here.

A request has all rows that the log holds of it as candidates: those that were shown, then those
that the rank stage scored, by their position there, then the others, see `with_positions`. Or, with
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

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from ibis import _
from ibis.util import gen_name
from jaxtyping import Float32, Int32, Int64
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
    date_of,
    find_days,
    read_sequences,
    read_stages,
    reading,
)
from kd_ranker.sources.tables import Engine, numbered, open_tables
from kd_ranker.sources.time_features import DAY, moment_features

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

_ITEM_COLUMNS = ("video_id", "author_id", *_OF_ITEM, "duration")
_FLAGS = tuple(dict.fromkeys((*RANKED, *GRADES)))
_COLUMNS = (
    *("request_id", "request_timestamp", "user_id", *_OF_REQUEST, *_ITEM_COLUMNS),
    *("upload_timestamp", "realshow", *_FLAGS, "rank_index", *LABELS.values()),
)
# What a request's candidates are made of.
_KEPT = (*_OF_REQUEST, "video_id", "upload_timestamp", "realshow", *LABELS.values())

USER_FEATURES, CONTEXT_FEATURES, HISTORY_FEATURES = 1, 11, 3
ITEM_FEATURES, CANDIDATE_FEATURES = 2, 2

# The number of candidates that are held at a time.
ROWS_AT_ONCE = 1 << 22

WholeNumbers = Int64[np.ndarray, "rows"]


class DayPlan(NamedTuple):
    """The chosen requests of a day, n of them in the order of time.

    Attributes:
      request_id: as in the files.
      time: in milliseconds.
      user_id: as in the files.
      size: the number of rows of each.
      rows: all rows of theirs, with `request`, the place of their request here.
      views: the effective views before them, as published, with `request` as well.
    """

    request_id: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]
    user_id: Int64[np.ndarray, "n"]
    size: Int64[np.ndarray, "n"]
    rows: ir.Table
    views: ir.Table


class _Prepared(NamedTuple):
    """All that the requests of the splits are made of.

    Attributes:
      engine: holds all tables.
      owner: closes the engine, at the latest when nobody holds it any more.
      plans: split -> day -> its requests.
      items: `video_id` and `id` of each video.
      users: the users of the chosen requests, ascending; their places are their ids.
    """

    engine: Engine
    owner: contextlib.ExitStack
    plans: Mapping[str, Mapping[Day, DayPlan]]
    items: ir.Table
    users: Int64[np.ndarray, "users"]


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
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(open_tables(str(data.dir)))
        plans = {split: _plans(engine, days[split], data, funnel) for split in SPLITS}
        every = [plan for of_days in plans.values() for plan in of_days.values()]
        videos = engine.keep("videos", _videos(every))
        features, category = _catalogue(engine, videos, int(data.authors))
        users = np.unique(np.concatenate([plan.user_id for plan in every]))
        items = videos.select("video_id", "id")
        # From here on, the engine is the source's to close.
        prepared = _Prepared(engine, stack.pop_all(), plans, items, users)
    spec = _spec(data, tasks, len(users), len(features))
    starts = np.array(spec.category_starts[len(_OF_REQUEST) :], np.int32)
    return Source(
        spec,
        features,
        functools.partial(_requests, prepared, data, tuple(tasks)),
        {
            split: sum(len(plan.request_id) for plan in of_days.values())
            for split, of_days in plans.items()
        },
        np.where(category < 0, -1, category + starts),
        close=prepared.owner.close,
    )


def _spec(data: ConfigDict, tasks: Sequence[str], num_users: int, num_items: int) -> FeatureSpec:
    return FeatureSpec(
        dataset="recflow",
        tasks=tuple(tasks),
        num_users=num_users,
        num_items=num_items,
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


def _plans(
    engine: Engine, days: Sequence[Day], data: ConfigDict, funnel: ConfigDict
) -> dict[Day, DayPlan]:
    """Looks through the log; raises UserError where the funnel cannot hold a request."""
    plans = {}
    of_each = int(data.of_each_stage)
    for day in tqdm(days, "looking through the log", unit="day", disable=None):
        with reading(day):
            plans[day] = plan_day(engine, day, int(data.max_requests_per_day), data.seed, of_each)
        largest = int(plans[day].size.max())
        most = min(largest, len(GRADES) * of_each) if of_each else largest
        if most > funnel.retrieved:
            raise UserError(
                f"funnel.retrieved={funnel.retrieved} is less than the {most} candidates of a "
                f"request in {day.stages}; set it to {most} or more"
            )
    return plans


def _requests(
    prepared: _Prepared, data: ConfigDict, tasks: Sequence[str], split: str
) -> Iterator[Request]:
    """The requests of a split, day by day."""
    check_choice("split", split, SPLITS)
    engine = prepared.engine
    order = ["request", "request_timestamp", "place"]
    for day, plan in prepared.plans[split].items():
        of_items = plan.rows.join(prepared.items, "video_id")
        rows = candidates_of(of_items, int(data.of_each_stage)).order_by(_FUNNEL_ORDER)
        views = plan.views.join(prepared.items, "video_id").order_by(order)
        # Split by split, more than one reader may be at the same day.
        names = [gen_name("candidates"), gen_name("views")]
        with reading(day):
            rows, views = (engine.keep(*of) for of in zip(names, (rows, views), strict=True))
        for first, end in _portions(plan.size):
            candidates, events = (
                engine.fetch(table.filter(_.request.between(first, end - 1)).order_by(by))
                for table, by in ((rows, _FUNNEL_ORDER), (views, order))
            )
            of_portion = slice(first, end)
            yield from _requests_of(
                plan._replace(**{name: getattr(plan, name)[of_portion] for name in _OF_PLAN}),
                _arrays(candidates, first),
                _arrays(events, first),
                np.searchsorted(prepared.users, plan.user_id[of_portion]),
                tasks,
                int(data.history_length),
            )
        for name in names:
            engine.backend.con.execute(f'DROP TABLE "{name}"')


_OF_PLAN = ("request_id", "time", "user_id", "size")


def _arrays(table: pa.Table, first: int) -> dict[str, np.ndarray]:
    """The columns of a table, with `request` counted from `first`."""
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return columns | {"request": columns["request"] - first}


def categories(authors: int) -> tuple[Category, ...]:
    """The categorical features; value v of each has place v + 1, and place 0 is for the unknown."""
    return (
        *(Category(name, "request", _VALUES[name] + 2) for name in _OF_REQUEST),
        Category("author", "item", authors),
        *(Category(name, "item", _VALUES[name] + 2) for name in _OF_ITEM),
    )


def plan_day(engine: Engine, day: Day, max_requests: int, seed: int, of_each: int) -> DayPlan:
    """Looks through a day's log for its requests, and draws `max_requests` of them if not 0.

    With `of_each`, rows outside `GRADES` are none, and requests without others neither.
    """
    rows = read_stages(engine, day, _COLUMNS)
    is_row = grade_of(rows) < len(GRADES) if of_each else ibis.literal(True)
    requests = rows.filter(is_row).group_by("request_id").agg(size=_.count())
    times = rows.group_by("request_id").agg(time=_.request_timestamp.min(), user=_.user_id.min())
    found = engine.fetch(requests.join(times, "request_id").order_by("request_id"))
    if not len(found):
        which = f" of {', '.join(GRADES)}" if of_each else ""
        raise UserError(f"{day.stages} has no rows{which}")
    request_id, time, user_id, size = (
        found[name].to_numpy() for name in ("request_id", "time", "user", "size")
    )
    chosen = np.arange(len(found))
    if 0 < max_requests < len(chosen):
        generator = np.random.default_rng([seed, date_of(day.name).toordinal()])
        chosen = generator.choice(chosen, max_requests, replace=False)
    chosen = chosen[np.lexsort([request_id[chosen], time[chosen]])]
    places = {"request_id": request_id[chosen], "request": np.arange(len(chosen))}
    return DayPlan(
        request_id[chosen],
        time[chosen],
        user_id[chosen],
        size[chosen],
        rows.join(engine.put(f"requests {day.name}", pa.table(places)), "request_id"),
        _views(engine, day, request_id[chosen], time[chosen]),
    )


def _views(
    engine: Engine, day: Day, request_id: Int64[np.ndarray, "n"], time: Int64[np.ndarray, "n"]
) -> ir.Table:
    """The effective views before each of some requests, with `request`, its place, and `place`.

    Empty places of the published sequences are left out, and so are views that were not strictly
    before the request.
    """
    sequences = read_sequences(day, request_id)
    lengths = [len(sequence) for sequence in sequences.values()]
    columns = dict(zip(SEQUENCE_COLUMNS, np.concatenate([*sequences.values()]).T, strict=True))
    request = np.repeat(np.fromiter(sequences, np.int64), lengths)
    viewed = columns["request_timestamp"]
    real = (viewed > 0) & (viewed < time[request]) & (columns["video_id"] >= 0)
    columns |= {"request": request, "place": np.arange(len(request))}
    kept = {name: column[real] for name, column in columns.items()}
    return engine.put(f"sequences {day.name}", pa.table(kept))


def _stage_of(rows: ir.Table) -> ir.IntegerValue:
    """The furthest stage that the flags of a row tell.

    `realshow` → SHOWN; `rank_pos`, `rank_neg`, `rerank_pos` or `rerank_neg`, all of which the rank
    stage has scored → PASSED; the others, among them `coarse_neg` and `prerank_neg` → RETRIEVED.
    """
    is_ranked = ibis.or_(*(rows[name] == 1 for name in RANKED))
    return ibis.cases(
        (rows.realshow == 1, Stage.SHOWN.value),
        (is_ranked, Stage.PASSED.value),
        else_=Stage.RETRIEVED.value,
    )


def grade_of(rows: ir.Table) -> ir.IntegerValue:
    """The place in `GRADES` of the first flag that a row has; their number if it has none."""
    flags = ((rows[name] == 1, place) for place, name in enumerate(GRADES))
    return ibis.cases(*flags, else_=len(GRADES))


def with_positions(rows: ir.Table) -> ir.Table:
    """The rows with `position`, the final ranker's of each candidate in its request, without gaps.

    The smallest index of a request becomes 0, wherever the files begin to count, and each further
    one the next number; equal ones share a position. A candidate without one has none.

    It is not documented what the files write where no position was logged, so an index counts only
    if it can be one: it is not negative, the rank stage scored the candidate, and unless the
    candidate is a `rank_pos` (which the final ranker put first) itself, one of the request stands
    before it.

    Args:
      rows: have `request`, `rank_index`, -1 where missing, `stage`, and `rank_pos`, 1 if it is set.
    """
    rows = rows.mutate(possible=(rows.stage >= Stage.PASSED.value) & (rows.rank_index >= 0))
    best = rows.rank_index.min(where=rows.possible & (rows.rank_pos == 1)).over(group_by="request")
    rows = rows.mutate(best=best)
    known = rows.possible & ((rows.rank_pos == 1) | (rows.rank_index > rows.best))
    rows = rows.mutate(known=(known & rows.best.notnull()).fill_null(False))
    rank = ibis.dense_rank().over(group_by=["request", "known"], order_by="rank_index")
    placed = rows.mutate(position=ibis.ifelse(rows.known, rank, None))
    return placed.drop("possible", "best", "known")


# Stands behind all positions.
_NO_POSITION = 2**40
_FUNNEL_ORDER = ("request", "grade", ibis.coalesce(_.position, _NO_POSITION), "video_id")


def candidates_of(rows: ir.Table, of_each: int) -> ir.Table:
    """The candidates of requests, with `grade`, `stage` and `position`.

    A video that a request has several rows of keeps the one that came furthest, then that with the
    best index, then that with the first label that the other lacks. Within a stage, those with a
    position come first, by it, and then the others by their video's id.

    Args:
      rows: rows of the log, with `request`, the number of the request of each.
      of_each: 0 takes all rows, and their stages are `_stage_of`. Otherwise there are the first so
        many of each of `GRADES`, whose stage is that of the grade.
    """
    if of_each:
        rows = rows.mutate(grade=grade_of(rows)).filter(_.grade < len(GRADES))
        stages = enumerate(GRADES.values())
        rows = rows.mutate(
            stage=ibis.cases(*((rows.grade == place, stage.value) for place, stage in stages))
        )
    else:
        rows = rows.mutate(stage=_stage_of(rows))
        rows = rows.mutate(grade=Stage.SHOWN.value - rows.stage)
    order = ["grade", _.rank_index < 0, "rank_index"]
    order += [ibis.desc(name) for name in (*_KEPT, "rank_pos")]
    turn = ibis.row_number().over(group_by=["request", "video_id"], order_by=order)
    rows = with_positions(rows.mutate(turn=turn).filter(_.turn == 0))
    if of_each:
        place = ibis.row_number().over(group_by=["request", "grade"], order_by=_FUNNEL_ORDER[2:])
        rows = rows.mutate(place=place).filter(_.place < of_each)
    return rows.select("request", "id", "grade", "stage", "position", *_KEPT)


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
    pause = np.where(last < 0, np.nan, np.log1p(np.maximum(time - last, 0) / (1000 * DAY)))
    return moment_features(time // 1000, pause).astype(np.float32)


def history_features(
    events: Mapping[str, np.ndarray], time: WholeNumbers
) -> Float32[np.ndarray, "rows 3"]:
    """[log(1 + days since the view); log(1 + duration in seconds); share watched, at most 2].

    Args:
      events: see `_views`; times watched and durations are in milliseconds.
      time: of the request that each event precedes, in milliseconds.
    """
    duration = np.maximum(events["duration"], 0)
    watched = np.maximum(events["playing_time"], 0) / np.maximum(duration, 1)
    days = (time - events["request_timestamp"]) / (1000 * DAY)
    return _features(np.log1p(days), np.log1p(duration / 1000), np.minimum(watched, 2))


def _features(*columns: Any) -> Float32[np.ndarray, "rows columns"]:
    return np.stack(columns, axis=-1).astype(np.float32)


def _requests_of(
    plan: DayPlan,
    rows: Mapping[str, np.ndarray],
    events: Mapping[str, np.ndarray],
    user_id: Int64[np.ndarray, "n"],
    tasks: Sequence[str],
    history_length: int,
) -> Iterator[Request]:
    """The requests of a plan, from the rows of `candidates_of` and all views."""
    time = plan.time
    number = np.arange(len(time) + 1)
    start, view_start = (np.searchsorted(of["request"], number) for of in (rows, events))
    label = np.stack([rows[LABELS[task]] == 1 for task in tasks], axis=1).astype(np.uint8)
    label_weight = (rows["realshow"] == 1).astype(np.float32)
    # NaN where there is none.
    probability = probability_of_rank(rows["position"].astype(np.float64)).astype(np.float32)
    probability = np.tile(probability[:, None], len(tasks))
    features = candidate_features(rows["upload_timestamp"], time[rows["request"]])
    values = [_places_of_values(name, rows[name][start[:-1]]) for name in _OF_REQUEST]
    category = (np.stack(values, axis=1) + _REQUEST_STARTS).astype(np.int32)
    last = np.full(len(time), -1)
    last[events["request"]] = events["request_timestamp"]  # of several, the latest stands last
    context = context_features(time, last)
    of_user = _features(np.log1p(np.diff(view_start)) / np.log1p(50))
    of_view = history_features(events, time[events["request"]])
    for request in range(len(time)):
        own = slice(start[request], start[request + 1])
        shown = int((rows["stage"][own] == Stage.SHOWN).sum())
        passed = int((rows["stage"][own] >= Stage.PASSED).sum())
        logged = slice(own.start, own.start + passed)
        until = view_start[request + 1]
        latest = slice(max(view_start[request], until - history_length), until)
        yield Request(
            request_id=int(plan.request_id[request]),
            time=int(time[request] // 1000),
            user_id=int(user_id[request]),
            user_features=of_user[request],
            context=context[request],
            history_id=events["id"][latest].astype(np.int32),
            history_features=of_view[latest],
            item_id=rows["id"][own].astype(np.int32),
            candidate_features=features[own],
            num_passed=passed,
            user_label=label[own][:shown],
            label_weight=label_weight[own][:shown],
            teacher_probability=probability[logged],
            teacher_weight=(~np.isnan(probability[logged, 0])).astype(np.float32),
            teacher_version=TEACHER_VERSION,
            true_probability=np.zeros((0, len(tasks)), np.float32),
            request_category=category[request],
        )


def _places_of_values(name: str, values: WholeNumbers) -> WholeNumbers:
    """The place of each value among those of its category; 0 for one that was not published."""
    return np.where((values >= 0) & (values <= _VALUES[name]), values + 1, 0)


def _videos(plans: Sequence[DayPlan]) -> ir.Table:
    """All videos of candidates and views by their ids, with `id`, the place of each.

    Of a video whose rows differ, the largest value of each column counts, so that what is known
    stands before what is not.
    """
    tables = [table for plan in plans for table in (plan.rows, plan.views)]
    rows = ibis.union(*(
        table.group_by("video_id").agg(**{name: table[name].max() for name in _ITEM_COLUMNS[1:]})
        for table in tables
    ))  # fmt: skip
    videos = rows.group_by("video_id").agg(**{name: rows[name].max() for name in _ITEM_COLUMNS[1:]})
    return numbered(videos, "video_id")


def _catalogue(
    engine: Engine, videos: ir.Table, authors: int
) -> tuple[Float32[np.ndarray, "items F"], Int32[np.ndarray, "items 4"]]:
    """Features of the videos, and their places in their categories; -1 for an unknown author."""
    found = engine.fetch(videos.order_by("id"))
    author = found["author_id"].to_numpy()
    places = [np.where(author < 0, -1, hash_into(author, authors))]
    places += [_places_of_values(name, found[name].to_numpy()) for name in _OF_ITEM]
    return item_features(found["duration"].to_numpy()), np.stack(places, axis=1).astype(np.int32)


def _portions(size: Int64[np.ndarray, "n"]) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive requests with at most `ROWS_AT_ONCE` rows, or one request."""
    ends = np.cumsum(size)
    first = 0
    while first < len(ends):
        before = ends[first] - size[first]
        end = int(np.searchsorted(ends, before + ROWS_AT_ONCE, side="right"))
        end = max(end, first + 1)
        yield first, end
        first = end


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
