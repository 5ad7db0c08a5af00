"""The small cascade: its dataset and its teacher, made once for all tests and pytest-xdist workers.

Tests that run a command in a process of its own are here because they share its compiled programs.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import cascade
from kd_ranker.evaluation import results
from kd_ranker.pipeline import commands

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/cascade.py:small"


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
        config = cascade.get_config("small")
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

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Lets one process at a time past."""
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def open_world(tmp_path_factory) -> World:
    """The world of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_world"
    root.mkdir(exist_ok=True)
    _share_compiled_programs(root / "compiled")
    world = World(root)

    def make_teacher(folder: Path) -> None:
        commands.prepare_data(world.config())
        commands.train_teacher(world.config(teacher__workdir=""), folder)

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


def run(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `python` with `arguments` at the root of the repository."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


# A real SIGKILL at an exact moment: when a run logs a step, or has begun to save one.
_DYING = """
import os, runpy, signal, sys
from kd_ranker.training import checkpoints, workdir
module, moment, name, at = sys.argv[1:5]
write, save = workdir.MetricsWriter.write, checkpoints.save

def die_at(step):
    if step >= int(at):
        os.kill(os.getpid(), signal.SIGKILL)

def dying_write(self, step, scalars):
    write(self, step, scalars)
    if moment == "logging" and self._path.parent.name == name:
        die_at(step)

def dying_save(manager, step, *rest):
    save(manager, step, *rest)
    if moment == "saving" and manager.directory.parent.name == name:
        die_at(step)

workdir.MetricsWriter.write, checkpoints.save = dying_write, dying_save
sys.argv = [module, *sys.argv[5:]]
runpy.run_module(module, run_name="__main__")
"""


def run_and_kill(module: str, moment: str, name: str, at: int, flags: list[str]) -> None:
    """Runs an entry point until the run in a workdir called `name` is "logging" or "saving"."""
    finished = run("-c", _DYING, module, moment, name, str(at), *flags)
    assert finished.returncode == -9, finished.stderr
