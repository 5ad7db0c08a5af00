"""RecFlow as a log: the requests of an industrial feed, with the stage that each candidate reached.

Q. Liu, K. Zheng, R. Huang et al., "RecFlow: An Industrial Full Flow Recommendation Dataset", ICLR
2025. `docs/recflow.md` describes files, stages, positions and columns.
"""

import itertools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from ml_collections import ConfigDict
from pyarrow import dataset

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, connect

FOLDERS = {"all_stage": "feather", "seq_effective_50_dict": "pkl"}
LABELS = ("long_view", "effective_view", "like", "forward", "follow", "comment")
HISTORY = 50  # the most views of a sequence
OF_REQUEST = ("gender", "province", "age")
OF_ITEM = ("author_id", "category_level_one", "category_level_two", "upload_type")
RANKED = "rank_pos = 1 OR rank_neg = 1 OR rerank_pos = 1 OR rerank_neg = 1"
# Condition on a row of the files -> its stage in the log; the first condition that holds counts.
STAGES = {"realshow = 1": "shown", RANKED: "passed", "true": "retrieved"}
# The same with `data.of_each_stage`, the number of rows of each; other rows are left out.
GRADES = {
    "rank_pos = 1": "shown",
    "rank_neg = 1": "passed",
    "coarse_neg = 1": "retrieved",
    "prerank_neg = 1": "retrieved",
}
_IDS = ("request_id", "user_id", "video_id")
_COLUMNS = (
    *(*_IDS, "request_timestamp", *OF_REQUEST, *OF_ITEM, "upload_timestamp", "duration"),
    *("realshow", "rank_pos", "rank_neg", "rerank_pos", "rerank_neg", "coarse_neg", "prerank_neg"),
    *("rank_index", *LABELS),
)
# The columns of a sequence of views that are read, and their places among ten.
_EVENTS = {"video_id": 0, "duration": 6, "viewed": 7, "playing_time": 8}
_WIDTH = 10
# The names that a pickle may use, by module. NumPy 1 and 2 name the same module differently.
_ARRAYS = {"_reconstruct", "scalar"}
_ALLOWED = {
    "collections": {"defaultdict"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,
}
# Functions that make the entries of a defaultdict. They are never called; `dict` replaces them.
_MAKERS = {"defaultdict_tuple", "defaultdict_str"}
_FACTORIES = {
    "utils": _MAKERS,
    "__main__": _MAKERS,
    "builtins": {"dict", "list", "tuple", "str", "int"},
}


def find_files(data: ConfigDict) -> list[Path]:
    """The two files of each day, in the order of the days.

    Raises:
      UserError: one is missing, or the days of the splits overlap.
    """
    named = [(day, split) for split in SPLITS for day in sorted(data[f"{split}_days"])]
    for split in SPLITS:
        if not data[f"{split}_days"]:
            raise UserError(f"data.{split}_days is empty; name at least one day, as 2024-02-18")
    for (earlier, first), (later, second) in itertools.pairwise(named):
        if earlier >= later:
            raise UserError(
                f"data.{second}_days has {later}, which does not come after {earlier} of "
                f"data.{first}_days; name each day once, and those of {', '.join(SPLITS)} in order"
            )
    files = []
    for (day, split), (folder, ending) in itertools.product(named, FOLDERS.items()):
        files.append(Path(data.path) / folder / f"{day}.{ending}")
        if not data.path or not files[-1].is_file():
            raise UserError(
                f"{files[-1]}, of data.{split}_days, does not exist; set data.path to the folder "
                f"with {' and '.join(FOLDERS)}, to be downloaded by hand (docs/recflow.md)"
            )
    return files


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one file per day, and in it one row per request, in the order of time."""
    split_of = {day: split for split in SPLITS for day in data[f"{split}_days"]}
    grades = GRADES if data.of_each_stage else STAGES
    with connect(data, folder) as con:
        for stages, sequences in zip(files[::2], files[1::2], strict=True):
            _open_day(con, stages)
            con.execute(_requests(data, grades))
            ids = con.sql("SELECT request_id FROM requests").fetchnumpy()["request_id"]
            if not len(ids):
                raise UserError(f"{stages} has no row with {' or '.join(grades)}")
            con.register("events", read_events(sequences, ids))
            rows = con.sql(_candidates(data, grades) + _rows(split_of[stages.stem]))
            rows.write_parquet(str(folder / f"{stages.stem}.parquet"), compression="zstd")


def _open_day(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make the view `logged` of a Feather file, in whole numbers; what is missing is NULL."""
    try:
        file = dataset.dataset(path, format="ipc")
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a Feather file (version 2): {reason}") from error
    # Some published files have a blank before a name.
    fields = {field.name.strip(): field for field in file.schema}
    if missing := [name for name in _COLUMNS if name not in fields]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(fields)}")
    columns = []
    for name in _COLUMNS:
        of = fields[name].type
        # pandas makes floats of whole numbers where some are missing.
        if not (pa.types.is_boolean(of) or pa.types.is_integer(of) or pa.types.is_floating(of)):
            raise UserError(f"{path}: column {name} holds {of}, expected whole numbers")
        value = f'try_cast("{fields[name].name}" AS BIGINT)'
        value = value if name in _IDS else f"if({value} >= 0, {value}, NULL)"
        columns.append(f'{value} AS "{name}"')
    con.register("day", file)
    con.execute(f"CREATE OR REPLACE VIEW logged AS SELECT {', '.join(columns)} FROM day")


def _requests(data: ConfigDict, grades: Mapping[str, str]) -> str:
    """SQL for `requests`, all of a day or some that are drawn."""
    most = f"LIMIT {data.max_requests_per_day}" if data.max_requests_per_day else ""
    return f"""
        CREATE OR REPLACE TABLE requests AS SELECT request_id, min(request_timestamp) AS time,
            min(user_id) AS user, {", ".join(f"max({name}) AS {name}" for name in OF_REQUEST)}
        FROM logged GROUP BY request_id HAVING bool_or({" OR ".join(grades)})
        ORDER BY md5(concat_ws(' ', {data.seed}, request_id)) {most}"""


def _candidates(data: ConfigDict, grades: Mapping[str, str]) -> str:
    """SQL for `candidates`, each video once per request, and their positions.

    Of repeated rows, the one that came furthest counts, then the best `rank_index`. It is not
    documented what `rank_index` is without a position. It is a position only of a candidate that
    the rank stage scored, and only behind a `rank_pos` of the request, unless it is one itself.
    """
    cases = " ".join(f"WHEN {of} THEN {place}" for place, of in enumerate(grades, start=1))
    labels = ", ".join(f'"{name}" DESC' for name in ("realshow", *LABELS, "rank_pos"))
    return f"""
        WITH graded AS (SELECT logged.*, time, CASE {cases} END AS grade,
            {[*grades.values()]}[grade] AS stage FROM logged JOIN requests USING (request_id)),
        once AS (FROM graded WHERE grade IS NOT NULL QUALIFY row_number() OVER (PARTITION BY
            request_id, video_id ORDER BY grade, rank_index NULLS LAST, {labels}) = 1),
        scored AS (SELECT *, stage <> 'retrieved' AND rank_index IS NOT NULL AS is_scored,
            min(rank_index) FILTER (WHERE is_scored AND rank_pos = 1) OVER
            (PARTITION BY request_id) AS best FROM once),
        placed AS (SELECT *, CASE WHEN is_scored AND (rank_pos = 1 OR rank_index > best)
            THEN rank_index END AS position, realshow = 1 AND stage = 'shown' AS is_labelled
            FROM scored),
        candidates AS (FROM placed QUALIFY row_number() OVER (PARTITION BY request_id, grade
            ORDER BY position NULLS LAST, video_id) <= {data.of_each_stage or 1 << 40}),"""


def _rows(split: str) -> str:
    """SQL for the rows of the log; only views strictly before a request are in its history."""
    fields = {
        "item": "video_id",
        "stage": "stage",
        "position": "position",
        **{of: f'if(is_labelled, coalesce("{of}", 0) = 1, NULL)::TINYINT' for of in LABELS},
        **{name: name for name in OF_ITEM},
        "duration": "ln(1 + nullif(duration, 0) / 1000)::FLOAT",
        "days_old": "if(upload_timestamp > 0, "
        "ln(1 + greatest(time / 1000 - upload_timestamp, 0) / 86400), NULL)::FLOAT",
    }
    events = {
        "history": "video_id",
        "history_age": "ln(1 + (time - viewed) / 86400000)::FLOAT",
        "history_duration": "ln(1 + greatest(duration, 0) / 1000)::FLOAT",
        "history_watched": "least(greatest(playing_time, 0) / greatest(duration, 1), 2)::FLOAT",
    }
    history = [f"list({value} ORDER BY viewed, place) AS {name}" for name, value in events.items()]
    struct = ", ".join(f"'{name}': {value}" for name, value in fields.items())
    lists = ", ".join(
        f'list_transform(candidates, lambda each: each."{name}") AS "{name}"' for name in fields
    )
    angle = "2 * pi() * (time // 1000 % 86400) / 86400"
    return f"""
        listed AS (SELECT request_id, list({{{struct}}} ORDER BY video_id) AS candidates
            FROM candidates GROUP BY request_id),
        past AS (SELECT request_id, count(*) AS views, max(viewed) AS last,
            {", ".join(history)}
            FROM events JOIN requests USING (request_id)
            WHERE viewed > 0 AND viewed < time AND video_id >= 0 GROUP BY request_id)
        SELECT request_id AS request, time, '{split}' AS split, user, {", ".join(OF_REQUEST)},
            {lists}, (ln(1 + coalesce(views, 0)) / ln({HISTORY} + 1))::FLOAT AS views,
            {", ".join(f"coalesce({name}, []) AS {name}" for name in events)},
            sin({angle})::FLOAT AS hour_sin, cos({angle})::FLOAT AS hour_cos,
            (time // 86400000 + 3) % 7 AS weekday,
            ln(1 + (time - last) / 86400000)::FLOAT AS pause
        FROM requests JOIN listed USING (request_id) LEFT JOIN past USING (request_id)
        ORDER BY time, request_id"""


class _Unpickler(pickle.Unpickler):
    """Reads dicts and arrays, and refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of `_ALLOWED`, or `dict` for one of `_FACTORIES`."""
        if name in _FACTORIES.get(module, ()):
            return dict
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_events(path: Path, request_ids: Int64[np.ndarray, "n"]) -> pa.Table:
    """Read the views before some requests.

    Args:
      path: a pickle of request id -> its views, as an array with a row per view.
      request_ids: the requests to read; those without views are left out.

    Returns:
      A row per view: `request_id`, `video_id`, `duration` (ms), `viewed` (ms since 1970),
      `playing_time` (ms) and `place` in the file.

    Raises:
      UserError: the file of sequences is damaged or holds something else.
    """
    try:
        with path.open("rb") as file:
            contents = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise any
        raise UserError(f"{path} was not read: {' '.join(str(error).split())}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dict of arrays")
    sequences = {key: contents[key] for key in request_ids.tolist() if key in contents}
    if not sequences:
        raise UserError(f"{path} has no sequence of any request; its keys must be request ids")
    for key, of in sequences.items():
        whole = isinstance(of, np.ndarray) and of.dtype.kind in "iu" and of.ndim == 2
        if not whole or of.shape[1] != _WIDTH:
            raise UserError(
                f"{path}: the sequence of request {key} is not an array of whole numbers with "
                f"{_WIDTH} columns"
            )
    events = np.concatenate([of.astype(np.int64) for of in sequences.values()])
    columns = {
        "request_id": np.repeat([*sequences], [len(of) for of in sequences.values()]),
        **{name: events[:, column] for name, column in _EVENTS.items()},
        "place": np.arange(len(events)),
    }
    return pa.table(columns)


CONVERTER = Converter(
    ("train_days", "validation_days", "test_days", "max_requests_per_day", "of_each_stage"),
    find_files,
    write,
)
