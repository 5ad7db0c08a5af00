"""Signals that request the end of a command.

`kd_ranker.main` imports this before packages that take seconds, so it imports little.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_ASK_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last is of a closed terminal


class _Stopped(SystemExit):
    """The first signal, with its exit code; asyncio loops let a SystemExit pass."""


@contextlib.contextmanager
def clean_up_on_signal() -> Iterator[None]:
    """Exit at a signal after clean-up: with one line and its exit code, 128 and its number.

    A second signal, and any after the context, ends the process at once.
    """
    _handle(_stop)
    try:
        yield
    except _Stopped as stopped:
        _print(int(stopped.code or 0) - 128)
        raise
    finally:
        end_on_signal()


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Defer signals to end until the context exits; a second one ends the process at once.

    Yields:
      A function that returns True once a signal has arrived. The main thread receives all signals,
      so in other threads it always returns False.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            _end(number, frame)
        received.append(number)

    in_main = threading.current_thread() is threading.main_thread()
    previous = _handle(receive) if in_main else {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def end_on_signal() -> None:
    """From now on, end the process at once: there is nothing to clean up."""
    _handle(_end)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler, and return the previous ones; an ignored signal stays so, as of nohup."""
    previous = {number: signal.getsignal(number) for number in _ASK_TO_END}
    return {
        number: signal.signal(number, handler)
        for number, before in previous.items()
        if before != signal.SIG_IGN
    }


def _stop(number: int, _: FrameType | None) -> None:
    end_on_signal()
    raise _Stopped(128 + number)


def _end(number: int, _: FrameType | None) -> None:
    _print(number)
    os._exit(128 + number)


def _print(number: int) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name}; the same command resumes from what is saved\n".encode())
