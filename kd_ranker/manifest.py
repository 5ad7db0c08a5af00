"""`manifest.json`: what a finished folder was made of, and the size and SHA-256 of each file.

It is written last: a folder without one is not finished. Every folder that a later command depends
on has one: datasets, runs, cohorts, exports and scored logs. "Is this the same content?" has one
answer everywhere, a digest:

    dataset     of the bytes of its files
    teacher     of its parameters
    run         of its config, its dataset and its teacher, the entries of `provenance`

Example:
    write(folder, provenance={"config": digest(config), "dataset": digest_of_files(dataset_folder)})
    check(folder, remedy="make it again with: …", provenance=…)  # when the folder is opened
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from kd_ranker.errors import UserError

FILE = "manifest.json"
# Files of at most this many bytes are read at every check, larger ones at a thorough one.
_SMALL = 2**24

_SECTIONS = ("provenance", "files", "about")

Provenance = Mapping[str, str]
"""Provenance of the dependencies of a folder by name, such as "config" and "dataset"."""


def digest(value: Any) -> str:
    """Return twelve hex digits of the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or absent, even if the process dies; text as UTF-8.

    Raises:
      UserError: there is a folder of that name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_is_no_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_is_no_folder(path: Path) -> None:
    """Raise UserError if there is a folder where a file is to be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder in the place of a file; remove or rename it")


def write(
    folder: Path,
    provenance: Provenance,
    files: Iterable[str] | None = None,
    known: Mapping[str, list[Any]] = MappingProxyType({}),
    about: Collection[str] = (),
) -> None:
    """Write the manifest of a finished folder, for `files` relative to it, or all below it.

    Files that another manifest lists are not read; `known` has their entries. Files `about` the
    folder may change or go later: only `is_original` looks at them.
    """
    if files is None:
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
        files = (path.relative_to(folder).as_posix() for path in paths)
    names = sorted(files)
    new = [name for name in names if name not in known]
    entries = {**_entries(folder, new), **known}
    content = {"provenance": dict(provenance), "files": {name: entries[name] for name in names}}
    if about:
        content["about"] = _entries(folder, about)
    write_whole(folder / FILE, json.dumps(content, indent=2))


def remove(folder: Path) -> None:
    """Remove the manifest of a folder before its files change; UserError if it is a folder."""
    path = folder / FILE
    check_is_no_folder(path)
    path.unlink(missing_ok=True)


def read(folder: Path, remedy: str) -> dict[str, Any]:
    """Return the content of a folder's manifest, without comparing it with the files.

    Raises:
      UserError: it is missing or damaged; the message ends with `remedy`.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
        content.setdefault("about", {})  # a manifest of an earlier release has none
        manifest = {section: dict(content[section].items()) for section in _SECTIONS}
        for name, entry in [*manifest["files"].items(), *manifest["about"].items()]:
            _check_entry(name, entry)
    except OSError as error:
        raise UserError(f"{folder} has no {FILE}, so it is not finished; {remedy}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    return manifest


def _check_entry(name: str, entry: Any) -> None:
    """Raise ValueError unless a file is in the folder, and its entry has a size and a SHA-256."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name!r} is not in the folder")
    size, sha256 = entry
    if not isinstance(size, int) or not isinstance(sha256, str):
        raise ValueError(f"{name!r} has {entry!r} in place of a size and a SHA-256")


def check(
    folder: Path, remedy: str, provenance: Provenance | None = None, thorough: bool = False
) -> Provenance:
    """Check the files of a folder against its manifest, and return its dependencies.

    These must equal `provenance`, if that is given. A `thorough` check reads large files too; their
    sizes are always compared.

    Raises:
      UserError: the manifest is missing, a file is missing or has changed, or the folder depends on
        something else. The message names it and ends with `remedy`, how to make the folder again.
    """
    manifest = read(folder, remedy)
    if provenance is not None and (differing := differences(manifest["provenance"], provenance)):
        raise UserError(f"{folder} has other contents: {differing}; {remedy}")
    to_read = []
    for name, (listed, _) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size != listed:
            raise UserError(f"{path} has changed: it has {size:,} bytes of {listed:,}; {remedy}")
        if thorough or size <= _SMALL:
            to_read.append(name)
    for name, entry in _entries(folder, to_read).items():
        if entry != manifest["files"][name]:
            raise UserError(f"{folder / name} has changed; {remedy}")
    return manifest["provenance"]


def has_provenance(folder: Path, provenance: Provenance | None = None) -> bool:
    """Test whether a folder is finished and unchanged, and has this provenance, if given."""
    try:
        check(folder, "", provenance)
    except UserError:
        return False
    return True


def is_original(folder: Path, name: str) -> bool:
    """Test whether a file about a finished folder is the one that it had when it was finished.

    True if the manifest does not list it, as that of an earlier release.
    """
    listed = read(folder, "make it again")["about"].get(name)
    return listed is None or _entries(folder, [name])[name] == listed


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return the entries in which two mappings differ, as text; "" if all agree."""
    names = sorted(before.keys() | now.keys())
    differing = [name for name in names if before.get(name) != now.get(name)]
    return ", ".join(
        f"{name} ({before.get(name)} there, {now.get(name)} now)" for name in differing
    )


def digest_of_files(folder: Path, files: Collection[str], remedy: str) -> str:
    """Return twelve hex digits that identify the content of some files of a finished folder.

    Raises:
      UserError: the manifest is missing, damaged, or does not list one of the files.
    """
    listed = read(folder, remedy)["files"]
    if missing := sorted(set(files) - listed.keys()):
        raise UserError(f"{folder / FILE} does not list {missing[0]}; {remedy}")
    return digest({name: listed[name] for name in files})


def _entries(folder: Path, names: Collection[str]) -> dict[str, list[Any]]:
    """Return the size in bytes and the SHA-256 of each file."""

    def entry(name: str) -> list[Any]:
        with (folder / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return [(folder / name).stat().st_size, sha256]

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))
