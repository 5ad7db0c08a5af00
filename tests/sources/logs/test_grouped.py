import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.logs.grouped import time_cutoffs
from kd_ranker.sources.logs.statistics import merge_moments, moments_of

numbers = st.lists(st.floats(-1e6, 1e6), max_size=20)


@given(numbers, numbers)
def test_moments_of_parts_are_joined_to_those_of_the_whole(one, other):
    joined = merge_moments(moments_of(np.array(one)), moments_of(np.array(other)))
    whole = np.array(one + other)
    assert joined.number == len(whole)
    if len(whole):
        np.testing.assert_allclose(joined.mean, whole.mean(), atol=1e-6)
        np.testing.assert_allclose(joined.deviation, whole.std(), rtol=1e-6, atol=1e-4)
        assert (joined.low, joined.high) == (whole.min(), whole.max())


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
def test_the_cutoffs_leave_each_split_a_second_and_the_earliest_to_training(time, share, part):
    shares = share * part, share * (1 - part)
    cutoffs = time_cutoffs(np.array(time), *shares)
    if len(set(time)) < 3:
        assert cutoffs is None
        return
    validation, test = cutoffs
    assert min(time) < validation < test <= max(time)
    assert {validation, test} <= set(time)
    # The test has all of its share, but for the seconds that it would cut through.
    number = round(shares[1] * len(time))
    assert sum(t > test for t in time) <= number
    assert sum(t >= test for t in time) >= number or test == sorted(set(time))[2]
    # So has the validation, of what the test leaves, but that it has a second at the least.
    last_before = max(t for t in time if t < test)
    held_out = round(sum(shares) * len(time))
    assert sum(t > validation for t in time) <= held_out or validation == last_before
    assert sum(t >= validation for t in time) >= held_out or validation == sorted(set(time))[1]


def test_cutoffs_worked_by_hand():
    times = np.repeat([1, 2, 3], [1, 1, 8])
    assert time_cutoffs(times, 0.1, 0.1) == (2, 3)
    assert time_cutoffs(np.arange(10), 0.2, 0.3) == (5, 7)
    assert time_cutoffs(np.arange(10), 0.001, 0.001) == (8, 9)
    assert time_cutoffs(np.arange(10), 0.5, 0.49) == (1, 5)
    assert time_cutoffs(np.array([7, 7, 8]), 0.3, 0.3) is None
