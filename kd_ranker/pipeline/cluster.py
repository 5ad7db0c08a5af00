"""Tasks on the machines of a cluster of Ray, an optional package."""

import functools
import importlib
import os
import runpy
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from kd_ranker.errors import UserError

_SECONDS_TO_ANSWER = 10


def call_on_cluster(
    config: ConfigDict, function: Callable, calls: Sequence[tuple], description: str
) -> list[Any]:
    """Call a function on a cluster, with a progress bar; calls are retried after a lost machine.

    Function and arguments must be picklable. All machines share the disk that the function writes
    to, under the same paths, and a retry resumes from the files of the attempt before. All calls
    are submitted at once; Ray starts as many as resources allow.

    Args:
      config: the config; `config.ray` has the address and the resources of a call.
      function: the function.
      calls: the arguments of each call.
      description: the name of the calls for the bar and for messages.

    Returns:
      The results, in the order of the calls.

    Raises:
      UserError: Ray or the cluster is missing, no machine has the resources, or a call has failed
        or has lost its machine more than `ray.retries` times.
    """
    ray = _open(config.ray.address)
    try:
        resources = {"CPU": config.ray.cpus, "GPU": config.ray.gpus}
        _check_resources(ray.nodes(), resources)
        remote = ray.remote(_call).options(
            num_cpus=config.ray.cpus,
            num_gpus=config.ray.gpus,
            max_retries=config.ray.retries,
            scheduling_strategy="SPREAD",
        )
        started = [remote.remote(Path.cwd(), config.registered_by, function, of) for of in calls]
        results = _results(ray, started, config.ray.retries, description)
        return list(tqdm(results, description, len(calls), leave=False, unit="part", disable=None))
    finally:
        ray.shutdown()


@functools.lru_cache(maxsize=1)
def register(file: str) -> None:
    """Execute the file at `config.registered_by` once per process; "" is no file.

    Raises:
      UserError: it is not on this machine, or it fails.
    """
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
        raise UserError(f"{file} does not load: {type(error).__name__}: {error}") from error


def _call(folder: Path, registered_by: str, function: Callable, arguments: tuple) -> Any:
    """Call a function on another machine, in the same folder and with the same registrations."""
    os.chdir(folder)
    register(registered_by)
    return function(*arguments)


def _results(ray: Any, started: Sequence[Any], retries: int, description: str) -> Iterator[Any]:
    """Yield the results of calls in their order; raise UserError as soon as any has failed."""
    ended: dict[Any, Any] = {}
    waiting = [*started]
    for call in started:
        while call not in ended:
            (one,), waiting = ray.wait(waiting, num_returns=1)
            try:
                ended[one] = ray.get(one)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(f"{description} on the cluster: {error.cause}") from error
                raise
            except ray.exceptions.RayError as error:
                lost = f"{description}: a task lost its machine more than {retries} times"
                raise UserError(f"{lost}; what was saved stays: start again") from error
        yield ended.pop(call)


def _open(address: str) -> Any:
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("launcher='ray' needs the package ray: install the extra `ray`") from error
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no cluster of Ray at ray.address={address!r}; start one with `ray start --head`, and "
            "name it, or leave 'auto' on one of its machines; launcher='local' needs none"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    return ray


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`: Ray would retry for many minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()


def _check_resources(nodes: Sequence[dict], wanted: dict[str, float]) -> None:
    """Raise UserError if no machine has these resources: a task would wait forever."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(of.get(name, 0) >= amount for name, amount in wanted.items()) for of in alive):
        largest = {name: max((of.get(name, 0) for of in alive), default=0) for name in wanted}
        raise UserError(
            f"no machine of the cluster has ray.cpus={wanted['CPU']:g} and "
            f"ray.gpus={wanted['GPU']:g}; the most are {largest['CPU']:g} and {largest['GPU']:g}"
        )
