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
from kd_ranker.reporting.words import method_in_words
from kd_ranker.sources.logs.data_report import read_data_report, requests_a_day
from kd_ranker.sources.registry import SOURCES
from kd_ranker.training import workdir as workdirs


class Environment(NamedTuple):
    """The environment in which a run was made, as it recorded it."""

    values: dict[str, Any]  # none if it is unknown
    missing: str = ""  # the reason why it is unknown, as a sentence


class Pair(NamedTuple):
    """Two rankers to compare."""

    with_scores: str  # learns from the final ranker's scores
    without: str


class KeptRequests(NamedTuple):
    """What each test request adds to the measures of the rankers of a cohort."""

    source: int  # the number of the sweep
    by_ranker: request_files.PerRequestByRanker


class Study(NamedTuple):
    """The results of one or more sweeps of one dataset.

    The tables of rankers are rows of `results.csv` with the columns of `setting_names.with_names`,
    `source` (the number of the sweep), `is_stopped` (by halving), `needs_scores` and, under their
    names, the means over tasks of metrics that are `averaged`.

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
    in_words: dict[str, str]  # how the students of each method in `chosen` were trained
    requests_a_day: float  # of the user's log; NaN without times
    configs: dict[str, ConfigDict]  # by the folder of each sweep
    environments: dict[str, Environment]  # the same
    kept_requests: list[KeptRequests]  # of each sweep and cohort that kept them

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
    def is_simulated(self) -> bool:
        """True if no people took part, as far as is known: a config file may register a source."""
        source = SOURCES.get(self.config.data.name)
        return source is not None and source.simulated

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
        pairs = {
            "students": (
                self._cheapest(self._students(needs_scores=True)),
                self._cheapest(self._students(needs_scores=False)),
            ),
            "tree rankers": (
                self._cheapest(self._trees(needs_scores=True)),
                self._cheapest(self._trees(needs_scores=False)),
            ),
        }
        return {
            kind: Pair(with_scores, without)
            for kind, (with_scores, without) in pairs.items()
            if with_scores is not None and without is not None
        }

    @property
    def trained_in_full(self) -> pd.DataFrame:
        """The students' rows on validation, without the runs that halving stopped."""
        rows = of_split(self.rows, "validation")
        return rows[~rows["is_stopped"]]

    def _students(self, needs_scores: bool) -> list[str]:
        rows = self.tested[self.tested["needs_scores"] == needs_scores]
        return [*rows["setting"].unique()]

    def _trees(self, needs_scores: bool) -> list[str]:
        return [
            name
            for name, rival_needs_scores in self.rivals.items()
            if name.startswith("trees ") and rival_needs_scores == needs_scores
        ]

    def _cheapest(self, settings: Sequence[str]) -> str | None:
        """Return the setting of the cheapest funnel, of those that keep users if any does."""
        keeping = [setting for setting in settings if self.keeps_users(setting)]
        candidates = keeping or [*settings]
        rows = pd.concat([self.rows, self.references])
        costs = by_repeat(of_split(rows, "validation"), "funnel_cost")
        return saving.best_of(costs[candidates]) or saving.best(rows, candidates)

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
    studies = [_join_sweeps(dataset, sweeps) for dataset, sweeps in by_dataset.items()]
    names = pd.Series(["claims", *(study.file_name for study in studies)])
    duplicates = names[names.duplicated()]
    if len(duplicates):
        name = duplicates.min()
        raise UserError(f"two tables would both be called {name}; choose another data.title")
    return studies


def _checked_config(folder: Path) -> ConfigDict:
    for name in (results.FILE, workdirs.CONFIG_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}; {_sweep_remedy(folder)}")
    remedy = (
        "start the command that made it again, with its flags: it writes the tables, and trains "
        "nothing again"
    )
    for measured in dict.fromkeys([folder, *_test_folders(folder)]):
        manifest.check(measured, remedy)
    return workdirs.read_config(folder)


def _test_folders(folder: Path) -> list[Path]:
    """Return the folders with the test of a sweep's cohorts, or that of a single run."""
    return sorted(folder.glob(f"{FOLDER}/*/{TEST}")) or [folder]


def _sweep_remedy(folder: Path) -> str:
    return f"make a sweep with: {command('sweep')} --config=FILE.py --workdir={folder}"


def _join_sweeps(dataset: str, folders: list[Path]) -> Study:
    configs = {str(folder): workdirs.read_config(folder) for folder in folders}
    _check_alike(configs)
    first = next(iter(configs.values()))
    tables = []
    for source, folder in enumerate(folders):
        rows_of_sweep = results.read_csv(folder / results.FILE)
        is_stopped = rows_of_sweep["step"].isin(configs[str(folder)].sweep.halving)
        tables.append(rows_of_sweep.assign(source=source, is_stopped=is_stopped))
    joined = pd.concat(tables, ignore_index=True)
    if "student" not in set(joined["role"]):
        names = ", ".join(configs)
        raise UserError(f"{names}: {results.FILE} has no student; {_sweep_remedy(folders[0])}")
    rows = _labeled(joined)
    students = _of_role(rows, "student")
    teachers = _of_role(rows, "teacher")
    references = _of_role(rows, "reference")
    _check_distinct(students, folders)
    is_healthy = students["non_finite_step"].isna()
    healthy = students[is_healthy]
    # Each sweep has measured the choices of its validation on test. The validation of all decides.
    measured_on_test = of_split(healthy, "test")["setting"]
    chosen = saving.best_of_methods(healthy[healthy["setting"].isin(measured_on_test)])
    chosen_settings = list(chosen.values())

    teacher_flops = float(teachers["flops_per_candidate"].mean())
    costs = saving.costs_of(first)
    rankers = saving.with_costs(pd.concat([healthy, references]), teacher_flops, costs)
    is_compared = rankers["setting"].isin([*chosen_settings, *references["setting"]])
    baselines = saving.baselines(rankers[is_compared])
    rankers = saving.with_savings(rankers, baselines)
    healthy = _of_role(rankers, "student")
    references = _of_role(rankers, "reference")

    varying = setting_names.varying_columns(students)
    by_setting = healthy.drop_duplicates("setting").set_index("setting")
    in_words = {
        method: method_in_words(by_setting.loc[setting].to_dict(), varying)
        for method, setting in chosen.items()
    }
    reports = [report for report in map(read_data_report, folders) if report]
    allowed: list[str] = []
    for report in reports:
        allowed += [f"{fault['name']}: {fault['text']}" for fault in report["allowed"]]
    return Study(
        dataset=dataset,
        config=first,
        passed=first.funnel.passed,
        costs=costs,
        rows=healthy,
        chosen=chosen,
        baselines=baselines,
        tested=of_split(healthy[healthy["setting"].isin(chosen_settings)], "test"),
        teachers=of_split(teachers, "test"),
        num_teachers=_of_role(joined, "teacher")["seed"].nunique(dropna=False),
        references=references,
        diverged=students[~is_healthy].drop_duplicates(["source", "run"]),
        varying=varying,
        in_words=in_words,
        allowed=list(dict.fromkeys(allowed)),
        requests_a_day=requests_a_day(reports[0]) if reports else float("nan"),
        configs=configs,
        environments={str(folder): _environment(folder) for folder in folders},
        kept_requests=[
            KeptRequests(source, request_files.read_requests(test_folder))
            for source, folder in enumerate(folders)
            for test_folder in _test_folders(folder)
            if (test_folder / request_files.REQUESTS_FILE).exists()
        ],
    )


def _of_role(rows: pd.DataFrame, role: str) -> pd.DataFrame:
    return rows[rows["role"] == role]


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
    first = next(iter(flat))
    for other, values in flat.items():
        if differing := manifest.differences(flat[first], values):
            raise UserError(
                f"{first} and {other} are sweeps of one dataset under different configs, so their "
                f"results cannot be joined; report them separately: {differing}"
            )


def _labeled(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the labels of `Study`, in the order of tables.

    Modes and heads are in the order in which they occur, plain mode `none` first.
    """
    # A sweep's teachers and references count for its own students, and once per repeat.
    sweeps = [setting_names.in_each_repeat(sweep) for _, sweep in rows.groupby("source")]
    rows = pd.concat(sweeps, ignore_index=True)
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

    order = ["mode", "variant", *setting_names.SETTING_COLUMNS[1:], *setting_names.REPEAT]
    rows = rows.sort_values(
        order, key=_sort_key, kind="stable", na_position="first", ignore_index=True
    )
    return setting_names.with_names(rows, setting_names.varying_columns(_of_role(rows, "student")))


def _sort_key(column: pd.Series) -> Any:
    """Return what to sort by: for modes and heads the order of their first occurrence."""
    if column.name in ("mode", "serve"):
        codes, _ = pd.factorize(column)
        return codes
    return column


def _check_distinct(students: pd.DataFrame, folders: list[Path]) -> None:
    duplicates = students[students.duplicated(["split", "setting", "repeat"], keep=False)]
    if len(duplicates):
        runs = ", ".join(duplicates["run"].astype(str).unique())
        sources = sorted(duplicates["source"].unique())
        sweeps = ", ".join(str(folders[source]) for source in sources)
        raise UserError(f"{sweeps}: these runs occur more than once: {runs}; leave one out")
