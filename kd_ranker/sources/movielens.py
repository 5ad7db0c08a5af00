"""MovieLens 100K, 1M and 32M as requests: timelines of ratings, with nothing from the future.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015. The tasks are stand-ins for a feed's: `watch` means that
the film was rated, `like` that it was rated 4 or more, `share` that it was rated 5.

A request stands for a block of consecutive ratings of a user, see `block_starts`; its time is the
first rating's, and all that is known of the user and of the items was known strictly before. Its
candidates are those rated in the block, in the order of rating, and then, by id, others that the
user had not rated by the end of the block: all of them, or a sample. Films that the user rates only
later are among these, with label 0, since leaving them out would tell the future. As labels are
known for the whole list, it counts as shown and passed whole.

Of n items not rated, `data.negatives` are drawn, each as likely as any other, and each then has the
label weight n / `data.negatives`, the inverse of the sampling rate: weighted sums over labels have
the expectation that they have over the whole catalogue, so probabilities stay calibrated.

Widths and order of the features:
  user: age, female, occupations (one-hot), if the set knows them; log(1 + ratings so far), mean
    rating so far, the share of the ratings so far given to each genre, and the share that gave it 4
    or more.
  context: sin and cos of the hour (UTC), weekday (one-hot from Monday), log(1 + days since the last
    rating), whether this is the first request, log(1 + requests before this one).
  history: rating (one-hot of the stars that the set has), log(1 + age in days).
  item: genres, decades of the release after 1990, whether the release is unknown.
  candidate: log(1 + ratings by anyone so far) / 3, mean of these less PRIOR_RATING.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.errors import UserError, check_choice, check_tasks
from kd_ranker.requests.request import SPLITS, Request, Source, without_teacher
from kd_ranker.sources.download import fetch
from kd_ranker.sources.movielens_files import PUBLISHED, MovieLens, read_movielens
from kd_ranker.sources.tallies import Tally
from kd_ranker.sources.time_features import DAY, moment_features

# The lowest rating, in stars, that counts as the action; any rating is at least half a star.
LOWEST_RATING = {"watch": 0.5, "like": 4, "share": 5}
TASKS = tuple(LOWEST_RATING)

CONTEXT_FEATURES = 12
CANDIDATE_FEATURES = 2

# Mean ratings start from this value as if this many ratings had given it: a neutral guess, fixed in
# advance, so that it stems from no data.
PRIOR_RATING = 3.5
PRIOR_COUNT = 5


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One user's ratings in the order of time, and the blocks that requests cover.

    Ratings given in the same second stand in a seeded random order. Block b holds the ratings from
    `start[b]` until `start[b + 1]`, or until the end; `start[first_test:]` are the test blocks, and
    `start[first_validation:first_test]` those of the validation.
    """

    item: Int[np.ndarray, "n"]
    rating: Float32[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]
    start: Int64[np.ndarray, "blocks"]
    first_validation: int
    first_test: int

    def end(self, block: int) -> int:
        """The place behind the last rating of a block."""
        return int(self.start[block + 1]) if block + 1 < len(self.start) else len(self.item)


@dataclasses.dataclass(frozen=True)
class RatingBlocks:
    """The blocks of a split in the order of time, then of users."""

    user: Int[np.ndarray, "blocks"]
    block: Int[np.ndarray, "blocks"]  # within the user's timeline

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.user)


class _Prepared(NamedTuple):
    """All that the requests of the splits are made of.

    Attributes:
      everyone: the set.
      movielens: the set, with the users that are kept.
      timelines: user -> timeline.
      blocks: split -> its blocks.
      fixed_user_features: see `_fixed_user_features`.
    """

    everyone: MovieLens
    movielens: MovieLens
    timelines: dict[int, Timeline]
    blocks: dict[str, RatingBlocks]
    fixed_user_features: Float32[np.ndarray, "users _"]


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> Source:
    """Opens one of the sets in `PUBLISHED` as a source, fetching its files if `path` is empty.

    Args:
      data: the source's part of the config.
      tasks: some of `TASKS`, in any order.
      funnel: `retrieved` must hold the candidates of any request.

    Returns:
      The source; each split comes in the order of time. A user's train requests precede the same
      user's validation requests, and these the user's test requests, but not another user's.

    Raises:
      UserError: for files that are missing or malformed, and tasks or numbers that make no sense.
    """
    _check(data, tasks)
    prepared = _prepare(data, funnel)
    return Source(
        _spec(prepared, data, tasks),
        item_features(prepared.movielens),
        functools.partial(_requests, prepared, data, tasks),
        {split: len(prepared.blocks[split]) for split in SPLITS},
    )


def _prepare(data: ConfigDict, funnel: ConfigDict) -> _Prepared:
    """Reads the files and cuts the ratings into blocks."""
    name, negatives = str(data.name), int(data.get("negatives", 0))
    everyone = read_movielens(name, data.path or fetch(PUBLISHED[name].archive, data.dir))
    num_items = len(everyone.genres)
    if not negatives and funnel.retrieved < num_items:
        raise UserError(
            f"funnel.retrieved={funnel.retrieved} is less than the {num_items} films of the "
            "catalogue, all of which are candidates"
        )
    movielens = with_fewer_users(everyone, int(data.get("max_users", 0)), int(data.seed))
    timelines = _timelines(movielens, data)
    if negatives:
        _check_candidates(timelines, negatives, int(funnel.retrieved))
    blocks = {split: _ordered_blocks(timelines, split, data) for split in SPLITS}
    if data.validation_share and not len(blocks["validation"]):
        raise UserError(
            f"data.validation_share={data.validation_share} leaves no validation request: no user "
            "has ratings for two requests before the test ones; lower data.ratings_per_request or "
            "data.test_share"
        )
    return _Prepared(everyone, movielens, timelines, blocks, _fixed_user_features(movielens))


def _spec(prepared: _Prepared, data: ConfigDict, tasks: Sequence[str]) -> FeatureSpec:
    num_items, num_genres = prepared.movielens.genres.shape
    return FeatureSpec(
        dataset=str(data.name),
        tasks=tuple(tasks),
        num_users=prepared.movielens.num_users,
        num_items=num_items,
        user_features=prepared.fixed_user_features.shape[1] + 2 + 2 * num_genres,
        context_features=CONTEXT_FEATURES,
        candidate_features=CANDIDATE_FEATURES,
        item_features=num_genres + 2,
        cheap_item_features=num_genres + 2,
        history_length=int(data.history_length),
        history_features=len(prepared.movielens.stars) + 1,
        teacher_version="",
    )


def _requests(
    prepared: _Prepared, data: ConfigDict, tasks: Sequence[str], split: str
) -> Iterator[Request]:
    """The requests of a split, in the order of time."""
    check_choice("split", split, SPLITS)
    movielens, blocks = prepared.movielens, prepared.blocks[split]
    num_items = len(movielens.genres)
    genres = movielens.genres.astype(np.float32)
    stars = np.array(movielens.stars, np.float32)
    lowest = np.array([LOWEST_RATING[task] for task in tasks])
    negatives = int(data.get("negatives", 0))
    everyone = prepared.everyone
    ratings = Tally(everyone.item, lambda rows: [1, everyone.rating[rows]], (2, num_items))
    for request_id in range(len(blocks)):
        user, block = int(blocks.user[request_id]), int(blocks.block[request_id])
        timeline = prepared.timelines[user]
        start, end = int(timeline.start[block]), timeline.end(block)
        time = int(timeline.time[start])
        count, total = ratings.of_first(int(np.searchsorted(everyone.time, time)))
        events = slice(max(0, start - int(data.history_length)), start)
        others, weight = not_rated(
            timeline.item[:end], num_items, negatives, (int(data.seed), user, block)
        )
        item_id = np.concatenate([timeline.item[start:end], others])
        rating = np.concatenate([timeline.rating[start:end], np.zeros(len(others), np.float32)])
        statistics = user_statistics(timeline.rating[:start], genres[timeline.item[:start]])
        yield Request(
            request_id=request_id,
            time=time,
            user_id=user,
            user_features=np.concatenate([prepared.fixed_user_features[user], statistics]),
            context=context_features(time, timeline.time[:start], block),
            history_id=timeline.item[events].astype(np.int32),
            history_features=history_features(
                time, timeline.rating[events], timeline.time[events], stars
            ),
            item_id=item_id.astype(np.int32),
            candidate_features=item_statistics(count[item_id], total[item_id]),
            num_passed=len(item_id),
            user_label=(rating[:, None] >= lowest).astype(np.uint8),
            label_weight=np.where(rating > 0, 1, weight).astype(np.float32),
            **without_teacher(len(tasks)),
        )


def with_fewer_users(movielens: MovieLens, max_users: int, seed: int) -> MovieLens:
    """The set with `max_users` of those who rated, drawn at random and numbered anew in order.

    Args:
      movielens: the set.
      max_users: how many to keep; 0 keeps all, as does a number above theirs.
      seed: of the draw.
    """
    raters = np.flatnonzero(np.bincount(movielens.user, minlength=movielens.num_users))
    if not 0 < max_users < len(raters):
        return movielens
    # Not a seed of any other draw, see `not_rated`.
    generator = np.random.default_rng([seed, 0, 0, 2])
    users = np.sort(generator.choice(raters, max_users, replace=False))
    number = np.full(movielens.num_users, -1, np.int32)
    number[users] = np.arange(max_users)
    kept = number[movielens.user] >= 0

    def among_kept(attribute: np.ndarray | None) -> np.ndarray | None:
        return None if attribute is None else attribute[users]

    return dataclasses.replace(
        movielens,
        user=number[movielens.user[kept]],
        item=movielens.item[kept],
        rating=movielens.rating[kept],
        time=movielens.time[kept],
        num_users=max_users,
        age=among_kept(movielens.age),
        is_female=among_kept(movielens.is_female),
        occupation=among_kept(movielens.occupation),
    )


def block_starts(
    time: Int64[np.ndarray, "n"], ratings_per_request: int
) -> Int64[np.ndarray, "blocks"]:
    """The places at which the blocks of a user's ratings begin.

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


def first_held_out_blocks(
    starts: Int64[np.ndarray, "blocks"], total: int, validation_share: float, test_share: float
) -> tuple[int, int]:
    """The first of a user's blocks that is a validation request, and the first that is a test one.

    The first test block starts nearest to (1 − `test_share`) · `total` ratings; of those before it,
    the first validation block nearest to (1 − `test_share` − `validation_share`) · `total`. The
    first block is always for training. If its share is not 0, there is a test block where there are
    two blocks or more, and a validation block where two or more come before the test.
    """
    first_test = _cut(starts, total, test_share)
    if validation_share == 0:
        return first_test, first_test
    return _cut(starts[:first_test], total, test_share + validation_share), first_test


def _cut(starts: Int64[np.ndarray, "blocks"], total: int, share: float) -> int:
    """The block, not the first, that starts nearest to (1 − `share`) · `total` ratings."""
    if share == 0 or len(starts) == 1:
        return len(starts)
    distance = np.abs(starts[1:] - (1 - share) * total)
    return 1 + int(distance.argmin())


def not_rated(
    rated: Int[np.ndarray, "n"], num_items: int, wanted: int, seed: tuple[int, int, int]
) -> tuple[Int64[np.ndarray, "others"], float]:
    """Items that a user did not rate, ascending, and how many each of them stands for.

    Args:
      rated: items that the user rated until the end of the request's block, in any order. Those
        rated later look like any other item.
      num_items: items are 0 to `num_items` − 1.
      wanted: how many to draw, without replacement; 0 takes all, as does a number above theirs.
      seed: data seed, user and block, of the draw.

    >>> not_rated(np.array([3, 0]), 6, 0, (0, 0, 0))
    (array([1, 2, 4, 5]), 1.0)
    >>> items, weight = not_rated(np.array([3, 0]), 6, 2, (0, 0, 0))
    >>> len(items), weight
    (2, 2.0)
    """
    number = num_items - len(rated)
    if 0 < wanted < number:
        # Shorter seeds are filled up with zeros: the 1 keeps this apart from a timeline's.
        generator = np.random.default_rng([*seed, 1])
        places = np.sort(generator.choice(number, wanted, replace=False, shuffle=False))
    else:
        places = np.arange(number)
    # Before each rated item stand as many others as its id less the rated ones before it. Found
    # without a look at the whole catalogue, which may be much larger than a request.
    others_before = np.sort(rated) - np.arange(len(rated))
    items = places + np.searchsorted(others_before, places, side="right")
    return items, number / max(len(places), 1)


def user_statistics(
    rating: Float32[np.ndarray, "n"], genres: Float32[np.ndarray, "n genres"]
) -> Float32[np.ndarray, "2+2*genres"]:
    """Features of a user from the n ratings so far, with the genres of each rated item.

    [log(1 + n) / 3; the mean rating, with the prior, less PRIOR_RATING; for each genre the share of
    the ratings that it got, n_g / (n + PRIOR_COUNT); for each genre the share that gave it 4 or
    more].
    """
    count = len(rating)
    rated = genres.sum(axis=0)
    liked = (rating >= LOWEST_RATING["like"]).astype(np.float32) @ genres
    mean = (rating.sum(dtype=np.float64) - PRIOR_RATING * count) / (count + PRIOR_COUNT)
    scalars = np.array([np.log1p(count) / 3, mean], np.float32)
    shares = np.concatenate([rated, liked]) / np.float32(count + PRIOR_COUNT)
    return np.concatenate([scalars, shares])


def context_features(
    time: int, earlier: Int64[np.ndarray, "n"], position: int
) -> Float32[np.ndarray, "C"]:
    """Features of the moment.

    Args:
      time: of the request, in seconds since 1970, UTC.
      earlier: times of the user's ratings before, ascending.
      position: how many requests the user made before.

    Returns:
      [sin and cos of the hour; weekday, one-hot from Monday; log(1 + days since the last rating),
      0 if there is none; 1 if there is none; log(1 + position) / 2].
    """
    pause = np.log1p((time - earlier[-1]) / DAY) if len(earlier) else np.nan
    return np.append(moment_features(time, pause), np.log1p(position) / 2).astype(np.float32)


def history_features(
    time: int,
    rating: Float32[np.ndarray, "H"],
    rated_at: Int64[np.ndarray, "H"],
    stars: Float32[np.ndarray, "levels"],
) -> Float32[np.ndarray, "H E"]:
    """[which of `stars` the rating is, one-hot; log(1 + days from `rated_at` to `time`)] each."""
    age = np.log1p((time - rated_at) / DAY)
    return np.concatenate([rating[:, None] == stars, age[:, None]], axis=1, dtype=np.float32)


def item_features(movielens: MovieLens) -> Float32[np.ndarray, "items F"]:
    """[genres; (release year − 1990) / 10, 0 where unknown; 1 where unknown] of each item."""
    unknown = movielens.release_year == 0
    decades = np.where(unknown, 0, (movielens.release_year - 1990) / 10)
    return np.concatenate(
        [movielens.genres, decades[:, None], unknown[:, None]], axis=1, dtype=np.float32
    )


def item_statistics(
    count: Int64[np.ndarray, "N"], total: Float64[np.ndarray, "N"]
) -> Float32[np.ndarray, "N X"]:
    """Features of items from their ratings, `count` of them that add up to `total` stars.

    [log(1 + count) / 3, the mean rating with the prior less PRIOR_RATING], where the mean with the
    prior is (total + PRIOR_COUNT · PRIOR_RATING) / (count + PRIOR_COUNT).
    """
    mean = (total - PRIOR_RATING * count) / (count + PRIOR_COUNT)
    return np.stack([np.log1p(count) / 3, mean], axis=1).astype(np.float32)


def _fixed_user_features(movielens: MovieLens) -> Float32[np.ndarray, "users _"]:
    """[(age − 35) / 12; female; occupation, one-hot] of each user; no columns where not known."""
    if movielens.age is None or movielens.is_female is None or movielens.occupation is None:
        return np.zeros((movielens.num_users, 0), np.float32)
    age = (movielens.age - 35) / 12
    occupation = np.eye(movielens.num_occupations)[movielens.occupation]
    return np.concatenate(
        [age[:, None], movielens.is_female[:, None], occupation], axis=1, dtype=np.float32
    )


def _timelines(movielens: MovieLens, data: ConfigDict) -> dict[int, Timeline]:
    """User id -> timeline, for the users who rated anything."""
    timelines = {}
    by_user = np.argsort(movielens.user, kind="stable")
    ends = np.bincount(movielens.user, minlength=movielens.num_users).cumsum()
    for user, places in enumerate(np.split(by_user, ends[:-1])):
        if not len(places):
            continue
        places = places[np.argsort(movielens.time[places], kind="stable")]
        time = movielens.time[places]
        if (time[1:] == time[:-1]).any():
            # Drawn for the whole catalogue, the order within a second depends neither on the order
            # of the lines in the file nor on other ratings, earlier or later.
            luck = np.random.default_rng([data.seed, user]).permutation(len(movielens.genres))
            places = places[np.lexsort([luck[movielens.item[places]], time])]
        start = block_starts(time, int(data.ratings_per_request))
        first_validation, first_test = first_held_out_blocks(
            start, len(places), float(data.validation_share), float(data.test_share)
        )
        timelines[user] = Timeline(
            item=movielens.item[places],
            rating=movielens.rating[places],
            time=time,
            start=start,
            first_validation=first_validation,
            first_test=first_test,
        )
    return timelines


def _check_candidates(timelines: dict[int, Timeline], negatives: int, retrieved: int) -> None:
    """Raises UserError if the funnel does not hold the candidates of the largest block."""
    largest = max(
        int(np.diff(timeline.start, append=len(timeline.item)).max())
        for timeline in timelines.values()
    )
    if retrieved < largest + negatives:
        raise UserError(
            f"funnel.retrieved={retrieved} is less than the {largest} films rated in the largest "
            f"request and data.negatives={negatives} together"
        )


def _ordered_blocks(timelines: dict[int, Timeline], split: str, data: ConfigDict) -> RatingBlocks:
    """The blocks of a split; of those held out, as many of each user as the config keeps."""
    most = 0 if split == "train" else int(data[f"{split}_requests_per_user"])
    users, blocks, times = [], [], []
    for user, timeline in timelines.items():
        first, end = {
            "train": (0, timeline.first_validation),
            "validation": (timeline.first_validation, timeline.first_test),
            "test": (timeline.first_test, len(timeline.start)),
        }[split]
        own = np.arange(first, end, dtype=np.int32)[: most or None]
        users.append(np.full(len(own), user, np.int32))
        blocks.append(own)
        times.append(timeline.time[timeline.start[own]])
    user_of, block_of = np.concatenate(users), np.concatenate(blocks)
    order = np.lexsort((block_of, user_of, np.concatenate(times)))
    return RatingBlocks(user_of[order], block_of[order])


def _check(data: ConfigDict, tasks: Sequence[str]) -> None:
    check_choice("data.name", data.name, PUBLISHED)
    check_tasks(tasks, TASKS)
    if data.validation_share + data.test_share >= 1:
        raise UserError(
            f"data.validation_share={data.validation_share} and data.test_share={data.test_share} "
            "leave no ratings for training; lower one of them"
        )
