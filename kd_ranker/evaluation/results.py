"""`results.csv`: one row a trained model and serving choice."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from kd_ranker.evaluation import saving
from kd_ranker.evaluation.metrics import METRICS, columns_of, curve_columns

Row = dict[str, object]
TEACHER = "teacher"  # the teacher's name among the members
FILE, CURVES_FILE, CALIBRATION_FILE = "results.csv", "curves.csv", "calibration.csv"

# What tells one row of results.csv from another.
KEYS = (
    *("dataset", "role", "mode", "distill_loss", "distill_weight", "temperature"),
    *("learning_rate", "serve", "seed", "data_seed", "step"),
)
# What makes a repeat of a setting, and what makes a setting.
REPEAT = ("seed", "data_seed")
_SETTING = tuple(key for key in KEYS if key not in ("dataset", "role", "step", *REPEAT))
CALIBRATION_COLUMNS = ("member", "serve", "task", "bin", "weight", "predicted", "observed")


def columns(tasks: Sequence[str], report_at: Sequence[int]) -> list[str]:
    """The columns of `results.csv` in their order."""
    of_metrics = (columns_of(metric, tasks, report_at) for metric in METRICS.values())
    return [*KEYS, *itertools.chain(*of_metrics), "non_finite_step", "member"]


def curves_columns(tasks: Sequence[str]) -> list[str]:
    """The columns of `curves.csv` in their order."""
    of_metrics = (curve_columns(metric, tasks) for metric in METRICS.values())
    return ["member", "serve", "k", *itertools.chain(*of_metrics)]


def with_cost(row: Row, flops_per_candidate: float, teacher_flops: float) -> Row:
    """The row with the cost of its model beside the teacher's."""
    return row | {
        "flops_per_candidate": flops_per_candidate,
        "cost_ratio": flops_per_candidate / teacher_flops,
    }


def with_savings(frame: pd.DataFrame, retrieved: int) -> pd.DataFrame:
    """Fills `funnel_cost_saving` in, see `saving.with_savings`.

    Args:
      frame: `results.csv` of one dataset, with the teacher; see `read_csv`.
      retrieved: `config.funnel.retrieved`.
    """
    (teacher_flops,) = frame.loc[frame["role"] == "teacher", "flops_per_candidate"]
    students = frame[frame["role"] == "student"]
    # Of equal baselines the first in this order, whatever the order of the file.
    students = students.sort_values([*_SETTING, *REPEAT], kind="stable", na_position="first")
    labels = {
        label: students.groupby(list(keys), dropna=False).ngroup().astype(str)
        for label, keys in (("setting", _SETTING), ("repeat", REPEAT))
    }
    saved = saving.with_savings(students.assign(**labels), teacher_flops, retrieved)
    return frame.assign(funnel_cost_saving=saved["funnel_cost_saving"])


def to_csv(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """The text of `results.csv`: numbers to seven digits, nothing where a number is not known."""
    table = [{name: _cell(row.get(name)) for name in names} for row in rows]
    # As objects: a column of numbers would write its integers as 0.0 where one is not known.
    return _text(pd.DataFrame(table, columns=list(names), dtype=object))


def _cell(value: object) -> object:
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.7g}"
    return value


def _text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")


def join(folders: Sequence[Path], retrieved: int) -> dict[str, str]:
    """The tables of several runs under one teacher as one: file name -> text.

    The teacher, which every run has measured, is kept once. `funnel_cost_saving` is filled in;
    everything else is as it was written.

    Args:
      folders: of the runs.
      retrieved: `config.funnel.retrieved`.
    """
    tables = {}
    for file in (CURVES_FILE, CALIBRATION_FILE, FILE):
        # As text: a number that is read and written again need not be the same text.
        frames = [
            pd.read_csv(folder / file, dtype=str, keep_default_na=False) for folder in folders
        ]
        tables[file] = pd.concat(
            [frames[0], *(frame[frame["member"] != TEACHER] for frame in frames[1:])],
            ignore_index=True,
        )
    joined = tables[FILE]
    savings = with_savings(read_csv(io.StringIO(_text(joined))), retrieved)["funnel_cost_saving"]
    tables[FILE] = joined.assign(funnel_cost_saving=savings.map(_cell, na_action="ignore"))
    return {file: _text(table) for file, table in tables.items()}


def read_csv(path: Path | io.StringIO) -> pd.DataFrame:
    """A `results.csv` as a table; a number that is not known is NaN."""
    # "none" is a mode here, and pandas would read it as missing.
    return pd.read_csv(path, keep_default_na=False, na_values=[""])
