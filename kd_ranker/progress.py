"""The progress of a command: the phase it is in, how long each took, and how much is left.

A command such as `sweep` has phases (dataset, compiling, training, validation, test, report). A
phase shows a line with its seconds when it ends. Within it, a `Bar` counts steps: as a bar with the
time that is left on a terminal, and as a line from time to time elsewhere. `counted` is a bar for
code that knows no phase, such as the conversion of a dataset.

Example:
    progress = Progress(print)
    with progress.phase("training"), progress.bar("training", 2000, "step") as bar:
        bar.update(100)
    print(f"time: {progress}")  # time: training 12 s
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
Show = Callable[[str], None]
"""A function that gets each line for people."""

_SECONDS_BETWEEN_LINES = 30.0  # of a bar where there is no terminal


def show_on_stderr(line: str) -> None:
    """Print a line apart from the result of a command."""
    sys.stderr.write(f"{line}\n")


def counted(parts: Iterable[T], name: str, unit: str = "step") -> Iterator[T]:
    """Yield parts, and count those that are done in a bar or in lines; `unit` is what one is."""
    total = len(parts) if isinstance(parts, Sized) else None
    with Progress(show_on_stderr).bar(name, total, unit, leave=False) as bar:
        for part in parts:
            yield part
            bar.update(1)


class Progress:
    """The phases of a command and their seconds."""

    def __init__(self, show: Show | None = None, clock: Callable[[], float] = time.monotonic):
        """Start without phases.

        Args:
          show: gets each line; None shows only bars, and these only on a terminal.
          clock: returns seconds.
        """
        self.seconds: dict[str, float] = {}  # by phase, without the phases inside it
        self.clock = clock
        self._show = show
        self._seconds_inside = 0.0  # of the phases that ended inside the current one

    def show(self, line: str) -> None:
        """Show a line, above the bars."""
        if self._show:
            with tqdm.external_write_mode():
                self._show(line)

    @contextlib.contextmanager
    def phase(self, name: str, quiet: bool = False) -> Iterator[None]:
        """Time a phase, which may contain others; show a line with its seconds unless `quiet`."""
        inside_before = self._seconds_inside  # of the phases beside this one
        self._seconds_inside = 0.0
        begin = self.clock()
        try:
            yield
        finally:
            whole = self.clock() - begin
            without_inner = whole - self._seconds_inside
            self._seconds_inside = inside_before + whole
            self.seconds[name] = self.seconds.get(name, 0.0) + without_inner
        if not quiet:
            self.show(f"{name}: {without_inner:.0f} s")

    @contextlib.contextmanager
    def bar(
        self, name: str, total: int | None, unit: str, hidden: bool = False, leave: bool = True
    ) -> Iterator["Bar"]:
        """Count the steps of a phase; a bar that is not `hidden` is left on the terminal or not.

        A `total` of None is not known.
        """
        disable = True if hidden else None  # None hides it where there is no terminal
        with tqdm(
            total=total, desc=name, unit=unit, disable=disable, leave=leave, dynamic_ncols=True
        ) as shown:
            yield Bar(self, shown, name, total, unit, hidden)

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())


class Bar:
    """A count of steps, see `Progress.bar`."""

    def __init__(
        self,
        progress: Progress,
        shown: tqdm,
        name: str,
        total: int | None,
        unit: str,
        hidden: bool,
    ):
        self.progress = progress
        self._shown = shown
        self._name = name
        self._total = total
        self._unit = unit
        self._has_lines = shown.disable and not hidden
        self._done = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Estimate the time that is left from the steps that follow, not from those before."""
        self._shown.unpause()
        self._first = self._done
        self._begin = self.progress.clock()
        self._last_line = self._begin

    def update(self, steps: int) -> None:
        """Count steps that are done."""
        self._done += steps
        self._shown.update(steps)
        now = self.progress.clock()
        if self._has_lines and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.progress.show(f"{self._name}: {self._done_and_left(now)}")

    def _done_and_left(self, now: float) -> str:
        if self._total is None:
            return f"{self._done:,} {self._unit}s"
        per_step = (now - self._begin) / max(self._done - self._first, 1)
        left = per_step * (self._total - self._done)
        return f"{self._done:,} of {self._total:,} {self._unit}s, {left:.0f} s left"

    def set_postfix(self, text: str) -> None:
        """Show a short text at the end of the bar."""
        self._shown.set_postfix_str(text)
