"""A table in memory as a log: a DataFrame of pandas or polars, or an Arrow table."""

import hashlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec
from kd_ranker.config.features import feature
from kd_ranker.errors import UserError, check_choice
from kd_ranker.sources.logs.column_facts import Log, arrow_of, identifier, is_table
from kd_ranker.sources.logs.files import is_list, line_of
from kd_ranker.sources.logs.infer import find_sizes
from kd_ranker.sources.logs.layout import OPTIONAL, STAGES, literal
from kd_ranker.sources.logs.query import quoted

Columns = Mapping[str, str | Sequence[str]]
"""Field of a request -> its column, or its columns: one per number or per task."""

# Field -> the key of `data.columns`, or the section with one column per task.
_ROLES = {"request_id": "request", "time": "time", "user_id": "user", "item_id": "item"}
_ROLES |= {name: name for name in OPTIONAL if name not in ("position", "split")}
_TASKS = {"user_label": "labels", "teacher_probability": "teacher"}
# Field -> the owner of its features, and their kinds: of single values, and of lists.
_FEATURES = {
    "user_features": ("user", "dense", "dense"),
    "context": ("context", "dense", "dense"),
    "candidate_features": ("candidate", "dense", "dense"),
    "item_features": ("item", "dense", "dense"),
    "request_category": ("context", "category", "bag"),
    "candidate_category": ("candidate", "category", "bag"),
    "item_category": ("item", "category", "bag"),
    "history_id": ("user", "history", "history"),
}
_NEEDED = ("request_id", "user_id", "item_id", "user_label")
# Additional columns: the number of a request, for its time, and the split of a table.
_NUMBER, _SPLIT = "number of the request", "split of the table"


def path_of(log: Any, directory: str) -> str:
    """Return the path of a log; a table is written to a Parquet file named by its content."""
    if isinstance(log, (str, PathLike)):
        return str(log)
    if not is_table(log):
        raise UserError(f"a {type(log).__name__} is not a table, and not a path")
    buffer = pa.BufferOutputStream()
    try:
        pq.write_table(arrow_of(log), buffer)
    except pa.ArrowException as error:
        raise UserError(f"the table cannot be written to a Parquet file: {error}") from error
    content = buffer.getvalue().to_pybytes()
    path = Path(directory) / "tables" / f"{hashlib.sha256(content).hexdigest()[:12]}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(content)
        unfinished.rename(path)
    return str(path)


def keep(
    tables: Mapping[str, Any], columns: Columns, spec: FeatureSpec | None, data: ConfigDict
) -> tuple[Path, tuple[str, ...], dict[str, Any]]:
    """Write tables with one row per candidate as a log, and set the keys that read it.

    Args:
      tables: split -> its table; "" for one table to split by time.
      columns: the columns of each field. No other column is read.
      spec: has the tasks, and the version of the teacher that counts if `columns` names one. None
        names the tasks after the columns of labels, and all versions count.
      data: the section to change; it has `dir`.

    Returns:
      The Parquet file, the tasks, and the sizes of a funnel of its requests.

    Raises:
      UserError: `columns` has an unknown field or names a column that is missing, or the tables
        cannot be read as one.
    """
    if lacking := [field for field in _NEEDED if field not in columns]:
        raise UserError(f"columns= does not name the column of {lacking[0]}")
    given: Mapping[str, Any] = columns
    names_of = {
        field: [of] if isinstance(of, str) else [*of]
        for field, of in given.items()
        if isinstance(of, Sequence)
    }
    if unnamed := [field for field in columns if not names_of.get(field)]:
        raise UserError(f"columns= names no column for {unnamed[0]}; name one, or leave it out")
    tasks = spec.tasks if spec else tuple(map(identifier, names_of["user_label"]))
    data.teacher_version = spec.teacher_version if spec and "teacher_version" in columns else ""
    data.stages = ConfigDict({stage: stage for stage in STAGES})
    rows = _joined({split: arrow_of(table) for split, table in tables.items()}, names_of)
    for field, names in names_of.items():
        if field in _FEATURES:
            data.features.update({_key(data, field, of): _feature(field, of, rows) for of in names})
        else:
            keys = tasks if field in _TASKS else [_ROLES[field]]
            if len(names) != len(keys):
                raise UserError(f"columns= names {len(names)} columns for {field}, not {len(keys)}")
            data[_TASKS.get(field, "columns")].update(dict(zip(keys, names, strict=True)))
    if "time" not in columns:
        numbers, _ = pd.factorize(rows[data.columns.request].to_pandas())  # which are not dates
        rows = rows.append_column(_NUMBER, pa.array(numbers))
        data.columns.time, data.allow = _NUMBER, ("times",)
    if "" not in tables:
        data.columns.split, data.split = _SPLIT, "column"
    data.path = path_of(rows, data.dir)
    return Path(data.path), tasks, _sizes(rows, data)


def _joined(tables: Mapping[str, pa.Table], names_of: Mapping[str, Sequence[str]]) -> pa.Table:
    """Return the named columns of the rows of all tables, with the splits of the tables."""
    known = {name for rows in tables.values() for name in rows.column_names}
    for field, names in names_of.items():
        check_choice("a field in columns=", field, (*_ROLES, *_TASKS, *_FEATURES))
        for name in names:
            check_choice(f"columns= for {field}", name, known)
    used = {name for names in names_of.values() for name in names}
    with duckdb.connect() as connection:
        parts = [
            f"SELECT *, {literal(split)} AS {quoted(_SPLIT)} FROM {quoted(f'table {split}')}"
            for split in tables
        ]
        try:
            for split, rows in tables.items():
                own = rows.select([n for n, of in enumerate(rows.column_names) if of in used])
                for field_ in own.schema:
                    if pa.types.is_duration(field_.type):
                        raise UserError(f"column {field_.name!r} holds durations; give numbers")
                connection.register(f"table {split}", own)
            return connection.sql(" UNION ALL BY NAME ".join(parts)).to_arrow_table()
        except duckdb.Error as error:
            raise UserError(f"the tables cannot be read as one: {line_of(error)}") from error


def _key(data: ConfigDict, field: str, column: str) -> str:
    """Return a key of `data.features` that is free."""
    name = identifier(column)
    return f"{field}_{name}" if name in data.features else name


def _feature(field: str, column: str, rows: pa.Table) -> ConfigDict:
    owner, kind, kind_of_lists = _FEATURES[field]
    if not is_list(rows.schema.field(column).type):
        return feature(owner, kind, column, standardise=False)
    length = pc.max(pc.list_value_length(rows[column])).as_py()
    return feature(owner, kind_of_lists, column, length=max(length or 1, 1), standardise=False)


def _sizes(rows: pa.Table, data: ConfigDict) -> dict[str, Any]:
    """Return the sizes of a funnel of these requests."""

    def is_known(column: str) -> str:
        is_float = pa.types.is_floating(rows.schema.field(column).type)
        return f"({quoted(column)} IS NOT NULL{f' AND NOT isnan({quoted(column)})' * is_float})"

    labels, scores = (
        [is_known(of) for of in data[section].values()] for section in ("labels", "teacher")
    )
    shown, passed = " OR ".join(labels), " OR ".join([*labels, *scores])
    if "stage" in data.columns:
        stage = quoted(data.columns.stage)
        shown, passed = f"{stage} = 'shown'", f"{stage} IN ('shown', 'passed')"
    with duckdb.connect() as connection:
        connection.register("candidates", rows)
        log = Log(connection, pd.DataFrame(), quoted(data.columns.request), {})
        sizes = find_sizes(log, shown, passed)
    return {key.removeprefix("funnel."): guess.column for key, guess in sizes.items()}
