"""A small random dataset with early scores, and its requests one by one."""

import dataclasses

import numpy as np

from kd_ranker.requests import storage
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from tests.requests.random_requests import random_source

EARLY_SCORES = ("first", "second")


def open_some(tmp_path, constant=False, **sizes):
    """Return the dataset, and its requests by split; the second early score may be constant."""
    source = random_source(**sizes)
    spec = dataclasses.replace(source.spec, early_scores=EARLY_SCORES)

    def requests(split):
        for request in source.requests(split):
            if split == "train":
                yield dataclasses.replace(request, early_scores=np.empty((0, 2), np.float32))
                continue
            generator = np.random.default_rng(request.request_id)
            scores = generator.normal(size=(len(request.item_id), 2)).astype(np.float32)
            if constant:
                scores[:, 1] = 3.0
            number = len(request.true_probability)
            yield dataclasses.replace(request, early_scores=scores[:number])

    with_scores = dataclasses.replace(source, spec=spec, requests=requests)
    storage.build(lambda: with_scores, "some", str(tmp_path))
    dataset = storage.open_dataset("some", str(tmp_path), made_by="")
    return dataset, {split: list(read_requests(dataset, split)) for split in SPLITS}
