"""Random search: draws of settings, in place of all combinations (Bergstra and Bengio, JMLR 2012).

Each method of a sweep gets as many draws as any other. A draw takes a value for each key that the
runs of the method vary and that is tuned: one of those in the list, each as likely, or a number of
a range. All repeats of a method train each of its draws.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kd_ranker.config.keys import Key

Overrides = Mapping[str, Any]  # values by key
Range = tuple[float, float]  # its ends
Space = list[Any] | Range  # to draw a value of a key from


Round = Mapping[str, Sequence[Overrides]]
"""The draws of each method, by its name, that train together."""


class Method(NamedTuple):
    """What the runs of a method have in common, and what they vary."""

    name: str  # a text that no other method of the sweep has
    fixed: Overrides  # values of keys that are not tuned
    spaces: Mapping[str, Space]  # of keys that are tuned: distinct values, or a range
    repeats: Sequence[Overrides]  # the distinct values of the seeds

    def runs(self, drawn: Overrides) -> Iterator[dict[str, Any]]:
        """Yield the repeats of a draw."""
        for repeat in self.repeats:
            yield {**self.fixed, **drawn, **repeat}


def draw_settings(
    methods: Iterable[Method], keys: Mapping[str, Key], draws: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield the runs of a random search; those of more draws begin with those of fewer.

    Args:
      methods: those to draw settings of.
      keys: the keys that runs may vary, by name.
      draws: of each method.
      seed: of the draws.
    """
    for method in methods:
        for number in range(draws):
            # By the name of the method, so that it keeps its draws beside other methods.
            generator = np.random.default_rng([seed, number, number_of(method.name)])
            drawn = {
                name: _draw(generator, keys[name], space)
                for name, space in sorted(method.spaces.items())
            }
            yield from method.runs(drawn)


def methods_of(
    runs: Iterable[Overrides], keys: Mapping[str, Key], ranges: Mapping[str, Range]
) -> list[Method]:
    """Return the methods of runs, in the order in which they begin.

    Args:
      runs: those of all combinations.
      keys: the keys that runs may vary, by name.
      ranges: of numbers to draw from in place of a list, by key. A range of a switch leaves runs
        alone that have it off.
    """
    methods: dict[str, Method] = {}
    for run in runs:
        fixed: dict[str, Any] = {}
        tuned: dict[str, Any] = {}
        repeat: dict[str, Any] = {}
        for name, value in run.items():
            if keys[name].is_seed:
                repeat[name] = value
            elif keys[name].tuned and not (keys[name].switch and value == 0):
                tuned[name] = value
            else:
                fixed[name] = value
        text = repr((sorted(fixed.items()), sorted(tuned)))
        if text not in methods:
            methods[text] = Method(text, fixed, {name: [] for name in tuned}, [])
        method = methods[text]
        for name, value in tuned.items():
            _add(method.spaces[name], value)
        _add(method.repeats, repeat)
    return [_with_ranges(method, keys, ranges) for method in methods.values()]


def _add(distinct: Any, value: Any) -> None:
    if value not in distinct:
        distinct.append(value)


def _with_ranges(method: Method, keys: Mapping[str, Key], ranges: Mapping[str, Range]) -> Method:
    of_method = {
        name: ends
        for name, ends in ranges.items()
        if not (keys[name].switch and method.fixed.get(name) == 0)
    }
    return method._replace(spaces={**method.spaces, **of_method})


def number_of(text: str) -> int:
    """Return a number below 2⁶⁴ for a text, the same on all machines."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _draw(generator: np.random.Generator, key: Key, space: Space) -> Any:
    """Draw a value of a key."""
    if isinstance(space, list):
        return space[int(generator.integers(len(space)))]
    low, high = space
    if key.logarithmic:
        number = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        number = generator.uniform(low, high)
    return rounded(number, key, space)


def rounded(number: float, key: Key, ends: Range) -> float:
    """Return a number of a range as runs take it: with three digits, as it is a part of names."""
    # An end may round to a number beyond it.
    number = min(max(float(f"{number:.3g}"), ends[0]), ends[1])
    return round(number) if key.type is int else number
