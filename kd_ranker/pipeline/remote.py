"""Workdirs at a URL that fsspec knows, as gs://bucket/run: a command works in a mirror of one.

The mirror is a folder of this machine. It starts as what lies at the URL; a thread sends there what
has changed, every few seconds and once more at the end. Whatever holds for a folder holds for it,
so nothing but this file and the commands, which say whose folder it is, knows of URLs.

What lies at the URL is at any moment what a run can go on from, as after a kill: files are sent in
the order in which they were last written, a checkpoint once it is sealed and its seal last, and
nothing that is only on its way.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import LogRecord
from pathlib import Path

from absl import logging
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.pipeline.stores import Claim, Store, held, in_background, open_store, reaching, told
from kd_ranker.requests import lock
from kd_ranker.training import checkpoints
from kd_ranker.training.interruption import until_interrupted
from kd_ranker.training.processes import first_holds
from kd_ranker.training.workdir import METRICS_FILE

# A folder of this machine, or the URL of one elsewhere.
Place = Path | str

# Seconds between two pushes, and how long the last one is tried for.
_EVERY, _AT_LAST = 5.0, 60.0
# What the name of a mirror's folder below the one for temporary files starts with.
_MIRROR = "kd_ranker-mirror-"
# The name of a file in the folder of a checkpoint: that folder, its parent, the step.
_OF_CHECKPOINT = re.compile(rf"(((?:.*/)?){checkpoints.FOLDER}/([^/]*))/.*")

# What training adds lines to, see `training.workdir.MetricsWriter`.
_GROWING = (METRICS_FILE, "events.out.tfevents")

# When a file was last written in nanoseconds, its size and its number.
_Version = tuple[int, int, int]


def place_of(text: str | os.PathLike[str]) -> Place:
    """The place that a flag or a config names; no shell puts the home folder for ~ behind a =."""
    text = os.fspath(text)
    return re.sub(r"(?<=[^/:])/+$", "", text) if "://" in text else Path(text).expanduser()


def below(place: Place, name: str) -> Place:
    """The folder of this name in a place."""
    return place / name if isinstance(place, Path) else f"{place}/{name}"


def local_folder(
    flag: str, text: str | os.PathLike[str], needs: str = "writes to a folder of this machine"
) -> Path:
    """The folder that a flag names, where no URL will do, as it `needs` say.

    Raises:
      UserError: it is a URL.
    """
    place = place_of(text)
    if isinstance(place, Path):
        return place
    raise UserError(f"{flag}={place}: it {needs}; name one, on a disk or mounted")


@contextlib.contextmanager
def fetched(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """The folder of a run that is only read: of one elsewhere, a copy that goes away at the end.

    Raises:
      UserError: the URL cannot be reached.
    """
    if isinstance(place, Path):
        yield place
        return
    with _mirror(open_store(place)) as mirror:
        mirror.fetch(with_checkpoints)
        yield mirror.folder


@contextlib.contextmanager
def owned(place: Place, with_checkpoints: bool = True) -> Iterator[Path]:
    """The folder of a run that this process alone may write to, as long as this lasts.

    What could not be sent in the end stays in the mirror, and a line says where that is. So does
    all where the lock has vanished, as with its bucket.

    Raises:
      UserError: another process holds the place or has taken it over, it cannot be reached, or
        the last push fails.
    """
    if isinstance(place, Path):
        with first_holds(place, lock.hold(place)):
            yield place
        return
    store = open_store(place)
    with held(store) as claim, _mirror(store) as mirror:
        mirror.fetch(with_checkpoints)
        with _pushing(mirror, claim):
            yield mirror.folder


@dataclasses.dataclass
class _Mirror:
    """A folder of this machine, and how far its files lie at the URL.

    Attributes:
      store: the folder at the URL.
      folder: the one here.
      there: the names of the files that lie there, each with the version of that here, if any.
      fault: a line on what could not be sent, for which the folder here is to stay.
    """

    store: Store
    folder: Path
    there: dict[str, _Version | None] = dataclasses.field(default_factory=dict)
    fault: str = ""

    def fetch(self, with_checkpoints: bool) -> None:
        """Copies what lies at the URL, but for checkpoints that are not whole."""
        with reaching(self.store):
            self.store.system.invalidate_cache()
            paths = self.store.system.find(self.store.root)
            found = {path.removeprefix(self.store.root).strip("/") for path in paths}
            names = [
                name
                for name in sorted(found)
                if name and not _is_temporary(name) and (with_checkpoints or not _seal_of(name))
            ]
            there = {"", *names}
            wanted = [name for name in names if _seal_of(name) in there]
            for name in wanted:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.store.system.get(*self._both(wanted))
            # What has been left out is removed there with the first push.
            self.there = dict.fromkeys(names) | self._versions()

    def push(self, check: Callable[[], None]) -> None:
        """Sends what has changed, in an order in which it could have been written.

        Args:
          check: raises UserError if this process may not send any more; called before each file,
            or checkpoint, and once at least.
        """
        check()
        here = self._versions()
        for part in _parts(here, self.there):
            check()
            try:
                self._send(part, here)
            except FileNotFoundError:
                # What is gone here by now is no fault.
                if all((self.folder / name).exists() for name in part):
                    raise
        gone = self.there.keys() - here.keys()
        # Seals first: of a checkpoint without one, nobody takes what is left.
        for name in sorted(gone, key=lambda name: (name != _seal_of(name), name)):
            check()
            self.store.remove(name)
            del self.there[name]

    def _send(self, names: Sequence[str], here: Mapping[str, _Version]) -> None:
        """Sends the files of a checkpoint, its seal last, or a single file."""
        *files, last = names
        if files:
            # What lies there is of no use from now on, until its seal is there again.
            self.store.remove(last)
            self.there.pop(last, None)
            self.store.make_parents(files)
            # Should it be gone here before all are sent, those that were are removed again.
            self.there |= dict.fromkeys(files)
            self.store.system.put(*reversed(self._both(files)))
        # Whole as it is now: some files grow.
        self.store.write(last, (self.folder / last).read_bytes())
        self.there |= {name: here[name] for name in names}

    def _both(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """The paths of files there, and here."""
        return [self.store.path(of) for of in names], [str(self.folder / of) for of in names]

    def _versions(self) -> dict[str, _Version]:
        """The files here that may be sent, each with its version."""
        found = {}
        for folder, _, names in os.walk(self.folder):
            for path in (Path(folder, name) for name in names):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if not _is_temporary(name):
                        found[name] = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = {"", *found}
        return {name: of for name, of in found.items() if _seal_of(name) in known}


def _is_temporary(name: str) -> bool:
    """True of a file, or the folder that it lies in, that is only on its way, and of locks."""
    of_checkpoint = _OF_CHECKPOINT.fullmatch(name)
    hidden = any(part.startswith(".") for part in name.split("/"))
    # Orbax renames a folder to its step once it is whole.
    return hidden or bool(of_checkpoint and not of_checkpoint[3].isdecimal())


def _seal_of(name: str) -> str:
    """The name of the seal of the checkpoint that a file is of; "" if it is of none."""
    of_checkpoint = _OF_CHECKPOINT.fullmatch(name)
    return f"{of_checkpoint[1]}/{checkpoints.SEAL}" if of_checkpoint else ""


def _parts(here: Mapping[str, _Version], there: Mapping[str, _Version | None]) -> list[list[str]]:
    """The changed files, those of a checkpoint together, in the order in which they are sent.

    That is the order in which they were last written. What grows by lines is sent before the
    checkpoints beside it: a run that goes on from one leaves out the lines that came later, but
    would miss those that came before.
    """
    parts: dict[str, set[str]] = {}
    for name in here:
        if here[name] != there.get(name):
            last = _seal_of(name) or name
            parts.setdefault(last, {last}).add(name)
    times = {last: here[last][0] for last in parts}
    for last in parts:
        if last.rpartition("/")[2].startswith(_GROWING):
            beside = f"{last.rpartition('/')[0]}/{checkpoints.FOLDER}/".lstrip("/")
            seals = [times[seal] for seal in parts if _seal_of(seal) and seal.startswith(beside)]
            times[last] = min([times[last], *seals])
    ordered = sorted(parts, key=lambda last: (times[last], bool(_seal_of(last))))
    return [sorted(parts[last], key=lambda name: (name == last, name)) for last in ordered]


@contextlib.contextmanager
def _mirror(store: Store) -> Iterator[_Mirror]:
    """An empty mirror, which goes away at the end; messages name the URL in its place."""
    _remove_abandoned()
    above = Path(tempfile.gettempdir(), f"{_MIRROR}{uuid.uuid4().hex}")
    mirror = _Mirror(store, above / store.url.rpartition("/")[2])

    def named(text: str) -> str:
        return text if mirror.fault else text.replace(str(mirror.folder), store.url)

    def rename(record: LogRecord) -> bool:
        record.msg, record.args = named(record.getMessage()), None
        return True

    log = logging.get_absl_logger()
    log.addFilter(rename)
    with lock.hold(above):
        above.chmod(0o700)
        try:
            mirror.folder.mkdir()
            yield mirror
        except UserError as error:
            raise UserError(named(str(error))) from error
        finally:
            log.removeFilter(rename)
            if not mirror.fault:
                shutil.rmtree(above, ignore_errors=True)


def _remove_abandoned() -> None:
    """Removes the mirrors of processes that were killed here: they may hold many checkpoints."""
    for file in Path(tempfile.gettempdir()).glob(f"{_MIRROR}*/{lock.FILE}"):
        # Others do the same, and what another user has left is not ours.
        with contextlib.suppress(OSError, ValueError, UserError):
            if lock.is_alive(json.loads(file.read_text())) is False:
                with lock.hold(file.parent):
                    shutil.rmtree(file.parent)


@contextlib.contextmanager
def _pushing(mirror: _Mirror, claim: Claim) -> Iterator[None]:
    """Has a thread push what changes, and pushes the rest at the end, however that comes."""
    try:
        try:
            with in_background(lambda stop: _push_often(mirror, claim, stop)):
                yield
        finally:
            until_interrupted(lambda _: _push_the_rest(mirror, claim))
    except BaseException:
        if mirror.fault and not claim.lost:  # that line is what is raised
            logging.warning("%s", mirror.fault)
        raise
    if mirror.fault:
        raise UserError(mirror.fault)


def _push_often(mirror: _Mirror, claim: Claim, stop: threading.Event) -> None:
    seconds, failing = 0.0, False
    # What takes long to send is sent less often.
    while not stop.wait(max(_EVERY, seconds)):
        since = time.monotonic()
        try:
            mirror.push(claim.check)
            failing = False
        except Exception as error:
            if claim.lost:
                return
            if not failing:
                with tqdm.external_write_mode():
                    logging.warning(
                        "%s cannot be written to (%s); it is tried again, and the command goes on",
                        *(mirror.store.url, told(error)),
                    )
            failing = True
        seconds = time.monotonic() - since


def _push_the_rest(mirror: _Mirror, claim: Claim) -> None:
    """Pushes for the last time, and tries for a while; what has failed is the mirror's fault."""
    last, wait = time.monotonic() + _AT_LAST, 1.0
    while True:
        try:
            return mirror.push(claim.check)
        except Exception as error:
            if claim.gone:
                # There may be no other copy.
                mirror.fault = (
                    f"{claim.lost}; what it has made lies in {mirror.folder}: copy that there, and "
                    "the same command goes on from it"
                )
                raise UserError(mirror.fault) from error
            if claim.lost:
                raise
            if time.monotonic() + wait > last:
                mirror.fault = (
                    f"{mirror.store.url} lacks the last of this run ({told(error)}), which lies "
                    f"in {mirror.folder}: copy that there, or leave it; the same command goes on "
                    "from what is there"
                )
                return None
        time.sleep(wait)
        wait *= 2
