"""TensorBoard's event files in the folder of a run, or of each cohort of a sweep."""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from kd_ranker.tracking.tracker import Tracker


class TensorBoard(Tracker):
    """A writer of event files, which writes as soon as it is called.

    It has no thread, unlike a `SummaryWriter`: on a full disk that would die with a trace, and its
    queue would fill up. It writes to the disk of the other files, so it does not hang alone.
    """

    in_background = False

    def begin(self, folder: Path, step: int) -> None:
        """Open an event file; TensorBoard then hides what an earlier one has after this step."""
        self._events = EventsWriter(str(folder / "events"))
        session = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=step + 1, session_log=session))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars, under the names of `metrics.jsonl`."""
        for name, value in scalars.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def end(self) -> None:
        """Close the event file."""
        self._events.close()
