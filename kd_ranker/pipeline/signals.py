"""Signals that ask a command to end: one line, and the exit code that a shell has for them.

It is loaded before all that takes seconds to import, so it imports little itself.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

# That of a lost terminal is not known everywhere.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_ASK_TO_END = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Stopped(SystemExit):
    """A signal has asked this process to end. What is open is put away on its way up.

    Of all exceptions, a loop of asyncio, which may run when the signal comes, lets few pass.
    """

    def __init__(self, number: int):
        super().__init__(_code(number))
        self.number = number


def stop_when_asked() -> None:
    """From now on a signal raises `Stopped`, and a second one ends the process at once."""
    _handle(_stop)
    sys.unraisablehook = _unraisable


def end_when_asked() -> None:
    """From now on a signal ends the process at once, while there is nothing to put away."""
    _handle(_end)


def exit_after(stopped: Stopped) -> NoReturn:
    """Prints that the process was stopped, as one line, and exits."""
    sys.stderr.write(_line(stopped.number))
    sys.exit(_code(stopped.number))


def _handle(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ASK_TO_END:
        # One that is ignored stays so: nohup has it that way.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    end_when_asked()
    raise Stopped(number)


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    # Within `__del__`, say, an exception would go no further.
    if isinstance(found.exc_value, Stopped):
        _end(found.exc_value.number, None)
    sys.__unraisablehook__(found)


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, _line(number).encode())
    os._exit(_code(number))


def _line(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name}; the same command goes on from what is saved\n"


def _code(number: int) -> int:
    return 128 + number
