import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kd_ranker.report.intervals import difference, interval


def test_the_interval_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 7)
    ours = interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ours == pytest.approx((values.mean(), theirs.low, theirs.high, 7))


def test_an_interval_worked_by_hand():
    # s = 2, so 3 ± 4.30265 · 2 / √3, and what is not known does not count.
    ours = interval(np.array([1.0, 3.0, math.nan, 5.0]))
    half = 4.30265 * 2 / 3**0.5
    assert ours == pytest.approx((3.0, 3 - half, 3 + half, 3), abs=1e-4)


@pytest.mark.parametrize(("values", "n"), [([], 0), ([math.nan], 0), ([0.5], 1)])
def test_below_two_repeats_there_is_no_interval(values, n):
    ours = interval(np.array(values, float))
    assert ours.n == n
    assert math.isnan(ours.low)
    assert math.isnan(ours.high)


def test_a_difference_is_scipys_paired_one_over_the_repeats_that_have_both():
    generator = np.random.default_rng(1)
    one, other = generator.normal(0, 1, 5), generator.normal(0.5, 1, 5)
    table = pd.DataFrame({"one": [*one, 9.0, math.nan], "other": [*other, math.nan, 7.0]})
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    ours = difference(table, "one", "other")
    assert ours == pytest.approx(((one - other).mean(), theirs.low, theirs.high, 5))


def test_what_a_repeat_does_to_both_cancels_out():
    table = pd.DataFrame({"one": [1.0, 11.0, 21.0], "other": [0.9, 10.9, 20.9]})
    assert interval(table["one"].to_numpy()).low < 0
    assert difference(table, "one", "other").low > 0
