"""Workdirs at a URL that fsspec supports, such as gs://bucket/run.

A command works in a local copy of the workdir: tables, figures, event files and checkpoints are
written by libraries that need a folder. A thread uploads what changed every few seconds, and the
end of the command uploads the rest.

A run can resume from whatever is at the URL after a kill. A checkpoint is uploaded after the other
files, which resuming truncates to its step, and counts only once its last file is there.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
import textwrap
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from absl import logging
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import deferred
from kd_ranker.training.processes import are_distributed, first_holds

# A folder of this machine, or a URL.
Place = Path | str

_SECONDS_BETWEEN_UPLOADS = 5.0
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that Orbax is writing
_IN_CHECKPOINT = re.compile(rf"((?:.*/)?{checkpoints.FOLDER}/[^/]*)/.*")
_LAST_FILE = "commit_success.txt"  # of each checkpoint, as Orbax writes it


def place_of(text: str | os.PathLike[str]) -> Place:
    """Return the place that a flag or a config names; expands ~, which shells leave after a =."""
    text = os.fspath(text)
    return re.sub(r"(?<=[^/:])/+$", "", text) if "://" in text else Path(text).expanduser()


def below(place: Place, name: str) -> Place:
    """Return the folder of this name in a place."""
    return place / name if isinstance(place, Path) else f"{place}/{name}"


def local_folder(
    flag: str, text: str | os.PathLike[str], needs: str = "writes to a folder of this machine"
) -> Path:
    """Return the folder that a flag names, where a URL is not supported.

    Args:
      flag: its name, for the message.
      text: its value.
      needs: the reason, for the message.

    Raises:
      UserError: it is a URL.
    """
    place = place_of(text)
    if isinstance(place, Path):
        return place
    raise UserError(f"{flag}={place}: it {needs}; name one, on a disk or mounted")


@contextlib.contextmanager
def fetched(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """Open the workdir of a run for reading; that of a URL is a copy, which is deleted at the end.

    Raises:
      UserError: the URL cannot be read.
    """
    if isinstance(place, Path):
        yield place
        return
    with _copied(_open(place), with_checkpoints) as copy:
        yield copy.folder


@contextlib.contextmanager
def owned(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """Open the workdir of a run for writing, by this process only.

    Raises:
      UserError: another process holds it, the URL cannot be read, or the last upload fails; then
        the message names the local copy, which stays.
    """
    if isinstance(place, Path):
        with first_holds(place, lock.hold(place)):
            yield place
        return
    store = _open(place)
    with _locked(store) as record, _copied(store, with_checkpoints) as copy:
        stop = threading.Event()
        thread = threading.Thread(target=copy.upload_often, args=[record, stop], daemon=True)
        thread.start()
        try:
            yield copy.folder
        finally:
            with deferred():
                stop.set()
                thread.join()
                copy.upload_rest(record)


def break_lock(place: Place) -> None:
    """Remove the locks at and below a URL, which killed processes leave; a folder needs none of it.

    Raises:
      UserError: the URL cannot be written.
    """
    if not isinstance(place, Path):
        store = _open(place)
        with _reaching(store.url):
            for path in store.system.find(store.root):
                if path.endswith(f"/{lock.FILE}"):
                    store.system.rm_file(path)


class _Store(NamedTuple):
    """A URL, its file system, and its path there."""

    url: str
    system: Any
    root: str

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make_parent(self, name: str) -> None:
        # Asynchronous file systems are object stores, which have no folders.
        if not self.system.async_impl:
            self.system.makedirs(self.path(name).rpartition("/")[0], exist_ok=True)

    def holder(self) -> bytes:
        """Return the content of the lock, or b"" without one."""
        try:
            return self.system.cat_file(self.path(lock.FILE))
        except FileNotFoundError:
            return b""


def _open(url: str) -> _Store:
    if are_distributed():
        raise UserError(
            f"{url}: several processes (parallel.processes=True) share a folder; name a mounted "
            "one that all of them see"
        )
    with _reaching(url):
        store = _Store(url, *fsspec.core.url_to_fs(url))
        store.system.invalidate_cache()
        return store


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn the errors of a store, which are of many types, into one line."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{url}: a package for {url.partition('://')[0]}:// is missing; install the extra "
            f"`remote`, which has those for gs:// and s3:// ({error})"
        ) from error
    except Exception as error:
        raise UserError(
            f"{url} cannot be reached: {_short(error)}; check that its bucket exists, and that "
            "this machine may read and write it"
        ) from error


@contextlib.contextmanager
def _locked(store: _Store) -> Iterator[bytes]:
    """Hold the lock of a URL, an object that the store creates only if it is absent."""
    record = f"{lock.this_process()} ({uuid.uuid4().hex})".encode()
    with _reaching(store.url):
        store.make_parent(lock.FILE)
        # A few stores ignore the mode, so the lock is read before and after.
        if not store.holder():
            with contextlib.suppress(FileExistsError):
                store.system.pipe_file(store.path(lock.FILE), record, mode="create")
        holder = store.holder()
    if holder != record:
        raise UserError(
            f"{store.url} is held by {_name_of(holder)}; wait for its end, or, if it was killed, "
            "add --break_lock"
        )
    try:
        yield record
    finally:
        with contextlib.suppress(Exception):  # --break_lock removes one that stays
            if store.holder() == record:
                store.system.rm_file(store.path(lock.FILE))


def _name_of(holder: bytes) -> str:
    return holder.decode(errors="replace").partition(" (")[0] or "another process"


@dataclasses.dataclass
class _Copy:
    """A local copy of a workdir at a URL.

    Attributes:
      store: the URL.
      folder: the copy.
      uploaded: the files at the URL that this process manages: name -> modification time in ns and
        size of the same file here, (0, 0) if it is not here.
      keep: True if the copy contains what could not be uploaded.
    """

    store: _Store
    folder: Path
    uploaded: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    keep: bool = False

    def download(self, with_checkpoints: bool) -> None:
        """Download all files, without checkpoints that are not complete."""
        store = self.store
        found = (path.removeprefix(store.root).strip("/") for path in store.system.find(store.root))
        names = {
            name for name in found if _is_copied(name) and (with_checkpoints or not _last_of(name))
        }
        wanted = [name for name in names if _last_of(name) in {"", *names}]
        for name in wanted:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        here = [str(self.folder / name) for name in wanted]
        store.system.get([store.path(name) for name in wanted], here)
        self.uploaded = dict.fromkeys(names, (0, 0)) | self._files()

    def upload(self, record: bytes) -> None:
        """Upload the files that changed, and delete those that are gone here.

        Raises:
          UserError: the lock does not contain `record` any more.
        """
        files, store = self._files(), self.store
        changed = [name for name, of in files.items() if of != self.uploaded.get(name)]
        gone = self.uploaded.keys() - files.keys()
        if (changed or gone) and (holder := store.holder()) != record:
            raise UserError(f"{_name_of(holder)} holds {store.url} by now: its lock was broken")
        # In the order in which they were written, but checkpoints last, and their last files.
        for name in sorted(
            changed, key=lambda of: (_last_of(of) > "", _last_of(of) == of, files[of])
        ):
            with contextlib.suppress(FileNotFoundError):  # of a checkpoint that was just retired
                store.make_parent(name)
                store.system.put_file(str(self.folder / name), store.path(name))
                self.uploaded[name] = files[name]
        for name in gone:
            with contextlib.suppress(FileNotFoundError):
                store.system.rm_file(store.path(name))
            del self.uploaded[name]

    def _files(self) -> dict[str, tuple[int, int]]:
        """Return the files to upload: name -> modification time in ns and size."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and _is_copied(name):
                    found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found

    def upload_often(self, record: bytes, stop: threading.Event) -> None:
        """Upload changes until `stop` is set; warns once of uploads that fail, and retries."""
        warned = False
        while not stop.wait(_SECONDS_BETWEEN_UPLOADS):
            try:
                self.upload(record)
                warned = False
            except Exception as error:
                if not warned:
                    with tqdm.external_write_mode():
                        logging.warning(
                            "%s cannot be written (%s); retrying", self.store.url, _short(error)
                        )
                warned = True

    def upload_rest(self, record: bytes) -> None:
        """Upload all changes; raises UserError that names the copy if that fails."""
        try:
            self.upload(record)
        except Exception as error:
            self.keep = True
            raise UserError(
                f"{self.store.url} lacks the last results of this run ({_short(error)}), which are "
                f"in {self.folder}: copy them there, or start the same command again, which "
                "resumes from what is there"
            ) from error


def _is_copied(name: str) -> bool:
    """Return False for the URL itself, hidden files, and checkpoints that Orbax is writing."""
    return not (f"/{name}".endswith("/") or "/." in f"/{name}" or _UNFINISHED in name)


def _last_of(name: str) -> str:
    """Return the name of the last file of the checkpoint that contains a file; "" outside one."""
    found = _IN_CHECKPOINT.fullmatch(name)
    return f"{found[1]}/{_LAST_FILE}" if found else ""


@contextlib.contextmanager
def _copied(store: _Store, with_checkpoints: bool) -> Iterator[_Copy]:
    """Copy a workdir to a temporary folder; error messages name the URL in its place."""
    above = Path(tempfile.mkdtemp(prefix="kd_ranker-"))
    copy = _Copy(store, above / store.url.rpartition("/")[2])
    try:
        with _reaching(store.url):
            copy.folder.mkdir()
            copy.download(with_checkpoints)
        yield copy
    except UserError as error:
        message = str(error)
        raise UserError(
            message if copy.keep else message.replace(str(copy.folder), store.url)
        ) from error
    finally:
        if not copy.keep:
            shutil.rmtree(above, ignore_errors=True)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
