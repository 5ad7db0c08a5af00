"""Orbax checkpoints of a run: its state, whose that is, a checksum, and the loader's position.

A checkpoint is written by a thread of its own, from a copy of the state on the host, while the
training goes on. It is renamed when it is whole, and sealed: the checksums of its files are added.
One whose files are not as they were written, that cannot be read back, or whose checksum is not
that of its contents, is reported and moved out of the way, and the one before it is used. A whole
one that belongs to another run is left where it is, and never used; so is one whose files are as
they were written, and that what is installed now cannot read.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from kd_ranker.errors import UserError
from kd_ranker.training.processes import first_without, index, is_first, on_first
from kd_ranker.training.workdir import ENVIRONMENT_FILE, Identity, write_whole

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
SEAL = "files.json"  # beside a checkpoint's own files: the CRC-32 of each
_KEEP = 3
# What a checkpoint takes on a disk: at most as much more than its state, and so many bytes.
_MORE_THAN_STATE, _BESIDE_STATE = 1.1, 2**18


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of a workdir, and the writing of the next one.

    Attributes:
      manager: Orbax's, which this process shares with no other.
      thread: writes one checkpoint after the other.
      writing: the one that may not be whole yet.
    """

    manager: ocp.CheckpointManager
    thread: ThreadPoolExecutor
    writing: Future[None] | None = None

    def folder(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return Path(self.manager.directory) / str(step)

    def wait(self) -> None:
        """Waits until all of them are whole, and raises what has kept one from being written."""
        writing, self.writing = self.writing, None
        on_first(lambda: None if writing is None else writing.result())


@contextlib.contextmanager
def open_in(workdir: Path) -> Iterator[Checkpoints]:
    """The checkpoints of a workdir; on leaving, all of them are whole and sealed."""
    folder, mine = (workdir / FOLDER).absolute(), index()
    on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP,
        create=False,
        enable_async_checkpointing=False,
        # Of several processes the first writes. Orbax would have all wait for each other by what
        # their devices compute, in which a thread must not get between the steps.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=str(mine)
        ),
    )
    manager = ocp.CheckpointManager(folder, options=options)
    with manager, ThreadPoolExecutor(1, thread_name_prefix="checkpoints") as thread:
        checkpoints = Checkpoints(manager, thread)
        yield checkpoints
        checkpoints.wait()
        on_first(lambda: _seal(manager))


def _seal(manager: ocp.CheckpointManager) -> None:
    """Adds to new checkpoints the checksums of their files.

    An older one without them is the rest of one that was being removed.
    """
    folders = [Path(manager.directory, str(step)) for step in sorted(manager.all_steps())]
    while folders and not (folders[-1] / SEAL).exists():
        directory = folders.pop()
        write_whole(directory / SEAL, json.dumps(_file_checksums(directory)))


def _file_checksums(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): zlib.crc32(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != SEAL
    }


def _fault_of(directory: Path) -> str:
    """The fault of the files of a checkpoint; "" if they are as they were written.

    Orbax would find out as well, but not without printing pages of traces.
    """
    seal = directory / SEAL
    if not seal.exists():
        # Killed after the checkpoint was whole and before it was sealed, or its files are gone.
        return "" if any(directory.iterdir()) else "its folder is empty"
    found = _file_checksums(directory)
    try:
        expected = json.loads(seal.read_text()).items()
    except ValueError as error:
        return f"its file {SEAL} is damaged: {error}"
    for name, crc32 in expected:
        if name not in found:
            return f"its file {name} is missing"
        if found[name] != crc32:
            return f"its file {name} is not as it was written"
    return ""


def checksum(state: Any) -> int:
    """A CRC-32 over the bytes of all leaves, in the order of the tree."""
    total = 0
    for leaf in jax.tree.leaves(state):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total


def _sizes(state: Any) -> str:
    """The types and shapes of all leaves, in the order of the tree."""
    return " ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(state))


def check_room(workdir: Path, state: Any) -> None:
    """Raises UserError unless the disk has room for one more checkpoint of a state.

    A disk may be full all the same by the time that it is written.
    """
    leaves = jax.tree.leaves(state)
    needed = int(_MORE_THAN_STATE * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
    needed, free = needed + _BESIDE_STATE, on_first(lambda: shutil.disk_usage(workdir).free)
    if free < needed:
        raise UserError(
            f"the disk of {workdir} has {free / 1e6:,.1f} MB free, and the next checkpoint needs "
            f"{needed / 1e6:,.1f} MB; free some, and the same command goes on from what is saved"
        )


def remove_unfinished(checkpoints: Checkpoints) -> None:
    """Removes what killed runs have left half-written, which may be of a step that none comes by.

    For the one process alone that writes there.
    """

    def remove() -> None:
        for left in Path(checkpoints.manager.directory).glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left)

    on_first(remove)


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    batches: grain.DatasetIterator | None,
    identity: Identity,
) -> None:
    """Starts saving, once the checkpoint before is whole.

    As soon as this returns, `state` may be donated: what is written is a copy of it, which takes up
    the host's memory until then.

    Raises:
      UserError: the disk has no room for it.
      OSError: the one before could not be written.
    """
    checkpoints.wait()
    check_room(Path(checkpoints.manager.directory), state)
    if not is_first():
        return
    # On CPU the host may share the device's buffer, which the next step donates; so copy.
    host_state = jax.tree.map(np.array, jax.device_get(state))
    record = {
        "sizes": _sizes(host_state),
        "identity": dict(identity),
        "batches": batches.get_state() if batches is not None else None,
    }
    checkpoints.writing = checkpoints.thread.submit(
        _write, checkpoints.manager, step, host_state, record
    )


def _write(manager: ocp.CheckpointManager, step: int, state: Any, record: dict[str, Any]) -> None:
    items = {
        "state": ocp.args.StandardSave(state),
        "checksum": ocp.args.JsonSave(record | {"crc32": checksum(state)}),
    }
    manager.save(step, args=ocp.args.Composite(**items))
    _seal(manager)


class _DamagedError(ValueError):
    """A checkpoint is not what was written."""


def restore(
    checkpoints: Checkpoints,
    state: Any,
    batches: grain.DatasetIterator | None,
    identity: Identity,
) -> tuple[Any, int]:
    """The newest state that can be read, and its step; `state` as given and 0 if there is none.

    Args:
      checkpoints: those of the workdir.
      state: a state of the same shapes, or what `jax.eval_shape` says of one.
      batches: the iterator to move to the position that was saved; None leaves it out.
      identity: what the checkpoints must have been saved with.

    Raises:
      UserError: the checkpoints are whole, and of another model or another run, or not to be read
        by what is installed.
    """
    # Another host may have an older list of the folder at hand.
    for step in on_first(lambda: sorted(checkpoints.manager.all_steps(), reverse=True)):
        directory, read, fault = checkpoints.folder(step), None, None
        try:
            read = _read(checkpoints, step, state, identity, goes_on=batches is not None)
        except (UserError, MemoryError, PermissionError):
            raise  # which says nothing of the checkpoint
        except Exception as error:
            fault = error
        _check_alike(directory, fault)
        if fault:
            _reject(checkpoints, step, fault)
        elif read:
            restored, record = read
            if batches is not None:
                batches.set_state(record["batches"])
            return restored, step
    return state, 0


def _read(
    checkpoints: Checkpoints, step: int, state: Any, identity: Identity, *, goes_on: bool
) -> tuple[Any, Mapping[str, Any]]:
    """The state of a checkpoint, and its record; raises what keeps it from being used."""
    directory, manager = checkpoints.folder(step), checkpoints.manager
    if fault := on_first(functools.partial(_fault_of, directory)):
        raise _DamagedError(fault)
    # Before the rest, which cannot be read if it is another's.
    checks = ocp.args.Composite(checksum=ocp.args.JsonRestore())
    record = manager.restore(step, args=checks).checksum
    _check_owner(directory, record, _sizes(state), identity)
    if goes_on and "batches" not in record:
        raise UserError(
            f"{directory} is of an older release, from which no run can go on; use another "
            f"--workdir, or remove {directory.parent} to train anew"
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    restored = manager.restore(step, args=items).state
    if record["crc32"] != checksum(restored):
        raise _DamagedError("its contents do not match its checksum")
    return restored, record


def _check_alike(directory: Path, fault: Exception | None) -> None:
    """Raises UserError where some of several processes have read a checkpoint, and others not."""
    without = first_without(fault is None)
    if without is not None and first_without(fault is not None) is not None:
        why = f" ({_reason(fault)})" if fault else ""
        raise UserError(
            f"process {without} cannot read {directory}, and another one can{why}; see that all "
            "see the same files"
        )


def _reject(checkpoints: Checkpoints, step: int, fault: Exception) -> None:
    """Sets a damaged checkpoint aside; raises UserError for one that is as it was written."""
    directory = checkpoints.folder(step)
    if on_first((directory / SEAL).exists) and not isinstance(fault, _DamagedError):
        raise UserError(
            f"{directory} is as it was written, and cannot be read back ({_reason(fault)}); "
            f"install the packages that {ENVIRONMENT_FILE} names, or remove {directory.parent} "
            "to train anew"
        ) from fault
    _set_aside(checkpoints, step, fault)


def recorded_identity(workdir: Path) -> Identity:
    """The identity that a workdir's newest checkpoint was saved with; {} if none can be read.

    It is for what of an identity cannot be known otherwise: `restore` compares the rest.
    """
    with open_in(workdir) as checkpoints:
        for step in sorted(checkpoints.manager.all_steps(), reverse=True):
            args = ocp.args.Composite(checksum=ocp.args.JsonRestore())
            # Any kind of error may come of a damaged one, which `restore` reports.
            with contextlib.suppress(Exception):
                return checkpoints.manager.restore(step, args=args).checksum["identity"]
    return {}


def _check_owner(
    directory: Path, record: Mapping[str, Any], sizes: str, identity: Identity
) -> None:
    """Raises UserError if a whole checkpoint is not of these sizes and this identity."""
    there = record.get("identity")
    differing = "" if there is None else differences(there, identity)
    remedy = f"use another --workdir, or remove {directory.parent} to train anew"
    if there is None:
        fault = "does not say whose it is, so it is of an older release"
        raise UserError(f"{directory} {fault}; {remedy}")
    if record["sizes"] != sizes:
        fault = "holds a model of other sizes than the config asks for"
        details = f": {differing}" if differing else ""
        raise UserError(f"{directory} {fault}{details}; name another workdir")
    if differing:
        raise UserError(f"{directory} belongs to another run: {differing}; {remedy}")


def differences(there: Identity, here: Identity) -> str:
    """The parts in which two identities differ, in one line; "" if they are the same."""
    return ", ".join(
        f"{part} ({_shown(there.get(part, ''), here.get(part, ''))})"
        for part in (*here, *(there.keys() - here.keys()))
        if there.get(part) != here.get(part)
    )


def _shown(there: str, here: str) -> str:
    """Two lists of names, without those that they share unless they differ in their order alone."""
    names, others = there.split(", "), here.split(", ")
    if set(names) == set(others):
        return f"{there} there, {here} now"
    more = ", ".join(name for name in names if name not in others)
    others_more = ", ".join(name for name in others if name not in names)
    return f"{more or 'no other'} there, {others_more or 'no other'} now"


def _reason(error: Exception) -> str:
    # What lies below the storage reports its whole configuration along with the fault.
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _set_aside(checkpoints: Checkpoints, step: int, error: Exception) -> None:
    """Moves a damaged checkpoint away, so that its step can be saved again and nothing is lost."""
    manager, source = checkpoints.manager, checkpoints.folder(step)

    def move() -> Path:
        aside = source.parent.parent / DAMAGED_FOLDER
        aside.mkdir(exist_ok=True)
        target = aside / str(step)
        while target.exists():
            target = target.with_name(target.name + "_again")
        source.rename(target)
        return target

    target = on_first(move)
    manager.reload()
    logging.warning(
        "checkpoint %s is damaged (%s); it lies in %s now, and the run goes on from %s",
        source,
        _reason(error),
        target,
        f"step {left[-1]}" if (left := sorted(manager.all_steps())) else "its start",
    )
