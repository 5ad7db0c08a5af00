import os
import signal
import socket
import subprocess
import sys

import pytest

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
from tests.faults import fault_of
from tests.small import ROOT

# Holds the folder that it is given until a line comes.
_HOLDER = """
import sys
from kd_ranker.requests.lock import hold
from pathlib import Path
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds `tmp_path`."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, tmp_path],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def fault_in(folder):
    return fault_of(lock.hold(folder).__enter__)


def can_be_held(folder):
    """True if the folder can be held and nothing of the lock remains."""
    with lock.hold(folder):
        assert fault_in(folder).startswith(f"{folder} is held by process {os.getpid()} on ")
    return not {path.name for path in folder.iterdir()} & lock.FILES


def end(other):
    other.communicate("\n")


def kill(other):
    """Kill the process; its parent has not reaped it yet."""
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("stop", [end, kill])
def test_a_second_process_is_refused_until_the_holder_ends(tmp_path, other, stop):
    fault = fault_in(tmp_path)
    who = f"{tmp_path} is held by process {other.pid} on {socket.gethostname()} since 20"
    assert fault.startswith(who)
    assert fault.endswith("; wait for its end")
    stop(other)
    assert can_be_held(tmp_path)


@pytest.mark.parametrize(("name", "reason"), [("file", "File exists"), ("folder", "Is a dir")])
def test_a_path_that_cannot_be_locked_is_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / lock.FILE).mkdir(parents=True)
    fault = fault_in(tmp_path / name)
    assert f"{tmp_path / name} cannot be locked: " in fault
    assert f": {reason}" in fault
    assert "; use a folder" in fault


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_folders_made_for_a_lock_go_again_if_they_stay_empty(tmp_path, error):
    folder = tmp_path / "a" / "b"
    with pytest.raises(error), lock.hold(folder):
        raise error
    assert not list(tmp_path.iterdir())
    with lock.hold(folder):
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert can_be_held(folder)


def test_a_link_in_place_of_the_holder_is_replaced(tmp_path):
    target = tmp_path / "notes"
    target.write_text("mine")
    folder = tmp_path / "held"
    folder.mkdir()
    (folder / ".lock-holder").symlink_to(target)
    assert can_be_held(folder)
    assert target.read_text() == "mine"


@pytest.mark.parametrize("planted", ["before", "after"])
def test_a_pipe_in_place_of_the_holder_is_not_opened(tmp_path, planted):
    """Either would wait for ever for its other end."""
    if planted == "before":
        os.mkfifo(tmp_path / ".lock-holder")
    with lock.hold(tmp_path):
        if planted == "after":
            (tmp_path / ".lock-holder").unlink()
            os.mkfifo(tmp_path / ".lock-holder")
        assert f"{tmp_path} is held by " in fault_in(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_only_files_of_killed_processes_are_removed(tmp_path):
    mine, left = tmp_path / ".work-1", tmp_path / ".work-2" / "work"
    left.mkdir(parents=True)
    (left / "table").touch()
    with lock.hold_work(mine) as work:
        (work / "table").touch()
        lock.remove_leftovers(tmp_path, ".work-*")
        assert (work / "table").exists()
        assert [path.name for path in tmp_path.iterdir()] == [mine.name]
    assert not [*tmp_path.iterdir()]
