"""KuaiRand as a log: a hand-worked feed, and what no request may know."""

import collections

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.configs import kuairand
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.kuairand import find_files, write
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.registry import SOURCES
from tests.sources.kuairand_files import (
    APRIL_8,
    APRIL_22,
    RANDOM,
    STANDARD_1,
    STANDARD_2,
    impression,
    random_rows,
    user,
    video,
)  # fmt: skip
from tests.sources.kuairand_files import write as write_files

APRIL_29 = APRIL_22 + 7 * 86400
DAY = 86400


def config_of(folder, **changes):
    config = kuairand(changes.pop("variant", ""))
    config.data.path, config.data.dir = str(folder), str(folder.parent / "data")
    config.data.update({"allow": ALLOWABLE, "negatives": 5, **changes})
    return config


def rows_of(folder, **changes):
    """The log's rows by user, tab and time."""
    data = config_of(folder, **changes).data
    (folder / "log").mkdir(exist_ok=True)
    write(data, find_files(data), folder / "log")
    rows = pq.read_table(folder / "log" / "log.parquet").to_pylist()
    assert [row["request"] for row in rows] == list(range(len(rows)))
    return {(row["user"], row["tab"], row["time"]): row for row in rows}


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("feed") / "raw", random_rows(1))


def test_a_hand_worked_feed(tmp_path):
    rows = {
        STANDARD_1: [
            impression(5, 11, APRIL_8 + 100, "wl"),
            impression(5, 12, APRIL_8 + 101.5),
            impression(6, 12, APRIL_8 + 101, "c"),
            impression(5, 11, APRIL_8 + 1901, "s"),  # 30 minutes later: another session
            impression(5, 13, APRIL_8 + 1902, tab=2),  # another tab
            impression(5, 11, APRIL_8 + 1903, "l"),  # the same video again
        ],
        STANDARD_2: [impression(6, 14, APRIL_22 + 50, "w")],
        RANDOM: [
            impression(6, 13, APRIL_22 + 60, "wr"),
            impression(6, 13, APRIL_29 + 8 * 3600, "lr"),
        ],
        "user_features": [user(5, follow_user_num=1, onehot_feat2="")],
        "video_features_basic": [
            video(11, upload_dt="2022-04-05", tag="7,9"),
            video(12, upload_dt=""),
        ],
    }
    rows = rows_of(write_files(tmp_path / "raw", rows))
    assert [(*key, row["split"]) for key, row in rows.items()] == [
        (5, 1, APRIL_8 + 100, "train"),
        (6, 1, APRIL_8 + 101, "train"),
        (5, 1, APRIL_8 + 1901, "train"),
        (5, 2, APRIL_8 + 1902, "train"),
        (6, 1, APRIL_22 + 60, "validation"),
        (6, 1, APRIL_29 + 8 * 3600, "test"),
    ]
    first, _, again, other_tab, _, test = rows.values()
    assert (first["item"], first["is_like"], first["history"]) == ([11, 12], [1, 0], [])
    assert first["pause"] is None
    # Once, with all that was done; the others are drawn from what was shown before, to anybody.
    assert (again["item"], again["is_forward"], again["is_like"]) == (
        [11, 12],
        [1, None],
        [1, None],
    )
    assert again["position"] == [1, None]
    assert (again["history"], again["history_actions"]) == ([11], [[1, 1, 0, 0, 0, 0]])
    np.testing.assert_allclose(again["history_age"], [np.log(1 + 1801 / 3600) / 5])
    np.testing.assert_allclose(again["pause"], np.log1p(1800 / 3600) / 3)
    np.testing.assert_allclose(again["user_seen"], np.log(3) / 5)
    np.testing.assert_allclose(again["user_is_like"], np.log((1 + 20 * 0.02) / (22 * 0.02)))
    np.testing.assert_allclose(again["video_seen"], np.log([2, 3]) / 5)
    np.testing.assert_allclose(again["days_old"][0], np.log1p(3 + 1901 / DAY) / 3)
    assert (again["days_old"][1], again["days_to_end"][1]) == (None, None)
    np.testing.assert_allclose(again["follow_user_num"], np.log(2) / 5)
    assert again["onehot_feat2"] is None
    assert (again["tags"][0], again["author_id"][0]) == (["7", "9"], "111")
    assert test["follow_user_num"] is None  # in no line
    assert (test["weekday"], test["history"]) == (4, [12, 14, 13])
    np.testing.assert_allclose(
        [test["hour_sin"], test["hour_cos"]], np.sin([2.0944, 3.6652]), atol=1e-4
    )
    assert {*other_tab["item"]} == {13, 11, 12}


@pytest.mark.parametrize("test", ["random", "standard"])
def test_each_impression_of_a_split_is_in_one_request(feed, test):
    rows = rows_of(feed, test=test, impressions_per_request=3)
    times = {split: [r["time"] for r in rows.values() if r["split"] == split] for split in SPLITS}
    assert max(times["train"]) < APRIL_22 <= min(times["validation"])
    assert max(times["validation"]) < APRIL_29 <= min(times["test"])
    shown = sum(click is not None for row in rows.values() for click in row["is_click"])
    lines = random_rows(1)
    pool = lines[STANDARD_1] + lines[RANDOM if test == "random" else STANDARD_2]
    assert 0.7 * len(pool) < shown <= len(pool)  # a video twice in a request is one candidate
    for row in rows.values():
        positions = [position for position in row["position"] if position is not None]
        assert positions == list(range(1, len(positions) + 1))
        assert len(positions) <= 3
        assert len({*row["item"]}) == len(row["item"]) <= len(positions) + 5


def test_no_row_knows_what_comes_later(feed, tmp_path):
    end = APRIL_22 + 3 * DAY
    lines = random_rows(1)
    for log in (STANDARD_1, STANDARD_2, RANDOM):
        lines[log] = [line for line in lines[log] if line["time_ms"] < 1000 * end]
    changes = {"validation_from": "2022-04-15", "test_from": "2022-04-23", "test": "standard"}
    rows = rows_of(feed, **changes)
    early = rows_of(write_files(tmp_path / "raw", lines), **changes)
    compared = [key for key in early if key[2] < end - 3600]
    assert len(compared) > 20
    for key in compared:
        assert early[key] | {"request": 0} == rows[key] | {"request": 0}


def test_videos_are_drawn_as_often_as_they_were_shown(tmp_path):
    shown = [11] * 6 + [12] * 3 + [13] * 1
    first = [impression(1, video_, APRIL_8 + at) for at, video_ in enumerate(shown)]
    asked = [impression(user_, 14, APRIL_8 + 500) for user_ in range(2, 802)]
    rows = {
        STANDARD_1: first + asked,
        STANDARD_2: [],
        RANDOM: [impression(1, 15, APRIL_22 + 5, "r"), impression(1, 15, APRIL_29 + 5, "r")],
        "user_features": [user(1)],
        "video_features_basic": [video(11)],
    }
    rows = rows_of(write_files(tmp_path / "raw", rows), negatives=1)
    drawn = [row["item"] for key, row in rows.items() if key[0] > 1 and row["split"] == "train"]
    assert {items[0] for items in drawn} == {14}
    shares = collections.Counter(items[1] for items in drawn)
    np.testing.assert_allclose([shares[11], shares[12], shares[13]], [480, 240, 80], atol=60)
    kept = rows_of(tmp_path / "raw", negatives=1, train_requests=50, seed=3)
    assert collections.Counter(row["split"] for row in kept.values())["train"] == 50


@pytest.mark.parametrize("variant", ["1k", "27k"])
def test_the_variants_are_read_alike(feed, variant, tmp_path):
    rows = rows_of(write_files(tmp_path / "raw", random_rows(1), variant), variant=variant)
    assert rows == rows_of(feed)
    few = rows_of(feed, max_users=2)
    assert len({row["user"] for row in few.values()}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "KuaiRand-Pure of https"),
        ({"name": "kuairand_1k"}, "log_standard_4_08_to_4_21_1k.csv.* does not exist"),
        ({"test_from": "May"}, 'invalid date field format: "May", expected format is'),
        ({"test_from": "2022-04-22"}, "no request is left for the split 'validation'"),
    ],
)
def test_settings_and_files_at_fault_are_one_line(feed, changes, message):
    config = config_of(feed, **changes)
    with pytest.raises(UserError, match=message):
        SOURCES["kuairand_pure"].open_source(config.data, config.tasks, config.funnel)
