"""Rows of tables on a CPU in C++: gathered, or updated by Adam, in one pass over a batch's rows.

XLA makes a pass over memory for each intermediate array of rows, of which an update has many;
`docs/benchmarks.md` has the times. `cpu_rows.cc` is compiled once for a user and a release of
jaxlib, if the machine has a C++ compiler. Otherwise XLA does the same to rounding.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib
import numpy as np
import platformdirs
from absl import logging
from jaxtyping import Array, Bool, Float, Int

_SOURCE = Path(__file__).with_suffix(".cc")
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
_SLOWER = "so XLA updates rows on a CPU, which takes about half as long again for a step"


def gather(
    tables: Float[Array, "runs rows W"], row: Int[Array, "M"], width: int
) -> Float[Array, "runs M D"]:
    """Return the first `width` numbers of these rows of each run's table."""
    gathered = jax.ShapeDtypeStruct((tables.shape[0], row.shape[0], width), tables.dtype)
    return jax.ffi.ffi_call("kd_ranker_gather", gathered)(tables, row)


def update_by_adam(
    tables: Float[Array, "runs rows W"],
    row: Int[Array, "M"],
    position: Int[Array, "M"],
    represents: Bool[Array, "M"],
    gradients: Float[Array, "runs M D"],
    learning_rate: Float[Array, "runs"],
    weight_decay: Float[Array, "runs"],
    may_change: Bool[Array, "runs"],
    b1: float,
    b2: float,
    eps: float,
) -> Float[Array, "runs rows W"]:
    """Update rows in place; see `row_optimizers.update_tables`."""
    updated = jax.ShapeDtypeStruct(tables.shape, tables.dtype)
    call = jax.ffi.ffi_call("kd_ranker_update_by_adam", updated, input_output_aliases={0: 0})
    arrays = (row, position, represents, gradients, learning_rate, weight_decay, may_change)
    return call(tables, *arrays, b1=np.float64(b1), b2=np.float64(b2), eps=np.float64(eps))


@functools.cache
def are_available() -> bool:
    """Compile and load the functions; return False, with a warning, if that is impossible.

    False without a warning where JAX computes on another device.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        loaded = ctypes.CDLL(str(library()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logging.warning("%s cannot be compiled (%s), %s", _SOURCE.name, reason.strip(), _SLOWER)
        return False
    for name in ("kd_ranker_gather", "kd_ranker_update_by_adam"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def library() -> Path:
    """Return the compiled library, from the user's cache folder if it is there.

    Raises:
      OSError: there is no compiler, or the folder cannot be written.
      subprocess.SubprocessError: the compiler failed.
    """
    source = _SOURCE.read_bytes()
    version = f"{jaxlib.__version__} {platform.system()} {platform.machine()} {_FLAGS}"
    digest = hashlib.sha256(source + version.encode()).hexdigest()[:16]
    path = platformdirs.user_cache_path("kd_ranker") / "kernels" / f"rows-{digest}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        include = f"-I{jax.ffi.include_dir()}"
        subprocess.run(
            [compiler, *_FLAGS, include, str(_SOURCE), "-o", str(unfinished)],
            check=True,
            capture_output=True,
            text=True,
        )
        # Other processes see all of it or nothing.
        os.replace(unfinished, path)
    return path
