"""What every entry point does around its one library call: flags in, errors out as one line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from kd_ranker.errors import UserError

BAD_INPUT = 2


def launch(command: Callable[[ConfigDict, Path], None], needs_workdir: bool = True) -> None:
    """Parses `--config` and `--workdir`, runs `command`, and exits with 2 on bad input."""
    config = config_flags.DEFINE_config_file(
        "config", None, "The config file, as FILE.py[:variant]."
    )
    workdir = flags.DEFINE_string("workdir", None, "The folder that the run owns.")

    def parse(arguments: list[str]) -> list[str]:
        try:
            rest = flags.FLAGS(arguments)
            if config.value is None:
                raise UserError("--config is missing; give --config=configs/cascade.py, say")
            if needs_workdir and not workdir.value:
                raise UserError("--workdir is missing; give a folder for what the run leaves")
            if len(rest) > 1:
                raise UserError(f"{rest[1]!r} is not a flag; flags look like --name=value")
        # Whatever a config file or the setting of a key raises is about the command line.
        except Exception as error:
            fail(error)
        return rest

    def main(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            command(config.value, Path(workdir.value or "."))
        except UserError as error:
            fail(error)

    app.run(main, flags_parser=parse)


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
