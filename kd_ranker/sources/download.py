"""Raw files of public datasets, fetched from their publishers and verified."""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pooch
from ml_collections import ConfigDict

from kd_ranker.errors import UserError


class Archive(NamedTuple):
    """A zip archive on its publisher's site."""

    url: str
    sha256: str
    folder: str  # holds the files, inside the archive


def fetch_files(url: str, files: Mapping[str, str], data: ConfigDict) -> list[Path]:
    """Find files in `data.path`, or download them below `data.dir/downloads` if that is empty.

    Args:
      url: of the folder that holds them, with a / at its end.
      files: name -> SHA-256; also checked of files in `data.path`.
      data: `config.data`.

    Raises:
      UserError: a file is missing, is not the published one, or cannot be fetched.
    """
    paths = []
    for name, sha256 in files.items():
        path = Path(data.path) / name
        if not data.path:
            folder = Path(data.dir) / "downloads"
            try:
                path = Path(pooch.retrieve(url + name, f"sha256:{sha256}", name, folder))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"could not fetch {url}{name} ({error}); fetch it by hand and set data.path "
                    "to its folder"
                ) from error
        elif not path.is_file():
            raise UserError(f"{path} does not exist; fetch it from {url}{name}")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise UserError(f"{path} is not the published file; fetch it from {url}{name}")
        paths.append(path)
    return paths


def fetch(archive: Archive, data_dir: str) -> Path:
    """Download and unpack an archive below `data_dir/downloads`, unless it is there.

    Returns:
      The folder that holds the files.

    Raises:
      UserError: it cannot be fetched, or is not the archive that was expected.
    """
    unpacked = Path(data_dir) / "downloads" / archive.sha256[:16]
    if unpacked.exists():
        return unpacked / archive.folder
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=20
    )
    try:
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        # Not by pooch: a run that is killed while it unpacks would leave half of the files.
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as temporary:
            file = pooch.retrieve(
                archive.url, f"sha256:{archive.sha256}", path=temporary, downloader=downloader
            )
            shutil.unpack_archive(file, Path(temporary) / "whole", format="zip")
            (Path(temporary) / "whole").rename(unpacked)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"could not fetch {archive.url} ({reason}); fetch and unpack it by hand and set "
            "data.path to its folder"
        ) from error
    return unpacked / archive.folder
