"""The frame of every entry point around its one library call: flags in, errors out as one line.

It alone reads flags, and only for the entry points: the library itself knows none.
"""

import argparse
import errno
import hashlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import kd_ranker.configs
from kd_ranker.config import checks
from kd_ranker.errors import UserError
from kd_ranker.pipeline import options
from kd_ranker.pipeline.remote import Place, break_lock, place_of
from kd_ranker.pipeline.trained import config_of
from kd_ranker.training import interruption, processes

BAD_INPUT = 2

_HELP = ("--help", "-h", "--helpfull", "--helpshort")

# Of a path that the command line gives; an OSError's own message names the path.
_BAD_PATH = (FileExistsError, NotADirectoryError, PermissionError)
_NO_SPACE = "free some space, and start the same command again: it resumes from what is saved"
_NOT_WRITABLE = "check the disk, or use another folder, as with --workdir or config.data.dir"
_BAD_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_SPACE),
    **dict.fromkeys((errno.EROFS, errno.EIO), _NOT_WRITABLE),
}


def launch(
    command: Callable[[ConfigDict, Place], None], needs_workdir: bool = True, as_one: bool = False
) -> None:
    """Parses `--config` and `--workdir`, runs `command`, and exits with 2 on bad input.

    `as_one` says that several processes may run it as one, see `training.processes`.
    """
    workdir = flags.DEFINE_string("workdir", None, "The folder that the run owns.")
    breaks = flags.DEFINE_bool("break_lock", False, options.BREAK_LOCK)

    def parse(arguments: list[str]) -> list[str]:
        rest = _parse(arguments)
        if needs_workdir and not workdir.value:
            raise UserError("--workdir is missing; give a folder for what the run leaves")
        return rest

    def run(_: list[str]) -> None:
        config = with_home(flags.FLAGS["config"].value)
        if config.parallel.processes:
            if not as_one:
                raise UserError("this command is of one process; leave parallel.processes out")
            _join_processes(config)
        place = place_of(workdir.value or ".")
        if breaks.value:
            break_lock(place)
        command(config, place)

    def describe(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        asks_of_one = any(argument.startswith("--config") for argument in arguments)
        config = read_config_flag(arguments)[0] if asks_of_one else None
        options.describe(parser, _docstring(command), config)

    _start(parse, run, describe)


def launch_on_run(
    command: Callable[..., None], takes_config: bool, **flags_of: tuple[str, str]
) -> None:
    """The same for a command on a finished run, whose config stands in for `--config`.

    Args:
      command: called with the config if it takes one, the workdir, and by name the texts of all
        further flags.
      takes_config: True if keys of the config may be set.
      **flags_of: further flags by name, each with its value if it is not given, and its help.
    """
    workdir = flags.DEFINE_string("workdir", None, options.RUN)
    others = {name: flags.DEFINE_string(name, *of) for name, of in flags_of.items()}

    def parse(arguments: list[str]) -> list[str]:
        early = flags.FlagValues()
        early.set_gnu_getopt(True)
        flags.DEFINE_string("workdir", None, "", flag_values=early)
        early(arguments, known_only=True)
        if not early.workdir:
            raise UserError("--workdir is missing; give the folder of a run that is finished")
        if takes_config:
            return _parse(arguments, lambda: config_of(place_of(early.workdir)))
        return _only_flags(flags.FLAGS(arguments))

    def run(_: list[str]) -> None:
        config = [with_home(flags.FLAGS["config"].value)] if takes_config else []
        texts = {name: other.value for name, other in others.items()}
        command(*config, place_of(str(workdir.value)), **texts)

    def describe(parser: argparse.ArgumentParser, _: list[str]) -> None:
        options.describe_on_run(parser, _docstring(command), takes_config, flags_of)

    _start(parse, run, describe)


def launch_on_workdirs(command: Callable[[list[Place], Place], None]) -> None:
    """The same for a command on workdirs that are there: `--workdir=OUTPUT [WORKDIR ...]`.

    Without any, `--workdir` itself is read.
    """
    output = flags.DEFINE_string(
        "workdir", None, "The folder to write to; read, too, where no other is named."
    )
    breaks = flags.DEFINE_bool("break_lock", False, options.BREAK_LOCK)

    def parse(arguments: list[str]) -> list[str]:
        rest = flags.FLAGS(arguments)
        if not output.value:
            raise UserError("--workdir is missing; give the folder of a sweep, or of the report")
        return rest

    def run(arguments: list[str]) -> None:
        workdir, *others = (place_of(str(of)) for of in (output.value, *arguments[1:]))
        if breaks.value:
            break_lock(workdir)
        command(others or [workdir], workdir)

    def describe(parser: argparse.ArgumentParser, _: list[str]) -> None:
        options.describe_on_workdirs(parser, _docstring(command))

    _start(parse, run, describe)


def _join_processes(config: ConfigDict) -> None:
    """Joins the processes of a run, of which the first alone speaks."""
    processes.start(give_up=_end)
    processes.check_same("config", config.to_json(sort_keys=True))
    processes.check_same("code", _digest_of_code())
    if not processes.is_first():
        logging.set_verbosity(logging.ERROR)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _digest_of_code() -> str:
    """A digest of the package's files."""
    digest = hashlib.sha256()
    for file in sorted(Path(kd_ranker.__path__[0]).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _docstring(command: Callable[..., None]) -> str:
    return sys.modules[command.__module__].__doc__ or ""


def with_home(config: ConfigDict) -> ConfigDict:
    """Puts the home folder in place of ~ in the paths of a config: no shell does so behind a =."""
    for section, name in (("data", "dir"), ("data", "path"), ("teacher", "workdir")):
        config[section][name] = os.path.expanduser(config[section][name])
    return config


def _parse(arguments: list[str], default: Callable[[], ConfigDict] | None = None) -> list[str]:
    """Parses `--config` with its overrides, and all other flags."""
    config, others = read_config_flag(arguments, default)
    # Overrides are flags of their own, each of the type of its key.
    config_flags.DEFINE_config_dict("config", config, sys_argv=others)
    return _only_flags(flags.FLAGS(others))


def _only_flags(rest: list[str]) -> list[str]:
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags look like --name=value")
    return rest


def _start(
    parse: Callable[[list[str]], list[str]],
    run: Callable[[list[str]], None],
    describe: Callable[[argparse.ArgumentParser, list[str]], None],
) -> None:
    def parse_or_fail(arguments: list[str]) -> list[str]:
        others = [argument for argument in arguments if argument not in _HELP]
        try:
            if others != arguments:
                parser = argparse.ArgumentParser(_name_of(arguments[0]), add_help=False)
                describe(parser, others)
                parser.print_help()
                sys.exit()
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
        except OSError as error:
            if error.errno not in _BAD_DISK:
                raise
            fail(UserError(f"{error}; {_BAD_DISK[error.errno]}"))
        except MemoryError as error:
            fail(UserError(f"not enough memory: {error}; choose smaller sizes"))

    interruption.stop_when_asked()
    try:
        app.run(main, flags_parser=parse_or_fail)
    except interruption.Stopped as stopped:
        interruption.exit_after(stopped)
    finally:
        interruption.end_when_asked()


def _name_of(program: str) -> str:
    """The way to call an entry point, from `sys.argv[0]`: a file where `python -m` runs it."""
    path = Path(program)
    return f"python -m experiments.{path.stem}" if path.suffix == ".py" else program


def read_config_flag(
    arguments: Sequence[str], default: Callable[[], ConfigDict] | None = None
) -> tuple[ConfigDict, list[str]]:
    """Loads the config file that `--config` names, before its overrides are parsed.

    Args:
      arguments: the command line.
      default: gives the config where it names none; None asks for one.

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
    if early.config is not None:
        config = _load_config(early.config)
    elif default:
        config = default()
    else:
        raise UserError("--config is missing; give --config=configs/cascade.py, say")
    for argument in others:
        if override := re.match(r"--?(?:no)?config\.([^=]+)", argument):
            checks.check_key(config, override[1])
    return config, others


def _load_config(named: str) -> ConfigDict:
    file, *variant = named.split(":", 1)
    if not Path(file).is_file():
        file = _file_of_package(file, named)
    try:
        config = runpy.run_path(file)["get_config"](*variant)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--config={named} does not load: {reason}") from error
    path = Path(file).resolve()
    if not path.is_relative_to(Path(kd_ranker.configs.__path__[0]).resolve()):
        # Other processes that work on it have not read the command line.
        config.registered_by = str(path)
    return config


def _file_of_package(name: str, given: str) -> str:
    """The file of the package's config `cascade`, `sweeps/cascade` or `configs/cascade.py`."""
    folder = Path(kd_ranker.configs.__file__).parent
    file = folder / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
    if not file.is_file() or file.name == "__init__.py":
        known = sorted(of.stem for of in folder.glob("*.py") if of.stem != "__init__")
        raise UserError(
            f"--config={given}: there is no file {name}, and the package's configs are: "
            f"{', '.join(known)}"
        )
    return str(file)


def fail(error: Exception) -> NoReturn:
    """Prints an error as one line and exits.

    Of several processes that meet the same one, the first prints it.
    """
    line = f"{' '.join(str(error).split())}\n"
    if processes.is_first():
        sys.stderr.write(f"error: {line}")
    alone = not processes.ends_with_all()
    if alone and not processes.is_first():
        sys.stderr.write(f"error of process {processes.index()}: {line}")
    if processes.are_several():
        _end()
    sys.exit(BAD_INPUT)


def _end(error: UserError | None = None) -> NoReturn:
    """Ends the process at once, waiting for no other; of several that is all that ends it."""
    if error:
        sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    os._exit(BAD_INPUT)
