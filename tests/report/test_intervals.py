import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kd_ranker.report.intervals import (
    EQUIVALENCE_CONFIDENCE,
    Interval,
    difference,
    equivalence,
    interval,
)


def test_the_interval_is_scipys():
    values = np.random.default_rng(0).normal(3, 2, 7)
    ours = interval(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert ours[:4] == pytest.approx((values.mean(), theirs.low, theirs.high, 7))


def test_an_interval_worked_by_hand():
    # s = 2, so 3 ± 4.30265 · 2 / √3, and what is not known does not count.
    ours = interval(np.array([1.0, 3.0, math.nan, 5.0]))
    half = 4.30265 * 2 / 3**0.5
    assert ours[:4] == pytest.approx((3.0, 3 - half, 3 + half, 3), abs=1e-4)


@pytest.mark.parametrize(("values", "n"), [([], 0), ([math.nan], 0), ([0.5], 1)])
def test_below_two_repeats_there_is_no_interval(values, n):
    ours = interval(np.array(values, float))
    assert (ours.n, ours.covers) == (n, "nothing")
    assert math.isnan(ours.low)
    assert math.isnan(ours.high)


def test_a_difference_is_scipys_paired_one_over_the_repeats_that_have_both():
    generator = np.random.default_rng(1)
    one, other = generator.normal(0, 1, 5), generator.normal(0.5, 1, 5)
    table = pd.DataFrame({"one": [*one, 9.0, math.nan], "other": [*other, math.nan, 7.0]})
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    ours = difference(table, "one", "other")
    assert ours[:4] == pytest.approx(((one - other).mean(), theirs.low, theirs.high, 5))


def test_what_a_repeat_does_to_both_cancels_out():
    table = pd.DataFrame({"one": [1.0, 11.0, 21.0], "other": [0.9, 10.9, 20.9]})
    assert interval(table["one"].to_numpy()).low < 0
    assert difference(table, "one", "other").low > 0


@pytest.mark.parametrize(
    ("ends", "inner", "expected"),
    [
        ((0.02, 0.30), (0.05, 0.27), "higher"),
        ((-0.30, -0.02), (-0.27, -0.05), "lower"),
        ((-0.30, 0.02), (-0.27, -0.01), "undecided"),
        ((-0.12, 0.06), (-0.09, 0.05), "equivalent"),
        ((0.01, 0.09), (0.02, 0.08), "equivalent"),
        ((-0.12, 0.06), (-0.10, 0.05), "undecided"),
        ((math.nan, math.nan), (math.nan, math.nan), "undecided"),
    ],
)
def test_a_difference_is_equivalent_if_its_narrower_interval_is_inside_the_margin(
    ends, inner, expected
):
    wide, narrow = (Interval((low + high) / 2, low, high, 3) for low, high in (ends, inner))
    assert equivalence(wide, narrow, margin=0.1) == expected


def test_no_difference_is_equivalent_within_no_margin():
    nothing = Interval(0.0, 0.0, 0.0, 3)
    assert equivalence(nothing, nothing, margin=0.0) == "undecided"


def test_equivalence_is_that_of_two_one_sided_t_tests():
    margin, generator = 0.5, np.random.default_rng(2)
    found = []
    for _ in range(40):
        values = generator.normal(0, 0.6, 8)
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        both = equivalence(interval(values), interval(values, EQUIVALENCE_CONFIDENCE), margin)
        assert (both == "equivalent") == (max(above, below) < 0.05)
        found.append(both)
    assert {"equivalent", "undecided"} <= set(found)
