"""The setting that the answer speaks of; the choice within a way is in the tests of savings."""

import pytest

from kd_ranker.report import choices
from kd_ranker.report.study import read_studies
from tests.report import sweeps


def study_of(tmp_path, *rows):
    (study,) = read_studies([sweeps.write_rows(tmp_path, [sweeps.teacher_row(), *rows])])
    return study


def test_the_best_that_distils_is_chosen_on_validation_of_all_ways(tmp_path):
    study = study_of(
        tmp_path,
        {"mode": "none", "passed": 10},
        {"mode": "shared", "weight": 1.0, "passed": 310, "test": {"passed": 100}},
        {"mode": "shared", "weight": 3.0, "passed": 290, "test": {"passed": 900}},
        {"mode": "aux", "passed": 300, "test": {"passed": 100}},
    )
    assert choices.best_distilled(study) == "shared, weight 3"


def test_without_a_mode_that_distils_there_is_none(tmp_path):
    assert choices.best_distilled(study_of(tmp_path, {"mode": "none"})) is None


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"true_value_captured@30": 0.9}, ["true_value_captured@30"]),
        ({"true_value_captured@30": None}, ["end_to_end_hit_rate@30/watch"]),
        ({}, ["end_to_end_hit_rate@30/watch"]),
    ],
)
def test_users_are_asked_where_nobody_knows_the_truth(tmp_path, known, expected):
    assert choices.users_measures(study_of(tmp_path, {"mode": "none"} | known)) == expected
