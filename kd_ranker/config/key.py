"""One config key, and the values that it takes."""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, cast

from kd_ranker.errors import UserError, check_choice

# The first link of the chain that a key changes, and with it all that follows. `report` is how
# trained rankers are measured, and `nothing` changes no number.
Influence = Literal["dataset", "teacher", "student", "report", "nothing"]

# A key may differ between a sweep's members, or only between its cohorts; the members of a cohort
# share their batches.
Sweep = Literal["no", "members", "cohorts"]


class Bound(NamedTuple):
    """A condition on a finite number."""

    text: str
    holds: Callable[[Any], bool]


ANY = Bound("", lambda number: True)
POSITIVE = Bound("> 0", lambda number: number > 0)
NOT_NEGATIVE = Bound("≥ 0", lambda number: number >= 0)
SHARE = Bound("in [0, 1]", lambda number: 0 <= number <= 1)
BELOW_ONE = Bound("in [0, 1)", lambda number: 0 <= number < 1)
INSIDE_ONE = Bound("in (0, 1)", lambda number: 0 < number < 1)

_KINDS = {str: "names", int: "whole numbers", float: "numbers", bool: "True or False"}


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """One config key; everything else about it derives from these fields.

    Attributes:
      name: the sections and the key, as in `--config.NAME=value`.
      default: its value unless a config file sets another; it determines the type. An empty
        `ConfigDict` if users choose the names within.
      help: its meaning in one line.
      allowed: a bound of its numbers, `NOT_NEGATIVE` if None, or the names that it takes. For a
        tuple it applies to each element.
      signals: the names that may follow an allowed name and a colon.
      influences: the first thing that it changes.
      sweep: how a sweep may vary it.
      element: the type of a tuple's elements, if the default is empty.
      swept: of an axis, the key that it varies.
      label: its name among members and in the report, if that is not its last part.
      column: the column of `results.csv` that contains it, possibly with other keys. A key without
        one that a sweep may vary has a column under its own name.
      tuned: True if validation chooses the best of its values. The values of the other keys make
        different students, or different ways to teach them, which are compared.
      switch: True if 0 turns something off: 0 and the other values make different ways.
      may_differ: True if sweeps that differ in it can share a report. Keys that a sweep varies, and
        keys that influence nothing, may always differ.
    """

    name: str
    default: Any
    help: str
    allowed: Bound | Collection[str] | None = None
    signals: Collection[str] = ()
    influences: Influence | None = None
    sweep: Sweep | None = None
    element: type | None = None
    swept: "Key | None" = None
    label: str = ""
    column: str = ""
    tuned: bool = False
    switch: bool = False
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

    @property
    def bound(self) -> Bound | None:
        """The bound of its numbers; None if it takes no numbers."""
        if self.type not in (int, float):
            return None
        return self.allowed if isinstance(self.allowed, Bound) else NOT_NEGATIVE

    def check(self, value: Any) -> None:
        """Raise UserError unless the key may have `value`."""
        if self.swept:
            for one in value:
                dataclasses.replace(self.swept, name=self.name).check(one)
        elif not isinstance(self.default, tuple):
            self._check_one(value)
        elif not isinstance(value, (tuple, list)):
            raise UserError(f"{self.name} has {value!r}; it takes tuples")
        else:
            for element in value:
                self._check_one(element)

    def _check_one(self, value: Any) -> None:
        types = (int, float) if self.type is float else self.type
        # bool is an int to Python, and no number to anyone else.
        valid = isinstance(value, types) and isinstance(value, bool) == (self.type is bool)
        takes = _KINDS.get(self.type, "names of your own")
        if bound := self.bound:
            valid = valid and math.isfinite(value) and bound.holds(value)
            takes = f"{takes} {bound.text}".rstrip()
        if not valid:
            raise UserError(f"{self.name} has {value!r}; it takes {takes}")
        if isinstance(value, str) and self.allowed is not None:
            name, colon, signal = value.partition(":") if self.signals else (value, "", "")
            check_choice(self.name, name, cast("Collection[str]", self.allowed))
            if colon:
                check_choice(f"{self.name}={value!r}: signal", signal, self.signals)


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
