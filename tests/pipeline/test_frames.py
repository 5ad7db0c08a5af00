"""Tables in memory as logs."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import kd_ranker as kd
from kd_ranker.pipeline import datasets
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.vocabulary import read_vocabulary


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
        "item": ["w", "x", "y", "z", "x", "w", "v"],
        "match": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        "came": ["retrieved", "shown", "shown", "passed", "shown", "passed", "shown"],
        "click": [np.nan, 1, 0, np.nan, 1, np.nan, 1],
        "scored": [np.nan, 0.5, 0.6, np.nan, np.nan, 0.7, 0.8],
        "price": [1, 2, 3, 4, 2, 1, 5],
    }
    return pd.DataFrame(columns | changes, index=range(9, 2, -1))


def config_of():
    config = kd.configs.parquet()
    config.tasks, config.value_weights = ("click",), (1.0,)
    names = dict(request="session", time="at", user="user", item="item", stage="came")
    config.data.columns = names | {"split": "split"}
    config.data.labels, config.data.teacher = dict(click="click"), dict(click="scored")
    config.data.split = "column"
    config.data.features = dict(
        age=kd.configs.feature("user", "dense", standardize=False),
        match=kd.configs.feature("candidate", "dense", standardize=False),
    )
    config.funnel.update(retrieved=4, passed=2, shown=1, report_at=(1, 2))
    config.data.allow = ("few_positives", "one_label", "teacher_coverage", "times")
    return config


def test_the_rows_of_a_table_are_a_log_with_text_ids(tmp_path):
    frame = frame_of()
    frame["split"] = frame["session"].map(dict(zip("bac", SPLITS, strict=True)))
    made = kd.Dataset.from_log(frame, config_of(), tmp_path)
    kd.prepare(made.config)
    dataset = datasets.dataset_of(made.config)
    items = read_vocabulary(dataset.directory, "item")["value"].to_pylist()
    (b,), (a,), (c,) = (read_requests(dataset, split) for split in SPLITS)
    names = [[items[item] for item in request.item_id] for request in (b, a, c)]
    assert names == [["v", "y", "z", "w"], ["x", "w"], ["x"]]
    assert [len(request.user_label) for request in (b, a, c)] == [2, 1, 1]
    assert [request.num_passed for request in (b, a, c)] == [3, 2, 1]
    assert [request.time for request in (b, a, c)] == [50, 40, 60]
    assert b.user_label.tolist() == [[1], [0]]
    np.testing.assert_array_equal(
        b.teacher_probability, np.float32([[0.8], [0.6], [np.nan]])[: len(b.teacher_probability)]
    )
    assert b.user_features.tolist() == [0.5]
    np.testing.assert_allclose(b.candidate_features[:, 0], [0.7, 0.3, 0.4, 0.1])


def test_tables_of_all_kinds_are_the_same_log(tmp_path):
    plain = pa.Table.from_pandas(frame_of(), preserve_index=False)
    # The categories of polars are a dictionary of views.
    codes = plain["item"].combine_chunks().dictionary_encode()
    views = codes.dictionary.cast(pa.string_view())
    encoded = pa.DictionaryArray.from_arrays(codes.indices, views)
    encoded = plain.set_column(plain.column_names.index("item"), "item", encoded)
    path, *others = (
        kd.Dataset.from_log(table, config_of(), tmp_path).directory
        for table in (encoded, frame_of(), plain, Capsule(plain))
    )
    assert pa.parquet.read_table(path)["item"].to_pylist() == plain["item"].to_pylist()
    assert len({*others}) == 1
    assert datasets.path_of(path, "") == str(path)  # as `kd.score` takes both


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": [1]}, "a dict is not a table, and not a path"),
        (np.zeros(3), "a ndarray is not a table"),
        (pd.Series([1]), "a Series is not a table; give a DataFrame"),
        (frame_of()[:0], "a DataFrame has no rows"),
        (frame_of(session=["b", 1] * 3 + ["b"]), "a DataFrame cannot be read as a table: "),
    ],
)
def test_a_log_is_a_table_with_rows(tmp_path, table, message):
    with pytest.raises(kd.UserError, match=message):
        kd.Dataset.from_log(table, kd.configs.parquet(), tmp_path)


@pytest.mark.parametrize("key", ["data.colums.user", "data.path.user"])
def test_an_unknown_key_is_refused(tmp_path, key):
    with pytest.raises(kd.UserError, match=f"config key '{key}' does not exist"):
        kd.infer(frame_of(), tmp_path, {key: "user"})
    assert not [*tmp_path.iterdir()]
