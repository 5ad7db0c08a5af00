"""`results.csv`: one row a trained model and serving choice."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.cost import FLOPS, Costs
from kd_ranker.evaluation.metrics import METRICS, ReportAt, curve_columns, result_columns
from kd_ranker.training.recipes import terms_of
from kd_ranker.training.state import Term

Row = dict[str, object]
TEACHER = "teacher"  # the teacher's name among the members
FILE, CURVES_FILE, CALIBRATION_FILE = "results.csv", "curves.csv", "calibration.csv"

_ALWAYS = tuple(dict.fromkeys(key.column for key in schema.setting_keys() if key.column))
# The other keys that a sweep may vary; each names its column.
OTHER_KEYS = tuple(key.name for key in schema.sweepable() if not key.column)
# The columns that identify a repeat of a setting.
REPEAT = tuple(key.column for key in schema.repeat_keys())
# The columns that, with `OTHER_KEYS`, identify a row of results.csv.
KEYS = ("dataset", "split", "role", *_ALWAYS, "serve", *REPEAT, "step")
_LAST = ("non_finite_step", "member")
# The columns that every table has, for any tasks and points of its curves.
ALWAYS = (
    *(*KEYS, *OTHER_KEYS, *_LAST, saving.CRITERION, saving.SCORED),
    *("candidates", "flops_per_candidate"),
)
# The columns that identify a setting, in the order of tables; see `setting_columns`.
SETTING = tuple(dict.fromkeys(("mode", "serve", "distill_weight", *_ALWAYS)))
# The columns that identify a row of a table. Every run has the teacher and the references.
_UNIQUE = ("split", "member", "serve", *REPEAT, "k", "task", "bin")
CALIBRATION_COLUMNS = ("member", "serve", "task", "bin", "weight", "predicted", "observed")


def columns(tasks: Sequence[str], report_at: ReportAt) -> list[str]:
    """Return the columns of `results.csv` in their order.

    Args:
      tasks: names of the tasks.
      report_at: the points of metrics that have a curve.
    """
    of_metrics = (result_columns(metric, tasks, report_at) for metric in METRICS.values())
    return [*KEYS, *OTHER_KEYS, *itertools.chain(*of_metrics), *_LAST]


def setting_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns of a table of results that make a setting."""
    return [*SETTING, *(column for column in OTHER_KEYS if column in table)]


def ways(table: pd.DataFrame) -> pd.DataFrame:
    """The way of each student: the columns of its setting that are not tuned.

    A switch has "" where it is on, and None where it is off.
    """
    keys = schema.setting_keys()
    tuned = {key.title for key in keys if key.tuned and not key.switch}
    of_ways = table[[name for name in setting_columns(table) if name not in {*tuned, "serve"}]]
    switches = of_ways.columns.intersection([key.title for key in keys if key.switch])
    return of_ways.assign(**{name: (of_ways[name] > 0).map({True: ""}) for name in switches})


def made_of(config: ConfigDict) -> Row:
    """Return the part of a student's row with the keys that a sweep may vary."""
    terms = terms_of(config)
    row: Row = {}
    for key in (*schema.setting_keys(), *schema.repeat_keys()):
        value = schema.value_of(config, key.name)
        row[key.title] = value if terms or not key.of_distillation else None
    if not terms:
        return row | {"distill_weight": 0.0}
    return row | {"distill_loss": "+".join(map(name_of_term, terms))}


def name_of_term(term: Term) -> str:
    """A term in tables.

    >>> name_of_term(Term("softmax", "logged")), name_of_term(Term("softmax", "stage"))
    ('softmax', 'softmax:stage')
    """
    return term.loss if term.signal == "logged" else f"{term.loss}:{term.signal}"


def curves_columns(tasks: Sequence[str]) -> list[str]:
    """Return the columns of `curves.csv` in their order."""
    of_metrics = (curve_columns(metric, tasks) for metric in METRICS.values())
    return ["member", "serve", "k", *itertools.chain(*of_metrics)]


def with_cost(row: Row, flops_per_candidate: float, teacher_flops: float) -> Row:
    """Add the cost of a row's model, and its ratio to the teacher's cost."""
    return row | {
        "flops_per_candidate": flops_per_candidate,
        "cost_ratio": flops_per_candidate / teacher_flops,
    }


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Students and references with the labels `setting`, `way` and `repeat`, in a fixed order.

    Of equal settings the first in this order is chosen, whatever the order of the file. A reference
    has no seeds: it is repeated in each repeat of the students, see `in_each_repeat`.
    """
    rows = in_each_repeat(rows)
    setting = setting_columns(rows)
    rows = rows.sort_values([*setting, *REPEAT], kind="stable", na_position="first")
    telling = {"setting": rows[setting], "way": ways(rows), "repeat": rows[list(REPEAT)]}
    labels = {
        label: table.groupby(list(table), dropna=False).ngroup().astype(str)
        for label, table in telling.items()
    }
    rows = rows.assign(**labels)
    reference = rows["role"] == "reference"
    for label in ("setting", "way"):
        rows[label] = rows[label].where(~reference, rows["member"])
    return rows


def in_each_repeat(rows: pd.DataFrame) -> pd.DataFrame:
    """Repeat the rows of teachers and references once per repeat of the students.

    If there are several teachers, a teacher and the references measured under it count for the
    repeats with its seed.
    """
    students, others = rows[rows["role"] == "student"], rows[rows["role"] != "student"]
    repeats = students[[*REPEAT]].drop_duplicates()
    if others["seed"].nunique() > 1:
        each = others.drop(columns="data_seed").merge(repeats, on="seed")
    else:
        each = others.drop(columns=[*REPEAT]).merge(repeats, how="cross")
    # In this order, a student is preferred to an equal reference.
    return pd.concat([students, each.reindex(columns=rows.columns)], ignore_index=True)


def chosen(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The serving choices of each member of a chosen setting, see `saving.best_of_ways`.

    Args:
      frame: `results.csv` with the rows of validation.
    """
    students = _finite_students(frame)
    best = set(saving.best_of_ways(students).values())
    rows = saving.of_split(students[students["setting"].isin(best)], "validation")
    return {str(name): list(of["serve"]) for name, of in rows.groupby("member", sort=False)}


def _finite_students(frame: pd.DataFrame) -> pd.DataFrame:
    return with_labels(frame[(frame["role"] == "student") & frame["non_finite_step"].isna()])


def best_member(frame: pd.DataFrame, member: str = "") -> tuple[str, str] | None:
    """Return the member to use, and its serving choice, both chosen on validation.

    The member is the best repeat of the best setting, see `saving.best`.

    Args:
      frame: `results.csv` with the rows of validation.
      member: the name of the member to use; "" takes the best.

    Returns:
      None if no such member is measured.
    """
    students = _finite_students(frame)
    rows = saving.of_split(students, "validation")
    rows = rows[rows["member"] == member] if member else rows
    setting = saving.best(rows, list(rows["setting"].unique()))
    rows = rows[rows["setting"] == setting].sort_values(saving.CRITERION, kind="stable")
    return (str(rows["member"].iloc[0]), str(rows["serve"].iloc[0])) if len(rows) else None


def fill_savings(frame: pd.DataFrame, costs: Costs = FLOPS) -> pd.DataFrame:
    """Fill in the columns `saving.SAVINGS` of students; NaN where the loss stopped being finite.

    Args:
      frame: `results.csv` of one dataset, with the teacher; see `read_csv`.
      costs: the costs that replace FLOPs.
    """
    teacher_flops = frame.loc[frame["role"] == "teacher", "flops_per_candidate"].iloc[0]
    compared = (frame["role"] != "teacher") & frame["non_finite_step"].isna()
    ranked = with_labels(frame.assign(place=frame.index)[compared])
    saved = saving.with_savings(ranked, saving.baselines(ranked), teacher_flops, costs)
    saved = saved[saved["role"] == "student"].set_index("place")
    return frame.assign(**{column: saved[column] for column in saving.SAVINGS})


def to_csv(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """The text of `results.csv`: numbers to seven digits, nothing where a number is not known."""
    table = [{name: _cell(row.get(name)) for name in names} for row in rows]
    # As objects: a column of numbers would write its integers as 0.0 where one is not known.
    return _text(pd.DataFrame(table, columns=list(names), dtype=object))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.7g}"
    return cell_of(value)


def cell_of(value: object) -> object:
    """A key's value as a table holds it: (64, 32) is 64x32."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def _text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")


def read_joined(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the `results.csv` of several runs as one table, see `join`."""
    return read_csv(io.StringIO(_text(_joined(FILE, folders))))


def join(
    validation: Sequence[Path],
    test: Sequence[Path],
    costs: Costs = FLOPS,
) -> dict[str, str]:
    """Merge the tables of several runs: file name -> text.

    Every run has measured its teacher, which is kept once per split. With several teachers, the
    curves and the calibration are those of the first. Savings are filled in. Everything else is
    copied unchanged.

    Args:
      validation: folders of the runs, with all members measured on validation.
      test: folders of the members that validation chose, measured on the test split.
      costs: the costs that replace FLOPs.
    """
    joined = _joined(FILE, [*validation, *test])
    filled = fill_savings(read_csv(io.StringIO(_text(joined))), costs)
    for column in saving.SAVINGS:
        joined[column] = filled[column].map(_cell, na_action="ignore")
    curves = {file: _text(_joined(file, test)) for file in (CURVES_FILE, CALIBRATION_FILE)}
    return {**curves, FILE: _text(joined)}


def _joined(file: str, folders: Sequence[Path]) -> pd.DataFrame:
    # As text: a number that is read and written again need not be the same text.
    frames = [pd.read_csv(folder / file, dtype=str, keep_default_na=False) for folder in folders]
    joined = pd.concat(frames, ignore_index=True)
    key = [column for column in _UNIQUE if column in joined]
    return joined.drop_duplicates(key, ignore_index=True)


def read_csv(path: Path | io.StringIO) -> pd.DataFrame:
    """A `results.csv` as a table; a number that is not known is NaN."""
    # "none" is a mode here, and pandas would read it as missing.
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    # In one piece: a reader that adds columns to a hundred single ones is warned of its speed.
    return frame.copy()
