"""The tables of a run in its folder, with a manifest that records the measured rankers."""

from collections.abc import Collection, Mapping
from pathlib import Path

from kd_ranker import manifest
from kd_ranker.errors import UserError
from kd_ranker.manifest import MadeOf
from kd_ranker.training.processes import on_first
from kd_ranker.training.workdir import CONFIG_FILE, write_atomically

_REMEDY = (
    "start the command that made it again, with its flags: it writes the tables, and trains "
    "nothing again"
)


def write_tables(
    folder: Path,
    tables: Mapping[str, str | bytes],
    made_of: MadeOf,
    parts: Collection[str] = (),
) -> None:
    """Write tables by their file names, then the manifest of the folder, with its config if any.

    Args:
      folder: of a run, a cohort or a sweep.
      tables: their contents by file name.
      made_of: fingerprints of the rankers that are measured.
      parts: files that the tables were joined from, such as the manifests of cohorts.
    """
    on_first(lambda: (folder / manifest.FILE).unlink(missing_ok=True))
    for file, content in tables.items():
        write_atomically(folder / file, content)
    config = [CONFIG_FILE] if (folder / CONFIG_FILE).exists() else []
    on_first(lambda: manifest.write(folder, made_of, [*tables, *parts, *config]))


def is_measured(folder: Path, made_of: MadeOf) -> bool:
    """Test whether a folder holds unchanged tables of exactly these rankers."""
    return manifest.is_made_of(folder, made_of)


def is_whole(folder: Path) -> bool:
    """Test whether a folder holds unchanged tables of any rankers."""
    try:
        check_whole(folder)
    except UserError:
        return False
    return True


def check_whole(folder: Path) -> None:
    """Check the tables of a run before they are read.

    Raises:
      UserError: one is missing or has changed.
    """
    manifest.check(folder, _REMEDY)
