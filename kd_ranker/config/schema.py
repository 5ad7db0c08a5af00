"""Lookups over all config keys, from the table in `keys`, and the page of them in the docs."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast, get_args

from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config.keys import DATA_KEYS, KEYS, Influence, Key
from kd_ranker.training.workdir import values_by_key

# In the order of the chain: a change to a dataset changes everything made from it.
INFLUENCES: tuple[Influence | None, ...] = get_args(Influence)

# The axes of a sweep that have a separate key; all other axes are in `sweep.axes`.
NAMED_AXES = {
    "distill.mode": "sweep.modes",
    "distill.weight": "sweep.weights",
    "seed": "sweep.seeds",
}


def keys_of(source: str) -> dict[str, Key]:
    """The keys of a config by name, with those of its source, `sweep.axes` and `sweep.ranges`."""
    axes = {key.name: key for key in map(_axis_key, sweepable()) if key.name not in KEYS}
    ranges = {key.name: key for key in map(_range_key, with_range())}
    return KEYS | DATA_KEYS.get(source, {}) | axes | ranges


def sweepable() -> list[Key]:
    """The keys that a sweep may vary, those of cohorts first."""
    keys = [key for key in KEYS.values() if key.sweep != "no"]
    return sorted(keys, key=lambda key: key.sweep != "cohorts")


def sweepable_by_name() -> dict[str, Key]:
    """The same by their names."""
    return {key.name: key for key in sweepable()}


def with_range() -> list[Key]:
    """The keys that a search may draw from a range: tuned numbers."""
    return [
        key
        for key in sweepable()
        if key.tuned and key.type in (int, float) and not isinstance(key.default, tuple)
    ]


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
    return Key(
        axis_of(key.name),
        (),
        f"values of {key.name}, for each run; () leaves it to the runs",
        element=type(key.default),
        swept=key,
        influences="nothing",
        sweep="no",
    )


def range_of(name: str) -> str:
    """The key that holds the range of a swept key.

    >>> range_of("distill.weight")
    'sweep.ranges.distill.weight'
    """
    return f"sweep.ranges.{name}"


def _range_key(key: Key) -> Key:
    return Key(
        range_of(key.name),
        (),
        f"the ends of a range of {key.name} for a search; () takes the values of the runs",
        element=key.type,
        swept=key,
        influences="nothing",
        sweep="no",
    )


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a key, written like `train.steps`."""
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def without_influence(on: Influence) -> list[str]:
    """Return the names of the keys that may change without an effect on `on`.

    `on` is a dataset, a teacher, a student or a report; a key that influences one of these
    influences all that follow it.
    """
    rank = INFLUENCES.index(on)
    return [key.name for key in _every_key() if INFLUENCES.index(key.influences) > rank]


def later_defaults(config: ConfigDict) -> list[str]:
    """The keys that came later and have their default: names of datasets leave them out."""
    keys = keys_of(config.data.name).values()
    return [key.name for key in keys if key.later and value_of(config, key.name) == key.default]


# The dataset and the teacher have a separate provenance.
_WITH_PROVENANCE = ("data", "teacher.workdir")


def digest_of(configs: Mapping[str, ConfigDict], made: Influence) -> str:
    """Return twelve hex digits that identify the rankers that configs make.

    They depend on the names of the rankers, on the order in which they train, and on the values
    that influence a ranker. `made` is "teacher" or "student".
    """
    without = (*without_influence(made), *_WITH_PROVENANCE)
    values = [[name, values_by_key(config, without)] for name, config in configs.items()]
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


_PAGE = """\
# Config keys

Every key with its default, as `--config.KEY=value` sets it and a config file assigns it. *Changes*
names the first link of the chain dataset, teacher, student, report that depends on a key, and with
it all that follows. A run may resume in its workdir with another value of a key that does not
affect it. *Sweep* marks the keys for which a sweep may try several values, as in
`--config.sweep.axes.distill.loss="('bce', 'topk')"`: among the runs of one program, or among
cohorts, which are trained one after the other. `distill.mode`, `distill.weight` and `seed` have
axes under other names: `sweep.modes`, `sweep.weights`, `sweep.seeds`. A key that is *tuned* has its
best value chosen on validation for each combination of the others, and only that is read on test. A
*switch* is off at 0, and has its best value chosen among the others.

`scripts/make_docs.py` writes this page from `kd_ranker/config/keys.py`.
"""


def keys_page() -> str:
    """The page of all keys, `docs/config.md`, as Markdown."""
    sections: dict[str, list[Key]] = {}
    for key in KEYS.values():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = [_PAGE]
    parts += [_part(name or "The root", keys) for name, keys in sections.items()]

    # Sources with the same table of keys have one part.
    sources_by_table: dict[int, list[str]] = {}
    for source, table in DATA_KEYS.items():
        sources_by_table.setdefault(id(table), []).append(source)
    parquet = DATA_KEYS["parquet"]
    for sources in sources_by_table.values():
        title = f"data, of {', '.join(sources)}"
        keys = DATA_KEYS[sources[0]]
        if keys is not parquet and parquet.keys() & keys:
            lacking = ", ".join(f"`{name}`" for name in parquet if name not in keys)
            keys = {name: key for name, key in keys.items() if key is not parquet.get(name)}
            end = ", and these:" if keys else "."
            title += f"\n\nThe keys of parquet except {lacking}{end}"
        parts.append(_part(title, keys.values()))
    return "\n".join(parts)


def _part(title: str, keys: Collection[Key]) -> str:
    lines = [f"## {title}"]
    if keys:
        lines.append("")
        lines.append("| key | default | | takes | changes | sweep |")
        lines.append("|---|---|---|---|---|---|")
    return "\n".join([*lines, *map(_line, keys), ""])


def _line(key: Key) -> str:
    default = "names of your own"
    if not isinstance(key.default, ConfigDict):
        default = f"`{key.default!r}`".replace("'", '"')
    if bound := key.bound:
        takes = bound.text
    else:
        takes = ", ".join(sorted(cast("Collection[str]", key.allowed or ())))
    sweep = ""
    if key.sweep != "no":
        sweep = str(key.sweep)
        sweep += ", tuned" if key.tuned else ""
        sweep += ", switch" if key.switch else ""
    cells = (f"`{key.name}`", default, key.help, takes, key.influences, sweep)
    return f"| {' | '.join(map(str, cells))} |"
