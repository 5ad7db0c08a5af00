import math

import numpy as np
import pandas as pd
import pytest

from kd_ranker.report.comparison import comparison, important_columns, marked
from kd_ranker.report.estimates import Estimates
from kd_ranker.report.intervals import difference, interval
from kd_ranker.report.study import read_studies
from tests.report import sweeps


class OfTable:
    """The estimates of one measure, of a table with a line a repeat and a column a setting."""

    def __init__(self, table):
        self.table = table

    def gap(self, setting, other, measure):
        return difference(self.table, setting, other)


def mark(table, direction):
    table = pd.DataFrame(table)
    means = {name: interval(table[name].to_numpy()) for name in table}
    return marked(OfTable(table), "", means, direction)


def test_a_clear_winner_is_marked():
    table = {"a": [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2], "c": [3.0, 3.2, 3.1]}
    assert mark(table, "lower") == "a"
    assert mark(table, "higher") == "c"
    assert mark(table, None) is None
    # Of what is best next to one, differences do not say who is.
    assert mark(table, "one") is None


def test_a_winner_that_cannot_be_told_from_the_runner_up_is_not_marked():
    table = {"a": [1.0, 1.4, 1.2], "b": [1.3, 1.3, 1.3], "c": [3.0, 3.2, 3.1]}
    assert mark(table, "lower") is None


def test_a_winner_has_to_be_told_from_every_other_setting():
    # The runner-up b is told from a, the noisy c is further away on average and is not.
    table = pd.DataFrame({"a": [1.0, 1.1, 1.2], "b": [1.5, 1.6, 1.7], "c": [0.5, 3.0, 4.0]})
    assert difference(table, "a", "b").high < 0
    assert difference(table, "a", "c").high > 0
    assert mark(table, "lower") is None


@pytest.mark.parametrize(
    "table",
    [
        {"a": [1.0], "b": [2.0]},  # one repeat
        {"a": [1.0, 1.1]},  # one setting
        {"a": [1.0, math.nan], "b": [math.nan, 2.0]},  # no pair
        {"a": [1.0, 1.0], "b": [1.0, 1.0]},  # the same
        {"a": [math.nan, math.nan], "b": [math.nan, math.nan]},
    ],
)
def test_nothing_is_marked_without_pairs_or_a_difference(table):
    assert mark(table, "lower") is None


@pytest.mark.parametrize("settings", [2, 11])
@pytest.mark.parametrize("shared_noise", [0.0, 3.0])
def test_of_equal_settings_one_is_marked_in_at_most_5_percent(settings, shared_noise):
    generator = np.random.default_rng(settings)
    marks = 0
    for _ in range(400):
        noise = generator.normal(size=(3, settings)) + shared_noise * generator.normal(size=(3, 1))
        marks += mark(pd.DataFrame(noise).rename(columns=str), "higher") is not None
    # Of two equals 5% are expected; three standard errors of 400 draws are 3.3%.
    assert marks / 400 < 0.05 + 0.033


def test_the_numbers_are_means_and_paired_differences(tmp_path):
    rows = [
        sweeps.teacher_row(),
        *({"mode": "none", "seed": s, "kl": kl} for s, kl in enumerate((0.2, 0.3, 0.4))),
        *({"mode": "shared", "seed": s, "kl": kl} for s, kl in enumerate((0.15, 0.24, 0.36))),
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    numbers = comparison(study, Estimates(study)).set_index(["setting", "measure"])
    none, shared = (
        numbers.loc[(setting, "teacher_kl/watch")] for setting in ("none", "shared, weight 1")
    )
    assert list(none[["mean", "low", "high", "n"]]) == pytest.approx(
        interval(np.array([0.2, 0.3, 0.4]))[:4]
    )
    assert math.isnan(none["difference"])
    assert list(
        shared[["difference", "difference_low", "difference_high", "pairs"]]
    ) == pytest.approx(interval(np.array([-0.05, -0.06, -0.04]))[:4])
    assert shared["best"]
    assert not none["best"]


def test_what_the_dataset_does_not_know_is_no_measure_of_the_table(tmp_path):
    (study,) = read_studies([sweeps.write_sweep(tmp_path, true_values=False)])
    assert not any("true" in column for column in important_columns(study))
    (other,) = read_studies([sweeps.write_rows(tmp_path / "other", [{"mode": "none"}])])
    assert "alignment_ratio" not in important_columns(other)


def test_it_is_of_the_chosen_settings_on_the_test(tmp_path):
    rows = [
        sweeps.teacher_row(),
        {"mode": "none", "test": {"kl": 0.5}},
        {"mode": "shared", "weight": 1.0, "passed": 50, "test": {"kl": 0.4}},
        {"mode": "shared", "weight": 2.0, "passed": 60, "test": {"kl": 0.1}},
    ]
    (study,) = read_studies([sweeps.write_rows(tmp_path, rows)])
    numbers = comparison(study, Estimates(study))
    of_kl = numbers[numbers["measure"] == "teacher_kl/watch"].set_index("setting")
    assert of_kl["mean"].to_dict() == pytest.approx({"none": 0.5, "shared, weight 1": 0.4})
    assert of_kl.loc["shared, weight 1", "difference"] == pytest.approx(-0.1)
    assert set(numbers["covers"]) == {"nothing"}
