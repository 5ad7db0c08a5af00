import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.logs import log_statistics, merging, plan, scan
from kd_ranker.sources.logs.encode import _most_frequent, _numbered
from kd_ranker.sources.logs.log_statistics import merge_moments, moments_of
from kd_ranker.sources.logs.merging import Counts, Merger
from kd_ranker.sources.logs.named_columns import Ragged, starts_of
from kd_ranker.sources.logs.scan import Times

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


def test_gathering_joins_as_it_goes_and_gives_the_same_as_at_the_end(monkeypatch):
    monkeypatch.setattr(merging, "_WORTH_MERGING", 4)
    joins = []

    def join(pieces):
        joins.append(len(pieces))
        return [value for piece in pieces for value in piece]

    gathering = Merger(join, len)
    for number in range(40):
        gathering.add([number])
    assert gathering.result() == list(range(40))
    assert 2 < len(joins) < 8


def test_counts_are_added_up():
    one = merging.counts_of(np.array([5, 3, 5]), np.array([True, False, False]))
    assert [column.tolist() for column in one] == [[3, 5], [0, 1], [1, 2]]
    both = merging.merge_counts([one, Counts(*(np.array([of]) for of in (4, 1, 6)))])
    assert [column.tolist() for column in both] == [[3, 4, 5], [0, 1, 1], [1, 6, 2]]


def test_ids_go_by_how_often_training_has_them_then_by_how_often_the_others_have():
    counts = Counts(*map(np.array, ([10, 20, 30, 40, 50], [0, 2, 2, 7, 0], [3, 9, 2, 7, 5])))
    vocabulary = _numbered(counts)
    assert dict(zip(vocabulary.key.tolist(), vocabulary.number.tolist(), strict=True)) == {
        40: 0, 20: 1, 30: 2, 50: 3, 10: 4,
    }  # fmt: skip
    kept = _most_frequent(counts, 2)
    assert dict(zip(kept.key.tolist(), kept.number.tolist(), strict=True)) == {40: 1, 20: 2}
    assert len(_most_frequent(counts, 9).key) == 3


def test_items_keep_the_values_of_their_last_row_and_whether_they_vary():
    def rows(item, time, value, bags):
        count = len(item)
        lengths = np.array([len(bag) for bag in bags])
        return {
            "item": np.array(item), "train": np.ones(count, int), "total": np.ones(count, int),
            "time": np.array(time), "file": np.zeros(count, int), "row": np.arange(count),
            "feature:a": np.array(value), "varies:a": np.zeros(count, np.int8),
            "feature:b": Ragged(starts_of(lengths), np.array([v for bag in bags for v in bag])),
            "varies:b": np.zeros(count, np.int8),
        }  # fmt: skip

    nan = np.nan
    one = log_statistics.merge_items(
        [rows([7, 8, 7], [5, 1, 3], [1.0, nan, 1.0], [[1, 2], [3], [2, 1]])]
    )
    assert one["item"].tolist() == [7, 8]
    assert one["feature:a"][0] == 1.0
    assert one["varies:a"].tolist() == one["varies:b"].tolist() == [0, 0]
    other = log_statistics.merge_items([rows([7, 8], [4, 2], [2.0, nan], [[1, 2], [4]])])
    both = log_statistics.merge_items([one, other])
    assert both["total"].tolist() == [3, 2]
    assert both["feature:a"].tolist()[0] == 1.0
    assert both["feature:b"].values.tolist() == [1, 2, 4]
    assert both["varies:a"].tolist() == [1, 0]
    assert both["varies:b"].tolist() == [0, 1]


@given(st.data())
def test_buckets_are_bounded_follow_in_time_and_hold_whole_requests(data):
    count = data.draw(st.integers(1, 30))
    draw = lambda low, high: np.array(  # noqa: E731
        data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    )
    times = Times(np.arange(count), draw(0, 9), draw(1, 12))

    class Layout:
        bucket_rows = 10

    found = plan.plan_buckets(times, Layout)
    too_large = times.entries > 10
    assert ((found.bucket < 0) == too_large).all()
    order = np.lexsort((times.request, times.time))
    buckets = found.bucket[order][~too_large[order]]
    assert (np.diff(buckets) >= 0).all()
    assert (np.diff(buckets) <= 1).all()
    for bucket in np.unique(buckets):
        assert times.entries[found.bucket == bucket].sum() <= 10


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
def test_the_cutoffs_leave_each_split_a_second_and_the_earliest_to_training(time, share, part):
    shares = share * part, share * (1 - part)
    cutoffs = plan.time_cutoffs(np.array(time), *shares)
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
    assert plan.time_cutoffs(times, 0.1, 0.1) == (2, 3)
    assert plan.time_cutoffs(np.arange(10), 0.2, 0.3) == (5, 7)
    assert plan.time_cutoffs(np.arange(10), 0.001, 0.001) == (8, 9)
    assert plan.time_cutoffs(np.arange(10), 0.5, 0.49) == (1, 5)
    assert plan.time_cutoffs(np.array([7, 7, 8]), 0.3, 0.3) is None


def test_times_of_a_request_are_its_earliest():
    gathered = scan.time_merger()
    gathered.add(scan._distinct(np.array([4, 4, 2]), np.array([9, 8, 5]), np.array([1, 1, 1])))
    gathered.add(scan._distinct(np.array([2, 4]), np.array([6, 1]), np.array([3, 1])))
    assert [column.tolist() for column in gathered.result()] == [[2, 4], [5, 1], [4, 3]]
