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

with interruption.clean_up_on_signal():
    asyncio.run(main())
"""

_TWICE = """
import os, signal
from kd_ranker.training import interruption

with interruption.clean_up_on_signal(), interruption.deferred():
    for number in (signal.SIGTERM, signal.SIG{name}):
        os.kill(os.getpid(), number)
        print("after", number.name, flush=True)
"""


@pytest.mark.parametrize(
    ("program", "name", "code", "out"),
    [
        (_IN_A_LOOP, "SIGTERM", 143, ""),
        (_IN_A_LOOP, "SIGINT", 130, ""),
        (_TWICE, "INT", 130, "after SIGTERM\n"),
    ],
)
def test_a_signal_ends_the_process_with_one_line_and_a_second_one_at_once(program, name, code, out):
    finished = small.run("-c", program.format(name=name))
    assert (finished.returncode, finished.stdout) == (code, out), finished.stderr
    ended_by = signal.Signals(code - 128).name
    line = f"stopped by {ended_by}; the same command resumes from what is saved\n"
    assert finished.stderr == line


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


@pytest.mark.parametrize("error", [None, OSError("no room")])
def test_a_signal_sets_a_flag_and_is_raised_after_work_without_an_error(asked, error):
    flags, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def work():
        with deferred() as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # stays ignored
            flags.append(stop())
            asked()
            flags.append(stop())
            if error:
                raise error

    with pytest.raises(OSError if error else Asked):
        work()
    assert flags == [False, True]
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    with pytest.raises(Asked):
        asked()


def test_a_thread_gets_no_signals():
    def stops():
        with deferred() as stop:
            return stop()

    with ThreadPoolExecutor() as pool:
        assert not pool.submit(stops).result()
