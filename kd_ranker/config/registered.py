"""A config file that registers a loss, a mode or the like, executed in other processes."""

import functools
import runpy
import socket
from pathlib import Path

from kd_ranker.errors import UserError


@functools.lru_cache(maxsize=1)
def register(file: str) -> None:
    """Execute the file at `config.registered_by` once per process; "" is no file.

    Raises:
      UserError: it is not on this machine, or it fails.
    """
    if not file:
        return
    if not Path(file).is_file():
        raise UserError(
            f"{file}, which registers what the config names, is not on {socket.gethostname()}; put "
            "it where all machines see it"
        )
    try:
        runpy.run_path(file)
    except Exception as error:
        raise UserError(f"{file} does not load: {type(error).__name__}: {error}") from error
