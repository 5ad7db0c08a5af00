"""The tables of a run: their columns, their files, and those of several runs joined.

    results.csv               a row per trained model, split and serving choice
    curves.csv                a row per model, serving choice and k
    calibration.csv           a row per model, serving choice, task and bin of probability
    requests.parquet          a row per model, serving choice and test request
    request_curves.parquet    a row per model, serving choice, test request and k

Every measure is a function of sums over requests. The last two files hold the terms of these sums,
by name, with `/<task>` if there is one per task. So each measure can be computed on other draws of
the requests, as intervals need.
"""

import io
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int
from ml_collections import ConfigDict

from kd_ranker import manifest
from kd_ranker.config import schema
from kd_ranker.distillation.terms import format_terms, parse_terms, without_weights
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.evaluate import Each
from kd_ranker.evaluation.metrics import METRICS, ReportAt, Sums, curve_columns, result_columns
from kd_ranker.evaluation.saving import FLOPS, Costs
from kd_ranker.training.processes import on_first
from kd_ranker.training.recipes import terms_of
from kd_ranker.training.workdir import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    START_FILE,
    write_atomically,
)

Row = dict[str, object]
Who = tuple[str, str]  # member and serve name
TEACHER = "teacher"  # the teacher's name among the members
FILE, CURVES_FILE, CALIBRATION_FILE = "results.csv", "curves.csv", "calibration.csv"
REQUESTS_FILE, REQUEST_CURVES_FILE = "requests.parquet", "request_curves.parquet"

_ALWAYS = tuple(dict.fromkeys(key.column for key in schema.setting_keys() if key.column))
# The other keys that a sweep may vary; each names its column.
OTHER_KEYS = tuple(key.name for key in schema.sweepable() if not key.column)
# The columns that identify a repeat of a setting.
REPEAT = tuple(key.column for key in schema.repeat_keys())
# The columns that, with `OTHER_KEYS`, identify a row of results.csv.
KEYS = ("dataset", "split", "role", *_ALWAYS, "serve", *REPEAT, "step")
_LAST = ("non_finite_step", "member", "needs_scores")
# The columns that identify a setting, in the order of tables. Tables always show the first `NAMED`,
# and the table of all measures those of `SETTING`.
SETTING, NAMED = tuple(dict.fromkeys(("mode", "serve", "distill_weight", *_ALWAYS))), 3
SETTING_COLUMNS = (*SETTING, *OTHER_KEYS)
_TABLE_RATE = "optimizer.table_learning_rate"
# The columns that identify a row of a table. Every run has the teacher and the references.
_UNIQUE = ("split", "member", "serve", *REPEAT, "k", "task", "bin")
CALIBRATION_COLUMNS = ("member", "serve", "task", "bin", "weight", "predicted", "observed")


def columns(tasks: Sequence[str], report_at: ReportAt) -> list[str]:
    """Return the columns of `results.csv` in their order."""
    of_metrics = (result_columns(metric, tasks, report_at) for metric in METRICS.values())
    return [*KEYS, *OTHER_KEYS, *itertools.chain(*of_metrics), *_LAST]


def made_of(config: ConfigDict) -> Row:
    """Return the part of a student's row with the keys that a sweep may vary."""
    terms = terms_of(config)
    row: Row = {
        key.title: schema.value_of(config, key.name) if terms or not key.of_distillation else None
        for key in (*schema.setting_keys(), *schema.repeat_keys())
    }
    if not terms:
        return row | {"distill_weight": 0.0}
    return row | {"distill_loss": format_terms(terms)}


def curves_columns(tasks: Sequence[str]) -> list[str]:
    """Return the columns of `curves.csv` in their order."""
    of_metrics = (curve_columns(metric, tasks) for metric in METRICS.values())
    return ["member", "serve", "k", *itertools.chain(*of_metrics)]


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Students and references with labels, see `labelled`, in a fixed order.

    Of equal settings the first in this order is chosen, whatever the order of the file.
    """
    order = [*SETTING_COLUMNS, *REPEAT]
    rows = in_each_repeat(rows).sort_values(order, kind="stable", na_position="first")
    return labelled(rows, SETTING_COLUMNS[NAMED:])


def labelled(rows: pd.DataFrame, named: Sequence[str]) -> pd.DataFrame:
    """Return rows with the labels `setting`, `way` and `repeat`.

    A setting is named by its mode, serving choice, weight and the columns `named`, and a way by
    those that are not tuned, without the value of a switch that is on. Other rankers are named by
    their members.
    """
    students = rows[rows["role"] == "student"]
    keys = {key.title: key for key in schema.setting_keys()}
    has_choice = students.groupby("mode")["serve"].transform("nunique") > 1
    served = zip(students["mode"], students["serve"], has_choice, strict=True)
    ways = [list(students["mode"])]
    settings = [
        [f"{mode} ({serve})" if has_several else mode for mode, serve, has_several in served],
        _named(students["distill_weight"].where(students["distill_loss"].notna())),
    ]
    for column in named:
        key, values = keys[column], students[column]
        settings.append(_named(values))
        if column == "distill_loss":
            values = values.map(_without_weights, na_action="ignore")
        if key.switch:
            values = values.gt(0).map({True: ""})
        if key.switch or not key.tuned:
            ways.append(_named(values))
    seeds = rows[list(REPEAT)].astype("Int64").fillna(-1).astype(str)
    rows = rows.assign(repeat=["/".join(of) for of in seeds.to_numpy()])
    for label, parts in (("setting", settings), ("way", ways)):
        texts = [", ".join(filter(None, of)) for of in zip(*parts, strict=True)]
        rows[label] = pd.Series(texts, students.index).reindex(rows.index).fillna(rows["member"])
    return rows


def _without_weights(terms: str) -> str:
    """The weights of terms are tuned."""
    return format_terms(without_weights(parse_terms(terms)))


def varying_columns(students: pd.DataFrame) -> list[str]:
    """Return the columns of a setting to name, without `NAMED` and a table rate that follows."""
    varying = [of for of in SETTING_COLUMNS[NAMED:] if students[of].nunique() > 1]
    # A sweep of the learning rate scales the rate of tables with it.
    if _TABLE_RATE in varying:
        ratio = students[_TABLE_RATE] / students["learning_rate"]
        # The file has seven digits.
        if ratio.max() - ratio.min() <= 1e-5 * ratio.max():
            varying.remove(_TABLE_RATE)
    return varying


def _named(column: pd.Series) -> list[str]:
    """Return the values of a column, each with its name; "" for unknown and `PLAIN` ones."""
    title, plain = key_title(str(column.name)), saving.PLAIN.get(str(column.name))
    return [
        "" if pd.isna(of) or of == plain else f"{title} {value_text(of)}".rstrip() for of in column
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
    # All digits of the file: settings are known by these texts.
    return "" if pd.isna(value) else f"{value:.15g}"  # type: ignore[call-overload]


def in_each_repeat(rows: pd.DataFrame) -> pd.DataFrame:
    """Repeat the rows of teachers and references, which have no seeds of students, in each repeat.

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

    The rows of validation in `frame`, a `results.csv`, decide.
    """
    rows = _on_validation(frame)
    best = {*saving.best_of_ways(rows).values()}
    members = rows[rows["setting"].isin(best)].groupby("member", sort=False)
    return {str(name): list(of["serve"]) for name, of in members}


def _on_validation(frame: pd.DataFrame) -> pd.DataFrame:
    students = frame[(frame["role"] == "student") & frame["non_finite_step"].isna()]
    return saving.of_split(with_labels(students), "validation")


def best_member(frame: pd.DataFrame, member: str = "") -> tuple[str, str] | None:
    """Return the best repeat of the best setting on validation, and its serving choice.

    `member` names another one to use. None if no such member is measured.
    """
    rows = _on_validation(frame)
    rows = rows[rows["member"] == member] if member else rows
    setting = saving.best(rows, list(rows["setting"].unique()))
    rows = rows[rows["setting"] == setting].sort_values(saving.CRITERION, kind="stable")
    return (str(rows["member"].iloc[0]), str(rows["serve"].iloc[0])) if len(rows) else None


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
    table = [{name: _cell(row.get(name)) for name in names} for row in rows]
    # As objects: a column of numbers would write its integers as 0.0 where one is not known.
    return _text(pd.DataFrame(table, columns=list(names), dtype=object))


def _cell(value: object) -> object:
    """A value as a table holds it: nothing for NaN, and 64x32 for (64, 32)."""
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.7g}"
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else value


def _text(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, lineterminator="\n")


def read_joined(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the `results.csv` of several runs as one table, see `join`."""
    return read_csv(io.StringIO(_text(_joined(FILE, folders))))


def join(validation: Sequence[Path], test: Sequence[Path], costs: Costs = FLOPS) -> dict[str, str]:
    """Merge the tables of several runs: file name -> text.

    The runs have measured all members on validation, and in other folders those that validation
    chose on the test split. Every run has measured its teacher, which is kept once per split. With
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
    made_of: manifest.MadeOf,
    parts: Collection[str] = (),
) -> None:
    """Write tables by their file names, then the manifest of the folder.

    It lists the files of a run as well, if the folder has them.

    The tables are measured on rankers with the fingerprints `made_of`, or joined from `parts`, such
    as the manifests of cohorts.
    """
    on_first(lambda: manifest.remove(folder))
    for file, content in tables.items():
        write_atomically(folder / file, content)
    of_run = [name for name in (CONFIG_FILE, START_FILE) if (folder / name).exists()]
    about = [name for name in (ENVIRONMENT_FILE,) if (folder / name).exists()]
    on_first(lambda: manifest.write(folder, made_of, [*tables, *parts, *of_run], about=about))


class Kept(NamedTuple):
    """The terms of the sums over test requests, by ranker."""

    ks: Int[np.ndarray, "K"]  # of the curves, increasing; the last is all that was retrieved
    each: Mapping[Who, Each]


def spaced_ks(retrieved: int, named: Sequence[int], spaced: int = 76) -> list[int]:
    """The named values of k and `spaced` others or fewer: small ones, then steps of a few percent.

    >>> spaced_ks(2000, [200])[-3:]
    [1633, 1807, 2000]
    """
    every = np.geomspace(1, retrieved, spaced).round().astype(int).tolist()
    return sorted({*every, *(min(k, retrieved) for k in named)})


def request_files(kept: Kept, tasks: Sequence[str]) -> dict[str, bytes]:
    """The contents of the two files of test requests by their names, for one or more rankers."""
    each = kept.each.items()
    return {
        REQUESTS_FILE: _parquet([_table(who, of.sums, tasks) for who, of in each]),
        REQUEST_CURVES_FILE: _parquet([_table(who, of.curves, tasks, kept.ks) for who, of in each]),
    }


def _parquet(tables: Sequence[pa.Table]) -> bytes:
    whole, sink = pa.concat_tables(tables), io.BytesIO()
    pq.write_table(whole, sink, compression="zstd")
    return sink.getvalue()


def _table(
    who: Who, sums: Sums, tasks: Sequence[str], ks: Int[np.ndarray, "K"] | None = None
) -> pa.Table:
    """A ranker's rows: one a request, or with `ks` one a request and k."""
    axes = 1 if ks is None else 2
    shape = next(iter(sums.values())).shape[:axes]
    places = np.indices(shape, np.int32).reshape(axes, -1)
    member, serve = (
        pa.DictionaryArray.from_arrays(np.zeros(places.shape[1], np.int32), [name]) for name in who
    )
    columns = {"member": member, "serve": serve, "request": places[0]}
    if ks is not None:
        columns["k"] = np.asarray(ks, np.int32)[places[1]]
    for name, array in sums.items():
        flat = np.asarray(array, np.float32).reshape(places.shape[1], -1)
        names = [name] if array.ndim == axes else [f"{name}/{task}" for task in tasks]
        columns |= zip(names, flat.T, strict=True)
    return pa.table(columns)


def read_requests(folder: Path) -> Kept:
    """The files of `request_files` in a folder, as they were written."""
    single, curves = (_rankers(folder / file) for file in (REQUESTS_FILE, REQUEST_CURVES_FILE))
    ks = next(iter(curves.values()))["k"].unique()
    each = {
        who: Each(_arrays(rows, ()), _arrays(curves[who], (len(ks),)))
        for who, rows in single.items()
    }
    return Kept(np.asarray(ks), each)


def _rankers(path: Path) -> dict[Who, pd.DataFrame]:
    table = pq.read_table(path, read_dictionary=["member", "serve"]).to_pandas()
    of_rankers = table.groupby(["member", "serve"], sort=False, observed=True)
    return {(str(member), str(serve)): rows for (member, serve), rows in of_rankers}


def _arrays(rows: pd.DataFrame, over: tuple[int, ...]) -> Sums:
    """Sums by name, the columns of its tasks side by side: [R, *over] or [R, *over, T]."""
    known = rows.drop(columns=["member", "serve", "request", "k"], errors="ignore")
    names = [str(column).partition("/")[0] for column in known]
    sums: Sums = {}
    for name in dict.fromkeys(names):
        of = known.loc[:, [other == name for other in names]].to_numpy()
        sums[name] = of.reshape(-1, *over, *([] if name in known else of.shape[1:]))
    return sums
