import dataclasses

import numpy as np

from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import random_source


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
