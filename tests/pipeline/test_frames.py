"""Tables in memory as logs."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import kd_ranker as kd
from kd_ranker.pipeline import datasets, frames
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.vocabulary import read_vocabulary

COLUMNS = {
    "request_id": "session",
    "time": "at",
    "user_id": "user",
    "user_features": ["age", "visits"],
    "context": "hour",
    "history_id": "recent",
    "item_id": "item",
    "candidate_features": "match",
    "candidate_category": "shelf",
    "stage": "came",
    "user_label": ["click", "buy"],
    "teacher_probability": ["scored_click", "scored_buy"],
    "item_features": ["price"],
}


class Capsule:
    """A table that offers nothing but the interface by which polars hands its tables over."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


def frame_of(**changes):
    """Sessions b, of four candidates; a, of two; and c, of one, in mixed order."""
    columns = {
        "session": ["b", "a", "b", "b", "c", "a", "b"],
        "at": [50, 40, 50, 50, 60, 40, 50],
        "user": ["u1", "u2", "u1", "u1", "u3", "u2", "u1"],
        "age": [0.5, 0.25, 0.5, 0.5, 1, 0.25, 0.5],
        "visits": [3, 4, 3, 3, 5, 4, 3],
        "hour": [7, 8, 7, 7, 9, 8, 7],
        "recent": [["y", "x"], None, ["y", "x"], ["y", "x"], [], None, ["y", "x"]],
        "item": ["w", "x", "y", "z", "x", "w", "v"],
        "match": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        "shelf": ["low", None, "high", "low", None, "high", "low"],
        "came": ["retrieved", "shown", "shown", "passed", "shown", "passed", "shown"],
        "click": [np.nan, 1, 0, np.nan, 1, np.nan, 1],
        "buy": [np.nan, 0, 0, np.nan, 1, np.nan, np.nan],
        "scored_click": [np.nan, 0.5, 0.6, np.nan, np.nan, 0.7, 0.8],
        "scored_buy": [np.nan, 0.1, np.nan, 0.2, np.nan, 0.3, 0.4],
        "price": [1, 2, 3, 4, 2, 1, 5],
    }
    return pd.DataFrame(columns | changes, index=range(9, 2, -1))


def prepared(made):
    made.config.data.allow = ("few_positives", "one_label", "teacher_coverage", "times")
    kd.prepare(made.config)
    return datasets.dataset_of(made.config)


def test_the_rows_of_a_table_are_a_log_with_text_ids(tmp_path):
    frame = frame_of()
    sessions = dict(zip(SPLITS, "bac", strict=True))
    splits = {split: frame[frame["session"] == of] for split, of in sessions.items()}
    made = kd.Dataset.from_requests(splits, columns=COLUMNS, directory=tmp_path)
    assert made.config.tasks == ("click", "buy")
    funnel = made.config.funnel
    assert (funnel.retrieved, funnel.passed, funnel.shown) == (4, 2, 1)  # the middle request
    dataset = prepared(made)
    items = read_vocabulary(dataset.directory, "item")["value"].to_pylist()
    (b,), (a,), (c,) = (read_requests(dataset, split) for split in SPLITS)
    names = [[items[item] for item in request.item_id] for request in (b, a, c)]
    assert names == [["v", "y", "z", "w"], ["x", "w"], ["x"]]
    assert [(len(of.user_label), of.num_passed, of.time) for of in (b, a, c)] == [
        (2, 3, 50), (1, 2, 40), (1, 1, 60),
    ]  # fmt: skip
    assert b.user_label.tolist() == [[1, 0], [0, 0]]
    assert b.label_weight.tolist() == [0, 1]
    np.testing.assert_array_equal(
        b.teacher_probability, np.float32([[0.8, 0.4], [0.6, np.nan], [np.nan, 0.2]])
    )
    assert (b.user_features.tolist(), b.context.tolist()) == ([0.5, 3], [7])
    np.testing.assert_allclose(b.candidate_features[:, 0], [0.7, 0.3, 0.4, 0.1])
    assert [items[item] for item in b.history_id] == ["y", "x"]
    assert not len(a.history_id)
    prices = dict(zip(items, dataset.item_features[:, 0], strict=True))
    assert prices == {"w": 1, "x": 2, "y": 3, "z": 4, "v": 5}


@pytest.mark.parametrize("kind", [lambda table: table, Capsule])
def test_tables_of_all_kinds_are_the_same_log(tmp_path, kind):
    columns = {field: of for field, of in COLUMNS.items() if field not in ("time", "stage")}
    frame = pd.concat(frame_of(session=list("bbbcaac")).assign(user=user) for user in "stu")
    frame["session"] += frame["user"]
    paths = {
        kd.Dataset.from_requests(of, columns=columns, directory=tmp_path).directory
        for of in (frame, kind(pa.Table.from_pandas(frame, preserve_index=False)))
    }
    assert len(paths) == 1
    made = kd.Dataset.from_requests(frame, columns=columns, directory=tmp_path)
    # Without a time, requests are in the order of their first rows.
    times = [request.time for request in read_requests(prepared(made), "train")]
    assert times == list(range(7))
    assert frames.path_of(made.directory, "") == str(made.directory)  # as `kd.score` takes both
    again = kd.Dataset.from_log(frame, made.config, directory=tmp_path / "other")
    assert {*pa.parquet.read_schema(again.directory).names} == {*frame.columns}


@pytest.mark.parametrize(
    ("changes", "columns", "message"),
    [
        ({}, {"user_id": "who"}, "columns= for user_id='who' does not exist; choose one of: "),
        ({}, {"time": ["at", "hour"]}, "columns= names 2 columns for time, not 1"),
        ({}, {"user_label": ["click"]}, "columns= names 2 columns for teacher_probability, not 1"),
        ({}, {"num_passed": "at"}, "a field in columns=='num_passed' does not exist; choose one"),
        ({}, {"time": None}, "columns= names no column for time; name one, or leave it out"),
        ({}, {"time": 5}, "columns= names no column for time"),
        ({"at": pd.to_timedelta(range(7), unit="s")}, {}, "column 'at' holds durations"),
        ({"match": np.ones(7, np.float16)}, {}, "the tables cannot be read as one: "),
        ({"session": ["b", 1] * 3 + ["b"]}, {}, "a DataFrame cannot be read as a table: "),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(tmp_path, changes, columns, message):
    with pytest.raises(kd.UserError, match=message) as caught:
        kd.Dataset.from_requests(frame_of(**changes), columns=COLUMNS | columns, directory=tmp_path)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_what_is_needed_is_named(tmp_path):
    with pytest.raises(kd.UserError, match="a list cannot be read as a table"):
        kd.Dataset.from_requests([{"user_id": 1}], columns=COLUMNS, directory=tmp_path)
    without = {name: of for name, of in COLUMNS.items() if name != "user_label"}
    with pytest.raises(kd.UserError, match="columns= does not name the column of user_label"):
        kd.Dataset.from_requests(frame_of(), columns=without, directory=tmp_path)
    with pytest.raises(kd.UserError, match="requests need spec=, the sizes of their features"):
        kd.Dataset.from_requests([], directory=tmp_path)


@pytest.mark.parametrize("name", ["click", "scored_click"])
def test_nan_is_a_missing_value(tmp_path, name):
    columns = {field: of for field, of in COLUMNS.items() if field != "stage"}
    frame = frame_of()[lambda of: of["session"] == "b"]
    tables = [pa.Table.from_pandas(frame, preserve_index=False)]
    values = pa.array(frame[name].to_numpy(), from_pandas=False)
    tables.append(tables[0].set_column(tables[0].column_names.index(name), name, values))
    assert [of[name].null_count > 0 for of in tables] == [True, False]
    funnels = [
        kd.Dataset.from_requests(of, columns=columns, directory=tmp_path).config.funnel
        for of in tables
    ]
    assert funnels[0] == funnels[1]


def test_encoded_texts_are_texts(tmp_path):
    """The categories of polars are a dictionary of views."""
    plain = pa.Table.from_pandas(frame_of(), preserve_index=False)
    codes = plain["item"].combine_chunks().dictionary_encode()
    views = codes.dictionary.cast(pa.string_view())
    encoded = pa.DictionaryArray.from_arrays(codes.indices, views)
    table = plain.set_column(plain.column_names.index("item"), "item", encoded)
    made = kd.Dataset.from_requests(table, columns=COLUMNS, directory=tmp_path)
    assert pa.parquet.read_table(made.directory)["item"].to_pylist() == plain["item"].to_pylist()
    assert frames.path_of(table, str(tmp_path)).endswith(".parquet")


def test_columns_without_a_use_are_not_read(tmp_path):
    frame = frame_of(half=np.ones(7, np.float16))
    made = kd.Dataset.from_requests(frame, columns=COLUMNS, directory=tmp_path)
    assert "half" not in pa.parquet.read_schema(made.directory).names


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": [1]}, "a dict is not a table, and not a path"),
        ([1], "a list is not a table"),
        (np.zeros(3), "a ndarray is not a table"),
        (None, "a NoneType is not a table"),
        (pd.Series([1]), "a Series is not a table; give a DataFrame"),
        (pd.DataFrame(), "a DataFrame has no rows"),
        (frame_of()[:0], "a DataFrame has no rows"),
    ],
)
def test_a_log_is_a_table_with_rows(tmp_path, table, message):
    with pytest.raises(kd.UserError, match=message):
        kd.Dataset.from_log(table, kd.configs.parquet(), tmp_path)


def test_a_folder_may_be_below_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    logs = [
        kd.Dataset.from_log(frame_of(), kd.configs.parquet(), "~/log"),
        kd.Dataset.from_requests(frame_of(), columns=COLUMNS, directory="~/requests"),
    ]
    assert [of.config.data.dir for of in logs] == [f"{tmp_path}/log", f"{tmp_path}/requests"]


@pytest.mark.parametrize("key", ["data.colums.user", "data.path.user"])
def test_an_unknown_key_is_refused(tmp_path, key):
    with pytest.raises(kd.UserError, match=f"named= has '{key}', which is not a key"):
        kd.infer(frame_of(), tmp_path, {key: "user"})
    assert not [*tmp_path.iterdir()]
