"""Lookups over all config keys, which derive from the table in `keys`."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config.key import Influence, Key
from kd_ranker.config.keys import DATA_KEYS, KEYS
from kd_ranker.errors import UserError
from kd_ranker.training.workdir import as_json, values_by_key

# In the order of the chain: a change to a dataset changes everything made from it.
INFLUENCES: tuple[Influence | None, ...] = get_args(Influence)

# The axes of a sweep that have a separate key; all other axes are in `sweep.axes`.
NAMED_AXES = {
    "distill.mode": "sweep.modes",
    "distill.weight": "sweep.weights",
    "seed": "sweep.seeds",
}


def keys_of(source: str) -> dict[str, Key]:
    """The keys of a config by name, those of `sweep.axes` included.

    Args:
      source: `config.data.name`; one that is not in `DATA_KEYS` adds no keys.
    """
    axes = {key.name: key for key in map(_axis_key, sweepable()) if key.name not in KEYS}
    return KEYS | DATA_KEYS.get(source, {}) | axes


def sweepable() -> list[Key]:
    """The keys that a sweep may vary, those of cohorts first."""
    keys = [key for key in KEYS.values() if key.sweep != "no"]
    return sorted(keys, key=lambda key: key.sweep != "cohorts")


def setting_keys() -> list[Key]:
    """The keys that make a setting of a student, in their order; its seeds make repeats of it."""
    return [key for key in KEYS.values() if key.sweep != "no" and not key.is_seed]


def repeat_keys() -> list[Key]:
    """The seeds that a sweep may vary."""
    return [key for key in KEYS.values() if key.sweep != "no" and key.is_seed]


def axis_of(name: str) -> str:
    """The key that holds a swept key's values.

    >>> axis_of("distill.weight"), axis_of("student.width")
    ('sweep.weights', 'sweep.axes.student.width')
    """
    return NAMED_AXES.get(name, f"sweep.axes.{name}")


def _axis_key(key: Key) -> Key:
    return dataclasses.replace(
        key,
        name=axis_of(key.name),
        default=(),
        element=type(key.default),
        help=f"the values of {key.name}; () takes its own",
        influences="nothing",
        sweep="no",
        column="",
        label="",
        distinct=True,
    )


def ways(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sweeps that together make the sweep of a config, by the texts of `sweep.ways`.

    A way is a copy of the config in which the values that the text assigns replace axes. Without
    `sweep.ways` the config itself is the only way, under "".

    Raises:
      UserError: a text is not a list of assignments to different keys that a sweep may vary.
    """
    return {text: _way(config, text) for text in config.sweep.ways} or {"": config}


def _way(config: ConfigDict, text: str) -> ConfigDict:
    way, known = config.copy_and_resolve_references(), {key.name: key for key in sweepable()}
    way.sweep.ways = ()
    assigned: set[str] = set()
    for assignment in text.split():
        name, equals, values = assignment.partition("=")
        if not equals:
            raise UserError(f"sweep.ways={text!r}: write {assignment!r} as KEY=VALUE,VALUE")
        if name not in known:
            raise UserError(
                f"sweep.ways={text!r}: no sweep varies {name!r}; docs/config.md lists the keys"
            )
        if name in assigned:
            raise UserError(f"sweep.ways={text!r} assigns {name} twice; join the values by commas")
        assigned.add(name)
        parsed = tuple(_parsed(known[name], value) for value in values.split(","))
        set_value(way, axis_of(name), parsed)
    return way


def _parsed(key: Key, text: str) -> Any:
    """The value of a key in a way; a tuple is written like 64x32, or one of names like a+b."""
    if not isinstance(key.default, tuple):
        return _element(key.type, text)
    parts = text.split("+" if key.type is str else "x") if text else []
    return tuple(_element(key.type, part) for part in parts)


def _element(wanted: type, text: str) -> Any:
    """The value in a text, or the text itself where that is not possible: checks refuse it."""
    try:
        return {"True": True, "False": False}[text] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        return text


def axes(config: ConfigDict) -> dict[Key, tuple]:
    """The swept keys of a config with their values, those of all ways together."""
    union: dict[Key, dict] = {key: {} for key in sweepable()}
    for way in ways(config).values():
        for key, values in union.items():
            values.update(dict.fromkeys(value_of(way, axis_of(key.name))))
    return {key: tuple(values) for key, values in union.items() if values}


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a key, written like `train.steps`."""
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def set_value(config: ConfigDict, name: str, value: Any) -> None:
    """Set a key, written like `train.steps`, to a value converted to the type of the key."""
    section, _, last = name.rpartition(".")
    holder = value_of(config, section) if section else config
    holder[last] = type(holder[last])(value)


def without_influence(on: Influence) -> list[str]:
    """The names of the keys that do not change a dataset, a teacher, a student or a report."""
    place = INFLUENCES.index(on)
    return [key.name for key in _every_key() if INFLUENCES.index(key.influences) > place]


# The dataset and the teacher have separate fingerprints.
_WITH_FINGERPRINTS = ("data", "teacher.workdir")


def fingerprint(configs: Mapping[str, ConfigDict], made: Influence) -> str:
    """Return twelve hex digits that identify the rankers that configs make.

    They depend on the names, on their order, and on the values that influence a ranker.

    Args:
      configs: by the names of the rankers, in the order in which they train.
      made: "teacher" or "student".
    """
    without = (*without_influence(made), *_WITH_FINGERPRINTS)
    values = [[name, values_by_key(as_json(of), without)] for name, of in configs.items()]
    return manifest.digest(values)


def may_differ() -> list[str]:
    """The names of the keys in which sweeps may differ that make one report."""
    return [
        key.name
        for key in _every_key()
        if key.may_differ or key.sweep != "no" or key.influences == "nothing"
    ]


def _every_key() -> Iterator[Key]:
    """All keys of all sources; names that sources share occur more than once."""
    yield from keys_of("").values()
    for keys in DATA_KEYS.values():
        yield from keys.values()
