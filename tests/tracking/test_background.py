"""No test here measures time: a tracker hangs until an event, which comes after the assertions."""

import threading
from pathlib import Path

import pytest

from kd_ranker.tracking import registry
from kd_ranker.tracking.background import InBackground
from kd_ranker.tracking.tracker import Tracker
from tests.faults import fault_of
from tests.tracking.recorded import TRACKED, Recorded


@pytest.fixture
def warnings(monkeypatch):
    """The warnings, which a thread may give."""
    lines = []
    monkeypatch.setattr(
        "kd_ranker.tracking.background.logging.warning",
        lambda text, *values: lines.append(text % values),
    )
    return lines


class Hanging(Tracker):
    """A tracker whose calls do not return before `released`."""

    def __init__(self):
        self.is_called = threading.Event()
        self.released = threading.Event()
        self.written = []

    def write(self, step, scalars):
        self.is_called.set()
        self.released.wait()
        self.written.append(step)


def test_all_calls_arrive_in_order(warnings):
    recorded = Recorded()
    tracker = InBackground("recorded", recorded)
    tracker.start(TRACKED)
    tracker.begin(Path("workdir"), 3)
    tracker.write(4, {"loss": 0.5})
    tracker.end()
    tracker.finish({"": {"auc": 0.5}}, [])
    tracker.close(True)
    assert recorded.calls == [
        ("start", TRACKED),
        ("begin", "workdir", 3),
        ("write", 4, {"loss": 0.5}),
        ("end",),
        ("finish", {"": {"auc": 0.5}}, []),
        ("close", True),
    ]
    assert warnings == []


def test_a_run_ends_while_its_tracker_hangs(warnings):
    hanging = Hanging()
    tracker = InBackground("hanging", hanging, seconds_to_end=0)
    tracker.write(1, {})
    hanging.is_called.wait()
    tracker.write(2, {})
    tracker.close(True)
    assert hanging.written == []
    assert warnings == [
        "tracker hanging is switched off: it has not ended within 0 s; the files of the workdir "
        "have all of it"
    ]
    hanging.released.set()
    tracker._thread.join()
    assert hanging.written == [1]  # and nothing after it was switched off
    assert len(warnings) == 1


def test_a_tracker_that_raises_when_the_run_has_ended_is_silent(warnings):
    class Late(Hanging):
        def write(self, step, scalars):
            super().write(step, scalars)
            raise OSError

    hanging = Late()
    tracker = InBackground("late", hanging, seconds_to_end=0)
    tracker.write(1, {})
    hanging.is_called.wait()
    tracker.close(True)
    hanging.released.set()
    tracker._thread.join()
    assert len(warnings) == 1


def test_what_waits_for_a_tracker_that_hangs_is_bounded(warnings):
    hanging = Hanging()
    tracker = InBackground("hanging", hanging, most_calls=2)
    tracker.write(0, {})
    hanging.is_called.wait()
    for step in range(1, 10):
        tracker.write(step, {})
    assert tracker._calls.qsize() == 2
    assert len(warnings) == 1
    assert "2 calls wait for it" in warnings[0]
    tracker.close(True)  # without a wait, which would not end
    assert len(warnings) == 1
    hanging.released.set()


@pytest.mark.parametrize("error", [OSError("no\nroute"), SystemExit(1)])
def test_a_tracker_that_raises_is_switched_off_with_one_line(warnings, error):
    class Raising(Recorded):
        def write(self, step, scalars):
            super().write(step, scalars)
            raise error

    recorded = Raising()
    tracker = InBackground("raising", recorded)
    for step in (1, 2, 3):
        tracker.write(step, {})
    tracker.close(True)
    assert recorded.calls == [("write", 1, {})]
    (line,) = warnings
    assert line.startswith(f"tracker raising is switched off: {type(error).__name__}: ")
    assert "\n" not in line


def test_a_package_that_is_not_installed_is_a_fault(monkeypatch):
    class Absent(Tracker):
        package = "no_such_package"

    monkeypatch.setitem(registry.TRACKERS, "absent", Absent)
    assert fault_of(registry.check_installed, "absent") == (
        "tracker='absent' needs the package no_such_package: install the extra `no_such_package`"
    )
    registry.check_installed("tensorboard")


def test_only_tensorboard_is_called_by_the_run_itself(monkeypatch):
    for name, tracker in registry.TRACKERS.items():
        assert tracker.in_background == (name != "tensorboard")
    monkeypatch.setitem(registry.TRACKERS, "recorded", Recorded)
    tracker = registry.make_tracker("recorded")
    assert isinstance(tracker, InBackground)
    tracker.close(True)
