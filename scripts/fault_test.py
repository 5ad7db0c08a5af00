"""Disturbs the main job at random moments, and checks that it ends with the same results.

    python scripts/fault_test.py [--rounds N] [--seed S] [--minutes M] [--folder DIRECTORY]

The main job, from the dataset to the report, is done once undisturbed, on the smallest cascade. In
each round it is done again, in a few attempts, all but the last of which meet a fault: a signal or
a kill, a disk that is full, a second process, or files that were damaged since. It fails on a
traceback, an exit code or a line that does not fit the fault, or a result with another byte.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    """The job did not do as it should."""


@dataclasses.dataclass
class Attempt:
    """A process that does the job, and what it writes to stderr."""

    process: ForkServerProcess
    errors: Path

    def wait(self, seconds: float) -> bool:
        """Waits for its end; true if it has come."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and the lines of stderr that neither warn nor tell how far it is."""
        if not self.wait(HANGS):
            self.process.kill()
            raise Fault(f"it hangs: {self.errors.read_text()}")
        text = self.errors.read_text()
        if "Traceback" in text:
            raise Fault(text)
        code = self.process.exitcode
        assert code is not None
        return code, [line for line in text.splitlines() if not line.startswith(("W", "run: "))]


def do_job(errors: str, folder: str, most_bytes: int | None) -> None:
    """Does the main job in this process; no file may become larger than so many bytes."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
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
    """The job in a folder, disturbed."""

    def __init__(self, context: ForkServerContext, folder: Path, chance: random.Random):
        self.context, self.folder, self.chance = context, folder, chance
        self.damaged: list[Path] = []
        self.told: list[str] = []
        self.attempts = 0

    def start(self, most_bytes: int | None = None) -> Attempt:
        """Starts the job."""
        self.attempts += 1
        errors = self.folder.with_name(f"errors-{self.attempts}")
        arguments = (str(errors), str(self.folder), most_bytes)
        # It ends with this one, whatever that dies of.
        process = self.context.Process(target=do_job, args=arguments, daemon=True)
        process.start()
        return Attempt(process, errors)

    def finish(self) -> None:
        """Does the job to its end; what it says is damaged is put back."""
        lines: list[str] = []
        for _ in range(10):
            code, lines = self.start().end()
            if code == 0:
                return
            self.put_back(code, lines)
        raise Fault(f"it finds ever more damage: {lines}")

    def put_back(self, code: int, lines: list[str]) -> None:
        """Puts back the damaged file that a line names."""
        if code != 2 or len(lines) != 1 or not self.damaged:
            raise Fault(f"exit code {code}: {lines}")
        named = [path for path in self.damaged if _is_named(path, self.folder, lines[0])]
        if not named:
            raise Fault(f"{lines[0]!r} names none of the damaged {list(map(str, self.damaged))}")
        for path in named:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_original(path), path)
            self.damaged.remove(path)
        self.told.append(f"was told: {lines[0][:100]}")

    def signal(self, seconds: float) -> None:
        """Sends a signal, and at times a second one at once."""
        number = self.chance.choice(SIGNALS)
        attempt, delay = self.start(), self.chance.uniform(0, seconds)
        if not attempt.wait(delay):
            os.kill(attempt.process.pid or 0, number)
            if self.chance.random() < 0.2:
                attempt.wait(self.chance.uniform(0, 1))
                if attempt.process.is_alive():
                    os.kill(attempt.process.pid or 0, number)
        code, lines = attempt.end()
        self.told.append(f"{number.name} after {delay:.1f} s")
        if code == 2:
            self.put_back(code, lines)
        elif code not in (0, -number, 128 + number):
            raise Fault(f"exit code {code} after {number.name}: {lines}")
        elif code > 0 and not (len(set(lines)) == 1 and lines[0].startswith("stopped by ")):
            raise Fault(f"after {number.name}: {lines}")

    def fill_disk(self, seconds: float) -> None:
        """Leaves a disk hardly any room, or where none can be had, files."""
        if not self.folder.is_mount():
            most = int(10 ** self.chance.uniform(3, 5.5))
            code, lines = self.start(most).end()
            self.told.append(f"files of at most {most} bytes")
        else:
            attempt, delay = self.start(), self.chance.uniform(0, seconds)
            attempt.wait(delay)
            left, filler = int(10 ** self.chance.uniform(2, 6)), self.folder / "filler"
            room = shutil.disk_usage(self.folder).free - left
            # What the job has written since leaves less room, or none.
            with contextlib.suppress(OSError):
                filler.write_bytes(bytes(max(0, room)))
            code, lines = attempt.end()
            filler.unlink()
            self.told.append(f"a disk with {left} bytes left after {delay:.1f} s")
        words = ("No space left", "File too large", "the disk of")
        if code == 2 and len(lines) == 1 and not any(word in lines[0] for word in words):
            self.put_back(code, lines)
        elif code not in (0, 2) or len(lines) != (code == 2):
            raise Fault(f"exit code {code} on a full disk: {lines}")

    def damage(self, _: float) -> None:
        """Cuts, changes or removes a file of those that lie there; at first of the whole job."""
        if not self.attempts:
            self.finish()
        files = [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.stat().st_size and not path.name.startswith(".")
        ]
        files = [path for path in files if path not in self.damaged]
        path = self.chance.choice(files)
        _original(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, _original(path))
        content = bytearray(path.read_bytes())
        place = self.chance.randrange(len(content))
        how = self.chance.choice(("cut", "changed", "removed"))
        if how == "removed":
            path.unlink()
        else:
            content[place] ^= 1 << self.chance.randrange(8)
            path.write_bytes(content[:place] if how == "cut" else content)
        self.damaged.append(path)
        self.told.append(f"{how} {path.relative_to(self.folder)}")

    def do_twice(self, seconds: float) -> None:
        """Starts a second process while the first is at work."""
        first, delay = self.start(), self.chance.uniform(0, seconds)
        first.wait(delay)
        second = self.start()
        self.told.append(f"a second process after {delay:.1f} s")
        for code, lines in (first.end(), second.end()):
            if code == 2 and len(lines) == 1 and "is held by" in lines[0]:
                continue
            if code == 2:
                self.put_back(code, lines)
            elif code:
                raise Fault(f"exit code {code} of two processes: {lines}")


FAULTS: tuple[Callable[[Round, float], None], ...] = (
    Round.signal, Round.signal, Round.damage, Round.damage, Round.damage, Round.fill_disk,
    Round.do_twice,
)  # fmt: skip


def _original(path: Path) -> Path:
    return Path(tempfile.gettempdir()) / f"fault-test-{os.getpid()}" / str(path).lstrip("/")


def _is_named(path: Path, folder: Path, line: str) -> bool:
    """Tests if a line names a file, or a folder that it lies in."""
    below = path.relative_to(folder)
    names = {str(folder / above) for above in (below, *below.parents[:-1])}
    return any(name in line for name in names) or path.name in line


def results_of(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The bytes of all results by their names."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.suffix in RESULTS or ".array_record-" in path.name)
        and not any(part in path.as_posix() for part in without)
    }


@contextlib.contextmanager
def _clean(folder: Path, megabytes: int) -> Iterator[None]:
    """Gives an empty folder, on a disk of its own where one may be had."""
    folder.mkdir(parents=True)
    size = f"size={megabytes}m"
    if os.geteuid() == 0 and shutil.which("mount"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True)
    try:
        yield
    finally:
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder)


def run_rounds(rounds: int, seed: int, minutes: float, folder: Path) -> int:
    """Does so many rounds, or those that fit in the time, and returns their number.

    Raises:
      Fault: the job did not do as it should.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    # Imported once; what a process does begins with a fork.
    context.set_forkserver_preload(["kd_ranker.api", "kd_ranker.main"])
    chain_folder, until = folder / "job", time.monotonic() + 60 * minutes
    with _clean(chain_folder, 64):
        Round(context, chain_folder, random.Random(0)).finish()
        expected = results_of(chain_folder)
    with _clean(chain_folder, 64):
        since = time.monotonic()
        Round(context, chain_folder, random.Random(0)).finish()
        seconds = time.monotonic() - since
        _compare(expected, results_of(chain_folder))
    print(f"undisturbed: {len(expected)} results in {seconds:.1f} s", flush=True)
    for number in range(rounds):
        if time.monotonic() > until:
            return number
        chance, since = random.Random(f"{seed} {number}"), time.monotonic()
        with _clean(chain_folder, 64):
            of_round = Round(context, chain_folder, chance)
            try:
                for fault in chance.choices(FAULTS, k=chance.randint(1, 3)):
                    fault(of_round, seconds)
                of_round.finish()
                # Lines that are lost are not written again.
                without = tuple(path.name for path in of_round.damaged if path.suffix == ".jsonl")
                lost = ("metrics.jsonl", "losses") if without else ()
                _compare(
                    {name: of for name, of in expected.items() if not any(p in name for p in lost)},
                    results_of(chain_folder, lost),
                )
            except Fault as fault:
                text = "; ".join(of_round.told)
                raise Fault(f"seed {seed}, round {number}: {text}\n{fault}") from fault
        told = "; ".join(of_round.told)
        print(f"round {number}: {told}; the same in {time.monotonic() - since:.0f} s", flush=True)
    return rounds


def _compare(expected: dict[str, bytes], found: dict[str, bytes]) -> None:
    if differing := [name for name, of in expected.items() if found.get(name) != of]:
        raise Fault(f"other results than undisturbed: {', '.join(differing)}")


def main() -> None:
    """Does the rounds that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0, help="no round begins after that")
    parser.add_argument("--folder", type=Path, help="to work in; the default is a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fault-test-"))
    # One that is ignored would be ignored by what is started here as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run_rounds(arguments.rounds, arguments.seed, arguments.minutes, folder.absolute())
    except Fault as fault:
        sys.exit(f"failed: {fault}")
    print(f"{done} rounds, no difference, no traceback")


if __name__ == "__main__":
    main()
