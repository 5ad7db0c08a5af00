"""Interrupt the main job at random moments, and check that it ends with the same results.

    python scripts/fault_test.py [--rounds N] [--seed S] [--minutes M] [--folder DIRECTORY]

The main job, from the dataset to the report, is done once without interruption, on the smallest
cascade. Each round repeats it in a few attempts. All but the last are interrupted by a signal or a
kill, or run beside a second process. The test fails on a traceback, on an exit code or a line that
does not fit the interruption, or if a byte of the results differs.
"""

import argparse
import dataclasses
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Two cohorts under a teacher that has scored the log, with a few checkpoints each.
FLAGS = {
    "teacher.source": "logged",
    "teacher.train.steps": 8,
    "train.steps": 12,
    "train.log_every": 2,
    "train.checkpoint_every": 4,
    "train.eval_every": 6,
    "teacher.train.checkpoint_every": 4,
    "sweep.modes": "('none', 'shared')",
    "sweep.group_size": 1,
    "evaluation.requests": 4,
    "parallel.devices": 1,
}
RESULTS = (".csv", ".parquet", ".jsonl", ".npy", ".bin")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HANGS = 300.0  # seconds


class Fault(Exception):
    """The job failed, or its results differ."""


@dataclasses.dataclass
class Attempt:
    """A process that does the job, and the file of its stderr."""

    process: ForkServerProcess
    errors: Path

    def wait(self, seconds: float) -> bool:
        """Wait for its end; return True if it ended."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def end(self) -> tuple[int, list[str]]:
        """Return its exit code, and its lines on stderr without warnings and progress."""
        if not self.wait(HANGS):
            self.process.kill()
            raise Fault(f"it hangs: {self.errors.read_text()}")
        text = self.errors.read_text()
        if "Traceback" in text:
            raise Fault(text)
        code = self.process.exitcode
        assert code is not None
        return code, [line for line in text.splitlines() if not line.startswith(("W", "run: "))]


def do_job(errors: str, folder: str) -> None:
    """Do the main job in this process."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(ROOT)
    flags = {**FLAGS, "data.dir": f"{folder}/data", "teacher.workdir": f"{folder}/teacher"}
    sys.argv = [
        "experiments.run",
        "--config=configs/cascade.py:small",
        f"--workdir={folder}/runs",
        *(f"--config.{key}={value}" for key, value in flags.items()),
    ]
    runpy.run_module("experiments.run", run_name="__main__")


class Round:
    """The job in a folder, interrupted."""

    def __init__(self, context: ForkServerContext, folder: Path, chance: random.Random):
        self.context, self.folder, self.chance = context, folder, chance
        self.log: list[str] = []
        self.attempts = 0

    def start(self) -> Attempt:
        """Start the job."""
        self.attempts += 1
        errors = self.folder.with_name(f"errors-{self.attempts}")
        # A daemon: it ends with this process.
        process = self.context.Process(
            target=do_job, args=(str(errors), str(self.folder)), daemon=True
        )
        process.start()
        return Attempt(process, errors)

    def finish(self) -> None:
        """Run the job to its end."""
        code, lines = self.start().end()
        if code or lines:
            raise Fault(f"exit code {code}: {lines}")

    def signal(self, seconds: float) -> None:
        """Send a signal, and at times a second one."""
        number = self.chance.choice(SIGNALS)
        attempt, delay = self.start(), self.chance.uniform(0, seconds)
        if not attempt.wait(delay):
            os.kill(attempt.process.pid or 0, number)
            if self.chance.random() < 0.2:
                attempt.wait(self.chance.uniform(0, 1))
                if attempt.process.is_alive():
                    os.kill(attempt.process.pid or 0, number)
        self.log.append(f"{number.name} after {delay:.1f} s")
        check_end(number, *attempt.end())

    def do_twice(self, seconds: float) -> None:
        """Start a second process while the first one is at work."""
        first, delay = self.start(), self.chance.uniform(0, seconds)
        first.wait(delay)
        second = self.start()
        self.log.append(f"a second process after {delay:.1f} s")
        for code, lines in (first.end(), second.end()):
            if code and not (code == 2 and len(lines) == 1 and "is held by" in lines[0]):
                raise Fault(f"exit code {code} of two processes: {lines}")


INTERRUPTIONS: tuple[Callable[[Round, float], None], ...] = (
    Round.signal,
    Round.signal,
    Round.do_twice,
)


def check_end(number: signal.Signals, code: int, lines: list[str]) -> None:
    """Raise Fault unless exit code and lines are those of a signal, or of a job that was done."""
    if code not in (0, -number, 128 + number):
        raise Fault(f"exit code {code} after {number.name}: {lines}")
    if code > 0 and not (len(set(lines)) == 1 and lines[0].startswith("stopped by ")):
        raise Fault(f"after {number.name}: {lines}")


def results_of(folder: Path) -> dict[str, bytes]:
    """Return the content of all results by their names."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in RESULTS or path.name.startswith(("rows-", "counts-", "teacher-"))
    }


def run_rounds(rounds: int, seed: int, minutes: float, folder: Path) -> int:
    """Run the rounds, or those that fit in the time, and return their number.

    Raises:
      Fault: the job failed, or its results differ.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    # Imported once: each process starts as a fork.
    context.set_forkserver_preload(["kd_ranker.api", "kd_ranker.main"])
    job, until = folder / "job", time.monotonic() + 60 * minutes
    expected, seconds = {}, 0.0
    for _ in range(2):  # the first one compiles
        since = time.monotonic()
        shutil.rmtree(job, ignore_errors=True)
        Round(context, job, random.Random(0)).finish()
        expected, seconds = results_of(job), time.monotonic() - since
    print(f"uninterrupted: {len(expected)} results in {seconds:.1f} s", flush=True)
    for number in range(rounds):
        if time.monotonic() > until:
            return number
        chance, since = random.Random(f"{seed} {number}"), time.monotonic()
        shutil.rmtree(job)
        current = Round(context, job, chance)
        try:
            for interrupt in chance.choices(INTERRUPTIONS, k=chance.randint(1, 3)):
                interrupt(current, seconds)
            current.finish()
            _compare(expected, results_of(job))
        except Fault as fault:
            text = "; ".join(current.log)
            raise Fault(f"seed {seed}, round {number}: {text}\n{fault}") from fault
        text = "; ".join(current.log)
        print(f"round {number}: {text}; the same in {time.monotonic() - since:.0f} s", flush=True)
    return rounds


def _compare(expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    if differing := [name for name, of in expected.items() if found.get(name) != of]:
        raise Fault(f"other results than uninterrupted: {', '.join(differing)}")


def main() -> None:
    """Run the rounds of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0, help="no round begins after that")
    parser.add_argument("--folder", type=Path, help="to work in; the default is a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fault-test-"))
    # Child processes inherit that a signal is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run_rounds(arguments.rounds, arguments.seed, arguments.minutes, folder.absolute())
    except Fault as fault:
        sys.exit(f"failed: {fault}")
    print(f"{done} rounds, no difference, no traceback")


if __name__ == "__main__":
    main()
