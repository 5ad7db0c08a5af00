"""Raw files of public datasets, fetched and verified by TFDS' download manager."""

import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums

from kd_ranker.errors import UserError


class Archive(NamedTuple):
    """A zip archive on its publisher's site, and what it must be: size in bytes, SHA-256."""

    url: str
    size: int
    sha256: str
    folder: str  # where the files lie inside


def fetch(archive: Archive, data_dir: str) -> Path:
    """Downloads and unpacks an archive below `data_dir/downloads`, unless it is there.

    Returns:
      The folder that holds the files.

    Raises:
      UserError: it cannot be fetched, or is not the archive that was expected.
    """
    unpacked = Path(data_dir) / "downloads" / archive.sha256[:16]
    if unpacked.exists():
        return unpacked / archive.folder
    expected = checksums.UrlInfo(
        size=tfds.core.utils.Size(archive.size),
        checksum=archive.sha256,
        filename=archive.url.rsplit("/", 1)[-1],
    )
    manager = tfds.download.DownloadManager(
        download_dir=unpacked.parent,
        url_infos={archive.url: expected},
        force_checksums_validation=True,
    )
    try:
        # TFDS tries for minutes to reach a server that is not there; this fails at once.
        requests.head(archive.url, timeout=20)
        file = manager.download(archive.url)
        # TFDS would unpack with TensorFlow's file system, which this project does without.
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as temporary:
            shutil.unpack_archive(file, Path(temporary) / "whole", format="zip")
            (Path(temporary) / "whole").rename(unpacked)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"could not fetch {archive.url} ({reason}); fetch and unpack it by hand and set "
            "data.path to its folder"
        ) from error
    return unpacked / archive.folder
