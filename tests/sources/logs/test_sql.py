"""Logs by a SELECT and of text files."""

import contextlib
import os

import duckdb
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from kd_ranker import api, configs
from kd_ranker.errors import UserError
from kd_ranker.sources.logs import files
from kd_ranker.sources.logs.database import open_duckdb
from kd_ranker.sources.logs.query import PREFIX
from tests.faults import fault_of
from tests.sources import faulty_logs
from tests.sources.faulty_logs import all_requests, make_rows, open_source, same, write_log


def requests_of(config):
    with contextlib.closing(open_source(config)) as source:
        return all_requests(source)


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
        ("SELECT * EXCLUDE (age) FROM '{log}/*.parquet'", "data.sql has no column 'age' (data.f"),
        ("SELECT 1 AS a, 2 AS a", "data.sql has columns 'a' and 'a', and case"),
        ("COPY (SELECT 1) TO 'x.csv'", "data.sql must be one SELECT"),
        (
            "SELECT * REPLACE (('x' || age)::INT AS age) FROM '{log}/*.parquet'",
            "data.sql: Conversion Error: Could not convert string 'x",
        ),
        ("SELECT 1; SELECT 2", "data.sql must be one SELECT"),
        ("FROM 'no/*.parquet'", 'data.sql: IO Error: No files found that match the pattern "no/'),
    ],
)
def test_a_select_that_makes_no_log_is_one_line(tmp_path, log, sql, message):
    config = config_of(tmp_path, sql.replace("{log}", str(log)))
    assert message in fault_of(open_source, config)


def test_a_select_of_changed_files_is_another_log(tmp_path, log):
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


def small_log(path):
    """A config that reads only ids, times and labels of a text file."""
    config = faulty_logs.config(path, "datasets")
    config.data.features, config.data.teacher = ConfigDict(), ConfigDict()
    config.data.columns = ConfigDict({of: of for of in ("request", "time", "user", "item")})
    config.data.labels = ConfigDict(dict.fromkeys(config.tasks, "click"))
    return config


def texts_of(path, items, delimiter=","):
    rows = [(f"r{n // 10}", 1_700_000_000 + n // 10, "u", of, 0) for n, of in enumerate(items)]
    lines = [("request", "time", "user", "item", "click"), *rows]
    path.write_text("".join(delimiter.join(map(str, line)) + "\n" for line in lines))


# DuckDB sees no more than 20,480 rows by default.
ZEROS_AT_THE_END = [*range(1, 10)] * 3000 + [f"00{n}" for n in range(1, 10)]


@pytest.mark.parametrize(
    ("name", "delimiter", "items", "number"),
    [
        ("log.csv", ",", ZEROS_AT_THE_END, 18),
        ("LOG.TSV", "\t", ZEROS_AT_THE_END, 18),
        ("log.csv", ",", ["100000", "1e5", "7"] * 10, 3),
    ],
)
def test_ids_of_text_files_stay_apart(tmp_path, name, delimiter, items, number):
    texts_of(tmp_path / name, items, delimiter)
    log = files.open_log(faulty_logs.layout(small_log(tmp_path / name)))
    with open_duckdb(1.0, 1, tmp_path, 0) as database:
        database.open_log(log)
        assert database.number(f'SELECT count(DISTINCT "{PREFIX}item") FROM log') == number


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.csv", "request,time,user,item,click\n", "log.csv has no rows"),
        ("log.json", "", "log.json has no rows"),
        ("log.csv", "request,time\n1,2\n", "log.csv has no column 'user'"),
        ("log.json", '{"a": ', "log.json: Invalid Input Error: Malformed JSON"),
        ("log.csv", "a,b\nx,\udcff\n", "log.csv: Invalid Input Error: CSV Error on Line: "),
    ],
)
def test_a_text_file_that_is_no_log_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, errors="surrogateescape")
    fault = fault_of(open_source, small_log(path))
    assert f"{tmp_path}/{message}" in fault
    assert not any(of in fault for of in ("data.sql", "Possible"))
    if "no column" not in message:
        fault_of(api.infer, path, tmp_path / "first")


def test_text_files_at_several_paths_are_in_the_manifest(tmp_path):
    texts_of(tmp_path / "a.csv", ["1e5", "7.5"] * 10)
    texts_of(tmp_path / "b.csv", range(20))
    # Spaces next to commas do not count.
    config = small_log(f"{tmp_path}/a.csv, {tmp_path}/b.csv ")
    found = {files.SQL, f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"}
    assert files.open_log(faulty_logs.layout(config)).manifest.keys() == found


@pytest.mark.parametrize("rest", ["\n\nb", "\nPossible fixes:\n* b", "\nThe search space used was"])
def test_advice_of_duckdb_is_left_out(rest):
    assert files.line_of(duckdb.Error(f"Error: a\nand c {rest}")) == "Error: a and c"


def test_a_package_that_a_url_needs_is_named(monkeypatch, tmp_path):
    """As aiohttp for http, which is not installed with this package."""

    def filesystem(protocol: str) -> None:
        if protocol == "nope":
            raise ValueError("Protocol not known: nope")
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr(files.fsspec, "filesystem", filesystem)
    needs = r"http:// cannot be read: HTTPFileSystem requires .*\"aiohttp\" .*; install .* with pip"
    for change, message in (
        ({"path": "http://host/log.csv"}, needs),
        ({"sql": "SELECT * FROM 'http://host/log.parquet'"}, needs),
        (
            {"sql": "SELECT * FROM 'nope://host/log.parquet'"},
            "nope:// cannot be read: Protocol not",
        ),
    ):
        config = configs.parquet()
        config.data.update(change)
        config.data.dir = str(tmp_path)
        with pytest.raises(UserError, match=message):
            api.prepare(config)
    with pytest.raises(UserError, match=needs):
        api.infer("http://host/log.csv", tmp_path)
