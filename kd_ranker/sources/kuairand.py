"""KuaiRand as a log: sessions of a short-video feed, and a test set that no policy has chosen.

C. Gao, S. Li, Y. Zhang et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with
Randomly Exposed Videos", CIKM 2022. `docs/datasets.md` describes requests, splits and columns.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, columns, connect, draw, find_raw, moment_of

VARIANTS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
TESTS = ("random", "standard")
# Action -> its prior rate, which counts as much as 20 impressions.
ACTIONS = {
    "long_view": 0.3,
    "is_like": 0.02,
    "is_forward": 0.001,
    "is_follow": 0.001,
    "is_comment": 0.002,
    "is_click": 0.4,
}
CANDIDATE_ACTIONS = ("long_view", "is_like", "is_forward")
HISTORY = 100  # the latest engaged impressions of a user
LOGS_END = 1_652_025_600  # 2022-05-09 00:00 in Beijing, after the last day
BEIJING = 8 * 3600  # the log's dates are of this time zone, UTC+8 without daylight saving
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_CATEGORIES = (
    "user_active_degree",
    *(f"{name}_range" for name in USER_NUMBERS),
    *(f"onehot_feat{number}" for number in range(18)),
)
_STANDARD_LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_OTHER_FILES = ("log_random_4_22_to_5_08", "user_features", "video_features_basic")


def find_files(data: ConfigDict) -> list[Path]:
    """Find the files of a variant; the standard logs of 27K are published in two parts."""
    variant = data.name.removeprefix("kuairand_")
    parts = ("_part1", "_part2") if variant == "27k" else ("",)
    names = [f"data/{log}_{variant}{part}.csv" for log in _STANDARD_LOGS for part in parts]
    names += [f"data/{file}_{variant}.csv" for file in _OTHER_FILES]
    return find_raw(data, names, f"{VARIANTS[variant]} of https://zenodo.org/records/10439422")


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    with connect(data, folder) as con:
        for stem in ("log", "user", "video"):
            raw = [str(file) for file in files if file.name.startswith(stem)]
            con.read_csv(raw, header=True, all_varchar=True).create_view(f"{stem}_rows")
        con.execute("""
            CREATE MACRO lift(done, seen, rate) AS ln((done + 20 * rate) / ((seen + 20) * rate));
            CREATE MACRO positive(text) AS nullif(greatest(try_cast(text AS DOUBLE), 0), 0)""")
        con.execute(_create_users(data))
        con.execute(_create_log(data))
        con.execute(_create_counts("user"))
        con.execute(_create_counts("video"))
        con.execute(_create_requests(data))
        con.execute(_create_candidates(data))
        con.sql(_select_rows()).write_parquet(str(folder / "log.parquet"), compression="zstd")


def _create_users(data: ConfigDict) -> str:
    """SQL for `users`: the drawn users with their features."""
    return rf"""
        CREATE TABLE users AS SELECT DISTINCT ON (user_id) user_id::INT AS user,
            {", ".join(USER_CATEGORIES)},
            ln(1 + coalesce(positive({columns(USER_NUMBERS)}), 0)) / 5 AS '\1',
            coalesce(try_cast({columns(USER_FLAGS)} AS DOUBLE) = 1, false) AS '\1'
            FROM user_rows {draw(data.seed, "user_id", data.max_users)}"""


def _create_log(data: ConfigDict) -> str:
    """SQL for `log`: the impressions of the drawn users, each with its split."""
    only_drawn = "SEMI JOIN users USING (user)" if data.max_users else ""
    return rf"""
        CREATE TABLE log AS SELECT *, CASE WHEN user + video + time IS NULL
            THEN error('a row of a log lacks user, video or time')
            WHEN time < epoch(DATE '{data.validation_from}') - {BEIJING} THEN 'train'
            WHEN time < epoch(DATE '{data.test_from}') - {BEIJING} THEN 'validation'
            ELSE 'test' END AS split, {" OR ".join(ACTIONS)} AS engaged
            FROM (SELECT row_number() OVER () AS n, user_id::INT AS user,
            video_id::INT AS video, time_ms::BIGINT // 1000 AS time,
            coalesce(tab::INT, -1) AS tab, coalesce(is_rand::INT, 0) = 1 AS random,
            coalesce({columns(ACTIONS)}::INT, 0) = 1 AS '\1' FROM log_rows) {only_drawn}"""


def _create_counts(owner: str) -> str:
    """SQL for the counts of a user or a video that are known after each second.

    They are the number of impressions, and the lift of each action, 0 before the first impression.
    """
    lifts = [
        f"lift({action}, seen, {rate}) AS {owner}_{action}" for action, rate in ACTIONS.items()
    ]
    return rf"""
        CREATE TABLE {owner}_counts AS SELECT {owner}, since, engaged,
            ln(1 + seen) / 5 AS {owner}_seen, {", ".join(lifts)}
            FROM (SELECT {owner}, time AS since, sum(count(*)) OVER seconds AS seen,
            sum(count_if({columns([*ACTIONS, "engaged"])})) OVER seconds AS '\1' FROM log
            GROUP BY {owner}, time WINDOW seconds AS (PARTITION BY {owner} ORDER BY time))"""


def _create_requests(data: ConfigDict) -> str:
    """SQL for `placed`, the impressions with their places in sessions, and for `requests`.

    A request is a block of impressions of a session.
    """
    session = "PARTITION BY split, user, tab"
    block_size = data.impressions_per_request
    is_random_test = data.test == "random"
    limits = []
    for split in SPLITS:
        most = data[f"{split}_requests"] or 1 << 40
        limits.append(f"WHEN '{split}' THEN {most}")
    return rf"""
        CREATE TABLE placed AS WITH cut AS (SELECT *, coalesce(time - lag(time) OVER ({session}
                ORDER BY time, n) >= 60 * if(random, {data.random_session_minutes},
                {data.session_minutes}), true) AS is_first
            FROM log WHERE random = (split <> 'train' AND {is_random_test})),
        sessions AS (SELECT *, count_if(is_first) OVER ({session} ORDER BY time, n) AS session
            FROM cut)
        SELECT *, row_number() OVER ({session}, session ORDER BY time, n) - 1 AS turn,
            turn // {block_size} AS block FROM sessions;
        CREATE TABLE requests AS SELECT split, user, tab, session, block, time,
            row_number() OVER (ORDER BY time, n) - 1 AS request
            FROM (FROM placed WHERE turn % {block_size} = 0 QUALIFY row_number() OVER (PARTITION BY
            split {draw(data.seed, "user, tab, time", 0)}) <= CASE split {" ".join(limits)} END)"""


def _create_candidates(data: ConfigDict) -> str:
    """SQL for `candidates`: shown videos, and those of drawn earlier impressions."""
    return rf"""
        CREATE TABLE shown AS SELECT request, requests.time, video, row_number() OVER (
                PARTITION BY request ORDER BY min((placed.time, n))) AS position,
            bool_or({columns(ACTIONS)})::TINYINT AS '\1' FROM placed JOIN requests
            USING (split, user, tab, session, block) GROUP BY request, requests.time, video;
        CREATE TABLE standard AS SELECT video, time, row_number() OVER (ORDER BY time, n) AS spot
            FROM log WHERE NOT random;
        CREATE TABLE candidates AS FROM shown UNION ALL BY NAME (
            WITH draws AS (SELECT request, requests.time, draw, 1 +
                hash(concat_ws(' ', {data.seed}, user, tab, requests.time, draw)) % last AS spot
                FROM requests ASOF JOIN (SELECT time, max(spot) AS last FROM standard
                GROUP BY time) AS known ON requests.time > known.time,
                range({8 * data.negatives}) AS draws(draw))
            SELECT request, draws.time, video FROM draws JOIN standard USING (spot)
            ANTI JOIN shown USING (request, video) GROUP BY request, draws.time, video QUALIFY
                row_number() OVER (PARTITION BY request ORDER BY min(draw)) <= {data.negatives})"""


def _select_rows() -> str:
    """SQL for the rows of the log; candidates in the order in which they were shown."""
    done = ", ".join(f"{action}::TINYINT" for action in ACTIONS)
    video_counts = columns(f"video_{count}" for count in ("seen", *CANDIDATE_ACTIONS))
    user_counts = columns(f"user_{count}" for count in ("seen", *ACTIONS))
    return rf"""
        WITH films AS (SELECT DISTINCT ON (video_id) video_id::INT AS video, author_id, music_id,
            video_type, upload_type, music_type, string_split(tag, ',') AS tags,
            ln(1 + positive(video_duration) / 1000) - 4 AS duration,
            ln(positive(server_height) / positive(server_width)) AS shape,
            epoch(try_cast(upload_dt AS DATE)) - {BEIJING} AS uploaded FROM video_rows),
        known AS (SELECT candidates.* EXCLUDE time RENAME (request AS _request, video AS item),
            films.* EXCLUDE (video, uploaded),
            ln(1 + (greatest({LOGS_END}, uploaded) - uploaded) / 86400) / 3 AS days_to_end,
            ln(1 + (greatest(time, uploaded) - uploaded) / 86400) / 3 AS days_old,
            coalesce({video_counts}, 0) AS '\1'
            FROM candidates LEFT JOIN films USING (video) ASOF LEFT JOIN video_counts AS counts
                ON candidates.video = counts.video AND time > since),
        lists AS (SELECT _request AS request,
            list(COLUMNS('^([^_].*)$') ORDER BY position NULLS LAST, item) AS '\1'
            FROM known GROUP BY _request),
        past AS (SELECT user, list(struct_pack(video, time, done := [{done}]) ORDER BY time, n)
            AS events FROM log WHERE engaged GROUP BY user)
        SELECT * EXCLUDE recent FROM (SELECT lists.*, requests.user, requests.time, split,
            nullif(tab, -1) AS tab, users.* EXCLUDE user,
            coalesce({user_counts}, 0) AS '\1',
            ln(1 + (requests.time - since) / 3600) / 3 AS pause,
            {moment_of(f"requests.time + {BEIJING}")},
            coalesce(events[greatest(engaged - {HISTORY - 1}, 1):engaged], []) AS recent,
            [event.video for event in recent] AS history,
            [event.done for event in recent] AS history_actions,
            [ln(1 + (requests.time - event.time) / 3600) / 5 for event in recent] AS history_age
        FROM requests JOIN lists USING (request) LEFT JOIN past USING (user)
        LEFT JOIN users USING (user) ASOF LEFT JOIN user_counts AS counts
            ON requests.user = counts.user AND requests.time > since) ORDER BY request"""


# With `seed`, the keys of `config.data` that decide the content of the log.
_KEYS = (
    "session_minutes",
    "random_session_minutes",
    "impressions_per_request",
    "negatives",
    "test",
    "validation_from",
    "test_from",
    "max_users",
    *(f"{split}_requests" for split in SPLITS),
)
CONVERTER = Converter(_KEYS, find_files, write)
