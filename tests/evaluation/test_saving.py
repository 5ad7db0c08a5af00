"""Settings by repeats; the best of them and the savings are in the tests of choices and results."""

import math

import pandas as pd

from kd_ranker.evaluation.saving import by_repeat


def test_a_table_has_a_line_a_repeat_and_columns_in_the_order_of_the_file():
    rows = pd.DataFrame(
        {"setting": ["b", "a", "b"], "repeat": ["0/0", "0/0", "1/0"], "m": [1.0, 2.0, 3.0]}
    )
    table = by_repeat(rows, "m")
    assert list(table) == ["b", "a"]
    assert table.loc["1/0", "b"] == 3.0
    assert math.isnan(table.loc["1/0", "a"])
