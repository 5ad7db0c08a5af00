"""Workdirs at URLs: in the memory of this process, and in a folder as a store of its own."""

import itertools
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.registry import known_implementations

from kd_ranker import api
from kd_ranker.config import defaults
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.pipeline import remote, stores
from kd_ranker.requests import lock
from kd_ranker.sweep.members import whole_repeat
from kd_ranker.training.interruption import until_interrupted
from tests import small
from tests.small import SWEEP

TABLES = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE)
URL = "memory://bucket/run"
SEAL = "checkpoints/{}/files.json"
OWN = re.compile(r"tfevents|/d/")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.open_world(tmp_path_factory)


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """The memory, empty; what takes seconds takes less, and mirrors lie in a folder of the test."""
    mirrors = tmp_path / "mirrors"
    mirrors.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(mirrors))
    for of, name, seconds in (
        *((remote, "_EVERY", 0.02), (remote, "_AT_LAST", 0.0)),
        *((stores, "BEAT", 0.05), (stores, "SILENCE", 0.5)),
    ):
        monkeypatch.setattr(of, name, seconds)
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def mirrors():
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


def checkpoint(folder, step, content="state"):
    write(folder, f"checkpoints/{step}/state", content)
    write(folder, SEAL.format(step), json.dumps({"state": 0}))


def eventually(condition):
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_the_main_job_at_a_url_gives_the_bytes_that_it_gives_in_folders(world):
    config = world.config(**SWEEP, teacher__workdir="")
    made = api.run(config, "memory://bucket/main")
    for trained, folder in ((made.teacher, world.teacher), (made.students, world.sweep())):
        there, here = contents(trained.workdir), contents(folder)
        # Event files, and the data of checkpoints, have names of their own each time.
        names, others = ({name for name in of if not OWN.search(name)} for of in (there, here))
        assert names == others
        for name in there:
            if name.endswith((".csv", ".jsonl", ".npy", ".parquet", "cohorts.json")):
                assert there[name] == here[name], name
    assert made.teacher.workdir == "memory://bucket/main/teacher"
    assert made.page == "memory://bucket/main/report/report.html"
    # Whoever goes on elsewhere has the same config, and no folder of this machine.
    own = json.loads(contents(made.students.workdir)["config.json"])
    assert own["teacher"]["workdir"] == made.teacher.workdir
    for name, content in contents("memory://bucket/main").items():
        if not name.endswith("commit_success.txt"):  # of Orbax, which nobody reads
            assert tempfile.gettempdir().encode() not in content, name
    page = contents("memory://bucket/main/report")["report.html"].decode()
    assert "memory://bucket/main/sweep</summary>" in page
    assert not mirrors()

    assert len(made.students.results)
    assert f"results: {made.students.workdir}/results.csv" in str(made.students)
    # There is nothing left to do, and nothing is sent but the signs of life.
    before = contents("memory://bucket/main/sweep")
    assert not small.sweep(
        world.config(**SWEEP, teacher__workdir="memory://bucket/main/teacher"),
        made.students.workdir,
    )
    assert contents("memory://bucket/main/sweep") == before
    # The report beside its sweep, which it reads there, and two that are one too many.
    api.report(made.students)
    assert contents(made.students.workdir).keys() > {"report.html", "results.csv", "config.json"}
    assert any(SEAL.format(20) in name for name in contents(made.students.workdir))
    with pytest.raises(UserError, match="memory://bucket/main/sweep"):
        api.report(made.students, made.students, output="memory://bucket/both")
    assert not contents("memory://bucket/both")


def test_a_finished_run_at_a_url_is_exported(world, tmp_path):
    put(contents(world.teacher))
    lines = []
    api.export(URL, tmp_path / "served", formats=("jax",), show=lines.append)
    assert lines[0].startswith(f"ranker: the teacher at {URL}, ")
    assert (tmp_path / "served").is_dir()
    assert contents(URL) == contents(world.teacher)
    assert not mirrors()


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

    commit, remove = MemoryFile.commit, MemoryFileSystem._rm
    monkeypatch.setattr(MemoryFile, "commit", lambda file: (commit(file), keep()))
    monkeypatch.setattr(MemoryFileSystem, "_rm", lambda of, path: (remove(of, path), keep()))
    api.train(config, URL)
    monkeypatch.undo()

    ends = contents(URL)
    sealed = [sum(name.endswith("files.json") for name in state) for state in states]
    assert max(sealed) >= 3
    # Within the second checkpoint, and once it is sealed; as one is removed; before the tables.
    second = sealed.index(2)
    removed = next(
        number for number in range(1, len(sealed)) if sealed[number] < sealed[number - 1]
    )
    for number in (second - 2, second, removed, len(states) - 3):
        put(states[number])
        api.train(config, URL)
        there = contents(URL)
        for name in (*TABLES, "metrics.jsonl"):
            assert there[name] == ends[name] == (whole / name).read_bytes(), (number, name)
        assert not [name for name in there if "damaged" in name], number


def test_a_command_that_is_asked_to_end_sends_its_last_checkpoint(world, tmp_path):
    """Another process, with a folder as its store."""
    url = f"file://{tmp_path}/store/run"
    flags = world.flags(url, distill__mode="none")
    ended = small.run_and_signal(signal.SIGTERM, "experiments.train", "logging", "run", 10, flags)
    assert ended.returncode == 143, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("stopped by SIGTERM")
    names = contents(url)
    step = max(int(name.split("/")[1]) for name in names if name.endswith("files.json"))
    assert 10 <= step <= 20  # a call of the steps that are left may have begun
    assert lock.FILE not in names
    finished = small.run("-m", "experiments.train", *flags)
    assert finished.returncode == 0, finished.stderr
    assert f"results: {url}/results.csv" in finished.stdout
    for name in (*TABLES, "metrics.jsonl"):
        assert contents(url)[name] == (world.student("none") / name).read_bytes(), name


def test_what_is_on_its_way_is_not_sent_and_what_is_gone_goes(caplog):
    with remote.owned(URL) as folder:
        for step in (4, 8):
            checkpoint(folder, step)
        write(folder, "checkpoints/12/state")
        write(folder, "checkpoints/16.orbax-checkpoint-tmp/files.json")
        write(folder, ".results.csv.123")
        write(folder, "cohorts/0/checkpoints/4/files.json")
        write(folder, "cohorts/0/results.csv")
        assert eventually(lambda: "cohorts/0/results.csv" in contents(URL))
        for name in ("checkpoints/4/files.json", "cohorts/0/results.csv"):
            (folder / name).unlink()
    assert contents(URL).keys() == {
        "checkpoints/8/state", SEAL.format(8), "cohorts/0/checkpoints/4/files.json",
    }  # fmt: skip
    assert not caplog.records


def test_a_checkpoint_that_was_half_sent_is_left_out_and_removed():
    put({SEAL.format(4): b"{}", "checkpoints/4/state": b"", "checkpoints/8/state": b"", "a": b""})
    with remote.fetched(URL) as folder:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert found == {"a", "checkpoints", "checkpoints/4", "checkpoints/4/state", SEAL.format(4)}
    with remote.fetched(URL, with_checkpoints=False) as folder:
        assert [path.name for path in folder.iterdir()] == ["a"]
    assert "checkpoints/8/state" in contents(URL)
    with remote.owned(URL, with_checkpoints=False):
        pass
    assert "checkpoints/8/state" in contents(URL)
    with remote.owned(URL):
        pass
    assert contents(URL).keys() == {"a", SEAL.format(4), "checkpoints/4/state"}


def test_a_checkpoint_that_is_written_anew_is_without_a_seal_meanwhile(monkeypatch):
    with remote.owned(URL) as folder:
        checkpoint(folder, 4)
        write(folder, "checkpoints/4/other")
    seals, send = [], MemoryFileSystem.put
    monkeypatch.setattr(
        MemoryFileSystem,
        "put",
        lambda *of, **by: (seals.append(SEAL.format(4) in contents(URL)), send(*of, **by)),
    )
    with remote.owned(URL) as folder:
        (folder / "checkpoints/4/other").unlink()
        checkpoint(folder, 4, "another")
    assert seals == [False]
    assert contents(URL)["checkpoints/4/state"] == b"another"
    assert contents(URL).keys() == {"checkpoints/4/state", SEAL.format(4)}


def test_what_was_sent_of_a_checkpoint_that_is_removed_meanwhile_is_removed(monkeypatch):
    send, sent = MemoryFileSystem.put, []

    def send_half(system, here, there):
        send(system, here[:1], there[:1])
        sent.append(contents(URL).keys())
        shutil.rmtree(Path(here[0]).parent)
        raise FileNotFoundError(here[1])

    monkeypatch.setattr(MemoryFileSystem, "put", send_half)
    with remote.owned(URL) as folder:
        write(folder, "checkpoints/4/other")
        checkpoint(folder, 4)
        assert eventually(lambda: sent)
    assert sent[0] & {"checkpoints/4/other", "checkpoints/4/state"}
    assert not contents(URL)


def test_files_are_sent_in_the_order_in_which_they_were_last_written():
    """Lines before the checkpoints that go on from them, and seals after all else of theirs."""
    written = {
        "config.json": 1,
        "cohorts/0/checkpoints/4/state": 9,  # whenever that was
        "cohorts/0/checkpoints/4/files.json": 3,
        "cohorts/0/checkpoints/8/state": 4,
        "cohorts/0/checkpoints/8/files.json": 5,
        "cohorts/0/metrics.jsonl": 8,
        "cohorts/0/events.out.tfevents.1": 8,
        "cohorts/1/metrics.jsonl": 2,
        "results.csv": 7,
        "metrics.jsonl": 6,
        "same": 0,
    }
    here = {name: (time, 0, 0) for name, time in written.items()}
    parts = remote._parts(here, {"same": (0, 0, 0), "config.json": None})
    assert parts == [
        ["config.json"],
        ["cohorts/1/metrics.jsonl"],
        ["cohorts/0/metrics.jsonl"],
        ["cohorts/0/events.out.tfevents.1"],
        ["cohorts/0/checkpoints/4/state", "cohorts/0/checkpoints/4/files.json"],
        ["cohorts/0/checkpoints/8/state", "cohorts/0/checkpoints/8/files.json"],
        ["metrics.jsonl"],
        ["results.csv"],
    ]


def record(**changes):
    """What another process has left: by default one of another machine, heard of just now."""
    other = {"id": "other", "machine": "another", "host": "far", "pid": 7, "since": "noon"}
    return json.dumps(lock.own_record() | {"renewed": time.time()} | other | changes).encode()


def test_a_second_process_is_refused_with_who_holds_the_url():
    with remote.owned(URL):
        held = json.loads(contents(URL)[lock.FILE])
        with pytest.raises(UserError) as caught, remote.owned(URL):
            pass
        assert str(caught.value) == f"{URL} is held by {lock.who(held)}; wait for its end"
        # It gives signs of life.
        assert eventually(lambda: json.loads(contents(URL)[lock.FILE])["renewed"] > held["renewed"])
        # Of a run that is only read, nobody asks who writes it.
        with remote.fetched(URL) as folder:
            assert not list(folder.iterdir())
    assert not contents(URL)


def test_a_store_that_writes_over_what_is_there_lets_no_second_process_in(monkeypatch):
    """As that of Azure does, whatever mode it is asked for."""
    write_ = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda of, path, value, **_: write_(of, path, value)
    )
    with remote.owned(URL):
        with pytest.raises(UserError, match=f"{URL} is held by process"), remote.owned(URL):
            pass
        assert json.loads(contents(URL)[lock.FILE])["pid"] == os.getpid()
    assert not contents(URL)


@pytest.mark.parametrize("slow", [0, 300])
def test_a_holder_elsewhere_that_gives_signs_of_life_is_not_taken_over(slow, caplog):
    """Its clock may be slow by more than a holder may be silent."""
    stop = threading.Event()

    def live():
        while not stop.wait(0.02):
            put({lock.FILE: record(renewed=time.time() - slow)})

    put({lock.FILE: record(renewed=time.time() - slow)})
    thread = threading.Thread(target=live)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match=f"{URL} is held by process 7 on far since noon; wait"),
            remote.owned(URL),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads(contents(URL)[lock.FILE])["id"] == "other"


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"renewed": 0.0}, (0, 0.4)),  # long ago
        ({}, (0.5, 5)),  # just now, and then no more
        ({"machine": lock._machine(), "pid": 2**22 + 1}, (0, 0.4)),  # ended, as can be seen
    ],
)
def test_a_holder_that_is_silent_is_taken_over_with_a_word(changes, seconds, caplog):
    put({lock.FILE: record(**changes), "a": b"a"})
    since = time.monotonic()
    with remote.owned(URL) as folder:
        assert seconds[0] <= time.monotonic() - since <= seconds[1]
        assert json.loads(contents(URL)[lock.FILE])["id"] != "other"
        assert (folder / "a").exists()
    assert "is taken over from process" in caplog.records[-1].getMessage()
    assert contents(URL).keys() == {"a"}


@pytest.mark.parametrize("writes", [True, False])
def test_who_has_lost_the_url_ends_and_writes_nothing_more(writes):
    def lose(folder):
        write(folder, "a")
        assert eventually(lambda: "a" in contents(URL))
        put({lock.FILE: record(), "a": b"of the other"})
        try:
            assert eventually(lambda: False)
        except KeyboardInterrupt:
            if writes:
                write(folder, "b")
            raise

    with (
        pytest.raises(UserError, match=f"{URL} was taken over by process 7 on far"),
        remote.owned(URL) as folder,
    ):
        lose(folder)
    assert contents(URL).keys() == {"a", lock.FILE}
    assert contents(URL)["a"] == b"of the other"
    assert json.loads(contents(URL)[lock.FILE])["id"] == "other"
    assert not mirrors()


@pytest.mark.parametrize("ignored", [signal.SIGUSR1, signal.SIGINT])
def test_who_has_lost_the_url_ends_although_its_main_thread_waits_for_another(ignored):
    """As it does in a training; a shell has what it starts in the background ignore SIGINT."""
    started, ended = [], []

    def train(stop):
        put({lock.FILE: record()})
        started.append(time.monotonic())
        assert eventually(stop)
        ended.append(time.monotonic())

    handlers = {signal.SIGTERM: signal.default_int_handler, ignored: signal.SIG_IGN}
    before = {number: signal.signal(number, of) for number, of in handlers.items()}
    try:
        with pytest.raises(UserError, match="was taken over by process 7"), remote.owned(URL):
            until_interrupted(train)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended[0] - started[0] < 2


@pytest.mark.parametrize("late", [True, False])
def test_a_url_whose_files_are_gone_does_not_take_the_mirror_with_it(late, monkeypatch, caplog):
    """As where a bucket is removed: nobody else has what the run has made."""

    def lose(folder):
        put({})
        write(folder, "results.csv")
        if late:  # known at the end alone
            monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
        assert late or eventually(lambda: False)

    def refuse(*_, **__):
        raise FileNotFoundError("no such bucket")

    if late:
        monkeypatch.setattr(stores, "BEAT", 100)
        monkeypatch.setattr(stores, "SILENCE", 0.0)
    with pytest.raises(UserError) as caught, remote.owned(URL) as folder:
        lose(folder)
    assert str(caught.value).startswith(
        f"{URL} has lost the lock of this process: what lay there was removed, or another one"
    )
    assert f"what it has made lies in {folder}: copy that there" in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["results.csv"]
    assert not [record for record in caplog.records if "lies in" in record.getMessage()]


def failing(monkeypatch, times):
    """Has so many writes fail that are none of locks."""
    left, write_ = itertools.count(1), MemoryFileSystem.pipe_file

    def pipe_file(system, path, *of, **by):
        if lock.FILE not in path and next(left) <= times:
            raise OSError("the store is down")
        write_(system, path, *of, **by)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)


def test_what_cannot_be_sent_for_a_time_is_sent_later_and_told_once(monkeypatch, caplog):
    failing(monkeypatch, times=3)
    with remote.owned(URL) as folder:
        write(folder, "a")
        assert eventually(lambda: "a" in contents(URL))
    (warning,) = caplog.records
    assert f"{URL} cannot be written to (OSError: the store is down)" in warning.getMessage()


@pytest.mark.parametrize("fault", [None, KeyError("the command's own")])
def test_what_cannot_be_sent_at_the_end_stays_here_and_a_line_says_where(
    fault, monkeypatch, caplog
):
    put({"a": b"a"})
    failing(monkeypatch, times=10**9)
    monkeypatch.setattr(remote, "_EVERY", 100)

    def end(folder):
        write(folder, "b")
        if fault:
            raise fault

    with pytest.raises(type(fault) if fault else UserError) as caught, remote.owned(URL) as folder:
        end(folder)
    line = caplog.records[-1].getMessage() if fault else str(caught.value)
    assert line.startswith(f"{URL} lacks the last of this run (OSError: the store is down), which")
    assert f"lies in {folder}: copy that there" in line
    assert {path.name for path in folder.iterdir()} == {"a", "b"}
    assert contents(URL) == {"a": b"a"}


def test_a_mirror_that_a_killed_process_has_left_is_removed():
    above, dead = Path(tempfile.gettempdir()), lock.own_record() | {"process": "ended"}
    for name, record in (
        *(("dead", json.dumps(dead)), ("alive", json.dumps(lock.own_record()))),
        *(("elsewhere", json.dumps(dead | {"machine": "another"})), ("cut", '{"pid": 1')),
    ):
        write(above, f"kd_ranker-mirror-{name}/run/checkpoints/4/state")
        write(above, f"kd_ranker-mirror-{name}/.lock", record)
    write(above, "kd_ranker-mirror-unsent/run/results.csv")  # a line has named it
    with remote.owned(URL) as folder:
        (own,) = set(mirrors()) & set(folder.parents)
        kept = {path.name.rpartition("-")[2] for path in mirrors() if path != own}
        assert kept == {"alive", "cut", "elsewhere", "unsent"}
        assert own.stat().st_mode & 0o77 == 0
    assert own not in mirrors()


def test_messages_name_the_url_and_not_its_mirror(caplog):
    def tell(folder):
        logging.getLogger("absl").warning("%s is damaged", folder / "checkpoints" / "4")
        raise UserError(f"{folder} holds no run")

    with pytest.raises(UserError) as caught, remote.owned(URL) as folder:
        tell(folder)
    assert str(caught.value) == f"{URL} holds no run"
    assert caplog.records[0].getMessage() == f"{URL}/checkpoints/4 is damaged"


def test_a_url_that_is_of_no_use_is_a_line(world, tmp_path, monkeypatch):
    absent = {"class": "an_absent_package.FileSystem", "err": "Install an_absent_package"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    config = world.config(distill__mode="none")
    of_ray = world.config(**SWEEP, launcher="ray")
    with pytest.raises(UserError, match=r"^nope://a/b cannot be opened: ValueError: Protocol not"):
        api.train(config, "nope://a/b")
    with pytest.raises(UserError, match=r"^absent://a/b: a package for absent:// is missing; inst"):
        api.train(config, "absent://a/b")
    with pytest.raises(UserError, match=rf"^--workdir={URL}: it is shared by all that train coho"):
        api.sweep(of_ray, URL)
    with pytest.raises(UserError, match=r"^no teacher at memory://absent; make it with: python"):
        api.train(world.config(teacher__workdir="memory://absent"), URL)
    with pytest.raises(UserError, match=r"^no run at memory://absent: it holds no config\.json"):
        api.export("memory://absent", tmp_path / "out")
    with pytest.raises(UserError, match=r"^data\.dir=s3://a: datasets need a folder of this mac"):
        api.train(world.config(data__dir="s3://a"), URL)
    with pytest.raises(UserError, match=rf"^--workdir={URL}: it writes to a folder of this machin"):
        api.first_config(defaults.get_config("parquet"), URL)
    with pytest.raises(UserError, match=r"^output=s3://a/out: it writes to a folder of this mach"):
        api.export(world.teacher, "s3://a/out")
    assert not contents("memory://")
    with monkeypatch.context() as several:
        several.setattr(stores, "are_several", lambda: True)
        with pytest.raises(UserError, match=rf"^{URL}: several processes \(parallel\.processes=Tr"):
            api.train(config, URL)
    refused = PermissionError("no credentials")

    def refuse(*_, **__):
        raise refused

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(UserError, match=rf"^{URL} cannot be reached: PermissionError: no creden"):
        api.train(config, URL)
    assert not mirrors()


def test_places():
    assert remote.place_of("gs://bucket/run/") == "gs://bucket/run"
    assert remote.place_of("memory://") == "memory://"
    assert remote.place_of("~/runs") == Path.home() / "runs"
    assert remote.below(Path("runs"), "sweep") == Path("runs/sweep")
    config = defaults.get_config("cascade")
    for workdir, repeat in (("gs://b/t", "gs://b/t/seed3"), ("runs/t", "runs/t/seed3")):
        config.teacher.workdir = workdir
        assert whole_repeat(config, 3).teacher.workdir == repeat
