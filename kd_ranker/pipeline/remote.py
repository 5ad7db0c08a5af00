"""Workdirs at a URL that fsspec supports, such as gs://bucket/run.

A command works in a local copy of the workdir, because many libraries write only to folders. A
thread uploads what changed every few seconds, and the end of the command uploads the rest. It
uploads the files of checkpoints last, and their records after all others. A checkpoint without a
record is not complete, so a run can resume from whatever a kill leaves at the URL.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from absl import logging
from fsspec.implementations.dirfs import DirFileSystem
from tqdm import tqdm

from kd_ranker.errors import UserError, short
from kd_ranker.requests import lock
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import deferred
from kd_ranker.training.processes import are_distributed, first_holds

# A folder of this machine, or a URL.
Place = Path | str

_SECONDS_BETWEEN_UPLOADS = 5.0
_CHECKPOINTS = f"/{checkpoints.FOLDER}/"
_RECORD = f"/{checkpoints.RECORD}/"
# Names that are not copied: hidden files, unfinished checkpoints, and marks of a store's folders.
_NOT_COPIED = re.compile(r"(^|/)\.|\.orbax-checkpoint-tmp|/$")

# The modification time in ns and the size of each file of a workdir, by its name there.
_Files = dict[str, tuple[int, int]]


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
def fetched(place: Place, with_checkpoints: bool = True, lock_record: str = "") -> Iterator[Path]:
    """Open the workdir of a run for reading; that of a URL is a copy, deleted at the end.

    Error messages name the URL in place of the copy. Changes of the copy are uploaded if the lock
    of the URL contains `lock_record`, which must not be empty.
    """
    if isinstance(place, Path):
        yield place
        return
    above = Path(tempfile.mkdtemp(prefix="kd_ranker-"))
    stop = threading.Event()
    uploads = None
    folder = above / place.rpartition("/")[2]
    folder.mkdir()
    try:
        with _reaching(place) as store:
            stored = _download(store, folder, with_checkpoints)
        if lock_record:
            upload = functools.partial(_upload, store, folder, stored, lock_record)
            uploads = ThreadPoolExecutor().submit(_repeat, upload, stop, place)
        yield folder
    except UserError as error:
        raise UserError(str(error).replace(str(folder), place)) from error
    finally:
        with deferred():
            stop.set()
            lost = uploads.exception() if uploads else None  # once the last upload has ended
            if not lost:
                shutil.rmtree(above, ignore_errors=True)
        if lost:
            raise UserError(
                f"{place} lacks the last results of this run ({short(lost)}); copy them from "
                f"{folder}, or start the same command again, which resumes from what is there"
            ) from lost


@contextlib.contextmanager
def owned(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """Open the workdir of a run for writing; UserError if another process holds it.

    If the last upload to a URL fails, the error names the local copy, which stays.
    """
    if isinstance(place, Path):
        with first_holds(place, lock.hold(place)):
            yield place
        return
    record = f"{lock.this_process()} ({uuid.uuid4().hex})"
    with _reaching(place) as store:
        # Some stores, such as Azure's, ignore the mode: the lock is read before and after.
        with contextlib.suppress(FileExistsError):
            if not _holder(store):
                store.pipe_file(lock.FILE, record.encode(), mode="create")
        holder = _holder(store)
    if holder != record:
        raise UserError(
            f"{place} is held by {holder.partition(' (')[0] or 'another process'}; wait for its "
            "end, or, if it was killed, add --break_lock"
        )
    try:
        with fetched(place, with_checkpoints, record) as folder:
            yield folder
    finally:
        with contextlib.suppress(Exception):  # --break_lock removes one that stays
            if _holder(store) == record:
                store.rm_file(lock.FILE)


def break_lock(place: Place) -> None:
    """Remove the locks at and below a URL, which killed processes leave; none stays in a folder."""
    if not isinstance(place, Path):
        with _reaching(place) as store:
            for name in store.find(""):
                if name.rpartition("/")[2] == lock.FILE:
                    store.rm_file(name)


def _holder(store: DirFileSystem) -> str:
    """Return the content of the lock, or "" without one."""
    try:
        return store.cat_file(lock.FILE).decode(errors="replace")
    except FileNotFoundError:
        return ""


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
        raise UserError(f"{url} cannot be reached: {short(error)}; {remedy}") from error


def _download(store: DirFileSystem, folder: Path, with_checkpoints: bool) -> _Files:
    """Download the files of a store, without checkpoints that are not complete.

    Return the files there: an upload deletes those of incomplete checkpoints, which are gone here.
    """
    names = [name for name in store.find("") if not _NOT_COPIED.search(name)]
    if not with_checkpoints:
        names = [name for name in names if _CHECKPOINTS not in f"/{name}"]
    for name in names:  # not every store makes folders here
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    store.get(names, [str(folder / name) for name in names])
    for checkpoint in [*folder.rglob(f"{checkpoints.FOLDER}/*")]:
        if checkpoint.is_dir() and not (checkpoint / checkpoints.RECORD).exists():
            shutil.rmtree(checkpoint)
    return dict.fromkeys(names, (0, 0)) | _files(folder)


def _files(folder: Path) -> _Files:
    """Return the files of a local copy that are uploaded."""
    files = {}
    # Orbax may rename or delete a folder meanwhile, which `rglob` would not survive.
    for above, _, names in os.walk(folder):
        for path in map(Path(above).joinpath, names):
            name = path.relative_to(folder).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if not _NOT_COPIED.search(name):
                    files[name] = (path.stat().st_mtime_ns, path.stat().st_size)
    return files


def _repeat(upload: Callable[[], None], stop: threading.Event, url: str) -> None:
    """Upload changes every few seconds, and once after `stop` is set; warn of the first failure."""
    warn = logging.warning
    while not stop.wait(_SECONDS_BETWEEN_UPLOADS):
        try:
            upload()
        except Exception as error:
            with tqdm.external_write_mode():
                warn("%s cannot be written (%s); retrying", url, short(error))
            warn = logging.debug
    upload()


def _upload(store: DirFileSystem, folder: Path, stored: _Files, record: str) -> None:
    """Upload the files that changed, and delete those that are gone here, if the lock holds.

    `stored` are the files at the URL, which are updated.
    """
    files = _files(folder)
    changed = [name for name, version in files.items() if version != stored.get(name)]
    gone = stored.keys() - files.keys()
    if (changed or gone) and (holder := _holder(store)) != record:
        raise UserError(f"its lock was broken, and is that of {holder or 'no process'}")
    for name in sorted(changed, key=functools.partial(_upload_order, files)):
        with contextlib.suppress(FileNotFoundError):  # of a checkpoint that was just retired
            store.put_file(str(folder / name), name)
            stored[name] = files[name]
    for name in gone:
        with contextlib.suppress(FileNotFoundError):
            store.rm_file(name)
        del stored[name]


def _upload_order(files: _Files, name: str) -> tuple[bool, bool, tuple[int, int]]:
    """Checkpoints come last, and their records after all of their other files."""
    return _CHECKPOINTS in f"/{name}", _RECORD in name, files[name]
