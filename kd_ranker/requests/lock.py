"""One process at a time in a folder: a lock of the operating system, which ends with its holder."""

import contextlib
import datetime
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from kd_ranker.errors import UserError

FILE = ".lock"
# Text next to the lock file, for the message that a second process prints.
_HOLDER = ".lock-holder"
FILES = frozenset({FILE, _HOLDER})
_WORK = "work"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock a folder for this process, and create it if needed.

    Folders that this creates are removed at the end if they are still empty. A process that dies
    loses its lock at once.

    Raises:
      UserError: another process holds the lock, or the lock file cannot be written.
    """
    path = folder / FILE
    holder = folder / _HOLDER
    lock = FileLock(path, timeout=0, thread_local=False)
    missing = [ancestor for ancestor in (folder, *folder.parents) if not ancestor.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder} is held by {_holder(holder)}; wait for its end") from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked: {error.filename}: {error.strerror}; use a folder that you "
            "can write to"
        ) from error
    with contextlib.suppress(OSError):
        # A new file: to open a link would write to its target, and to open a pipe would wait.
        holder.unlink(missing_ok=True)
        with holder.open("x") as file:
            file.write(this_process())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
            # A contender that opened this file finds it unlinked once it has the lock, and retries.
            if not isinstance(lock, SoftFileLock):
                path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for created in missing:
                created.rmdir()


@contextlib.contextmanager
def hold_work(folder: Path) -> Iterator[Path]:
    """Lock a hidden folder, and yield an empty one in it for the temporary files of this process.

    Both are removed at the end. The files that a killed process left in it are removed first.

    Raises:
      UserError: another process holds the lock, or the lock file cannot be written.
    """
    work = folder / _WORK
    try:
        with hold(folder):
            shutil.rmtree(work, ignore_errors=True)
            # Under the lock: to others, one that is there and not locked is a leftover.
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # not empty: another process holds it now
            folder.rmdir()


def remove_leftovers(above: Path, pattern: str) -> None:
    """Remove folders of `hold_work` below another that killed processes left, by their names."""
    for work in above.glob(f"{pattern}/{_WORK}"):
        with contextlib.suppress(UserError), hold_work(work.parent):
            pass


def _holder(path: Path) -> str:
    """Return the text of the process that holds a lock."""
    text = ""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            text = path.read_text(errors="replace")
    return text or "another process"


def this_process() -> str:
    """Describe this process: its id, its host and the current time."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"
