import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.batch import Stage
from kd_ranker.data import sampling
from kd_ranker.data.columns import columns_of, joined, proper_teacher_values
from tests.batches import SPEC
from tests.data.requests import random_request

V1 = dataclasses.replace(SPEC, teacher_version="v1")


@pytest.mark.parametrize(
    ("probability", "weight", "version", "expected"),
    [
        (0.3, 1, "v1", 1),
        (0.0, 1, "v1", 1),
        (1.0, 1, "v1", 1),
        (0.3, 0, "v1", 0),
        (np.nan, 1, "v1", 0),
        (1.2, 1, "v1", 0),
        (-0.1, 1, "v1", 0),
        (np.inf, 1, "v1", 0),
        (0.3, 1, "v0", 0),
    ],
)
def test_only_properly_logged_probabilities_count(probability, weight, version, expected):
    request = dataclasses.replace(
        random_request(0, version=version),
        teacher_probability=np.array([[0.5, probability, 0.5]], np.float32),
        teacher_weight=np.array([weight], np.float32),
    )
    others = float(weight == 1 and version == "v1")
    np.testing.assert_array_equal(
        proper_teacher_values(request, "v1"), [[others, expected, others]]
    )


def fields_of(request, candidates, negative_rate=1.0, seed=0, passed_share=0.5):
    """A training sample of one request."""
    columns, generator = columns_of([request], V1), np.random.default_rng(seed)
    batch = sampling.training_fields(
        columns, np.zeros(1, int), candidates, passed_share, negative_rate, generator
    )
    return {name: array[0] for name, array in batch.items()}


PER_CANDIDATE = (
    "item_id",
    "candidate_features",
    "stage",
    "user_label",
    "label_weight",
    "teacher_probability",
    "teacher_weight",
)


@given(
    numbers=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_what_is_drawn_is_real_and_drawn_once(numbers, seed):
    number = np.array([n for n, _ in numbers])
    wanted = np.array([round(share * n) for n, share in numbers])
    start = np.random.default_rng(seed).random(len(number))
    # The ends of the range as well.
    start[seed % len(start)] = seed % 2 * (1 - 2**-53)
    places, real = sampling.spread_evenly(number, wanted, start)
    for row in range(len(number)):
        drawn = places[row][real[row]]
        assert len(drawn) == len(np.unique(drawn)) == wanted[row]
        assert ((drawn >= 0) & (drawn < number[row])).all()
        assert (np.diff(drawn) > 0).all()


@pytest.mark.parametrize(("number", "wanted"), [(3, 3), (1000, 1000), (1000, 999), (1, 1)])
def test_a_start_next_to_one_draws_nothing_twice(number, wanted):
    start = np.array([np.nextafter(1, 0)])
    places, _ = sampling.spread_evenly(np.array([number]), np.array([wanted]), start)
    assert len(np.unique(places)) == wanted
    assert places.max() < number


def test_each_place_is_drawn_as_often_as_any_other():
    starts = np.random.default_rng(0).random(20_000)
    same = np.ones(len(starts), int)
    places, real = sampling.spread_evenly(7 * same, 3 * same, starts)
    share = np.bincount(places[real], minlength=7) / len(starts)
    # Four standard deviations of a share of 3/7.
    np.testing.assert_allclose(share, 3 / 7, atol=4 * np.sqrt(12 / 49 / len(starts)))


@given(
    positives=st.integers(0, 6),
    negatives=st.integers(0, 30),
    rate=st.floats(0, 1),
    slots=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_reweighted_labels_keep_their_totals(positives, negatives, rate, slots, seed):
    shown = positives + negatives
    positive = np.random.default_rng(seed).permutation(np.arange(shown) < positives)
    request = dataclasses.replace(
        random_request(seed, shown, shown, 40),
        user_label=np.repeat(positive[:, None], len(SPEC.tasks), axis=1).astype(np.uint8),
    )
    fields = fields_of(request, slots, rate, seed)
    weight, label = fields["label_weight"], fields["user_label"][:, 0]
    kept = weight > 0
    assert len(np.unique(fields["item_id"])) == slots
    # What is kept stands for all of its kind.
    if positives:
        np.testing.assert_allclose(weight[kept & (label == 1)].sum(), positives, rtol=1e-5)
    if negatives and slots >= 2:
        np.testing.assert_allclose(weight[kept & (label == 0)].sum(), negatives, rtol=1e-5)
    if positives + max(round(rate * negatives), 1) <= slots:
        assert (kept & (label == 1)).sum() == positives


def test_unlabelled_slots_are_shared_and_fill_up():
    request = random_request(0, shown=0, passed=10, retrieved=50)

    def numbers(candidates, share):
        stage = fields_of(request, candidates, passed_share=share)["stage"]
        return (stage == Stage.PASSED).sum(), (stage == Stage.RETRIEVED).sum()

    assert numbers(8, 0.25) == (2, 6)
    # More slots than the passed can fill, and more than there is.
    assert numbers(30, 1.0) == (10, 20)
    assert numbers(80, 0.5) == (10, 40)


def test_a_batch_holds_each_request_as_alone():
    """Ragged requests side by side, one without candidates that were shown or scored."""
    requests = [
        random_request(0),
        random_request(1, shown=0, passed=0, retrieved=3),
        random_request(2, shown=7, passed=7, retrieved=7, version="v0"),
        random_request(3, shown=1, passed=1, retrieved=1),
    ]
    parts = [columns_of(requests[:1], V1), columns_of(requests[1:], V1)]
    together = sampling.full_fields(joined(parts), 20)
    drawn = sampling.training_fields(
        joined(parts), np.array([2, 0, 1, 3, 1]), 20, 0.5, 1.0, np.random.default_rng(0)
    )
    for place, index in enumerate([2, 0, 1, 3, 1]):
        alone = sampling.full_fields(columns_of([requests[index]], V1), 20)
        for name, array in alone.items():
            np.testing.assert_array_equal(together[name][index], array[0], err_msg=name)
        # Room for all, so the same candidates, in another order.
        order, own = (np.lexsort((f["item_id"][p], -np.sign(f["stage"][p])))
                      for f, p in ((drawn, place), (alone, 0)))  # fmt: skip
        for name in PER_CANDIDATE:
            np.testing.assert_array_equal(drawn[name][place][order], alone[name][0][own])


@pytest.mark.parametrize("negative_rate", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("shown", "passed", "retrieved", "candidates"),
    [(4, 9, 20, 12), (4, 9, 20, 30), (4, 9, 20, 2), (1, 1, 1, 3), (4, 4, 4, 4), (0, 0, 5, 3)],
)
def test_a_training_sample_tells_the_truth_about_its_candidates(
    negative_rate, shown, passed, retrieved, candidates
):
    request = random_request(7, shown, passed, retrieved)
    fields = fields_of(request, candidates, negative_rate)
    real = fields["stage"] > 0
    assert real.sum() == min(candidates, retrieved)
    assert len(np.unique(fields["item_id"][real])) == real.sum()
    for name in PER_CANDIDATE:
        assert len(fields[name]) == candidates
        assert (fields[name][~real] == 0).all()
    position = {int(item): index for index, item in enumerate(request.item_id)}
    for index in np.flatnonzero(real):
        stored = position[int(fields["item_id"][index])]
        np.testing.assert_array_equal(
            fields["candidate_features"][index], request.candidate_features[stored]
        )
        stage = Stage(int(fields["stage"][index]))
        if stored < shown:
            assert stage == Stage.SHOWN
            np.testing.assert_array_equal(fields["user_label"][index], request.user_label[stored])
        else:
            assert stage == (Stage.PASSED if stored < passed else Stage.RETRIEVED)
            assert fields["label_weight"][index] == 0
        if stored < passed:
            np.testing.assert_array_equal(
                fields["teacher_probability"][index], request.teacher_probability[stored]
            )
            assert (fields["teacher_weight"][index] == 1).all()
        else:
            assert (fields["teacher_weight"][index] == 0).all()


def test_all_shown_candidates_come_first_and_keep_their_weight():
    request = random_request(3)
    fields = fields_of(request, 12)
    assert (fields["stage"][:4] == Stage.SHOWN).all()
    assert set(fields["item_id"][:4]) == set(request.item_id[:4])
    np.testing.assert_array_equal(fields["label_weight"][:5], [1, 1, 1, 1, 0])


@pytest.mark.parametrize("events", [0, 2, SPEC.history_length, SPEC.history_length + 4])
def test_the_most_recent_events_are_kept(events):
    request = dataclasses.replace(
        random_request(0),
        history_id=np.arange(events, dtype=np.int32),
        history_features=np.arange(events, dtype=np.float32)[:, None].repeat(3, 1),
    )
    fields = {
        name: array[0]
        for name, array in sampling.full_fields(columns_of([request], V1), 20).items()
    }
    kept = min(events, SPEC.history_length)
    assert fields["history_mask"].sum() == kept
    np.testing.assert_array_equal(fields["history_id"][:kept], np.arange(events)[events - kept :])
    np.testing.assert_array_equal(fields["history_features"][:kept, 0], fields["history_id"][:kept])
