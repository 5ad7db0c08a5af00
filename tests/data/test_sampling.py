import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.batch import Stage
from kd_ranker.data import sampling
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
        sampling.proper_teacher_weight(request, "v1"), [[others, expected, others]]
    )


@given(
    positives=st.integers(0, 6),
    negatives=st.integers(0, 30),
    rate=st.floats(0, 1),
    slots=st.integers(0, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_reweighted_labels_keep_their_totals(positives, negatives, rate, slots, seed):
    generator = np.random.default_rng(seed)
    positive = generator.permutation(np.arange(positives + negatives) < positives)
    kept, factors = sampling.choose_labelled(positive, rate, slots, generator)
    assert len(kept) <= slots
    assert len(np.unique(kept)) == len(kept)
    # What is kept stands for all of its kind.
    if positives and slots:
        np.testing.assert_allclose(factors[positive[kept]].sum(), positives, rtol=1e-5)
    if negatives and slots >= 2:
        np.testing.assert_allclose(factors[~positive[kept]].sum(), negatives, rtol=1e-5)


def test_unlabelled_slots_are_shared_and_fill_up():
    generator = np.random.default_rng(0)
    passed, rest = np.arange(10, 20), np.arange(20, 60)
    chosen = sampling.choose_unlabelled(passed, rest, 0.25, 8, generator)
    assert np.sum(chosen < 20) == 2
    # More slots than the passed can fill, and more than there is.
    assert np.sum(sampling.choose_unlabelled(passed, rest, 1.0, 30, generator) < 20) == 10
    assert len(sampling.choose_unlabelled(passed, rest, 0.5, 80, generator)) == 50
    assert len(sampling.choose_unlabelled(passed[:0], rest[:0], 0.5, 8, generator)) == 0


@pytest.mark.parametrize("negative_rate", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("shown", "passed", "retrieved", "candidates"),
    [(4, 9, 20, 12), (4, 9, 20, 30), (4, 9, 20, 2), (1, 1, 1, 3), (4, 4, 4, 4), (0, 0, 5, 3)],
)
def test_a_training_sample_tells_the_truth_about_its_candidates(
    negative_rate, shown, passed, retrieved, candidates
):
    request = random_request(7, shown, passed, retrieved)
    fields = sampling.training_fields(
        request, V1, candidates, 0.5, negative_rate, np.random.default_rng(0)
    )
    real = fields["stage"] > 0
    assert real.sum() == min(candidates, retrieved)
    assert len(np.unique(fields["item_id"][real])) == real.sum()
    for name in sampling.PER_CANDIDATE:
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
    fields = sampling.training_fields(request, V1, 12, 0.5, 1.0, np.random.default_rng(0))
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
    fields = sampling.full_fields(request, V1, 20)
    kept = min(events, SPEC.history_length)
    assert fields["history_mask"].sum() == kept
    np.testing.assert_array_equal(fields["history_id"][:kept], np.arange(events)[events - kept :])
    np.testing.assert_array_equal(fields["history_features"][:kept, 0], fields["history_id"][:kept])
