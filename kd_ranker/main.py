"""The command line: `kd-ranker NAME ...`, or `python -m experiments.NAME ...` in a clone.

No other module parses arguments. Each command calls the function of its name in `api`, takes its
docstring for help, and prints its result. Modules that take seconds to import are imported within
functions, so that the list of commands takes no time.
"""

import argparse
import ast
import contextlib
import errno
import hashlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from kd_ranker.errors import UserError
from kd_ranker.progress import Progress, show_on_stderr
from kd_ranker.terminal import replace_unprintable
from kd_ranker.training import interruption

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_BAD_INPUT = 2
_HELP = {"--help", "-h"}
# Caused by a path on the command line; the message of an OSError names the path.
_BAD_PATH = (FileExistsError, NotADirectoryError, PermissionError)
_NO_SPACE = "free some space, and start the same command again: it resumes from what is saved"
_NOT_WRITABLE = "check the disk, or use another folder, as with --workdir or config.data.dir"
_BAD_DISK = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_SPACE),
    **dict.fromkeys((errno.EROFS, errno.EIO), _NOT_WRITABLE),
}
_KEY = re.compile(r"--?(?:no)?config\.([^=]+)")  # in a flag that sets a key of the config


class Flag(NamedTuple):
    """A flag of a command."""

    help: str
    default: str | bool | None = ""  # False makes it a switch; None requires it


class Command(NamedTuple):
    """A command."""

    # (the module `api`, the config, the parsed flags) -> an object to print, or None
    call: Callable[[Any, "ConfigDict", argparse.Namespace], object]
    flags: Mapping[str, Flag]  # by name, without --config
    example: str  # flags to show in its help
    config_from: str = "config"  # or "workdir", that of a finished run; "" for an empty config
    workdirs: bool = False  # whether any number of workdirs may follow the flags
    as_one: bool = False  # whether several processes may run it as one, see `training.processes`
    text: str = ""  # its help; "" takes the docstring of the function of its name in `api`


def main(name: str = "") -> None:
    """Run the command `name`, or the first argument of the process; exit with 2 on bad input."""
    # Until there is something to clean up, a signal ends the process at once.
    interruption.end_on_signal()
    replace_unprintable(sys.stdout, sys.stderr)
    arguments = sys.argv[1:]
    if not name:
        name = arguments[0] if arguments else "--help"
        arguments = arguments[1:]
    texts = _api_docstrings()
    if name in COMMANDS:
        run_command(COMMANDS[name]._replace(text=texts[name]), f"kd-ranker {name}", arguments)
    elif name in _HELP:
        lines = [f"    {command:15}{texts[command].splitlines()[0]}" for command in COMMANDS]
        _print("\n".join(["usage: kd-ranker NAME --help", "", *lines]))
    else:
        sys.stderr.write(f"error: no command {name!r}; choose from {', '.join(COMMANDS)}\n")
        sys.exit(_BAD_INPUT)


def _api_docstrings() -> dict[str, str]:
    """Return the docstrings of `api` by command, from its source: the import takes seconds."""
    tree = ast.parse((Path(__file__).parent / "api.py").read_text("utf-8"))
    return {
        node.name.replace("_", "-"): ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def run_command(command: Command, program: str, arguments: Sequence[str]) -> None:
    """Run a command under its own flags; errors that a user can mend become one line.

    Its help names `program` as the way to start it.
    """
    with interruption.clean_up_on_signal():
        try:
            parser = _parser(command, program)
            if _HELP & {*arguments}:
                others = [argument for argument in arguments if argument not in _HELP]
                _print_help(command, parser, others)
                return
            config, flags = _parse(command, parser, arguments)
        # Any error while the arguments are parsed is about the arguments.
        except Exception as error:
            _fail(error)
        _call(command, config, flags)


def _call(command: Command, config: "ConfigDict", flags: argparse.Namespace) -> None:
    """Call the function of a command and print its result."""
    import absl.flags
    from absl import logging

    from kd_ranker import api
    from kd_ranker.pipeline.remote import break_lock, place_of

    absl.flags.FLAGS.mark_as_parsed()  # for the log of absl, which waits for that
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    try:
        if config and config.parallel.processes:
            if not command.as_one:
                raise UserError("this command runs in one process; set parallel.processes=False")
            _join_processes(config)
        if getattr(flags, "break_lock", False):
            break_lock(place_of(flags.workdir))
        result = command.call(api, config, flags)
        if result is not None:
            _print(str(result))
    except (UserError, *_BAD_PATH) as error:
        _fail(error)
    except OSError as error:
        if error.errno not in _BAD_DISK:
            raise
        _fail(UserError(f"{error}; {_BAD_DISK[error.errno]}"))
    except MemoryError as error:
        remedy = "lower sizes of the config, such as batch.requests, or use a larger machine"
        _fail(UserError(f"not enough memory: {error}; {remedy}"))


def _join_processes(config: "ConfigDict") -> None:
    """Join the processes of a run; only the first prints."""
    from absl import logging

    from kd_ranker.training import processes

    processes.start()
    processes.check_same("config", config.to_json(sort_keys=True))
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    processes.check_same("code", digest.hexdigest())
    if not processes.is_first():
        logging.set_verbosity(logging.ERROR)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser(command: Command, program: str) -> _Parser:
    # Without the sections on arguments and errors, which are those of the function.
    text = re.split(r"\n+(?:Args|Returns|Raises):\n", command.text)[0]
    description = f"{text}\n\nFor example:\n\n    {program} {command.example}"
    parser = _Parser(
        program,
        description=_escaped(description),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    if command.config_from == "config":
        parser.add_argument(
            "--config",
            metavar="FILE[:VARIANT]",
            default="",
            help="a config file, or the name of one that comes with the package, such as cascade",
        )
    for name, flag in command.flags.items():
        if flag.default is False:
            parser.add_argument(f"--{name}", help=_escaped(flag.help), action="store_true")
        else:
            parser.add_argument(
                f"--{name}", help=_escaped(flag.help), metavar="...", default=flag.default
            )
    if command.workdirs:
        parser.add_argument("workdirs", nargs="*", metavar="WORKDIR")
    return parser


def _escaped(text: str) -> str:
    """Return a text that argparse shows as it is."""
    return text.replace("%", "%%")


def _print_help(command: Command, parser: _Parser, arguments: Sequence[str]) -> None:
    """Print the help of a command, with the keys of the config that its arguments name."""
    from ml_collections import ConfigDict

    from kd_ranker.config import defaults, schema
    from kd_ranker.config.keys import DATA_KEYS, KEYS

    flags, _ = parser.parse_known_args(arguments)
    parser.usage = _escaped(parser.format_usage().removeprefix("usage: ")).rstrip()
    if command.config_from:
        parser.usage += " [--config.KEY=VALUE ...]"
    if command.config_from == "config":
        config = read_config(flags.config) if flags.config else defaults.get_config()
        keys = KEYS | DATA_KEYS.get(config.data.name, {})
        groups: dict[str, Any] = {}
        for name, key in keys.items():
            section = f"config.{name}".rpartition(".")[0]
            if section not in groups:
                groups[section] = parser.add_argument_group(section)
            value = schema.value_of(config, name)
            shown = "..." if isinstance(value, ConfigDict) else repr(value)
            groups[section].add_argument(f"--config.{name}", metavar=shown, help=_escaped(key.help))
    _print(parser.format_help().rstrip("\n"))


def _parse(
    command: Command, parser: _Parser, arguments: Sequence[str]
) -> tuple["ConfigDict", argparse.Namespace]:
    """Parse the flags of a command, load its config and set the keys that flags override."""
    from ml_collections import ConfigDict

    flags, overrides = parser.parse_known_args(arguments)
    for name, flag in command.flags.items():
        if flag.default is None and not getattr(flags, name):
            raise UserError(f"--{name} is missing; it is {flag.help}")
    if command.config_from == "config":
        flags.keys = _overridden_keys(overrides)
        if flags.config:
            return read_config(flags.config, overrides), flags
        return _with_overrides(_config_of_workdir(command, flags), overrides), flags
    config = ConfigDict()
    if command.config_from == "workdir":
        from kd_ranker.pipeline.remote import place_of
        from kd_ranker.pipeline.trained import check_select, config_of

        workdir = place_of(flags.workdir)
        config = config_of(workdir, flags.trust)
        if "data.sql" not in _overridden_keys(overrides):
            check_select(config, workdir, flags.trust)
    return _with_overrides(config, overrides), flags


def _config_of_workdir(command: Command, flags: argparse.Namespace) -> "ConfigDict":
    """Return the config of the run that a workdir holds, with which the command resumes it."""
    from kd_ranker.pipeline.remote import place_of
    from kd_ranker.pipeline.trained import config_of, is_run

    if "workdir" in command.flags and command.flags["workdir"].default is None:
        # `run` writes no config of its own: that of its sweep is the one.
        for workdir in (flags.workdir, f"{flags.workdir}/sweep"):
            if is_run(place_of(workdir)):
                return config_of(
                    place_of(workdir), remedy="to resume it, name that file in --config"
                )
    raise UserError("--config is missing; give one, such as --config=configs/cascade.py")


def _overridden_keys(overrides: Sequence[str]) -> list[str]:
    """Return the keys of the config that flags override."""
    matches = [_KEY.match(override) for override in overrides]
    return [match[1] for match in matches if match is not None]


def read_config(named: str, overrides: Sequence[str] = ()) -> "ConfigDict":
    """Load the config file that `--config` names, set the keys that flags override, list its runs.

    `named` is a file, or the name of a config of the package (`cascade`, `sweeps/cascade` or
    `configs/cascade.py`), with `:VARIANT` or without. A file that is missing or does not load, and
    a flag without a key, is a UserError.
    """
    import kd_ranker.configs

    folder = Path(kd_ranker.configs.__path__[0])
    name, *variant = named.split(":", 1)
    file = Path(name)
    if not file.is_file():
        file = folder / f"{name.removeprefix('configs/').removesuffix('.py')}.py"
        if not file.is_file() or file.name == "__init__.py":
            known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
            raise UserError(
                f"--config={named}: there is no file {name}, and the package's configs are: "
                f"{', '.join(known)}"
            )
    with _load_errors(named):
        module = runpy.run_path(str(file))
        config = module["get_config"](*variant)
    if not file.resolve().is_relative_to(folder.resolve()):
        # For other processes that train or score with it, which do not read the command line.
        config.registered_by = str(file.resolve())
    config = _with_overrides(config, overrides)
    if "sweep" in module:
        from kd_ranker.config.runs import list_runs

        with _load_errors(named), config.unlocked():
            config.sweep.runs = list_runs(module["sweep"](config, *variant))
    return config


@contextlib.contextmanager
def _load_errors(named: str) -> Iterator[None]:
    """Raise UserError in place of any error of a config file."""
    try:
        yield
    except Exception as error:
        reason = str(error)
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--config={named} does not load: {reason}") from error


def _with_overrides(config: "ConfigDict", overrides: Sequence[str]) -> "ConfigDict":
    """Set the keys of a config that flags override, each flag parsed as the type of its key."""
    import absl.flags
    from ml_collections import config_flags

    from kd_ranker.config import checks

    if overrides and not config:
        raise UserError(
            f"{overrides[0]!r} is not a flag of this command, which takes no config; --help lists "
            "its flags"
        )
    for argument in overrides:
        if override := _KEY.match(argument):
            checks.check_key(config, override[1])
    flag_values = absl.flags.FlagValues()
    arguments = ["", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=flag_values, sys_argv=arguments)
    _, *not_flags = flag_values(arguments)
    if not_flags:
        raise UserError(f"{not_flags[0]!r} is not a flag; flags look like --name=value")
    return flag_values["config"].value


def _fail(error: Exception) -> NoReturn:
    """Print an error as one line and exit; if all processes raise it, only the first prints it."""
    from kd_ranker.training import processes

    line = f"{' '.join(str(error).split())}\n"
    if processes.is_first():
        sys.stderr.write(f"error: {line}")
    if not processes.ends_with_all() and not processes.is_first():
        sys.stderr.write(f"error of process {processes.index()}: {line}")
    if processes.are_distributed():
        sys.stderr.flush()
        os._exit(_BAD_INPUT)  # at once, without waiting for the others
    sys.exit(_BAD_INPUT)


def _print(text: str) -> None:
    """Print the result of a command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has what it wanted. Python flushes again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    """Print a line on the progress of a command, apart from its result."""
    from kd_ranker.training import processes

    if processes.is_first():
        show_on_stderr(line)


def _train_teacher(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> str:
    return api.train_teacher(config, flags.workdir, Progress(_say)).table(flags.wide)


def _train(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> str:
    return api.train(config, flags.workdir, progress=Progress(_say)).table(flags.wide)


def _prepare(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> str:
    from kd_ranker import configs
    from kd_ranker.config import schema

    if not config.data.get("infer"):
        return str(api.prepare(config, flags.thorough, Progress(_say)))
    # Columns that a file names unlike the template, and the keys that the command line sets.
    template = configs.parquet().data.columns
    named = {
        f"data.columns.{role}": column
        for role, column in config.data.columns.items()
        if column and column != template.get(role)
    }
    named |= {key: schema.value_of(config, key) for key in flags.keys}
    return str(api.infer(config.data.path, flags.workdir, named))


def _sweep(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> object:
    progress = Progress(_say)
    students = api.sweep(config, flags.workdir, show=print, progress=progress)
    table = None
    if config.sweep.part in ("", "join"):  # the other parts leave no results
        with progress.phase("table"):
            table = students.table(flags.wide)
    _say(f"time: {progress}")
    return table


def _score(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> None:
    api.score(
        flags.workdir,
        config.data.path,
        output=flags.out or None,
        run=flags.run,
        config=config,
        trust=flags.trust,
        show=print,
    )


def _export(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> str:
    folder = api.export(
        flags.workdir,
        flags.out,
        run=flags.run,
        serve=flags.serve,
        formats=tuple(flags.formats.split(",")),
        trust=flags.trust,
        show=print,
    )
    return f"export: {folder}\ncheck it with: python {folder / 'check.py'}"


def _main_job(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> str:
    report = api.run(config, flags.workdir, show=lambda line: _say(f"run: {line}"))
    tables = [report.students.table(wide=True)] if flags.wide else report.tables
    return "\n\n".join([*tables, _highlighted(report)])


def _log_teacher(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> object:
    return api.log_teacher(config)


def _report(api: Any, config: "ConfigDict", flags: argparse.Namespace) -> object:
    sweeps = flags.workdirs or [flags.workdir]
    return _highlighted(api.report(*sweeps, output=flags.workdir))


def _highlighted(report: Any) -> str:
    from kd_ranker.terminal import with_bold_verdict

    answers = tuple(map(with_bold_verdict, report.answers))
    return str(report._replace(answers=answers))


_BREAK_LOCK = Flag("remove the lock that a killed process left at the URL of the workdir", False)
_OWNED = {
    "workdir": Flag("the folder for the files of the run, or its URL: gs://bucket/run", None),
    "break_lock": _BREAK_LOCK,
}
_SHOWN = _OWNED | {"wide": Flag("print all measures of the table, in lines of any length", False)}
_TARGET = Flag("the folder or URL to write to; without a WORKDIR, that of a sweep", None)
_FINISHED = {
    "workdir": Flag("the folder or URL of a finished run", None),
    "run": Flag("the student of a sweep; without it, the best one on validation"),
    "trust": Flag(
        "execute the config file of the run, where that registers a part of it, and its data.sql",
        False,
    ),
}
_EXPORTED = {
    "out": Flag("the folder to write, which must not exist", None),
    "serve": Flag("the head; without it, distill.serve, or of a sweep the best"),
    "formats": Flag("the formats of the programs, with commas: jax, onnx", "jax,onnx"),
}
_PREPARED = {
    "workdir": Flag("the folder for a first config, with --config.data.infer", "."),
    "thorough": Flag("read all bytes of a dataset that exists, not only small files", False),
}

COMMANDS = {
    "run": Command(_main_job, _SHOWN, "--config=configs/sweeps/cascade.py --workdir=runs/cascade"),
    "prepare": Command(_prepare, _PREPARED, "--config=configs/parquet.py --config.data.path=log/"),
    "train-teacher": Command(
        _train_teacher,
        _SHOWN,
        "--config=configs/cascade.py --workdir=runs/teacher",
        as_one=True,
    ),
    "log-teacher": Command(
        _log_teacher,
        {"workdir": Flag("not used")},
        "--config=configs/cascade.py --config.teacher.workdir=runs/teacher",
    ),
    "train": Command(
        _train,
        _SHOWN,
        "--config=configs/cascade.py --workdir=runs/student --config.distill.mode=shared",
        as_one=True,
    ),
    "sweep": Command(
        _sweep, _SHOWN, "--config=configs/sweeps/cascade.py --workdir=runs/sweep", as_one=True
    ),
    "report": Command(
        _report,
        {"workdir": _TARGET, "break_lock": _BREAK_LOCK},
        "--workdir=runs/report runs/sweep runs/another_sweep",
        config_from="",
        workdirs=True,
    ),
    "score": Command(
        _score,
        _FINISHED | {"out": Flag("the folder to write to; without it, one below config.data.dir")},
        "--workdir=runs/sweep --config.data.path=/data/another_log --out=scored",
        config_from="workdir",
    ),
    "export": Command(
        _export,
        _FINISHED | _EXPORTED,
        "--workdir=runs/sweep --run=none-seed0 --out=served",
        config_from="",
    ),
}
"""The commands by name; `experiments` has a module for each."""
