"""The small cascade: its dataset and its teacher, made once for all tests and pytest-xdist workers.

Tests that run a command in a process of its own are here because they share its compiled programs.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.configs import cascade
from kd_ranker.evaluation import results
from tests import forked

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/cascade.py:small"
SWEEP = {"sweep__modes": ("none", "aux"), "sweep__seeds": (0, 1), "train__eval_every": 0}


class World(NamedTuple):
    """Where the dataset and the teacher lie."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def changes(self, **more) -> dict:
        return {
            "data.dir": str(self.root / "datasets"),
            "parallel.devices": 1,
            "teacher.workdir": str(self.teacher),
        } | {key.replace("__", "."): value for key, value in more.items()}

    def config(self, **changes) -> ConfigDict:
        """The small cascade's config; `train__steps=3` changes `train.steps`."""
        config = cascade("small")
        config.update_from_flattened_dict(self.changes(**changes))
        return config

    def flags(self, workdir: Path, **changes) -> list[str]:
        """The flags that make `config(**changes)`."""
        overrides = [f"--config.{key}={value}" for key, value in self.changes(**changes).items()]
        return [CONFIG, f"--workdir={workdir}", *overrides]

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `make` once for all tests; they must not change it."""
        folder = self.root / name
        with self.locked(name):
            if not (folder / results.FILE).exists():
                make(folder)
        return folder

    def student(self, mode: str) -> Path:
        """The workdir of a student of that mode; a test runs commands only on a copy."""
        config = self.config(distill__mode=mode)
        return self.made(mode, lambda folder: api.train(config, folder))

    def sweep(self) -> Path:
        """The workdir of the sweep of `SWEEP`."""
        config = self.config(**SWEEP)
        return self.made("swept", lambda folder: api.sweep(config, folder))

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Lets one process at a time past."""
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def sweep(config: ConfigDict, workdir: Path) -> bool:
    """Runs a sweep; False if it was complete before."""
    lines: list[str] = []
    api.sweep(config, workdir, show=lines.append)
    return not any("there is nothing to do" in line for line in lines)


def rows_on_test(trained: api.Trained, role: str = "student") -> list[dict]:
    """The rows of a run's rankers on the test split."""
    table = trained.results
    return table[(table["split"] == "test") & (table["role"] == role)].to_dict("records")


def open_world(tmp_path_factory) -> World:
    """The world of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_world"
    root.mkdir(exist_ok=True)
    _share_compiled_programs(root / "compiled")
    world = World(root)

    def make_teacher(folder: Path) -> None:
        api.prepare(world.config())
        api.train_teacher(world.config(teacher__workdir=""), folder)

    world.made(world.teacher.name, make_teacher)
    return world


def _share_compiled_programs(folder: Path) -> None:
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        # Processes that tests start read the environment.
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def free_port() -> int:
    """A port below those that the system hands out, so that no other process gets it meanwhile."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a module (-m) or a program (-c) at the root of the repository, see `forked`."""
    return forked.Program(*arguments).ended()


# A real signal at an exact moment: when a run logs a step, has begun to save one, or has written so
# many files of its own to a folder.
_INTERRUPTED = """
import os, runpy, signal as signals, sys
from kd_ranker.training import checkpoints, workdir
module, moment, name, at, signal = sys.argv[1:6]
write, save, write_file = workdir.MetricsWriter.write, checkpoints.save, workdir.write_atomically
written, interrupted = 0, False
signals.signal(signals.SIGHUP, signals.SIG_DFL)  # which the parent of these tests may ignore

def interrupt_at(step):
    global interrupted
    if step >= int(at) and not interrupted:
        interrupted = True
        os.kill(os.getpid(), int(signal))

def interrupted_write(self, step, scalars):
    write(self, step, scalars)
    if moment == "logging" and self._path.parent.name == name:
        interrupt_at(step)

def interrupted_save(saved, step, *rest):
    save(saved, step, *rest)
    if moment == "saving" and saved.directory.parent.name == name:
        interrupt_at(step)

def interrupted_write_file(path, content):
    global written
    if moment == "writing" and path.parent.name == name:
        written += 1
        interrupt_at(written)
    write_file(path, content)

workdir.MetricsWriter.write, checkpoints.save = interrupted_write, interrupted_save
for imported in list(sys.modules.values()):
    if getattr(imported, "write_atomically", None) is write_file:
        imported.write_atomically = interrupted_write_file
sys.argv = [module, *sys.argv[6:]]
runpy.run_module(module, run_name="__main__")
"""


def run_and_kill(module: str, moment: str, name: str, at: int, flags: list[str]) -> None:
    """Runs an entry point until it is at `moment` in a workdir called `name`.

    A moment is "logging" or "saving" the step `at`, or "writing" the file with that number.
    """
    finished = run_and_signal(signal.SIGKILL, module, moment, name, at, flags)
    assert finished.returncode == -9, finished.stderr


def run_and_signal(
    number: int, module: str, moment: str, name: str, at: int, flags: list[str]
) -> subprocess.CompletedProcess:
    """Runs an entry point, which gets a signal where `run_and_kill` would kill it."""
    return run("-c", _INTERRUPTED, module, moment, name, str(at), str(int(number)), *flags)


@contextlib.contextmanager
def stopped(module: str, name: str, at: int, flags: list[str]) -> Iterator[subprocess.Popen]:
    """An entry point that is stopped in its run in a workdir called `name`; killed at the end."""
    stop = str(int(signal.SIGSTOP))
    program = ["-c", _INTERRUPTED, module, "logging", name, str(at), stop, *flags]
    with subprocess.Popen([sys.executable, *program], cwd=ROOT) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            yield process
        finally:
            process.kill()
