"""Which files a path means: a file, a directory, a glob, or an fsspec URL of these."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import fsspec

from kd_ranker.errors import UserError

SUFFIXES = (".parquet", ".pq")


class Found(NamedTuple):
    """The files of a log: their file system, and their paths in it, sorted."""

    system: Any
    files: list[str]


def find_files(url: str) -> Found:
    """The Parquet files that `config.data.path` names.

    Raises:
      UserError: there is none.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
        if any(character in path for character in "*?["):
            found = [file for file in system.glob(path) if system.isfile(file)]
            if not found:
                raise UserError(f"data.path={url} matches no file")
        elif system.isdir(path):
            found = _in_directory(url, system.find(path))
        elif system.isfile(path):
            found = [path]
        else:
            raise UserError(f"data.path={url} does not exist; give a file, a directory or a glob")
    except UserError:
        raise
    # Each store raises what it likes: an unknown protocol, a missing package, refused access.
    except Exception as error:
        raise UserError(f"data.path={url} cannot be read: {error}") from error
    return Found(system, sorted(found))


def _in_directory(url: str, found: Sequence[str]) -> list[str]:
    """The Parquet files of a directory; what begins with _ or . is a writer's own."""
    files = [
        file
        for file in found
        if file.endswith(SUFFIXES) and not file.rpartition("/")[2].startswith(("_", "."))
    ]
    if not files:
        raise UserError(f"data.path={url} holds no file that ends in {' or '.join(SUFFIXES)}")
    return files
