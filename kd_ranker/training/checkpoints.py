"""Orbax checkpoints of a run: its state, a checksum of it, and the loader's position.

A checkpoint is written beside the training and renamed when it is whole. One that cannot be read
back, or whose checksum is not that of its contents, is reported and moved out of the way, and the
one before it is used.
"""

import zlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
_KEEP = 3


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """The manager of a workdir's checkpoints; close it when done."""
    return ocp.CheckpointManager(
        (workdir / FOLDER).absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=True),
    )


def checksum(state: Any) -> int:
    """A CRC-32 over the bytes of all leaves, in the order of the tree."""
    total = 0
    for leaf in jax.tree.leaves(state):
        total = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), total)
    return total


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, batches: grain.DatasetIterator | None
) -> None:
    """Starts saving; `state` may be donated as soon as this returns."""
    # On CPU the host may share the device's buffer, which the next step donates; so copy.
    host_state = jax.tree.map(lambda leaf: np.array(leaf), state)
    items = {
        "state": ocp.args.StandardSave(host_state),
        "checksum": ocp.args.JsonSave({"crc32": checksum(host_state)}),
    }
    if batches is not None:
        items["batches"] = grain.checkpoint.CheckpointSave(batches)
    manager.save(step, args=ocp.args.Composite(**items))


def restore(
    manager: ocp.CheckpointManager, state: Any, batches: grain.DatasetIterator | None
) -> tuple[Any, int]:
    """The newest state that can be read, and its step; `state` as given and 0 if there is none.

    Args:
      manager: the workdir's manager.
      state: a state of the same shapes.
      batches: the iterator to move to the position that was saved; None leaves it out.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    for step in sorted(manager.all_steps(), reverse=True):
        items = {
            "state": ocp.args.StandardRestore(abstract),
            "checksum": ocp.args.JsonRestore(),
        }
        if batches is not None:
            items["batches"] = grain.checkpoint.CheckpointRestore(batches)
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**items))
            if restored.checksum["crc32"] != checksum(restored.state):
                raise ValueError("its contents do not match its checksum")
        except Exception as error:
            _set_aside(manager, step, error)
            continue
        return restored.state, step
    return state, 0


def _set_aside(manager: ocp.CheckpointManager, step: int, error: Exception) -> None:
    """Moves a damaged checkpoint away, so that its step can be saved again and nothing is lost."""
    source = Path(manager.directory) / str(step)
    aside = Path(manager.directory).parent / DAMAGED_FOLDER
    aside.mkdir(exist_ok=True)
    target = aside / str(step)
    while target.exists():
        target = target.with_name(target.name + "_again")
    source.rename(target)
    manager.reload()
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    logging.warning(
        "checkpoint %s is damaged (%s); it lies in %s now, and the one before it is used",
        source,
        reason,
        target,
    )
