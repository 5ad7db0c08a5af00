"""Tasks on the machines of a cluster of Ray, an optional package."""

import contextlib
import importlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kd_ranker.config.registered import register
from kd_ranker.errors import UserError
from kd_ranker.requests.pool import Runner, with_bar

_SECONDS_TO_ANSWER = 10


@contextlib.contextmanager
def open_cluster(config: ConfigDict) -> Iterator[Runner]:
    """Gives what runs a function on a cluster, and again elsewhere if its machine is lost.

    A function that Ray can send to other machines, with arguments that it can. What it leaves is on
    a disk that all share, under the same paths; it goes on from what an earlier attempt has left.
    All calls are handed out at once; Ray starts as many as there are resources for.

    Args:
      config: the config, of which `config.ray` says where the cluster is and what a call needs.

    Raises:
      UserError: there is no Ray, no such cluster, or no machine in it with the resources asked for;
        or, where results are asked for, a call has failed, or lost its machine more often than
        `ray.retries`.
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
        here = Path.cwd(), config.registered_by

        def run(function: Callable, calls: Sequence[tuple], description: str) -> Iterator[Any]:
            started = [remote.remote(*here, function, arguments) for arguments in calls]
            results = _results(ray, started, config.ray.retries, description)
            return with_bar(results, len(calls), description)

        yield run
    finally:
        ray.shutdown()


def _call(here: Path, registered_by: str, function: Callable, arguments: tuple) -> Any:
    """Calls a function on another machine, as it would be here."""
    os.chdir(here)
    register(registered_by)
    return function(*arguments)


def _results(ray: Any, started: Sequence[Any], retries: int, description: str) -> Iterator[Any]:
    """The results of calls in their order; UserError as soon as any has failed."""
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
