import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.sources.logs import named_columns, values
from kd_ranker.sources.logs.named_columns import Ragged
from kd_ranker.sources.logs.value_keys import MISSING, column_keys, share_of


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([3, None, -1], pa.int32()), [3, MISSING, -1]),
        (pa.array([3, None], pa.uint64()), [3, MISSING]),
        (pa.array([True, None, False]), [1, MISSING, 0]),
        (pa.array([5.0, None, float("nan"), 2.5, 1e300]), [5, *[MISSING] * 4]),
        (pa.array([7, None, 7]).dictionary_encode(), [7, MISSING, 7]),
        (pa.nulls(2), [MISSING, MISSING]),
    ],
)
def test_keys_of_whole_numbers_are_the_numbers(array, expected):
    assert column_keys(array).key.tolist() == expected


def test_numbers_that_are_no_ids_are_counted():
    assert column_keys(pa.array([5.0, float("nan"), 2.5, None])).num_bad == 1


@pytest.mark.parametrize(
    "type_",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_keys_of_texts_tell_them_apart_whatever_holds_them(type_):
    array = pa.array(["a", None, "b", "", "a", "ä"]).cast(type_)
    keys = column_keys(array)
    assert keys.key[0] == keys.key[4] != keys.key[2]
    assert (keys.key == MISSING).tolist() == [False, True, False, True, False, False]
    assert keys.key.tolist() == column_keys(pa.array(["a", None, "b", "", "a", "ä"])).key.tolist()
    texts = dict(zip(keys.text_keys.tolist(), keys.texts.to_pylist(), strict=True))
    assert [texts.get(key) for key in keys.key.tolist()] == ["a", None, "b", None, "a", "ä"]


def test_keys_of_bytes_are_ids_too():
    array = pa.array([b"\x00\xff", b"", None, b"\x00\xff"])
    for type_ in (pa.binary(), pa.large_binary(), pa.binary_view()):
        keys = column_keys(array.cast(type_)).key
        assert keys[0] == keys[3] != MISSING
        assert keys[1] == keys[2] == MISSING
    fixed = column_keys(pa.array([b"ab", None, b"ab"], pa.binary(2))).key
    assert fixed[0] == fixed[2] != fixed[1] == MISSING


def test_shares_are_spread_evenly_and_differ_by_salt():
    keys = np.arange(100_000)
    share = share_of(keys, 0)
    assert abs(np.mean(share < 0.1) - 0.1) < 0.005
    other = share_of(keys, 1)
    assert abs(np.mean((share < 0.1) & (other < 0.1)) - 0.01) < 0.002


@pytest.mark.parametrize(
    ("array", "units", "expected"),
    [
        (pa.array([1500, -1, None]), 1000, [1, -1, None]),
        (pa.array([1.9, float("nan"), 1e30]), 1, [1, None, None]),
        (pa.array([datetime.datetime(1970, 1, 2)], pa.timestamp("ns")), 1, [86400]),
        (pa.array([datetime.date(1970, 1, 3), None]), 1, [2 * 86400, None]),
        (pa.nulls(1), 1, [None]),
        (pa.array([2**62]), 1, [None]),
    ],
)
def test_seconds_are_rounded_down(array, units, expected):
    seconds, valid = values.seconds_of(array, units)
    assert [s if v else None for s, v in zip(seconds, valid, strict=True)] == expected


def test_numbers_of_any_type():
    for array in (
        pa.array([1, None], pa.uint8()),
        pa.array([True, None]),
        pa.array([decimal.Decimal("1.00"), None]),
        pa.array([np.float16(1), None], pa.float16()),
        pa.array([1.0, None]).dictionary_encode(),
    ):
        np.testing.assert_array_equal(values.numbers_of(array), [1, np.nan])


def test_codes_of_texts_and_numbers():
    codes = {"1": 1, "x": 2}
    assert values.codes_of(pa.array(["x", "y", None, "1"]), codes).tolist() == [2, 0, -1, 1]
    assert values.codes_of(pa.array([1, 2, None]), codes).tolist() == [1, 0, -1]
    assert values.codes_of(pa.nulls(1), codes).tolist() == [-1]


@pytest.mark.parametrize(
    "type_", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)]
)
def test_lists_lie_where_they_are_said_to_lie_in_a_slice_too(type_):
    array = pa.array([[0, 1], [2, 3], None, [4, 5]], type_).slice(1)
    start, length, valid, inner = values.lists_of(array)
    assert valid.tolist() == [True, False, True]
    assert length.tolist() == [2, 0, 2]
    found = values.take_values(inner, named_columns.places_of(start, length))
    assert found.to_pylist() == [2, 3, 4, 5]


lists = st.lists(st.lists(st.integers(-9, 9), max_size=4), min_size=1, max_size=8)


def ragged(rows):
    lengths = np.array([len(row) for row in rows])
    return Ragged(
        named_columns.starts_of(lengths), np.array([v for row in rows for v in row], np.int64)
    )


def rows_of(column):
    return [column.values[s:e].tolist() for s, e in zip(column.start, column.start[1:])]  # noqa: B905


@given(lists, st.data())
def test_rows_of_lists_are_taken_joined_and_stored(tmp_path_factory, rows, data):
    column = ragged(rows)
    places = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)), np.int64)
    assert rows_of(named_columns.take(column, places)) == [rows[place] for place in places]
    frame = {"lists": column, "number": np.arange(len(rows)) * 0.5}
    joined = named_columns.concatenate([frame, frame])
    assert rows_of(joined["lists"]) == rows + rows
    bucket = np.array(
        data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
    )
    path = tmp_path_factory.mktemp("run") / "run.arrow"
    run = named_columns.write_run(path, frame, bucket)
    for number, index in run.buckets.items():
        read = named_columns.read_runs([(run.path, index)])
        chosen = np.flatnonzero(bucket == number)
        assert rows_of(read["lists"]) == [rows[place] for place in chosen]
        assert read["number"].tolist() == (chosen * 0.5).tolist()
