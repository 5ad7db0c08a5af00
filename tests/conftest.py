"""Settles what JAX sees before it is imported: the CPU, with 8 devices.

pytest loads this file in the main process and in each pytest-xdist worker before it loads a test.
"""

import atexit
import ctypes
import gc
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

DEVICES = 8

# Set JAX_PLATFORMS to run the tests somewhere else.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# A program runs a few times in a test, on little data: LLVM's optimisations would take longer than
# they save, and so would a fusion's way through MLIR (releases of XLA that know no other way pass
# over that option), and to cut a program for threads that other workers need. XLA's own
# optimisations, which make the program, stay. XLA_FLAGS overrides any.
_FLAGS = {
    "--xla_force_host_platform_device_count": DEVICES,
    "--xla_backend_optimization_level": 0,
    "--xla_cpu_parallel_codegen_split_count": 1,
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given)]
).strip()

# Workers, and the commands that tests start, find what another has compiled, which saves a fifth of
# the time. It is of this run alone: no test meets a program of another revision.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="kd_ranker-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Workers already share the cores out among themselves; a thread pool a library on top of that
# only makes them wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_variable, "1")

# The same examples at every run, so that a failure is of the change that it appears with;
# HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# What a shell starts in the background ignores SIGINT, and so would all commands of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# To trace a program, and to put a query together, makes objects by the million, few of them garbage
# that reference counts leave behind. Python would look for that after every 700 of them, and again
# and again through all that has been imported, which takes 6% of the time.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The small cascade; JAX is imported only by the tests that use it."""
    from tests import small

    return small.open_world(tmp_path_factory)


def pytest_collection_finish() -> None:
    """Leaves what is there before the first test out of every look for garbage."""
    gc.collect()
    gc.freeze()


# What is compiled stays in memory, and has memory maps: hundreds with 8 devices. A process may have
# 65,530 of them on Linux, and XLA aborts where there are no more.
_MEMORY, _MAPS = Path("/proc/self/statm"), Path("/proc/self/maps")
_MOST_BYTES, _MOST_MAPS, _TESTS = int(1.7e9), 20_000, itertools.count(1)


def _holds_too_much() -> bool:
    if not _MEMORY.exists():
        return False
    resident = int(_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > _MOST_BYTES:
        return True
    # To count them takes time, too much for each test.
    if next(_TESTS) % 8:
        return False
    with _MAPS.open() as maps:
        return sum(1 for _ in maps) > _MOST_MAPS


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forgets what is compiled before it takes up too much memory."""
    yield
    if _holds_too_much():
        import jax  # not before the settings above

        jax.clear_caches()
        gc.collect()
        # glibc keeps what is freed; other C libraries have no such function.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
