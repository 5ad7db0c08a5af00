import dataclasses

import numpy as np
import pytest

from kd_ranker.batches.evaluation import evaluation_batches, num_evaluation_batches
from kd_ranker.errors import UserError
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import random_request, random_source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    storage.build(random_source, "small", directory)
    return storage.open_dataset("small", directory, made_by="")


def test_evaluation_reads_every_candidate_once_and_masks_what_fills_up(dataset):
    read = list(evaluation_batches(dataset, "test", requests=3, candidates=24))
    assert len(read) == 2 == num_evaluation_batches(dataset, "test", requests=3)
    np.testing.assert_array_equal(
        np.concatenate([batch.request_mask for batch in read]), [1, 1, 1, 1, 1, 0]
    )
    stored = list(read_requests(dataset, "test"))
    for row, request in enumerate(stored):
        evaluation, index = read[row // 3], row % 3
        # In an order that does not follow the logged funnel, for ties.
        batch, order = evaluation.batch, np.random.default_rng(request.request_id).permutation(20)
        np.testing.assert_array_equal(batch.item_id[index, :20], request.item_id[order])
        for name in ("true_probability", "incumbent", "propensity"):
            fact = getattr(evaluation, name)[index]
            np.testing.assert_array_equal(fact[:20], getattr(request, name)[order])
            assert np.isnan(fact[20:]).all()
        assert (batch.stage[index, 20:] == 0).all()
        np.testing.assert_array_equal(
            batch.label_weight[index, :20] > 0, np.isin(request.item_id[order], request.item_id[:4])
        )
        np.testing.assert_array_equal(
            batch.user_label[index, :20][batch.label_weight[index, :20] > 0],
            request.user_label[order[order < 4]],
        )


def test_each_split_is_read_by_its_name_and_its_requests_may_differ_in_size(tmp_path):
    sizes = {"train": [3, 20], "validation": [1, 20, 7], "test": [5]}

    def requests(split):
        for index, size in enumerate(sizes[split]):
            seed = 100 * SPLITS.index(split) + index
            yield random_request(seed, shown=1, passed=min(size, 3), retrieved=size)

    number = {split: len(sizes[split]) for split in SPLITS}
    source = dataclasses.replace(random_source(), requests=requests, num_requests=number)
    storage.build(lambda: source, "ragged", str(tmp_path))
    ragged = storage.open_dataset("ragged", str(tmp_path), made_by="")
    for split in SPLITS:
        read = list(evaluation_batches(ragged, split, requests=2, candidates=20))
        assert len(read) == num_evaluation_batches(ragged, split, requests=2)
        mask, items = (
            np.concatenate([getattr(of.batch, name) for of in read])
            for name in ("candidate_mask", "item_id")
        )
        there = np.concatenate([of.request_mask for of in read]) > 0
        assert mask[there].sum(axis=1).tolist() == sizes[split]
        for row, request in zip(np.flatnonzero(there), requests(split), strict=True):
            assert set(items[row][mask[row] > 0]) == set(request.item_id)


def test_a_limit_counts_requests_and_the_funnel_must_hold_each(dataset):
    (batch,) = evaluation_batches(dataset, "test", requests=8, candidates=20, limit=2)
    assert batch.request_mask.sum() == 2
    with pytest.raises(UserError, match=r"funnel.retrieved=10 is less than the 20 candidates"):
        list(evaluation_batches(dataset, "test", requests=2, candidates=10))
