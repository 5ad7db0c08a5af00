"""The same dataset of a log by Spark and by DuckDB, file by file."""

import os
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.requests.row_files import Flat
from kd_ranker.sources.logs import encode
from tests.sources import faulty_logs
from tests.sources.faulty_logs import make_rows, write_log

needs_spark = pytest.mark.skipif(
    not shutil.which("java"), reason="there is no Java; scripts/test_cluster.sh says what it takes"
)
# As many tasks as there are workers: a small log in 200 would take minutes.
SPARK = dict(
    engine="spark",
    spark_master="local[2]",
    spark_options=("spark.sql.shuffle.partitions=2", "spark.driver.memory=2g"),
)
REJECTED = "rejected/rejected.parquet"


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def make_ids_large(log):
    """Makes user ids of 64 bits that no number with a sign holds."""
    for path in log.iterdir():
        table = pq.read_table(path)
        column = table.schema.get_field_index("user_id")
        ids = table["user_id"].combine_chunks()
        large = np.uint64(2**64 - 1) - ids.fill_null(0).to_numpy().astype(np.uint64)
        missing = ids.is_null().to_numpy(zero_copy_only=False)
        pq.write_table(table.set_column(column, "user_id", pa.array(large, mask=missing)), path)


@needs_spark
@pytest.mark.parametrize(
    ("by_request", "texts", "split"), [(False, False, "time"), (True, True, "user")]
)
def test_spark_and_duckdb_make_the_same_dataset(tmp_path, by_request, texts, split, monkeypatch):
    pytest.importorskip("pyspark", reason="pyspark is not installed; see scripts/test_cluster.sh")
    # Several pieces of each split, whose tasks end in any order.
    monkeypatch.setattr(encode, "PIECE", 100)
    rows = make_rows(31, requests=60, faults=0.05, texts=texts)
    log = write_log(tmp_path / "my log", rows, by_request, shuffle=1, files=3)
    if not texts:
        make_ids_large(log)
    changes = dict(split=split, rows="request" if by_request else "candidate")

    by_duckdb = api.prepare(faulty_logs.config(log, tmp_path / "é 1%20@0", **changes))
    by_spark = api.prepare(faulty_logs.config(log, tmp_path / "é 1%20@1", **changes, **SPARK))

    expected = files(by_duckdb.directory)
    found = files(by_spark.directory)
    assert found.keys() == expected.keys()
    different = {name for name in expected if found[name] != expected[name]}
    # A NaN of the log may have other bits after Spark, and the manifest has the digests of all.
    assert different <= {REJECTED, "manifest.json"}
    expected_rows = pq.read_table(by_duckdb.directory / REJECTED)
    rows = pq.read_table(by_spark.directory / REJECTED)
    assert rows.schema == expected_rows.schema
    assert repr(rows.to_pylist()) == repr(expected_rows.to_pylist())


@needs_spark
def test_workers_encode_requests_and_their_fault_is_one_line(tmp_path):
    pytest.importorskip("pyspark", reason="pyspark is not installed; see scripts/test_cluster.sh")
    from kd_ranker.sources.logs.spark_engine import open_spark

    def pack(shard):
        if shard == "bad":
            raise UserError("request 7: item_id must lie in [0, 3)\nof a log")
        if shard == "killed":
            os._exit(9)
        return Flat(np.full(shard, os.getpid(), np.int32), np.full((1, 12), shard))

    with open_spark("local[2]", {}, tmp_path) as spark:
        packed = list(spark.map(pack, [3, 1]))
        assert [len(block.numbers) for block in packed] == [3, 1]
        assert [block.counts[0, 0] for block in packed] == [3, 1]
        assert os.getpid() not in packed[0].numbers
        with pytest.raises(
            UserError, match=r"encoded by Spark: .*UserError: request 7: item_id m.*\) of a log$"
        ):
            list(spark.map(pack, [3, "bad"]))
        with pytest.raises(UserError, match=r"crashed.*raise spark.executor.memoryOverhead$"):
            list(spark.map(pack, [3, "killed"]))


def test_without_spark_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kd_ranker.sources.logs.spark_engine", None)
    log = write_log(tmp_path / "log", make_rows(1))
    with pytest.raises(UserError, match=r"data.engine='spark' needs the package pyspark .*spark"):
        api.prepare(faulty_logs.config(log, tmp_path, **SPARK))
