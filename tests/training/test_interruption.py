import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from kd_ranker.training.interruption import deferred
from tests import small

_IN_A_LOOP = """
import asyncio, os, signal
from kd_ranker.training import interruption

async def main():
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.{name})
    await asyncio.sleep(30)

interruption.stop_on_signal()
try:
    asyncio.run(main())
except interruption.Stopped as stopped:
    interruption.exit_after(stopped)
"""

_TWICE = """
import os, signal
from kd_ranker.training import interruption

interruption.stop_on_signal()
with interruption.deferred():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        print("after", number.name, flush=True)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_within_a_loop_of_asyncio_ends_the_process(name, code):
    finished = small.run("-c", _IN_A_LOOP.format(name=name))
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"stopped by {name}")


def test_a_second_signal_ends_the_process_at_once():
    finished = small.run("-c", _TWICE)
    assert finished.returncode == 130
    assert finished.stdout == "after SIGTERM\n"
    assert finished.stderr == "stopped by SIGINT; the same command resumes from what is saved\n"


class Asked(BaseException):
    pass


@pytest.fixture
def asked():
    """Sends a signal that raises `Asked`."""

    def ask(*_):
        raise Asked

    before = signal.signal(signal.SIGTERM, ask)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_a_signal_sets_a_flag_and_is_raised_once_the_work_has_ended(asked):
    flags = []

    def work():
        with deferred() as stop:
            flags.append(stop())
            asked()
            flags.append(stop())

    with pytest.raises(Asked):
        work()
    assert flags == [False, True]
    with pytest.raises(Asked):
        asked()


def test_the_error_of_interrupted_work_is_raised_and_ignored_signals_stay_so(asked):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work():
        with deferred() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            asked()
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        work()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


def test_a_thread_gets_no_signals():
    def stops():
        with deferred() as stop:
            return stop()

    with ThreadPoolExecutor() as pool:
        assert not pool.submit(stops).result()
