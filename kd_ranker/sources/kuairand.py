"""KuaiRand as a log: sessions of a short-video feed, and a test set that no policy has chosen.

C. Gao, S. Li, Y. Zhang et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with
Randomly Exposed Videos", CIKM 2022. `docs/kuairand.md` describes requests, splits and columns.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.converted import Converter, columns, connect, draw, find_raw, moment_of

VARIANTS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
TESTS = ("random", "standard")
# Action -> its prior rate, which counts as much as 20 impressions.
ACTIONS = {"long_view": 0.3, "is_like": 0.02, "is_forward": 0.001, "is_follow": 0.001}
ACTIONS |= {"is_comment": 0.002, "is_click": 0.4}
CANDIDATE_ACTIONS = ("long_view", "is_like", "is_forward")
HISTORY = 100  # the latest engaged impressions of a user
LOGS_END = 1_652_025_600  # 2022-05-09 00:00 in Beijing, after the last day
BEIJING = 8 * 3600  # the log's dates are of this time zone, UTC+8 without daylight saving
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_CATEGORIES = ("user_active_degree", *(f"{name}_range" for name in USER_NUMBERS))
USER_CATEGORIES += tuple(f"onehot_feat{number}" for number in range(18))
_LOGS = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_OTHERS = ("log_random_4_22_to_5_08", "user_features", "video_features_basic")


def find_files(data: ConfigDict) -> list[Path]:
    """The files of a variant; the standard logs of 27K are published in two parts."""
    variant = data.name.removeprefix("kuairand_")
    parts = ("_part1", "_part2") if variant == "27k" else ("",)
    names = [f"data/{log}_{variant}{part}.csv" for log in _LOGS for part in parts]
    names += [f"data/{other}_{variant}.csv" for other in _OTHERS]
    return find_raw(data, names, f"{VARIANTS[variant]} of https://zenodo.org/records/10439422")


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    with connect(data, folder) as con:
        for stem in ("log", "user", "video"):
            raw = [str(file) for file in files if file.name.startswith(stem)]
            con.read_csv(raw, header=True, all_varchar=True).create_view(f"{stem}_rows")
        con.execute(rf"""
            CREATE MACRO lift(done, seen, rate) AS ln((done + 20 * rate) / ((seen + 20) * rate));
            CREATE MACRO positive(text) AS nullif(greatest(try_cast(text AS DOUBLE), 0), 0);
            CREATE TABLE users AS SELECT DISTINCT ON (user_id) user_id::INT AS user,
                {", ".join(USER_CATEGORIES)},
                ln(1 + coalesce(positive({columns(USER_NUMBERS)}), 0)) / 5 AS '\1',
                coalesce(try_cast({columns(USER_FLAGS)} AS DOUBLE) = 1, false) AS '\1'
                FROM user_rows {draw(data.seed, "user_id", data.max_users)};
            CREATE TABLE log AS SELECT *, CASE WHEN user + video + time IS NULL
                THEN error('a row of a log lacks user, video or time')
                WHEN time < epoch(DATE '{data.validation_from}') - {BEIJING} THEN 'train'
                WHEN time < epoch(DATE '{data.test_from}') - {BEIJING} THEN 'validation'
                ELSE 'test' END AS split, {" OR ".join(ACTIONS)} AS engaged
                FROM (SELECT row_number() OVER () AS n, user_id::INT AS user,
                video_id::INT AS video, time_ms::BIGINT // 1000 AS time,
                coalesce(tab::INT, -1) AS tab, coalesce(is_rand::INT, 0) = 1 AS random,
                coalesce({columns(ACTIONS)}::INT, 0) = 1 AS '\1' FROM log_rows)
                {"SEMI JOIN users USING (user)" * bool(data.max_users)}""")
        # Known after each second: lifts, which are 0 before the first impression.
        for of in ("user", "video"):
            lifts = (f"lift({act}, seen, {rate}) AS {of}_{act}" for act, rate in ACTIONS.items())
            con.execute(rf"""
                CREATE TABLE {of}_counts AS SELECT {of}, since, engaged,
                    ln(1 + seen) / 5 AS {of}_seen, {", ".join(lifts)}
                    FROM (SELECT {of}, time AS since, sum(count(*)) OVER seconds AS seen,
                    sum(count_if({columns([*ACTIONS, "engaged"])})) OVER seconds AS '\1' FROM log
                    GROUP BY {of}, time WINDOW seconds AS (PARTITION BY {of} ORDER BY time))""")
        con.execute(_candidates(data))
        con.sql(_rows()).write_parquet(str(folder / "log.parquet"), compression="zstd")


def _candidates(data: ConfigDict) -> str:
    """SQL for `requests` and `candidates`: shown videos, and those of drawn earlier impressions."""
    session, number = "PARTITION BY split, user, tab", data.impressions_per_request
    most = " ".join(f"WHEN '{of}' THEN {data[f'{of}_requests'] or 1 << 40}" for of in SPLITS)
    return rf"""
        CREATE TABLE placed AS WITH cut AS (SELECT *, coalesce(time - lag(time) OVER ({session}
                ORDER BY time, n) >= 60 * if(random, {data.random_session_minutes},
                {data.session_minutes}), true) AS is_first
            FROM log WHERE random = (split <> 'train' AND {data.test == "random"})),
        sessions AS (SELECT *, count_if(is_first) OVER ({session} ORDER BY time, n) AS session
            FROM cut)
        SELECT *, row_number() OVER ({session}, session ORDER BY time, n) - 1 AS turn,
            turn // {number} AS block FROM sessions;
        CREATE TABLE requests AS SELECT split, user, tab, session, block, time,
            row_number() OVER (ORDER BY time, n) - 1 AS request
            FROM (FROM placed WHERE turn % {number} = 0 QUALIFY row_number() OVER (PARTITION BY
            split {draw(data.seed, "user, tab, time", 0)}) <= CASE split {most} END);
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


def _rows() -> str:
    """SQL for the rows of the log; candidates in the order in which they were shown."""
    done = ", ".join(f"{action}::TINYINT" for action in ACTIONS)
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
            coalesce({columns(f"video_{of}" for of in ("seen", *CANDIDATE_ACTIONS))}, 0) AS '\1'
            FROM candidates LEFT JOIN films USING (video) ASOF LEFT JOIN video_counts AS counts
                ON candidates.video = counts.video AND time > since),
        lists AS (SELECT _request AS request,
            list(COLUMNS('^([^_].*)$') ORDER BY position NULLS LAST, item) AS '\1'
            FROM known GROUP BY _request),
        past AS (SELECT user, list(struct_pack(video, time, done := [{done}]) ORDER BY time, n)
            AS events FROM log WHERE engaged GROUP BY user)
        SELECT * EXCLUDE recent FROM (SELECT lists.*, requests.user, requests.time, split,
            nullif(tab, -1) AS tab, users.* EXCLUDE user,
            coalesce({columns(f"user_{of}" for of in ("seen", *ACTIONS))}, 0) AS '\1',
            ln(1 + (requests.time - since) / 3600) / 3 AS pause,
            {moment_of(f"requests.time + {BEIJING}")},
            coalesce(events[greatest(engaged - {HISTORY - 1}, 1):engaged], []) AS recent,
            [of.video for of in recent] AS history, [of.done for of in recent] AS history_actions,
            [ln(1 + (requests.time - of.time) / 3600) / 5 for of in recent] AS history_age
        FROM requests JOIN lists USING (request) LEFT JOIN past USING (user)
        LEFT JOIN users USING (user) ASOF LEFT JOIN user_counts AS counts
            ON requests.user = counts.user AND requests.time > since) ORDER BY request"""


_KEYS = (
    *("session_minutes", "random_session_minutes", "impressions_per_request", "negatives", "test"),
    *("validation_from", "test_from", "max_users", *(f"{split}_requests" for split in SPLITS)),
)
CONVERTER = Converter(_KEYS, find_files, write)
