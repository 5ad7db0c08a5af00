"""A workdir in a server of S3, which outlives the processes that work there."""

import signal
import subprocess
import sys
import time

import fsspec
import pytest

from kd_ranker import api
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import remote
from tests import small

pytest.importorskip("s3fs", reason="s3fs is missing; scripts/test_cluster.sh installs it")

CHANGES = {"distill__mode": "aux", "train__log_every": 1, "train__checkpoint_every": 4}
URL = "s3://bucket/runs/student"
TABLES = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE, "metrics.jsonl")

# Time to be killed in: steps take longer, and what they leave is sent sooner.
_SLOW = """
import runpy, sys, time
from kd_ranker.pipeline import remote
from kd_ranker.training import workdir
remote._SECONDS_BETWEEN_UPLOADS = 0.1
write = workdir.MetricsWriter.write

def write_slowly(*arguments):
    write(*arguments)
    time.sleep(0.5)

workdir.MetricsWriter.write = write_slowly
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


def names(store):
    return {path.removeprefix("bucket/runs/student/") for path in store.find("bucket")}


def test_a_run_that_was_killed_goes_on_from_the_server(world, store):
    expected = world.made("of_s3", lambda to: api.train(world.config(**CHANGES), to))
    flags = world.flags(URL, **CHANGES)
    program = [sys.executable, "-c", _SLOW, "experiments.train", *flags]
    with subprocess.Popen(program, cwd=small.ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not any(name.endswith("commit_success.txt") for name in names(store)):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(signal.SIGSTOP)  # the second may take long to start
            second = small.run("-m", "experiments.train", *flags)
        finally:
            process.kill()
    assert process.returncode == -9
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"error: {URL} is held by process {process.pid} on ")
    left = names(store)
    assert ".lock" in left
    assert "results.csv" not in left

    finished = small.run("-m", "experiments.train", "--break_lock", *flags)
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    assert f"results: {URL}/results.csv" in finished.stdout
    for table in TABLES:
        there = store.cat_file(f"bucket/runs/student/{table}")
        assert there == (expected / table).read_bytes(), table
    assert not [name for name in names(store) if ".lock" in name]


def test_a_sweep_follows_a_teacher_and_is_reported_at_s3(world, store):
    store.put(f"{world.teacher}/", "bucket/teacher/", recursive=True)
    config = world.config(**small.SWEEP, teacher__workdir="s3://bucket/teacher")
    assert small.sweep(config, "s3://bucket/sweep")
    for table in (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE):
        assert store.cat_file(f"bucket/sweep/{table}") == (world.sweep() / table).read_bytes()
    answers, page = api.report("s3://bucket/sweep", output="s3://bucket/report")[:2]
    assert answers
    assert page == "s3://bucket/report/report.html"
    assert b"s3://bucket/sweep" in store.cat_file("bucket/report/report.html")


def test_no_bucket_and_no_credentials_are_a_line(store, monkeypatch):
    with (
        pytest.raises(UserError, match=r"^s3://absent/run cannot be reached: FileNotFoundError: T"),
        remote.owned("s3://absent/run"),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"^s3://absent/run cannot be reached: FileNotFoundError: T"),
        remote.fetched("s3://absent/run"),
    ):
        pass
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with (
        pytest.raises(UserError, match=r"^s3://bucket/run cannot be reached: NoCredentialsError: "),
        remote.owned("s3://bucket/run"),
    ):
        pass
