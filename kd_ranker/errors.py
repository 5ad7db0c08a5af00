"""The one exception for bad input: printed as one line, with exit code 2."""

import textwrap
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Bad input. The message is one line that names the fault and the change that mends it."""


def command(name: str) -> str:
    """Return the command line of a command such as `log_teacher`, for messages."""
    return f"kd-ranker {name.replace('_', '-')}"


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of `choices`; the message names them."""
    names = sorted(choices)
    if value not in names:
        raise UserError(f"{key}={value!r} does not exist; choose one of: {', '.join(names)}")


def check_tasks(tasks: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError unless `tasks` names some of `known`, none of them twice."""
    known = tuple(known)
    for task in tasks:
        check_choice("tasks", task, known)
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(f"tasks={tuple(tasks)!r} must name one task or more, none of them twice")


def listed(names: Iterable[str]) -> str:
    """Return names in one line, cut where there are many."""
    return textwrap.shorten(", ".join(names), 100, placeholder=" …")


def short(error: BaseException) -> str:
    """Return the beginning of an error's message in one line, after its type if it is not ours."""
    message = textwrap.shorten(str(error), 200)
    if isinstance(error, UserError):
        return message
    return f"{type(error).__name__}: {message}"
