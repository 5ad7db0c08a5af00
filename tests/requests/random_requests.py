"""Small requests that the tests of the data room share."""

import dataclasses
from pathlib import Path

import numpy as np

from kd_ranker.batch import Request
from kd_ranker.requests import storage
from kd_ranker.requests.records import Dataset
from kd_ranker.requests.source import RequestSource, Source
from tests.random_batches import SPEC


def random_request(
    seed: int, shown: int = 4, passed: int = 9, retrieved: int = 20, version: str = "v1"
) -> Request:
    """A request for `SPEC` whose teacher scored what was passed."""
    generator = np.random.default_rng(seed)
    tasks, history = len(SPEC.tasks), int(generator.integers(0, SPEC.history_length + 3))

    def normal(*shape: int) -> np.ndarray:
        return generator.normal(size=shape).astype(np.float32)

    return Request(
        request_id=seed,
        time=1000 + seed,
        user_id=int(generator.integers(SPEC.num_users)),
        user_features=normal(SPEC.user_features),
        context=normal(SPEC.context_features),
        history_id=generator.integers(0, SPEC.num_items, history).astype(np.int32),
        history_features=normal(history, SPEC.history_features),
        item_id=generator.permutation(SPEC.num_items)[:retrieved].astype(np.int32),
        candidate_features=normal(retrieved, SPEC.candidate_features),
        num_passed=passed,
        user_label=generator.integers(0, 2, (shown, tasks)).astype(np.uint8),
        label_weight=np.ones(shown, np.float32),
        teacher_probability=generator.random((passed, tasks), dtype=np.float32),
        teacher_weight=np.ones(passed, np.float32),
        teacher_version=version,
        true_probability=np.zeros((0, tasks), np.float32),
        incumbent=np.zeros(0, np.float32),
        propensity=np.zeros(0, np.float32),
    )


def with_facts(request: Request, seed: int) -> Request:
    """The request with facts for the evaluation; of half of the shown the propensity is unknown."""
    generator, number = np.random.default_rng(seed), len(request.item_id)
    propensity = np.full(number, np.nan, np.float32)
    propensity[: len(request.user_label) : 2] = 0.25
    return dataclasses.replace(
        request,
        true_probability=generator.random((number, len(SPEC.tasks)), dtype=np.float32),
        incumbent=generator.normal(size=number).astype(np.float32),
        propensity=propensity,
    )


def random_source(train: int = 12, validation: int = 3, test: int = 5) -> RequestSource:
    """A source for `SPEC`, with facts for the evaluation in the requests of that."""
    num_requests = {"train": train, "validation": validation, "test": test}

    def requests(split):
        first = {"train": 0, "validation": 500, "test": 1000}[split]
        for index in range(num_requests[split]):
            request = random_request(first + index)
            if split != "train":
                request = with_facts(request, index)
            yield request

    return RequestSource(
        spec=dataclasses.replace(SPEC, teacher_version="v1"),
        item_features=np.random.default_rng(0)
        .normal(size=(SPEC.num_items, SPEC.item_features))
        .astype(np.float32),
        requests=requests,
        num_requests=num_requests,
    )


def built(folder: Path, source: Source, name: str = "small") -> Dataset:
    """The dataset of a source, written to a folder."""
    storage.build(lambda: source, name, str(folder))
    return storage.open_dataset(name, str(folder), made_by="some command")
