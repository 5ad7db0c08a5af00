import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kd_ranker.batch import STORED, Category
from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests, teacher_column
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import random_source


def source_with_categories():
    source = random_source()
    categories = (Category("kind", "candidate", 9, length=2), Category("country", "request", 9))

    def requests(split):
        for request in source.requests(split):
            ids = np.arange(40, dtype=np.int32).reshape(20, 2) % 9
            yield dataclasses.replace(
                request, candidate_category=ids, request_category=np.array([3], np.int32)
            )

    spec = dataclasses.replace(source.spec, tasks=("größe", *source.spec.tasks[1:]))
    spec = dataclasses.replace(spec, categories=categories)
    return dataclasses.replace(source, spec=spec, requests=requests)


def in_order(request, split):
    """The fields of a request; candidates of a training request by item, within each stage."""
    fields = dict(vars(request))
    if split == "train":
        bounds = itertools.pairwise((0, 4, 9, 20))
        order = np.concatenate(
            [start + np.argsort(request.item_id[start:stop]) for start, stop in bounds]
        )
        for field in STORED:
            if field.of in ("candidate", "shown", "scored") and fields[field.name] is not None:
                fields[field.name] = fields[field.name][order[: len(fields[field.name])]]
    return fields


def expected_of(source, split):
    """The fields of the requests of a source as they are stored."""
    for request in source.requests(split):
        events = slice(max(len(request.history_id) - source.spec.history_length, 0), None)
        yield in_order(
            dataclasses.replace(
                request,
                history_id=request.history_id[events],
                history_features=request.history_features[events],
            ),
            split,
        )


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("make", [random_source, source_with_categories])
def test_what_is_stored_comes_back_to_programs_and_to_tfds(tmp_path, make, split):
    source = make()
    directory = storage.build(source, "small", str(tmp_path))
    dataset = storage.open_dataset("small", str(tmp_path), made_by="")
    # The features of the builder open the files again in another process.
    builder = tfds.builder_from_directory(directory)
    records = builder.as_data_source(split=split)
    features = pickle.loads(pickle.dumps(builder.info.features))
    assert len(records) == source.num_requests[split]
    for place, (request, expected) in enumerate(
        zip(read_requests(dataset, split), expected_of(source, split), strict=True)
    ):
        found = in_order(request, split)
        for name, value in expected.items():
            if value is not None and not (split == "train" and name == "true_probability"):
                np.testing.assert_array_equal(found[name], value, err_msg=name)
        record = records[place]
        assert record.keys() == set(features)
        probability = request.teacher_probability
        for index, task in enumerate(source.spec.tasks):
            np.testing.assert_array_equal(record.pop(teacher_column(task)), probability[:, index])
        assert record.pop("teacher_version").decode() == request.teacher_version
        for name, value in record.items():
            np.testing.assert_array_equal(value, getattr(request, name))
            assert value.dtype == features[name].np_dtype
    np.testing.assert_array_equal(dataset.item_features, source.item_features)
    assert dataset.spec == source.spec


def test_tfds_reads_a_part_of_a_split(tmp_path):
    directory = storage.build(random_source(), "small", str(tmp_path))
    records = tfds.builder_from_directory(directory).as_data_source(split="test[1:3]")
    assert [record["request_id"] for record in records] == [1001, 1002]
