"""The plan of a sweep: which runs train together, and where the files of each cohort are.

The cohorts are trained one after the other. Their list is decided once and stored in
`cohorts.json`: a resumed sweep continues with it, even on another machine, and an extended sweep
adds to it.

Halving compares settings that train together, so it needs all of them in the first cohort. An
extension trains the settings that are left, for all their steps.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config import schema
from kd_ranker.config.runs import Runs, sweep_runs
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results, setting_names
from kd_ranker.evaluation.results import write_tables
from kd_ranker.evaluation.saving import FLOPS, Costs, costs_of
from kd_ranker.manifest import Provenance
from kd_ranker.training.workdir import read_json, write_atomically

FILE = "cohorts.json"
FOLDER = "cohorts"
TEST = "test"  # the subfolder of a cohort with the test tables of its chosen runs


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep, started or not."""

    workdir: Path
    runs: Runs  # all of them
    # The names of each cohort's runs, in the order of training; incomplete if the sweep has not
    # started or will be extended.
    plan: Sequence[Sequence[str]]
    dataset: Provenance  # the digest of its dataset

    @property
    def cohorts(self) -> list[Runs]:
        """The runs of each cohort; only those of the first are halved."""
        cohorts = [{name: self.runs[name] for name in names} for names in self.plan]
        return cohorts[:1] + [_without_halving(runs) for runs in cohorts[1:]]

    @property
    def costs(self) -> Costs:
        """The unit costs for savings."""
        return costs_of(next(iter(self.runs.values())))

    @property
    def folders(self) -> list[Path]:
        """The folders of the cohorts, with their checkpoints, metrics and results."""
        return cohort_folders(self.workdir, self.plan)

    def is_complete(self) -> bool:
        """True if all runs are trained and measured, and their results joined.

        A table that changed since it was written does not count, nor do tables joined from it.
        """
        if self._unplaced() or not manifest.has_provenance(self.workdir, self._provenance()):
            return False
        if not all(manifest.has_provenance(folder) for folder in self.folders):
            return False
        tested = self.with_any(setting_names.chosen(self.validation()))
        return all(manifest.has_provenance(folder / TEST) for folder in tested)

    def planned(self, size: int) -> "Sweep":
        """Assign every run to a cohort of at most `size`, and write the plan to the workdir.

        Existing cohorts do not change. The runs of a new one are on the same batches.
        """
        plan = [*self.plan]
        batch_keys = [key.name for key in schema.sweepable() if key.sweep == "cohorts"]
        is_first = not plan
        names_by_batches: dict[str, list[str]] = {}
        for name, run in self._unplaced().items():
            batches = repr([schema.value_of(run, key) for key in batch_keys])
            names_by_batches.setdefault(batches, []).append(name)
        for names in names_by_batches.values():
            # Runs go to the cohorts in turn, so their sizes differ by at most one: no small cohort
            # pays for a whole teacher pass.
            num_cohorts = math.ceil(len(names) / size)
            plan += [names[first::num_cohorts] for first in range(num_cohorts)]
        if is_first and len(plan) > 1 and next(iter(self.runs.values())).sweep.halving:
            raise UserError(
                f"sweep.halving compares settings that train together, and these runs train in "
                f"{len(plan)} cohorts; set sweep.halving=(), or have fewer runs or more memory"
            )
        write_atomically(self.workdir / FILE, json.dumps({"cohorts": plan}, indent=2))
        return dataclasses.replace(self, plan=plan)

    def check_planned(self) -> None:
        """Raise UserError unless all runs have a place in a cohort."""
        if unplaced := self._unplaced():
            raise UserError(
                f"{self.workdir} has no cohort for {len(unplaced)} of the sweep's "
                f"{len(self.runs)} runs; settle the cohorts by the same command with "
                "--config.sweep.part=plan"
            )

    def with_any(self, names: Collection[str]) -> list[Path]:
        """Return the folders of the cohorts with any of these runs; the first one if none has."""
        folders = [
            folder
            for names_of_cohort, folder in zip(self.plan, self.folders, strict=True)
            if set(names_of_cohort) & set(names)
        ]
        return folders or self.folders[:1]

    def join(self, tested: Sequence[Path]) -> None:
        """Write the tables of the sweep from those of its cohorts; `tested` have tables of test."""
        tables = results.join(self.folders, [folder / TEST for folder in tested], self.costs)
        joined = [*self.folders, *(folder / TEST for folder in tested)]
        parts = [(folder / manifest.FILE).relative_to(self.workdir).as_posix() for folder in joined]
        write_tables(self.workdir, tables, self._provenance(), [FILE, *parts])

    def validation(self) -> pd.DataFrame:
        """The rows of all runs on validation."""
        return results.read_joined(self.folders)

    def _unplaced(self) -> Runs:
        placed = set(itertools.chain.from_iterable(self.plan))
        return {name: run for name, run in self.runs.items() if name not in placed}

    def _provenance(self) -> Provenance:
        """The provenance of the joined results; those of each cohort contain the teacher.

        A change of costs only repeats the join: nothing is trained or measured again.
        """
        names = itertools.chain.from_iterable(self.plan)
        runs = {name: self.runs[name] for name in names}
        provenance = {"config": schema.digest_of(runs, "student"), **self.dataset}
        if rivals := next(iter(runs.values())).sweep.rivals:
            provenance["rivals"] = ",".join(rivals)
        if self.costs != FLOPS:
            provenance["costs"] = str(tuple(self.costs))
        return provenance


def cohort_folders(workdir: Path, plan: Sequence[Sequence[str]]) -> list[Path]:
    """Return the folders of the cohorts of a sweep."""
    return [workdir / FOLDER / str(index) for index in range(len(plan))]


def open_sweep(config: ConfigDict, workdir: Path, dataset: Provenance) -> Sweep:
    """Open the sweep of `config` on the dataset of this digest, with the cohorts in `workdir`.

    Raises:
      UserError: one of these has a run that the config does not name.
    """
    runs = sweep_runs(config)
    plan = read_plan(workdir)
    missing = [name for name in itertools.chain.from_iterable(plan) if name not in runs]
    if missing:
        raise UserError(
            f"{workdir} holds a sweep with {missing[0]}, which config.sweep does not name; "
            "sweep.extend adds runs, so name those that are there as well"
        )
    sweep = Sweep(workdir, runs, plan, dataset)
    if not plan or not config.sweep.halving:
        return sweep
    planned = {*itertools.chain.from_iterable(plan)}
    stopped = _stopped_settings(sweep)
    left = {
        name: run for name, run in runs.items() if name in planned or _setting(run) not in stopped
    }
    return dataclasses.replace(sweep, runs=left)


def _without_halving(runs: Runs) -> Runs:
    trained_in_full = {}
    for name, run in runs.items():
        trained_in_full[name] = run.copy_and_resolve_references()
        with trained_in_full[name].unlocked():
            trained_in_full[name].sweep.halving = ()
    return trained_in_full


def _stopped_settings(sweep: Sweep) -> set[str]:
    """Return the settings that halving stopped in the first cohort; none before it is measured."""
    folder = sweep.folders[0]
    if not (folder / results.FILE).exists():
        return set()
    rows = results.read_joined([folder])
    steps = {name: run.train.steps for name, run in sweep.cohorts[0].items()}
    students = rows[(rows["role"] == "student") & rows["non_finite_step"].isna()]
    stopped = students.loc[students["step"] < students["run"].map(steps), "run"]
    return {_setting(sweep.runs[name]) for name in stopped}


def _setting(run: ConfigDict) -> str:
    """Return a text that runs share which differ only in their seeds."""
    of_run = setting_names.setting_of(run)
    return repr([(name, of_run[name]) for name in of_run if name not in setting_names.REPEAT])


def read_plan(workdir: Path) -> list[list[str]]:
    """The names of the runs of each cohort of a sweep; empty if it has not started."""
    path = workdir / FILE
    if not path.exists():
        return []
    remedy = "use another --workdir"
    plan = read_json(path, remedy).get("cohorts")
    if not (isinstance(plan, list) and all(map(_are_names, plan))):
        raise UserError(f"{path} is damaged: it lists no runs for each cohort; {remedy}")
    return cast("list[list[str]]", plan)


def _are_names(names: object) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
