import signal
import sys
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

# As DuckDB does where a signal interrupts a query.
_AS_ANOTHER_ERROR = """
import os, signal
from kd_ranker.training import interruption

with interruption.clean_up_on_signal():
    try:
        os.kill(os.getpid(), signal.{name})
    except SystemExit as ended:
        raise RuntimeError("Query interrupted") from ended
"""

# As JAX has one. Python prints the error of such a call, and goes on.
_IN_A_CALL_OF_THE_GARBAGE_COLLECTOR = """
import gc, os, signal, time
from kd_ranker.training import interruption

def collected(phase, _):
    if phase == "start":
        os.kill(os.getpid(), signal.{name})

with interruption.clean_up_on_signal():
    gc.callbacks.append(collected)
    gc.collect()
    gc.callbacks.clear()
    time.sleep(30)
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
        (_AS_ANOTHER_ERROR, "SIGTERM", 143, ""),
        (_AS_ANOTHER_ERROR, "SIGINT", 130, ""),
        (_IN_A_CALL_OF_THE_GARBAGE_COLLECTOR, "SIGTERM", 143, ""),
        (_TWICE, "INT", 130, "after SIGTERM\n"),
    ],
)
def test_a_signal_ends_the_process_with_one_line(program, name, code, out):
    finished = small.run("-c", program.format(name=name))
    assert (finished.returncode, finished.stdout) == (code, out), finished.stderr
    ended_by = signal.Signals(code - 128).name
    line = f"stopped by {ended_by}; the same command resumes from what is saved\n"
    assert finished.stderr == line


@pytest.fixture
def handlers():
    """SIGTERM exits this process, and it ignores SIGHUP, as of nohup."""
    ours = {signal.SIGTERM: lambda *_: sys.exit("asked"), signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield ours
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [None, OSError("no room")])
def test_a_deferred_signal_sets_a_flag_and_is_raised_after(handlers, error):
    flags = []

    def work():
        with deferred() as stop:
            for number in handlers:
                flags.append(stop())
                signal.raise_signal(number)
            if error:
                raise error

    with pytest.raises(OSError if error else SystemExit, match="no room" if error else "asked"):
        work()
    assert flags == [False, True]
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_thread_gets_no_signals():
    def stops():
        with deferred() as stop:
            return stop()

    with ThreadPoolExecutor() as pool:
        assert not pool.submit(stops).result()
