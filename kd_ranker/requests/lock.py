"""One process at a time in a folder.

The lock is a file that says which process holds the folder. It appears whole or not at all, which
takes hard links or, without them, exclusive creation: both work where `flock` does not. What a
process left that died is removed by the next one.
"""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from kd_ranker.errors import UserError

FILE = ".lock"
# Without hard links, a lock may be met while its record is being written.
_SECONDS_TO_WRITE = 2.0
_UNSEEN = "unseen"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone, and makes it if need be.

    At the end the folders that were made are removed again if nothing lies in them.

    Raises:
      UserError: another process holds it, which is alive as far as can be told.
    """
    record = json.dumps(own_record())
    made = _make(folder, record)
    if not made:
        _take(folder / FILE, record)
    try:
        yield
    finally:
        _drop(folder / FILE, record)
        with contextlib.suppress(OSError):  # something lies in it
            for path in made:
                path.rmdir()


def own_record() -> dict[str, Any]:
    """The record of this process: who it is, and since when it holds what it holds, from now on."""
    pid = os.getpid()
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    record = {"pid": pid, "host": socket.gethostname(), "since": since}
    of = {"machine": _machine(), "process": _process(pid), "start_of_job": _start_of_job()}
    return record | of


def who(record: Mapping[str, Any]) -> str:
    """The process that left a record, in words."""
    return f"process {record['pid']} on {record['host']} since {record['since']}"


def is_alive(record: Mapping[str, Any]) -> bool | None:
    """True if the process that left a record is there; None if it is not to be seen from here."""
    if _was_started_again(record.get("start_of_job")):
        return False
    if record["machine"] != _machine():
        return None
    return _process(record["pid"]) in (record["process"], _UNSEEN)


def _make(folder: Path, record: str) -> list[Path]:
    """Makes a folder that holds a lock with `record`, and those above it, unless it is there.

    It appears with its lock, so that of all who try at once the one that made it has it: another
    one would not know that it is to be removed again.

    Returns:
      The folders that were made, the lowest first; none if another process was faster.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if not missing:
        return []
    highest = missing[-1]
    temporary = highest.with_name(f"{FILE}.{uuid.uuid4().hex}")
    lowest = temporary / folder.relative_to(highest)
    try:
        temporary.mkdir()
        lowest.mkdir(parents=True, exist_ok=True)
        (lowest / FILE).write_text(record)
        os.rename(temporary, highest)
    except OSError:  # it is there by now, or what was above it is gone
        shutil.rmtree(temporary, ignore_errors=True)
        return []
    return missing


def _take(path: Path, record: str) -> None:
    """Makes a file that holds `record`; of all that try at once, one alone does not raise."""
    while not _create(path, record):
        found = _read(path)
        if found is None:  # dropped meanwhile
            continue
        _check_dead(path, found)
        # Others may have found the same record, and the first of them may hold a lock of its own
        # there by now. So it is removed under a second lock, which is of this record alone.
        removing = path.with_name(f"{path.name}-{hashlib.sha256(found.encode()).hexdigest()[:12]}")
        _take(removing, record)
        try:
            if _read(path) == found:
                path.unlink(missing_ok=True)
        finally:
            _drop(removing, record)


def _drop(path: Path, record: str) -> None:
    if _read(path) == record:
        path.unlink(missing_ok=True)


def _create(path: Path, record: str) -> bool:
    """Makes a file that holds `record`, unless there is one; says whether it did."""
    temporary = path.with_name(f"{FILE}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(record)
    except FileNotFoundError:  # one that had made the folder has removed it
        return False
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system where a file has one name only
        return _create_exclusively(path, record)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_exclusively(path: Path, record: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(record)
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> str | None:
    """The record in a file; a part of one if it stays a part, None if there is no file."""
    last = time.monotonic() + _SECONDS_TO_WRITE
    while True:
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        if text.endswith("}") or time.monotonic() > last:
            return text
        time.sleep(_SECONDS_TO_WRITE / 40)


def _check_dead(path: Path, text: str) -> None:
    """Raises UserError unless the process that left a record is known to have ended."""
    try:
        record = json.loads(text)
    except ValueError:  # it died while it wrote
        return
    held = f"{path.parent} is held by {who(record)}"
    alive = is_alive(record)
    if alive is None:
        raise UserError(
            f"{held}, which cannot be looked for from here; wait for its end, or, if it has ended, "
            f"remove {path}"
        )
    if alive:
        raise UserError(f"{held}; wait for its end")


def _start_of_job() -> tuple[str, int] | None:
    """The job of Slurm that this process is of, and how often it was started again."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return f"{cluster} {os.environ['SLURM_JOB_ID']}", restarts


def _was_started_again(found: list | None) -> bool:
    """True if a record's job is this one before it was started again, maybe for a lost machine.

    Slurm has ended what it was before it starts it.
    """
    own = _start_of_job()
    return bool(found and own and found[0] == own[0] and found[1] < own[1])


def _machine() -> str:
    """A name for where an id means one process: the machine, and on Linux a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(pid: int) -> str:
    """A name for the process that has this id now, which no other has after it; "" if none has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:  # another user's
        pass
    try:
        if psutil.LINUX:
            # In ticks since the boot, which nobody moves by setting the clock.
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return "" if state == "Z" else f"{boot} {fields[18]}"
        process = psutil.Process(pid)
        dead = process.status() == psutil.STATUS_ZOMBIE
        return "" if dead else repr(process.create_time())
    except psutil.NoSuchProcess:
        return ""
    except (OSError, psutil.AccessDenied):
        return _UNSEEN
