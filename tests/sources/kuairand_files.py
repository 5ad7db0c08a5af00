"""KuaiRand's files in the published layout, with rows that are made up."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,"
    "is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,"
    "is_profile_enter,is_rand,tab"
)
USER_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,"
    "follow_user_num,follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,"
    "friend_user_num_range,register_days,register_days_range,"
    + ",".join(f"onehot_feat{number}" for number in range(18))
)
VIDEO_HEADER = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag"
)
STANDARD_1, STANDARD_2 = "log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08"
RANDOM = "log_random_4_22_to_5_08"
HEADERS = {
    STANDARD_1: LOG_HEADER,
    STANDARD_2: LOG_HEADER,
    RANDOM: LOG_HEADER,
    "user_features": USER_HEADER,
    "video_features_basic": VIDEO_HEADER,
}

BEIJING = 8 * 3600
APRIL_8 = 1_649_376_000 - BEIJING  # midnight in Beijing, as seconds since 1970, UTC
APRIL_22 = APRIL_8 + 14 * 86400
MAY_9 = APRIL_22 + 17 * 86400


def impression(user: int, video: int, time: float, done: str = "", tab: int = 1) -> str:
    """A row of a log; `done` holds letters: c(lick), l(ike), f(ollow), t(alk), s(hare), w(atch)."""
    flags = {letter: int(letter in done) for letter in "clftswr"}
    local = np.datetime64(int(time + BEIJING), "s").astype(str)
    date, clock = local[:10].replace("-", ""), local[11:13].lstrip("0") + "00"
    return (
        f"{user},{video},{date},{clock},{round(1000 * time)},{flags['c']},{flags['l']},"
        f"{flags['f']},{flags['t']},{flags['s']},0,{flags['w']},1385,20990,0,0,0,{flags['r']},{tab}"
    )


def user(number: int, **changes: object) -> str:
    """A row of the user features; some codes of the real file are written as 4.0."""
    cells = {
        "user_id": number,
        "user_active_degree": "full_active",
        "is_lowactive_period": 0,
        "is_live_streamer": 0,
        "is_video_author": 1,
        "follow_user_num": 5,
        "follow_user_num_range": '"(0,10]"',
        "fans_user_num": 0,
        "fans_user_num_range": "0",
        "friend_user_num": 0,
        "friend_user_num_range": "0",
        "register_days": 107,
        "register_days_range": "91-180",
        **{
            f"onehot_feat{index}": "0.0" if index == 4 or index >= 12 else "0"
            for index in range(18)
        },
    }
    return ",".join(str(cell) for cell in (cells | changes).values())


def video(number: int, **changes: object) -> str:
    """A row of the basic video features."""
    cells = {
        "video_id": number,
        "author_id": 100 + number,
        "video_type": "NORMAL",
        "upload_dt": "2022-04-01",
        "upload_type": "ShortImport",
        "visible_status": "0.0",
        "video_duration": "17200.0",
        "server_width": "720.0",
        "server_height": "1280.0",
        "music_id": 9155697141,
        "music_type": "9.0",
        "tag": "39",
    }
    return ",".join(str(cell) for cell in (cells | changes).values())


def write(directory: Path, rows: dict[str, Iterable[str]], variant: str = "pure") -> Path:
    """Writes the five files to `directory/data`, each with its header, and returns `directory`.

    `rows` maps the name of a file without its variant to rows. The logs of 27K, which are published
    in two parts, get two.
    """
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    for stem, header in HEADERS.items():
        lines = list(rows[stem])
        parts = {f"{stem}_{variant}.csv": lines}
        if variant == "27k" and stem.startswith("log_standard"):
            half = len(lines) // 2
            parts = {
                f"{stem}_{variant}_part1.csv": lines[:half],
                f"{stem}_{variant}_part2.csv": lines[half:],
            }
        for name, part in parts.items():
            (data / name).write_text("\n".join([header, *part]) + "\n")
    return directory


def random_rows(
    seed: int, users: int = 6, videos: int = 40, standard: int = 400, exposed: int = 120
) -> dict[str, list[str]]:
    """Rows of a small feed: sessions, several tabs, ties in time, gaps in ids, cells left empty.

    The last two users and videos have no row in the feature files.
    """
    generator = np.random.default_rng(seed)
    video_id = 3 * np.arange(videos) + 1

    def log(number: int, start: int, end: int, random: bool) -> list[str]:
        # Moments of eight impressions of a user on average, some of them in the same second.
        moments = generator.integers(start, end, max(number // 8, 1))
        watchers = 2 * generator.integers(users, size=len(moments)) + 5
        moment = generator.integers(len(moments), size=number)
        time = moments[moment] + generator.integers(0, 400, number) * 0.5
        # Few videos a moment, so that some come twice.
        place = (3 * moment + generator.integers(0, 20, number)) % videos
        return [
            impression(
                int(watchers[moment[row]]),
                int(video_id[place[row]]),
                float(time[row]),
                "".join(letter for letter in "clftsw" if generator.random() < 0.25) + "r" * random,
                int(generator.choice([0, 1, 14], p=[0.1, 0.8, 0.1])),
            )
            for row in np.argsort(time)
        ]

    def maybe(value: object) -> object:
        return "" if generator.random() < 0.2 else value

    degrees = ("full_active", "high_active", "UNKNOWN")
    return {
        STANDARD_1: log(standard // 2, APRIL_8, APRIL_22 - 300, False),
        STANDARD_2: log(standard - standard // 2, APRIL_22, MAY_9 - 300, False),
        RANDOM: log(exposed, APRIL_22, MAY_9 - 300, True),
        "user_features": [
            user(
                2 * number + 5,
                user_active_degree=degrees[generator.integers(3)],
                fans_user_num=int(generator.integers(2000)),
                onehot_feat3=int(generator.integers(1471)),
                onehot_feat4=maybe(f"{generator.integers(15)}.0"),
                onehot_feat17=maybe("1.0"),
            )
            for number in generator.permutation(users - 2)
        ],
        "video_features_basic": [
            video(
                int(number),
                author_id=int(generator.integers(8_000_000)),
                upload_dt=maybe(f"2022-04-{generator.integers(1, 29):02d}"),
                video_duration=maybe(f"{generator.integers(1000, 90000)}.0"),
                music_type=maybe("4.0"),
                tag=maybe(f'"{generator.integers(60)},{generator.integers(60)}"'),
            )
            for number in generator.permutation(video_id[: videos - 2])
        ],
    }
