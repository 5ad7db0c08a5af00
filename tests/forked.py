"""Programs in processes that start with JAX and the package imported, which takes seconds.

They are forks of a server that has imported both and done nothing else: it has looked for no
device. Otherwise they are processes of their own: arguments, exit code, signals, what they write.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["kd_ranker.api", "kd_ranker.main"])
_SECONDS = 1500
# What a process of its own would read of the environment, and a fork has read already.
_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


class Program:
    """`python` with `arguments`, -m MODULE or -c PROGRAM first, at the repository's root."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        settings = {name: getattr(jax.config, name) for name in _SETTINGS}
        self._arguments, self._folder = arguments, tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        paths = [str(path) for path in self._outputs]
        environment = {**os.environ, **environment}
        self._process = _SERVER.Process(target=_run, args=(arguments, environment, settings, paths))
        self._process.start()

    def ended(self) -> subprocess.CompletedProcess:
        """Waits for its end, which comes by a signal where it takes too long."""
        self._process.join(_SECONDS)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        texts = [path.read_text() if path.exists() else "" for path in self._outputs]
        self._folder.cleanup()
        return subprocess.CompletedProcess(self._arguments, self._process.exitcode, *texts)


def _run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    settings: Mapping[str, Any],
    outputs: Sequence[str],
) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for name, value in settings.items():
        jax.config.update(name, value)
    kind, program, *rest = arguments
    sys.argv = [program if kind == "-m" else kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(program, {"__name__": "__main__"})
    finally:
        # The end of a fork leaves these out.
        atexit._run_exitfuncs()
