"""Tests of the simulated feed."""

import dataclasses
import datetime
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_ranker.batch import STORED
from kd_ranker.errors import UserError
from kd_ranker.evaluation.references import item_share
from kd_ranker.requests.request import SPLITS, Request
from kd_ranker.sources import cascade


def make_data(**changes: float) -> ConfigDict:
    data = {
        "name": "cascade",
        "dir": "",
        "path": "",
        "seed": 0,
        "num_users": 60,
        "num_items": 400,
        "num_topics": 8,
        "taste": 0.0,
        "history_length": 12,
        "train_requests": 60,
        "validation_requests": 20,
        "test_requests": 40,
        "exploration": 0.2,
        "retrieval_noise": 1.0,
        "policy_noise": 0.7,
        "fault_missing": 0.02,
        "fault_nan": 0.01,
        "fault_out_of_range": 0.01,
        "fault_version": 0.05,
    }
    return ConfigDict(data | changes)


def make_funnel(retrieved: int = 100, passed: int = 30, shown: int = 5) -> ConfigDict:
    return ConfigDict({"retrieved": retrieved, "passed": passed, "shown": shown})


def draw(split: str, funnel: ConfigDict | None = None, **changes: float) -> list[Request]:
    source = cascade.open_source(make_data(**changes), cascade.TASKS, funnel or make_funnel())
    return list(source.requests(split))


def assert_same(left: Request, right: Request) -> None:
    for field in dataclasses.fields(Request):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def test_shapes_and_dtypes_follow_the_spec() -> None:
    source = cascade.open_source(make_data(), cascade.TASKS, make_funnel())
    spec = source.spec
    assert source.item_features.shape == (400, spec.item_features)
    assert source.num_requests == {"train": 60, "validation": 20, "test": 40}
    for split, logged, known in (("train", 30, 0), ("validation", 100, 100), ("test", 100, 100)):
        requests = list(source.requests(split))
        assert [of.request_id for of in requests] == list(range(source.num_requests[split]))
        for request in requests:
            events = len(request.history_id)
            assert 1 <= events <= spec.history_length
            numbers = {"event": events, "candidate": 100, "shown": 5, "scored": logged}
            numbers |= {"known": known}
            for field in STORED:
                number = () if field.of == "request" else (numbers[field.of],)
                value = getattr(request, field.name)
                if value is not None and field.stored is not str:
                    assert np.shape(value) == (*number, *field.shape(spec)), field.name
                if isinstance(value, np.ndarray):
                    assert value.dtype == field.stored, field.name
                    assert field.of in ("scored", "known") or np.isfinite(value).all(), field.name


def test_ids_lie_in_range_and_no_candidate_comes_twice() -> None:
    for request in [request for split in SPLITS for request in draw(split)]:
        assert 0 <= request.user_id < 60
        for ids in (request.item_id, request.history_id):
            assert ids.min() >= 0
            assert ids.max() < 400
        assert len(set(request.item_id)) == len(request.item_id)
        assert not set(request.item_id) & set(request.history_id)


def test_the_same_requests_come_at_every_call() -> None:
    source = cascade.open_source(make_data(), cascade.TASKS, make_funnel())
    first, second = list(source.requests("train")), list(source.requests("train"))
    for left, right in zip(first, second, strict=True):
        assert_same(left, right)
    for left, right in zip(first, draw("train"), strict=True):
        assert_same(left, right)
    other = draw("train", seed=1)
    assert not np.array_equal(first[0].item_id, other[0].item_id)


def test_a_split_does_not_depend_on_the_sizes_of_the_others() -> None:
    sizes = {f"{split}_requests": 7 for split in SPLITS}
    for split in SPLITS:
        others = {name: size for name, size in sizes.items() if name != f"{split}_requests"}
        for left, right in zip(draw(split), draw(split, **others), strict=True):
            assert_same(left, right)


def test_no_two_splits_are_drawn_alike() -> None:
    drawn = {split: draw(split, train_requests=20, test_requests=20) for split in SPLITS}
    users = {split: [request.user_id for request in drawn[split]] for split in SPLITS}
    assert len({tuple(users[split]) for split in SPLITS}) == len(SPLITS)
    items = [request.item_id.tobytes() for split in SPLITS for request in drawn[split]]
    assert len(set(items)) == len(items)


def test_asked_tasks_are_columns_of_all_tasks() -> None:
    source = cascade.open_source(make_data(), ("share", "watch"), make_funnel())
    for split in SPLITS:
        for part, full in zip(source.requests(split), draw(split, fault_nan=0.0), strict=True):
            np.testing.assert_array_equal(part.user_label, full.user_label[:, [2, 0]])
            np.testing.assert_array_equal(part.item_id, full.item_id)
            np.testing.assert_array_equal(part.true_probability, full.true_probability[:, [2, 0]])


def test_times_rise_from_training_over_validation_to_the_test() -> None:
    times = {split: [request.time for request in draw(split)] for split in SPLITS}
    everything = times["train"] + times["validation"] + times["test"]
    assert everything == sorted(everything)
    days = {split: {(time - cascade.START) // 86400 for time in times[split]} for split in SPLITS}
    assert days == {"train": set(range(7)), "validation": {7}, "test": {8, 9}}


def test_the_context_holds_the_hour_and_the_weekend_of_the_calendar() -> None:
    for request in draw("train"):
        moment = datetime.datetime.fromtimestamp(request.time, datetime.UTC)
        hour = moment.hour + moment.minute / 60 + moment.second / 3600
        angle = np.degrees(np.arctan2(*request.context[:2])) % 360
        assert angle == pytest.approx(15 * hour, abs=1e-3)
        assert request.context[2] == (moment.weekday() >= 5)


def test_nothing_is_used_before_it_was_uploaded() -> None:
    world = cascade.make_world(make_data())
    for request in draw("train")[:20]:
        age = 60 * np.expm1(4 * request.history_features[:, 2])
        assert np.all(np.diff(age) <= 0), "the most recent event stands last"
        assert np.all(request.time - age > world.upload_time[request.history_id])
        assert np.all(request.time > world.upload_time[request.item_id])


def test_the_incumbent_is_the_policy_that_has_passed_the_candidates() -> None:
    for request in [*draw("validation"), *draw("test")]:
        assert request.incumbent[30:].min() < request.incumbent[30:].max()
        assert request.incumbent[:30].min() >= request.incumbent[30:].max()


@pytest.mark.parametrize(
    ("passed", "shown", "exploration"),
    [(12, 5, 0.3), (6, 5, 0.9), (5, 5, 0.5), (9, 4, 0), (9, 4, 1)],
)
def test_propensities_are_the_frequencies_of_being_shown(passed, shown, exploration) -> None:
    rng, draws = np.random.default_rng(0), 20_000
    value = rng.permutation(passed).astype(np.float32)
    times = np.zeros(passed)
    for _ in range(draws):
        times[cascade._shown_first(rng, value, shown, exploration)[:shown]] += 1
    expected = cascade.shown_probability(passed, shown, exploration)
    assert expected.sum() == pytest.approx(shown)
    deviation = np.sqrt((expected * (1 - expected)).clip(min=0) / draws)
    by_rank = times[np.argsort(-value)] / draws
    assert np.all(np.abs(by_rank - expected) <= 4 * deviation + 1e-9)


def test_a_propensity_is_of_a_shown_candidate_at_its_place_among_the_passed() -> None:
    # What the log has of the teacher in the test is what the production ranker sorted by.
    expected = cascade.shown_probability(30, 5, 0.2).astype(np.float32)
    for request in draw("test"):
        value = request.teacher_probability[:30] @ cascade.PRODUCTION_VALUE_WEIGHTS
        rank = [int((value > own).sum()) for own in value[:5]]
        np.testing.assert_array_equal(request.propensity[:5], expected[rank])
        assert np.isnan(request.propensity[5:]).all()


def test_labels_follow_the_true_probabilities() -> None:
    requests = draw("test", test_requests=600)
    label = np.concatenate([request.user_label for request in requests]).astype(float)
    chance = np.concatenate([request.true_probability[:5] for request in requests]).astype(float)
    deviation = np.sqrt((chance * (1 - chance)).sum(axis=0))
    assert np.all(np.abs(label.sum(axis=0) - chance.sum(axis=0)) < 3 * deviation)
    # The same among high and among low probabilities: labels follow each one, not just their mean.
    for half in (chance > np.median(chance, axis=0), chance <= np.median(chance, axis=0)):
        deviation = np.sqrt((half * chance * (1 - chance)).sum(axis=0))
        assert np.all(np.abs((half * (label - chance)).sum(axis=0)) < 3 * deviation)


def test_the_funnel_narrows_towards_value() -> None:
    requests = draw("test")
    value = np.stack(
        [request.teacher_probability @ cascade.PRODUCTION_VALUE_WEIGHTS for request in requests]
    )
    shown, passed, retrieved = value[:, :5].mean(), value[:, :30].mean(), value.mean()
    assert shown > passed > retrieved
    for request in draw("test", exploration=0.0):
        value = request.teacher_probability[:30] @ cascade.PRODUCTION_VALUE_WEIGHTS
        assert value[:5].min() >= value[5:].max()


def test_order_within_a_block_tells_nothing() -> None:
    value = np.stack(
        [
            request.teacher_probability @ cascade.PRODUCTION_VALUE_WEIGHTS
            for request in draw("test", test_requests=400)
        ]
    )
    for block in (slice(0, 5), slice(5, 30), slice(30, 100)):
        ranks = value[:, block].argsort(axis=1).argsort(axis=1)
        place = np.arange(ranks.shape[1])
        covariance = ((ranks - ranks.mean()) * (place - place.mean())).mean(axis=1)
        correlation = covariance / place.var()
        # A random order has correlation of variance 1 / (length - 1).
        deviation = 1 / np.sqrt((len(place) - 1) * len(value))
        assert abs(correlation.mean()) < 3 * deviation


def test_exploration_fills_its_share_of_slots() -> None:
    explored = 0
    requests = draw("test", test_requests=300)
    for request in requests:
        value = request.teacher_probability[:30] @ cascade.PRODUCTION_VALUE_WEIGHTS
        explored += np.sum(value[:5] < np.sort(value)[-5])
    # An explored slot may by chance hold one of the best five.
    expected = 0.2 * 5 * len(requests)
    assert 0.8 * expected < explored < 1.05 * expected


def test_faults_come_at_their_rates() -> None:
    rates = {"fault_missing": 0.1, "fault_nan": 0.05, "fault_out_of_range": 0.08}
    requests = draw("train", train_requests=400, fault_version=0.25, **rates)
    weight = np.concatenate([request.teacher_weight for request in requests])
    probability = np.concatenate([request.teacher_probability for request in requests])
    assert set(weight) == {0.0, 1.0}
    assert np.isnan(probability[weight == 0]).all()
    written = probability[weight == 1]
    nan = np.isnan(written)
    outside = ~nan & ((written < 0) | (written > 1))
    wrong = [request.teacher_version != cascade.TEACHER_VERSION for request in requests]
    for seen, rate in (
        (weight == 0, 0.1),
        (nan, 0.05),
        (outside, 0.08),
        (np.array(wrong), 0.25),
    ):
        assert abs(seen.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / seen.size)
    assert np.isinf(written).any()


NO_FAULTS = {f"fault_{name}": 0.0 for name in ("missing", "nan", "out_of_range", "version")}
FAULTS = dict(fault_missing=1.0, fault_nan=0.9, fault_version=1.0)


@pytest.mark.parametrize(
    ("split", "rates"), [("train", NO_FAULTS), ("validation", FAULTS), ("test", FAULTS)]
)
def test_faults_are_only_in_training_and_only_by_their_rates(split: str, rates: dict) -> None:
    for request in draw(split, **rates):
        for probability in (request.true_probability, request.teacher_probability):
            assert np.all((probability > 0) & (probability < 1))
        assert np.all(request.teacher_weight == 1)
        assert request.teacher_version == cascade.TEACHER_VERSION


def test_the_old_teacher_is_worse() -> None:
    new, old = (draw("train", **NO_FAULTS | {"fault_version": share}) for share in (0.0, 1.0))

    def mean_error(requests: list[Request]) -> float:
        label = np.concatenate([request.user_label for request in requests])
        probability = np.concatenate([request.teacher_probability[:5] for request in requests])
        return float(-np.log(np.where(label == 1, probability, 1 - probability)).mean())

    assert mean_error(new) < mean_error(old)


def topic_probability(num_events: int, completed: bool) -> float:
    """The watch probability of a pure item of topic 0 after events of topic 0, one a minute."""
    topics = np.eye(3, dtype=np.float32)
    event_topics = np.concatenate([topics[[1, 1]], topics[[0] * num_events]])
    age = np.linspace(0.5, 0.0, len(event_topics), dtype=np.float32)
    done = np.full(len(event_topics), completed)
    terms = cascade.logit_terms(
        interests=np.array([0.5, 0.5, 0.0], np.float32),
        moment=np.zeros(3, np.float32),
        fatigue=cascade.topic_fatigue(event_topics, age),
        mood=cascade.topic_mood(event_topics, done, np.zeros_like(done), age),
        topics=topics[:1],
        quality=np.zeros(1, np.float32),
        age=np.zeros(1, np.float32),
    )
    return float(cascade.sigmoid(cascade.true_logits(terms, np.zeros(3, np.float32)))[0, 0])


def test_more_of_a_topic_tires() -> None:
    skipped = [topic_probability(count, completed=False) for count in range(8)]
    assert np.all(np.diff(skipped) < 0)
    # Completions lift the mood at first, but they tire as well.
    completed = [topic_probability(count, completed=True) for count in range(12)]
    assert completed[1] > completed[0]
    assert completed[11] < max(completed)
    assert np.all(np.array(completed[1:8]) > np.array(skipped[1:]))


def test_fatigue_worked_example() -> None:
    event_topics = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], np.float32)
    now = np.zeros(3, np.float32)
    count = np.array([2.5, 0.5])
    np.testing.assert_allclose(
        cascade.topic_fatigue(event_topics, now), count**2 / (count**2 + 4), rtol=1e-6
    )
    long_ago = np.full(3, 48.0, np.float32)
    np.testing.assert_allclose(cascade.topic_fatigue(event_topics, long_ago), 0, atol=1e-6)


def test_the_history_matters_within_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    keep: Callable[..., np.ndarray] = cascade.true_logits

    def spy(terms: np.ndarray, generosity: np.ndarray) -> np.ndarray:
        drawn.append(terms)
        return keep(terms, generosity)

    monkeypatch.setattr(cascade, "true_logits", spy)
    draw("test")
    terms = np.stack(drawn)
    terms -= terms.mean(axis=1, keepdims=True)
    of_history = np.isin(cascade.TERMS, cascade.HISTORY_TERMS)
    for column in cascade.TERM_WEIGHTS.T:
        without = (terms @ (column * ~of_history)).ravel()
        explained = np.corrcoef(without, (terms @ column).ravel())[0, 1] ** 2
        assert 0.1 < explained < 0.7


@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 6, 6), (6, 1, 1)])
def test_tiny_funnels_work(sizes: tuple[int, int, int]) -> None:
    tiny = {"num_users": 1, "num_items": 6, "num_topics": 2, "history_length": 1}
    funnel = make_funnel(*sizes)
    sizes_of_splits = {"train_requests": 3, "validation_requests": 1, "test_requests": 2}
    for split in SPLITS:
        requests = draw(split, funnel, exploration=1.0, **sizes_of_splits, **tiny)
        for request in requests:
            assert len(set(request.item_id)) == sizes[0]
            assert request.user_label.shape == (sizes[2], 3)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((100, 101, 5), "funnel.passed=101"),
        ((401, 30, 5), "num_items=400"),
        ((100, 30, 31), "funnel.shown=31"),
        ((100, 30, 0), "funnel.shown=0"),
    ],
)
def test_impossible_funnels_are_named(sizes: tuple[int, int, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        cascade.open_source(make_data(), cascade.TASKS, make_funnel(*sizes))


def test_shares_that_exceed_a_whole_are_named() -> None:
    data = make_data(fault_nan=0.7, fault_out_of_range=0.7)
    with pytest.raises(UserError, match="fault_out_of_range"):
        cascade.open_source(data, cascade.TASKS, make_funnel())


@pytest.mark.parametrize("tasks", [("watch", "follow"), (), ("like", "like")])
def test_unknown_tasks_are_refused(tasks: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="tasks") as error:
        cascade.open_source(make_data(), tasks, make_funnel())
    if "follow" in tasks:
        assert all(task in str(error.value) for task in cascade.TASKS)


def test_taste_adds_to_the_logits_and_to_nothing_else_of_the_world() -> None:
    without, tasted = cascade.make_world(make_data()), cascade.make_world(make_data(taste=1.5))
    for name in ("interests", "topics", "quality", "upload_time", "teacher_item_error"):
        np.testing.assert_array_equal(getattr(without, name), getattr(tasted, name))
    assert without.taste.shape == (60, 0)
    np.testing.assert_allclose(tasted.taste.std(), 1.5, rtol=0.1)
    # The profile shows a user's taste, the policy a weaker view of the match.
    seen = tasted.user_features[:, -cascade.TASTE_SIZE :]
    assert 0.85 < np.corrcoef(seen.ravel(), tasted.taste.ravel())[0, 1] < 0.93
    match, by_policy = tasted.style @ tasted.taste.T, tasted.policy_style @ tasted.policy_taste.T
    assert 0.55 < np.corrcoef(match.ravel(), by_policy.ravel())[0, 1] < 0.7


def test_true_logits_hold_the_match_of_taste_and_style(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[np.ndarray] = []
    keep: Callable[..., np.ndarray] = cascade.true_logits

    def spy(terms: np.ndarray, generosity: np.ndarray) -> np.ndarray:
        logits = keep(terms, generosity)
        before.append(logits.copy())
        return logits

    monkeypatch.setattr(cascade, "true_logits", spy)
    # Without slots to fill, candidates keep the order in which the logits were taken.
    monkeypatch.setattr(cascade, "_shown_first", lambda rng, value, *_: np.arange(len(value)))
    world = cascade.make_world(make_data(taste=2.0))
    for request, logits in zip(draw("test", taste=2.0), before, strict=True):
        match = world.style[request.item_id] @ world.taste[request.user_id] / 16**0.5
        expected = logits + np.outer(match, [1.0, 0.9, 0.8])
        np.testing.assert_allclose(request.true_probability, cascade.sigmoid(expected), rtol=1e-4)


def test_the_item_explains_less_where_taste_counts_more() -> None:
    def share(taste: float) -> float:
        requests = draw("test", taste=taste, test_requests=200)
        items = [request.item_id for request in requests]
        values = np.concatenate([request.true_probability.sum(axis=1) for request in requests])
        numbers = np.repeat(np.arange(len(items)), list(map(len, items)))
        return item_share(numbers, np.concatenate(items), values)

    assert share(3.0) < 0.7 * share(0.0)
