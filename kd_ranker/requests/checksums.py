"""Sizes and CRC-32 of the files of a dataset, written with it and checked when it is opened.

The contents of specifications, items and counts are checked each time. Of large files and of
records the size is, and the contents only where a file has changed since `checksums.json` did:
written to, or copied. The time of that file tells up to when all is known to be well, so nothing is
checked twice, and opening many gigabytes takes no longer than a few. What changed without a trace,
as on a failing disk, a thorough check finds.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
# Files whose contents are checked each time, up to so many bytes: they are read when opened.
_READ_AT_ONCE, _SMALL = (".json", ".npy"), 2**26
_CHUNK = 2**20

# Name, relative to the folder -> bytes and CRC-32.
_Sums = dict[str, list[int]]


def write(folder: Path, beside: Collection[Path] = ()) -> None:
    """Writes `checksums.json` of all files of a folder.

    Args:
      folder: of a dataset, whole.
      beside: files that reading its requests does not need, and which may be removed.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    with ThreadPoolExecutor() as pool:
        sums = dict(zip(files, pool.map(_crc, files), strict=True))
    listed: dict[str, _Sums] = {"needed": {}, "beside": {}}
    for path in files:
        of = listed["beside" if path in beside else "needed"]
        of[path.relative_to(folder).as_posix()] = [path.stat().st_size, sums[path]]
    (folder / FILE).write_text(json.dumps(listed, indent=2))


def check(folder: Path, beside: bool = False, thorough: bool = False) -> None:
    """Checks the files of a folder against `checksums.json`.

    Args:
      folder: of a dataset.
      beside: whether to check what reading its requests does not need, as far as it is there.
      thorough: whether to check the contents of all files, whatever their size and age.

    Raises:
      OSError: a file is missing.
      ValueError: a file, which is named, is not what was written.
    """
    listed = json.loads((folder / FILE).read_text())
    known = (folder / FILE).stat().st_mtime_ns
    sums: Mapping[str, list[int]] = listed["needed"]
    if beside:
        there = {name: of for name, of in listed["beside"].items() if (folder / name).exists()}
        sums = {**sums, **there}
    newest, suspects = known, []
    for name, (size, _) in sums.items():
        status = (folder / name).stat()
        if status.st_size != size:
            raise ValueError(f"{name} has {status.st_size:,} bytes of {size:,}")
        is_small = size <= _SMALL and name.endswith(_READ_AT_ONCE)
        if thorough or is_small or status.st_mtime_ns > known:
            suspects.append(name)
        newest = max(newest, status.st_mtime_ns)
    with ThreadPoolExecutor() as pool:
        found = pool.map(_crc, (folder / name for name in suspects))
        for name, crc in zip(suspects, found, strict=True):
            if crc != sums[name][1]:
                raise ValueError(f"the bytes of {name} are not those that were written")
    if newest > known:
        # A file of others keeps its time, and the next check is as long.
        with contextlib.suppress(OSError):
            os.utime(folder / FILE, ns=(newest, newest))


def fingerprint(folder: Path, files: Iterable[str]) -> str:
    """Return twelve hex digits of a digest of some files that `checksums.json` lists.

    Args:
      folder: of a dataset.
      files: their names relative to the folder, in a fixed order.

    Raises:
      KeyError: `checksums.json` does not list one of them.
    """
    needed = json.loads((folder / FILE).read_text())["needed"]
    listed = [[name, *needed[name]] for name in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


def of_files(paths: Iterable[Path]) -> str:
    """The CRC-32 of each of some files, as text."""
    return " ".join(str(_crc(path)) for path in paths)


def _crc(path: Path) -> int:
    crc, chunk = 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while number := file.readinto(chunk):
            crc = zlib.crc32(chunk[:number], crc)
    return crc
