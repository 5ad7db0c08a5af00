import dataclasses
import itertools
import os

import numpy as np
import pytest

from kd_ranker.requests import storage
from kd_ranker.requests.columns import proper_probability, unpack_rows
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS, block_of
from tests.requests.random_requests import random_request, random_source, with_facts

SIZES = [(4, 9, 20), (0, 0, 3), (1, 1, 1), (5, 5, 7), (3, 8, 8)]


def ragged_source():
    """Requests of several sizes, one without a candidate that was shown."""

    def requests(split):
        first = 10 * SPLITS.index(split)
        for index, size in enumerate(SIZES):
            request = random_request(first + index, *size, version=f"v{1 + index // 3}")
            if split != "train" and index != 1:
                request = with_facts(request, index)
            yield request

    return dataclasses.replace(
        random_source(),
        requests=requests,
        num_requests=dict.fromkeys(SPLITS, len(SIZES)),
    )


def opened(source, folder):
    storage.build(source, "rows", str(folder))
    return storage.open_dataset("rows", str(folder), made_by="some command")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return opened(ragged_source(), tmp_path_factory.mktemp("data"))


def fields(rows, index, number):
    read = rows.at(np.array([index]), np.arange(number)[None])
    return {name: value[0] for name, value in unpack_rows(read, rows.spans).items()}


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_of_a_request_say_what_its_record_says(dataset, split):
    columns = dataset.columns[split]
    assert len(columns) == len(SIZES)
    for index, request in enumerate(read_requests(dataset, split)):
        shown, passed, retrieved = SIZES[index]
        counts = columns.counts.of(index)
        known = 0 if split == "train" else len(request.true_probability)
        positives = request.user_label.any(axis=1).sum()
        sizes = (retrieved, passed, shown, passed, positives, known)
        assert counts == (request.request_id, *sizes, request.time)
        of_candidates = fields(columns.candidates, index, retrieved)
        order = [request.item_id.tolist().index(item) for item in of_candidates["item_id"]]
        if split != "train":
            assert order == list(range(retrieved))
        else:  # positives first; every stage stays where it was
            assert request.user_label[order[:positives]].any(axis=1).all()
            for start, stop in itertools.pairwise((0, shown, passed, retrieved)):
                assert sorted(order[start:stop]) == list(range(start, stop))
        np.testing.assert_array_equal(
            of_candidates["candidate_features"], request.candidate_features[order]
        )
        of_teacher = np.full((retrieved, 3), np.nan, np.float32)
        of_teacher[:passed] = proper_probability(block_of([request], dataset.spec), "v1")
        np.testing.assert_array_equal(of_candidates["teacher_probability"], of_teacher[order])
        of_labels = fields(columns.labels, index, shown)
        np.testing.assert_array_equal(of_labels["user_label"], request.user_label[order[:shown]])
        np.testing.assert_array_equal(of_labels["label_weight"], np.ones(shown))
        own = fields(columns.requests, index, 1)
        np.testing.assert_array_equal(own["user_features"][0], request.user_features)
        events = min(len(request.history_id), dataset.spec.history_length)
        assert own["history_mask"].sum() == events
        np.testing.assert_array_equal(
            own["history_id"][0, :events], request.history_id[len(request.history_id) - events :]
        )
        for name, fact in fields(columns.known, index, known).items():
            np.testing.assert_array_equal(fact, getattr(request, name)[:known])


@pytest.mark.parametrize("part", ["candidates", "labels", "known"])
def test_a_place_of_none_is_what_stands_for_none(dataset, part):
    rows = getattr(dataset.columns["test"], part)
    nothing = unpack_rows(rows.at(np.array([0, 3]), np.full((2, 2), -1)), rows.spans)
    for name, values in nothing.items():
        is_nan = name in ("teacher_probability", "true_probability", "incumbent", "propensity")
        assert np.isnan(values).all() if is_nan else not values.any()


def test_the_disk_is_told_of_neighbours_as_one(dataset, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *of: told.append(of[:2]))
    columns = dataset.columns["train"]
    first, width = 4 * columns.requests.first, 4 * columns.candidates.stride
    columns.expect(np.arange(5), columns.kept)
    last = 4 * columns.candidates.first[4] + 8 * width
    assert told == [(first[0], last - first[0])]
    told.clear()
    # One after the other, and one that lies before it.
    columns.expect(np.array([3, 0]), np.array([2, 4]))
    ends = 4 * columns.candidates.first[[3, 0]] + np.array([2, 4]) * width
    assert told == [(first[3], ends[0] - first[3]), (first[0], ends[1] - first[0])]
    told.clear()
    columns.expect(np.arange(0), np.arange(0))
    assert not told
