import dataclasses

import numpy as np
import pytest

from kd_ranker.batches.cutting import batch_size, evaluation_batches
from kd_ranker.errors import UserError
from kd_ranker.requests.records import read_requests
from tests.requests.random_requests import built, random_request, random_source, with_facts

SIZES = [20, 5, 1, 20, 7]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Test requests of several sizes; the third has no facts for the evaluation."""

    def requests(split):
        if split != "test":
            yield from random_source().requests(split)
            return
        for seed, size in enumerate(SIZES):
            request = random_request(seed, shown=1, passed=min(size, 3), retrieved=size)
            yield request if seed == 2 else with_facts(request, seed)

    source = dataclasses.replace(random_source(), requests=requests)
    return built(tmp_path_factory.mktemp("data"), source)


def test_evaluation_reads_every_candidate_once(dataset):
    first, second = evaluation_batches(dataset, "test", requests=3, candidates=24)

    assert first.request_mask.tolist() == [True, True, True]
    assert second.request_mask.tolist() == [True, True, False]
    for row, request in enumerate(read_requests(dataset, "test")):
        evaluation = first if row < 3 else second
        index = row % 3
        size = SIZES[row]
        # In an order that does not follow the logged funnel, for ties.
        order = np.random.default_rng(request.request_id).permutation(size)
        batch = evaluation.batch
        np.testing.assert_array_equal(batch.item_id[index, :size], request.item_id[order])
        for name in ("true_probability", "incumbent", "propensity"):
            fact = getattr(evaluation, name)[index]
            stored = getattr(request, name)
            known = size if row != 2 else 0
            np.testing.assert_array_equal(fact[:known], stored[order[:known]])
            assert np.isnan(fact[known:]).all()
        assert batch.candidate_mask[index].sum() == size
        is_labeled = batch.label_weight[index] > 0
        np.testing.assert_array_equal(is_labeled[:size], order == 0)
        np.testing.assert_array_equal(batch.user_label[index][is_labeled], request.user_label)


def test_numbers_of_rivals_follow_their_candidates(dataset):
    numbers = np.arange(sum(SIZES), dtype=np.float32)[:, None]
    numbers_by_request = np.split(numbers, np.cumsum(SIZES)[:-1])

    batches = [*evaluation_batches(dataset, "test", requests=3, candidates=24, rivals=numbers)]

    for row, request in enumerate(read_requests(dataset, "test")):
        order = np.random.default_rng(request.request_id).permutation(SIZES[row])
        of_request = batches[row // 3].rivals[row % 3, : SIZES[row]]
        np.testing.assert_array_equal(of_request, numbers_by_request[row][order])


def test_a_limit_counts_requests_and_the_funnel_must_hold_each(dataset):
    (batch,) = evaluation_batches(dataset, "test", requests=8, candidates=20, limit=2)
    assert batch.request_mask.sum() == 2
    with pytest.raises(UserError, match=r"funnel.retrieved=10 is less than the 20 candidates"):
        list(evaluation_batches(dataset, "test", requests=2, candidates=10))


def test_a_batch_has_no_more_rows_than_requests_to_fill_it():
    """The others would only be padding. A multiple of 1,024 is shared evenly by most devices."""
    assert batch_size(16, 5) == 16
    assert batch_size(1000, 2) == 1000
    assert batch_size(2**31, 5) == 1024
    assert batch_size(2**31, 1025) == 2048
    assert batch_size(1500, 10**6) == 1500
