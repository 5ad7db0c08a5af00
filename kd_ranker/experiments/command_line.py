"""One command for all entry points, wherever the package is installed: `kd-ranker NAME …`.

For example:

    kd-ranker sweep --config=sweeps/cascade --workdir=runs/sweep
    kd-ranker sweep --help
    kd-ranker --print-completion bash > ~/.local/share/bash-completion/completions/kd-ranker
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

from kd_ranker.training import interruption

COMMANDS = {
    "run": "run",
    "prepare": "prepare_data",
    "train-teacher": "train_teacher",
    "log-teacher": "log_teacher",
    "train": "train",
    "sweep": "sweep",
    "report": "report",
    "score": "score",
    "export": "export",
}
"""The module of each entry point, by the name of its command."""


def main() -> None:
    name, *rest = arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        interruption.end_when_asked()
        sys.argv = [f"kd-ranker {name}", *rest]
        importlib.import_module(f"kd_ranker.experiments.{COMMANDS[name]}").start()
    else:
        _parser(with_options=name == "--print-completion").parse_args(arguments)


def _parser(with_options: bool) -> argparse.ArgumentParser:
    """The parser of all commands; it tells of them, and each parses its own flags."""
    parser = argparse.ArgumentParser(
        "kd-ranker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="NAME", required=True)
    for name, module in COMMANDS.items():
        text = _docstring(module)
        of_command = commands.add_parser(name, help=text.splitlines()[0].replace("%", "%%"))
        if with_options:
            _describe(of_command, module, text)
    if with_options:
        import shtab

        shtab.add_argument_to(parser)
    return parser


def _describe(parser: argparse.ArgumentParser, module: str, text: str) -> None:
    from kd_ranker.pipeline import options

    if module == "report":
        options.describe_on_workdirs(parser, text)
    elif module in ("score", "export"):
        of = importlib.import_module(f"kd_ranker.experiments.{module}")
        options.describe_on_run(parser, text, of.TAKES_CONFIG, of.FLAGS)
    else:
        options.describe(parser, text)


def _docstring(module: str) -> str:
    """The docstring of an entry point, which is not imported: that would take seconds."""
    source = (Path(__file__).parent / f"{module}.py").read_text()
    return ast.get_docstring(ast.parse(source)) or ""
