"""Values of a log in their types, from Parquet files of any type, and single statements."""

import dataclasses
import datetime
import decimal
import uuid

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.sources.logs import columns, query
from kd_ranker.sources.logs.database import open_duckdb
from kd_ranker.sources.logs.encode import Encoding
from kd_ranker.sources.logs.spark_engine import created, in_spark
from tests.sources import faulty_logs

NAN = float("nan")


def query_of(by_request=False, types=None, **changes) -> query.Query:
    """The query for a log of `faulty_logs`, or for columns of other types."""
    of = faulty_logs.config("log", "datasets", rows="request" if by_request else "candidate")
    layout = dataclasses.replace(faulty_logs.layout(of), **changes)
    schema = faulty_logs._schema(faulty_logs.make_rows(0, requests=1), by_request)
    return query.Query(layout, types or {of.name: of.type for of in schema})


@pytest.fixture
def values(tmp_path):
    """What a method of the query makes of an array, read from a Parquet file."""

    def values(method, array, *arguments, **changes):
        table = pa.table({"place": np.arange(len(array)), "log:x": array})
        pq.write_table(table, tmp_path / "values.parquet")
        with open_duckdb(1.0, 1, tmp_path, 1) as database:
            rows = f"read_parquet('{tmp_path}/values.parquet')"
            type_ = database.fetch(f'SELECT "log:x" FROM {rows} LIMIT 0').schema.types[0]
            value = getattr(query_of(types={"x": type_}, **changes), method)("x", *arguments)
            found = database.fetch(f"SELECT {value} AS value FROM {rows} ORDER BY place")
            return found["value"].to_pylist()

    return values


TEXTS = ["a", None, "b", "", "a", "ä"]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([3, None, -1], pa.int32()), [3, None, -1]),
        (pa.array([2**64 - 1, 2**63, 3, None], pa.uint64()), [2**64 - 1, 2**63, 3, None]),
        (pa.array([-(2**63), 2**63 - 1]), [-(2**63), 2**63 - 1]),
        (pa.array([True, None, False]), [1, None, 0]),
        (pa.array([5.0, None, NAN, 2.5, 1e300, 2.0**53]), [5, *[None] * 4, 2**53]),
        # Without nulls: the bounds in the footer ignore NaN.
        (pa.array([5.0, NAN, 2.5]), [5, None, None]),
        # Above, a float of 32 bits is not the number that was meant.
        (pa.array([2.0**24, 2.0**24 + 2], pa.float32()), [2**24, None]),
        (pa.array([7, None, 7]).dictionary_encode(), [7, None, 7]),
        (pa.nulls(2), [None, None]),
        *(
            (pa.array(TEXTS).cast(type_), [of or None for of in TEXTS])
            for type_ in (pa.string(), pa.large_string(), pa.string_view())
        ),
        (pa.array(TEXTS).dictionary_encode(), [of or None for of in TEXTS]),
        # No integer of 64 bits holds these.
        (pa.array([decimal.Decimal(2**70), None]), [str(2**70), None]),
        (pa.array([uuid.UUID(int=7).bytes, None], pa.uuid()), [str(uuid.UUID(int=7)), None]),
    ],
    ids=lambda of: str(of.type) if isinstance(of, pa.Array) else "",
)
def test_ids(values, array, expected):
    assert values("id", array) == expected
    is_text = any(isinstance(of, str) for of in expected)
    known = columns.TEXTS if is_text else columns.NUMBERS
    assert columns.kind_of(array.type) == ("" if pa.types.is_null(array.type) else known)


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), pa.binary(2)])
def test_ids_of_different_bytes_differ(values, type_):
    array = pa.array([b"\x00\xff", b"ab", None, b"\x00\xff"]).cast(type_)
    one, other, missing, again = values("id", array)
    assert one == again != other is not missing is None


def test_labels_may_be_words(values):
    array = pa.array(["True", " yes", "1", "FALSE", "n", "maybe", "", None])
    assert values("label_number", array) == [1, 1, 1, 0, 0, 2, None, None]


@pytest.mark.parametrize(
    ("array", "units", "expected"),
    [
        (pa.array([1500, -1, None]), 1000, [1, -1, None]),
        (pa.array([1_700_000_000_999_999, -1]), 10**6, [1_700_000_000, -1]),
        (pa.array([1.9, NAN, 1e30]), 1, [1, None, None]),
        (pa.array([decimal.Decimal("1.90"), None]), 1, [1, None]),
        (pa.array([datetime.datetime(1970, 1, 2)], pa.timestamp("ns")), 1, [86400]),
        (pa.array([1999, -1], pa.timestamp("ms")), 1, [1, -1]),
        (pa.array([datetime.date(1970, 1, 3), None]), 1, [2 * 86400, None]),
        (pa.array([2**33 * 1000], pa.timestamp("ms", "Europe/Berlin")), 1, [2**33]),
        (pa.nulls(1), 1, [None]),
        (pa.array([2**62]), 1, [None]),
        (pa.array(["1970-01-01T00:00:02.7", "1970-01-01 01:00:00+01", "x"]), 1, [2, 0, None]),
        (pa.array(["1970-01-02", ""]), 1, [86400, None]),
    ],
)
def test_seconds_are_rounded_down(values, array, units, expected):
    assert values("seconds", array, units_per_second=units) == expected


@pytest.mark.parametrize(
    ("time_format", "array", "expected"),
    [
        ("%d/%m/%Y %H:%M", pa.array(["02/01/1970 00:01", "01/13/1970 00:01", "", None]), 86460),
        ("%m/%d/%Y", pa.array([" 01/02/1970 ", "13/02/1970", "1970-01-02", None]), 86400),
        ("%d/%b/%Y:%H:%M:%S %z", pa.array(["02/Jan/1970:02:00:00 +0200", "x", "", None]), 86400),
        # It says nothing of other types.
        ("%m/%d/%Y", pa.array([86400, None, None, None]), 86400),
    ],
)
def test_texts_are_times_by_the_format_alone(values, time_format, array, expected):
    assert values("seconds", array, time_format=time_format) == [expected, None, None, None]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, None], pa.uint8()),
        pa.array([True, None]),
        pa.array([decimal.Decimal("1.00"), None]),
        pa.array([np.float16(1), np.float16("nan")], pa.float16()),
        pa.array([1.0, NAN], pa.float32()),
        pa.array([1.0, NAN]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_numbers_of_any_type(values, array):
    assert values("number", array) == [1.0, None]


@pytest.mark.parametrize(
    ("array", "codes"),
    [(["x", "y", None, "1"], [2, 0, 0, 1]), ([1, 2, None], [1, 0, 0]), ([True, False], [3, 0])],
)
def test_codes_of_texts_numbers_and_truth_values(values, array, codes):
    assert values("code", pa.array(array), {"1": 1, "x": 2, "True": 3}) == codes


@pytest.mark.parametrize("known", [["b", "a"], pa.array([2**64 - 1, 5], pa.uint64())])
def test_values_have_the_ids_of_a_vocabulary(known):
    table = pa.table({"value": known, "id": pa.array([7, 8], pa.int32())})
    encoding = Encoding(None, {"feature:x": table}, {})  # type: ignore[arg-type]
    (one, other), type_ = known, table["value"].type
    unknown = "c" if pa.types.is_string(type_) else 6
    for values, ids in (([other, None, one, unknown], [8, 6, 7, 6]), ([], [])):
        assert encoding.ids_of("feature:x", pa.array(values, type_), 6).tolist() == ids


@pytest.mark.parametrize("by_request", [False, True])
@pytest.mark.parametrize("split", ["time", "user", ""])
def test_spark_parses_what_duckdb_runs(by_request, split):
    of = query_of(by_request, engine="spark", split=split)
    for statement in (*of.statements("log.sql"), *of.statements("report.sql")):
        name, _, text = created(statement)
        assert name in statement
        parsed = sqlglot.parse_one(text, read="spark")
        # What Spark does not have.
        assert not {*parsed.find_all(sqlglot.exp.Slice, sqlglot.exp.Unnest)}, text
        for function in ("round_even", "favg", "unnest", "list_"):
            assert function not in text.lower()
        # One task of Spark does a window without partitions: of counts, and never of all rows.
        for window in parsed.find_all(sqlglot.exp.Window):
            assert window.args.get("partition_by") or window.parent_select.args.get("group"), text


def test_spark_counts_places_of_lists_from_one_as_duckdb_does():
    # SLICE counts from 1, where Spark's brackets count from 0.
    assert in_spark("SELECT x[n + 1:n + 1] FROM t") == "SELECT SLICE(x, n + 1, 1) FROM t"
    assert in_spark("SELECT x[:3] FROM t") == "SELECT SLICE(x, 1, 3) FROM t"


def cutoffs_of(time, validation_share, test_share):
    """The times that end training and validation; None if there are none."""
    of = query_of(validation_share=validation_share, test_share=test_share)
    wanted = ("CREATE TABLE seconds", "CREATE TABLE cutoffs")
    with duckdb.connect() as connection:
        connection.register("times", pa.table({"time": np.array(time, np.int64)}))
        for statement in of.statements("log.sql"):
            if statement.startswith(wanted):
                connection.execute(statement)
        ((validation, test),) = connection.sql("FROM cutoffs").fetchall()
    return None if test is None else (validation, test)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=30),
    st.floats(0.01, 0.99),
    st.floats(0.01, 0.99),
)
def test_cutoffs_leave_each_split_a_second(time, share, part):
    shares = share * part, share * (1 - part)
    cutoffs = cutoffs_of(time, *shares)
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
    assert cutoffs_of(times, 0.1, 0.1) == (2, 3)
    assert cutoffs_of(np.arange(10), 0.2, 0.3) == (5, 7)
    assert cutoffs_of(np.arange(10), 0.5, 0.49) == (1, 5)
    assert cutoffs_of([7, 7, 8], 0.3, 0.3) is None
