"""The one exception for what a user can mend: printed as one line, with exit code 2."""

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that names what was wrong and what to change."""


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`; the message names them."""
    names = sorted(choices)
    if value not in names:
        raise UserError(f"{key}={value!r} does not exist; choose one of: {', '.join(names)}")
