"""Several processes, on one host or many, that train as one.

All run the same program. Their devices form one mesh, and the results on it do not depend on the
number of processes. Each process reads only its own requests. Process 0 writes all files and output
and makes every decision that depends on a clock or a disk. The others follow it and print nothing.
"""

import contextlib
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kd_ranker.errors import UserError

_Result = TypeVar("_Result")

_SECONDS_TO_END = 10  # for processes that end together


def start() -> None:
    """Join the processes of a run, before JAX has looked for devices.

    Their number, the index of this one and the address of process 0 come from Slurm, Open MPI,
    Kubernetes or a pod of TPUs, or else from the variables JAX_COORDINATOR_ADDRESS (host and port),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. If the others do not join in time, JAX ends this process.

    Raises:
      UserError: no scheduler or variable defines the processes.
    """
    # This service would take the signals to end a command; `loop.fit` agrees on these by itself.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX reads the address itself.
    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    arguments: Any = {}
    for argument, variable in variables.items():
        if variable in os.environ:
            arguments[argument] = int(os.environ[variable])
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise UserError(
            "parallel.processes=True, and neither Slurm, Open MPI nor a pod defines their number; "
            "set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each "
            f"({error})"
        ) from error


def index() -> int:
    """Return the index of this process; 0 if it is the only one."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Return True for the process that writes files and output."""
    return index() == 0


def are_distributed() -> bool:
    """Return True once `start` has joined several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_first(function: Callable[[], _Result]) -> _Result:
    """Return the result of `function` on process 0 to all, called once all reach this point.

    Raises:
      UserError: `function` raised on process 0. Process 0 itself raises the original error.
    """
    if not are_distributed():
        return function()
    multihost_utils.sync_global_devices("on_first")
    result: Any = None
    fault: Exception | None = None
    message = ""
    if is_first():
        try:
            result = function()
        except Exception as error:
            fault = error
            message = str(error)
    content = np.frombuffer(pickle.dumps((result, message)), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int64(content.size)))
    received = multihost_utils.broadcast_one_to_all(np.resize(content, length))
    result, message = pickle.loads(received.tobytes())
    if fault:
        raise fault
    if message:
        raise UserError(message)
    return result


@contextlib.contextmanager
def first_holds(folder: Path, hold: contextlib.AbstractContextManager) -> Iterator[None]:
    """Hold a folder for all processes; process 0 acquires it.

    Raises:
      UserError: another run holds it, or the processes do not share it.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(hold))
        if are_distributed():
            token = folder / f".shared.{on_first(lambda: uuid.uuid4().hex)}"
            on_first(token.touch)
            without = first_without(token.exists())
            on_first(token.unlink)
            if without is not None:
                raise UserError(
                    f"process {without} does not see what process 0 writes to {folder}; give a "
                    "--workdir that all share"
                )
        yield


def first_without(holds: bool) -> int | None:
    """Return, on all processes, the first one with a false value; None if all are true."""
    if not are_distributed():
        return None if holds else 0
    values = multihost_utils.process_allgather(np.array(holds))
    return None if values.all() else int(np.argmin(values))


def check_same(name: str, text: str) -> None:
    """Raise UserError with this name on all processes if a text differs from process 0's."""
    other = first_without(on_first(lambda: text) == text)
    if other is not None:
        raise UserError(f"process {other} has another {name} than process 0; start all alike")


def ends_with_all() -> bool:
    """Wait at a barrier; return True if all processes arrive, as after a common failure."""
    if not are_distributed():
        return True
    # Imported here, as it takes seconds. JAX's own barriers need the devices, which other processes
    # may be using.
    import orbax.checkpoint as ocp

    wait_at_barrier = ocp.multihost.get_barrier_sync_fn()
    try:
        wait_at_barrier(key="kd_ranker ends", timeout_ms=1000 * _SECONDS_TO_END)
    except jax.errors.JaxRuntimeError:
        return False
    if is_first():
        # Process 0 hosts the barrier, and the others need time to leave it.
        time.sleep(1)
    return True
