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
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last is of a closed terminal


@contextlib.contextmanager
def clean_up_on_signal() -> Iterator[None]:
    """Exit at a signal after clean-up: with one line and its exit code, 128 and its number.

    A second signal, and any after the context, ends the process at once.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        end_on_signal()
        received.append(number)
        raise SystemExit(128 + number)  # asyncio loops let it pass

    report = sys.unraisablehook

    def again(unraisable: Any) -> None:
        """Raise a signal again a moment later, if its error could not end anything."""
        # Python drops an error that is raised in a call of the garbage collector, as of JAX.
        if not received or not isinstance(unraisable.exc_value, SystemExit):
            report(unraisable)
            return
        _handle(stop)
        threading.Timer(0.01, signal.raise_signal, [received[0]]).start()

    sys.unraisablehook = again
    _handle(stop)
    try:
        yield
    except BaseException as ended:
        if not received:
            raise
        # Not always the error of `stop`: DuckDB, for one, raises another in its place.
        _print(received[0])
        raise SystemExit(128 + received[0]) from ended
    finally:
        end_on_signal()
        sys.unraisablehook = report


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Defer signals to end until the context exits; a second one ends the process at once.

    Yields a function: True once a signal has arrived. Only the main thread receives signals.
    """
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        end_on_signal()
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

    def end(number: int, _: FrameType | None) -> None:
        _print(number)
        os._exit(128 + number)

    _handle(end)


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler, and return the previous ones; an ignored signal stays so, as of nohup."""
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def _print(number: int) -> None:
    name = signal.Signals(number).name
    os.write(2, f"stopped by {name}; the same command resumes from what is saved\n".encode())
