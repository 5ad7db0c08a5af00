"""The choice of settings on validation, worked by hand; savings are in the tests of results."""

import math

import pandas as pd
import pytest

from kd_ranker.evaluation import saving


def rows_of(passed_by_setting, split="validation"):
    """Rows of settings (way, name) -> `passed_for_99` by repeat; None leaves one out."""
    lines = [
        {"split": split, "way": way, "setting": f"{way} {name}", "repeat": str(repeat),
         "mode": way.split()[0], saving.CRITERION: passed}
        for (way, name), by_repeat in passed_by_setting.items()
        for repeat, passed in enumerate(by_repeat)
        if passed is not None
    ]  # fmt: skip
    return pd.DataFrame(lines)


NAN = math.nan


def test_a_table_has_a_line_a_repeat_and_columns_in_the_order_of_the_file():
    rows = pd.DataFrame(
        {"setting": ["b", "a", "b"], "repeat": ["0/0", "0/0", "1/0"], "m": [1.0, 2.0, 3.0]}
    )
    table = saving.by_repeat(rows, "m")
    assert list(table) == ["b", "a"]
    assert table.loc["1/0", "b"] == 3.0
    assert math.isnan(table.loc["1/0", "a"])
    assert saving.by_repeat(rows, "absent").isna().all(axis=None)


def test_of_each_way_the_setting_that_needs_the_fewest_on_validation_is_chosen():
    rows = rows_of(
        {
            ("none", "slow"): [400, 420],
            ("none", "fast"): [380, 430],  # 405 against 410
            ("shared bce", "weight 1"): [310, 290],
            ("shared bce", "weight 3"): [200, 350],  # 275, though worse in one repeat
            ("shared topk", "weight 1"): [390, 400],
            ("aux", "user"): [320, 310],
            ("aux", "blend"): [300, 310],
        }
    )
    chosen = {
        "none": "none fast",
        "shared bce": "shared bce weight 3",
        "shared topk": "shared topk weight 1",
        "aux": "aux blend",
    }
    assert saving.best_of_ways(rows) == chosen
    assert list(saving.best_of_ways(rows)) == list(chosen)
    assert saving.baseline(rows) == "none fast"
    assert saving.best(rows, saving.settings_of(rows, distilled=True)) == "shared bce weight 3"


def test_validation_alone_decides_whatever_test_says():
    by_setting = {("none", "a"): [400, 420], ("none", "b"): [300, 310], ("aux", "a"): [500, 510]}
    validation = rows_of(by_setting)
    for on_test in ([1, 1], [NAN, NAN], [9999, 1]):
        test = rows_of({("none", "a"): on_test, ("aux", "b"): on_test}, split="test")
        rows = pd.concat([test, validation, test.assign(repeat="7")], ignore_index=True)
        assert saving.best_of_ways(rows) == {"none": "none b", "aux": "aux a"}
        assert saving.baseline(rows) == "none b"


@pytest.mark.parametrize("lacks", [None, NAN])
def test_a_setting_with_fewer_repeats_is_not_chosen(lacks):
    rows = rows_of(
        {
            ("none", "a"): [400, 420],
            ("none", "b"): [100, lacks],
            ("aux", "a"): [310, lacks],  # with as many as any of its way
            ("aux", "b"): [300, lacks],
        }
    )
    assert saving.best_of_ways(rows) == {"none": "none a", "aux": "aux b"}


def test_equals_go_to_the_first():
    rows = rows_of({("aux", "b"): [300, 300], ("aux", "a"): [310, 290], ("aux", "c"): [290, 310]})
    assert saving.best_of_ways(rows) == {"aux": "aux b"}


def test_a_way_without_a_number_on_validation_has_no_choice():
    rows = rows_of({("none", "a"): [NAN, NAN], ("aux", "a"): [300, 310]})
    test = rows_of({("none", "a"): [300, 300], ("shared", "a"): [1, 1]}, split="test")
    assert saving.best_of_ways(pd.concat([rows, test])) == {"aux": "aux a"}
    assert saving.baseline(pd.concat([rows, test])) is None
    assert saving.best_of_ways(test) == {}
    assert saving.best(rows, []) is None
