"""Values of a log as the engine types them, from Parquet files of any type."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker.sources.logs import typed
from kd_ranker.sources.logs.encode import _places
from kd_ranker.sources.logs.engines import open_engine
from tests.sources import faulty_logs


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    layout = faulty_logs.layout(faulty_logs.config("log", "datasets"))
    with open_engine(layout, tmp_path_factory.mktemp("engine"), 0) as opened:
        yield opened


@pytest.fixture
def values(engine, tmp_path):
    """From a function of a column, and an array, to the values by the array's places."""

    def values(function, array):
        table = pa.table({"place": np.arange(len(array)), "value": array})
        pq.write_table(table, tmp_path / "values.parquet")
        read = engine.backend.read_parquet(tmp_path / "values.parquet")
        return engine.fetch(read.select("place", value=function(read.value)).order_by("place"))[
            "value"
        ].to_pylist()

    return values


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([3, None, -1], pa.int32()), [3, None, -1]),
        (pa.array([2**64 - 1, 2**63, 3, None], pa.uint64()), [2**64 - 1, 2**63, 3, None]),
        (pa.array([-(2**63), 2**63 - 1]), [-(2**63), 2**63 - 1]),
        (pa.array([True, None, False]), [1, None, 0]),
        (pa.array([5.0, None, float("nan"), 2.5, 1e300, 2.0**53]), [5, *[None] * 4, 2**53]),
        # Above, a float of 32 bits is not the number that was meant.
        (pa.array([2.0**24, 2.0**24 + 2], pa.float32()), [2**24, None]),
        (pa.array([7, None, 7]).dictionary_encode(), [7, None, 7]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_ids_of_whole_numbers_are_the_numbers(values, array, expected):
    assert values(typed.id_of, array) == expected


@pytest.mark.parametrize("type_", [pa.float32(), pa.float64()])
def test_nan_is_missing_in_a_column_without_nulls(values, type_):
    """The bounds in the footer ignore NaN, and the engine must not conclude that there is none."""
    array = pa.array([5.0, np.nan, 2.5], type_)
    assert values(typed.id_of, array) == [5, None, None]
    assert values(typed.number_of, array) == [5.0, None, 2.5]


@pytest.mark.parametrize(
    "type_",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
def test_ids_of_texts_are_the_texts(values, type_):
    array = pa.array(["a", None, "b", "", "a", "ä"]).cast(type_)
    assert values(typed.id_of, array) == ["a", None, "b", None, "a", "ä"]


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary(2)])
def test_ids_of_bytes_tell_them_apart(values, type_):
    array = pa.array([b"\x00\xff", b"ab", None, b"\x00\xff"]).cast(type_)
    one, other, missing, again = values(typed.id_of, array)
    assert one == again != other is not missing is None


@pytest.mark.parametrize(
    ("array", "units", "expected"),
    [
        (pa.array([1500, -1, None]), 1000, [1, -1, None]),
        (pa.array([1.9, float("nan"), 1e30]), 1, [1, None, None]),
        (pa.array([datetime.datetime(1970, 1, 2)], pa.timestamp("ns")), 1, [86400]),
        (pa.array([1999, -1], pa.timestamp("ms")), 1, [1, -1]),
        (pa.array([datetime.date(1970, 1, 3), None]), 1, [2 * 86400, None]),
        (pa.array([2**33 * 1000], pa.timestamp("ms", "Europe/Berlin")), 1, [2**33]),
        (pa.nulls(1), 1, [None]),
        (pa.array([2**62]), 1, [None]),
    ],
)
def test_seconds_are_rounded_down(values, array, units, expected):
    assert values(lambda value: typed.seconds_of(value, units), array) == expected


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, None], pa.uint8()),
        pa.array([True, None]),
        pa.array([decimal.Decimal("1.00"), None]),
        pa.array([np.float16(1), np.float16("nan")], pa.float16()),
        pa.array([1.0, float("nan")]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_numbers_of_any_type(values, array):
    assert values(typed.number_of, array) == [1.0, None]


def test_codes_of_texts_and_numbers(values):
    def codes(array):
        return values(lambda value: typed.code_of(value, {"1": 1, "x": 2, "True": 3}), array)

    assert codes(pa.array(["x", "y", None, "1"])) == [2, 0, 0, 1]
    assert codes(pa.array([1, 2, None])) == [1, 0, 0]
    assert codes(pa.array([True, False])) == [3, 0]


def test_values_are_found_among_those_that_are_known():
    import pandas as pd

    known = pd.Index(["b", "a"])
    assert _places(known, pa.array(["a", "c", None, "b"])).tolist() == [1, -1, -1, 0]
    assert _places(known, pa.array([], pa.string())).tolist() == []
    large = pd.Index(np.array([2**64 - 1, 5], np.uint64))
    assert _places(large, pa.array([5, None, 2**64 - 1], pa.uint64())).tolist() == [1, -1, 0]
