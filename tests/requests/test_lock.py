import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
from tests.small import ROOT

# Takes the folders that it is told of, one a line, at the time that stands before each, and lets
# go of one that it got at the next line.
_HOLDER = """
import sys, time
from kd_ranker.requests.lock import hold
from kd_ranker.errors import UserError
from pathlib import Path
print("ready", flush=True)
for line in sys.stdin:
    start, folder = line.split(" ", 1)
    time.sleep(max(0, float(start) - time.time()))
    try:
        with hold(Path(folder.strip())):
            print("held", flush=True)
            sys.stdin.readline()
    except UserError as error:
        print(error, flush=True)
        sys.stdin.readline()
    print("free", flush=True)
"""


class Holder:
    """Another process, that takes folders."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def answer(self):
        return self.process.stdout.readline().strip()

    def tell(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def take(self, folder, at=0.0):
        self.tell(f"{at} {folder}")

    def let_go(self):
        self.tell("")
        assert self.answer() == "free"

    def die(self):
        """By a SIGKILL; its parent has not asked for its end yet, so its id stays."""
        self.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def holders():
    """(number) -> that many holders, ready."""
    made = []

    def start(number):
        made.extend(Holder() for _ in range(number))
        assert [holder.answer() for holder in made] == ["ready"] * number
        return made

    yield start
    for holder in made:
        holder.process.kill()
        holder.process.communicate()


def fault_of(folder):
    with pytest.raises(UserError) as caught, lock.hold(folder):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leave(folder, **changes):
    """Leaves a lock as this process would, had it died, but for `changes`."""
    folder.mkdir(exist_ok=True)
    record = json.dumps(lock.own_record() | changes)
    (folder / lock.FILE).write_text(record)
    return record


def held(folder):
    """Whether it can be held, and is let go."""
    with lock.hold(folder):
        assert json.loads((folder / lock.FILE).read_text())["pid"] == os.getpid()
    return not list(folder.glob(f"{lock.FILE}*"))


def test_a_second_process_is_refused_with_who_holds_it_until_that_lets_go(tmp_path, holders):
    (other,) = holders(1)
    other.take(tmp_path)
    assert other.answer() == "held"
    fault = fault_of(tmp_path)
    who = f"{tmp_path} is held by process {other.process.pid} on {socket.gethostname()} since 20"
    assert fault.startswith(who)
    assert fault.endswith("; wait for its end")
    other.let_go()
    assert held(tmp_path)


def test_a_job_of_slurm_takes_what_it_held_on_a_machine_that_was_lost(tmp_path, monkeypatch):
    elsewhere = {"machine": "another", "start_of_job": ["one 7", 0]}
    leave(tmp_path, **elsewhere)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "cannot be looked for from here" in fault_of(tmp_path)  # the same start: it may live
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert held(tmp_path)
    leave(tmp_path, **elsewhere)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert "cannot be looked for from here" in fault_of(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "cannot be looked for from here" in fault_of(tmp_path)


def test_a_process_that_died_holds_nothing_even_while_it_still_has_its_id(tmp_path, holders):
    (other,) = holders(1)
    other.take(tmp_path)
    assert other.answer() == "held"
    other.die()
    os.kill(other.process.pid, 0)
    assert (tmp_path / lock.FILE).exists()
    assert held(tmp_path)
    leave(tmp_path, pid=other.process.pid)
    other.process.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(other.process.pid, 0)
    assert held(tmp_path)


@pytest.mark.parametrize("process", ["", "another boot 17", "unseen"])
def test_an_id_that_was_given_to_another_process_holds_nothing(tmp_path, process):
    """After a restart of the machine, too, whose processes count their age from there."""
    leave(tmp_path, process=process)
    assert held(tmp_path)


def test_a_process_of_another_machine_cannot_be_looked_for_and_is_taken_for_alive(tmp_path):
    record = leave(tmp_path, host="elsewhere", machine="elsewhere 1", pid=2**22 + 1)
    fault = fault_of(tmp_path)
    assert f"is held by process {2**22 + 1} on elsewhere since 20" in fault
    assert f"if it has ended, remove {tmp_path / lock.FILE}" in fault
    assert (tmp_path / lock.FILE).read_text() == record


def test_a_process_that_cannot_be_seen_is_taken_for_alive(tmp_path, monkeypatch):
    leave(tmp_path, process="17")
    monkeypatch.setattr(lock, "_process", lambda pid: lock._UNSEEN)
    assert f"is held by process {os.getpid()}" in fault_of(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_record_that_was_left_half_written_holds_nothing(tmp_path, monkeypatch, share):
    monkeypatch.setattr(lock, "_SECONDS_TO_WRITE", 0.2)
    record = leave(tmp_path)
    (tmp_path / lock.FILE).write_text(record[: int(share * len(record))])
    assert held(tmp_path)


def test_a_record_that_is_being_written_is_waited_for(tmp_path):
    record = leave(tmp_path)
    (tmp_path / lock.FILE).write_text(record[:10])
    finish = threading.Timer(0.2, (tmp_path / lock.FILE).write_text, [record])
    finish.start()
    assert f"is held by process {os.getpid()}" in fault_of(tmp_path)
    finish.join()


@pytest.fixture(params=[True, False], ids=["links", "no-links"])
def links(request, monkeypatch):
    """A file system with hard links, and one without."""
    if not request.param:

        def unsupported(*paths):
            raise PermissionError("not supported")

        monkeypatch.setattr(os, "link", unsupported)


@pytest.mark.usefixtures("links")
def test_a_folder_is_held_once_and_let_go_whatever_happens(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        faults = []
        with pytest.raises(error), lock.hold(tmp_path):
            raise error(faults.append(fault_of(tmp_path)))
        assert f"is held by process {os.getpid()}" in faults[0]
        assert held(tmp_path)


@pytest.mark.usefixtures("links")
def test_a_dead_process_that_was_about_to_remove_another_ones_lock_holds_nothing(
    tmp_path, monkeypatch
):
    first = leave(tmp_path, process="dead")
    drop = lock._drop

    def dying_drop(path, record):
        raise SystemExit

    monkeypatch.setattr(lock, "_drop", dying_drop)
    with pytest.raises(SystemExit):
        lock._take(tmp_path / lock.FILE, json.dumps(json.loads(first) | {"process": "dead too"}))
    assert len(list(tmp_path.glob(f"{lock.FILE}-*"))) == 1
    (tmp_path / lock.FILE).write_text(first)
    monkeypatch.setattr(lock, "_drop", drop)
    assert held(tmp_path)


def test_one_that_is_slow_to_remove_a_dead_ones_lock_leaves_the_next_ones_alone(
    tmp_path, holders, monkeypatch
):
    """Both have found the same record; the faster one holds the folder before the other goes on."""
    (other,) = holders(1)
    leave(tmp_path, process="dead")
    check = lock._check_dead

    def slow_check(path, text):
        check(path, text)
        if "dead" in text:
            other.take(tmp_path)
            assert other.answer() == "held"

    monkeypatch.setattr(lock, "_check_dead", slow_check)
    assert f"is held by process {other.process.pid} " in fault_of(tmp_path)
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == other.process.pid
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]
    other.let_go()


def test_of_many_that_race_for_a_dead_ones_lock_one_gets_it(tmp_path, holders):
    racers = holders(6)
    for number in range(40):
        folder = tmp_path / str(number)
        leave(folder, process="dead")
        start = time.time() + 0.02
        for racer in racers:
            racer.take(folder, start)
        answers = [racer.answer() for racer in racers]
        winners = [racer for racer, answer in zip(racers, answers, strict=True) if answer == "held"]
        assert len(winners) == 1, answers
        assert json.loads((folder / lock.FILE).read_text())["pid"] == winners[0].process.pid
        assert all("is held by process" in answer for answer in answers if answer != "held")
        for racer in racers:
            racer.let_go()
        assert not list(folder.iterdir())


def test_of_many_that_make_a_folder_one_gets_it_and_it_is_gone_with_the_last(tmp_path, holders):
    racers = holders(6)
    for number in range(10):
        folder = tmp_path / str(number) / "below"
        start = time.time() + 0.02
        for racer in racers:
            racer.take(folder, start)
        answers = [racer.answer() for racer in racers]
        assert answers.count("held") == 1, answers
        for racer in racers:
            racer.let_go()
        assert not list(tmp_path.iterdir())


def test_one_that_is_slow_to_make_a_folder_leaves_it_to_the_faster_one(
    tmp_path, holders, monkeypatch
):
    (other,) = holders(1)
    folder, rename = tmp_path / "a" / "b", os.rename

    def slow_rename(*paths):
        other.take(folder)
        assert other.answer() == "held"
        rename(*paths)

    monkeypatch.setattr(os, "rename", slow_rename)
    assert f"is held by process {other.process.pid} " in fault_of(folder)
    assert [path.name for path in folder.iterdir()] == [lock.FILE]
    other.let_go()
    assert not list(tmp_path.iterdir())


def test_folders_that_were_made_go_again_if_they_stay_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(UserError), lock.hold(folder):
        raise UserError
    assert not list(tmp_path.iterdir())
    with lock.hold(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert held(empty)
    assert empty.exists()
