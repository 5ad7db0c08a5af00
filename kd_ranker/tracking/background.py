"""A tracker on a thread of its own: no run waits for it, or ends by its errors.

A call to a server may take minutes to fail, and Python cannot interrupt it. So a call with a time
limit is not enough: the thread would be needed for it, too. The thread is a daemon, which ends with
the process, whatever it waits for. Its queue is bounded, because a tracker that hangs would else
collect scalars until the memory is full.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging
from tqdm import tqdm

from kd_ranker.errors import short
from kd_ranker.tracking.tracker import Tracked, Tracker

_MOST_CALLS = 1000
_SECONDS_TO_END = 30.0

_Call = Callable[[Tracker], None]


class InBackground(Tracker):
    """A tracker that is called by a thread; after one warning the run goes on without it."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        most_calls: int = _MOST_CALLS,
        seconds_to_end: float | None = None,
    ):
        """Start the thread.

        Args:
          name: the name of the tracker in the warning.
          tracker: gets the calls in their order.
          most_calls: the calls that may wait; the tracker is switched off when there are more.
          seconds_to_end: the time to wait for them at the end; None takes half a minute.
        """
        self._name = name
        self._tracker = tracker
        self._calls: queue.Queue[_Call | None] = queue.Queue(most_calls)
        self._seconds_to_end = _SECONDS_TO_END if seconds_to_end is None else seconds_to_end
        self._is_off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def start(self, tracked: Tracked) -> None:
        """See `Tracker`."""
        self._call(lambda tracker: tracker.start(tracked))

    def begin(self, folder: Path, step: int) -> None:
        """See `Tracker`."""
        self._call(lambda tracker: tracker.begin(folder, step))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._call(lambda tracker: tracker.write(step, scalars))

    def end(self) -> None:
        """See `Tracker`."""
        self._call(lambda tracker: tracker.end())

    def finish(self, results: Mapping[str, Mapping[str, float]], files: Sequence[Path]) -> None:
        """See `Tracker`."""
        self._call(lambda tracker: tracker.finish(results, files))

    def close(self, is_finished: bool) -> None:
        """Wait for the calls so far, but not longer than some seconds."""
        self._call(lambda tracker: tracker.close(is_finished))
        self._call(None)
        if not self._is_off.is_set():
            self._thread.join(self._seconds_to_end)
            if self._thread.is_alive():
                self._switch_off(f"it has not ended within {self._seconds_to_end:g} s")

    def _call(self, call: _Call | None) -> None:
        if self._is_off.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off(f"{self._calls.maxsize} calls wait for it")

    def _work(self) -> None:
        """Make the calls until there is no further one, or the tracker is switched off."""
        while (call := self._calls.get()) and not self._is_off.is_set():
            try:
                call(self._tracker)
            # A tracker may raise anything, and some packages raise SystemExit.
            except BaseException as error:
                self._switch_off(short(error))
                return

    def _switch_off(self, reason: str) -> None:
        """Make no further call, and warn of the first reason."""
        if not self._is_off.is_set():
            self._is_off.set()
            with tqdm.external_write_mode():
                logging.warning(
                    "tracker %s is switched off: %s; the files of the workdir have all of it",
                    self._name,
                    reason,
                )
