"""Several processes, on one host or many, that train as one.

All run the same program. Their devices are one mesh, and what they compute on it is the same
whatever their number; each reads its own requests alone. Process 0 decides what a clock or a disk
decides, and writes all files. The others do as it says, and are silent.
"""

import contextlib
import os
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # for barriers that devices have no part in
from jax.experimental import multihost_utils

from kd_ranker.errors import UserError

_Result = TypeVar("_Result")

# For processes that start one after the other, and that end together.
_SECONDS_TO_START, _SECONDS_TO_END = 120, 10


def start(give_up: Callable[[UserError], object]) -> None:
    """Joins the processes of a run, before JAX has looked for devices.

    Their number, this one's place among them and the address of process 0 come from Slurm, Open
    MPI, Kubernetes or a pod of TPUs, or else from the variables JAX_COORDINATOR_ADDRESS (host and
    port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      give_up: ends this process, with what is wrong; called in a thread of its own where the others
        have not come in time, as JAX would wait on, and then end it with pages of a trace.

    Raises:
      UserError: nothing says who they are.
    """
    # It would take the signals that ask a command to end; `loop.fit` agrees on these by itself.
    jax.config.update("jax_enable_preemption_service", False)
    late = UserError(
        f"not all processes were there within {_SECONDS_TO_START} seconds, or process 0 could not "
        "be reached; start them together, and see that its address is that of its host"
    )
    timer = threading.Timer(_SECONDS_TO_START, give_up, [late])
    timer.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=2 * _SECONDS_TO_START, **_from_variables()
        )
    except ValueError as error:
        raise UserError(
            "parallel.processes=True, and neither Slurm, Open MPI nor a pod says of how many; set "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each "
            f"({error})"
        ) from error
    finally:
        timer.cancel()


def index() -> int:
    """The number of this process; 0 of the only one."""
    return distributed.global_state.process_id


def is_first() -> bool:
    """True for the process that writes and speaks."""
    return index() == 0


def are_several() -> bool:
    """True once `start` has joined several processes."""
    return (distributed.global_state.num_processes or 1) > 1


def on_first(function: Callable[[], _Result]) -> _Result:
    """The result of `function` on process 0, for all; it is called once all have come so far.

    Raises:
      UserError: it raised on process 0, where its own error is raised.
    """
    if not are_several():
        return function()
    multihost_utils.sync_global_devices("on_first")
    result, fault = None, None
    if is_first():
        try:
            result = function()
        except Exception as error:
            fault = error
    result, told = _broadcast((result, fault and str(fault)))
    if fault:
        raise fault
    if told:
        raise UserError(told)
    return result


def _broadcast(value: Any) -> Any:
    """The value of process 0, on all."""
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int64(content.size)))
    whole = np.zeros(length, np.uint8)
    whole[: content.size if is_first() else 0] = content if is_first() else 0
    return pickle.loads(multihost_utils.broadcast_one_to_all(whole).tobytes())


@contextlib.contextmanager
def first_holds(folder: Path, hold: contextlib.AbstractContextManager) -> Iterator[None]:
    """Holds a folder by process 0, for all.

    Raises:
      UserError: another run holds it, or the processes do not share it.
    """
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(hold))
        _check_shared(folder)
        yield


def _check_shared(folder: Path) -> None:
    if not are_several():
        return
    token = folder / f".shared.{on_first(lambda: uuid.uuid4().hex)}"
    on_first(token.touch)
    without = first_without(token.exists())
    on_first(token.unlink)
    if without is not None:
        raise UserError(
            f"process {without} does not see what process 0 writes to {folder}; give a --workdir "
            "that all share"
        )


def first_without(holds: bool) -> int | None:
    """The first process for which something does not hold, told to all; None if there is none."""
    if not are_several():
        return None if holds else 0
    of_all = multihost_utils.process_allgather(np.array(holds))
    return None if of_all.all() else int(np.argmin(of_all))


def check_same(what: str, text: str) -> None:
    """Raises UserError on all processes if one has another text than process 0; `what` names it."""
    if not are_several():
        return
    other = first_without(on_first(lambda: text) == text)
    if other is not None:
        raise UserError(f"process {other} has another {what} than process 0; start all alike")


def ends_with_all() -> bool:
    """True if all processes come here soon, as they do when all meet the same fault."""
    client = distributed.global_state.client
    if client is None:
        return True
    try:
        client.wait_at_barrier("kd_ranker ends", 1000 * _SECONDS_TO_END)
    except jax.errors.JaxRuntimeError:
        return False
    if is_first():
        # The barrier is here, and the others have to hear of it.
        time.sleep(1)
    return True


def _from_variables() -> dict[str, Any]:
    """The number of processes and this one's, where variables say so; JAX reads the address."""
    named = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {key: int(os.environ[name]) for key, name in named.items() if name in os.environ}
