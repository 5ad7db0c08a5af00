import os
import signal
import socket
import subprocess
import sys

import pytest

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
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


def fault_of(folder):
    with pytest.raises(UserError) as caught, lock.hold(folder):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def held(folder):
    """True if the folder can be held and nothing of the lock remains."""
    with lock.hold(folder):
        assert fault_of(folder).startswith(f"{folder} is held by process {os.getpid()} on ")
    return not {path.name for path in folder.iterdir()} & lock.FILES


def test_a_second_process_is_refused_with_the_holder_until_that_ends(tmp_path, other):
    fault = fault_of(tmp_path)
    who = f"{tmp_path} is held by process {other.pid} on {socket.gethostname()} since 20"
    assert fault.startswith(who)
    assert fault.endswith("; wait for its end")
    other.communicate("\n")
    assert held(tmp_path)


def test_a_killed_process_holds_nothing_even_before_its_parent_reaps_it(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / lock.FILE).exists()
    assert held(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_is_released_whatever_happens(tmp_path, error):
    with pytest.raises(error), lock.hold(tmp_path):
        raise error
    assert held(tmp_path)


def test_a_lock_file_of_another_kind_is_a_line_or_a_lock(tmp_path):
    for name in sorted(lock.FILES):
        (tmp_path / "text" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(b"\xff{")
    assert held(tmp_path / "text")
    (tmp_path / "folder" / lock.FILE).mkdir(parents=True)
    assert "/folder/.lock cannot be locked: Is a directory; remove" in fault_of(tmp_path / "folder")
    (tmp_path / "file").touch()
    assert fault_of(tmp_path / "file") == f"{tmp_path}/file is not a folder; use another path"
    assert "cannot be locked: Not a directory" in fault_of(tmp_path / "file" / "below")


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
