"""RecFlow as a log: the requests of an industrial feed, with the stage that each candidate reached.

Q. Liu, K. Zheng, R. Huang et al., "RecFlow: An Industrial Full Flow Recommendation Dataset", ICLR
2025. `docs/datasets.md` describes files, stages, positions and columns.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from ml_collections import ConfigDict
from pyarrow import dataset

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, columns, connect, draw, find_raw, moment_of

FOLDERS = {"all_stage": "feather", "seq_effective_50_dict": "pkl"}
LABELS = ("long_view", "effective_view", "like", "forward", "follow", "comment")
REQUEST_FEATURES = ("gender", "province", "age")
ITEM_FEATURES = ("author_id", "category_level_one", "category_level_two", "upload_type")
# Condition on a row of the files -> its stage in the log; the first condition that holds counts.
STAGES = {
    "realshow = 1": "shown",
    "rank_pos = 1 OR rank_neg = 1 OR rerank_pos = 1 OR rerank_neg = 1": "passed",
    "true": "retrieved",
}
# The same with `data.of_each_stage`, the number of rows of each; other rows are left out.
STAGES_OF_SAMPLES = {
    "rank_pos = 1": "shown",
    "rank_neg = 1": "passed",
    "coarse_neg = 1": "retrieved",
    "prerank_neg = 1": "retrieved",
}
# The columns of a sequence of views: times in ms, the last two of the view itself.
_VIEW = (
    "video_id",
    "author_id",
    "category_level_two",
    "category_level_one",
    "upload_type",
    "upload_timestamp",
    "duration",
    "viewed",
    "playing_time",
    "last",
)
# The modules and names that a pickle may refer to.
_MODULES = ("collections", "numpy", "numpy._core.multiarray")
_NAMES = ("defaultdict", "dtype", "ndarray", "_reconstruct", "scalar")


def find_files(data: ConfigDict) -> list[Path]:
    """Find the two files of each day, in the order of the days."""
    days = [day for split in SPLITS for day in sorted(data[f"{split}_days"])]
    has_all_splits = all(data[f"{split}_days"] for split in SPLITS)
    if days != sorted(set(days)) or not has_all_splits:
        raise UserError(
            "name days, as 2024-02-18, in each of data.train_days, data.validation_days and "
            "data.test_days; each day once, and the splits in this order"
        )
    names = [f"{folder}/{day}.{ending}" for day in days for folder, ending in FOLDERS.items()]
    return find_raw(data, names, f"{' and '.join(FOLDERS)} (docs/datasets.md)")


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one file per day, and in it one row per request, in the order of time."""
    split_of_day = {day: split for split in SPLITS for day in data[f"{split}_days"]}
    stages = STAGES_OF_SAMPLES if data.of_each_stage else STAGES
    with connect(data, folder) as con:
        # The files of candidates and of sequences alternate.
        for candidates, sequences in zip(files[::2], files[1::2], strict=True):
            day = candidates.stem
            con.register("day", dataset.dataset(candidates, format="ipc"))
            con.execute(_create_logged())
            con.execute(_create_requests(data, stages))
            request_ids = con.sql("SELECT request_id FROM requests").fetchnumpy()["request_id"]
            con.register("events", read_events(sequences, request_ids.tolist()))
            rows = con.sql(_select_rows(split_of_day[day], stages, data.of_each_stage))
            rows.write_parquet(str(folder / f"{day}.parquet"), compression="zstd")


def _create_logged() -> str:
    """SQL for `logged`: the rows of a day as whole numbers, NULL where missing.

    pandas makes floats, with NaN, of whole numbers where some are missing. Negative numbers are
    missing ones too, except in ids. Some published files have a blank before a name.
    """
    column = r"COLUMNS('^\s*(\w+)$')"
    present = [
        f"nullif(greatest({name}, -1), -1) AS {name}"
        for name in (*REQUEST_FEATURES, *ITEM_FEATURES, "rank_index")
    ]
    return rf"""
        CREATE OR REPLACE VIEW logged AS SELECT * REPLACE ({", ".join(present)}) FROM (
            SELECT if(isnan({column}::DOUBLE), NULL, {column})::BIGINT AS '\1' FROM day)"""


def _create_requests(data: ConfigDict, stages: Mapping[str, str]) -> str:
    """SQL for `requests`: some of the requests that have a row of a stage."""
    return rf"""
        CREATE OR REPLACE TABLE requests AS SELECT request_id, min(user_id) AS user,
            min(request_timestamp) AS time, max({columns(REQUEST_FEATURES)}) AS '\1' FROM logged
        GROUP BY request_id HAVING bool_or({" OR ".join(stages)})
        {draw(data.seed, "request_id", data.max_requests_per_day)}"""


def _select_rows(split: str, stages: Mapping[str, str], of_each_stage: int) -> str:
    """SQL for the rows of the log; only views strictly before a request are in its history.

    Of repeated rows, the one that came furthest counts, then the best `rank_index`. That is a
    position only of a candidate that the rank stage scored, and only behind a `rank_pos` of the
    request, unless it is one itself. A grade is the number of a condition in `stages`, from 1.
    """
    grades = " ".join(
        f"WHEN {condition} THEN {grade}" for grade, condition in enumerate(stages, start=1)
    )
    ties = ", ".join(f'"{name}" DESC' for name in ("realshow", *LABELS, "rank_pos"))
    fields = ("item", "stage", "position", *ITEM_FEATURES, *LABELS, "duration", "days_old")
    lists = [f'[row."{name}" for row in listed] AS "{name}"' for name in fields]
    return rf"""
        WITH graded AS (SELECT logged.*, video_id AS item, time, CASE {grades} END AS grade,
            {list(stages.values())}[grade] AS stage FROM logged JOIN requests USING (request_id)),
        once AS (FROM graded WHERE grade IS NOT NULL QUALIFY row_number() OVER (
            PARTITION BY request_id, item ORDER BY grade, rank_index NULLS LAST, {ties}) = 1),
        placed AS (SELECT *, if(stage <> 'retrieved' AND (rank_pos = 1 OR rank_index >
                min(rank_index) FILTER (stage <> 'retrieved' AND rank_pos = 1)
                OVER (PARTITION BY request_id)), rank_index, NULL) AS position FROM once),
        sampled AS (FROM placed QUALIFY row_number() OVER (PARTITION BY request_id, grade
            ORDER BY position NULLS LAST, item) <= {of_each_stage or 1 << 40}),
        candidate AS (SELECT request_id, item, stage, position, {", ".join(ITEM_FEATURES)},
            if(realshow = 1 AND stage = 'shown',
                coalesce({columns(LABELS)}, 0) = 1, NULL)::TINYINT AS '\1',
            if(duration > 0, ln(1 + duration / 1000), NULL)::FLOAT AS duration,
            if(upload_timestamp > 0, ln(1 + greatest(time / 1000 - upload_timestamp, 0) / 86400),
                NULL)::FLOAT AS days_old FROM sampled),
        candidates AS (SELECT request_id, list(candidate ORDER BY item) AS listed
            FROM candidate GROUP BY ALL),
        views AS (SELECT request_id, viewed, place, (time - viewed) / 86400000 AS days,
            video_id AS history, ln(1 + days)::FLOAT AS history_age,
            ln(1 + greatest(duration, 0) / 1000)::FLOAT AS history_duration,
            least(greatest(playing_time, 0) / greatest(duration, 1), 2)::FLOAT AS history_watched
            FROM events JOIN requests USING (request_id)
            WHERE viewed > 0 AND viewed < time AND video_id >= 0),
        past AS (SELECT request_id, count(*) AS views, min(days) AS days,
            list(COLUMNS('^(history.*)$') ORDER BY viewed, place) AS '\1' FROM views GROUP BY ALL)
        SELECT request_id AS request, time, '{split}' AS split, user, {", ".join(REQUEST_FEATURES)},
            {", ".join(lists)}, coalesce(COLUMNS('^(history.*)$'), []) AS '\1',
            (ln(1 + coalesce(views, 0)) / ln(51))::FLOAT AS views, ln(1 + days)::FLOAT AS pause,
            {moment_of("time // 1000")}
        FROM requests JOIN candidates USING (request_id) LEFT JOIN past USING (request_id)
        ORDER BY time, request_id"""


class _Unpickler(pickle.Unpickler):
    """Reads dicts and arrays, and refuses every other name before it is looked up."""

    def find_class(self, module: str, name: str) -> object:
        # The factory of a defaultdict is never called.
        if name.startswith("defaultdict_") or name in ("dict", "list", "tuple", "str", "int"):
            return dict
        module = module.replace("numpy.core", "numpy._core")
        if module not in _MODULES or name not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")
        return super().find_class(module, name)


def read_events(path: Path, request_ids: Sequence[int]) -> pd.DataFrame:
    """Read a row per view of some requests from a pickle of request id -> array of views."""
    try:
        with path.open("rb") as file:
            contents = _Unpickler(file).load()
        views_by_request = {key: contents[key] for key in request_ids if key in contents}
        views = np.concatenate(list(views_by_request.values()), dtype=np.int64, casting="safe")
        events = pd.DataFrame(views, columns=_VIEW)
    except Exception as error:  # a damaged pickle can raise any
        fault = f"{path} must be a pickle of request id -> whole numbers [views, {len(_VIEW)}]"
        raise UserError(f"{fault}: {' '.join(str(error).split())}") from error
    request_id = np.repeat(
        list(views_by_request), [len(request_views) for request_views in views_by_request.values()]
    )
    return events.assign(request_id=request_id, place=np.arange(len(events)))


_KEYS = (*(f"{split}_days" for split in SPLITS), "max_requests_per_day", "of_each_stage")
CONVERTER = Converter(_KEYS, find_files, write)
