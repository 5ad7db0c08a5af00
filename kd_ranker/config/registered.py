"""A config file that registers a loss, a mode or the like, run again in other processes."""

import functools
import runpy
import socket
from pathlib import Path

from kd_ranker.errors import UserError


@functools.lru_cache(maxsize=1)
def register(file: str) -> None:
    """Runs the file that `config.registered_by` names, once a process; "" names none.

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
