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


class _Method(NamedTuple):
    """What the runs of a method have in common, and what they vary."""

    fixed: dict[str, Any]  # values of keys that are not tuned
    lists: dict[str, list[Any]]  # the distinct values of keys that are tuned
    repeats: list[dict[str, Any]]  # the distinct values of the seeds


def draw_settings(
    runs: Iterable[Overrides],
    keys: Mapping[str, Key],
    ranges: Mapping[str, Range],
    draws: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Yield the runs of a random search; those of more draws begin with those of fewer.

    Args:
      runs: those of all combinations.
      keys: the keys that runs may vary, by name.
      ranges: of numbers to draw from in place of a list, by key. A range of a switch leaves runs
        alone that have it off.
      draws: of each method.
      seed: of the draws.
    """
    for name, method in _methods(runs, keys).items():
        spaces = method.lists | {
            key: ends
            for key, ends in ranges.items()
            if not (keys[key].switch and method.fixed.get(key) == 0)
        }
        for number in range(draws):
            # By the name of the method, so that it keeps its draws beside other methods.
            generator = np.random.default_rng([seed, number, _number_of(name)])
            drawn = {
                key: _draw(generator, keys[key], space) for key, space in sorted(spaces.items())
            }
            for repeat in method.repeats:
                yield {**method.fixed, **drawn, **repeat}


def _methods(runs: Iterable[Overrides], keys: Mapping[str, Key]) -> dict[str, _Method]:
    """Return the methods of runs by a text, in the order in which they begin."""
    methods: dict[str, _Method] = {}
    for run in runs:
        fixed, tuned, repeat = {}, {}, {}
        for name, value in run.items():
            if keys[name].is_seed:
                repeat[name] = value
            elif keys[name].tuned and not (keys[name].switch and value == 0):
                tuned[name] = value
            else:
                fixed[name] = value
        text = repr((sorted(fixed.items()), sorted(tuned)))
        method = methods.setdefault(text, _Method(fixed, {}, []))
        for name, value in tuned.items():
            values = method.lists.setdefault(name, [])
            if value not in values:
                values.append(value)
        if repeat not in method.repeats:
            method.repeats.append(repeat)
    return methods


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _draw(generator: np.random.Generator, key: Key, space: Sequence[Any]) -> Any:
    """Draw a value of a key, from a list or from a `Range`."""
    if isinstance(space, list):
        return space[int(generator.integers(len(space)))]
    low, high = space
    if key.logarithmic:
        number = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        number = generator.uniform(low, high)
    # Three digits, as the value is a part of names. An end may round to a number beyond it.
    number = min(max(float(f"{number:.3g}"), low), high)
    return round(number) if key.type is int else number
