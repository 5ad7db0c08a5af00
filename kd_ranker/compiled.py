"""Compiled programs on disk, which a later process of the same user need not compile again."""

import os
from pathlib import Path

import jax
import platformdirs
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from kd_ranker.errors import UserError

AUTO = "auto"
_MOST_BYTES = 2 << 30  # those that no process has used for the longest time go first


def keep_programs(folder: str) -> None:
    """Keep the programs that this process compiles in JAX's persistent compilation cache.

    JAX finds a program by what it computes, the devices, and the release that compiled it. So a
    folder can serve several revisions of the code, and several machines.

    Args:
      folder: where to keep them. "auto" takes the user's cache folder, unless JAX has a cache
        already, as by the variable `JAX_COMPILATION_CACHE_DIR`; if the user's folder cannot be
        written, there is a warning, and each process compiles its programs. "" changes nothing.

    Raises:
      UserError: a folder that was named cannot be written.
    """
    if not folder or (folder == AUTO and _folder_in_use()):
        return
    path = Path(folder).expanduser()
    if folder == AUTO:
        path = platformdirs.user_cache_path("kd_ranker") / "programs"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        reason = f"the folder of compiled programs, {path}, cannot be written: {error}"
        if folder != AUTO:
            raise UserError(f"{reason}; name another in compilation_cache") from error
        logging.warning(
            "%s; name another in compilation_cache, or each process compiles its programs again",
            reason,
        )
        return
    if _folder_in_use() == str(path):
        return
    # JAX keeps the folder open that it had at the first compilation.
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    # Many programs take less than the second from which JAX would keep them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _folder_in_use() -> str | None:
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return folder
