"""Workdirs at a URL that fsspec supports, such as gs://bucket/run.

A command works in a local copy of the workdir, because many libraries write only to folders. A
thread uploads what changed every few seconds, and the end of the command uploads the rest.

A run can resume from whatever is at the URL after a kill. Files are uploaded in the order in which
they were written, but those of checkpoints last, and their records after all others. A checkpoint
without a record is not complete, and the run resumes from the one before.
"""

import contextlib
import os
import re
import shutil
import tempfile
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
from absl import logging
from fsspec.implementations.dirfs import DirFileSystem
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import deferred
from kd_ranker.training.processes import are_distributed, first_holds

# A folder of this machine, or a URL.
Place = Path | str

_SECONDS_BETWEEN_UPLOADS = 5.0
# In the names of hidden files, and of checkpoints that Orbax is writing: they stay here.
_LOCAL = ("/.", ".orbax-checkpoint-tmp")
_CHECKPOINT = re.compile(rf".*/{checkpoints.FOLDER}/[^/]+/")
_RECORD = f"/{checkpoints.RECORD}/"


def place_of(text: str | os.PathLike[str]) -> Place:
    """Return the place that a flag or a config names; expands ~, which shells leave after a =."""
    text = os.fspath(text)
    return re.sub(r"(?<=[^/:])/+$", "", text) if "://" in text else Path(text).expanduser()


def local_folder(
    flag: str, text: str | os.PathLike[str], needs: str = "writes to a folder of this machine"
) -> Path:
    """Return the folder that a flag names; raise UserError for a URL, which the flag cannot be."""
    place = place_of(text)
    if isinstance(place, Path):
        return place
    raise UserError(f"{flag}={place}: it {needs}; name one, on a disk or mounted")


@contextlib.contextmanager
def fetched(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """Open the workdir of a run for reading; that of a URL is a copy, deleted at the end."""
    if isinstance(place, Path):
        yield place
    else:
        with _copied(place, with_checkpoints) as copy:
            yield copy.folder


@contextlib.contextmanager
def owned(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """Open the workdir of a run for writing; UserError if another process holds it.

    If the last upload to a URL fails, the error names the local copy, which stays.
    """
    if isinstance(place, Path):
        with first_holds(place, lock.hold(place)):
            yield place
        return
    with _locked(place) as record, _copied(place, with_checkpoints) as copy:
        stop = threading.Event()
        thread = threading.Thread(target=copy.upload_until, args=[stop, record], daemon=True)
        thread.start()
        try:
            yield copy.folder
        finally:
            with deferred():
                stop.set()
                thread.join()
            if copy.error:
                raise UserError(
                    f"{place} lacks the last results of this run ({_short(copy.error)}), which are "
                    f"in {copy.folder}: copy them there, or start the same command again, which "
                    "resumes from what is there"
                ) from copy.error


def break_lock(place: Place) -> None:
    """Remove the locks at and below a URL, which killed processes leave; none stays in a folder."""
    if not isinstance(place, Path):
        with _reaching(place) as store:
            for name in store.find(""):
                if name.rpartition("/")[2] == lock.FILE:
                    store.rm_file(name)


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[DirFileSystem]:
    """Open a URL; errors of its store, which are of many types, become one line."""
    if are_distributed():
        raise UserError(
            f"{url}: several processes (parallel.processes=True) share a folder; name a mounted "
            "one that all of them see"
        )
    try:
        system, root = fsspec.core.url_to_fs(url)
        system.invalidate_cache()
        system.auto_mkdir = True  # object stores have no folders, and others create them so
        yield DirFileSystem(root, system)
    except Exception as error:
        remedy = "check that its bucket exists, and that this machine may read and write it"
        if isinstance(error, ImportError):
            remedy = "install the extra `remote`, which has packages for gs:// and s3://"
        raise UserError(f"{url} cannot be reached: {_short(error)}; {remedy}") from error


@contextlib.contextmanager
def _locked(url: str) -> Iterator[str]:
    """Hold the lock of a URL, an object that the store creates only if it is absent."""
    record = f"{lock.this_process()} ({uuid.uuid4().hex})"
    with _reaching(url) as store:
        # Some stores, such as Azure's, ignore the mode: the lock is read before and after.
        with contextlib.suppress(FileExistsError):
            if not _holder(store):
                store.pipe_file(lock.FILE, record.encode(), mode="create")
        holder = _holder(store)
    if holder != record:
        raise UserError(
            f"{url} is held by {holder.partition(' (')[0] or 'another process'}; wait for its end, "
            "or, if it was killed, add --break_lock"
        )
    try:
        yield record
    finally:
        with contextlib.suppress(Exception):  # --break_lock removes one that stays
            if _holder(store) == record:
                store.rm_file(lock.FILE)


def _holder(store: DirFileSystem) -> str:
    """Return the content of the lock, or "" without one."""
    try:
        return store.cat_file(lock.FILE).decode(errors="replace")
    except FileNotFoundError:
        return ""


class _Copy:
    """A local copy of a workdir at a URL; `error` is why the last upload failed, if it did."""

    error: Exception | None = None

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url, folder
        folder.mkdir()

    def download(self, store: DirFileSystem, with_checkpoints: bool) -> None:
        """Download the files of a store, without checkpoints that are not complete."""
        names = [name for name in store.find("") if _is_copied(f"/{name}", with_checkpoints)]
        complete = {"", *(_checkpoint_of(name) for name in names if _RECORD in name)}
        wanted = [name for name in names if _checkpoint_of(name) in complete]
        for name in wanted:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        store.get(wanted, [str(self.folder / name) for name in wanted])
        # The first upload deletes the files of incomplete checkpoints, which are not here.
        self._store, self._uploaded = store, dict.fromkeys(names, (0, 0)) | self._files()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return the files to upload: name -> modification time in ns and size."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and _is_copied(f"/{name}"):
                    found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found

    def _upload(self, record: str) -> None:
        """Upload the files that changed, and delete those that are gone here, if the lock holds."""
        files, store = self._files(), self._store
        changed = [name for name, of in files.items() if of != self._uploaded.get(name)]
        gone = self._uploaded.keys() - files.keys()
        if (changed or gone) and (holder := _holder(store)) != record:
            raise UserError(f"its lock was broken, and is that of {holder or 'no process'}")
        for name in sorted(
            changed, key=lambda of: (_checkpoint_of(of) > "", _RECORD in of, files[of])
        ):
            with contextlib.suppress(FileNotFoundError):  # of a checkpoint that was just retired
                store.put_file(str(self.folder / name), name)
                self._uploaded[name] = files[name]
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                store.rm_file(name)
            del self._uploaded[name]

    def upload_until(self, stop: threading.Event, record: str) -> None:
        """Upload changes every few seconds, and once after `stop` is set; warns of failures."""
        stopped = False
        while not stopped:
            stopped = stop.wait(_SECONDS_BETWEEN_UPLOADS)
            before, self.error = self.error, None
            try:
                self._upload(record)
            except Exception as error:
                self.error = error
                if not (before or stopped):
                    with tqdm.external_write_mode():
                        logging.warning(
                            "%s cannot be written (%s); retrying", self.url, _short(error)
                        )


def _is_copied(name: str, with_checkpoints: bool = True) -> bool:
    """Return False for a file that is hidden, unfinished, or only marks a folder of the store."""
    local = name.endswith("/") or any(part in name for part in _LOCAL)
    return not local and (with_checkpoints or not _checkpoint_of(name))


def _checkpoint_of(name: str) -> str:
    """The folder of the checkpoint that holds a file; "" outside one."""
    found = _CHECKPOINT.match(f"/{name}")
    return found[0] if found else ""


@contextlib.contextmanager
def _copied(url: str, with_checkpoints: bool) -> Iterator[_Copy]:
    """Copy a workdir to a temporary folder; error messages name the URL in its place."""
    above = Path(tempfile.mkdtemp(prefix="kd_ranker-"))
    copy = _Copy(url, above / url.rpartition("/")[2])
    try:
        with _reaching(url) as store:
            copy.download(store, with_checkpoints)
        yield copy
    except UserError as error:
        if copy.error:
            raise
        raise UserError(str(error).replace(str(copy.folder), url)) from error
    finally:
        if not copy.error:
            shutil.rmtree(above, ignore_errors=True)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
