"""Tasks on the machines of a cluster of Ray, an optional package."""

import importlib
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_ranker.errors import UserError

_SECONDS_TO_ANSWER = 10


def run_tasks(
    config: ConfigDict, task: Callable[[int], None], numbers: Sequence[int], name: str
) -> None:
    """Runs a task for each number, and again elsewhere if its machine is lost.

    Args:
      config: `config.ray`.
      task: a function that Ray can send to other machines; what it leaves is on a disk that all
        share, and it goes on from what an earlier attempt has left.
      numbers: all of them are handed out at once; Ray starts as many as there are resources for.
      name: of what a task does, for messages.

    Raises:
      UserError: there is no Ray, no such cluster, or no machine in it with the resources asked for;
        or a task has failed, or lost its machine more often than `ray.retries`.
    """
    ray = _open(config.address)
    try:
        resources = {"CPU": config.cpus, "GPU": config.gpus}
        _check_resources(ray.nodes(), resources)
        # Ray takes functions alone, and `task` may be a partial one.
        remote = ray.remote(lambda number: task(number)).options(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            max_retries=config.retries,
            scheduling_strategy="SPREAD",
        )
        running = {remote.remote(number): number for number in numbers}
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ended)
            try:
                ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise UserError(f"{name} {number} on the cluster: {error.cause}") from error
                raise
            except ray.exceptions.RayError as error:
                lost = f"{name} {number} lost its machine more than {config.retries} times"
                raise UserError(f"{lost}; what it has saved stays: start again") from error
    finally:
        ray.shutdown()


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
            "name it, or leave 'auto' on one of its machines"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # which Ray has taken
    return ray


def _knock(address: str) -> None:
    """Raises OSError if nobody is at `host:port`: Ray would try for many minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()


def _check_resources(nodes: Sequence[dict], wanted: dict[str, float]) -> None:
    """Raises UserError if no machine has so much: a task would wait for ever."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(of.get(name, 0) >= amount for name, amount in wanted.items()) for of in there):
        most = {name: max((of.get(name, 0) for of in there), default=0) for name in wanted}
        raise UserError(
            f"no machine of the cluster has ray.cpus={wanted['CPU']:g} and "
            f"ray.gpus={wanted['GPU']:g}; the most are {most['CPU']:g} and {most['GPU']:g}"
        )
