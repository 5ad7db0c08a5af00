"""Tests of the reading of KuaiRand's files."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_ranker.errors import UserError
from kd_ranker.sources import kuairand_files
from tests.sources import kuairand_files as layout
from tests.sources.kuairand_files import (
    APRIL_8,
    APRIL_22,
    RANDOM,
    STANDARD_1,
    STANDARD_2,
    impression,
)
from tests.sources.remembered import remembered

read_kuairand = remembered(kuairand_files.read_kuairand)


def read(path: Path, variant: str = "pure", **changes: int) -> kuairand_files.KuaiRand:
    return read_kuairand(
        path, variant, **{"author_rows": 50, "music_rows": 60, "seed": 0} | changes
    )


def few_rows() -> dict[str, list[str]]:
    """Users 3, 8 and 9, the last of whom no feature file knows; videos 2, 5 and 6, the same."""
    return {
        STANDARD_1: [
            impression(8, 5, APRIL_8 + 10.25, "cw", tab=4),
            impression(3, 2, APRIL_8 + 7, "lf"),
        ],
        STANDARD_2: [impression(9, 6, APRIL_22 + 1.999, "ts"), impression(3, 5, APRIL_8 + 5)],
        RANDOM: [impression(8, 2, APRIL_22 + 3, "wr", tab=0)],
        "user_features": [
            layout.user(
                8, fans_user_num=10, is_live_streamer=-124, register_days="", onehot_feat12=""
            ),
            layout.user(3, user_active_degree="UNKNOWN", onehot_feat12="1.0"),
            layout.user(77),
        ],
        "video_features_basic": [
            layout.video(5, upload_dt="2022-04-10", tag='"12,65,12"', author_id="7.0"),
            layout.video(99),
            layout.video(
                2, video_duration="", server_width="", music_type="", tag="", author_id="",
                upload_dt="0000-00-00",
            ),
            layout.video(4),  # occurs in no log, as 99
        ],
    }  # fmt: skip


def test_the_log_of_a_worked_example(tmp_path: Path) -> None:
    log = read(layout.write(tmp_path, few_rows())).log
    # Users 3, 8, 9 and videos 2, 5, 6 become 0, 1, 2; sorted by user and time.
    assert log.user.tolist() == [0, 0, 1, 1, 2]
    assert log.item.tolist() == [1, 0, 1, 0, 2]
    expected = [APRIL_8 + 5, APRIL_8 + 7, APRIL_8 + 10, APRIL_22 + 3, APRIL_22 + 1]
    assert log.time.tolist() == expected
    assert log.tab.tolist() == [1, 1, 4, 0, 1]
    assert log.is_random.tolist() == [False, False, False, True, False]
    tasks = list(kuairand_files.COLUMN_OF_TASK)
    done = [
        [task for bit, task in enumerate(tasks) if signals >> bit & 1]
        for signals in log.signals.tolist()
    ]
    assert done == [[], ["like", "follow"], ["watch", "click"], ["watch"], ["share", "comment"]]
    dtypes = [getattr(log, field.name).dtype for field in dataclasses.fields(log)]
    assert sum(dtype.itemsize for dtype in dtypes) == 14


def test_the_users_of_a_worked_example(tmp_path: Path) -> None:
    users = read(layout.write(tmp_path, few_rows())).users
    np.testing.assert_allclose(
        users.features,
        [
            [np.log(6) / 5, 0, 0, np.log(108) / 5, 0, 0, 1],
            [np.log(6) / 5, np.log(11) / 5, 0, 0, 0, 0, 1],
            [0] * 7,
        ],
        rtol=1e-6,
    )
    degree = kuairand_files.USER_CATEGORIES.index("user_active_degree")
    code12 = kuairand_files.USER_CATEGORIES.index("onehot_feat12")
    # In the order in which the file names them, users who do not occur included.
    assert users.category[:, degree].tolist() == [1, 0, -1]
    assert users.sizes[degree] == 2
    assert users.category[:, code12].tolist() == [0, -1, -1]
    assert users.sizes[code12] == 2
    assert (users.category[2] == -1).all()


def test_the_videos_of_a_worked_example(tmp_path: Path) -> None:
    videos = read(layout.write(tmp_path, few_rows())).videos
    np.testing.assert_allclose(videos.seconds, [np.nan, 17.2, np.nan], rtol=1e-6)
    np.testing.assert_allclose(videos.shape, [np.nan, np.log(1280 / 720), np.nan], rtol=1e-6)
    unknown = kuairand_files.NO_TIME
    assert videos.upload_time.tolist() == [unknown, APRIL_8 + 2 * 86400, unknown]
    author, music, kind, upload, music_type, *tags = videos.category.T
    assert author.tolist() == [-1, kuairand_files.hash_rows(np.array([7.0]), 50)[0], -1]
    assert (music[:2] == kuairand_files.hash_rows(np.array([9155697141.0]), 60)[0]).all()
    assert kind.tolist() == upload.tolist() == [0, 0, -1]
    assert music_type.tolist() == [-1, 0, -1]
    assert np.stack(tags, 1).tolist() == [[-1] * 4, [0, 1, -1, -1], [-1] * 4]
    assert videos.sizes == (50, 60, 1, 1, 1, 2)


@pytest.mark.parametrize("variant", kuairand_files.VARIANTS)
@pytest.mark.parametrize("below", ["", "data"])
def test_every_variant_is_found_in_its_folder_and_above(
    tmp_path: Path, variant: str, below: str
) -> None:
    rows = layout.random_rows(0)
    log = read(layout.write(tmp_path, rows, variant) / below, variant).log
    assert len(log.user) == sum(len(rows[stem]) for stem in (STANDARD_1, STANDARD_2, RANDOM))


def test_parts_hold_what_the_whole_holds(tmp_path: Path) -> None:
    rows = layout.random_rows(1)
    # Where time does not tell, the order of the parts does.
    rows[STANDARD_1] = [impression(5, video, APRIL_8) for video in (4, 10, 1, 7)]
    parts = read(layout.write(tmp_path / "parts", rows, "27k"), "27k")
    whole = layout.write(tmp_path / "whole", rows, "1k")
    for file in (whole / "data").iterdir():
        file.rename(file.with_name(file.name.replace("1k", "27k")))
    for one, other in zip(
        (parts.log, parts.users, parts.videos), dataclasses.astuple(read(whole, "27k")), strict=True
    ):
        for left, right in zip(dataclasses.astuple(one), other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_random_logs_against_the_csv_module(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(3))
    lines = []
    for stem in (STANDARD_1, STANDARD_2, RANDOM):
        with (path / "data" / f"{stem}_pure.csv").open() as file:
            lines += list(csv.DictReader(file))
    users = sorted({int(line["user_id"]) for line in lines})
    videos = sorted({int(line["video_id"]) for line in lines})
    signals = [*kuairand_files.COLUMN_OF_TASK.values(), "is_rand"]
    expected = [
        (
            users.index(int(line["user_id"])),
            int(line["time_ms"]) // 1000,
            videos.index(int(line["video_id"])),
            sum(int(line[column]) << bit for bit, column in enumerate(signals)),
            int(line["tab"]),
        )
        for line in lines
    ]
    log = read(path).log
    columns = (log.user, log.time, log.item, log.signals, log.tab)
    found = zip(*(column.tolist() for column in columns), strict=True)
    # The sort is stable, so ties keep the order of the files.
    assert list(found) == sorted(expected, key=lambda row: row[:2])


def test_a_sample_of_users_is_seeded_and_drops_the_rows_of_all_others(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(4))
    everything = read(path)
    samples = set()
    for seed in (0, 1, 2, 3, 0):
        some = read(path, max_users=2, seed=seed)
        assert len(some.users.features) == 2
        samples.add(tuple(some.log.time.tolist()))
        # Each of the two has all the rows that it had.
        times = [tuple(everything.log.time[everything.log.user == user]) for user in range(6)]
        assert all(tuple(some.log.time[some.log.user == user]) in times for user in range(2))
        # The categories keep their sizes, which are of the whole file.
        assert some.users.sizes == everything.users.sizes
    assert 2 < len(samples) < 5, "the same seed draws the same users"
    # Four are in the user features, and asking for more keeps all of those.
    assert len(read(path, max_users=100).users.features) == 4


def test_the_sample_does_not_depend_on_the_order_of_the_users(tmp_path: Path) -> None:
    rows = layout.random_rows(4)
    one = read(layout.write(tmp_path / "one", rows), max_users=2)
    rows["user_features"].reverse()
    other = read(layout.write(tmp_path / "other", rows), max_users=2)
    np.testing.assert_array_equal(one.log.time, other.log.time)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.integers(1, 1000))
def test_equal_ids_share_a_row_and_rows_are_in_range(ids: list[int], rows: int) -> None:
    def finalised(bits: int) -> int:
        """MurmurHash3's fmix64, in Python's whole numbers."""
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            bits = (bits ^ bits >> 33) * factor % 2**64
        return bits ^ bits >> 33

    hashed = kuairand_files.hash_rows(np.array(ids, np.float64), rows)
    assert hashed.dtype == np.int32
    assert hashed.tolist() == [finalised(number) % rows for number in ids]


def test_rows_are_used_evenly() -> None:
    # Consecutive ids over as many rows as a tenth of them: Poisson with mean 10.
    count = np.bincount(kuairand_files.hash_rows(np.arange(10_000.0), 1000), minlength=1000)
    assert abs(count.var() / 10 - 1) < 4 * np.sqrt(2 / 1000)


def fault_of(path: Path, variant: str = "pure", **changes: int) -> str:
    with pytest.raises(UserError) as caught:
        read(path, variant, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("stem", layout.HEADERS)
@pytest.mark.parametrize("variant", ["pure", "27k"])
def test_a_missing_file_is_named(tmp_path: Path, stem: str, variant: str) -> None:
    path = layout.write(tmp_path, few_rows(), variant)
    for file in (path / "data").glob(f"{stem}*"):
        file.unlink()
    part = "_part1" if variant == "27k" and "standard" in stem else ""
    fault = fault_of(path, variant)
    assert fault.startswith(f"{path}/data/{stem}_{variant}{part}.csv does not exist; unpack")


@pytest.mark.parametrize("part", [1, 2])
def test_a_missing_part_is_named(tmp_path: Path, part: int) -> None:
    path = layout.write(tmp_path, few_rows(), "27k")
    file = path / "data" / f"{STANDARD_2}_27k_part{part}.csv"
    file.unlink()
    assert fault_of(path, "27k").startswith(f"{file} does not exist")


def test_a_file_and_parts_of_it_are_one_too_many(tmp_path: Path) -> None:
    path = layout.write(tmp_path, few_rows(), "27k")
    (path / "data" / f"{STANDARD_1}_27k.csv").write_text(layout.LOG_HEADER)
    assert f"holds both {STANDARD_1}_27k.csv and parts of it" in fault_of(path, "27k")


@pytest.mark.parametrize("stem", layout.HEADERS)
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, stem: str) -> None:
    path = layout.write(tmp_path, few_rows())
    file = path / "data" / f"{stem}_pure.csv"
    used = {"user_features": "onehot_feat11", "video_features_basic": "tag"}.get(stem, "long_view")
    file.write_text(file.read_text().replace(used, "something"))
    fault = fault_of(path)
    assert fault.startswith(f"{file} lacks the column {used}; it has: ")
    assert "something" in fault


@pytest.mark.parametrize("text", ["", "header\n", "header", "header\n\n"])
@pytest.mark.parametrize("stem", layout.HEADERS)
def test_a_file_without_rows_is_named(tmp_path: Path, stem: str, text: str) -> None:
    path = layout.write(tmp_path, few_rows())
    file = path / "data" / f"{stem}_pure.csv"
    file.write_text(text.replace("header", layout.HEADERS[stem]))
    assert fault_of(path).startswith(f"{file} {'has no rows' if text else 'is empty'}")


def test_faults_of_files_are_found_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = layout.write(tmp_path, few_rows())
    (path / "data" / "video_features_basic_pure.csv").write_text(layout.VIDEO_HEADER + "\n")

    def read_nothing(*arguments: object) -> None:
        raise AssertionError("a file was read")

    monkeypatch.setattr(kuairand_files, "read_text", read_nothing)
    assert "has no rows" in fault_of(path)


def test_another_variant_is_named_with_the_key_to_set(tmp_path: Path) -> None:
    path = layout.write(tmp_path, few_rows(), "1k")
    fault = fault_of(path, "27k")
    assert fault == (
        f"{path}/data holds KuaiRand-1K, not KuaiRand-27K; set data.name=kuairand_1k, or data.path "
        "to the other files"
    )


@pytest.mark.parametrize("name", ["", "absent"])
def test_a_folder_without_files_is_named(tmp_path: Path, name: str) -> None:
    fault = fault_of(tmp_path / name)
    assert fault.startswith(f"neither {tmp_path / name} nor its folder data holds a file of KuaiRa")
    assert "data.path" in fault


BAD_CELLS = [
    (STANDARD_1, {"user_id": "x"}, "user_id 'x' is not a whole number from 0 to 268435455"),
    (STANDARD_1, {"user_id": ""}, "user_id '' is not a whole number"),
    (STANDARD_1, {"user_id": "-1"}, "user_id '-1' is not a whole number from 0"),
    (STANDARD_2, {"video_id": "400000000"}, "video_id '400000000' is not a whole number from"),
    (STANDARD_2, {"time_ms": ""}, "time_ms '' is not a whole number"),
    (RANDOM, {"time_ms": "1650485801301000"}, "is not a whole number from 1000 to 2147483647999"),
    (RANDOM, {"time_ms": "0"}, "time_ms '0' is not a whole number from 1000"),
    (STANDARD_1, {"long_view": "2"}, "long_view '2' is not a whole number from 0 to 1"),
    (STANDARD_1, {"is_rand": "-1"}, "is_rand '-1' is not a whole number from 0 to 1"),
    (STANDARD_1, {"tab": "-3"}, "tab '-3' is not a whole number from 0 to 127"),
    ("user_features", {"user_id": ""}, "user_id '' is not"),
    ("user_features", {"fans_user_num": "many"}, "fans_user_num 'many' is not a number"),
    ("video_features_basic", {"video_id": "-4"}, "video_id '-4' is not a whole number"),
    ("video_features_basic", {"video_duration": "long"}, "video_duration 'long' is not a number"),
]


@pytest.mark.parametrize(("stem", "cells", "problem"), BAD_CELLS)
def test_what_cannot_be_read_is_named_with_its_file(
    tmp_path: Path, stem: str, cells: dict[str, str], problem: str
) -> None:
    rows = few_rows()
    first = dict(zip(layout.HEADERS[stem].split(","), next(csv.reader(rows[stem])), strict=True))
    quoted = [f'"{cell}"' if "," in cell else cell for cell in (first | cells).values()]
    rows[stem][0] = ",".join(quoted)
    path = layout.write(tmp_path, rows)
    fault = fault_of(path)
    assert fault.startswith(f"{path}/data/{stem}_pure.csv, line 2: ")
    assert problem in fault


def test_a_line_with_too_few_cells_is_named_with_its_file(tmp_path: Path) -> None:
    rows = few_rows()
    rows[RANDOM].append("1,2,3")
    path = layout.write(tmp_path, rows)
    assert fault_of(path) == (
        f"{path}/data/{RANDOM}_pure.csv, line 3: 3 fields separated by ',', expected 19"
    )


def test_empty_cells_of_a_log_say_that_nothing_was_done(tmp_path: Path) -> None:
    rows = few_rows()
    rows[RANDOM] = [rows[RANDOM][0].replace(",0,0,0,0,0,0,1,", ",,,,,,,1,")[: -len("0")]]
    log = read(layout.write(tmp_path, rows)).log
    at = int(np.flatnonzero(log.is_random)[0])
    assert log.signals[at] == 1 | 1 << kuairand_files.RANDOM_BIT
    assert log.tab[at] == -1


def test_the_last_row_of_a_video_counts(tmp_path: Path) -> None:
    rows = few_rows()
    rows["video_features_basic"].append(layout.video(5, video_duration="1000.0"))
    assert read(layout.write(tmp_path, rows)).videos.seconds[1] == 1
