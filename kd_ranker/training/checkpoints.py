"""Orbax checkpoints of a run.

A checkpoint contains the states of all stacks, and a record: the step, the provenance of the run,
and the position of the loader. With early stopping it also has the best states so far. Orbax writes
it from a copy on the host while training continues, and renames it when it is complete, so an
interrupted write leaves no checkpoint.
"""

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import grain
import jax
import orbax.checkpoint as ocp

from kd_ranker import manifest
from kd_ranker.errors import UserError
from kd_ranker.manifest import Provenance
from kd_ranker.training.processes import first_without, index, is_first, on_first
from kd_ranker.training.workdir import ENVIRONMENT_FILE

FOLDER = "checkpoints"  # of a workdir
RECORD = "record"  # the folder of the record in each checkpoint
_BEST = "best"  # that of the best states, and their key in the record
_KEEP = 3

# Orbax also raises the errors that it logs.
absl.logging.get_absl_logger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)


@contextlib.contextmanager
def open_in(workdir: Path, to_write: bool = False) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints of a workdir; on exit, all of them are complete.

    The run itself opens them `to_write`, which removes what an interrupted write left behind.
    UserError if one could not be written.
    """
    folder = (workdir / FOLDER).absolute()
    process = index()
    on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP,
        create=False,
        cleanup_tmp_directories=to_write and is_first(),
        # The first process writes for all. Orbax's barriers between processes would run on the
        # devices, from another thread, between the collectives of the steps.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
        ),
    )
    manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield manager
        with _one_line(manager):
            on_first(manager.wait_until_finished)
    finally:
        with _one_line(manager):
            manager.close()


@contextlib.contextmanager
def _one_line(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    """Turn the error of a failed write, whatever its type, into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"a checkpoint could not be written to {checkpoints.directory} ({_reason(error)}); "
            "check the disk, and start the same command again: it resumes from the previous "
            "checkpoint"
        ) from error


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: Any,
    batches: grain.DatasetIterator | None,
    provenance: Provenance,
    best: tuple[Any, Mapping[str, Any]] | None = None,
) -> None:
    """Start to save a checkpoint of a run with this provenance, after `step` steps.

    It has the position of `batches`, and the states and the record of `BestStates` if given. When
    this returns, `state`, a pytree of arrays, may be donated: Orbax writes a copy of it on the
    host. UserError if the previous one was not written.
    """
    with _one_line(checkpoints):
        on_first(checkpoints.wait_until_finished)
    if not is_first():
        return
    position = batches.get_state() if batches is not None else None
    record = {"step": step, "provenance": dict(provenance), "batches": position}
    items = {"state": ocp.args.StandardSave(jax.device_get(state))}
    if best:
        states, record[_BEST] = best
        items[_BEST] = ocp.args.StandardSave(states)
    items[RECORD] = ocp.args.JsonSave(record)
    with _one_line(checkpoints):
        if step in checkpoints.all_steps():  # one that could not be restored
            checkpoints.delete(step)
        checkpoints.save(step, args=ocp.args.Composite(**items), force=True)


def restore(
    checkpoints: ocp.CheckpointManager,
    state: Any,
    batches: grain.DatasetIterator | None,
    provenance: Provenance,
) -> tuple[Any, int]:
    """Restore the newest checkpoint that can be read, and warn of later ones.

    `state` has the same shapes and dtypes, maybe abstract; `batches`, if any, moves to the saved
    position. Return the state, on the host, and its step; `state` as given and 0 without any.

    Raises:
      UserError: the checkpoint is of a run with another provenance, or none can be read.
    """
    abstract = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    # Another host may have an older listing of the folder.
    steps = on_first(lambda: sorted(checkpoints.all_steps(), reverse=True))
    reason = ""
    for step in steps:
        place = checkpoints.directory / str(step)
        restored: Any = None
        record: dict[str, Any] = {}
        reason = "another process failed"
        try:
            items = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
            record = checkpoints.restore(step, args=items)[RECORD]
            if record["step"] != step:
                raise ValueError(f"it was saved at step {record['step']}")
            if differing := manifest.differences(record["provenance"], provenance):
                raise UserError(
                    f"{place} belongs to another run: {differing}; use another --workdir, or "
                    f"remove {checkpoints.directory} to train from the start"
                )
            items = ocp.args.Composite(state=abstract)
            restored = checkpoints.restore(step, args=items).state
        except (UserError, MemoryError, PermissionError):
            raise  # not the fault of the checkpoint
        except Exception as error:
            reason = _reason(error)
        all_restored = first_without(restored is not None) is None
        if all_restored:
            if batches is not None:
                batches.set_state(record["batches"])
            return restored, step
        absl.logging.warning(
            "%s cannot be restored: %s; the checkpoint before it is tried", place, reason
        )
    if steps:
        raise UserError(
            f"none of the checkpoints in {checkpoints.directory} can be restored ({reason}); "
            f"show all processes the same files, install the packages of {ENVIRONMENT_FILE}, or "
            "remove that folder to train from the start"
        )
    return state, 0


def restore_best(
    checkpoints: ocp.CheckpointManager, step: int, state: Any
) -> tuple[Any, Mapping[str, Any]] | None:
    """Return what `save` got as `best` at a step; None if it got none.

    `state` has the shapes and dtypes of the states. UserError if they cannot be read.
    """
    try:
        items = ocp.args.Composite(**{RECORD: ocp.args.JsonRestore()})
        record = checkpoints.restore(step, args=items)[RECORD]
        if _BEST not in record:
            return None
        abstract = ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        restored = checkpoints.restore(step, args=ocp.args.Composite(**{_BEST: abstract}))
    except (MemoryError, PermissionError):
        raise  # not the fault of the checkpoint
    except Exception as error:
        place = checkpoints.directory / str(step)
        raise UserError(
            f"the best states in {place} cannot be restored ({_reason(error)}); remove {place} to "
            "continue from the checkpoint before it"
        ) from error
    return restored[_BEST], record[_BEST]


def _reason(error: Exception) -> str:
    # TensorStore reports its whole configuration with the error.
    return textwrap.shorten(str(error) or type(error).__name__, 600)
