"""A simulated short-video feed with known true probabilities.

`docs/cascade.md` describes items, users, sessions and the logged funnel, and has the reason for
each constant. Letters name axes: `K` topics, `H` events of history, `N` candidates of a request,
`D` directions of taste; tasks are in the order of `TASKS`. Candidates are shuffled within each
block of the funnel (shown, rest of the passed, rest of the retrieved), so that their order carries
no other information.

Widths and order of the features:
  user: the noisy interests, log of the activity, noisy generosity, two uninformative numbers, the
    noisy taste.
  context: sin and cos of the hour, weekend, wifi, mobile network, phone, tablet, television.
  history: completed, liked, log(1 + age in minutes) / 4.
  item: category (one-hot), noisy popularity, an uninformative number; then the costly ones, the
    noisy topic mixture, part of the quality, the noisy style.
  candidate: the standardized age, (days since the upload − 36) / 17; with `data.hint`, a noisy view
    of the final ranker's value.

The shape of the funnel follows Covington, Adams and Sargin, "Deep Neural Networks for YouTube
Recommendations", RecSys 2016; interests that show only in the history relevant to a candidate
follow Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import joblib
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from joblib.externals.loky import get_reusable_executor
from ml_collections import ConfigDict, FrozenConfigDict

from kd_ranker.batch import FeatureSpec, Request
from kd_ranker.errors import UserError, check_tasks
from kd_ranker.requests.request import BLOCK, SPLITS, Block, ReadBlock, block_of
from kd_ranker.requests.row_files import Flat
from kd_ranker.requests.source import RequestSource

TASKS = ("watch", "like", "share")

# The production final ranker sorts by the sum of its task probabilities with these weights.
PRODUCTION_VALUE_WEIGHTS = np.array([1.0, 2.0, 4.0], np.float32)
TEACHER_VERSION = "production_2"
OLD_TEACHER_VERSION = "production_1"

# Terms of the logits, in the order of the last axis of `logit_terms` -> weight for each of `TASKS`.
TERM_WEIGHT = {
    "interest": [2.2, 1.8, 1.5],
    "quality": [0.3, 0.4, 0.5],
    "freshness": [0.2, 0.1, 0.3],
    "moment": [0.9, 0.6, 0.7],
    "fatigue": [-4.5, -4.0, -3.0],
    "mood": [4.0, 3.0, 2.5],
    "relief": [2.0, 1.5, 1.0],
}
TERM_WEIGHTS = np.array([*TERM_WEIGHT.values()], np.float32)
IS_OF_HISTORY = np.array([term in ("fatigue", "mood", "relief") for term in TERM_WEIGHT])
INTERCEPTS = np.array([-5.6, -7.1, -7.7], np.float32)
# Weights of the match of taste and style in the logits of `TASKS`; `data.taste` scales the match.
TASTE_WEIGHTS = np.array([1.0, 0.9, 0.8], np.float32)
TASTE_SIZE = 16

FATIGUE_HOURS = 0.5  # events fade from fatigue within the session
FATIGUE_HALF = 2.0  # recent events of a topic at which fatigue reaches one half
MOOD_HOURS = 12.0
# Deviations in the scores of the retrieval and of the policy; the other terms vary by about 1.
RETRIEVAL_NOISE = np.float32(1.0)
POLICY_NOISE = np.float32(0.7)

DAY = 24 * 3600  # seconds
START = 1_704_067_200  # 2024-01-01 00:00 UTC, a Monday


class _Split(NamedTuple):
    """The days of a split, and a number for the seeds of its requests."""

    first_day: int  # counted from `START`
    days: int
    seed: int  # others are `_WORLD_SEED` and `_TASTE_SEED`


_SPLITS = {
    "train": _Split(first_day=0, days=7, seed=1),
    "validation": _Split(first_day=7, days=1, seed=3),
    "test": _Split(first_day=8, days=2, seed=2),
}
_WORLD_SEED = 0
_TASTE_SEED = 4  # of tastes and styles
UPLOAD_DAYS = 60
HISTORY_DAYS = 2  # no event is older, and every item was uploaded before the first event
CATEGORY_HIT_RATE = 0.4
CONTEXT_FEATURES = 8
HISTORY_FEATURES = 3


class World:
    """The users and items: their true properties, and the features that show part of these.

    Depends only on `data.seed` and the sizes in `data`.
    """

    def __init__(self, data: ConfigDict) -> None:
        users = int(data.num_users)
        items = int(data.num_items)
        topics = int(data.num_topics)
        rng = np.random.default_rng([data.seed, _TASTE_SEED])
        # Tastes and styles of deviation 1, times `data.taste`; D is 0 if that is 0.
        size = TASTE_SIZE if data.taste else 0
        taste = _normal(rng, users, size)
        self.taste: Float32[np.ndarray, "users D"] = data.taste * taste
        self.style: Float32[np.ndarray, "items D"] = _normal(rng, items, size)
        # The policy knows a taste from the profile, and a style from past user actions on the item.
        self.shown_taste = (taste + 0.5 * _normal(rng, users, size)) / 1.25**0.5
        self.policy_taste: Float32[np.ndarray, "users D"] = data.taste * self.shown_taste
        self.policy_style: Float32[np.ndarray, "items D"]
        self.policy_style = (self.style + _normal(rng, items, size)) / 2**0.5
        self.shown_style = self.style + 0.05 * _normal(rng, items, size)
        rng = np.random.default_rng([data.seed, _WORLD_SEED])
        self._draw_users(rng, users, topics, int(data.history_length))
        self._draw_items(rng, items, topics)
        self.moment_taste: Float32[np.ndarray, "context K"] = _normal(rng, CONTEXT_FEATURES, topics)
        # For each topic k and item, k plus the cumulative distribution from which an event of this
        # topic is drawn: a sorted array, so that one search draws many events.
        weight = self.topics.T.astype(np.float64) ** 2 * np.exp(0.5 * self.popularity)
        cumulative = weight.cumsum(axis=1)
        cumulative /= cumulative[:, -1:]
        self.events: Float64[np.ndarray, "K*items"]
        self.events = (cumulative + np.arange(topics)[:, None]).ravel()
        self.teacher_item_error: Float32[np.ndarray, "items tasks"]
        self.teacher_item_error = _normal(rng, items, len(TASKS), scale=0.2)
        self.teacher_user_error: Float32[np.ndarray, "users tasks"]
        self.teacher_user_error = _normal(rng, users, len(TASKS), scale=0.1)

    def _draw_users(
        self, rng: np.random.Generator, users: int, topics: int, history_length: int
    ) -> None:
        interest_rank = rng.random((users, topics)).argsort(axis=1).argsort(axis=1)
        interest_count = rng.integers(2, 5, (users, 1))
        weight = rng.gamma(3.0, size=(users, topics)) * (interest_rank < interest_count)
        self.interests: Float32[np.ndarray, "users K"]
        self.interests = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
        self.generosity: Float32[np.ndarray, "users tasks"]
        self.generosity = _normal(rng, users, 1, scale=0.4)
        self.generosity = self.generosity + _normal(rng, users, len(TASKS), scale=0.2)
        log_activity = _normal(rng, users, scale=0.7)
        activity = np.exp(log_activity, dtype=np.float64)
        # The cumulative share of requests.
        self.activity: Float64[np.ndarray, "users"] = activity.cumsum() / activity.sum()
        history_share = 1 / (1 + np.exp(-1.5 - log_activity - _normal(rng, users, scale=0.5)))
        self.history_size: Int64[np.ndarray, "users"]
        self.history_size = np.ceil(history_length * history_share).astype(np.int64)
        features = [
            topics**0.5 * (self.interests + _normal(rng, users, topics, scale=0.2)),
            log_activity[:, None],
            self.generosity.mean(axis=1, keepdims=True) + _normal(rng, users, 1, scale=0.3),
            _normal(rng, users, 2),  # age and time since joining, both uninformative
            self.shown_taste,
        ]
        self.user_features: Float32[np.ndarray, "users U"]
        self.user_features = np.concatenate(features, axis=1, dtype=np.float32)

    def _draw_items(self, rng: np.random.Generator, items: int, topics: int) -> None:
        mixture = rng.gamma(0.05, size=(items, topics)) + 1e-3
        mixture[np.arange(items), rng.integers(topics, size=items)] += 1.0
        self.topics: Float32[np.ndarray, "items K"]
        self.topics = (mixture / mixture.sum(axis=1, keepdims=True)).astype(np.float32)
        shown_quality = _normal(rng, items)
        hidden_quality = _normal(rng, items)
        self.quality: Float32[np.ndarray, "items"] = 0.8 * shown_quality + 0.6 * hidden_quality
        # In standard deviations of its logarithm.
        self.popularity: Float32[np.ndarray, "items"]
        self.popularity = 0.4 * self.quality + 0.9 * _normal(rng, items)
        first_event = START - HISTORY_DAYS * DAY
        self.upload_time: Int64[np.ndarray, "items"]  # seconds
        self.upload_time = first_event - rng.integers(1, UPLOAD_DAYS * DAY, items)
        # The uploader names the main topic, or any.
        names_topic = rng.random(items) < CATEGORY_HIT_RATE
        any_topic = rng.integers(topics, size=items)
        category = np.where(names_topic, self.topics.argmax(axis=1), any_topic)
        features = [
            np.eye(topics, dtype=np.float32)[category],
            self.popularity[:, None] + _normal(rng, items, 1, scale=0.3),
            _normal(rng, items, 1),  # log duration, uninformative
            # A video model computes these; it is too costly to run on every candidate.
            2 * (self.topics + _normal(rng, items, topics, scale=0.05)),
            shown_quality[:, None],
            self.shown_style,
        ]
        self.item_features: Float32[np.ndarray, "items F"]
        self.item_features = np.concatenate(features, axis=1, dtype=np.float32)
        self.cheap_item_features = topics + 2


def _normal(
    rng: np.random.Generator, *shape: int, scale: float = 1.0
) -> Float32[np.ndarray, "..."]:
    return scale * rng.standard_normal(shape, np.float32)


class History(NamedTuple):
    """The user's latest events, most recent last."""

    item_id: Int64[np.ndarray, "H"]
    completed: Bool[np.ndarray, "H"]
    liked: Bool[np.ndarray, "H"]
    age_hours: Float32[np.ndarray, "H"]


class _Recipe(NamedTuple):
    """What determines all requests. Small, so that it can be sent to other processes."""

    data: FrozenConfigDict
    funnel: FrozenConfigDict
    columns: tuple[int, ...]  # the indices in `TASKS` of the requested tasks


# A process draws many requests of one world.
@functools.lru_cache(maxsize=1)
def _world_of(data: FrozenConfigDict) -> World:
    return World(data)


def _requests(recipe: _Recipe, split: str, indices: Iterable[int]) -> Iterator[Request]:
    """Draw the requests of a split with these places in it."""
    data, funnel = recipe.data, recipe.funnel
    world = _world_of(data)
    columns = np.array(recipe.columns)
    for index in indices:
        yield _draw_request(world, data, columns, funnel, split, index)


def _read_block(recipe: _Recipe, split: str, indices: Iterable[int], spec: FeatureSpec) -> Block:
    return block_of([*_requests(recipe, split, indices)], spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedFeed(RequestSource):
    """The simulated feed, drawn in several processes if it is large."""

    recipe: _Recipe

    def blocks(self, split: str) -> Iterator[ReadBlock]:
        """Yield a function for each block, which draws it, in this process or in another."""
        number = self.num_requests[split]
        for first in range(0, number, BLOCK):
            indices = range(first, min(first + BLOCK, number))
            yield functools.partial(_read_block, self.recipe, split, indices, self.spec)

    def pack_blocks(
        self, pack: Callable[[ReadBlock], Flat], blocks: Iterable[ReadBlock]
    ) -> Iterator[Flat]:
        """Yield each block as `pack` packs it, in order."""
        num_processes = joblib.cpu_count() if self._is_large() else 1
        # Its processes, unlike those of `multiprocessing`, do not run the user's script again.
        parallel = joblib.Parallel(n_jobs=num_processes, return_as="generator")
        packed: Iterator[Flat] = parallel(joblib.delayed(pack)(block) for block in blocks)
        return packed

    def close(self) -> None:
        """End the processes."""
        if self._is_large():
            get_reusable_executor().shutdown()

    def _is_large(self) -> bool:
        # A process takes two seconds or more to start, and draws a block in half a second.
        return sum(self.num_requests.values()) > 8 * BLOCK


def open_source(data: ConfigDict, tasks: Sequence[str], funnel: ConfigDict) -> SimulatedFeed:
    """Open the simulated feed as a source, for some of `TASKS` in any order.

    Requests come in the order of time, and those of training precede those of validation, which
    precede those of the test. The seed of a request is made of `data.seed`, the split and the
    request's place in it.
    """
    check_tasks(tasks, TASKS)
    if not 1 <= funnel.shown <= funnel.passed <= funnel.retrieved <= data.num_items:
        raise UserError(
            f"funnel.shown={funnel.shown}, funnel.passed={funnel.passed},"
            f" funnel.retrieved={funnel.retrieved} and data.num_items={data.num_items}"
            " must each be at least 1 and at most the next"
        )
    if data.fault_nan + data.fault_out_of_range > 1:
        raise UserError(
            f"data.fault_nan={data.fault_nan} and data.fault_out_of_range="
            f"{data.fault_out_of_range} add up to more than 1; lower one of them"
        )
    columns = tuple(TASKS.index(task) for task in tasks)
    recipe = _Recipe(FrozenConfigDict(data), FrozenConfigDict(funnel), columns)
    world = _world_of(recipe.data)
    num_requests = {split: int(data[f"{split}_requests"]) for split in SPLITS}

    def requests(split: str) -> Iterator[Request]:
        return _requests(recipe, split, range(num_requests[split]))

    spec = FeatureSpec(
        dataset="cascade",
        tasks=tuple(tasks),
        num_users=int(data.num_users),
        num_items=int(data.num_items),
        user_features=world.user_features.shape[1],
        context_features=CONTEXT_FEATURES,
        candidate_features=2 if data.hint else 1,
        item_features=world.item_features.shape[1],
        cheap_item_features=world.cheap_item_features,
        history_length=int(data.history_length),
        history_features=HISTORY_FEATURES,
        teacher_version=TEACHER_VERSION,
    )
    return SimulatedFeed(
        spec=spec,
        item_features=world.item_features,
        requests=requests,
        num_requests=num_requests,
        recipe=recipe,
    )


def taste_match(
    taste: Float[np.ndarray, "D"], style: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, "N"]:
    """Return taste · style / √D of each of N items; 0 where D is 0."""
    return style @ taste / max(len(taste), 1) ** 0.5


def logit_terms(
    world: World,
    user: int,
    context: Float32[np.ndarray, "C"],
    history: History,
    item: Int64[np.ndarray, "N"],
    age: Float32[np.ndarray, "N"],
) -> Float32[np.ndarray, "N terms"]:
    """Return the terms of the true logits of N candidates, in the order of `TERM_WEIGHT`.

    For topics θ of a candidate, the user's interests φ, and c, how well each topic suits the moment
    (θ and φ sum to 1): interest 4 θ·φ; the quality, in standard deviations; freshness, which is
    minus the standardized age; moment θ·c; fatigue θ·f; mood θ·m; relief θ·(c ⊙ f).

    With the recent count n_k = Σ_h exp(−age_h / FATIGUE_HOURS) θ_hk of the user's events, completed
    or not, fatigue f_k with a topic is n_k² / (n_k² + FATIGUE_HALF²), in [0, 1): nearly nothing
    after one event, strong after a handful. The mood m_k that recent events have left, in (−1, 1),
    is tanh(½ Σ_h exp(−age_h / MOOD_HOURS) g_h θ_hk). There g_h is 1 for a completed event and −1
    for one that was not, plus 1 where it was liked.
    """
    event_topics = world.topics[history.item_id]
    count = np.exp(-history.age_hours / FATIGUE_HOURS) @ event_topics
    fatigue = count**2 / (count**2 + FATIGUE_HALF**2)
    reception = np.where(history.completed, 1.0, -1.0) + history.liked
    weight = np.exp(-history.age_hours / MOOD_HOURS) * reception
    mood = np.tanh(0.5 * (weight @ event_topics)).astype(event_topics.dtype)
    moment = context @ world.moment_taste / CONTEXT_FEATURES**0.5
    # One product for all terms that depend on the topics of a candidate.
    by_topic = [4 * world.interests[user], moment, fatigue, mood, moment * fatigue]
    products = world.topics[item] @ np.stack(by_topic, axis=1)
    interest, suits_moment, tired, received, relieved = products.T
    terms = [interest, world.quality[item], -age, suits_moment, tired, received, relieved]
    return np.stack(terms, axis=1)


def sigmoid(logits: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return 1 / (1 + exp(−logits))."""
    return 1 / (1 + np.exp(-logits))


def _draw_request(
    world: World,
    data: ConfigDict,
    columns: Int[np.ndarray, "T"],
    funnel: ConfigDict,
    split: str,
    index: int,
) -> Request:
    """Draw a request; `columns` are the indices in `TASKS` of the requested tasks."""
    first_day, days, seed = _SPLITS[split]
    rng = np.random.default_rng([data.seed, seed, index])
    # A moment in the request's own slice of its split's days: times rise with `index`.
    offset = days * DAY * (index + rng.random()) / data[f"{split}_requests"]
    time = START + first_day * DAY + int(offset)
    context = _draw_context(rng, time)
    user = int(np.searchsorted(world.activity, rng.random()).clip(max=data.num_users - 1))
    history = draw_history(rng, world, user)
    item, age, policy = _retrieve(rng, world, funnel, time, user, history)

    num_passed = int(funnel.passed)
    num_shown = int(funnel.shown)
    # All arrays are in the order of the policy; only passed candidates of training have scores.
    num_scored = num_passed if split == "train" and not data.hint else int(funnel.retrieved)
    scored = item[:num_scored]
    terms = logit_terms(world, user, context, history, scored, age[:num_scored])
    logits = terms @ TERM_WEIGHTS + (INTERCEPTS + world.generosity[user])
    logits += taste_match(world.taste[user], world.style[scored])[:, None] * TASTE_WEIGHTS
    # Drawn for all, so that later draws do not depend on the number.
    noise = 0.15 * rng.standard_normal((len(item), len(TASKS)), np.float32)[:num_scored]
    error = world.teacher_item_error[scored] + world.teacher_user_error[user]
    # Of the production final ranker.
    probability = sigmoid(logits + data.noise * error + data.noise * noise)

    # `order` is that of the request.
    value = probability[:num_passed] @ PRODUCTION_VALUE_WEIGHTS
    order = np.arange(funnel.retrieved)
    order[:num_passed] = _shown_first(rng, value, num_shown, data.exploration)
    chance = shown_probability(num_passed, num_shown, float(data.exploration))
    place_by_value = (-value).argsort().argsort()
    propensity = np.full(funnel.retrieved, np.nan, np.float32)
    propensity[:num_shown] = chance[place_by_value[order[:num_shown]]]

    features = age[:, None]
    if data.hint:
        # Of its own generator, so that nothing else differs.
        hint = _hint(
            np.random.default_rng([data.seed, seed, index, 1]),
            probability @ PRODUCTION_VALUE_WEIGHTS,
            np.float32(data.hint),
        )
        features = np.stack([age, hint], axis=1)
    scored_order = order[:num_scored]
    true_probability = sigmoid(logits[scored_order])[:, columns]
    # Drawn for all tasks, so that a draw does not depend on the requested tasks.
    luck = rng.random((num_shown, len(TASKS)))[:, columns]
    teacher_probability = probability[scored_order][:, columns]
    if split == "train":
        logged = _log_teacher(
            rng, teacher_probability[:num_passed], terms[order[:num_passed]], columns, data
        )
        num_known = 0  # facts are for the evaluation only
    else:
        logged = _LoggedTeacher(
            teacher_probability, np.ones(funnel.retrieved, np.float32), TEACHER_VERSION
        )
        num_known = int(funnel.retrieved)
    history_features = [history.completed, history.liked, np.log1p(60 * history.age_hours) / 4]
    return Request(
        request_id=index,
        time=time,
        user_id=user,
        user_features=world.user_features[user],
        context=context,
        history_id=history.item_id.astype(np.int32),
        history_features=np.stack(history_features, axis=1).astype(np.float32),
        item_id=item[order].astype(np.int32),
        candidate_features=features[order],
        num_passed=num_passed,
        user_label=(luck < true_probability[:num_shown]).astype(np.uint8),
        label_weight=np.ones(num_shown, np.float32),
        true_probability=true_probability[:num_known],
        incumbent=policy[order][:num_known],
        propensity=propensity[:num_known],
        teacher_probability=logged.probability,
        teacher_weight=logged.weight,
        teacher_version=logged.version,
    )


def _hint(
    rng: np.random.Generator, value: Float32[np.ndarray, "N"], correlation: np.float32
) -> Float32[np.ndarray, "N"]:
    """Draw numbers that correlate with the logarithm of the final ranker's value in a request."""
    log_value = np.log(value)
    standard = (log_value - log_value.mean()) / log_value.std()
    noise = (1 - correlation**2) ** 0.5
    hint: Float32[np.ndarray, "N"] = correlation * standard + noise * _normal(rng, len(value))
    return hint


class _LoggedTeacher(NamedTuple):
    """What a request's log has of the final ranker."""

    probability: Float32[np.ndarray, "L T"]
    weight: Float32[np.ndarray, "L"]
    version: str


def _log_teacher(
    rng: np.random.Generator,
    probability: Float32[np.ndarray, "L T"],
    terms: Float32[np.ndarray, "L terms"],
    columns: Int[np.ndarray, "T"],
    data: ConfigDict,
) -> _LoggedTeacher:
    """Log probabilities with faults.

    Where nothing was written, the probability is NaN and the weight 0; elsewhere the weight is 1.
    """
    version = TEACHER_VERSION
    if rng.random() < data.fault_version:
        # A worse model, which knows no history, shrinks its logits, and is noisy.
        version = OLD_TEACHER_VERSION
        logits = 0.5 * (terms * ~IS_OF_HISTORY) @ TERM_WEIGHTS + 0.7 * INTERCEPTS
        noise = 0.7 * rng.standard_normal(logits.shape, np.float32)
        probability = sigmoid(logits + noise)[:, columns]
    lost = rng.random(len(probability)) < data.fault_missing
    fault = rng.random(probability.shape)
    nonsense = rng.choice(np.array([1.7, -0.3, np.inf, -np.inf], np.float32), probability.shape)
    is_wrong = fault < data.fault_nan + data.fault_out_of_range
    logged = np.where(is_wrong, nonsense, probability)
    logged[(fault < data.fault_nan) | lost[:, None]] = np.nan
    weight = np.where(lost, 0, 1).astype(np.float32)
    return _LoggedTeacher(logged, weight, version)


def _draw_context(rng: np.random.Generator, time: int) -> Float32[np.ndarray, "C"]:
    network = np.eye(2)[rng.choice(2, p=[0.6, 0.4])]
    device = np.eye(3)[rng.choice(3, p=[0.7, 0.15, 0.15])]
    angle = 2 * np.pi * (time % DAY) / DAY
    moment = [np.sin(angle), np.cos(angle), (time - START) // DAY % 7 >= 5]
    return np.concatenate([moment, network, device], dtype=np.float32)


def draw_history(rng: np.random.Generator, world: World, user: int) -> History:
    """Draw the user's events before a request: older ones from all interests, then the session's.

    A session is made of two topics or so, of the user's interests more often than not, and some
    strays. The appetite for each topic is drawn afresh as well; appetites drive completions.
    """
    num_topics = int(world.topics.shape[1])
    size = int(world.history_size[user])
    in_session = min(size, int(rng.integers(3, 15)))
    interests = world.interests[user].astype(np.float64)
    interests /= interests.sum()
    session_topics = rng.choice(num_topics, size=2, p=0.6 * interests + 0.4 / num_topics)

    topic = rng.choice(num_topics, size=size, p=0.8 * interests + 0.2 / num_topics)
    is_recent = np.arange(size) >= size - in_session
    is_in_mood = is_recent & (rng.random(size) < 0.85)
    topic = np.where(is_in_mood, session_topics[(rng.random(size) < 0.4).astype(int)], topic)
    item = np.searchsorted(world.events, topic + rng.random(size)) % len(world.topics)

    session_age = rng.exponential(2 / 60, in_session).cumsum()[::-1]
    older_age = session_age[0] + rng.uniform(0.5, 24 * (HISTORY_DAYS - 1), size - in_session)
    age_hours = np.concatenate([np.sort(older_age)[::-1], session_age])

    appetite = rng.normal(0, 2, num_topics)[topic]
    appetite += interests[topic] + 0.5 * world.quality[item]
    appetite += taste_match(world.taste[user], world.style[item])
    completed = rng.random(size) < sigmoid(appetite)
    liked = completed & (rng.random(size) < 0.2)
    return History(item, completed, liked, age_hours.astype(np.float32))


class _Retrieved(NamedTuple):
    """The candidates of a request."""

    item: Int64[np.ndarray, "N"]
    age: Float32[np.ndarray, "N"]  # standardized
    policy: Float32[np.ndarray, "N"]  # scores of the policy


def _retrieve(
    rng: np.random.Generator,
    world: World,
    funnel: ConfigDict,
    time: int,
    user: int,
    history: History,
) -> _Retrieved:
    """Draw the candidates, the passed first."""
    # By interest, popularity and noise; just watched ones only if no others are left.
    score = world.topics @ (4 * world.interests[user]) + 0.5 * world.popularity
    score += RETRIEVAL_NOISE * rng.standard_normal(len(score), np.float32)
    score[history.item_id] = -np.inf
    item = _highest_first(rng, score, funnel.retrieved)[: funnel.retrieved]
    age = (((time - world.upload_time[item]) / DAY - 36) / 17).astype(np.float32)
    # The policy is linear in noisy views of interest, popularity, freshness and taste.
    num_topics = world.topics.shape[1]
    interests = world.user_features[user, :num_topics] / num_topics**0.5
    category = world.item_features[item, :num_topics]
    popularity = world.item_features[item, num_topics]
    policy = 2 * category @ interests + 0.4 * popularity - 0.2 * age
    policy += taste_match(world.policy_taste[user], world.policy_style[item])
    policy = policy + POLICY_NOISE * rng.standard_normal(len(item), np.float32)
    order = _highest_first(rng, policy, funnel.passed)
    return _Retrieved(item[order], age[order], policy[order])


def _highest_first(
    rng: np.random.Generator, score: Float[np.ndarray, "N"], count: int
) -> Int64[np.ndarray, "N"]:
    """Return a permutation of N places: the `count` highest scores, then the others, shuffled."""
    order = np.argpartition(score, -count)[::-1]
    # The order after a partition still depends on the scores.
    return np.concatenate([rng.permutation(order[:count]), rng.permutation(order[count:])])


def _shown_first(
    rng: np.random.Generator, value: Float[np.ndarray, "P"], shown: int, exploration: float
) -> Int64[np.ndarray, "P"]:
    """Return a permutation of P places: the shown ones, shuffled, then the rest, shuffled.

    A binomial number of slots is filled at random from the candidates of lesser value.
    """
    explored = min(int(rng.binomial(shown, exploration)), len(value) - shown)
    # As the rest is shuffled, its first places are a random sample of it.
    order = _highest_first(rng, value, shown - explored)
    return np.concatenate([rng.permutation(order[:shown]), order[shown:]])


@functools.lru_cache(maxsize=16)
def shown_probability(passed: int, shown: int, exploration: float) -> Float64[np.ndarray, "passed"]:
    """Return the probability that `_shown_first` shows each candidate, in the order of value.

    Let e slots be filled at random, with e = min(Binomial(shown, exploration), passed − shown). The
    shown − e candidates of highest value are shown. Each of the other passed − shown + e has a slot
    with probability e / (passed − shown + e). The result is the mean over e.
    """
    from scipy import stats  # takes a second to import

    slots = np.arange(shown + 1)
    explored = np.minimum(slots, passed - shown)
    others = passed - shown + explored
    at_random = explored / np.maximum(others, 1)
    is_best = np.arange(passed)[:, None] < shown - explored
    return np.where(is_best, 1, at_random) @ stats.binom.pmf(slots, shown, exploration)
