"""The flags of the entry points with what they mean, for `--help` and for the shell's completion.

The keys of a config and their help are those of the table in `config.keys`. What is said here is
parsed by nothing: absl reads the flags, see `launch`.
"""

import argparse
import re
from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.config.key import Key
from kd_ranker.config.keys import DATA_KEYS, KEYS

CONFIG = "a config file, or the name of one that comes with the package, such as cascade"
WORKDIR = "the folder that the run owns, or its URL, as gs://bucket/run"
RUN = "the folder or URL of a run that is finished, whose config counts where none is given"
BREAK_LOCK = "remove the lock that a killed process left at the URL of the workdir"
WORKDIRS = "the folder, or URL, to write to; it is read, too, where no WORKDIR is named"


def describe(parser: argparse.ArgumentParser, text: str, config: ConfigDict | None = None) -> None:
    """Tells a parser what an entry point is for, and which flags and config keys it takes.

    Args:
      parser: for its help, or for completion.
      text: the docstring of the entry point; lines that are set in are examples.
      config: that whose values stand beside its keys; None for the defaults of every source.
    """
    flags = "--config=FILE[:VARIANT] [--workdir=FOLDER] [--config.KEY=VALUE ...]"
    _describe(parser, text, flags)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help=CONFIG)
    parser.add_argument("--workdir", metavar="FOLDER", help=WORKDIR)
    parser.add_argument("--break_lock", action="store_true", help=BREAK_LOCK)
    sections: dict[str, list[Key]] = {}
    for key in _keys(config):
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    for section, keys in sections.items():
        group = parser.add_argument_group(f"config.{section}" if section else "config")
        for key in keys:
            value = schema.value_of(config, key.name) if config else key.default
            shown = "…" if isinstance(value, ConfigDict) else repr(value)
            group.add_argument(
                f"--config.{key.name}", metavar=shown, help=key.help.replace("%", "%%")
            )


def describe_on_run(
    parser: argparse.ArgumentParser,
    text: str,
    takes_config: bool,
    flags_of: Mapping[str, tuple[str, str]],
) -> None:
    """The same of an entry point that goes on with a finished run and its config.

    Args:
      parser: likewise.
      text: likewise.
      takes_config: True if keys of the config may be set.
      flags_of: its further flags by name, each with its value if it is not given, and its help.
    """
    names = " ".join(f"[--{name}=…]" for name in flags_of)
    keys = " [--config.KEY=VALUE ...]" * takes_config
    _describe(parser, text, f"--workdir=FOLDER {names}{keys}")
    parser.add_argument("--workdir", metavar="FOLDER", help=RUN)
    for name, (_, told) in flags_of.items():
        parser.add_argument(f"--{name}", help=told.replace("%", "%%"))


def describe_on_workdirs(parser: argparse.ArgumentParser, text: str) -> None:
    """The same of an entry point that reads the workdirs of others, and no config."""
    _describe(parser, text, "--workdir=FOLDER [WORKDIR ...]")
    parser.add_argument("--workdir", metavar="FOLDER", help=WORKDIRS)
    parser.add_argument("--break_lock", action="store_true", help=BREAK_LOCK)


def _describe(parser: argparse.ArgumentParser, text: str, flags: str) -> None:
    # Examples are of a clone; where the package is installed alone, there is one command.
    text = re.sub(r"python -m experiments\.\w+", parser.prog, text)
    parser.description = text.replace("%", "%%")
    parser.usage = f"%(prog)s {flags}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def _keys(config: ConfigDict | None) -> Iterable[Key]:
    if config:
        return (KEYS | DATA_KEYS.get(config.data.name, {})).values()
    of_sources = {name: key for keys in DATA_KEYS.values() for name, key in keys.items()}
    return (KEYS | of_sources).values()
