"""Read the files of sweeps, join them to one study per dataset, and choose what it describes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.cohorts.plan import FOLDER, TEST
from kd_ranker.config import schema
from kd_ranker.errors import UserError, command
from kd_ranker.evaluation import request_files, results, saving, setting_names
from kd_ranker.evaluation.baselines import BASELINES
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.evaluation.metrics.target import at_target
from kd_ranker.evaluation.saving import PLAIN, by_repeat, of_split
from kd_ranker.reporting.intervals import Interval, interval
from kd_ranker.sources.logs.data_report import read_data_report, requests_a_day
from kd_ranker.training import workdir as workdirs


class Environment(NamedTuple):
    """The environment in which a run was made, as it recorded it."""

    values: dict[str, Any]  # none if it is unknown
    missing: str = ""  # the reason why it is unknown, as a sentence


class Pair(NamedTuple):
    """Two rankers to compare."""

    with_scores: str  # learns from the final ranker's scores
    without: str


class Study(NamedTuple):
    """The results of one or more sweeps of one dataset.

    The tables of rankers are rows of `results.csv` with the columns of `setting_names.with_names`,
    `source` (the number of the sweep), `needs_scores` and, under their names, the means over tasks
    of metrics that are `averaged`.

    Of the students, only those of finite loss take part, except in `diverged`.
    """

    dataset: str  # `data.title` of an own log, or `data.name`
    config: ConfigDict  # of the first sweep; the others may differ in runs and random seeds
    passed: int  # k, the number of candidates that the config passes
    costs: saving.Costs
    rows: pd.DataFrame  # of students on both splits
    chosen: dict[str, str]  # by method, the setting that validation chose, of those read on test
    baselines: dict[str, str]  # see `saving.baselines`
    tested: pd.DataFrame  # of the chosen settings, on the test split
    teachers: pd.DataFrame  # on the test split, one per repeat of the students
    num_teachers: int  # which differ in their seeds
    references: pd.DataFrame  # of rankers without a model, on both splits
    diverged: pd.DataFrame  # of runs with a loss that stopped being finite
    varying: list[str]  # columns of a setting that differ, without mode, head and weight
    allowed: list[str]  # faults of the user's log that `data.allow` accepted, in words
    requests_a_day: float  # of the user's log; NaN without times
    configs: dict[str, ConfigDict]  # by the folder of each sweep
    environments: dict[str, Environment]  # the same
    # Of each sweep's number and cohort, what each test request adds to the measures of its rankers.
    kept: list[tuple[int, request_files.PerRequestByRanker]]

    @property
    def baseline(self) -> str | None:
        """The best ranker without scores of the final ranker; None if none is measured."""
        return self.baselines.get("funnel_cost_saving")

    @property
    def plain(self) -> str | None:
        """The best setting of plain mode `none`; None if it is not measured."""
        return self.baselines.get("saving_over_none")

    @property
    def incumbent(self) -> str | None:
        """The early ranker that filled the log; None if the log does not name it."""
        return self.baselines.get("saving_over_incumbent")

    @property
    def saved_unit(self) -> str:
        """The unit of savings: compute, the user's own costs, or candidates if none is known."""
        if not self.rows["funnel_cost"].notna().any():
            return "candidates"
        return "cost" if self.costs.teacher else "compute"

    @property
    def file_name(self) -> str:
        """Its name in the names of files, and of places in the page."""
        return re.sub(r"[^\w.-]", "_", self.dataset)

    @property
    def knows_truth(self) -> bool:
        """True if the true value of the shown items was measured."""
        true_value = f"true_value_captured@{self.passed}"
        return true_value in self.tested and bool(self.tested[true_value].notna().any())

    @property
    def users_measures(self) -> list[str]:
        """The columns that measure the value for users: at `funnel.passed`, then at `TARGET`.

        They are the true value where it is known. Where more candidates have labels than are shown,
        it is the NDCG by labels of the final ranker's list. Else it is the value of user labels
        that a funnel keeps of the candidates that the logged funnel passed, which can have labels.
        Labels cannot compare funnels that pass different numbers, so there is no second column.
        """
        if self.knows_truth:
            return [f"true_value_captured@{self.passed}", at_target("true_value_for")]
        if self.has_labels_beyond_shown:
            return [f"served_ndcg@{self.passed}"]
        return [f"covered_user_value@{self.passed}"]

    @property
    def has_labels_beyond_shown(self) -> bool:
        """True if more candidates of a request have labels than the final ranker shows."""
        column = f"served_ndcg@{self.passed}"
        return column in self.rows and bool(self.rows[column].notna().any())

    @property
    def rivals(self) -> dict[str, bool]:
        """The rankers of other architectures on test, and whether each needs scores."""
        rows = of_split(self.references, "test")
        rows = rows[~rows["run"].isin(BASELINES)].drop_duplicates("setting")
        return dict(zip(rows["setting"], rows["needs_scores"].astype(bool), strict=True))

    @property
    def best_with_scores(self) -> str | None:
        """The ranker of the cheapest funnel that learns from the final ranker's scores.

        On validation, at `CRITERION`; without a teacher's cost, the one that passes fewest.
        Rankers that keep users are preferred. None if none is measured.
        """
        rivals = [name for name, needs_scores in self.rivals.items() if needs_scores]
        return self._cheapest([*self._students(needs_scores=True), *rivals])

    @property
    def same_kind(self) -> dict[str, Pair]:
        """The best rankers with and without scores of each kind that has both.

        They differ only by the scores. The best of all kinds may differ in more than that.
        """
        trees = {name: of for name, of in self.rivals.items() if name.startswith("trees ")}
        settings = {
            "students": (self._students(needs_scores=True), self._students(needs_scores=False)),
            "trees": (
                [name for name, needs_scores in trees.items() if needs_scores],
                [name for name, needs_scores in trees.items() if not needs_scores],
            ),
        }
        found = {}
        for kind, (learned, others) in settings.items():
            with_scores, without = self._cheapest(learned), self._cheapest(others)
            if with_scores is not None and without is not None:
                found[kind] = Pair(with_scores, without)
        return found

    def _students(self, needs_scores: bool) -> list[str]:
        rows = self.tested[self.tested["needs_scores"] == needs_scores]
        return [*rows["setting"].unique()]

    def _cheapest(self, settings: Sequence[str]) -> str | None:
        kept = [setting for setting in settings if self.keeps_users(setting)] or [*settings]
        rows = pd.concat([self.rows, self.references])
        costs = by_repeat(of_split(rows, "validation"), "funnel_cost")
        return saving.best_of(costs[kept]) or saving.best(rows, kept)

    def keeps_users(self, setting: str) -> bool:
        """Return True if the interval of `users_change` is above −`report.margin`, or unknown."""
        change = self.users_change(setting)
        return change is None or change.low > -self.config.report.margin

    def users_change(self, setting: str) -> Interval | None:
        """Return the change for users at `TARGET` against the baseline, on validation.

        The paired difference, with a 95% interval over repeats. None if the truth is not known, or
        no ranker without scores is measured.
        """
        if self.baseline is None or not self.knows_truth:
            return None
        rows = of_split(pd.concat([self.rows, self.references]), "validation")
        rows = rows[rows["setting"].isin([setting, self.baseline])]
        table = by_repeat(rows, self.users_measures[1])
        return interval((table[setting] - table[self.baseline]).to_numpy())


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """Read the workdirs of sweeps and join those of the same dataset, in their order.

    Raises:
      UserError: a folder is not a sweep's; two sweeps of a dataset have a run in common, or
        differ in more than runs and random seeds; or two titles give the same file name.
    """
    by_dataset: dict[str, list[Path]] = {}
    for folder in folders:
        data = _checked_config(folder).data
        by_dataset.setdefault(data.get("title") or data.name, []).append(folder)
    studies = [_study(dataset, of) for dataset, of in by_dataset.items()]
    names = pd.Series(["claims", *(study.file_name for study in studies)])
    if len(duplicates := names[names.duplicated()]):
        name = duplicates.min()
        raise UserError(f"two tables would both be called {name}; choose another data.title")
    return studies


def _checked_config(folder: Path) -> ConfigDict:
    for name in (results.FILE, workdirs.CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; {_make(folder)}")
    remedy = (
        "start the command that made it again, with its flags: it writes the tables, and trains "
        "nothing again"
    )
    for measured in dict.fromkeys([folder, *_tested(folder)]):
        manifest.check(measured, remedy)
    return workdirs.read_config(folder)


def _tested(folder: Path) -> list[Path]:
    """Return the folders with the test of a sweep's cohorts, or that of a single run."""
    return sorted(folder.glob(f"{FOLDER}/*/{TEST}")) or [folder]


def _make(folder: Path) -> str:
    return f"make a sweep with: {command('sweep')} --config=FILE.py --workdir={folder}"


def _study(dataset: str, folders: list[Path]) -> Study:
    configs = {str(folder): workdirs.read_config(folder) for folder in folders}
    _check_alike(configs)
    first = next(iter(configs.values()))
    tables = (
        results.read_csv(folder / results.FILE).assign(source=source)
        for source, folder in enumerate(folders)
    )
    joined = pd.concat(tables, ignore_index=True)
    if "student" not in set(joined["role"]):
        names = ", ".join(configs)
        raise UserError(f"{names}: {results.FILE} has no student; {_make(folders[0])}")
    rows = _labeled(joined)
    students, teachers, references = (
        rows[rows["role"] == role] for role in ("student", "teacher", "reference")
    )
    _check_distinct(students, folders)
    is_healthy = students["non_finite_step"].isna()
    healthy = students[is_healthy]
    # Each sweep has measured the choices of its validation on test. The validation of all decides.
    read = of_split(healthy, "test")["setting"]
    chosen = saving.best_of_methods(healthy[healthy["setting"].isin(read)])
    compared = healthy[healthy["setting"].isin([*chosen.values()])]
    teacher_flops = float(teachers["flops_per_candidate"].mean())
    costs = saving.costs_of(first)
    ranked = saving.with_costs(pd.concat([healthy, references]), teacher_flops, costs)
    is_compared = ranked["setting"].isin([*compared["setting"], *references["setting"]])
    against = saving.baselines(ranked[is_compared])
    ranked = saving.with_savings(ranked, against)
    healthy, references = (ranked[ranked["role"] == of] for of in ("student", "reference"))
    reports = [report for report in map(read_data_report, folders) if report]
    faults = (of for report in reports for of in report["allowed"])
    return Study(
        dataset=dataset,
        config=first,
        passed=first.funnel.passed,
        costs=costs,
        rows=healthy,
        chosen=chosen,
        baselines=against,
        tested=of_split(healthy[healthy["setting"].isin([*chosen.values()])], "test"),
        teachers=of_split(teachers, "test"),
        num_teachers=joined.loc[joined["role"] == "teacher", "seed"].nunique(dropna=False),
        references=references,
        diverged=students[~is_healthy].drop_duplicates(["source", "run"]),
        varying=setting_names.varying_columns(students),
        allowed=list(dict.fromkeys(f"{of['name']}: {of['text']}" for of in faults)),
        requests_a_day=requests_a_day(reports[0]) if reports else float("nan"),
        configs=configs,
        environments={str(folder): _environment(folder) for folder in folders},
        kept=[
            (source, request_files.read_requests(tested))
            for source, folder in enumerate(folders)
            for tested in _tested(folder)
            if (tested / request_files.REQUESTS_FILE).exists()
        ],
    )


def _environment(folder: Path) -> Environment:
    name = workdirs.ENVIRONMENT_FILE
    if not (folder / name).is_file():
        return Environment({}, f"Not known: {folder} holds no {name}.")
    if not manifest.is_original(folder, name):
        return Environment({}, f"Not known: the {name} in {folder} is not that of this run.")
    return Environment(workdirs.read_environment(folder))


def _check_alike(configs: dict[str, ConfigDict]) -> None:
    free = [*schema.may_differ(), *schema.without_influence("report")]
    flat = {name: workdirs.values_by_key(config, free) for name, config in configs.items()}
    (first, here), *others = flat.items()
    for other, there in others:
        if differing := manifest.differences(here, there):
            raise UserError(
                f"{first} and {other} are sweeps of one dataset under different configs, so their "
                f"results cannot be joined; report them separately: {differing}"
            )


def _labeled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the labels of `Study`, in the order of tables.

    Modes and heads are in the order in which they occur, plain mode `none` first.
    """
    # A sweep's teachers and references count for its own students, and once per repeat.
    each = [setting_names.in_each_repeat(of) for _, of in rows.groupby("source")]
    rows = pd.concat(each, ignore_index=True)
    once = ["split", "role", "run", "serve", *setting_names.REPEAT]
    rows = rows[(rows["role"] == "student") | ~rows.duplicated(once)]
    averages = {
        name: rows.filter(regex=f"^{name}/").mean(axis=1)
        for name, metric in METRICS.items()
        if metric.averaged
    }
    rows = rows.assign(
        **averages,
        # The run of a single run has no name.
        run=rows["run"].astype(object).fillna(""),
        needs_scores=saving.needs_scores(rows),
        variant=(rows["mode"] == "none") & (rows[list(PLAIN)] != pd.Series(PLAIN)).any(axis=1),
    )

    def places(column: pd.Series) -> Any:
        return pd.factorize(column)[0] if column.name in ("mode", "serve") else column

    order = ["mode", "variant", *setting_names.SETTING_COLUMNS[1:], *setting_names.REPEAT]
    rows = rows.sort_values(
        order, key=places, kind="stable", na_position="first", ignore_index=True
    )
    students = rows[rows["role"] == "student"]
    return setting_names.with_names(rows, setting_names.varying_columns(students))


def _check_distinct(students: pd.DataFrame, folders: list[Path]) -> None:
    duplicates = students[students.duplicated(["split", "setting", "repeat"], keep=False)]
    if len(duplicates):
        names = ", ".join(duplicates["run"].astype(str).unique())
        named = ", ".join(str(folders[source]) for source in sorted(duplicates["source"].unique()))
        raise UserError(f"{named}: these runs occur more than once: {names}; leave one out")
