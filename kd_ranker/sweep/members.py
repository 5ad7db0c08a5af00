"""The members of a sweep: of each way, every combination of the values of its axes."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.config.key import Key
from kd_ranker.distillation.modes import MODES


def sweep_members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of a sweep's members by name, way by way.

    Each way of `sweep.ways` has all combinations of its axes. An axis is `sweep.modes`,
    `sweep.weights`, `sweep.seeds`, or `sweep.axes.KEY` of any other key that a sweep may vary. An
    axis without values takes the value of the config. A mode without a distillation loss has
    nothing to weigh, so it occurs once for all swept values of `distill`. If only the learning rate
    is swept, the learning rate of the tables keeps its ratio to it.

    With `sweep.whole_repeats` each member has the config of its `whole_repeat`.

    A name contains the mode, the weight and the seed, and the other values that differ from the
    config. Thus a sweep that grows keeps the names of its members.
    """
    members: dict[str, ConfigDict] = {}
    swept = schema.axes(config)
    for way in schema.ways(config).values():
        for chosen in _combinations(schema.axes(way)):
            member = _member(config, chosen)
            members.setdefault(_name(config, member, swept), member)
    return members


def _combinations(axes: Mapping[Key, tuple]) -> Iterator[dict[str, Any]]:
    """The values of each member, by key, without the keys that its mode does not read."""
    keys = sorted(axes, key=_place)
    for values in itertools.product(*(axes[key] for key in keys)):
        chosen = {key.name: value for key, value in zip(keys, values, strict=True)}
        if not _distils(chosen["distill.mode"]):
            read = {key.name for key in keys if not key.of_distillation}
            chosen = {name: value for name, value in chosen.items() if name in read}
            chosen["distill.weight"] = 0.0
        yield chosen


def _place(key: Key) -> int:
    """The place of an axis in the order of members, in which the last place varies first."""
    if key.sweep == "cohorts":
        return 0
    return {"seed": 1, "distill.mode": 2}.get(key.name, 4 if key.of_distillation else 3)


# The order of the axes in a name: mode, distillation, student, seed, batches.
_PLACES_OF_NAME = (2, 4, 3, 1, 0)


def _distils(mode: str) -> bool:
    return MODES[mode].teacher_logits is not None


def _member(config: ConfigDict, chosen: dict[str, Any]) -> ConfigDict:
    """The config of the member with the values in `chosen`, by key."""
    member = config.copy_and_resolve_references()
    for name, value in chosen.items():
        schema.set_value(member, name, value)
    member.distill.serve = next(iter(MODES[member.distill.mode].serve))
    own, rate = config.optimizer.learning_rate, member.optimizer.learning_rate
    if rate != own and "optimizer.table_learning_rate" not in chosen:
        member.optimizer.table_learning_rate *= rate / own
    return whole_repeat(member, member.seed) if config.sweep.whole_repeats else member


def repeats(config: ConfigDict) -> list[ConfigDict]:
    """The configs of the teachers that a sweep needs: one, or one per whole repeat."""
    if not config.sweep.whole_repeats:
        return [config]
    seeds = {key.name: values for key, values in schema.axes(config).items()}["seed"]
    return [whole_repeat(config, seed) for seed in seeds]


def whole_repeat(config: ConfigDict, seed: int) -> ConfigDict:
    """The config of a repeat with a new seed for everything random in training.

    The seed applies to the initialisation, the order of the data, the draws of candidates, and the
    teacher, if one is trained here. That teacher is stored below `teacher.workdir`, in a folder
    named after the seed. The dataset stays the same.
    """
    repeat = config.copy_and_resolve_references()
    repeat.seed = repeat.batch.seed = repeat.teacher.batch.seed = seed
    if repeat.teacher.workdir:
        repeat.teacher.workdir = os.path.join(repeat.teacher.workdir, f"seed{seed}")
    return repeat


def _name(config: ConfigDict, member: ConfigDict, swept: Iterable[Key]) -> str:
    """A name that no other member of the sweep has."""
    keys = sorted(swept, key=lambda key: _PLACES_OF_NAME.index(_place(key)))
    parts = []
    for key in keys:
        value, own = schema.value_of(member, key.name), schema.value_of(config, key.name)
        always = key.name in ("distill.mode", "seed")
        weighed = key.name == "distill.weight" and _distils(member.distill.mode)
        if always or weighed or (value != own and key.name != "distill.weight"):
            parts.append(_text(key, value))
    return "-".join(parts)


def _text(key: Key, value: Any) -> str:
    if key.name in ("distill.mode", "distill.loss"):
        return str(value)
    if isinstance(value, tuple):
        value = ("+" if key.type is str else "x").join(map(str, value))
    return f"{key.short}{value}" if isinstance(value, str) else f"{key.short}{value!r}"


def common(members: Mapping[str, ConfigDict]) -> ConfigDict:
    """The config that the members of a cohort have in common.

    It lacks the keys in which they may differ, so that no code uses one member's value for all. Its
    `train.steps` is the largest of the members.
    """
    config = next(iter(members.values())).copy_and_resolve_references()
    config.unlock()  # a config from the command line is locked
    for key in schema.sweepable():
        if key.sweep == "members":
            section, _, last = key.name.rpartition(".")
            del (schema.value_of(config, section) if section else config)[last]
    config.train.steps = max(member.train.steps for member in members.values())
    return config
