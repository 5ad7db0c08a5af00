"""The runs of a sweep: the config of each, and the values in which they differ.

A run is one student, trained with one config and one seed. A config file lists the runs of a sweep
in a function, which yields the values that each run changes, by key:

    def sweep(config):
        for mode, seed in itertools.product(("none", "shared"), (0, 1, 2)):
            yield {"distill.mode": mode, "seed": seed}

They become `config.sweep.runs`. Without such a function there is one run for each mode. The keys
`sweep.modes`, `sweep.weights`, `sweep.seeds` and `sweep.axes.KEY` are lists of values, for the
command line. Each run of the list then occurs once for each combination of these values.

With another `sweep.search` these runs are methods, of each of which `drawing` draws settings, or
`asking` asks Optuna for them.
"""

import enum
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_ranker.config import drawing, schema
from kd_ranker.config.keys import Key
from kd_ranker.distillation.modes import MODES
from kd_ranker.distillation.terms import format_terms, parse_terms
from kd_ranker.errors import UserError

Overrides = dict[str, Any]  # values by key
Runs = Mapping[str, ConfigDict]  # configs by the name of the run, in the order of training


def list_runs(listed: Iterable[Mapping[str, Any]]) -> tuple[Overrides, ...]:
    """Return the value of `config.sweep.runs` for a list of runs, as `sweep` yields them.

    Raises:
      UserError: there is no run, or one of them is not a mapping.
    """
    runs = []
    for number, overrides in enumerate(listed):
        if not isinstance(overrides, Mapping):
            raise UserError(
                f"run {number} of the sweep is {overrides!r}; it must be a dict of values by key, "
                "as {'distill.mode': 'aux'}"
            )
        runs.append({key: _as_tuple(value) for key, value in overrides.items()})
    if not runs:
        raise UserError("the sweep yields no run; yield a dict of values by key for each")
    return tuple(runs)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_runs(config: ConfigDict) -> None:
    """Check the list of runs.

    Raises:
      UserError: a run has a key that a sweep cannot vary or a value that its key does not take, or
        two runs are the same.
    """
    keys = {key.name: key for key in schema.sweepable()}
    numbers: dict[str, int] = {}
    for number, overrides in enumerate(config.sweep.runs):
        for name, value in overrides.items():
            if name not in keys:
                raise UserError(
                    f"run {number} of the sweep sets {name!r}, which no sweep varies; "
                    "docs/config.md lists the keys"
                )
            try:
                keys[name].check(value)
            except UserError as error:
                raise UserError(f"run {number} of the sweep: {error}") from error
        text = repr(sorted(overrides.items()))
        if text in numbers:
            raise UserError(
                f"runs {numbers[text]} and {number} of the sweep are the same: {overrides}; yield "
                "each run once"
            )
        numbers[text] = number


def overrides_of_runs(config: ConfigDict) -> Iterator[Overrides]:
    """Yield the values of each run of a sweep, those of the axes included."""
    if config.sweep.search == "grid":
        return _all_combinations(config)
    # Before Optuna has asked for settings, random ones stand for them: of the same methods.
    return drawing.draw_settings(
        methods_of(config), schema.sweepable_by_name(), config.sweep.draws, config.sweep.draw_seed
    )


def methods_of(config: ConfigDict) -> list[drawing.Method]:
    """Return the methods of a sweep, with what a search draws of each."""
    return drawing.methods_of(
        _all_combinations(config), schema.sweepable_by_name(), ranges_of(config)
    )


def of_rounds(config: ConfigDict, rounds: Sequence[drawing.Round]) -> ConfigDict:
    """Return the sweep of the settings that rounds of draws have found; it may grow by others."""
    methods = {method.name: method for method in methods_of(config)}
    runs = [
        run
        for of_methods in rounds
        for name, draws in of_methods.items()
        for drawn in draws
        for run in methods[name].runs(drawn)
    ]
    found = config.copy_and_resolve_references()
    with found.unlocked():
        for key in schema.sweepable():
            found.update_from_flattened_dict({schema.axis_of(key.name): ()})
        for key in schema.with_range():
            found.update_from_flattened_dict({schema.range_of(key.name): ()})
        found.sweep.update(search="grid", runs=list_runs(runs), extend=True)
    return found


def ranges_of(config: ConfigDict) -> dict[str, Any]:
    """Return the ranges of a search that are set, by the key that they are of."""
    ranges = {
        key.name: schema.value_of(config, schema.range_of(key.name)) for key in schema.with_range()
    }
    return {name: ends for name, ends in ranges.items() if ends}


def _all_combinations(config: ConfigDict) -> Iterator[Overrides]:
    axes = _axes(config)
    keys = sorted(axes, key=_axis_of)
    listed_runs: Sequence[Mapping[str, Any]] = config.sweep.runs or ({},)
    for listed in listed_runs:
        for values in itertools.product(*(axes[key] for key in keys)):
            overrides = dict(listed)
            for key, value in zip(keys, values, strict=True):
                overrides[key.name] = value
            yield overrides


def _axes(config: ConfigDict) -> dict[Key, Sequence[Any]]:
    """Return the axes that have values."""
    axes = {}
    for key in schema.sweepable():
        values = schema.value_of(config, schema.axis_of(key.name))
        if not values and key.name == "distill.mode" and not config.sweep.runs:
            values = tuple(MODES)
        if values:
            axes[key] = values
    return axes


class _Axis(enum.IntEnum):
    """The kinds of axes, in the order of nested loops: the first is the outermost."""

    BATCHES = 0
    SEED = 1
    MODE = 2
    STUDENT = 3
    DISTILLATION = 4


def _axis_of(key: Key) -> _Axis:
    if key.sweep == "cohorts":
        return _Axis.BATCHES
    if key.name == "seed":
        return _Axis.SEED
    if key.name == "distill.mode":
        return _Axis.MODE
    return _Axis.DISTILLATION if key.of_distillation else _Axis.STUDENT


def sweep_runs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the configs of a sweep's runs by name.

    Runs that differ only in keys that they do not read are one: those of `distill` in a mode
    without a distillation loss. If only the learning rate is swept, the learning rate of the tables
    keeps its ratio to it. With `sweep.whole_repeats` each run has the config of its `whole_repeat`.

    A name contains the mode, the weight and the seed, and the other values that differ from the
    config. Thus a sweep that grows keeps the names of its runs.
    """
    varied = _varied_keys(config)
    runs: dict[str, ConfigDict] = {}
    for overrides in overrides_of_runs(config):
        run = _config_of_run(config, overrides)
        runs.setdefault(_name(config, run, varied), run)
    return runs


def _varied_keys(config: ConfigDict) -> list[Key]:
    """Return the keys in which runs may differ, in the order in which they stand in names."""
    names = {*schema.NAMED_AXES, *(key.name for key in _axes(config)), *ranges_of(config)}
    for listed in config.sweep.runs:
        names |= listed.keys()
    keys = [key for key in schema.sweepable() if key.name in names]
    return sorted(keys, key=lambda key: _ORDER_IN_NAMES.index(_axis_of(key)))


_ORDER_IN_NAMES = (_Axis.MODE, _Axis.DISTILLATION, _Axis.STUDENT, _Axis.SEED, _Axis.BATCHES)


def _config_of_run(config: ConfigDict, overrides: Overrides) -> ConfigDict:
    mode = overrides.get("distill.mode", config.distill.mode)
    if not _distills(mode):
        unread = {key.name for key in schema.sweepable() if key.of_distillation}
        overrides = {name: value for name, value in overrides.items() if name not in unread}
        overrides["distill.weight"] = 0.0
    run = config.copy_and_resolve_references()
    run.update_from_flattened_dict(overrides)
    run.distill.serve = next(iter(MODES[mode].serve))
    rate_before = config.optimizer.learning_rate
    if rate_before and "optimizer.table_learning_rate" not in overrides:
        run.optimizer.table_learning_rate *= run.optimizer.learning_rate / rate_before
    return whole_repeat(run, run.seed) if config.sweep.whole_repeats else run


def _distills(mode: str) -> bool:
    return MODES[mode].teacher_logits is not None


def _name(config: ConfigDict, run: ConfigDict, varied: Iterable[Key]) -> str:
    """Return a name that no other run of the sweep has."""
    parts = []
    for key in varied:
        value = schema.value_of(run, key.name)
        if key.name == "distill.weight":
            is_named = _distills(run.distill.mode)
        elif key.name in schema.NAMED_AXES:
            is_named = True
        else:
            is_named = value != schema.value_of(config, key.name)
        if is_named:
            parts.append(_text(key, value))
    return "-".join(parts)


def _text(key: Key, value: Any) -> str:
    """Return the part of a name for one value."""
    if key.name == "distill.mode":
        return value
    if key.name == "distill.loss":
        return format_terms(parse_terms(value)).replace(" ", "")
    if isinstance(value, tuple):
        value = "x".join(map(str, value))
    return f"{key.short}{value}" if isinstance(value, str) else f"{key.short}{value!r}"


def repeats(config: ConfigDict) -> list[ConfigDict]:
    """Return the configs of the teachers that a sweep needs: one, or one per whole repeat."""
    if not config.sweep.whole_repeats:
        return [config]
    seeds = [overrides.get("seed", config.seed) for overrides in overrides_of_runs(config)]
    return [whole_repeat(config, seed) for seed in dict.fromkeys(seeds)]


def whole_repeat(config: ConfigDict, seed: int) -> ConfigDict:
    """Return the config of a repeat with a new seed for everything random in training.

    These are the initialization, the order of the data, the draws of candidates, and the teacher.
    The teacher is stored below `teacher.workdir`, in a folder named after the seed.
    """
    repeat = config.copy_and_resolve_references()
    repeat.seed = seed
    repeat.batch.seed = seed
    repeat.teacher.batch.seed = seed
    if repeat.teacher.workdir:
        repeat.teacher.workdir = os.path.join(repeat.teacher.workdir, f"seed{seed}")
    return repeat


def common(runs: Runs) -> ConfigDict:
    """Return the config that the runs of a cohort have in common.

    It lacks the keys in which they may differ, except `train.steps`, the largest of the runs.
    """
    config = next(iter(runs.values())).copy_and_resolve_references()
    config.unlock()  # a config from the command line is locked
    for key in schema.sweepable():
        if key.sweep == "runs":
            section_name, _, last = key.name.rpartition(".")
            section = schema.value_of(config, section_name) if section_name else config
            del section[last]
    config.train.steps = max(run.train.steps for run in runs.values())
    return config
