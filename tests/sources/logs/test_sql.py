"""Logs by a SELECT and of text files."""

import os

import duckdb
import pyarrow.parquet as pq
import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from tests.sources import faulty_logs
from tests.sources.faulty_logs import all_requests, make_rows, open_source, same, write_log


def requests_of(config):
    source = open_source(config)
    found = all_requests(source)
    source.close()
    return found


@pytest.fixture
def log(tmp_path):
    """A log, and its items in a file of their own."""
    folder = write_log(tmp_path / "log", make_rows(0), files=2)
    tables = [pq.read_table(path).to_pandas() for path in sorted(folder.iterdir())]
    items = {row.item_id: row for table in tables for row in table.itertuples()}
    lines = [f"{item},{row.duration},{row.quality:.3f}" for item, row in items.items()]
    (tmp_path / "items.csv").write_text("\n".join(["item_id,duration,quality", *lines]))
    return folder


def config_of(tmp_path, sql):
    return faulty_logs.config("", tmp_path / "datasets", sql=sql)


def test_a_join_with_computed_columns_and_words_is_the_same_log(tmp_path, log):
    expected = requests_of(faulty_logs.config(log, tmp_path / "datasets"))
    config = config_of(
        tmp_path,
        f"""
        SELECT log.* EXCLUDE (duration, quality, "like", watch, time, score),
            items.duration, items.quality,
            CASE watch WHEN 1 THEN 'yes' WHEN 0 THEN 'no' END AS watch, "like" = 1 AS "like",
            strftime(to_timestamp(time), '%Y-%m-%dT%H:%M:%SZ') AS time,
            score / 2 AS half, half * 2 AS score  -- of another column
        FROM '{log}/*.parquet' AS log JOIN '{tmp_path}/items.csv' AS items USING (item_id);
        """,
    )
    assert same(requests_of(config), expected)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "csv.gz"])
def test_text_files_are_logs(tmp_path, log, kind):
    path = tmp_path / f"log.{kind}"
    duckdb.sql(f"COPY (FROM '{log}/*.parquet') TO '{path}'")
    configs = [faulty_logs.config(of, tmp_path / "datasets") for of in (log, path)]
    for config in configs if kind != "json" else ():
        for name in ("recent", "spots", "tags"):  # a list is a text there
            del config.data.features[name]
    expected, found = map(requests_of, configs)
    assert same(found, expected)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "data.sql: Parser Error: syntax error at or near"),
        ("SELECT price FROM '{log}/*.parquet'", 'Error: Referenced column "price" not found in'),
        (
            "SELECT * EXCLUDE (age) FROM '{log}/*.parquet'",
            "data.sql has no column 'age' (data.feat",
        ),
        ("SELECT 1 AS a, 2 AS a", "data.sql makes column 'a' twice; rename one of them"),
        ("COPY (SELECT 1) TO 'x.csv'", "data.sql must be one SELECT"),
        (
            "SELECT * REPLACE (('x' || age)::INT AS age) FROM '{log}/*.parquet'",
            "data.sql: Conversion Error: Could not convert string 'x",
        ),
        ("SELECT 1; SELECT 2", "data.sql must be one SELECT"),
        ("FROM 'no/*.parquet'", 'data.sql: IO Error: No files found that match the pattern "no/'),
        ("SELECT * EXCLUDE (time) FROM '{log}/*.parquet'", "data.sql has no column 'time' (data.c"),
    ],
)
def test_a_select_that_makes_no_log_is_one_line(tmp_path, log, sql, message):
    with pytest.raises(UserError) as caught:
        open_source(config_of(tmp_path, sql.replace("{log}", str(log))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_log_is_named_once(tmp_path, log):
    config = faulty_logs.config(log, tmp_path, sql="SELECT 1")
    with pytest.raises(UserError, match=r"data.path and data.sql are both set"):
        open_source(config)
    config = faulty_logs.config("", tmp_path, sql="SELECT 1", engine="spark")
    with pytest.raises(UserError, match=r"text files need data.engine='duckdb', and it is 'spark'"):
        open_source(config)


def test_a_select_whose_files_have_changed_is_not_the_log_before(tmp_path, log):
    items = tmp_path / "items.csv"
    sql = f"SELECT log.* FROM '{log}/*.parquet' AS log JOIN read_csv('{items}') USING (item_id)"
    config = config_of(tmp_path, sql)
    directory = api.prepare(config).directory
    assert api.prepare(config).directory == directory
    os.utime(items, ns=(0, 0))
    with pytest.raises(UserError, match=r"at data.sql has changed since .* \(1 file rewritten"):
        api.prepare(config)
    for path in (*log.iterdir(), items):  # a dataset may outlive its log
        path.unlink()
    assert api.prepare(config).directory == directory
