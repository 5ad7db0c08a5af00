"""The tables of a run: their columns, their files, and those of several runs joined.

results.csv               a row per trained model, split and head
curves.csv                a row per model, head and k
calibration.csv           a row per model, head, task and bin of probability
"""

import io
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from kd_ranker import manifest
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.metrics.metric import ReportAt
from kd_ranker.evaluation.metrics.registry import METRICS
from kd_ranker.evaluation.saving import FLOPS, Costs
from kd_ranker.evaluation.setting_names import OTHER_KEYS, REPEAT, STUDENT_COLUMNS, with_labels
from kd_ranker.training.processes import on_first
from kd_ranker.training.workdir import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    START_FILE,
    write_atomically,
)

Row = dict[str, object]
TEACHER = "teacher"  # the teacher's name among the runs
FILE = "results.csv"
CURVES_FILE = "curves.csv"
CALIBRATION_FILE = "calibration.csv"
# The columns that, with `OTHER_KEYS`, identify a row of results.csv.
KEYS = ("dataset", "split", "role", *STUDENT_COLUMNS, "serve", *REPEAT, "step")
_LAST = ("non_finite_step", "run", "needs_scores")
# The columns that identify a row of a table. Each folder has the teacher and the references.
_UNIQUE = ("split", "run", "serve", *REPEAT, "k", "task", "bin")
CALIBRATION_COLUMNS = ("run", "serve", "task", "bin", "weight", "predicted", "observed")


def columns(tasks: Sequence[str], report_at: ReportAt) -> list[str]:
    """Return the columns of `results.csv` in their order."""
    of_metrics = (metric.columns(tasks, report_at) for metric in METRICS.values())
    return [*KEYS, *OTHER_KEYS, *itertools.chain(*of_metrics), *_LAST]


def curves_columns(tasks: Sequence[str]) -> list[str]:
    """Return the columns of `curves.csv` in their order."""
    of_metrics = (metric.curve_columns(tasks) for metric in METRICS.values())
    return ["run", "serve", "k", *itertools.chain(*of_metrics)]


def fill_savings(frame: pd.DataFrame, costs: Costs = FLOPS) -> pd.DataFrame:
    """Fill in the columns `saving.SAVINGS` of students; NaN where the loss stopped being finite.

    `frame` is the `results.csv` of one dataset, with the teacher.
    """
    teacher_flops = frame.loc[frame["role"] == "teacher", "flops_per_candidate"].iloc[0]
    compared = (frame["role"] != "teacher") & frame["non_finite_step"].isna()
    ranked = with_labels(frame.assign(place=frame.index)[compared])
    ranked = saving.with_costs(ranked, teacher_flops, costs)
    saved = saving.with_savings(ranked, saving.baselines(ranked))
    saved = saved[saved["role"] == "student"].set_index("place")
    return frame.assign(**{column: saved[column] for column in saving.SAVINGS})


def to_csv(rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> str:
    """The text of `results.csv`: numbers to seven digits, nothing where a number is not known."""
    cells = {name: [_cell(row.get(name)) for row in rows] for name in names}
    # As objects: a column of numbers would write its integers as 0.0 where one is not known.
    return _text(pd.DataFrame(cells, columns=list(names), dtype=object))


def _cell(value: object) -> object:
    """Return a value as a table holds it: nothing for NaN, and 64x32 for (64, 32)."""
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.7g}"
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value))
    return value


def _text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")


def read_joined(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the `results.csv` of several runs as one table, see `join`."""
    return read_csv(io.StringIO(_text(_joined(FILE, folders))))


def join(validation: Sequence[Path], test: Sequence[Path], costs: Costs = FLOPS) -> dict[str, str]:
    """Merge the tables in several folders: file name -> text.

    The folders in `validation` have all runs, measured on that split; those in `test` have the runs
    that validation chose. Each has the teacher of its runs, which is kept once per split. With
    several teachers, the curves and the calibration are those of the first. Savings are filled in,
    see `fill_savings`. Everything else is copied unchanged.
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
    """A `results.csv` as a table; a number that is not known is NaN, also of a later key."""
    # "none" is a mode here, and pandas would read it as missing.
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    # In one piece: a reader that adds columns to a hundred single ones is warned of its speed.
    return frame.reindex(columns=list(dict.fromkeys([*frame, *OTHER_KEYS]))).copy()


def write_tables(
    folder: Path,
    tables: Mapping[str, str | bytes],
    provenance: manifest.Provenance,
    parts: Collection[str] = (),
) -> None:
    """Write tables by their file names, then the manifest of the folder.

    It lists the files of a run as well, if the folder has them.

    `provenance` is that of the rankers on which the tables are measured. `parts` are the files from
    which they are joined, such as the manifests of cohorts.
    """
    on_first(lambda: manifest.remove(folder))
    for file, content in tables.items():
        write_atomically(folder / file, content)
    run_files = [name for name in (CONFIG_FILE, START_FILE) if (folder / name).exists()]
    about = [name for name in (ENVIRONMENT_FILE,) if (folder / name).exists()]
    files = [*tables, *parts, *run_files]
    on_first(lambda: manifest.write(folder, provenance, files, about=about))
