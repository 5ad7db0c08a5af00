"""Which requests of a log are scored whole."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from kd_ranker.evaluation.whole import measurable
from kd_ranker.requests import storage
from tests.requests.random_requests import random_source


def columns_with(tmp_path, scored, passed=9):
    """The test split with the first `scored[i]` of the 20 candidates of request i scored."""
    source = random_source(test=len(scored))

    def requests(split):
        for index, request in enumerate(source.requests(split)):
            if split == "test":
                number = 20 if scored[index] > request.num_passed else request.num_passed
                probability = np.full((number, 3), np.nan, np.float32)
                probability[: scored[index]] = 0.5
                request = dataclasses.replace(
                    request,
                    num_passed=passed,
                    teacher_probability=probability,
                    teacher_weight=np.ones(number, np.float32),
                )
            yield request

    changed = dataclasses.replace(source, requests=requests)
    storage.build(lambda: changed, "some", str(tmp_path))
    return storage.open_dataset("some", str(tmp_path), made_by="").columns["test"]


@pytest.mark.parametrize(
    ("scored", "expected", "partly"),
    [
        ((9, 20, 9, 18, 17), [False, True, False, True, False], False),  # nine tenths are 18
        ((9, 9, 9), None, True),
        ((20, 20), None, False),
        ((9, 12, 17), None, True),
    ],
)
def test_the_funnel_counts_requests_scored_nearly_whole(scored, expected, partly, tmp_path):
    found = measurable(columns_with(tmp_path, scored), (1.0, 2.0, 4.0))

    requests = found.requests if found.requests is None else found.requests.tolist()
    assert (requests, found.are_partly_scored) == (expected, partly)


def test_requests_whose_candidates_all_passed_do_not_count(tmp_path):
    columns = columns_with(tmp_path, (20, 9, 9))
    counts = columns.counts._replace(passed=np.array([20, 9, 9]))

    found = measurable(dataclasses.replace(columns, counts=counts), (1.0, 2.0, 4.0))

    assert found == (None, True)


def test_a_task_without_value_needs_no_score(tmp_path):
    columns = columns_with(tmp_path, (20, 20))
    values = columns.candidates.fields(slice(None), columns.counts.retrieved)
    assert values["teacher_probability"].shape == (40, 3)
    values["teacher_probability"][:, 2] = np.nan
    candidates = SimpleNamespace(fields=lambda *_: values)
    lacking = dataclasses.replace(columns, candidates=candidates)

    assert measurable(lacking, (1.0, 2.0, 4.0)) == (None, True)
    assert measurable(lacking, (1.0, 2.0, 0.0)) == (None, False)
