"""Tests of the simulated feed."""

import dataclasses
import datetime
import functools
import math
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from ml_collections import ConfigDict

from kd_ranker.batch import STORED
from kd_ranker.config import checks
from kd_ranker.configs import cascade as config_of
from kd_ranker.errors import UserError
from kd_ranker.requests import storage
from kd_ranker.requests.request import BLOCK, SPLITS, Request
from kd_ranker.sources import cascade

SIZES = dict(num_users=60, num_items=400, train_requests=60, validation_requests=20)
SIZES |= dict(test_requests=40, history_length=12, taste=0.0, exploration=0.2)
NO_FAULTS = {f"fault_{name}": 0.0 for name in ("missing", "nan", "out_of_range", "version")}


def make_data(**changes) -> ConfigDict:
    data = config_of().data
    data.update(SIZES | changes)
    return data


def make_funnel(retrieved=100, passed=30, shown=5) -> ConfigDict:
    return ConfigDict({"retrieved": retrieved, "passed": passed, "shown": shown})


@functools.cache
def draw(split: str, sizes=(100, 30, 5), tasks=cascade.TASKS, **changes) -> list[Request]:
    source = cascade.open_source(make_data(**changes), tasks, make_funnel(*sizes))
    requests = list(source.requests(split))
    assert len(requests) == source.num_requests[split]
    assert [request.request_id for request in requests] == list(range(len(requests)))
    return requests


def values_of(requests) -> np.ndarray:
    """What the production ranker sorts by; in training, only of what was passed."""
    weights = cascade.PRODUCTION_VALUE_WEIGHTS
    return np.stack([request.teacher_probability @ weights for request in requests])


def assert_same(requests, others) -> None:
    for request, other in zip(requests, others, strict=True):
        for field in dataclasses.fields(Request):
            np.testing.assert_array_equal(getattr(request, field.name), getattr(other, field.name))


def test_shapes_dtypes_and_ids_follow_the_spec():
    source = cascade.open_source(make_data(), cascade.TASKS, make_funnel())
    spec = source.spec
    assert source.item_features.shape == (400, spec.item_features)
    for split, logged, known in (("train", 30, 0), ("validation", 100, 100), ("test", 100, 100)):
        for request in draw(split):
            events = len(request.history_id)
            assert 1 <= events <= spec.history_length
            assert 0 <= request.user_id < 60
            for ids in (request.item_id, request.history_id):
                assert {*ids} <= {*range(400)}
            assert len({*request.item_id} - {*request.history_id}) == 100
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


def item_lists(requests):
    """The items of each request in their order, as bytes."""
    return {request.item_id.tobytes() for request in requests}


def test_processes_draw_a_large_feed_as_one_process_does(tmp_path, monkeypatch):
    def build(folder):
        source = functools.partial(
            cascade.open_source,
            make_data(train_requests=9 * BLOCK),
            cascade.TASKS,
            make_funnel(),
        )
        directory = storage.build(source, "feed", str(tmp_path / folder))
        return {path.name: path.read_bytes() for path in directory.glob("*.bin")}

    before = psutil.Process().children()
    in_processes = build("processes")
    monkeypatch.setattr(cascade.SimulatedFeed, "_is_large", lambda self: False)

    assert in_processes == build("one")
    left = [
        " ".join(child.cmdline()) for child in psutil.Process().children() if child not in before
    ]
    # It removes what processes leave behind, and stays until the end.
    assert all("resource_tracker" in command for command in left)


@pytest.mark.parametrize("split", SPLITS)
def test_a_request_is_drawn_the_same_again(split):
    source = cascade.open_source(make_data(), cascade.TASKS, make_funnel())
    other_splits = [other for other in SPLITS if other != split]
    sizes = {f"{other}_requests": 7 for other in other_splits}

    assert_same(source.requests(split), draw(split))
    assert_same(draw(split, **sizes), draw(split))


@pytest.mark.parametrize("split", SPLITS)
def test_a_request_depends_on_its_seed_and_its_split(split):
    items = item_lists(draw(split))

    assert not items & item_lists(draw(split, seed=1))
    for other in SPLITS:
        if other != split:
            assert not items & item_lists(draw(other))


@pytest.mark.parametrize("split", SPLITS)
def test_fewer_tasks_leave_the_others_as_they_are(split):
    some_tasks = draw(split, tasks=("share", "watch"))
    all_tasks = draw(split, fault_nan=0.0)

    for part, full in zip(some_tasks, all_tasks, strict=True):
        np.testing.assert_array_equal(part.item_id, full.item_id)
        for name in ("user_label", "true_probability"):
            np.testing.assert_array_equal(getattr(part, name), getattr(full, name)[:, [2, 0]])


def test_times_rise_and_nothing_is_used_before_it_was_uploaded():
    everything = [request for split in SPLITS for request in draw(split)]
    times = [request.time for request in everything]
    assert times == sorted(times)

    def days(split):
        return {(request.time - cascade.START) // 86400 for request in draw(split)}

    assert days("train") == set(range(7))
    assert days("validation") == {7}
    assert days("test") == {8, 9}
    world = cascade.World(make_data())
    for request in everything:
        moment = datetime.datetime.fromtimestamp(request.time, datetime.UTC)
        hour = moment.hour + moment.minute / 60 + moment.second / 3600
        angle = np.degrees(np.arctan2(*request.context[:2])) % 360
        assert angle == pytest.approx(15 * hour, abs=1e-3)
        assert request.context[2] == (moment.weekday() >= 5)
        age = 60 * np.expm1(4 * request.history_features[:, 2])
        assert np.all(np.diff(age) <= 0), "the most recent event stands last"
        assert np.all(request.time - age > world.upload_time[request.history_id])
        assert np.all(request.time > world.upload_time[request.item_id])


@pytest.mark.parametrize(
    ("passed", "shown", "exploration"),
    [(12, 5, 0.3), (6, 5, 0.9), (5, 5, 0.5), (9, 4, 0), (9, 4, 1)],
)
def test_propensities_are_the_frequencies_of_being_shown(passed, shown, exploration):
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


def test_the_log_has_the_policy_and_propensity_of_the_shown():
    expected = cascade.shown_probability(30, 5, 0.2).astype(np.float32)
    for request in draw("test"):
        assert request.incumbent[30:].min() < request.incumbent[30:].max()
        assert request.incumbent[:30].min() >= request.incumbent[30:].max()
        value = request.teacher_probability[:30] @ cascade.PRODUCTION_VALUE_WEIGHTS
        rank = [int((value > own).sum()) for own in value[:5]]
        np.testing.assert_array_equal(request.propensity[:5], expected[rank])
        assert np.isnan(request.propensity[5:]).all()


def test_labels_follow_the_true_probabilities():
    requests = draw("test", test_requests=600)
    label = np.concatenate([request.user_label for request in requests]).astype(float)
    chance = np.concatenate([request.true_probability[:5] for request in requests]).astype(float)
    middle = np.median(chance, axis=0)
    # The same among high and among low probabilities: labels follow each one, not just their mean.
    for some in (chance >= 0, chance > middle, chance <= middle):
        deviation = np.sqrt((some * chance * (1 - chance)).sum(axis=0))
        assert np.all(np.abs((some * (label - chance)).sum(axis=0)) < 3 * deviation)


def test_the_funnel_narrows_towards_value():
    value = values_of(draw("test", test_requests=400))
    assert value[:, :5].mean() > value[:, :30].mean() > value.mean()
    greedy = values_of(draw("test", exploration=0.0))[:, :30]
    assert (greedy[:, :5].min(axis=1) >= greedy[:, 5:].max(axis=1)).all()
    # A share of the slots is explored; such a slot may by chance hold one of the best five.
    explored = np.mean(value[:, :5] < np.sort(value[:, :30])[:, -5, None])
    assert 0.16 < explored < 0.21
    for block in (slice(0, 5), slice(5, 30), slice(30, 100)):
        ranks = value[:, block].argsort(axis=1).argsort(axis=1)
        place = np.arange(ranks.shape[1])
        covariance = ((ranks - ranks.mean()) * (place - place.mean())).mean(axis=1)
        correlation = covariance / place.var()
        # A random order has correlation of variance 1 / (length - 1).
        deviation = 1 / np.sqrt((len(place) - 1) * len(value))
        assert abs(correlation.mean()) < 3 * deviation


def test_faults_come_at_their_rates():
    rates = {"fault_missing": 0.1, "fault_nan": 0.05, "fault_out_of_range": 0.08}
    requests = draw("train", train_requests=400, fault_version=0.25, **rates)
    weight = np.concatenate([request.teacher_weight for request in requests])
    probability = np.concatenate([request.teacher_probability for request in requests])
    assert set(weight) == {0.0, 1.0}
    assert np.isnan(probability[weight == 0]).all()
    written = probability[weight == 1]
    nan = np.isnan(written)
    outside = ~nan & ((written < 0) | (written > 1))
    versions = np.array([request.teacher_version for request in requests])
    wrong = versions != cascade.TEACHER_VERSION
    for seen, rate in ((weight == 0, 0.1), (nan, 0.05), (outside, 0.08), (wrong, 0.25)):
        assert abs(seen.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / seen.size)
    assert np.isinf(written).any()
    faulty = dict(fault_missing=1.0, fault_nan=0.9, fault_version=1.0)
    for split, rates in (("train", NO_FAULTS), ("validation", faulty), ("test", faulty)):
        for request in draw(split, **rates):
            for probability in (request.true_probability, request.teacher_probability):
                assert np.all((probability > 0) & (probability < 1))
            assert np.all(request.teacher_weight == 1)
            assert request.teacher_version == cascade.TEACHER_VERSION


@pytest.mark.parametrize("hours", [0.0, 48.0])
def test_fatigue_and_mood_are_their_formulas_and_fade(hours):
    topics = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], np.float32)
    world = SimpleNamespace(topics=topics, quality=np.zeros(3), interests=np.zeros((1, 2)))
    world.moment_taste = np.ones((8, 2)) / 8**0.5
    completed, liked = np.array([True, True, False]), np.array([True, False, False])
    history = cascade.History(np.arange(3), completed, liked, np.full(3, hours, np.float32))
    terms = cascade.logit_terms(world, 0, np.ones(8), history, np.arange(3), np.zeros(3))
    count = np.array([2.5, 0.5]) * np.exp(-hours / 0.5)
    mood = np.tanh(np.array([2 + 1 - 0.5, -0.5]) * np.exp(-hours / 12) / 2)
    fatigue = count**2 / (count**2 + 4)
    expected = topics @ np.stack([np.ones(2), fatigue, mood, fatigue], axis=1)
    np.testing.assert_allclose(terms[:, 3:], expected, rtol=1e-5, atol=1e-6)


def test_the_history_and_the_taste_matter_within_a_request(monkeypatch):
    drawn, keep = [], cascade.logit_terms

    def spy(*arguments):
        drawn.append(keep(*arguments))
        return drawn[-1]

    monkeypatch.setattr(cascade, "logit_terms", spy)
    # Without slots to fill, candidates keep the order in which the logits were taken.
    monkeypatch.setattr(cascade, "_shown_first", lambda rng, value, *_: np.arange(len(value)))
    world = cascade.World(make_data(taste=2.0, seed=5))
    for request, terms in zip(draw("test", taste=2.0, seed=5), drawn, strict=True):
        logits = terms @ cascade.TERM_WEIGHTS + cascade.INTERCEPTS
        match = world.style[request.item_id] @ world.taste[request.user_id] / 16**0.5
        expected = logits + world.generosity[request.user_id] + np.outer(match, [1.0, 0.9, 0.8])
        np.testing.assert_allclose(request.true_probability, cascade.sigmoid(expected), rtol=1e-4)
    terms = np.stack(drawn)
    terms -= terms.mean(axis=1, keepdims=True)
    for column in cascade.TERM_WEIGHTS.T:
        without = (terms @ (column * ~cascade.IS_OF_HISTORY)).ravel()
        explained = np.corrcoef(without, (terms @ column).ravel())[0, 1] ** 2
        assert 0.1 < explained < 0.7


@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 6, 6), (6, 1, 1)])
def test_tiny_funnels_work(sizes):
    tiny = {"num_users": 1, "num_items": 6, "num_topics": 2, "history_length": 1}
    tiny |= {"train_requests": 3, "validation_requests": 1, "test_requests": 2}
    for split in SPLITS:
        for request in draw(split, sizes, exploration=1.0, **tiny):
            assert len(set(request.item_id)) == sizes[0]
            assert request.user_label.shape == (sizes[2], 3)


@pytest.mark.parametrize(
    ("sizes", "tasks", "changes", "named"),
    [
        ((100, 101, 5), cascade.TASKS, {}, "funnel.passed=101"),
        ((401, 30, 5), cascade.TASKS, {}, "num_items=400"),
        ((100, 30, 0), cascade.TASKS, {}, "funnel.shown=0"),
        ((100, 30, 5), cascade.TASKS, dict(fault_nan=0.7, fault_out_of_range=0.7), "out_of"),
        ((100, 30, 5), ("watch", "follow"), {}, "tasks.*like, share"),
        ((100, 30, 5), ("like", "like"), {}, "tasks"),
    ],
)
def test_impossible_settings_are_named(sizes, tasks, changes, named):
    with pytest.raises(UserError, match=named):
        cascade.open_source(make_data(**changes), tasks, make_funnel(*sizes))


def test_noise_scales_the_errors_of_the_production_ranker():
    def errors(noise):
        error = []
        for request in draw("test", noise=noise, exploration=0.0):
            place = np.argsort(request.item_id)
            both = np.stack([request.teacher_probability, request.true_probability])[:, place]
            of_teacher, true = np.log(both / (1 - both)).astype(np.float64)
            error.append(of_teacher - true)
        return np.stack(error)

    np.testing.assert_allclose(errors(4.0), 4 * errors(1.0), atol=2e-3)
    np.testing.assert_allclose(errors(0.0), 0, atol=2e-3)


def test_noise_changes_what_is_shown_and_nothing_before_it():
    shown_differ = []
    for quiet, loud in zip(draw("test", noise=0.0), draw("test", noise=4.0), strict=True):
        for name in ("time", "user_id", "history_id"):
            np.testing.assert_array_equal(getattr(quiet, name), getattr(loud, name))
        for part in (slice(30), slice(30, None)):
            assert {*quiet.item_id[part]} == {*loud.item_id[part]}
        shown_differ.append({*quiet.item_id[:5]} != {*loud.item_id[:5]})
    assert np.mean(shown_differ) > 0.5


def test_a_hint_has_its_correlation_with_the_final_ranker():
    found = []
    for plain, hinted in zip(draw("test"), draw("test", hint=0.8), strict=True):
        value = hinted.teacher_probability @ cascade.PRODUCTION_VALUE_WEIGHTS
        found.append(np.corrcoef(hinted.candidate_features[:, 1], np.log(value))[0, 1])
        same = dataclasses.replace(hinted, candidate_features=hinted.candidate_features[:, :1])
        assert_same([plain], [same])

    assert np.mean(found) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf, "high", True])
def test_noise_is_a_number_from_0(noise):
    config = config_of("small").to_dict()
    config["data"]["noise"] = noise
    with pytest.raises(UserError, match=r"data.noise has .*; it takes numbers ≥ 0"):
        checks.validate(ConfigDict(config))


def test_taste_changes_the_logits_alone():
    without, tasted = cascade.World(make_data()), cascade.World(make_data(taste=1.5))
    for name in ("interests", "topics", "quality", "upload_time", "teacher_item_error"):
        np.testing.assert_array_equal(getattr(without, name), getattr(tasted, name))
    assert without.taste.shape == (60, 0)
    np.testing.assert_allclose(tasted.taste.std(), 1.5, rtol=0.1)
    # The profile shows a user's taste, the policy a weaker view of the match.
    seen = tasted.user_features[:, -cascade.TASTE_SIZE :]
    assert 0.85 < np.corrcoef(seen.ravel(), tasted.taste.ravel())[0, 1] < 0.93
    match, by_policy = tasted.style @ tasted.taste.T, tasted.policy_style @ tasted.policy_taste.T
    assert 0.55 < np.corrcoef(match.ravel(), by_policy.ravel())[0, 1] < 0.7
