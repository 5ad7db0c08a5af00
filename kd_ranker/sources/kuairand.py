"""KuaiRand as requests: sessions of a short-video feed, and a test set that no policy has chosen.

C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang and X. He, "KuaiRand: An Unbiased
Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022. Two logs of the same
users: the standard one (8 April to 8 May 2022) holds videos of the app's policies, the random one
(22 April to 8 May) videos drawn uniformly from a pool and put into the feed in place of others.
Both overlap in time. `kuairand_files` reads them.

KuaiRand knows no requests, so one is made of a user's consecutive impressions in one scenario of
the app (`tab`), see `cut_blocks`. Its time, in whole seconds, is the first impression's, and all
that is known of the user and of the videos stems from seconds strictly before, from both logs. Its
candidates are the videos of those impressions, which are shown and so passed, in the order in which
they were shown, and then `data.negatives` videos that were not, which are retrieved: videos of
earlier impressions of the standard log, of any user, each drawn with a probability in proportion to
how often it was shown (`draw_negatives`), by id. A video shown more than once in a request is one
candidate, on which everything counts that the user did.

Train requests are made of the standard log before `data.validation_from`, validation requests of
the random or the standard log from then until `data.test_from`, test requests of the same log from
then on. So every impression of a split precedes every request of the next, and no two splits share
one. Before 22 April there is no random log: with the default `validation_from`, no train request
knows of a random impression.

Widths and order of the features:
  user: `kuairand_files.Users`' 7, log(1 + n) / 5 of n impressions so far, `lift` of all tasks.
  context: sin and cos of the hour in Beijing, weekday (one-hot from Monday), log(1 + hours since
    the last impression) / 3, whether there was none.
  history, of impressions with any of TASKS done: which, log(1 + age in hours) / 5.
  item: log(1 + seconds of duration) − 4, log(height / width), log(1 + days from the upload to the
    end of the logs) / 3, and for each of the three whether it is unknown, and it then is 0.
  candidate: log(1 + n) / 5 of n impressions by anyone so far, `lift` of CANDIDATE_TASKS,
    log(1 + days since the day of the upload began) / 3, whether that is unknown.
  categories of a request: `kuairand_files.USER_CATEGORIES`, tab.
  categories of an item: those of `kuairand_files.Videos`.
"""

import dataclasses
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64, UInt8
from ml_collections import ConfigDict

from kd_ranker.batch import Category, FeatureSpec
from kd_ranker.errors import UserError, check_choice, check_tasks
from kd_ranker.requests.request import SPLITS, Request, Source, without_teacher
from kd_ranker.sources import kuairand_files
from kd_ranker.sources.kuairand_files import (
    BEIJING,
    COLUMN_OF_TASK,
    RANDOM_BIT,
    Impressions,
    KuaiRand,
)
from kd_ranker.sources.tallies import Rows, Tally
from kd_ranker.sources.time_features import DAY, moment_features

TASKS = tuple(COLUMN_OF_TASK)
VARIANT_OF_NAME = {f"kuairand_{variant}": variant for variant in kuairand_files.VARIANTS}
TESTS = ("random", "standard")

# Rates before anything is known, as if PRIOR_COUNT impressions had them: round figures, fixed in
# advance. The order is that of TASKS.
PRIOR_RATE = np.array([0.3, 0.02, 0.001, 0.001, 0.002, 0.4])
PRIOR_COUNT = 20

# A candidate carries the rates of these; each one more is four bytes a candidate.
CANDIDATE_TASKS = ("watch", "like", "share")
NUM_TABS = 15
LOGS_START = 1_649_347_200  # 2022-04-08 00:00 in Beijing
RANDOM_START = 1_650_556_800  # 2022-04-22, the first day of the random log
LOGS_END = 1_652_025_600  # 2022-05-09, behind the last day

CONTEXT_FEATURES = 11
HISTORY_FEATURES = len(TASKS) + 1
CANDIDATE_FEATURES = 1 + len(CANDIDATE_TASKS) + 2
ITEM_FEATURES = 6

# What a split adds to the seed of the draw of its requests.
_SEED_OF_SPLIT = {"train": 0, "test": 1, "validation": 2}
_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class ImpressionBlocks:
    """The impressions of m requests, in the order of time.

    Those of request i are the places `rows[start[i]:start[i + 1]]` of the log, by time.
    """

    rows: Int[np.ndarray, "n"]
    start: Int64[np.ndarray, "m+1"]
    time: Int32[np.ndarray, "m"]  # of the first impression

    def __len__(self) -> int:
        """The number of requests."""
        return len(self.time)


class _Prepared(NamedTuple):
    """All that the requests of the splits are made of.

    Attributes:
      log: all impressions.
      blocks: split -> its requests.
      user_features: those of the files.
      upload_time: see `kuairand_files.Videos`.
      user_category: category ids of users.
      tab_category: that of each tab, see `_category_ids`.
      user_start: where the impressions of each user begin in the log; then their end.
      by_time: the places of all impressions, in the order of time.
      engaged: the places of those on which the user did anything of TASKS.
    """

    log: Impressions
    blocks: dict[str, ImpressionBlocks]
    user_features: Float32[np.ndarray, "users 7"]
    upload_time: Int32[np.ndarray, "items"]
    user_category: Int32[np.ndarray, "users K-1"]
    tab_category: Int32[np.ndarray, "tabs"]
    user_start: Int64[np.ndarray, "users+1"]
    by_time: Int[np.ndarray, "n"]
    engaged: Int[np.ndarray, "events"]


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Opens a variant of KuaiRand as a source.

    Args:
      data: the source's part of the config.
      tasks: some of TASKS, in any order.
      funnel: `retrieved` must hold all candidates.

    Returns:
      The source; each split comes in the order of time.

    Raises:
      UserError: for files that are missing or malformed, and tasks or settings that make no sense.
    """
    starts = _check(data, tasks, funnel)
    files = kuairand_files.read_kuairand(
        data.path,
        VARIANT_OF_NAME[data.name],
        max_users=int(data.max_users),
        seed=int(data.seed),
        author_rows=int(data.author_rows),
        music_rows=int(data.music_rows),
        directory=str(data.get("dir", "")),
    )
    categories = _categories(files)
    item_category, user_category, tab_category = _category_ids(files, categories)
    spec = FeatureSpec(
        dataset=data.name,
        tasks=tuple(tasks),
        num_users=len(files.users.features),
        num_items=len(files.videos.upload_time),
        user_features=files.users.features.shape[1] + 1 + len(TASKS),
        context_features=CONTEXT_FEATURES,
        candidate_features=CANDIDATE_FEATURES,
        item_features=ITEM_FEATURES,
        cheap_item_features=ITEM_FEATURES,
        history_length=int(data.history_length),
        history_features=HISTORY_FEATURES,
        teacher_version="",
        categories=categories,
    )
    blocks = _blocks(files.log, data, starts)
    prepared = _prepare(files, blocks, user_category, tab_category)
    return Source(
        spec,
        item_features(files),
        functools.partial(_requests, prepared, data, tasks),
        {split: len(blocks[split]) for split in SPLITS},
        item_category,
    )


def _prepare(
    files: KuaiRand,
    blocks: dict[str, ImpressionBlocks],
    user_category: Int32[np.ndarray, "users K-1"],
    tab_category: Int32[np.ndarray, "tabs"],
) -> _Prepared:
    """Keeps the parts of the files that requests are made of, and sorts the log in two ways."""
    log, place_type = files.log, _place_type(files.log)
    # A number looked for in a column has its type, or NumPy would convert the column each time.
    users = np.arange(len(files.users.features) + 1, dtype=np.int32)
    return _Prepared(
        log=log,
        blocks=blocks,
        user_features=files.users.features,
        upload_time=files.videos.upload_time,
        user_category=user_category,
        tab_category=tab_category,
        user_start=np.searchsorted(log.user, users),
        by_time=np.argsort(log.time, kind="stable").astype(place_type),
        engaged=np.flatnonzero(log.signals & ((1 << RANDOM_BIT) - 1)).astype(place_type),
    )


def _requests(
    prepared: _Prepared, data: ConfigDict, tasks: Sequence[str], split: str
) -> Iterator[Request]:
    """The requests of a split, in the order of time."""
    check_choice("split", split, SPLITS)
    log, blocks = prepared.log, prepared.blocks[split]
    bits = np.array([TASKS.index(task) for task in tasks], np.uint8)
    num_users, num_items = len(prepared.user_features), len(prepared.upload_time)
    of_users = _tally(prepared, log.user, TASKS, num_users)
    of_items = _tally(prepared, log.item, CANDIDATE_TASKS, num_items)
    earlier = np.searchsorted(log.time[prepared.by_time], blocks.time)
    for request_id, time in enumerate(blocks.time.tolist()):
        before = int(earlier[request_id])
        user_tally, item_tally = of_users.of_first(before), of_items.of_first(before)
        rows = blocks.rows[blocks.start[request_id] : blocks.start[request_id + 1]]
        user, tab = int(log.user[rows[0]]), int(log.tab[rows[0]])
        shown, signals = merged(log.item[rows], log.signals[rows])
        # Seeded so that the draw depends on no other request and on nothing that comes later.
        generator = np.random.default_rng([int(data.seed), user, time, tab + 1])
        negatives = draw_negatives(
            log, prepared.by_time[:before], shown, int(data.negatives), generator
        )
        candidates = np.concatenate([shown, negatives])
        last, events = _history(prepared, user, time, int(data.history_length))
        yield Request(
            request_id=request_id,
            time=time,
            user_id=user,
            user_features=np.concatenate(
                [prepared.user_features[user], rates(user_tally[:, user], PRIOR_RATE)]
            ),
            context=context_features(time, last),
            history_id=log.item[events],
            history_features=history_features(time, log.signals[events], log.time[events]),
            item_id=candidates,
            candidate_features=candidate_features(
                time, item_tally[:, candidates], prepared.upload_time[candidates]
            ),
            num_passed=len(shown),
            user_label=signals[:, None] >> bits & np.uint8(1),
            label_weight=np.ones(len(shown), np.float32),
            **without_teacher(len(tasks)),
            request_category=np.append(prepared.user_category[user], prepared.tab_category[tab]),
        )


def _history(
    prepared: _Prepared, user: int, time: int, length: int
) -> tuple[int | None, Int[np.ndarray, "H"]]:
    """The last impression and events of a user before a request.

    Returns:
      The time of the user's last impression, None if there is none, and the places in the log of
      the last events, the most recent last.
    """
    log, engaged = prepared.log, prepared.engaged
    first, end = prepared.user_start[user : user + 2]
    known = first + np.searchsorted(log.time[first:end], np.int32(time))
    start, stop = np.searchsorted(engaged, np.array([first, known], engaged.dtype))
    last = int(log.time[known - 1]) if known > first else None
    return last, engaged[start:stop][-length:]


def cut_blocks(
    log: Impressions, rows: Int[np.ndarray, "n"], pause: int, most: int
) -> tuple[Int[np.ndarray, "n"], Int64[np.ndarray, "m+1"]]:
    """Cuts some impressions into blocks that requests stand for.

    Impressions of a user in a tab form a session as long as less than `pause` seconds pass from
    each to the next. A session is cut into blocks of `most` impressions and a last one of the rest.

    Args:
      log: all impressions.
      rows: the places of those to cut, ascending.
      pause: in seconds.
      most: at least 1.

    Returns:
      `rows` by user, tab and time, and where in them each block begins, then their end.
    """
    order = np.argsort(log.user[rows] * np.int64(256) + log.tab[rows], kind="stable")
    rows = rows[order]
    del order  # there may be hundreds of millions of rows
    is_first = np.ones(len(rows), bool)
    is_first[1:] = np.diff(log.time[rows]) >= pause
    for column in (log.user, log.tab):
        is_first[1:] |= np.diff(column[rows]) != 0
    session_start = np.flatnonzero(is_first)
    blocks = -(-np.diff(session_start, append=len(rows)) // most)
    number = np.arange(blocks.sum()) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return rows, np.append(np.repeat(session_start, blocks) + most * number, len(rows))


def merged(
    item: Int32[np.ndarray, "n"], signals: UInt8[np.ndarray, "n"]
) -> tuple[Int32[np.ndarray, "different"], UInt8[np.ndarray, "different"]]:
    """Each video once, where it was shown first, with everything that was done on it.

    >>> [array.tolist() for array in merged(np.array([7, 3, 7]), np.array([1, 0, 2], np.uint8))]
    [[7, 3], [3, 0]]
    """
    _, first, which = np.unique(item, return_index=True, return_inverse=True)
    done = np.zeros(len(first), np.uint8)
    np.bitwise_or.at(done, which, signals)
    order = np.argsort(first)
    return item[first[order]], done[order]


def draw_negatives(
    log: Impressions,
    earlier: Int[np.ndarray, "n"],
    shown: Int32[np.ndarray, "S"],
    number: int,
    generator: np.random.Generator,
) -> Int32[np.ndarray, "at most number"]:
    """Draws videos that were shown to a user before, but not in this request, by id.

    Impressions are drawn uniformly and with replacement from `earlier` until there are `number`
    different videos of the standard log among them, or _ROUNDS · 2 · `number` were drawn.

    Args:
      log: all impressions.
      earlier: the places of those to draw from.
      shown: videos to leave out.
      number: of videos to draw.
      generator: all randomness comes from it.

    Returns:
      Fewer where `earlier` does not hold as many.
    """
    drawn = np.zeros(0, np.int32)
    for _ in range(_ROUNDS if len(earlier) and number else 0):
        rows = earlier[generator.integers(len(earlier), size=2 * number)]
        items = log.item[rows[log.signals[rows] >> RANDOM_BIT == 0]]
        drawn = np.concatenate([drawn, items[~np.isin(items, shown)]])
        # In the order of the draws: by id, the cut below would keep the lowest ones.
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        if len(drawn) >= number:
            break
    return np.sort(drawn[:number])


def _tally(
    prepared: _Prepared, ids: Int32[np.ndarray, "n"], tasks: Sequence[str], size: int
) -> Tally:
    """Impressions of each id in row 0, then on how many of them each of the tasks was done."""
    bits = [TASKS.index(task) for task in tasks]

    def values(rows: Rows) -> list[int | np.ndarray]:
        signals = prepared.log.signals[rows]
        return [1, *(signals >> np.uint8(bit) & np.uint8(1) for bit in bits)]

    shape = (1 + len(tasks), size)
    return Tally(ids, values, shape, np.int32, prepared.by_time)


def lift(
    done: Int[np.ndarray, "*shape"], count: Int[np.ndarray, "*shape"], prior: Float[np.ndarray, "_"]
) -> Float[np.ndarray, "*shape"]:
    """Logarithm of how much likelier an action is than a prior rate says; 0 if nothing is known.

    log((done + PRIOR_COUNT · prior) / ((count + PRIOR_COUNT) · prior)), where the action was done
    on `done` of `count` impressions.

    >>> lift(np.array([0, 6, 30]), np.array([0, 20, 100]), np.array([0.3, 0.3, 0.3])).round(3) + 0.0
    array([0., 0., 0.])
    """
    return np.log((done + PRIOR_COUNT * prior) / ((count + PRIOR_COUNT) * prior))


def rates(
    tally: Int[np.ndarray, "1+K"], prior: Float[np.ndarray, "K"]
) -> Float32[np.ndarray, "1+K"]:
    """[log(1 + impressions) / 5, `lift` of each action] of a tally, see `_tally`."""
    return np.append(np.log1p(tally[:1]) / 5, lift(tally[1:], tally[0], prior)).astype(np.float32)


def context_features(time: int, last: int | None) -> Float32[np.ndarray, "C"]:
    """Features of the moment.

    Args:
      time: of the request, in seconds since 1970, UTC.
      last: of the user's last impression before; None if there is none.

    Returns:
      [sin and cos of the hour in Beijing; weekday there, one-hot from Monday; log(1 + hours since
      `last`) / 3, 0 if there is none; 1 if there is none].
    """
    pause = np.nan if last is None else np.log1p((time - last) / 3600) / 3
    return moment_features(time + BEIJING, pause).astype(np.float32)


def history_features(
    time: int, signals: UInt8[np.ndarray, "H"], happened: Int32[np.ndarray, "H"]
) -> Float32[np.ndarray, "H E"]:
    """[whether each of TASKS was done; log(1 + hours from `happened` to `time`) / 5]."""
    done = signals[:, None] >> np.arange(len(TASKS), dtype=np.uint8) & np.uint8(1)
    age = np.log1p((time - happened) / 3600) / 5
    return np.concatenate([done, age[:, None]], axis=1, dtype=np.float32)


def candidate_features(
    time: int, tally: Int32[np.ndarray, "1+K N"], upload_time: Int32[np.ndarray, "N"]
) -> Float32[np.ndarray, "N X"]:
    """Features of candidates that differ from request to request.

    [log(1 + impressions) / 5; `lift` of CANDIDATE_TASKS; log(1 + days since `upload_time`) / 3, 0
    where that is unknown; 1 where it is unknown] of each candidate. An upload day after the request
    counts as the request's.
    """
    prior = np.array([PRIOR_RATE[TASKS.index(task)] for task in CANDIDATE_TASKS])
    age, unknown = _log_days(upload_time, time)
    return np.concatenate(
        [
            np.log1p(tally[:1]).T / 5,
            lift(tally[1:].T, tally[:1].T, prior),
            age[:, None],
            unknown[:, None],
        ],
        axis=1,
        dtype=np.float32,
    )


def item_features(files: KuaiRand) -> Float32[np.ndarray, "items F"]:
    """[duration, shape, age; whether each is unknown] of each item, see the top of this file."""
    videos = files.videos
    features = np.zeros((len(videos.seconds), ITEM_FEATURES), np.float32)
    known = ~np.isnan(videos.seconds)
    features[known, 0] = np.log1p(videos.seconds[known]) - 4
    features[:, 1] = np.nan_to_num(videos.shape)
    features[:, 2], features[:, 5] = _log_days(videos.upload_time, LOGS_END)
    features[:, 3], features[:, 4] = ~known, np.isnan(videos.shape)
    return features


def _log_days(
    since: Int32[np.ndarray, "n"], time: int
) -> tuple[Float[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """log(1 + days) / 3, 0 where the start is unknown, and a flag for that."""
    unknown = since == kuairand_files.NO_TIME
    days = np.maximum(time - np.where(unknown, time, since).astype(np.int64), 0) / DAY
    return np.log1p(days) / 3, unknown


def _place_type(log: Impressions) -> type[np.int32] | type[np.int64]:
    """The type of places in the log: 32 bits if they suffice, since there is one a row."""
    return np.int32 if len(log.user) < 2**31 else np.int64


def _blocks(
    log: Impressions, data: ConfigDict, starts: dict[str, int]
) -> dict[str, ImpressionBlocks]:
    """The blocks of each split, as many as the config keeps; `starts` is that of `_check`."""
    spans = {
        "train": (0, starts["validation"]),
        "validation": (starts["validation"], starts["test"]),
        "test": (starts["test"], np.iinfo(np.int32).max),
    }
    when = {
        "train": f"before data.validation_from={data.validation_from}",
        "validation": f"from data.validation_from={data.validation_from} until "
        f"data.test_from={data.test_from}",
        "test": f"at or after data.test_from={data.test_from}",
    }
    blocks = {}
    for split in SPLITS:
        at_random = split != "train" and data.test == "random"
        begin, end = spans[split]
        chosen = (log.is_random == at_random) & (log.time >= begin) & (log.time < end)
        places = np.flatnonzero(chosen).astype(_place_type(log))
        if not len(places):
            raise UserError(
                f"{data.path} has no impression of the {'random' if at_random else 'standard'} log "
                f"{when[split]}, so the split {split!r} would be empty"
            )
        pause = data.random_session_minutes if at_random else data.session_minutes
        rows, start = cut_blocks(log, places, int(60 * pause), int(data.impressions_per_request))
        first, length = start[:-1], np.diff(start)
        if 0 < data[f"{split}_requests"] < len(first):
            generator = np.random.default_rng([int(data.seed), _SEED_OF_SPLIT[split]])
            drawn = generator.choice(len(first), int(data[f"{split}_requests"]), replace=False)
            first, length = first[drawn], length[drawn]
        order = np.lexsort([rows[first], log.time[rows[first]]])
        first, length = first[order], length[order]
        start = np.append(0, np.cumsum(length))
        rows = rows[np.repeat(first - start[:-1], length) + np.arange(start[-1])]
        blocks[split] = ImpressionBlocks(rows, start, log.time[rows[start[:-1]]])
    return blocks


def _categories(files: KuaiRand) -> tuple[Category, ...]:
    """The categorical features, those of requests first."""
    users = zip(kuairand_files.USER_CATEGORIES, files.users.sizes, strict=True)
    names = ("author_id", "music_id", *kuairand_files.VIDEO_CATEGORIES)
    *sizes, tags = files.videos.sizes
    return (
        *(Category(name, "request", size) for name, size in users),
        Category("tab", "request", NUM_TABS),
        *(Category(name, "item", size) for name, size in zip(names, sizes, strict=True)),
        Category("tag", "item", tags, kuairand_files.TAGS),
    )


def _category_ids(
    files: KuaiRand, categories: Sequence[Category]
) -> tuple[Int32[np.ndarray, "items I"], Int32[np.ndarray, "users K-1"], Int32[np.ndarray, "tabs"]]:
    """Category ids of items, of users, and of each tab; index -1 of the last is of no tab."""
    sizes = [category.size for category in categories]
    starts = np.cumsum([0, *sizes])[:-1]
    widths = [category.length for category in categories]
    is_of_item = np.repeat([category.of == "item" for category in categories], widths)
    columns = np.repeat(starts, widths).astype(np.int32)

    def shifted(codes: np.ndarray, start: np.ndarray) -> np.ndarray:
        return np.add(codes, start, out=codes.copy(), where=codes != kuairand_files.NO_CATEGORY)

    item_category = shifted(files.videos.category, columns[is_of_item])
    user_category = shifted(files.users.category, columns[~is_of_item][:-1])
    # A tab that is not among the published ones has no category either.
    tabs = np.full(256, kuairand_files.NO_CATEGORY, np.int32)
    tabs[:NUM_TABS] = columns[~is_of_item][-1] + np.arange(NUM_TABS)
    return item_category, user_category, tabs


def _check(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> dict[str, int]:
    """Raises UserError for settings that make no sense; returns when validation and test begin."""
    check_tasks(tasks, TASKS)
    check_choice("data.name", data.name, VARIANT_OF_NAME)
    candidates = data.impressions_per_request + data.negatives
    if funnel.retrieved < candidates:
        raise UserError(
            f"funnel.retrieved={funnel.retrieved} is less than the {candidates} candidates that "
            "data.impressions_per_request and data.negatives make"
        )
    if not data.path:
        raise UserError(
            f"data.path is empty; unpack the archive of {kuairand_files.ARCHIVE} and set data.path "
            "to its folder"
        )
    starts = {split: _midnight(f"{split}_from", data) for split in ("validation", "test")}
    days = f"data.validation_from={data.validation_from} until data.test_from={data.test_from}"
    if starts["validation"] >= starts["test"]:
        raise UserError(
            f"validation requests are those from {days}, which leaves no day; let the first be the "
            "earlier one"
        )
    log_start = RANDOM_START if data.test == "random" else LOGS_START
    if starts["test"] <= log_start or starts["validation"] >= LOGS_END:
        first = datetime.datetime.fromtimestamp(log_start + BEIJING, datetime.UTC)
        raise UserError(
            f"validation requests are those from {days}, and the {data.test} log runs from "
            f"{first:%Y-%m-%d} to 2022-05-08"
        )
    return starts


def _midnight(key: str, data: ConfigDict) -> int:
    """When the day begins in Beijing that a key of `data` names."""
    try:
        midnight = datetime.datetime.fromisoformat(f"{data[key]}T00:00:00+00:00")
    except ValueError as error:
        raise UserError(f"data.{key}={data[key]!r} is not a date like 2022-04-22") from error
    return int(midnight.timestamp()) - BEIJING
