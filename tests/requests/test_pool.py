import subprocess
import sys

from tests.small import ROOT

_DYING = """
import os, signal, sys, time
from kd_ranker.requests.pool import open_pool

if __name__ == "__main__":
    with open_pool(2) as run:
        calls = [(0,)] + [(600,)] * 5
        next(run(time.sleep, calls, "sleeping"))
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_processes_of_one_that_was_killed_end_with_it():
    # They hold its output, which ends with the last of them.
    finished = subprocess.run(
        [sys.executable, "-c", _DYING], cwd=ROOT, capture_output=True, timeout=1500
    )
    assert finished.returncode == -9
