"""A sweep in its workdir: its members, the cohorts in which they train, and their progress.

The members of a cohort share their batches, so they agree in the keys that determine batches. As
many members as fit the memory of a device share a program. A sweep is a list of cohorts, trained
one after the other. The list is decided once and stored in `cohorts.json`. A resumed sweep
continues with it, even on another machine, and an extended sweep adds to it.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config.schema import fingerprint, sweepable, value_of
from kd_ranker.errors import UserError
from kd_ranker.evaluation import policy, results
from kd_ranker.evaluation.results import is_whole, write_tables
from kd_ranker.evaluation.saving import FLOPS, Costs, costs_of
from kd_ranker.manifest import MadeOf
from kd_ranker.sweep.members import sweep_members
from kd_ranker.sweep.memory import CohortSize
from kd_ranker.training.recipes import shared_part
from kd_ranker.training.workdir import read_json, write_atomically

FILE, FOLDER = "cohorts.json", "cohorts"
TEST = "test"  # the subfolder of a cohort with the test tables of its chosen members

Cohort = Mapping[str, ConfigDict]  # members by name


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, started or not.

    Attributes:
      workdir: its folder.
      members: the configs of all its members, by name.
      plan: the names of each cohort's members, in the order of training; incomplete if the sweep
        has not started or will be extended.
      dataset: the fingerprint of its dataset.
    """

    workdir: Path
    members: Mapping[str, ConfigDict]
    plan: Sequence[Sequence[str]]
    dataset: MadeOf

    @property
    def cohorts(self) -> list[Cohort]:
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
        if not (joined and all(map(is_whole, self.folders))):
            return False
        tested = self.with_any(results.chosen(self.validation()))
        return all(is_whole(folder / TEST) for folder in tested)

    def planned(self, size: CohortSize) -> "Sweep":
        """Assign every member to a cohort of at most this size, and write the plan to the workdir.

        Existing cohorts do not change.
        """
        plan = [*self.plan, *_new_cohorts(self._unplaced(), size)]
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

    def _unplaced(self) -> Cohort:
        placed = set(itertools.chain.from_iterable(self.plan))
        return {name: member for name, member in self.members.items() if name not in placed}

    def _made_of(self) -> MadeOf:
        """The fingerprints of the joined results; those of each cohort contain the teacher.

        A change of costs only repeats the join. One of policies measures on test again, and
        trains nothing.
        """
        names = itertools.chain.from_iterable(self.plan)
        members = {name: self.members[name] for name in names}
        found = {"config": fingerprint(members, "student"), **self.dataset}
        if policies := next(iter(members.values())).funnel.policies:
            found[policy.FILE] = ",".join(policies)
        return found if self.costs == FLOPS else {**found, "costs": str(tuple(self.costs))}


def open_sweep(config: ConfigDict, workdir: Path, dataset: MadeOf) -> Sweep:
    """Open the sweep of `config` on the dataset of this fingerprint, with the cohorts in `workdir`.

    Raises:
      UserError: the workdir's list of cohorts is damaged, or has a member that the config does not
        name.
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
    return read_json(path, "restore the original file, or use another --workdir")["cohorts"]


def _new_cohorts(members: Cohort, size: CohortSize) -> list[list[str]]:
    """Cohorts of members on the same batches, of sizes as equal as can be and at most `size`."""
    sharing: dict[str, dict[str, ConfigDict]] = {}
    for name, member in members.items():
        sharing.setdefault(repr(_batches_of(member)), {})[name] = member
    cohorts = []
    for of_batches in sharing.values():
        blocks = _blocks(of_batches, size.members)
        # Of equal sizes, so that no small cohort pays for a whole teacher pass.
        number = -(-len(blocks) // size.blocks)
        parts = [blocks[index::number] for index in range(number)]
        cohorts += [list(itertools.chain.from_iterable(part)) for part in parts]
    return cohorts


def _blocks(members: Cohort, size: int) -> list[list[str]]:
    """The members in blocks of at most `size`, each from one group that one program can train."""
    if size == 1:
        return [[name] for name in members]
    groups: dict[str, list[str]] = {}
    for name, member in members.items():
        groups.setdefault(shared_part(member), []).append(name)
    return [
        names[start : start + size]
        for names in groups.values()
        for start in range(0, len(names), size)
    ]


def _batches_of(member: ConfigDict) -> list[object]:
    """The values of the keys that the members of a cohort have in common."""
    return [value_of(member, key.name) for key in sweepable() if key.sweep == "cohorts"]
