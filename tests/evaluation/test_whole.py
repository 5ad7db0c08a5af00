"""Which requests of a log are scored whole."""

import dataclasses

import numpy as np
import pytest

from kd_ranker.evaluation.whole import whole_requests
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
    ("scored", "expected"),
    [
        ((9, 20, 9, 18, 17), [False, True, False, True, False]),  # nine tenths are 18
        ((9, 9, 9), None),
        ((20, 20), None),
        ((9, 12, 17), None),
    ],
)
def test_whole_requests_have_scores_of_nearly_all_candidates(scored, expected, tmp_path):
    found = whole_requests(columns_with(tmp_path, scored))

    assert (found if found is None else found.tolist()) == expected


def test_requests_of_which_all_candidates_were_passed_do_not_count(tmp_path):
    columns = columns_with(tmp_path, (20, 9, 9))
    counts = columns.counts._replace(passed=np.array([20, 9, 9]))

    assert whole_requests(dataclasses.replace(columns, counts=counts)) is None
