"""KuaiRand's files in the published layout, with rows that are made up."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

Row = dict[str, object]

STANDARD_1, STANDARD_2 = "log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08"
RANDOM = "log_random_4_22_to_5_08"
APRIL_8 = 1_649_376_000 - 8 * 3600  # midnight in Beijing, as seconds since 1970, UTC
APRIL_22 = APRIL_8 + 14 * 86400
MAY_9 = APRIL_22 + 17 * 86400
ACTIONS = {
    "c": "is_click", "l": "is_like", "f": "is_follow", "t": "is_comment", "s": "is_forward",
    "w": "long_view", "r": "is_rand",
}  # fmt: skip


def impression(user: int, video: int, time: float, done: str = "", tab: int = 1) -> Row:
    """A row of a log; `done` holds letters of `ACTIONS`."""
    row = {"user_id": user, "video_id": video, "time_ms": round(1000 * time), "is_hate": 0}
    actions = {name: int(letter in done) for letter, name in ACTIONS.items()}
    return row | actions | {"tab": tab}


def user(number: int, **changes: object) -> Row:
    """A row of the user features; some codes of the real file are written as 4.0."""
    row = {
        "user_id": number,
        "user_active_degree": "full_active",
        **dict.fromkeys(("is_lowactive_period", "is_live_streamer"), 0),
        "is_video_author": 1,
        "follow_user_num": 5,
        "follow_user_num_range": "(0,10]",
        **dict.fromkeys(("fans_user_num", "fans_user_num_range"), 0),
        **dict.fromkeys(("friend_user_num", "friend_user_num_range"), 0),
        "register_days": 107,
        "register_days_range": "91-180",
    }
    codes = {}
    for place in range(18):
        codes[f"onehot_feat{place}"] = "0.0" if place == 4 or place >= 12 else "0"
    return row | codes | changes


def video(number: int, **changes: object) -> Row:
    """A row of the basic video features."""
    row = {
        "video_id": number, "author_id": 100 + number, "video_type": "NORMAL",
        "upload_dt": "2022-04-01", "upload_type": "ShortImport", "visible_status": "0.0",
        "video_duration": "17200.0", "server_width": "720.0", "server_height": "1280.0",
        "music_id": 9155697141, "music_type": "9.0", "tag": "39",
    }  # fmt: skip
    return row | changes


def write(directory: Path, rows: dict[str, Iterable[Row]], variant: str = "pure") -> Path:
    """Writes the five files to `directory/data`, each with its header, and returns `directory`.

    `rows` maps the name of a file without its variant to rows. The logs of 27K, which are published
    in two parts, get two.
    """
    (directory / "data").mkdir(parents=True, exist_ok=True)
    headers = {"user_features": user(0), "video_features_basic": video(0)}
    for stem, stem_rows in rows.items():
        lines = list(stem_rows)
        header = headers.get(stem, impression(0, 0, 0))
        parts = {"": lines}
        if variant == "27k" and stem.startswith("log_standard"):
            half = len(lines) // 2
            parts = {"_part1": lines[:half], "_part2": lines[half:]}
        for part, part_lines in parts.items():
            path = directory / "data" / f"{stem}_{variant}{part}.csv"
            pd.DataFrame(part_lines, columns=[*header]).to_csv(path, index=False)
    return directory


def random_rows(seed: int) -> dict[str, list[Row]]:
    """Rows of a small feed: sessions, several tabs, ties in time, gaps in ids, cells left empty.

    The last two users and videos have no row in the feature files.
    """
    generator = np.random.default_rng(seed)
    users, videos = 2 * np.arange(6) + 5, 3 * np.arange(40) + 1

    def log(number: int, start: int, end: int, done: str = "") -> list[Row]:
        # Moments of eight impressions of a user on average, some of them in the same second, and of
        # few videos, so that some come twice.
        moments = generator.integers(start, end - 300, number // 8)
        watchers = generator.choice(users, len(moments))
        moment = generator.integers(len(moments), size=number)
        time = moments[moment] + generator.integers(0, 400, number) * 0.5
        place = (3 * moment + generator.integers(0, 20, number)) % 40
        rows = zip(watchers[moment].tolist(), videos[place].tolist(), time.tolist(), strict=True)
        impressions = []
        for watcher, video_id, second in sorted(rows, key=lambda row: row[2]):
            actions = [letter for letter in "clftsw" if generator.random() < 0.25]
            tab = int(generator.choice([0, 1, 14], p=[0.1, 0.8, 0.1]))
            impressions.append(impression(watcher, video_id, second, "".join(actions) + done, tab))
        return impressions

    def maybe(value: object) -> object:
        return "" if generator.random() < 0.2 else value

    return {
        STANDARD_1: log(200, APRIL_8, APRIL_22),
        STANDARD_2: log(200, APRIL_22, MAY_9),
        RANDOM: log(120, APRIL_22, MAY_9, "r"),
        "user_features": [
            user(id_, fans_user_num=10 * id_, onehot_feat4=maybe("4.0"), onehot_feat17=maybe("1.0"))
            for id_ in generator.permutation(users[:-2]).tolist()
        ],
        "video_features_basic": [
            video(id_, upload_dt=maybe(f"2022-04-{id_ % 28 + 1:02d}"),
                tag=maybe(f"{id_ % 7},{id_}"),
                video_duration=maybe(f"{1000 * id_}.0"), music_type=maybe("4.0"))
            for id_ in generator.permutation(videos[:-2]).tolist()
        ],
    }  # fmt: skip
