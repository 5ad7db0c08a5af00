"""Workdirs at URLs: in the memory of this process, and in a folder as a store of its own."""

import itertools
import json
import multiprocessing.util
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from kd_ranker import api
from kd_ranker.evaluation import results
from kd_ranker.pipeline import remote
from kd_ranker.requests import lock
from tests import small
from tests.faults import fault_of
from tests.small import SWEEP

TABLES = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE)
URL = "memory://bucket/run"
OWN = re.compile(r"tfevents|/d/|profile/")
FAR = b"process 7 on far since noon (id)"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The memory, empty; uploads are frequent, and copies are in a folder of the test."""
    multiprocessing.util.get_temp_dir()  # cached; sockets need a short path
    folder = tmp_path / "copies"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(remote, "_SECONDS_BETWEEN_UPLOADS", 0.02)
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def sends(monkeypatch):
    """The names of uploaded files; `before` is called before each."""

    class Sends(list):
        before = staticmethod(lambda: None)

    sent, put_file = Sends(), MemoryFileSystem.put_file

    def send(system, here, there):
        sent.before()
        put_file(system, here, there)
        sent.append(there.removeprefix("/bucket/run/"))

    monkeypatch.setattr(MemoryFileSystem, "put_file", send)
    return sent


def copies():
    return list(Path(tempfile.gettempdir()).glob("kd_ranker-*"))


def contents(place):
    """The files at a place, by their names in it."""
    system, root = fsspec.core.url_to_fs(str(place))
    return {path.removeprefix(root)[1:]: system.cat_file(path) for path in system.find(root)}


def put(files, url=URL):
    """Makes these all that lies at a URL."""
    system, root = fsspec.core.url_to_fs(url)
    for path in system.find(root):
        system.rm_file(path)
    for name, content in files.items():
        system.pipe_file(f"{root}/{name}", content)


def write(folder, name, content="content"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def eventually(condition):
    for _ in range(20_000):
        if condition():
            return True
        time.sleep(0.02)
    return False


def in_workdir(act=lambda folder: None, url=URL):
    """Acts in the local copy of a workdir that this process owns."""
    with remote.owned(url) as folder:
        act(folder)


@pytest.mark.long
def test_the_main_job_gives_the_same_bytes_at_a_url(world):
    config = world.config(**SWEEP, teacher__workdir="")
    made = api.run(config, "memory://bucket/main")
    for trained, folder in ((made.teacher, world.teacher), (made.students, world.sweep())):
        at_url = contents(trained.workdir)
        in_folder = contents(folder)
        # Event files, traces and the data of checkpoints have names of their own each time.
        names_at_url = {name for name in at_url if not OWN.search(name)}
        assert names_at_url == {name for name in in_folder if not OWN.search(name)}
        for name in at_url:
            # `speed.jsonl` is of the machine.
            if name.endswith((".csv", "metrics.jsonl", ".npy", ".parquet", "cohorts.json")):
                assert at_url[name] == in_folder[name], name
    assert made.teacher.workdir == "memory://bucket/main/teacher"
    assert made.page == "memory://bucket/main/report/report.html"
    # Whoever goes on elsewhere has the same config, and no folder of this machine.
    own = json.loads(contents(made.students.workdir)["config.json"])
    assert own["teacher"]["workdir"] == made.teacher.workdir
    for name, content in contents("memory://bucket/main").items():
        if not name.endswith("commit_success.txt"):
            assert tempfile.gettempdir().encode() not in content, name
    assert not copies()

    # There is nothing left to do; a / at the end makes no other URL.
    before = contents("memory://bucket/main/sweep")
    again = world.config(**SWEEP, teacher__workdir="memory://bucket/main/teacher")
    assert not small.sweep(again, f"{made.students.workdir}/")
    assert contents("memory://bucket/main/sweep") == before


def test_a_finished_run_at_a_url_is_exported(world, tmp_path):
    put(contents(world.teacher))
    lines = []
    api.export(URL, tmp_path / "served", formats=("jax",), show=lines.append)
    assert lines[0].startswith(f"ranker: the teacher at {URL}, ")
    assert (tmp_path / "served").is_dir()
    assert contents(URL) == contents(world.teacher)
    assert not copies()


def test_a_run_goes_on_from_whatever_has_lain_there(world, store, monkeypatch):
    """Each state that the URL was in may be all that is left, as after a kill."""
    changes = dict(train__log_every=1, train__checkpoint_every=4, train__eval_every=0)
    config = world.config(distill__mode="aux", **changes)
    whole = world.made("often", lambda folder: api.train(config, folder))
    states = []

    def keep():
        files = contents(URL)
        files.pop(lock.FILE, None)
        if not states or states[-1] != files:
            states.append(files)

    commit = MemoryFile.commit
    remove = MemoryFileSystem._rm

    def commit_and_keep(file):
        commit(file)
        keep()

    def remove_and_keep(system, path):
        remove(system, path)
        keep()

    monkeypatch.setattr(MemoryFile, "commit", commit_and_keep)
    monkeypatch.setattr(MemoryFileSystem, "_rm", remove_and_keep)
    api.train(config, URL)
    monkeypatch.undo()

    def files_by_state(step):
        """The number of files of a checkpoint in each state."""
        return [sum(f"/{step}/" in name for name in state) for state in states]

    def first_state(numbers):
        return next(place for place, number in enumerate(numbers) if number)

    expected = contents(URL)
    files_of_first = files_by_state(4)
    files_of_second = files_by_state(8)
    # Within each checkpoint, once the second is complete, and before the tables.
    for place in (
        first_state(files_of_first) + 2,
        first_state(files_of_second) + 2,
        files_of_second.index(max(files_of_second)),
        len(states) - 3,
    ):
        put(states[place])
        api.train(config, URL)
        found = contents(URL)
        for name in (*TABLES, "metrics.jsonl"):
            assert found[name] == expected[name], (place, name)
            assert found[name] == (whole / name).read_bytes(), (place, name)


def test_a_command_asked_to_end_uploads_its_last_checkpoint(world, tmp_path):
    """Another process, with a folder as its store."""
    url = f"file://{tmp_path}/store/run"
    flags = world.flags(url, distill__mode="none")
    ended = small.run_and_signal(signal.SIGTERM, "experiments.train", "logging", "run", 10, flags)
    assert ended.returncode == 143, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("stopped by SIGTERM")
    names = contents(url)
    step = max(int(name.split("/")[1]) for name in names if name.endswith("/record/metadata"))
    assert 10 <= step <= 20  # a call of the steps that are left may have begun
    assert lock.FILE not in names
    finished = small.run("-m", "experiments.train", *flags)
    assert finished.returncode == 0, finished.stderr
    assert f"results: {url}/results.csv" in finished.stdout
    for name in (*TABLES, "metrics.jsonl"):
        assert contents(url)[name] == (world.student("none") / name).read_bytes(), name


def test_checkpoint_records_go_last_and_unfinished_files_stay(sends, monkeypatch, caplog):
    monkeypatch.setattr(remote, "_SECONDS_BETWEEN_UPLOADS", 100)
    old = [f"checkpoints/4/{name}" for name in ("state/a", "record/metadata")]
    put(dict.fromkeys(("old.csv", ".lock.old", *old), b""))
    with remote.owned(URL, with_checkpoints=False) as folder:
        assert [path.name for path in folder.iterdir()] == ["old.csv"]
    new = [f"checkpoints/8/{name}" for name in ("record/metadata", "state/a")]
    with remote.owned(URL) as folder:
        for name in (*new, "config.json", "b.jsonl", "a.csv", ".a.csv.12"):
            write(folder, name)
            time.sleep(0.01)
        write(folder, "checkpoints/16.orbax-checkpoint-tmp/state")
        for name in ("old.csv", *old):
            (folder / name).unlink()
    assert sends == ["config.json", "b.jsonl", "a.csv", *reversed(new)]
    assert contents(URL).keys() == {".lock.old", *sends}
    assert not caplog.records


@pytest.mark.parametrize("creates", [True, False])
def test_a_second_process_is_refused_with_the_holder(monkeypatch, creates):
    pipe = MemoryFileSystem.pipe_file

    def pipe_without_mode(*arguments, mode=""):
        """As a store that knows no mode "create"."""
        pipe(*arguments)

    if not creates:
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_without_mode)
    with remote.owned(URL):
        who = contents(URL)[lock.FILE].decode().partition(" (")[0]
        assert who.startswith(f"process {os.getpid()} on ")
        line = f"{URL} is held by {who}; wait for its end, or, if it was killed, add --break_lock"
        assert fault_of(in_workdir) == line
        # A run that is only read may be held.
        with remote.fetched(URL) as folder:
            assert not list(folder.iterdir())
    assert not contents(URL)


def test_after_its_lock_is_broken_a_process_uploads_nothing():
    put({lock.FILE: FAR, "teacher/.lock": b"", "a.lock": b""})
    assert "is held by process 7 on far since noon; wait" in fault_of(in_workdir)
    remote.break_lock(URL)
    in_workdir()
    assert contents(URL).keys() == {"a.lock"}

    def lose(folder):
        put({lock.FILE: FAR, "a": b"of the other"})
        write(folder, "a")
        time.sleep(0.1)

    fault = fault_of(in_workdir, lose)
    assert "its lock was broken, and is that of process 7 on far" in fault
    (folder,) = (copy / "run" for copy in copies())
    assert f"copy them from {folder}, or start" in fault
    assert (folder / "a").exists()
    assert contents(URL) == {lock.FILE: FAR, "a": b"of the other"}


@pytest.mark.parametrize("times", [3, 10**9])
def test_failed_uploads_are_repeated_and_keep_the_copy(sends, caplog, times):
    """After one warning, or with a line on where the files are."""
    put({"a": b"a"})
    left = itertools.count(1)

    def fail():
        if next(left) <= times:
            raise OSError("the store is down")

    def work(folder):
        write(folder, "b")
        assert eventually(lambda: next(left) > 4)

    sends.before = fail
    if times == 3:
        in_workdir(work)
        assert contents(URL).keys() == {"a", "b"}
    else:
        line = fault_of(in_workdir, work)
        assert line.startswith(f"{URL} lacks the last results of this run (OSError: the store is d")
        (folder,) = (copy / "run" for copy in copies())
        assert f"; copy them from {folder}, or start the same command" in line
        assert {path.name for path in folder.iterdir()} == {"a", "b"}
        assert contents(URL) == {"a": b"a"}
    (warning,) = caplog.records
    assert f"{URL} cannot be written (OSError: the store is down)" in warning.getMessage()


def test_a_url_that_is_of_no_use_is_a_line(world, tmp_path):
    config, out = world.config(distill__mode="none"), tmp_path / "out"
    of_ray = world.config(**SWEEP, launcher="ray")
    for message, command, *arguments in (
        ("nope://a/b cannot be reached: ValueError: Protocol not", api.train, config, "nope://a/b"),
        (f"--workdir={URL}: it is shared by all that train coho", api.sweep, of_ray, URL),
        ("no run at memory://absent: it holds no config.json", api.export, "memory://absent", out),
        ("data.dir=s3://a: datasets need a folder of this mac", api.train,
         world.config(data__dir="s3://a"), URL),
        ("--out=s3://a/out: it writes to a folder of this mach", api.export, world.teacher,
         "s3://a/out"),
    ):  # fmt: skip
        assert fault_of(command, *arguments).startswith(message)
    assert not contents("memory://")
    assert not copies()
