"""Folders at URLs, in the stores that fsspec knows: opened, and held by one process at a time.

A lock is an object with the record of who holds the folder, made only where there is none, and
written anew every few seconds as a sign of life. One without it for some minutes is taken over, as
is one whose process was here and has ended.
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
from absl import logging

from kd_ranker.errors import UserError
from kd_ranker.requests import lock
from kd_ranker.training.processes import are_several

# Seconds between two signs of life of who holds a folder, and after how many without one it counts
# as dead. One that is silent by its clock, which may not be this machine's, is watched for some of
# the first all the same.
BEAT, SILENCE, _BEATS_TO_WATCH = 10.0, 120.0, 3


class Store(NamedTuple):
    """A folder elsewhere: its URL, and the file system with its path there."""

    url: str
    system: Any
    root: str

    def path(self, name: str) -> str:
        """The path of a file in the folder."""
        return f"{self.root}/{name}"

    def make_parents(self, names: Sequence[str]) -> None:
        """Makes the folders of files, where there is such a thing."""
        # Those that are spoken to asynchronously keep objects, and have no folders.
        if not self.system.async_impl:
            for folder in {self.path(name).rpartition("/")[0] for name in names}:
                self.system.makedirs(folder, exist_ok=True)

    def write(self, name: str, content: bytes, mode: str = "overwrite") -> None:
        """Writes a file; in the mode "create", FileExistsError if there is one."""
        self.make_parents([name])
        self.system.pipe_file(self.path(name), content, mode=mode)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.path(name))


def open_store(url: str) -> Store:
    """The folder at a URL, of which nothing is known yet.

    Raises:
      UserError: there is no such store, or a package for it is missing; or this process is one of
        several that train as one.
    """
    if are_several():
        raise UserError(
            f"{url}: several processes (parallel.processes=True) share a folder; name a mounted "
            "one that all of them see"
        )
    try:
        return Store(url, *fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise UserError(
            f"{url}: a package for {url.partition('://')[0]}:// is missing; install the extra "
            f"`remote`, which has those for gs:// and s3:// ({error})"
        ) from error
    except Exception as error:
        raise UserError(f"{url} cannot be opened: {told(error)}") from error


@contextlib.contextmanager
def reaching(store: Store) -> Iterator[None]:
    """Turns what a store says of a URL that is of no use into a line for people."""
    try:
        yield
    except UserError:
        raise
    # Stores raise errors of many kinds: no credentials, no bucket, refused access, no network.
    except Exception as error:
        raise UserError(
            f"{store.url} cannot be reached: {told(error)}; see that its bucket is there, and "
            "that this machine may read and write it"
        ) from error


def told(error: Exception) -> str:
    """An error of a store in a few words."""
    text = textwrap.shorten(str(error), 200)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclasses.dataclass
class Claim:
    """A lock at a URL: an object that says who holds it, written anew as a sign of life.

    Attributes:
      store: the folder at the URL.
      record: who holds it.
      seen: when it was last known to be of this process, in seconds.
      lost: who has taken it over, if anyone has, as a line.
      gone: whether it is lost, and to nobody that can be seen.
    """

    store: Store
    record: dict[str, Any]
    seen: float = 0.0
    lost: str = ""
    gone: bool = False

    def renew(self) -> None:
        """Gives a sign of life; raises UserError if another process has taken the lock over."""
        found = _read(self.store, lock.FILE)
        if found is None or found["id"] != self.record["id"]:
            self.gone = found is None
            how = (
                f"was taken over by {lock.who(found)}, as nothing was heard of this process for "
                f"{SILENCE:g} seconds"
                if found
                else "has lost the lock of this process: what lay there was removed, or another "
                "one has taken it over and ended"
            )
            self.lost = (
                f"{self.store.url} {how}; this one ends, and has written nothing there since"
            )
            raise UserError(self.lost)
        _write(self.store, lock.FILE, self.record)
        self.seen = time.time()

    def check(self) -> None:
        """Raises UserError if the lock is lost, or may be."""
        if self.lost:
            raise UserError(self.lost)
        if time.time() - self.seen > SILENCE / 2:
            self.renew()

    def keep(self, stop: threading.Event) -> None:
        """Gives signs of life; where the lock is lost, it interrupts the main thread."""
        while not stop.wait(BEAT) and not self.lost:
            # A store that is out of reach comes back, or pushes tell of it.
            with contextlib.suppress(Exception):
                self.renew()
        if self.lost and not stop.is_set():
            _interrupt_main()


def _interrupt_main() -> None:
    """Interrupts the main thread, even where it waits for another one."""
    # What runs in the background of a shell ignores the first of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            # `_thread.interrupt_main` would be heard of once that wait is over.
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            return


@contextlib.contextmanager
def held(store: Store) -> Iterator[Claim]:
    """Holds a URL for this process alone; raises UserError if another one does."""
    claim = Claim(store, lock.own_record() | {"id": uuid.uuid4().hex})
    try:
        with reaching(store):
            _take(store, lock.FILE, claim.record)
            claim.seen = time.time()
        with in_background(claim.keep):
            yield claim
    finally:
        # One that stays is taken over later.
        with contextlib.suppress(Exception):
            _drop(store, lock.FILE, claim.record)


def _take(store: Store, name: str, record: Mapping[str, Any]) -> None:
    """Makes an object that holds `record`; of all that try at once, one alone does not raise."""
    watched: dict[str, Any] | None = None
    since = time.monotonic()
    while not _create(store, name, record):
        found = _read(store, name)
        if found is None:  # dropped meanwhile
            continue
        if found["id"] == record["id"]:  # made by what was sent and then sent again
            return
        alive = lock.is_alive(found)
        if alive or (watched and found != watched):
            raise UserError(f"{store.url} is held by {lock.who(found)}; wait for its end")
        patience = min(SILENCE, _BEATS_TO_WATCH * BEAT) if _is_old(found) else SILENCE
        if alive is None and time.monotonic() < since + patience:
            if watched is None:
                logging.warning(
                    "%s is held by %s, which cannot be looked for from here; it is taken over "
                    "unless there is a sign of life within %g seconds",
                    *(store.url, lock.who(found), patience),
                )
            watched = found
            time.sleep(BEAT / 4)
            continue
        # Another one may do the same, and hold a lock of its own there by now. So it is removed
        # under a second lock, which is of this record alone.
        removing = f"{name}-{hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]}"
        _take(store, removing, record)
        try:
            if _read(store, name) == found:
                logging.warning("%s is taken over from %s", store.url, lock.who(found))
                store.remove(name)
        finally:
            _drop(store, removing, record)


def _is_old(record: Mapping[str, Any]) -> bool:
    return time.time() - record["renewed"] > SILENCE


def _drop(store: Store, name: str, record: Mapping[str, Any]) -> None:
    found = _read(store, name)
    if found and found["id"] == record["id"]:
        store.remove(name)


def _create(store: Store, name: str, record: Mapping[str, Any]) -> bool:
    """Writes a record unless there is one, and says whether it did."""
    # The mode decides between two that come at once; some stores take no notice of it.
    if _read(store, name) is not None:
        return False
    try:
        _write(store, name, record, "create")
    except FileExistsError:
        return False
    return True


def _write(store: Store, name: str, record: Mapping[str, Any], mode: str = "overwrite") -> None:
    store.write(name, json.dumps({**record, "renewed": time.time()}).encode(), mode)


def _read(store: Store, name: str) -> dict[str, Any] | None:
    """The record of a lock; None if there is none."""
    try:
        return json.loads(store.system.cat_file(store.path(name)))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Does some work in a thread, and tells it to end at the end."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=[stop], daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
