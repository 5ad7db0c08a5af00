"""KuaiRand as a log: sessions of a short-video feed, and a test set that no policy has chosen.

C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang and X. He, "KuaiRand: An Unbiased
Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022. `docs/kuairand.md`
describes requests, splits and columns.
"""

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, check_none, connect, find_raw, moment_of

VARIANTS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
ARCHIVE = "https://zenodo.org/records/10439422"
TESTS = ("random", "standard")
# Action -> its prior rate, which counts as much as PRIOR_COUNT impressions.
ACTIONS = {
    "long_view": 0.3, "is_like": 0.02, "is_forward": 0.001, "is_follow": 0.001,
    "is_comment": 0.002, "is_click": 0.4,
}  # fmt: skip
PRIOR_COUNT = 20
CANDIDATE_ACTIONS = ("long_view", "is_like", "is_forward")
HISTORY = 100  # the latest engaged impressions of a user
LOGS_END = 1_652_025_600  # 2022-05-09 00:00 in Beijing, after the last day
BEIJING = 8 * 3600  # the log's dates are of this time zone, UTC+8 without daylight saving

_STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_STEMS = (*_STANDARD, "log_random_4_22_to_5_08", "user_features", "video_features_basic")
USER_CATEGORIES = (
    *("user_active_degree", "follow_user_num_range", "fans_user_num_range"),
    *("friend_user_num_range", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")


def find_files(data: ConfigDict) -> list[Path]:
    """The files of a variant; the standard logs of 27K are published in two parts."""
    variant = data.name.removeprefix("kuairand_")
    inner = "data/" if (Path(data.path) / "data").is_dir() else ""
    names = [
        f"{inner}{stem}_{variant}{part}.csv"
        for stem in _STEMS
        for part in (("_part1", "_part2") if variant == "27k" and stem in _STANDARD else ("",))
    ]
    return find_raw(data, names, f"{VARIANTS[variant]}, unpacked from {ARCHIVE}")


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    log, users, videos = (
        f"read_csv({[str(file) for file in files if file.name.startswith(stem)]}, header = true, "
        "all_varchar = true)"
        for stem in ("log_", "user_", "video_")
    )
    with connect(data, folder) as con:
        con.execute(f"""
            CREATE TABLE users AS {_last_of_each("user_id", users)}
                ORDER BY md5(concat_ws(' ', {data.seed}, user_id))
                {f"LIMIT {data.max_users}" if data.max_users else ""};
            CREATE TABLE videos AS {_last_of_each("video_id", videos)};
            CREATE TABLE log AS SELECT row_number() OVER () AS n, *,
                {" OR ".join(ACTIONS)} AS engaged FROM (
                SELECT user_id::INT AS user, video_id::INT AS video, time_ms::BIGINT // 1000 AS
                time, coalesce(tab::INT, -1) AS tab, coalesce(is_rand::INT, 0) = 1 AS random,
                {", ".join(f"coalesce({action}::INT, 0) = 1 AS {action}" for action in ACTIONS)}
                FROM {log} {"SEMI JOIN users USING (user_id)" if data.max_users else ""});
        """)
        check_none(con, _FAULTS, files[0].parent)
        con.execute(_requests(data) + _candidates(data))
        con.execute(_counts("user", ACTIONS) + _counts("video", CANDIDATE_ACTIONS))
        con.sql(_rows()).write_parquet(str(folder / "log.parquet"), compression="zstd")


_FAULTS = {"a row of a log lacks user, video or time": "FROM log WHERE user + video + time IS NULL"}


def _last_of_each(key: str, file: str) -> str:
    """SQL for the last row of each key."""
    return f"""SELECT * EXCLUDE line FROM (SELECT *, row_number() OVER () AS line FROM {file})
        QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY line DESC) = 1"""


def _requests(data: ConfigDict) -> str:
    """SQL for `requests`, and `placed`, the impressions that they are made of."""
    validation, test = (_midnight(data, f"{split}_from") for split in ("validation", "test"))
    session = "PARTITION BY split, user, tab"
    most = {of: data[f"{of}_requests"] or 1 << 40 for of in SPLITS}
    return f"""
        CREATE TABLE placed AS WITH
        dated AS (SELECT *, CASE WHEN time < {validation} THEN 'train'
            WHEN time < {test} THEN 'validation' ELSE 'test' END AS split FROM log),
        chosen AS (SELECT *, 60 * if(random, {data.random_session_minutes}, {data.session_minutes})
            AS pause FROM dated WHERE random = (split <> 'train' AND {data.test == "random"})),
        cut AS (SELECT *, coalesce(time - lag(time) OVER ({session} ORDER BY time, n) >= pause,
            true) AS is_first FROM chosen),
        sessions AS (SELECT *, count_if(is_first) OVER ({session} ORDER BY time, n) AS session
            FROM cut)
        SELECT *, (row_number() OVER ({session}, session ORDER BY time, n) - 1)
            // {data.impressions_per_request} AS block FROM sessions;
        CREATE TABLE requests AS SELECT *, row_number() OVER (ORDER BY time, n) - 1 AS request
        FROM (FROM (SELECT split, user, tab, session, block, min(time) AS time,
                arg_min(n, (time, n)) AS n FROM placed GROUP BY ALL)
            QUALIFY row_number() OVER (PARTITION BY split
                ORDER BY md5(concat_ws(' ', {data.seed}, user, tab, time)))
            <= CASE split {" ".join(f"WHEN '{of}' THEN {most[of]}" for of in SPLITS)} END);
    """


def _candidates(data: ConfigDict) -> str:
    """SQL for `candidates`: videos that were shown, once each, and others that are drawn.

    A video is drawn in proportion to the earlier impressions of it in the standard log.
    """
    merged = ", ".join(f"bool_or({task})::TINYINT AS {task}" for task in ACTIONS)
    return f"""
        CREATE TABLE shown AS SELECT request, requests.time, video, min((placed.time, placed.n))
            AS place, {merged} FROM placed JOIN requests USING (split, user, tab, session, block)
            GROUP BY ALL;
        CREATE TABLE standard AS SELECT video, time,
            row_number() OVER (ORDER BY time, n) - 1 AS spot FROM log WHERE NOT random;
        CREATE TABLE candidates AS SELECT request, time, video, place, {", ".join(ACTIONS)}
        FROM shown UNION ALL BY NAME (
            WITH known AS (SELECT requests.*, standard.spot + 1 AS earlier
                FROM requests ASOF JOIN (SELECT time, max(spot) AS spot FROM standard GROUP BY time)
                AS standard ON requests.time > standard.time),
            draws AS (SELECT request, time, draw,
                hash(concat_ws(' ', {data.seed}, user, tab, time, draw)) % earlier AS spot
                FROM known, range({8 * data.negatives}) AS draws(draw)),
            drawn AS (SELECT request, draws.time, video, min(draw) AS draw
                FROM draws JOIN standard USING (spot) GROUP BY ALL)
            SELECT request, time, video FROM drawn ANTI JOIN shown USING (request, video) QUALIFY
                row_number() OVER (PARTITION BY request ORDER BY draw) <= {data.negatives});
    """


def _counts(of: str, tasks: Iterable[str]) -> str:
    """SQL for running counts per user or video, up to the end of each second."""
    sums = ", ".join(
        f"sum(count_if({task})) OVER seconds AS {task}" for task in (*tasks, "engaged")
    )
    return f"""
        CREATE TABLE {of}_counts AS SELECT {of}, time, sum(count(*)) OVER seconds AS seen, {sums}
        FROM log GROUP BY {of}, time WINDOW seconds AS (PARTITION BY {of} ORDER BY time);
    """


def _rates(counts: str, prefix: str, tasks: Iterable[str]) -> str:
    """SQL for the logarithms of how much likelier an action is than its prior rate."""
    seen = f"coalesce({counts}.seen, 0)"
    lifts = (
        f"ln((coalesce({counts}.{task}, 0) + {PRIOR_COUNT * ACTIONS[task]})"
        f" / (({seen} + {PRIOR_COUNT}) * {ACTIONS[task]})) AS {prefix}_{task}"
        for task in tasks
    )
    return ", ".join([f"ln(1 + {seen}) / 5 AS {prefix}_seen", *lifts])


def _rows() -> str:
    """SQL for the rows of the log; candidates in the order in which they were shown."""
    numbers = [
        f"ln(1 + greatest(coalesce(try_cast({name} AS DOUBLE), 0), 0)) / 5 AS {name}"
        for name in USER_NUMBERS
    ]
    flags = [f"coalesce(try_cast({name} AS DOUBLE) = 1, false) AS {name}" for name in USER_FLAGS]
    done = ", ".join(f"{action}::TINYINT" for action in ACTIONS)
    return f"""
        WITH films AS (SELECT video_id::INT AS video, author_id, music_id, video_type, upload_type,
            music_type, string_split(tag, ',') AS tags,
            ln(1 + nullif(greatest(video_duration::DOUBLE, 0), 0) / 1000) - 4 AS duration,
            ln(nullif(greatest(server_height::DOUBLE, 0), 0) / nullif(greatest(server_width::DOUBLE,
            0), 0)) AS shape, epoch(try_cast(upload_dt AS DATE)) - {BEIJING} AS uploaded
            FROM videos),
        known AS (SELECT candidates.* RENAME (request AS _request, time AS _time, place AS _place,
            video AS item), films.* EXCLUDE (video, uploaded),
            if(place IS NULL, NULL, row_number() OVER (PARTITION BY request ORDER BY place)) AS
            position,
            {_age(str(LOGS_END))} AS days_to_end, {_age("candidates.time")} AS days_old,
            {_rates("counts", "video", CANDIDATE_ACTIONS)}
            FROM candidates ASOF LEFT JOIN video_counts AS counts
                ON candidates.video = counts.video AND candidates.time > counts.time
            LEFT JOIN films ON candidates.video = films.video),
        lists AS (SELECT _request AS request,
            list(COLUMNS('^([^_].*)$') ORDER BY _place NULLS LAST, item) AS '\\1'
            FROM known GROUP BY _request),
        past AS (SELECT user, list(struct_pack(video, time, done := [{done}]) ORDER BY time, n)
            AS events FROM log WHERE engaged GROUP BY user),
        people AS (SELECT user_id::INT AS user, {", ".join([*numbers, *flags, *USER_CATEGORIES])}
            FROM users)
        SELECT * EXCLUDE recent FROM (SELECT lists.*, requests.user, requests.time, split,
            nullif(tab, -1) AS tab, people.* EXCLUDE user, {_rates("counts", "user", ACTIONS)},
            ln(1 + (requests.time - counts.time) / 3600) / 3 AS pause,
            {moment_of(f"requests.time + {BEIJING}")},
            coalesce(list_slice(events, greatest(engaged - {HISTORY - 1}, 1), engaged), []) AS
            recent,
            list_transform(recent, lambda event: event.video) AS history,
            list_transform(recent, lambda event: event.done) AS history_actions,
            list_transform(recent, lambda event: ln(1 + (requests.time - event.time) / 3600) / 5)
            AS history_age
        FROM requests JOIN lists USING (request)
        ASOF LEFT JOIN user_counts AS counts
            ON requests.user = counts.user AND requests.time > counts.time
        LEFT JOIN past ON requests.user = past.user
        LEFT JOIN people ON requests.user = people.user) ORDER BY request"""


def _age(time: str) -> str:
    """SQL for the logarithm of days since the upload; NULL if that is unknown."""
    # greatest() leaves NULL out.
    return f"if(uploaded IS NULL, NULL, ln(1 + greatest({time} - uploaded, 0) / 86400) / 3)"


def _midnight(data: ConfigDict, key: str) -> int:
    """When the day begins in Beijing that a key of `data` names."""
    try:
        midnight = datetime.datetime.fromisoformat(f"{data[key]}T00:00:00+00:00")
    except ValueError as error:
        raise UserError(f"data.{key}={data[key]!r} is not a date like 2022-04-22") from error
    return int(midnight.timestamp()) - BEIJING


CONVERTER = Converter(
    ("session_minutes", "random_session_minutes", "impressions_per_request", "negatives", "test",
     "validation_from", "test_from", "train_requests", "validation_requests", "test_requests",
     "max_users"),
    find_files,
    write,
)  # fmt: skip
