"""Tasks on the machines of a cluster of Ray, an optional package."""

import functools
import importlib
import os
import runpy
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kd_ranker.compiled import keep_programs
from kd_ranker.errors import UserError, short
from kd_ranker.progress import counted

_SECONDS_TO_ANSWER = 10


def call_on_cluster(
    config: ConfigDict, function: Callable, calls: Sequence[tuple], description: str
) -> None:
    """Call a picklable function on a cluster, with a progress bar.

    All machines share the disk that it writes to, under the same paths, so a call that is repeated
    after its machine was lost resumes. A call that fails, or loses its machine more than
    `ray.retries` times, ends all of them by a UserError.
    """
    ray = _open(config.ray.address)
    try:
        _check_size(ray, config.ray.cpus, config.ray.gpus)
        remote = ray.remote(_call).options(
            num_cpus=config.ray.cpus,
            num_gpus=config.ray.gpus,
            max_retries=config.ray.retries,
            scheduling_strategy="SPREAD",
        )
        waiting = [remote.remote(Path.cwd(), config, function, arguments) for arguments in calls]
        for _ in counted(calls, description, unit="part"):
            (ended,), waiting = ray.wait(waiting, num_returns=1)
            ray.get(ended)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(f"{description} on the cluster: {error.cause}") from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{description}: a task lost its machine more than ray.retries={config.ray.retries} "
            "times; start the same command again: it resumes from what is saved"
        ) from error
    finally:
        ray.shutdown()


def _check_size(ray: Any, cpus: float, gpus: float) -> None:
    """Raise UserError unless a machine is large enough: a task would wait for one forever."""
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"] and resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus:
            return
    raise UserError(
        f"no machine of the cluster has ray.cpus={cpus:g} and ray.gpus={gpus:g}; choose fewer"
    )


@functools.lru_cache(maxsize=1)
def register(file: str) -> None:
    """Execute the file at `config.registered_by` once per process; "" is no file."""
    if not file:
        return
    if not Path(file).is_file():
        raise UserError(
            f"{file}, which registers what the config names, is not on {socket.gethostname()}; put "
            "it where all machines see it"
        )
    try:
        runpy.run_path(file)
    except Exception as error:
        raise UserError(
            f"registered_by={file} does not load: {short(error)}; mend that file"
        ) from error


def _call(folder: Path, config: ConfigDict, function: Callable, arguments: tuple) -> Any:
    """Call a function on another machine, in the same folder and with the same registrations."""
    os.chdir(folder)
    register(config.registered_by)
    keep_programs(config.compilation_cache)
    return function(*arguments)


def _open(address: str) -> Any:
    """Connect to a cluster; return the module `ray`."""
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("launcher='ray' needs the package ray: install the extra `ray`") from error
    handler = signal.getsignal(signal.SIGTERM)
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal() and "/" not in host:
            # If nothing listens there, Ray would retry for many minutes.
            socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no cluster of Ray at ray.address={address!r}; start one with `ray start --head`, and "
            "name it, or leave 'auto' on one of its machines; launcher='local' needs none"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    return ray
