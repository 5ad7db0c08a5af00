import pytest

from tests import small

_IN_A_LOOP = """
import asyncio, os, signal
from kd_ranker.pipeline import signals

async def main():
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.{name})
    await asyncio.sleep(30)

signals.stop_when_asked()
try:
    asyncio.run(main())
except signals.Stopped as stopped:
    signals.exit_after(stopped)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_comes_within_a_loop_of_asyncio_ends_the_process(name, code):
    finished = small.run("-c", _IN_A_LOOP.format(name=name))
    assert finished.returncode == code, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"stopped by {name}")
