"""C++ functions for a CPU, called from compiled programs by XLA's foreign function interface.

A source is compiled once for a user and a release of jaxlib, if the machine has a C++ compiler.
There is always a version for XLA as well, with the same results to rounding.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import textwrap
from pathlib import Path

import jax
import jaxlib
import platformdirs
from absl import logging

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")


@functools.cache
def is_available(source: Path, *functions: str) -> bool:
    """Compile and load the functions of a source, and register them under their names.

    Returns:
      False where JAX computes on another device; or, with a warning, if they cannot be compiled.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        loaded = ctypes.CDLL(str(library(source)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logging.warning(
            "%s cannot be compiled (%s), so XLA's slower version is used; to avoid that, install a "
            "C++ compiler such as g++",
            source.name,
            textwrap.shorten(reason, 100),
        )
        return False
    for name in functions:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def library(source: Path) -> Path:
    """Return the compiled library of a source, from the user's cache folder if it is there.

    Raises:
      OSError: there is no compiler, or the folder cannot be written.
      subprocess.SubprocessError: the compiler failed.
    """
    text = source.read_bytes()
    version = f"{jaxlib.__version__} {platform.system()} {platform.machine()} {_FLAGS}"
    digest = hashlib.sha256(text + version.encode()).hexdigest()[:16]
    path = platformdirs.user_cache_path("kd_ranker") / "native" / f"{source.stem}-{digest}.so"
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
            [compiler, *_FLAGS, include, str(source), "-o", str(unfinished)],
            check=True,
            capture_output=True,
            text=True,
        )
        # Other processes see all of it or nothing.
        os.replace(unfinished, path)
    return path
