"""Signals that request the end of a command.

`kd_ranker.main` imports this before packages that take seconds, so it imports little.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

_ASK_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last is of a closed terminal


class Stopped(SystemExit):
    """A signal requested the end of this process; `code` is 128 and its number.

    It is a subclass of SystemExit, so it passes through asyncio loops.
    """


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Defer signals to end until the context exits; a second one ends the process at once.

    Yields:
      A function that returns True once a signal has arrived. The main thread receives all signals,
      so in other threads it always returns False.
    """
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        if received:
            _end(number, None)
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


def stop_on_signal() -> None:
    """From now on, raise `Stopped` for the first signal, and end at once for a second one."""
    _handle(_stop)


def end_on_signal() -> None:
    """From now on, end the process at once: there is nothing to clean up."""
    _handle(_end)


def exit_after(stopped: Stopped) -> NoReturn:
    """Print that the process was stopped, as one line, and exit with the signal's code."""
    sys.stderr.write(_line(int(stopped.code or 0) - 128))
    sys.exit(stopped.code)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler, and return the previous ones; an ignored signal stays so, as of nohup."""
    previous = {number: signal.getsignal(number) for number in _ASK_TO_END}
    changed: dict[int, Any] = {of: by for of, by in previous.items() if by != signal.SIG_IGN}
    for number in changed:
        signal.signal(number, handler)
    return changed


def _stop(number: int, _: FrameType | None) -> None:
    end_on_signal()
    raise Stopped(128 + number)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _line(number).encode())
    os._exit(128 + number)


def _line(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; the same command resumes from what is saved\n"
