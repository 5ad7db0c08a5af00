"""The frame of every entry point around its one library call: flags in, errors out as one line.

It alone reads flags, and only for the entry points: the library itself knows none.
"""

import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kd_ranker.config import checks
from kd_ranker.errors import UserError

BAD_INPUT = 2

# Of a path that the command line gives; an OSError's own message names the path.
_BAD_PATH = (FileExistsError, NotADirectoryError, PermissionError)


def launch(command: Callable[[ConfigDict, Path], None], needs_workdir: bool = True) -> None:
    """Parses `--config` and `--workdir`, runs `command`, and exits with 2 on bad input."""
    workdir = flags.DEFINE_string("workdir", None, "The folder that the run owns.")

    def parse(arguments: list[str]) -> list[str]:
        config, others = read_config_flag(arguments)
        # Overrides are flags of their own, each of the type of its key.
        config_flags.DEFINE_config_dict("config", config, sys_argv=others)
        rest = flags.FLAGS(others)
        if needs_workdir and not workdir.value:
            raise UserError("--workdir is missing; give a folder for what the run leaves")
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags look like --name=value")
        return rest

    def run(_: list[str]) -> None:
        config = with_home(flags.FLAGS["config"].value)
        command(config, Path(workdir.value or ".").expanduser())

    _start(parse, run)


def launch_on_workdirs(command: Callable[[list[Path], Path], None]) -> None:
    """The same for a command on workdirs that are there: `--workdir=OUTPUT [WORKDIR ...]`.

    Without any, `--workdir` itself is read.
    """
    output = flags.DEFINE_string(
        "workdir", None, "The folder to write to; read, too, where no other is named."
    )

    def parse(arguments: list[str]) -> list[str]:
        rest = flags.FLAGS(arguments)
        if not output.value:
            raise UserError("--workdir is missing; give the folder of a sweep, or of the report")
        return rest

    def run(arguments: list[str]) -> None:
        workdir, *others = (Path(str(of)).expanduser() for of in (output.value, *arguments[1:]))
        command(others or [workdir], workdir)

    _start(parse, run)


def with_home(config: ConfigDict) -> ConfigDict:
    """Puts the home folder in place of ~ in the paths of a config: no shell does so behind a =."""
    for section, name in (("data", "dir"), ("data", "path"), ("teacher", "workdir")):
        config[section][name] = os.path.expanduser(config[section][name])
    return config


def _start(parse: Callable[[list[str]], list[str]], run: Callable[[list[str]], None]) -> None:
    def parse_or_fail(arguments: list[str]) -> list[str]:
        try:
            return parse(arguments)
        # Whatever the setting of a key raises is about the command line.
        except Exception as error:
            fail(error)

    def main(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            run(arguments)
        except (UserError, *_BAD_PATH) as error:
            fail(error)

    app.run(main, flags_parser=parse_or_fail)


def read_config_flag(arguments: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Loads the config file that `--config` names, before its overrides are parsed.

    Args:
      arguments: the command line.

    Returns:
      The config, and the arguments without `--config`.

    Raises:
      UserError: the flag or the file is missing, the file does not load, or an override names no
        key of it.
    """
    early = flags.FlagValues()
    early.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "", flag_values=early)
    others = early(arguments, known_only=True)
    if early.config is None:
        raise UserError("--config is missing; give --config=configs/cascade.py, say")
    file, *variant = early.config.split(":", 1)
    if not Path(file).is_file():
        raise UserError(f"--config={early.config}: there is no file {file}")
    try:
        config = runpy.run_path(file)["get_config"](*variant)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--config={early.config} does not load: {reason}") from error
    for argument in others:
        if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            checks.check_key(config, override[1])
    return config, others


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits."""
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.exit(BAD_INPUT)
