"""One config key, and the conditions on its value."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

from kd_ranker.errors import check_choice

# The first link of the chain that a key changes, and with it all that follows. `report` is how
# trained rankers are measured, and `nothing` changes no number.
Influence = Literal["dataset", "teacher", "student", "report", "nothing"]

# A key may differ between a sweep's members, or only between its cohorts; the members of a cohort
# share their batches.
Sweep = Literal["no", "members", "cohorts"]


class Bound(NamedTuple):
    """A condition on a finite number, as the end of a sentence and in signs."""

    text: str
    range: str
    holds: Callable[[Any], bool]


class TermNames(NamedTuple):
    """The names in a text "loss" or "loss:signal"."""

    losses: Collection[str]
    signals: Collection[str]

    def check(self, name: str, text: str) -> None:
        """Raises UserError unless a value `text` of the key `name` has such names."""
        loss, colon, signal = text.partition(":")
        check_choice(name, loss, self.losses)
        if colon:
            check_choice(f"{name}={text!r}: signal", signal, self.signals)


FINITE = Bound("must be a finite number", "finite", math.isfinite)
POSITIVE = Bound("must be greater than 0", "> 0", lambda number: number > 0)
NOT_NEGATIVE = Bound("must not be negative", "≥ 0", lambda number: number >= 0)
SHARE = Bound("must lie in [0, 1]", "[0, 1]", lambda number: 0 <= number <= 1)
BELOW_ONE = Bound("must lie in [0, 1)", "[0, 1)", lambda number: 0 <= number < 1)
INSIDE_ONE = Bound("must lie between 0 and 1", "(0, 1)", lambda number: 0 < number < 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """One config key; everything else about it derives from these fields.

    Attributes:
      name: the sections and the key, as in `--config.NAME=value`.
      default: its value unless a config file sets another; it determines the type. An empty
        `ConfigDict` if users choose the names within.
      help: its meaning in one line.
      allowed: a bound of its numbers, or the names that it takes; None for any. For a tuple it
        applies to each element.
      influences: the first thing that it changes.
      sweep: how a sweep may vary it.
      element: the type of a tuple's elements, if the default is empty.
      label: its name among members and in the report, if that is not its last part.
      column: the column of `results.csv` that contains it, possibly with other keys. A key without
        one that a sweep may vary has a column under its own name.
      tuned: True if validation chooses the best of its values. The values of the other keys make
        different students, or different ways to teach them, which are compared.
      switch: True if 0 turns something off: 0 and the other values make different ways.
      distinct: True if a tuple must not hold a value twice.
      required: True if a tuple must not be empty.
      may_differ: True if sweeps that differ in it can share a report. Keys that a sweep varies, and
        keys that influence nothing, may always differ.
    """

    name: str
    default: Any
    help: str
    allowed: Bound | TermNames | Collection[str] | None = None
    influences: Influence | None = None
    sweep: Sweep | None = None
    element: type | None = None
    label: str = ""
    column: str = ""
    tuned: bool = False
    switch: bool = False
    distinct: bool = False
    required: bool = False
    may_differ: bool = False

    @property
    def type(self) -> type:
        """The type of its value, or of the elements of a tuple."""
        if isinstance(self.default, tuple):
            return self.element or type(self.default[0])
        return type(self.default)

    @property
    def short(self) -> str:
        """Its name among members and in the report."""
        return self.label or self.name.rpartition(".")[2]

    @property
    def is_seed(self) -> bool:
        """True for seeds: their values are repeats of one setting."""
        return self.name.rpartition(".")[2] == "seed"

    @property
    def of_distillation(self) -> bool:
        """True if a student that does not distil has no use for it."""
        of_loss = self.name.startswith("distill.") and self.name != "distill.mode"
        return of_loss or self.name == "teacher.signal"

    @property
    def title(self) -> str:
        """The column of `results.csv` that contains it, if a sweep may vary it."""
        return self.column or self.name


def section(
    name: str, *keys: Key, influences: Influence, sweep: Sweep = "no", tuned: bool = False
) -> tuple[Key, ...]:
    """The keys of a section, "" for the root, under their whole names.

    The other arguments are defaults for keys that do not set them.
    """
    return tuple(
        dataclasses.replace(
            key,
            name=f"{name}.{key.name}" if name else key.name,
            influences=key.influences or influences,
            sweep=key.sweep or sweep,
            tuned=key.tuned or tuned,
        )
        for key in keys
    )
