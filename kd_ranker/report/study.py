"""Read the files of sweeps, join them to one study per dataset, and choose what it describes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config import schema
from kd_ranker.errors import UserError, command
from kd_ranker.evaluation import results
from kd_ranker.evaluation.metrics import METRICS, TARGET, ReportAt, result_columns
from kd_ranker.evaluation.results import REPEAT, Kept, check_whole, read_requests
from kd_ranker.evaluation.saving import (
    PLAIN,
    Costs,
    baselines,
    best,
    best_of,
    best_of_ways,
    by_repeat,
    costs_of,
    needs_scores,
    of_split,
    with_savings,
)
from kd_ranker.report.intervals import Interval, interval
from kd_ranker.sources.logs.data_report import read_data_report
from kd_ranker.sweep import FOLDER, TEST
from kd_ranker.training.workdir import (
    CONFIG_FILE,
    read_config,
    read_environment,
    values_by_key,
)

# How many columns of a setting tables always show: mode, serving choice, weight.
NAMED = 3
_TABLE_RATE = "optimizer.table_learning_rate"


class Study(NamedTuple):
    """The results of one or more sweeps of one dataset.

    The tables of rankers are rows of `results.csv` with `setting` (a label that is unique for
    `results.setting_columns`), `way` (for `results.ways`), `repeat` (for `results.REPEAT`),
    `source` (the number of the sweep) and, under their names, the means over tasks of metrics that
    are `averaged`.

    Of the students, only those of finite loss take part, except in `frozen`.
    """

    dataset: str  # `data.title` of an own log, or `data.name`
    config: ConfigDict  # of the first sweep; the others may differ in members and random seeds
    tasks: list[str]
    passed: int  # k, the number of candidates that the config passes
    costs: Costs
    rows: pd.DataFrame  # of students on both splits
    chosen: dict[str, str]  # by way, the setting that validation chose, of those read on test
    baselines: dict[str, str]  # see `saving.baselines`
    tested: pd.DataFrame  # of the chosen settings, on the test split
    teachers: pd.DataFrame  # on the test split, one per repeat of the students
    num_teachers: int  # which differ in their seeds
    references: pd.DataFrame  # of rankers without a model, on both splits
    margin: float  # a loss of users that counts as none, see `report.margin`
    frozen: pd.DataFrame  # of members with a loss that stopped being finite
    varying: list[str]  # columns of a setting that differ, without mode, serving choice and weight
    allowed: list[str]  # faults of the user's log that `data.allow` accepted, in words
    configs: dict[str, str]  # texts, by the folder of each sweep
    environments: dict[str, dict]  # the same; empty if unknown
    # Of each sweep's number and cohort, what each test request adds to the measures of its rankers.
    kept: list[tuple[int, Kept]]

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
    def file_name(self) -> str:
        """Its name in the names of files, and of places in the page."""
        return re.sub(r"[^\w.-]", "_", self.dataset)

    @property
    def knows_truth(self) -> bool:
        """True if the true value of the shown items was measured."""
        true_value = f"true_value_captured@{self.passed}"
        return true_value in self.tested and bool(self.tested[true_value].notna().any())

    @property
    def users_measure(self) -> str:
        """The column that measures the value for users if `funnel.passed` are passed.

        The true value where it is known; else the value of user labels that a funnel keeps of the
        candidates that the logged funnel passed, which can have labels.
        """
        name = "true_value_captured" if self.knows_truth else "covered_user_value"
        return f"{name}@{self.passed}"

    @property
    def users_at_target(self) -> list[str]:
        """The columns of the same if each funnel passes as many as it needs for `TARGET`.

        Empty without a truth: labels of a log cannot compare funnels that pass different numbers.
        """
        if not self.knows_truth:
            return []
        return result_columns(METRICS["true_value_for"], (), ReportAt((), (TARGET,)))

    @property
    def best_with_scores(self) -> str | None:
        """The setting of the cheapest funnel that learns from the final ranker's scores.

        On validation, at `saving.CRITERION`; without a teacher's cost, the one that passes fewest.
        Settings that keep users are preferred. None if none is measured.
        """
        settings = [*self.tested.loc[self.tested["needs_scores"], "setting"].unique()]
        kept = [setting for setting in settings if self.keeps_users(setting)] or settings
        costs = by_repeat(of_split(self.rows, "validation"), "funnel_cost")
        return best_of(costs[kept]) or best(self.rows, kept)

    def keeps_users(self, setting: str) -> bool:
        """Return True if the interval of `users_change` is above −`margin`, or unknown."""
        change = self.users_change(setting)
        return change is None or change.low > -self.margin

    def users_change(self, setting: str) -> Interval | None:
        """Return the change for users against the best ranker without scores, on validation.

        The paired difference in the measure of `users_at_target`, with a 95% interval over repeats.
        None if the truth is not known, or no ranker without scores is measured.
        """
        measures = self.users_at_target
        if self.baseline is None or not measures:
            return None
        rows = of_split(pd.concat([self.rows, self.references]), "validation")
        table = by_repeat(rows[rows["setting"].isin([setting, self.baseline])], measures[0])
        return interval((table[setting] - table[self.baseline]).to_numpy())


def read_studies(workdirs: Sequence[Path]) -> list[Study]:
    """Read sweeps and join those of the same dataset, in the order of the arguments.

    Raises:
      UserError: a folder is not a sweep's; two sweeps of a dataset have a member in common, or
        differ in more than members and random seeds; or two titles give the same file name.
    """
    by_dataset: dict[str, list[Path]] = {}
    for workdir in workdirs:
        data = _checked_config(workdir).data
        by_dataset.setdefault(data.get("title") or data.name, []).append(workdir)
    studies = [_study(dataset, folders) for dataset, folders in by_dataset.items()]
    names = ["claims", *(study.file_name for study in studies)]
    if duplicates := {name for name in names if names.count(name) > 1}:
        name = min(duplicates)
        raise UserError(f"two tables would both be called {name}; choose another data.title")
    return studies


def _checked_config(workdir: Path) -> ConfigDict:
    if not workdir.is_dir():
        raise UserError(f"there is no folder {workdir}; {_make(workdir)}")
    for name in (results.FILE, CONFIG_FILE):
        if not (workdir / name).is_file():
            raise UserError(f"{workdir} holds no {name}; {_make(workdir)}")
    for folder in dict.fromkeys([workdir, *_tested(workdir)]):
        check_whole(folder)
    return read_config(workdir)


def _tested(workdir: Path) -> list[Path]:
    """Return the folders with the test of a sweep's cohorts, or that of a single run."""
    return sorted(workdir.glob(f"{FOLDER}/*/{TEST}")) or [workdir]


def _make(workdir: Path) -> str:
    return f"make a sweep with: {command('sweep')} --config=FILE.py --workdir={workdir}"


def _study(dataset: str, workdirs: list[Path]) -> Study:
    configs = {str(workdir): read_config(workdir) for workdir in workdirs}
    _check_alike(configs)
    first = next(iter(configs.values()))
    tables = [
        results.read_csv(workdir / results.FILE).assign(source=source)
        for source, workdir in enumerate(workdirs)
    ]
    joined = pd.concat(tables, ignore_index=True)
    # The member of a single run has no name.
    joined["member"] = joined["member"].astype(object).fillna("")
    rows = _labelled(joined, list(first.tasks))
    students, teachers, references = (
        rows[rows["role"] == role] for role in ("student", "teacher", "reference")
    )
    if students.empty:
        names = ", ".join(map(str, workdirs))
        raise UserError(f"{names}: {results.FILE} has no student; {_make(workdirs[0])}")
    _check_distinct(students, workdirs)
    healthy = students[students["non_finite_step"].isna()]
    frozen = students[students["non_finite_step"].notna()]
    # Each sweep has measured the choices of its validation on test. The validation of all decides.
    read = of_split(healthy, "test")["setting"].unique()
    chosen = best_of_ways(healthy[healthy["setting"].isin(read)])
    compared = healthy["setting"].isin(list(chosen.values()))
    against = baselines(pd.concat([healthy[compared], references]))
    teacher_flops, costs = float(teachers["flops_per_candidate"].mean()), costs_of(first)
    ranked = with_savings(pd.concat([healthy, references]), against, teacher_flops, costs)
    healthy, references = (ranked[ranked["role"] == of] for of in ("student", "reference"))
    tested = of_split(healthy, "test")
    reports = filter(None, map(read_data_report, workdirs))
    faults = (of for report in reports for of in report["allowed"])
    return Study(
        dataset=dataset,
        config=first,
        tasks=list(first.tasks),
        passed=int(first.funnel.passed),
        costs=costs,
        rows=healthy,
        chosen=chosen,
        baselines=against,
        tested=tested[tested["setting"].isin(list(chosen.values()))],
        teachers=of_split(teachers, "test").reindex(columns=healthy.columns),
        num_teachers=joined.loc[joined["role"] == "teacher", "seed"].nunique(dropna=False),
        references=references,
        margin=float(first.report.margin),
        frozen=frozen.drop_duplicates(["source", "member"]),
        varying=_varying(students),
        # Those that `data.allow` accepted.
        allowed=list(dict.fromkeys(f"{of['name']}: {of['text']}" for of in faults)),
        configs={
            name: config.to_json(indent=2, sort_keys=True) for name, config in configs.items()
        },
        environments={str(workdir): read_environment(workdir) for workdir in workdirs},
        kept=[
            (source, read_requests(folder))
            for source, workdir in enumerate(workdirs)
            for folder in _tested(workdir)
            if (folder / results.REQUESTS_FILE).exists()
        ],
    )


def _check_alike(configs: dict[str, ConfigDict]) -> None:
    free = [*schema.may_differ(), *schema.without_influence("report")]
    flat = {name: values_by_key(config, free) for name, config in configs.items()}
    (first, here), *others = flat.items()
    for other, there in others:
        if differing := manifest.differences(here, there):
            raise UserError(
                f"{first} and {other} are sweeps of one dataset under different configs, so their "
                f"results cannot be joined; report them separately: {differing}"
            )


def _labelled(rows: pd.DataFrame, tasks: list[str]) -> pd.DataFrame:
    """Return the rows with the labels of `Study`, in the order of tables.

    Modes and serving choices are in the order in which they occur, plain mode `none` first.
    """
    # A sweep's teachers and references count for its own students, and once per repeat.
    rows = pd.concat([results.in_each_repeat(of) for _, of in rows.groupby("source")])
    once = ["split", "role", "member", "serve", *REPEAT]
    rows = rows[(rows["role"] == "student") | ~rows.duplicated(once)].reset_index(drop=True)
    for metric in METRICS.values():
        if metric.averaged:
            columns = result_columns(metric, tasks, ReportAt())
            # A task that the teacher lacks has no number.
            rows[metric.name] = rows.reindex(columns=columns).mean(axis=1)

    def places(column: pd.Series) -> pd.Series:
        named = column.name in ("mode", "serve")
        return pd.Series(pd.factorize(column)[0], column.index) if named else column

    plain = (rows["mode"] != "none") | (rows[list(PLAIN)] == pd.Series(PLAIN)).all(axis=1)
    rows = rows.assign(needs_scores=needs_scores(rows), variant=~plain)
    keys = ["mode", "variant", *results.setting_columns(rows)[1:], *REPEAT]
    rows = rows.sort_values(keys, key=places, kind="stable", na_position="first")
    rows = rows.drop(columns="variant").reset_index(drop=True)
    of_students = rows["role"] == "student"
    students = rows[of_students]
    varying, ways = _varying(students), results.ways(students)
    choices = students.groupby("mode")["serve"].nunique()

    def setting(row: pd.Series) -> str:
        mode = f"{row['mode']} ({row['serve']})" if choices[row["mode"]] > 1 else str(row["mode"])
        weight = [] if pd.isna(row["distill_loss"]) else [f"weight {row['distill_weight']:g}"]
        return ", ".join([mode, *weight, *named_values(row, varying)])

    def way(row: pd.Series) -> str:
        return ", ".join([row["mode"], *named_values(row, [of for of in varying if of in ways])])

    rows["setting"] = rows["way"] = rows["member"].where(~of_students, "")
    rows.loc[of_students, "setting"] = [setting(row) for _, row in students.iterrows()]
    rows.loc[of_students, "way"] = [way(row) for _, row in ways.iterrows()]
    repeats = rows[list(REPEAT)].itertuples(index=False, name=None)
    return rows.assign(repeat=["/".join(f"{seed:g}" for seed in of) for of in repeats])


def _varying(students: pd.DataFrame) -> list[str]:
    """Return the columns of a setting to name, without `NAMED` and a table rate that follows."""
    columns = results.setting_columns(students)
    varying = [column for column in columns[NAMED:] if students[column].nunique() > 1]
    # A sweep of the learning rate scales the rate of tables with it.
    if _TABLE_RATE in varying:
        ratio = students[_TABLE_RATE] / students["learning_rate"]
        # The file has seven digits.
        if ratio.max() - ratio.min() <= 1e-5 * ratio.max():
            varying.remove(_TABLE_RATE)
    return varying


def named_values(row: pd.Series, columns: Sequence[str]) -> list[str]:
    """Return the values of a row, each with its name; without unknown and `PLAIN` ones."""
    return [
        f"{key_title(column)} {value_text(row[column])}".rstrip()
        for column in columns
        if pd.notna(row[column]) and row[column] != PLAIN.get(column)
    ]


def key_title(column: str) -> str:
    """Return the name of a column of a setting for people.

    >>> key_title("distill_loss"), key_title("learning_rate"), key_title("student.width")
    ('loss', 'learning rate', 'width')
    """
    swept = {key.title: key.short for key in schema.setting_keys() if not key.column}
    return swept.get(column, column.removeprefix("distill_")).replace("_", " ")


def value_text(value: object) -> str:
    """Return a value of such a column as text for people; "" if it is missing."""
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:g}"  # type: ignore[call-overload]


def _check_distinct(students: pd.DataFrame, workdirs: list[Path]) -> None:
    duplicates = students[students.duplicated(["split", "setting", "repeat"], keep=False)]
    if len(duplicates):
        names = ", ".join(duplicates["member"].astype(str).unique())
        sources = sorted(duplicates["source"].unique())
        folders = ", ".join(str(workdirs[source]) for source in sources)
        raise UserError(f"{folders}: these members occur more than once: {names}; leave one out")
