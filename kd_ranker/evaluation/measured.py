"""`measured.json`: whose the tables of results in a folder are, and the CRC-32 of each.

It is removed before the tables are written, and written after them.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from kd_ranker.errors import UserError
from kd_ranker.evaluation import kept, results
from kd_ranker.training.checkpoints import Identity
from kd_ranker.training.workdir import write_atomically

FILE = "measured.json"
_TABLES = (
    results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE, kept.FILE, kept.CURVES_FILE,
)  # fmt: skip


def write_tables(folder: Path, tables: Mapping[str, str | bytes], whose: Identity) -> None:
    """Writes tables by their file names, each whole or not at all, and whose they are."""
    (folder / FILE).unlink(missing_ok=True)
    for file, content in tables.items():
        write_atomically(folder / file, content)
    mark_measured(folder, whose)


def mark_measured(folder: Path, whose: Identity) -> None:
    """Writes down whose the tables of results in a folder are, and their checksums."""
    write_atomically(folder / FILE, json.dumps(_mark(folder, whose), indent=2))


def is_measured(folder: Path, whose: Identity) -> bool:
    """True if the tables of results in a folder are there, as they were written, and of `whose`."""
    try:
        return json.loads((folder / FILE).read_text()) == _mark(folder, whose)
    except (OSError, ValueError):  # missing, or cut short
        return False


def is_whole(folder: Path) -> bool:
    """True if the tables of results in a folder are there, as they were written by anyone."""
    try:
        return not _differing(folder)
    except (OSError, ValueError):
        return False


def check_whole(folder: Path) -> None:
    """Checks the tables of a run before they are read, if there are sums of them.

    Raises:
      UserError: one is missing, or not as it was written.
    """
    if not (folder / FILE).exists():
        return
    try:
        differing = _differing(folder)
    except (OSError, ValueError):
        differing = FILE
    if differing:
        raise UserError(
            f"{folder / differing} is not as it was written; start the command that made it again, "
            "with its flags: it makes the tables anew, and trains nothing again"
        )


def _differing(folder: Path) -> str:
    """The first file that is not as `measured.json` has it; "" if there is none."""
    recorded = json.loads((folder / FILE).read_text())
    try:
        expected = dict(recorded["files"])
    except (TypeError, KeyError, ValueError):
        return FILE
    found = _checksums(folder)
    return next((file for file in expected if found.get(file) != expected[file]), "")


def _mark(folder: Path, whose: Identity) -> dict[str, dict]:
    return {"identity": dict(whose), "files": _checksums(folder)}


def _checksums(folder: Path) -> dict[str, int]:
    there = [file for file in _TABLES if (folder / file).exists()]
    return {file: zlib.crc32((folder / file).read_bytes()) for file in there}
