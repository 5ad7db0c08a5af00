"""The page of all config keys, `docs/config.md`, from the table in `keys`."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from kd_ranker.config.key import Bound, Key, TermNames
from kd_ranker.config.keys import DATA_KEYS, KEYS

_HEAD = """\
# Config keys

Every key with its default, as `--config.KEY=value` sets it and a config file assigns it. *Changes*
names the first link of the chain dataset, teacher, student, report that depends on a key, and with
it all that follows. A run may resume in its workdir with another value of a key that does not
affect it. *Sweep* marks the keys for which a sweep may try several values, as in
`--config.sweep.axes.distill.loss="('bce', 'topk')"`: among the members of one program, or among
cohorts, which are trained one after the other. `distill.mode`, `distill.weight` and `seed` have
axes under other names: `sweep.modes`, `sweep.weights`, `sweep.seeds`. A key that is *tuned* has its
best value chosen on validation for each combination of the others, and only that is read on test. A
*switch* is off at 0, and has its best value chosen among the others.

`scripts/make_docs.py` writes this page from `kd_ranker/config/keys.py`.
"""


def keys_page() -> str:
    """The page as Markdown."""
    sections: dict[str, list[Key]] = {}
    for key in KEYS.values():
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = [_HEAD, *(_part(name or "The root", keys) for name, keys in sections.items())]
    sources: dict[int, list[str]] = {}
    for source, of_source in DATA_KEYS.items():
        sources.setdefault(id(of_source), []).append(source)
    log = DATA_KEYS["parquet"]
    for names in sources.values():
        title, keys = f"data, of {', '.join(names)}", DATA_KEYS[names[0]]
        lacking = ", ".join(f"`{name}`" for name in log if name not in keys)
        if keys is not log and log.keys() & keys:
            keys = {name: key for name, key in keys.items() if key is not log.get(name)}
            title += f"\n\nThe keys of parquet except {lacking}{', and these:' if keys else '.'}"
        parts.append(_part(title, keys.values()))
    return "\n".join(parts)


def _part(title: str, keys: Iterable[Key]) -> str:
    lines = []
    for key in keys:
        sweep = f"{key.sweep}{', tuned' * key.tuned}{', switch' * key.switch}"
        sweep = "" if key.sweep == "no" else sweep
        cells = (f"`{key.name}`", _default(key), key.help, _takes(key), key.influences, sweep)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    head = ["", "| key | default | | takes | changes | sweep |", "|---|---|---|---|---|---|"]
    return "\n".join([f"## {title}", *(head if lines else []), *lines, ""])


def _default(key: Key) -> str:
    if isinstance(key.default, ConfigDict):
        return "names of your own"
    text = repr(key.default) if not isinstance(key.default, tuple) else str(key.default)
    return f"`{text}`".replace("'", '"')


def _takes(key: Key) -> str:
    if isinstance(key.allowed, Bound):
        return key.allowed.range
    if isinstance(key.allowed, TermNames):
        losses, signals = (", ".join(sorted(names)) for names in key.allowed)
        return f"losses {losses}; signals {signals}"
    return ", ".join(sorted(key.allowed)) if key.allowed is not None else ""
