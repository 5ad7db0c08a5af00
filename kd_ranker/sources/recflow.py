"""RecFlow as a log: the requests of an industrial feed, with the stage that each candidate reached.

Q. Liu, K. Zheng, R. Huang et al., "RecFlow: An Industrial Full Flow Recommendation Dataset", ICLR
2025. `docs/recflow.md` describes files, stages, positions and columns.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from ml_collections import ConfigDict
from pyarrow import dataset

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, connect, find_raw, moment_of

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
_NUMBERS = (
    *("request_timestamp", *OF_REQUEST, *OF_ITEM, "upload_timestamp", "duration", "realshow"),
    *("rank_pos", "rank_neg", "rerank_pos", "rerank_neg", "coarse_neg", "prerank_neg"),
    *("rank_index", *LABELS),
)
# The columns of a sequence of views that are read, and their places among ten.
_EVENTS = {"video_id": 0, "duration": 6, "viewed": 7, "playing_time": 8}
_WIDTH = 10
# The names that a pickle may use. NumPy 1 and 2 name the same module differently.
_ALLOWED = {
    "collections.defaultdict",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
}
# Functions that make the entries of a defaultdict. They are never called; `dict` replaces them.
_FACTORIES = {"defaultdict_tuple", "defaultdict_str", "dict", "list", "tuple", "str", "int"}


def find_files(data: ConfigDict) -> list[Path]:
    """The two files of each day, in the order of the days.

    Raises:
      UserError: one is missing, or the days of the splits overlap.
    """
    named = [(day, split) for split in SPLITS for day in sorted(data[f"{split}_days"])]
    days = [day for day, _ in named]
    if days != sorted({*days}) or {split for _, split in named} != {*SPLITS}:
        raise UserError(
            "name at least one day, as 2024-02-18, in each of data.train_days, "
            "data.validation_days and data.test_days; each day once, and the splits in this order"
        )
    names = [f"{of}/{day}.{ending}" for day in days for of, ending in FOLDERS.items()]
    where = f"{' and '.join(FOLDERS)}, to be downloaded by hand (docs/recflow.md)"
    return find_raw(data, names, where)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one file per day, and in it one row per request, in the order of time."""
    split_of = {day: split for split in SPLITS for day in data[f"{split}_days"]}
    grades = GRADES if data.of_each_stage else STAGES
    with connect(data, folder) as con:
        for stages, sequences in zip(files[::2], files[1::2], strict=True):
            con.register("day", dataset.dataset(stages, format="ipc"))
            con.execute(_requests(data, grades))
            ids = con.sql("SELECT request_id FROM requests").fetchnumpy()["request_id"]
            if not len(ids):
                raise UserError(f"{stages} has no row with {' or '.join(grades)}")
            con.register("events", read_events(sequences, ids))
            rows = con.sql(_candidates(data, grades) + _rows(split_of[stages.stem]))
            rows.write_parquet(str(folder / f"{stages.stem}.parquet"), compression="zstd")


def _whole(names: Sequence[str]) -> str:
    """SQL for some columns of a day, as whole numbers.

    pandas makes floats, with NaN, of whole numbers where some are missing. Some published files
    have a blank before a name.
    """
    columns = rf"COLUMNS('^\s*({'|'.join(names)})$')"
    return f"if(isnan({columns}::DOUBLE), NULL, {columns})::BIGINT"


def _requests(data: ConfigDict, grades: Mapping[str, str]) -> str:
    """SQL for `logged`, the rows of a day, and `requests`, all of the day or some that are drawn.

    Negative numbers are missing ones, except for ids.
    """
    most = f"LIMIT {data.max_requests_per_day}" if data.max_requests_per_day else ""
    return rf"""
        CREATE OR REPLACE VIEW logged AS SELECT {_whole(_IDS)} AS '\1',
            nullif(greatest({_whole(_NUMBERS)}, -1), -1) AS '\1' FROM day;
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
            {moment_of("time // 1000")},
            ln(1 + (time - last) / 86400000)::FLOAT AS pause
        FROM requests JOIN listed USING (request_id) LEFT JOIN past USING (request_id)
        ORDER BY time, request_id"""


class _Unpickler(pickle.Unpickler):
    """Reads dicts and arrays, and refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of `_ALLOWED`, or `dict` for one of `_FACTORIES`."""
        if name in _FACTORIES:
            return dict
        module = module.replace("numpy.core", "numpy._core")
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def read_events(path: Path, request_ids: Int64[np.ndarray, "n"]) -> pa.Table:
    """Read the views before some requests from a pickle of request id -> [views, 10].

    Returns:
      A row per view: `request_id`, `video_id`, `duration` (ms), `viewed` (ms since 1970),
      `playing_time` (ms) and `place` in the file. Requests without views have none.

    Raises:
      UserError: the file is damaged or holds something else.
    """
    try:
        with path.open("rb") as file:
            contents = _Unpickler(file).load()
        views = {key: contents[key] for key in request_ids.tolist() if key in contents}
        events = np.concatenate([*views.values()])
        if events.dtype.kind not in "iu" or events.shape[1:] != (_WIDTH,):
            raise ValueError(
                f"found {events.dtype} [views, {', '.join(map(str, events.shape[1:]))}]"
            )
    except Exception as error:  # a damaged pickle can raise any
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} must be a pickle of request id -> whole numbers [views, {_WIDTH}]: {reason}"
        ) from error
    columns = {name: events[:, column].astype(np.int64) for name, column in _EVENTS.items()}
    owner = np.repeat([*views], [len(of) for of in views.values()])
    return pa.table({"request_id": owner, **columns, "place": np.arange(len(events))})


CONVERTER = Converter(
    ("train_days", "validation_days", "test_days", "max_requests_per_day", "of_each_stage"),
    find_files,
    write,
)
