"""The names of settings, methods and repeats in rows of results, and the choices among them."""

from collections.abc import Sequence

import pandas as pd
from ml_collections import ConfigDict

from kd_ranker.config import schema
from kd_ranker.distillation.terms import format_terms, parse_terms, without_weights
from kd_ranker.evaluation import saving
from kd_ranker.evaluation.metrics.target import CRITERION
from kd_ranker.training.specs import terms_of

# The columns of keys that have one of their own name in `results.csv`.
STUDENT_COLUMNS = tuple(dict.fromkeys(key.column for key in schema.setting_keys() if key.column))
# The other keys that a sweep may vary; each names its column.
OTHER_KEYS = tuple(key.name for key in schema.sweepable() if not key.column)
# The columns that identify a repeat of a setting.
REPEAT = tuple(key.column for key in schema.repeat_keys())
# The columns that identify a setting, in the order of tables. Tables always show the first `NAMED`,
# and the table of all measures those of `SETTING`.
SETTING = tuple(dict.fromkeys(("mode", "serve", "distill_weight", *STUDENT_COLUMNS)))
NAMED = 3
SETTING_COLUMNS = (*SETTING, *OTHER_KEYS)
_TABLE_RATE = "optimizer.table_learning_rate"


def setting_of(config: ConfigDict) -> dict[str, object]:
    """Return the part of a student's row with the keys that a sweep may vary."""
    terms = terms_of(config)
    row: dict[str, object] = {
        key.title: schema.value_of(config, key.name) if terms or not key.of_distillation else None
        for key in (*schema.setting_keys(), *schema.repeat_keys())
    }
    if not terms:
        return row | {"distill_weight": 0.0}
    return row | {"distill_loss": format_terms(terms)}


def with_labels(rows: pd.DataFrame) -> pd.DataFrame:
    """Students and references with labels, see `with_names`, in a fixed order.

    Of equal settings the first in this order is chosen, whatever the order of the file.
    """
    order = [*SETTING_COLUMNS, *REPEAT]
    rows = in_each_repeat(rows).sort_values(order, kind="stable", na_position="first")
    return with_names(rows, SETTING_COLUMNS[NAMED:])


def with_names(rows: pd.DataFrame, named: Sequence[str]) -> pd.DataFrame:
    """Return rows with the labels `setting`, `method` and `repeat`.

    A setting is named by its mode, head, weight and the columns `named`, and a method by
    those that are not tuned, without the value of a switch that is on. Other rankers are named by
    their runs.
    """
    students = rows[rows["role"] == "student"]
    # Lists of parts of names: each part is a list with a text per student, "" to leave it out.
    keys = {key.title: key for key in schema.setting_keys()}
    has_choice = students.groupby("mode")["serve"].transform("nunique") > 1
    served = zip(students["mode"], students["serve"], has_choice, strict=True)
    methods = [list(students["mode"])]
    settings = [
        [f"{mode} ({serve})" if has_several else mode for mode, serve, has_several in served],
        _named(students["distill_weight"].where(students["distill_loss"].notna())),
    ]
    for column in named:
        key = keys[column]
        values = students[column]
        settings.append(_named(values))
        if column == "distill_loss":
            values = values.map(_without_weights, na_action="ignore")
        if key.switch:
            # Only whether it is on belongs to the method: the column's name alone, or nothing.
            values = values.gt(0).map({True: ""})
        if key.switch or not key.tuned:
            methods.append(_named(values))
    seeds = rows[list(REPEAT)].astype("Int64").fillna(-1).astype(str)
    rows = rows.assign(repeat=["/".join(seeds_of_row) for seeds_of_row in seeds.to_numpy()])
    for label, parts in (("setting", settings), ("method", methods)):
        names = [_join_present(parts_of_row) for parts_of_row in zip(*parts, strict=True)]
        texts = pd.Series(names, students.index)
        rows[label] = texts.reindex(rows.index).fillna(rows["run"])
    return rows


def _join_present(parts: Sequence[str]) -> str:
    return ", ".join(part for part in parts if part)


def _without_weights(terms: str) -> str:
    """The weights of terms are tuned."""
    return format_terms(without_weights(parse_terms(terms)))


def varying_columns(students: pd.DataFrame) -> list[str]:
    """Return the columns of a setting to name, without `NAMED` and a table rate that follows."""
    varying = [column for column in SETTING_COLUMNS[NAMED:] if students[column].nunique() > 1]
    # A sweep of the learning rate scales the rate of tables with it.
    if _TABLE_RATE in varying:
        ratio = students[_TABLE_RATE] / students["learning_rate"]
        # The file has seven digits.
        if ratio.max() - ratio.min() <= 1e-5 * ratio.max():
            varying.remove(_TABLE_RATE)
    return varying


def _named(column: pd.Series) -> list[str]:
    """Return the values of a column, each with its name; "" for unknown and `PLAIN` ones."""
    title = key_title(str(column.name))
    plain = saving.PLAIN.get(str(column.name))
    names = []
    for value in column:
        if pd.isna(value) or value == plain:
            names.append("")
        else:
            names.append(f"{title} {value_text(value)}".rstrip())
    return names


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
    students = rows[rows["role"] == "student"]
    others = rows[rows["role"] != "student"]
    repeats = students[[*REPEAT]].drop_duplicates()
    if others["seed"].nunique() > 1:
        repeated = others.drop(columns="data_seed").merge(repeats, on="seed")
    else:
        repeated = others.drop(columns=[*REPEAT]).merge(repeats, how="cross")
    # In this order, a student is preferred to an equal reference.
    return pd.concat([students, repeated.reindex(columns=rows.columns)], ignore_index=True)


def chosen(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The heads of each run of a chosen setting, see `saving.best_of_methods`.

    The rows of validation in `frame`, a `results.csv`, decide.
    """
    rows = _on_validation(frame)
    best = {*saving.best_of_methods(rows).values()}
    runs = rows[rows["setting"].isin(best)].groupby("run", sort=False)
    return {str(name): list(rows_of_run["serve"]) for name, rows_of_run in runs}


def _on_validation(frame: pd.DataFrame) -> pd.DataFrame:
    students = frame[(frame["role"] == "student") & frame["non_finite_step"].isna()]
    return saving.of_split(with_labels(students), "validation")


def best_run(frame: pd.DataFrame, run: str = "") -> tuple[str, str] | None:
    """Return the best repeat of the best setting on validation, and its head.

    `run` names another one to use. None if no such run is measured.
    """
    rows = _on_validation(frame)
    if run:
        rows = rows[rows["run"] == run]
    setting = saving.best(rows, list(rows["setting"].unique()))
    rows = rows[rows["setting"] == setting].sort_values(CRITERION, kind="stable")
    if not len(rows):
        return None
    return str(rows["run"].iloc[0]), str(rows["serve"].iloc[0])
