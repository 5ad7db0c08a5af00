"""The files of RecFlow, a day each: the log of its stages, and the views before its requests.

`docs/recflow.md` describes their origin and their layout. The engine reads the Feather files, and a
reader with a short list of allowed names the pickles.
"""

import contextlib
import datetime
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from ml_collections import ConfigDict
from pyarrow import dataset, ipc

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.engine import Engine
from kd_ranker.sources.tables import put

STAGES_FOLDER, SEQUENCES_FOLDER = "all_stage", "seq_effective_50_dict"
SEQUENCE_COLUMNS = (
    *("video_id", "author_id", "category_level_two", "category_level_one", "upload_type"),
    *("upload_timestamp", "duration", "request_timestamp", "playing_time", "request_id"),
)
# The only names that a pickle may use. NumPy 1 and 2 have different names for the same module.
_ALLOWED = {
    ("collections", "defaultdict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}
# Functions that make the entries of a defaultdict. They are never called; `dict` replaces them.
_FACTORIES = {
    *(
        (module, f"defaultdict_{name}")
        for module in ("utils", "__main__")
        for name in ("tuple", "str")
    ),
    *(("builtins", name) for name in ("dict", "list", "tuple", "str", "int")),
}


class _Unpickler(pickle.Unpickler):
    """Reads dicts and arrays, and refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of `_ALLOWED`, or `dict` for one of `_FACTORIES`."""
        if (module, name) in _FACTORIES:
            return dict
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise any
        raise UserError(f"{path} was not read: {' '.join(str(error).split())}") from error


class Day(NamedTuple):
    """The files of a day."""

    name: str
    stages: Path
    sequences: Path


def find_days(data: ConfigDict) -> dict[str, list[Day]]:
    """Finds the files of the days of each split, split -> days in their order.

    Raises:
      UserError: a folder or a file is missing.
    """
    root = Path(data.path)
    folders = {name: root / name for name in (STAGES_FOLDER, SEQUENCES_FOLDER)}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist; set data.path to the folder that holds {STAGES_FOLDER} "
                f"and {SEQUENCES_FOLDER} (docs/recflow.md)"
            )
    stages = {path.stem: path for path in sorted(folders[STAGES_FOLDER].glob("*.feather"))}
    sequences = {path.stem: path for path in sorted(folders[SEQUENCES_FOLDER].glob("*.pkl"))}
    common = sorted(stages.keys() & sequences.keys())
    if not common:
        raise UserError(
            f"no day has a file in both {folders[STAGES_FOLDER]} ({_listed(stages)}) and "
            f"{folders[SEQUENCES_FOLDER]} ({_listed(sequences)})"
        )
    days: dict[str, list[Day]] = {}
    for split in SPLITS:
        for name in data[f"{split}_days"]:
            for files, folder, ending in (
                (stages, folders[STAGES_FOLDER], "feather"),
                (sequences, folders[SEQUENCES_FOLDER], "pkl"),
            ):
                if name not in files:
                    raise UserError(
                        f"data.{split}_days names {name}, and {folder / name}.{ending} does not "
                        f"exist; days with all files: {_listed(common)}"
                    )
        days[split] = [
            Day(name, stages[name], sequences[name]) for name in sorted(data[f"{split}_days"])
        ]
    return days


def date_of(name: object) -> datetime.date:
    """The date of a day like 2024-02-18; raises ValueError for any other text."""
    date = datetime.date.fromisoformat(str(name))
    if date.isoformat() != name:
        raise ValueError(name)
    return date


def read_stages(engine: Engine, day: Day, columns: Sequence[str]) -> ir.Table:
    """Columns of a Feather file as whole numbers; -1 where there is none.

    Args:
      engine: what is to read it; nothing is read before it is asked for rows.
      day: the day.
      columns: the columns to read. Some published files have a blank before a name.

    Raises:
      UserError: it is no such file, or lacks a column, or has one that holds no numbers.
    """
    path = day.stages
    try:
        with pa.memory_map(str(path)) as file:
            schema = ipc.open_file(file).schema
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    types = {field.name.strip(): field.type for field in schema}
    if missing := [name for name in columns if name not in types]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(types)}")
    for name in columns:
        kind = types[name]
        if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or _is_floating(kind)):
            raise UserError(f"{path}: column {name} holds {kind}, expected whole numbers")
    rows = put(engine, f"stages {day.name}", dataset.dataset(path, format="ipc"))
    written = {name.strip(): name for name in schema.names}
    return rows.select(**{name: _whole_number(rows[written[name]]) for name in columns})


@contextlib.contextmanager
def reading(day: Day) -> Iterator[None]:
    """Names the file that the engine cannot read in one line."""
    try:
        yield
    except duckdb.Error as error:
        raise _unreadable(day.stages, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    return UserError(f"{path} is no Feather file (version 2) that can be read: {text}")


def read_sequences(
    day: Day, request_ids: Int64[np.ndarray, "n"]
) -> dict[int, Int64[np.ndarray, "events 10"]]:
    """Reads the effective views before some requests, as published: place of a request -> views.

    Raises:
      UserError: the file is missing or holds something else.
    """
    path = day.sequences
    contents = _read_pickle(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dict of arrays")
    sequences = {}
    for place, request_id in enumerate(request_ids.tolist()):
        sequence = contents.get(request_id)
        if sequence is None:
            continue
        if not (
            isinstance(sequence, np.ndarray)
            and sequence.dtype.kind in "iu"
            and sequence.ndim == 2
            and sequence.shape[1] == len(SEQUENCE_COLUMNS)
        ):
            raise UserError(
                f"{path}: the sequence of request {request_id} is no array of whole numbers with "
                f"the columns {', '.join(SEQUENCE_COLUMNS)}"
            )
        sequences[place] = np.asarray(sequence, np.int64)
    if not sequences:
        raise UserError(
            f"{path} has no sequence of any request in {day.stages}; its keys must be request ids"
        )
    return sequences


def _is_floating(kind: pa.DataType) -> bool:
    # pandas makes floats of whole numbers where some are missing.
    return bool(pa.types.is_floating(kind))


def _whole_number(value: ir.Value) -> ir.IntegerValue:
    """A value as int64, -1 where nothing or no finite number stands."""
    if value.type().is_floating():
        value = ibis.ifelse(value.isnan() | value.isinf(), -1, value)
    return ibis.coalesce(value.cast("int64"), -1)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
