"""A sweep: its members, the memory that they take, its cohorts in a workdir and their progress.

The members of a cohort share their batches and a program, as many as fit the memory of the devices.
The cohorts are trained one after the other. Their list is decided once and stored in
`cohorts.json`: a resumed sweep continues with it, even on another machine, and an extended sweep
adds to it.
"""

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import pandas as pd
import psutil
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.batch import FeatureSpec, abstract_batch
from kd_ranker.config import schema
from kd_ranker.config.keys import Key
from kd_ranker.distillation.modes import MODES
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.results import write_tables
from kd_ranker.evaluation.saving import FLOPS, Costs, costs_of
from kd_ranker.manifest import MadeOf
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS, DeviceMap, members_axis, own_devices
from kd_ranker.training.recipes import Group, shared_part
from kd_ranker.training.workdir import read_json, write_atomically

FILE, FOLDER = "cohorts.json", "cohorts"
TEST = "test"  # the subfolder of a cohort with the test tables of its chosen members

Members = Mapping[str, ConfigDict]  # configs by name, in the order of training

# Free memory per member, over the bytes of its state and of a batch. It covers two copies of the
# state for checkpoints, gathered rows, activations, gradients and the evaluation.
_MARGIN = 7
_REMEDY = "lower sweep.group_size, batch.requests, batch.candidates or the widths of the model"


def sweep_members(config: ConfigDict) -> dict[str, ConfigDict]:
    """The configs of a sweep's members by name, way by way.

    Each way of `sweep.ways` has all combinations of its axes. An axis is `sweep.modes`,
    `sweep.weights`, `sweep.seeds`, or `sweep.axes.KEY` of any other key that a sweep may vary. An
    axis without values takes the value of the config. A key that a member does not read occurs
    once for all its values: those of `distill` in a mode without a distillation loss. If only the
    learning rate is swept, the learning rate of the tables keeps its ratio to it.

    With `sweep.whole_repeats` each member has the config of its `whole_repeat`.

    A name contains the mode, the weight and the seed, and the other values that differ from the
    config. Thus a sweep that grows keeps the names of its members.

    Raises:
      UserError: no member has the value of an axis, as other keys replace it.
    """
    members: dict[str, ConfigDict] = {}
    swept = schema.axes(config)
    for way in schema.ways(config).values():
        for chosen in _combinations(way):
            member = _member(config, chosen)
            members.setdefault(_name(config, member, swept), member)
    _check_axes(config, members)
    return members


def _check_axes(config: ConfigDict, members: Members) -> None:
    keys, distils = schema.keys_of(""), any(_distils(of.distill.mode) for of in members.values())
    for key in schema.sweepable():
        axis = schema.axis_of(key.name)
        values = schema.value_of(config, axis)
        used = [schema.value_of(member, key.name) for member in members.values()]
        unused = [value for value in values if value not in used]
        if unused and values != keys[axis].default and (distils or not key.of_distillation):
            raise UserError(
                f"{axis}={values}: no member of the sweep has {unused[0]!r}, because sweep.ways or "
                "another key replaces it; leave the axis out, or change that"
            )


def _combinations(way: ConfigDict) -> Iterator[dict[str, Any]]:
    """The values of each member, by key, without the keys that it does not read."""
    axes = schema.axes(way)
    keys = sorted(axes, key=_place)
    for values in itertools.product(*(axes[key] for key in keys)):
        chosen = {key.name: value for key, value in zip(keys, values, strict=True)}
        terms = chosen.get("distill.terms", way.distill.terms)
        loss = chosen.get("distill.loss", way.distill.loss)
        unread = {"distill.loss"} if terms else set()
        # A loss such as "topk:stage" has its own signal.
        if all(":" in text for text in terms or (loss,)):
            unread.add("teacher.signal")
        if not _distils(chosen["distill.mode"]):
            chosen["distill.weight"] = 0.0
            unread = {key.name for key in keys if key.of_distillation} - {"distill.weight"}
        yield {name: value for name, value in chosen.items() if name not in unread}


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
    member.update_from_flattened_dict(chosen)
    member.distill.serve = next(iter(MODES[member.distill.mode].serve))
    own, rate = config.optimizer.learning_rate, member.optimizer.learning_rate
    if own and "optimizer.table_learning_rate" not in chosen:
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

    These are the initialisation, the order of the data, the draws of candidates, and the teacher.
    The teacher is stored below `teacher.workdir`, in a folder named after the seed.
    """
    repeat = config.copy_and_resolve_references()
    repeat.seed = repeat.batch.seed = repeat.teacher.batch.seed = seed
    if repeat.teacher.workdir:
        repeat.teacher.workdir = os.path.join(repeat.teacher.workdir, f"seed{seed}")
    return repeat


def _name(config: ConfigDict, member: ConfigDict, swept: Iterable[Key]) -> str:
    """A name that no other member of the sweep has."""
    keys = sorted(swept, key=lambda key: _PLACES_OF_NAME.index(_place(key)))
    named = {"distill.mode": True, "seed": True, "distill.weight": _distils(member.distill.mode)}
    parts = []
    for key in keys:
        value, own = schema.value_of(member, key.name), schema.value_of(config, key.name)
        if named.get(key.name, value != own):
            parts.append(_text(key, value))
    return "-".join(parts)


def _text(key: Key, value: Any) -> str:
    if key.name in ("distill.mode", "distill.loss"):
        return str(value)
    if isinstance(value, tuple):
        value = ("+" if key.type is str else "x").join(map(str, value))
    return f"{key.short}{value}" if isinstance(value, str) else f"{key.short}{value!r}"


def common(members: Members) -> ConfigDict:
    """The config that the members of a cohort have in common.

    It lacks the keys in which they may differ, except `train.steps`, the largest of the members.
    """
    config = next(iter(members.values())).copy_and_resolve_references()
    config.unlock()  # a config from the command line is locked
    for key in schema.sweepable():
        if key.sweep == "members":
            section, _, last = key.name.rpartition(".")
            del (schema.value_of(config, section) if section else config)[last]
    config.train.steps = max(member.train.steps for member in members.values())
    return config


def spread(
    parallel: ConfigDict, devices: Sequence[jax.Device], sizes: Sequence[int], requests: int
) -> DeviceMap:
    """Spread groups with these numbers of members, and the requests of a batch, over devices.

    `parallel` is that section of a config.
    """
    sharded = parallel.tables == "sharded"
    # Spreading members would leave fewer devices to share the rows of tables.
    if parallel.mapping == "pmap" or (sharded and not parallel.members):
        members = 1
    elif parallel.members and sum(sizes) > 1:
        members = parallel.members
    else:
        members = members_axis(len(devices), sizes, requests)
    return MAPPINGS[parallel.mapping](devices, members, parallel.deterministic, sharded)


def cohort_size(
    config: ConfigDict,
    members: Iterable[ConfigDict],
    spec: FeatureSpec,
    devices: Sequence[jax.Device],
) -> int:
    """Return `sweep.group_size`, or the number of members that fit free memory with a margin."""
    if config.sweep.group_size:
        return config.sweep.group_size
    # As for a cohort with one member per device.
    over = spread(config.parallel, devices, [len(devices)], config.batch.requests)
    one_per_group = {shared_part(member): member for member in members}
    sizes = (
        _bytes(recipes.student_groups({"": member}, spec), member.batch, spec)
        for member in one_per_group.values()
    )
    largest = max(states / over.deal.devices + of_batch for states, of_batch in sizes)
    return max(1, int(free_memory(over) / (_MARGIN * largest))) * over.members


def check_memory(
    groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec, devices: DeviceMap
) -> None:
    """Raise UserError unless a device has room for its part of the states of groups and of a batch.

    `batch` is `config.batch` or `config.teacher.batch`.
    """
    free = free_memory(devices)
    try:
        states, of_batch = _bytes(groups, batch, spec)
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"no model can have this size: {error}; {_REMEDY}") from error
    needed = states / (devices.members * devices.deal.devices) + of_batch / devices.mesh.size
    if needed > free:
        raise UserError(
            f"training needs at least {needed / 1e9:,.1f} GB per device, but {free / 1e9:,.1f} GB "
            f"are free; {_REMEDY}"
        )


@contextlib.contextmanager
def exhaustion_reported() -> Iterator[None]:
    """Raise UserError where XLA finds too little memory on a device, when it compiles or runs."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        first, *_ = str(error).splitlines()
        raise UserError(f"a device has too little memory: {first}; {_REMEDY}") from error


def _bytes(groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec) -> tuple[int, int]:
    """The bytes of the states of groups, and of a batch."""
    trees = (
        [jax.eval_shape(group.init) for group in groups],
        abstract_batch(spec, batch.requests, batch.candidates),
    )
    leaves = map(jax.tree.leaves, trees)
    states, of_batch = (sum(leaf.size * leaf.dtype.itemsize for leaf in of) for of in leaves)
    return states, of_batch


def free_memory(devices: DeviceMap) -> int:
    """Return the free bytes of a device; host devices share those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // len(own_devices(devices.mesh.devices.flat))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, started or not."""

    workdir: Path
    members: Members  # all of them
    # The names of each cohort's members, in the order of training; incomplete if the sweep has not
    # started or will be extended.
    plan: Sequence[Sequence[str]]
    dataset: MadeOf  # the fingerprint of its dataset

    @property
    def cohorts(self) -> list[Members]:
        """The members of each cohort."""
        return [{name: self.members[name] for name in names} for names in self.plan]

    @property
    def costs(self) -> Costs:
        """The unit costs for savings."""
        return costs_of(next(iter(self.members.values())))

    @property
    def folders(self) -> list[Path]:
        """The folders of the cohorts, with their checkpoints, metrics and results."""
        return [self.workdir / FOLDER / str(index) for index in range(len(self.plan))]

    def is_complete(self) -> bool:
        """True if all members are trained and measured, and their results joined.

        A table that changed since it was written does not count, nor do tables joined from it.
        """
        joined = not self._unplaced() and manifest.is_made_of(self.workdir, self._made_of())
        if not (joined and all(map(manifest.is_made_of, self.folders))):
            return False
        tested = self.with_any(results.chosen(self.validation()))
        return all(manifest.is_made_of(folder / TEST) for folder in tested)

    def planned(self, size: int) -> "Sweep":
        """Assign every member to a cohort of at most `size`, and write the plan to the workdir.

        Existing cohorts do not change. The members of a new one are on the same batches.
        """
        keys, plan = [of.name for of in schema.sweepable() if of.sweep == "cohorts"], [*self.plan]
        sharing: dict[str, list[str]] = {}
        for name, member in self._unplaced().items():
            batches = repr([schema.value_of(member, key) for key in keys])
            sharing.setdefault(batches, []).append(name)
        for names in sharing.values():
            # Of equal sizes, so that no small cohort pays for a whole teacher pass.
            number = -(-len(names) // size)
            plan += [names[index::number] for index in range(number)]
        write_atomically(self.workdir / FILE, json.dumps({"cohorts": plan}, indent=2))
        return dataclasses.replace(self, plan=plan)

    def check_planned(self) -> None:
        """Raise UserError unless all members have a place in a cohort."""
        if unplaced := self._unplaced():
            raise UserError(
                f"{self.workdir} has no cohort for {len(unplaced)} of the sweep's "
                f"{len(self.members)} members; settle the cohorts by the same command with "
                "--config.sweep.part=plan"
            )

    def with_any(self, names: Collection[str]) -> list[Path]:
        """The folders of the cohorts with any of these members; the first one if none has."""
        cohorts = zip(self.plan, self.folders, strict=True)
        return [folder for of, folder in cohorts if set(of) & set(names)] or self.folders[:1]

    def join(self, tested: Sequence[Path]) -> None:
        """Write the tables of the sweep from those of its cohorts; `tested` have tables of test."""
        tables = results.join(self.folders, [folder / TEST for folder in tested], self.costs)
        joined = [*self.folders, *(folder / TEST for folder in tested)]
        parts = [(folder / manifest.FILE).relative_to(self.workdir).as_posix() for folder in joined]
        write_tables(self.workdir, tables, self._made_of(), [FILE, *parts])

    def validation(self) -> pd.DataFrame:
        """The rows of all members on validation."""
        return results.read_joined(self.folders)

    def _unplaced(self) -> Members:
        placed = set(itertools.chain.from_iterable(self.plan))
        return {name: member for name, member in self.members.items() if name not in placed}

    def _made_of(self) -> MadeOf:
        """The fingerprints of the joined results; those of each cohort contain the teacher.

        A change of costs only repeats the join: nothing is trained or measured again.
        """
        names = itertools.chain.from_iterable(self.plan)
        members = {name: self.members[name] for name in names}
        found = {"config": schema.fingerprint(members, "student"), **self.dataset}
        if rivals := next(iter(members.values())).sweep.rivals:
            found["rivals"] = ",".join(rivals)
        return found if self.costs == FLOPS else {**found, "costs": str(tuple(self.costs))}


def open_sweep(config: ConfigDict, workdir: Path, dataset: MadeOf) -> Sweep:
    """Open the sweep of `config` on the dataset of this fingerprint, with the cohorts in `workdir`.

    UserError if one of these has a member that the config does not name.
    """
    members = sweep_members(config)
    plan = read_plan(workdir)
    missing = [name for name in itertools.chain.from_iterable(plan) if name not in members]
    if missing:
        raise UserError(
            f"{workdir} holds a sweep with {missing[0]}, which config.sweep does not name; "
            "sweep.extend adds members, so name those that are there as well"
        )
    return Sweep(workdir, members, plan, dataset)


def read_plan(workdir: Path) -> list[list[str]]:
    """The names of the members of each cohort of a sweep; empty if it has not started."""
    path = workdir / FILE
    if not path.exists():
        return []
    remedy = "use another --workdir"
    plan = read_json(path, remedy).get("cohorts")
    is_plan = isinstance(plan, list) and all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        for names in plan
    )
    if not is_plan:
        raise UserError(f"{path} is damaged: it lists no members for each cohort; {remedy}")
    return cast("list[list[str]]", plan)
