"""Faults of the machine, which any library may meet and report in pages, told in one line."""

import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator

_ROOM = "free some room, and the same command goes on from what is saved"
_ELSEWHERE = "name another folder, as by --workdir or config.data.dir"
# By the words of the system, which remain in an error whatever library it went through.
_REMEDIES = {
    os.strerror(number): remedy
    for number, remedy in {
        errno.ENOSPC: _ROOM,
        errno.EDQUOT: _ROOM,
        errno.EFBIG: _ROOM,
        errno.EROFS: _ELSEWHERE,
        errno.EIO: f"look after the disk, or {_ELSEWHERE}",
    }.items()
}
_PATH = re.compile(r"(?<![\w/])/[^\s\"':\[\]]+")


def fault_of(error: BaseException) -> str:
    """The fault of a disk, or of the memory, behind an error, with what to do; "" if there is none.

    >>> fault_of(OSError(28, "No space left on device", "/runs/a"))
    'No space left on device: /runs/a; free some room, and the same command goes on from what is saved'
    """  # noqa: E501
    for each in _chain(error):
        text = str(each)
        if isinstance(each, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in text:
            return f"the memory does not suffice: {text or 'no more is free'}; choose smaller sizes"
        for words, remedy in _REMEDIES.items():
            if words.lower() in text.lower():
                path = getattr(each, "filename", None) or next(iter(_PATH.findall(text)), "")
                return f"{words}{f': {path}' if path else ''}; {remedy}"
    return ""


def report_once() -> None:
    """Has such a fault told by whoever catches it alone.

    The threads that write in the background, and their libraries' logs, would do so as well.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_tells_something_else)
    threading.excepthook = _in_thread
    others = sys.unraisablehook

    def unraisable(found: "sys.UnraisableHookArgs") -> None:
        # What remains of a save that was given up, in threads of TensorStore, no Python's own.
        if "Event loop is closed" not in str(found.exc_value):
            others(found)

    sys.unraisablehook = unraisable


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that have led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _tells_something_else(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not any(map(fault_of, filter(None, (error, RuntimeError(record.getMessage())))))


def _in_thread(found: threading.ExceptHookArgs) -> None:
    if not (found.exc_value and fault_of(found.exc_value)):
        threading.__excepthook__(found)
