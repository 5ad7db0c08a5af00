"""MovieLens 100K as requests: from each user's timeline of ratings, with nothing from the future.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015. The tasks are stand-ins for a feed's: `watch` means that
the film was rated, `like` that it was rated 4 or 5, `share` that it was rated 5.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.data.download import Archive, fetch
from kd_ranker.data.request import Request, Source
from kd_ranker.errors import UserError, check_choice

ARCHIVE = Archive(
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    size=4_924_029,
    sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    folder="ml-100k",
)
ENCODING = "iso-8859-1"

# The lowest rating that counts as the action.
LOWEST_RATING = {"watch": 1, "like": 4, "share": 5}
TASKS = tuple(LOWEST_RATING)

DAY = 24 * 3600
CONTEXT_FEATURES = 12
HISTORY_FEATURES = 6
CANDIDATE_FEATURES = 2

# Mean ratings start from this value as if this many ratings had given it: a neutral guess, fixed in
# advance, so that it stems from no data.
PRIOR_RATING = 3.5
PRIOR_COUNT = 5

_SPLITS = ("train", "test")
_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_RELEASE_DATE = re.compile(rf"\d{{1,2}}-(?:{_MONTHS})-(?:(\d{{4}})|V)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class MovieLens:
    """The files as arrays. Ids are the files' less 1; `n` is the number of ratings."""

    user: Int64[np.ndarray, "n"]
    item: Int64[np.ndarray, "n"]
    rating: Int64[np.ndarray, "n"]  # 1 to 5
    time: Int64[np.ndarray, "n"]  # seconds since 1970, UTC
    age: Int64[np.ndarray, "users"]  # years
    is_female: Bool[np.ndarray, "users"]
    occupation: Int64[np.ndarray, "users"]
    num_occupations: int
    genres: Bool[np.ndarray, "items genres"]
    release_year: Int64[np.ndarray, "items"]  # 0 where the file gives none


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One user's ratings in the order of time, and the blocks that requests cover.

    Ratings given in the same second stand in a seeded random order. Block b holds the ratings from
    `start[b]` until `start[b + 1]`, or until the end; `start[first_test:]` are the test blocks.
    """

    item: Int64[np.ndarray, "n"]
    rating: Int64[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]
    start: Int64[np.ndarray, "blocks"]
    first_test: int


@dataclasses.dataclass(frozen=True)
class ItemLog:
    """All ratings of each item in the order of time, laid end to end.

    `key` is item · 2³² + time, so it is sorted; `rating_sum[i]` is the sum of the first i ratings.
    """

    key: Int64[np.ndarray, "n"]
    first: Int64[np.ndarray, "items"]
    rating_sum: Int64[np.ndarray, "n+1"]


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """MovieLens 100K as a source.

    A request stands for a block of consecutive ratings of a user, see `block_starts`; its time is
    the first rating's, and all that is known of the user and of the items was known strictly
    before. Its candidates are the catalogue without what the user had rated before: those rated in
    the block first, in the order of rating, then the others by id. Whatever the user rates only
    later is among the others, with label 0, since leaving it out would tell the future. As labels
    are known for the whole list, it counts as shown and passed whole.

    Widths and order of the features:
      user: age, female, occupations (one-hot), log(1 + ratings so far), mean rating so far, the
        share of the ratings so far given to each genre, and the share that gave it 4 or 5.
      context: sin and cos of the hour (UTC), weekday (one-hot from Monday), log(1 + days since the
        last rating), whether this is the first request, log(1 + requests before this one).
      history: rating (one-hot), log(1 + age in days).
      item: genres, decades of the release after 1990, whether the release is unknown.
      candidate: log(1 + ratings by anyone so far) / 3, mean of these less PRIOR_RATING.

    Args:
      data: `path`, the directory with GroupLens' files, which are fetched to below `dir` if it is
        empty; `history_length`; `ratings_per_request`, the least ratings of a block; `test_share`,
        the share of each user's ratings, the last ones, that become test requests;
        `test_requests_per_user`, how many of these to keep, the earliest ones, or 0 for all;
        `seed`, for the order within a second.
      tasks: some of `TASKS`, in any order.
      funnel: `retrieved` must hold the whole catalogue.

    Returns:
      The source; each split comes in the order of time. A user's train requests precede the same
      user's test requests, but not another user's.

    Raises:
      UserError: for files that are missing or malformed, and tasks or numbers that make no sense.
    """
    _check(data, tasks)
    movielens = read(data.path or fetch(ARCHIVE, data.dir))
    if funnel.retrieved < len(movielens.genres):
        raise UserError(
            f"funnel.retrieved={funnel.retrieved} is less than the {len(movielens.genres)} films "
            "of the catalogue, all of which are candidates"
        )
    log = item_log(movielens)
    all_genres = movielens.genres.astype(np.float32)
    fixed_user_features = _fixed_user_features(movielens)
    timelines = _timelines(
        movielens, data.seed, int(data.ratings_per_request), float(data.test_share)
    )
    blocks = {
        split: _ordered_blocks(timelines, split, int(data.test_requests_per_user))
        for split in _SPLITS
    }
    lowest = np.array([LOWEST_RATING[task] for task in tasks])

    def requests(split: str) -> Iterator[Request]:
        check_choice("split", split, _SPLITS)
        for request_id, (user, block) in enumerate(blocks[split]):
            timeline = timelines[user]
            start = int(timeline.start[block])
            end = int(np.append(timeline.start, len(timeline.item))[block + 1])
            time = int(timeline.time[start])
            earlier = slice(max(0, start - int(data.history_length)), start)
            candidates, rating = candidates_and_ratings(timeline, start, end, log.first.size)
            yield Request(
                request_id=request_id,
                time=time,
                user_id=user,
                user_features=np.concatenate(
                    [
                        fixed_user_features[user],
                        user_statistics(timeline.rating[:start], all_genres[timeline.item[:start]]),
                    ]
                ),
                context=context_features(time, timeline.time[:start], block),
                history_id=timeline.item[earlier].astype(np.int32),
                history_features=history_features(
                    time, timeline.rating[earlier], timeline.time[earlier]
                ),
                item_id=candidates.astype(np.int32),
                candidate_features=item_statistics(log, time)[candidates],
                num_passed=len(candidates),
                user_label=(rating[:, None] >= lowest).astype(np.uint8),
                label_weight=np.ones(len(candidates), np.float32),
                teacher_probability=np.zeros((0, len(tasks)), np.float32),
                teacher_weight=np.zeros(0, np.float32),
                teacher_version="",
                true_probability=np.zeros((0, len(tasks)), np.float32),
            )

    num_genres = movielens.genres.shape[1]
    spec = FeatureSpec(
        dataset="movielens_100k",
        tasks=tuple(tasks),
        num_users=len(movielens.age),
        num_items=len(movielens.genres),
        user_features=fixed_user_features.shape[1] + 2 + 2 * num_genres,
        context_features=CONTEXT_FEATURES,
        candidate_features=CANDIDATE_FEATURES,
        item_features=num_genres + 2,
        cheap_item_features=num_genres + 2,
        history_length=int(data.history_length),
        history_features=HISTORY_FEATURES,
        teacher_version="",
        has_true_probability=False,
    )
    num_requests = {split: len(blocks[split]) for split in _SPLITS}
    return Source(spec, item_features(movielens), requests, num_requests)


def read(path: str | Path) -> MovieLens:
    """Reads u.data, u.item, u.user, u.genre and u.occupation from the directory `path`.

    Raises:
      UserError: where a file is missing or a line is malformed; names the file and the line.
    """
    directory = Path(path)
    genres = _read_genres(directory / "u.genre")
    flags, release_year = _read_items(directory / "u.item", genres)
    occupations = _read_occupations(directory / "u.occupation")
    age, is_female, occupation = _read_users(directory / "u.user", occupations)
    user, item, rating, time = _read_ratings(directory / "u.data", len(age), len(flags)).T
    return MovieLens(
        user=user,
        item=item,
        rating=rating,
        time=time,
        age=age,
        is_female=is_female,
        occupation=occupation,
        num_occupations=len(occupations),
        genres=flags,
        release_year=release_year,
    )


def block_starts(
    time: Int64[np.ndarray, "n"], ratings_per_request: int
) -> Int64[np.ndarray, "blocks"]:
    """Where each block of a user's ratings begins.

    A block takes `ratings_per_request` ratings, and then all that share the last one's second, so
    that no second is split. A last block of less than half of `ratings_per_request` joins the one
    before it, if there is one.

    Args:
      time: of each rating, in seconds, ascending; at least one.
      ratings_per_request: at least 1.

    Returns:
      The places of the first ratings; the first is 0.
    """
    starts = [0]
    while True:
        last = starts[-1] + ratings_per_request - 1
        if last >= len(time):
            break
        end = int(np.searchsorted(time, time[last], side="right"))
        if end == len(time):
            break
        starts.append(end)
    if len(starts) > 1 and 2 * (len(time) - starts[-1]) < ratings_per_request:
        starts.pop()
    return np.array(starts, np.int64)


def first_test_block(starts: Int64[np.ndarray, "blocks"], total: int, test_share: float) -> int:
    """The block from which on a user's blocks are test requests.

    It starts nearest to (1 − `test_share`) · `total` ratings. The first block is never a test; the
    last one always is if `test_share` is not 0 and there are two or more.
    """
    if test_share == 0 or len(starts) == 1:
        return len(starts)
    distance = np.abs(starts[1:] - (1 - test_share) * total)
    return 1 + int(distance.argmin())


def candidates_and_ratings(
    timeline: Timeline, start: int, end: int, num_items: int
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """The candidates of the block of ratings [start, end), and their ratings in it, 0 for none."""
    positives = timeline.item[start:end]
    is_other = np.ones(num_items, bool)
    # Only until the end of the block: what is rated later looks like any other item.
    is_other[timeline.item[:end]] = False
    others = np.flatnonzero(is_other)
    ratings = np.concatenate([timeline.rating[start:end], np.zeros(len(others), np.int64)])
    return np.concatenate([positives, others]), ratings


def user_statistics(
    rating: Int64[np.ndarray, "n"], genres: Float32[np.ndarray, "n genres"]
) -> Float32[np.ndarray, "2+2*genres"]:
    """What a user's n ratings so far say, with the genres of each rated item.

    [log(1 + n) / 3; the mean rating, with the prior, less PRIOR_RATING; for each genre the share of
    the ratings that it got, n_g / (n + PRIOR_COUNT); for each genre the share that gave it 4 or 5].
    """
    count = len(rating)
    rated = genres.sum(axis=0)
    liked = (rating >= LOWEST_RATING["like"]).astype(np.float32) @ genres
    mean = (rating.sum() - PRIOR_RATING * count) / (count + PRIOR_COUNT)
    scalars = np.array([np.log1p(count) / 3, mean], np.float32)
    shares = np.concatenate([rated, liked]) / np.float32(count + PRIOR_COUNT)
    return np.concatenate([scalars, shares])


def context_features(
    time: int, earlier: Int64[np.ndarray, "n"], position: int
) -> Float32[np.ndarray, "C"]:
    """What is known of the moment.

    Args:
      time: of the request, in seconds since 1970, UTC.
      earlier: times of the user's ratings before, ascending.
      position: how many requests the user made before.

    Returns:
      [sin and cos of the hour; weekday, one-hot from Monday; log(1 + days since the last rating),
      0 if there is none; 1 if there is none; log(1 + position) / 2].
    """
    angle = 2 * np.pi * (time % DAY) / DAY
    weekday = np.eye(7)[(time // DAY + 3) % 7]  # 1 January 1970 was a Thursday
    pause = np.log1p((time - earlier[-1]) / DAY) if len(earlier) else 0.0
    return np.concatenate(
        [
            [np.sin(angle), np.cos(angle)],
            weekday,
            [pause, float(len(earlier) == 0), np.log1p(position) / 2],
        ]
    ).astype(np.float32)


def history_features(
    time: int, rating: Int64[np.ndarray, "H"], rated_at: Int64[np.ndarray, "H"]
) -> Float32[np.ndarray, "H E"]:
    """[rating, one-hot from 1 to 5; log(1 + days from `rated_at` to `time`)] of each event."""
    age = np.log1p((time - rated_at) / DAY)
    return np.concatenate([np.eye(5)[rating - 1], age[:, None]], axis=1).astype(np.float32)


def item_features(movielens: MovieLens) -> Float32[np.ndarray, "items F"]:
    """[genres; (release year − 1990) / 10, 0 where unknown; 1 where unknown] of each item."""
    unknown = movielens.release_year == 0
    decades = np.where(unknown, 0, (movielens.release_year - 1990) / 10)
    return np.concatenate(
        [movielens.genres, decades[:, None], unknown[:, None]], axis=1, dtype=np.float32
    )


def item_log(movielens: MovieLens) -> ItemLog:
    """Arranges the ratings so that `item_statistics` is one search."""
    key = _item_key(movielens.item, movielens.time)
    order = np.argsort(key, kind="stable")
    key = key[order]
    first = np.searchsorted(key, _item_key(np.arange(len(movielens.genres)), 0))
    rating_sum = np.concatenate([[0], movielens.rating[order].cumsum()])
    return ItemLog(key, first, rating_sum)


def item_statistics(log: ItemLog, time: int) -> Float32[np.ndarray, "items X"]:
    """What all users' ratings strictly before `time` say of each item.

    [log(1 + count) / 3, the mean rating with the prior less PRIOR_RATING], where the mean with the
    prior is (sum + PRIOR_COUNT · PRIOR_RATING) / (count + PRIOR_COUNT).
    """
    last = np.searchsorted(log.key, _item_key(np.arange(len(log.first)), time))
    count = last - log.first
    total = log.rating_sum[last] - log.rating_sum[log.first]
    mean = (total - PRIOR_RATING * count) / (count + PRIOR_COUNT)
    return np.stack([np.log1p(count) / 3, mean], axis=1).astype(np.float32)


def _item_key(
    item: Int64[np.ndarray, "n"], time: Int64[np.ndarray, "n"] | int
) -> Int64[np.ndarray, "n"]:
    return (item << 32) + time


def _fixed_user_features(movielens: MovieLens) -> Float32[np.ndarray, "users _"]:
    """[(age − 35) / 12; female; occupation, one-hot] of each user."""
    age = (movielens.age - 35) / 12
    occupation = np.eye(movielens.num_occupations)[movielens.occupation]
    return np.concatenate(
        [age[:, None], movielens.is_female[:, None], occupation], axis=1, dtype=np.float32
    )


def _timelines(
    movielens: MovieLens, seed: int, ratings_per_request: int, test_share: float
) -> dict[int, Timeline]:
    """User id -> timeline, for the users who rated anything."""
    timelines = {}
    by_user = np.argsort(movielens.user, kind="stable")
    ends = np.bincount(movielens.user, minlength=len(movielens.age)).cumsum()
    for user, places in enumerate(np.split(by_user, ends[:-1])):
        if not len(places):
            continue
        # Drawn for the whole catalogue, the order within a second depends on neither the order of
        # the lines in the file nor on what else, earlier or later, was rated.
        luck = np.random.default_rng([seed, user]).permutation(len(movielens.genres))
        places = places[np.lexsort([luck[movielens.item[places]], movielens.time[places]])]
        time = movielens.time[places]
        start = block_starts(time, ratings_per_request)
        timelines[user] = Timeline(
            item=movielens.item[places],
            rating=movielens.rating[places],
            time=time,
            start=start,
            first_test=first_test_block(start, len(places), test_share),
        )
    return timelines


def _ordered_blocks(
    timelines: dict[int, Timeline], split: str, test_requests_per_user: int
) -> list[tuple[int, int]]:
    """The (user id, block) pairs of a split in the order of time, then of user ids."""
    timed = []
    for user, timeline in timelines.items():
        blocks = range(timeline.first_test)
        if split == "test":
            blocks = range(timeline.first_test, len(timeline.start))
            blocks = blocks[: test_requests_per_user or None]
        timed += [(int(timeline.time[timeline.start[block]]), user, block) for block in blocks]
    return [(user, block) for _, user, block in sorted(timed)]


def _lines(path: Path, separator: str, num_fields: int) -> Iterator[tuple[str, list[str]]]:
    """Yields (place for messages, fields) for each line; empty lines at the end are no lines."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; unpack {ARCHIVE.url} and set data.path to the directory that"
            " holds u.data, u.item, u.user, u.genre and u.occupation"
        )
    # Not splitlines(): in this encoding it would break lines at characters of a title.
    lines = path.read_text(ENCODING).rstrip("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        fields = line.split(separator)
        if len(fields) != num_fields:
            raise UserError(
                f"{place}: {len(fields)} fields separated by {separator!r}, expected {num_fields}"
            )
        yield place, fields


def _integer(place: str, name: str, text: str, lowest: int, highest: int) -> int:
    # int() alone would accept '1_0', ' 1' and other scripts' digits.
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{place}: {name} {text!r} is not a whole number")
    value = int(text)
    if not lowest <= value <= highest:
        raise UserError(f"{place}: {name} {value} is outside {lowest} to {highest}")
    return value


def _once(place: str, what: str, key: object, seen: dict[object, str]) -> None:
    """Raises UserError if `key` was met before; `seen` maps what was met to its place."""
    if key in seen:
        raise UserError(f"{place}: {what} was given before, in {seen[key]}")
    seen[key] = place


def _read_genres(path: Path) -> list[str]:
    """Genre names, in the order of their numbers, which count from 0 line by line."""
    names = []
    for number, (place, (name, text)) in enumerate(_lines(path, "|", 2)):
        _integer(place, "genre number", text, number, number)
        names.append(name)
    return names


def _read_occupations(path: Path) -> dict[str, int]:
    """Occupation -> its place in the file."""
    seen: dict[object, str] = {}
    places = {}
    for number, (place, (name,)) in enumerate(_lines(path, "|", 1)):
        _once(place, f"occupation {name!r}", name, seen)
        places[name] = number
    return places


def _read_items(
    path: Path, genres: Sequence[str]
) -> tuple[Bool[np.ndarray, "items genres"], Int64[np.ndarray, "items"]]:
    """Genre flags and release years; ids must be 1 to the number of lines, in any order."""
    lines = list(_lines(path, "|", 5 + len(genres)))
    flags = np.zeros((len(lines), len(genres)), bool)
    release_year = np.zeros(len(lines), np.int64)
    seen: dict[object, str] = {}
    for place, (id_text, _, date, _, _, *flag_texts) in lines:
        item = _integer(place, "item id", id_text, 1, len(lines)) - 1
        _once(place, f"item {item + 1}", item, seen)
        if date:
            match = _RELEASE_DATE.fullmatch(date)
            if match is None:
                raise UserError(f"{place}: release date {date!r} is not like 01-Jan-1995 or empty")
            # Redistributions that take the year from the title write `01-Jan-V` for one that ends
            # in `(V)`, a film for video; the year is unknown there.
            release_year[item] = int(match[1] or 0)
        for genre, text in enumerate(flag_texts):
            if text not in ("0", "1"):
                raise UserError(f"{place}: flag {text!r} of genre {genres[genre]!r} is not 0 or 1")
            flags[item, genre] = text == "1"
    return flags, release_year


def _read_users(
    path: Path, occupations: dict[str, int]
) -> tuple[Int64[np.ndarray, "users"], Bool[np.ndarray, "users"], Int64[np.ndarray, "users"]]:
    """Age, whether female, and occupation; ids must be 1 to the number of lines, in any order."""
    lines = list(_lines(path, "|", 5))
    age, occupation = np.zeros((2, len(lines)), np.int64)
    is_female = np.zeros(len(lines), bool)
    seen: dict[object, str] = {}
    for place, (id_text, age_text, gender, occupation_text, _) in lines:
        user = _integer(place, "user id", id_text, 1, len(lines)) - 1
        _once(place, f"user {user + 1}", user, seen)
        age[user] = _integer(place, "age", age_text, 0, 150)
        if gender not in ("F", "M"):
            raise UserError(f"{place}: gender {gender!r} is not F or M")
        is_female[user] = gender == "F"
        if occupation_text not in occupations:
            raise UserError(f"{place}: occupation {occupation_text!r} is not in u.occupation")
        occupation[user] = occupations[occupation_text]
    return age, is_female, occupation


def _read_ratings(path: Path, num_users: int, num_items: int) -> Int64[np.ndarray, "n 4"]:
    """[user, item, rating, time] of each line, ids counted from 0."""
    seen: dict[object, str] = {}
    rows = []
    for place, (user_text, item_text, rating_text, time_text) in _lines(path, "\t", 4):
        user = _integer(place, "user id", user_text, 1, num_users) - 1
        item = _integer(place, "item id", item_text, 1, num_items) - 1
        _once(place, f"a rating of item {item + 1} by user {user + 1}", (user, item), seen)
        rating = _integer(place, "rating", rating_text, 1, 5)
        rows.append((user, item, rating, _integer(place, "time", time_text, 0, 2**32 - 1)))
    return np.array(rows, np.int64)


def _check(data: ConfigDict, tasks: Sequence[str]) -> None:
    for task in tasks:
        check_choice("tasks", task, TASKS)
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks={tuple(tasks)!r} must name one task or more, none of them twice")
    for key, least in (
        ("seed", 0),
        ("history_length", 1),
        ("ratings_per_request", 1),
        ("test_requests_per_user", 0),
    ):
        if data[key] < least:
            raise UserError(f"data.{key}={data[key]} must be at least {least}")
    if not 0 <= data.test_share < 1:
        raise UserError(f"data.test_share={data.test_share} must lie in [0, 1)")
