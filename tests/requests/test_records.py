import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kd_ranker.batch import Category
from kd_ranker.requests import storage
from kd_ranker.requests.block import block_of
from kd_ranker.requests.records import read_requests, record_features, serialized, teacher_column
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import random_request, random_source


def test_what_is_stored_comes_back(tmp_path):
    storage.build(random_source(), "small", str(tmp_path))
    dataset = storage.open_dataset("small", str(tmp_path), made_by="")
    for split in SPLITS:
        stored, source = read_requests(dataset, split), random_source().requests(split)
        for one, other in zip(stored, source, strict=True):
            for field in dataclasses.fields(one):
                if (expected := getattr(other, field.name)) is not None:
                    np.testing.assert_array_equal(getattr(one, field.name), expected)
    np.testing.assert_array_equal(dataset.item_features, random_source().item_features)
    assert dataset.spec == random_source().spec


@pytest.mark.parametrize("categories", [False, True])
def test_the_bytes_of_a_record_are_those_that_tfds_writes(categories):
    spec, request = random_source().spec, random_request(3)
    spec = dataclasses.replace(spec, tasks=("größe", *spec.tasks[1:]))  # more bytes than letters
    if categories:
        spec = dataclasses.replace(spec, categories=(Category("kind", "candidate", 9, length=2),))
        ids = np.arange(40, dtype=np.int32).reshape(20, 2) % 9
        # Whole numbers of one byte, and of as many as there can be.
        numbers = {"request_id": 2**63 - 1, "time": -1, "user_id": 127}
        request = dataclasses.replace(request, candidate_category=ids, **numbers)
    features = record_features(spec)
    record = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    probability = record.pop("teacher_probability")
    record |= {teacher_column(task): probability[:, i] for i, task in enumerate(spec.tasks)}
    known = {name: record[name] for name in features}
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    example = serializer.get_tf_example(features.encode_example(known))
    assert [*serialized(block_of([request], spec), spec)] == [
        example.SerializeToString(deterministic=True)
    ]
