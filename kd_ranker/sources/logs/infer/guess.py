"""Values of the config that are guessed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kd_ranker.sources.logs.layout import OPEN

CHECK = "CHECK: "


class Guess(NamedTuple):
    """A value of the config that is guessed."""

    value: Any  # a column, for example; "" for none
    why: str = ""  # the reason
    check: str = ""  # a doubt; "" for none


class Roles(NamedTuple):
    """The columns that have a role, by the sections of `config.data`; a value "" is none."""

    columns: dict[str, Guess]
    labels: dict[str, Guess]
    teacher: dict[str, Guess]
    stages: dict[str, Guess]  # stage -> its text
    teacher_doubt: str  # names further columns that may be the teacher; "" for none

    def used(self) -> list[str]:
        """Return the columns of all sections."""
        sections = (self.columns, self.labels, self.teacher)
        return [guess.value for section in sections for guess in section.values()]

    def column(self, role: str) -> str:
        """Return the column of a role in `config.data.columns`; "" if it is open or none."""
        return column_of(self.columns, role)


def column_of(columns: Mapping[str, Guess], role: str) -> str:
    """Return the column of a role; "" if it is open or none."""
    return columns[role].value.strip(OPEN) if role in columns else ""


def join(texts: Iterable[str]) -> str:
    """Return the texts of a stage as one value of the config."""
    return ", ".join(texts)


def by_values(column: str, role: str) -> Guess:
    """Return a column that only its values point at: a line to confirm."""
    return Guess(column, "", f"by its values; is it the {role}?")


def which(role: str, likely: Iterable[str]) -> str:
    """Return the question which column has a role, with the two likeliest."""
    two = list(dict.fromkeys(likely))[:2]
    choices = " or ".join(map(repr, two)) or "none looks like it"
    return f"which column has the {role}: {choices}?"
