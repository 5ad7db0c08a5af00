"""Requests come back from the files of a dataset: one by one, by TFDS, and as packed rows."""

import dataclasses
import itertools
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kd_ranker.batch import STORED, Category
from kd_ranker.requests.columns import unpack_rows
from kd_ranker.requests.records import read_requests, teacher_column
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import built, random_request, random_source, with_facts

# Shown, passed and retrieved candidates of each request; two have another teacher version.
SIZES = [(4, 9, 20), (0, 0, 3), (1, 1, 1), (5, 5, 7), (3, 8, 8)]


@pytest.fixture(scope="module")
def source():
    """Requests of several sizes, one of which has no shown candidate."""

    def requests(split):
        for index, size in enumerate(SIZES):
            seed = 10 * SPLITS.index(split) + index
            request = random_request(seed, *size, version=f"v{1 + index // 3}")
            request = dataclasses.replace(
                request,
                user_label=request.user_label * (np.arange(size[0])[:, None] % 2).astype(np.uint8),
                candidate_category=np.arange(2 * size[2], dtype=np.int32).reshape(-1, 2) % 9,
                request_category=np.array([index - 1], np.int32),
            )
            yield request if split == "train" or index == 1 else with_facts(request, index)

    source = random_source(*[len(SIZES)] * 3)
    spec = dataclasses.replace(
        source.spec,
        tasks=("größe", *source.spec.tasks[1:]),
        categories=(Category("kind", "candidate", 9, length=2), Category("land", "request", 9)),
    )
    return dataclasses.replace(source, spec=spec, requests=requests)


@pytest.fixture(scope="module")
def dataset(source, tmp_path_factory):
    return built(tmp_path_factory.mktemp("data"), source)


def in_order(request, size, split):
    """The fields of a request; candidates of a training request by item, within each stage."""
    fields = dict(vars(request))
    if split == "train":
        order = np.concatenate([
            start + np.argsort(request.item_id[start:stop])
            for start, stop in itertools.pairwise((0, *size))
        ])  # fmt: skip
        for field in STORED:
            if field.of in ("candidate", "shown", "scored") and fields[field.name] is not None:
                fields[field.name] = fields[field.name][order[: len(fields[field.name])]]
    return fields


def stored(request, split, history_length):
    """A request as it comes back: without old events, and without scores that do not count."""
    events = slice(max(len(request.history_id) - history_length, 0), None)
    counts = request.teacher_version == "v1"
    facts = ("true_probability", "incumbent", "propensity") if split == "train" else ()
    return dataclasses.replace(
        request,
        history_id=request.history_id[events],
        history_features=request.history_features[events],
        teacher_probability=np.where(counts, request.teacher_probability, np.float32(np.nan)),
        teacher_weight=request.teacher_weight * counts,
        teacher_version="v1" if len(request.teacher_weight) else "",
        **{name: getattr(request, name)[:0] for name in facts},
    )


@pytest.mark.parametrize("split", SPLITS)
def test_requests_come_back_to_programs_and_to_tfds(source, dataset, split):
    # The features of the builder open the files again in another process.
    builder = tfds.builder_from_directory(dataset.directory)
    records = builder.as_data_source(split=split)
    features = pickle.loads(pickle.dumps(builder.info.features))
    requests = list(read_requests(dataset, split))
    assert len(records) == len(requests) == len(SIZES)
    for record, request, logged, size in zip(
        records, requests, source.requests(split), SIZES, strict=True
    ):
        expected = in_order(stored(logged, split, source.spec.history_length), size, split)
        found = in_order(request, size, split)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert record.keys() == set(features)
        probability = request.teacher_probability
        for index, task in enumerate(source.spec.tasks):
            np.testing.assert_array_equal(record.pop(teacher_column(task)), probability[:, index])
        assert record.pop("teacher_version").decode() == request.teacher_version
        for name, value in record.items():
            np.testing.assert_array_equal(value, getattr(request, name))
            assert value.dtype == features[name].np_dtype
    np.testing.assert_array_equal(dataset.items.features, source.item_features)
    assert dataset.spec == source.spec
    part = builder.as_data_source(split=f"{split}[1:3]")
    expected_ids = [request.request_id for request in requests[1:3]]
    assert [record["request_id"] for record in part] == expected_ids


@pytest.mark.parametrize("split", SPLITS)
def test_counts_are_those_of_each_request(dataset, split):
    columns = dataset.columns[split]
    for index, request in enumerate(read_requests(dataset, split)):
        shown, passed, retrieved = SIZES[index]
        is_positive = request.user_label.any(axis=1)
        known = 0 if split == "train" or index == 1 else retrieved
        sizes = (retrieved, passed, shown, passed, is_positive.sum(), known)
        assert columns.counts.of(index) == (request.request_id, *sizes, request.time)
        if split == "train":  # positives first
            assert not is_positive[is_positive.sum() :].any()


@pytest.mark.parametrize("part", ["candidates", "labels", "known"])
def test_a_place_below_0_is_the_padding_row(dataset, part):
    rows = getattr(dataset.columns["test"], part)
    nothing = unpack_rows(rows.at(np.array([0, 3]), np.full((2, 2), -1)), rows.type)
    for name, values in nothing.items():
        if name in ("teacher_probability", "true_probability", "incumbent", "propensity"):
            assert np.isnan(values).all()
        else:
            assert (values == (-1 if "category" in name else 0)).all()


def test_neighbors_are_fetched_as_one(dataset, monkeypatch):
    fetched = []

    def advise(file, start, length, advice):
        fetched.append((start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    columns = dataset.columns["train"]
    first, width = 4 * columns.requests.first, 4 * columns.candidates.stride
    columns.expect(np.arange(5), columns.counts.retrieved)
    last = 4 * columns.candidates.first[4] + 8 * width
    assert fetched == [(first[0], last - first[0])]
    fetched.clear()
    # One after the other, and one that is before it.
    columns.expect(np.array([3, 0]), np.array([2, 4]))
    ends = 4 * columns.candidates.first[[3, 0]] + np.array([2, 4]) * width
    assert fetched == [(first[3], ends[0] - first[3]), (first[0], ends[1] - first[0])]
    fetched.clear()
    columns.expect(np.arange(0), np.arange(0))
    assert not fetched
