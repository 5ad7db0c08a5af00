"""The arrays that rivals read against the requests one by one."""

import numpy as np
import pytest

from kd_ranker.batch import Stage
from kd_ranker.rivals.candidates import (
    Candidates,
    in_parts,
    item_rates,
    last_requests,
    places_by,
)
from tests.rivals.some_dataset import open_some

WEIGHTS = (1.0, 2.0, 4.0)


def test_arrays_concatenate_those_of_the_requests(tmp_path):
    dataset, requests = open_some(tmp_path)

    some = Candidates(dataset, "test", slice(None))

    of_test = requests["test"]
    item_id = np.concatenate([request.item_id for request in of_test])
    early_scores = np.concatenate([request.early_scores for request in of_test])
    np.testing.assert_array_equal(some.item_id, item_id)
    np.testing.assert_array_equal(some.early_scores, early_scores)
    stages = []
    for request in of_test:
        place = np.arange(len(request.item_id))
        stages.append(1 + (place < request.num_passed) + (place < len(request.user_label)))
    np.testing.assert_array_equal(some.stage, np.concatenate(stages))


def test_a_user_value_is_a_weighted_sum_of_valid_labels(tmp_path):
    dataset, requests = open_some(tmp_path)

    found = Candidates(dataset, "test", slice(None)).user_value(WEIGHTS)

    expected = []
    for request in requests["test"]:
        value = np.full(len(request.item_id), np.nan)
        value[: len(request.user_label)] = request.user_label @ np.array(WEIGHTS)
        expected.append(value)
    np.testing.assert_allclose(found, np.concatenate(expected))


@pytest.mark.parametrize("reached", [Stage.PASSED, Stage.SHOWN])
def test_a_final_value_needs_a_score_and_the_stage(reached, tmp_path):
    dataset, requests = open_some(tmp_path)

    found = Candidates(dataset, "test", slice(None)).final_value(WEIGHTS, reached)

    expected = []
    for request in requests["test"]:
        number = request.num_passed if reached == Stage.PASSED else len(request.user_label)
        value = np.full(len(request.item_id), np.nan)
        value[:number] = (request.teacher_probability @ np.array(WEIGHTS))[:number]
        expected.append(value)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-6)


def test_numbers_hold_no_costly_item_feature_and_the_rates_last(tmp_path):
    dataset, requests = open_some(tmp_path)
    spec = dataset.spec
    rates = np.arange(2.0 * spec.num_items, dtype=np.float32).reshape(-1, 2)

    numbers = Candidates(dataset, "validation", slice(None)).numbers(rates)

    request = requests["validation"][0]
    number = len(request.item_id)
    expected = np.concatenate(
        [
            np.tile(request.user_features, (number, 1)),
            np.tile(request.context, (number, 1)),
            request.candidate_features,
            np.asarray(dataset.items.features)[request.item_id, : spec.cheap_item_features],
            rates[request.item_id],
        ],
        axis=1,
    )
    np.testing.assert_array_equal(numbers[:number], expected)


def test_rates_count_the_passes_of_an_item_one_after_the_other(tmp_path):
    dataset, requests = open_some(tmp_path, train=30)
    top = 3

    rates = item_rates(dataset, slice(5, 25), WEIGHTS, Stage.PASSED, top)

    shown, passed, wanted, scored, topped = np.zeros((5, dataset.spec.num_items))
    for request in requests["train"][5:25]:
        value = request.teacher_probability @ np.array(WEIGHTS)
        first = np.argsort(-value)[:top]
        for place, item in enumerate(request.item_id[: request.num_passed]):
            passed[item] += 1
            scored[item] += 1
            topped[item] += place in first
            if place < len(request.user_label):
                shown[item] += 1
                wanted[item] += request.user_label[place] @ np.array(WEIGHTS)
    expected = [
        np.log1p(shown),
        shown / (passed + 10),
        np.log1p(passed),
        wanted / (shown + 10),
        topped / (scored + 10),
    ]
    np.testing.assert_allclose(rates, np.stack(expected, axis=1), rtol=1e-6)


def test_parts_are_the_whole(tmp_path, monkeypatch):
    dataset, requests = open_some(tmp_path)
    monkeypatch.setattr("kd_ranker.requests.columns._ROWS_AT_A_TIME", 30)

    parts = list(in_parts(dataset, "test", slice(1, 4)))

    assert len(parts) > 1
    item_id = np.concatenate([request.item_id for request in requests["test"][1:4]])
    np.testing.assert_array_equal(np.concatenate([part.item_id for part in parts]), item_id)


@pytest.mark.parametrize(("most", "expected"), [(60, slice(9, 12)), (10**6, slice(6, 12))])
def test_the_last_requests_are_at_most_half_of_the_split(most, expected, tmp_path):
    dataset, _ = open_some(tmp_path)  # 12 training requests of 20 candidates

    assert last_requests(dataset.columns["train"], most) == expected


def test_places_start_anew_by_request_with_missing_last():
    places = places_by(np.array([1.0, np.nan, 3, 3, -5, -4]), np.array([4, 2]))

    np.testing.assert_array_equal(places, [2, 3, 0, 1, 1, 0])
