"""RecFlow as a log: its rows, from those of the files, and from there to a student's results."""

import contextlib
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.configs import recflow as config_file
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.recflow import LABELS, OF_ITEM, OF_REQUEST, find_files, write
from kd_ranker.sources.registry import SOURCES
from tests.sources.recflow_files import (
    DAYS,
    NOON,
    SEQUENCE_LENGTH,
    Row,
    graded_request,
    random_request,
    random_row,
    write_random,
    write_sequences,
    write_stages,
)

DAYS_OF = {"train": DAYS[:2], "validation": DAYS[2:3], "test": DAYS[3:]}
DAY = 24 * 3600
FLOATS = (
    *("duration", "days_old", "views", "pause"),
    *("history_age", "history_duration", "history_watched"),
)
RANKED = ("rank_pos", "rank_neg", "rerank_pos", "rerank_neg")


def config_of(root: Path, variant: str = "", **changes):
    config = config_file(variant)
    days = {f"{split}_days": of_split for split, of_split in DAYS_OF.items()}
    folders = {"path": str(root / "RecFlow"), "dir": str(root / "datasets")}
    config.data.update({**folders, **days, "max_requests_per_day": 0, "allow": ALLOWABLE})
    config.data.update(changes)
    return config


def rows_of(root: Path, **changes) -> dict[int, dict]:
    """The rows of the log by request, in the order of days and rows."""
    data = config_of(root, **changes).data
    folder = root / "log"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    write(data, find_files(data), folder)
    files = sorted(folder.glob("*.parquet"))
    return {row["request"]: row for file in files for row in pq.read_table(file).to_pylist()}


def worked_rows() -> list[Row]:
    flags = {
        # video: the flags that are set, and its index in the rank stage
        30: (("coarse_neg",), 0),
        20: (("rank_neg",), 4),
        50: (("realshow", "rank_pos", "rerank_pos", "long_view", "like"), 2),
        10: (("rank_pos", "rerank_neg", "like"), 1),
        40: (("prerank_neg",), -1),
        60: (("realshow", "effective_view"), -1),
        70: (("rank_neg",), 0),  # no position that it could have
    }
    rows = []
    for video, (names, index) in flags.items():
        row = random_row(np.random.default_rng(0), video)
        row |= {"request_id": 5, "request_timestamp": NOON[DAYS[0]], "user_id": 9}
        row |= {"age": 7, "gender": 3, "province": -1, "rank_index": index}
        rows.append(row | dict.fromkeys(names, 1))
    return rows


def write_worked(root: Path, rows=None) -> Path:
    for number, day in enumerate(DAYS):
        moved = [
            row | {"request_timestamp": NOON[day], "request_id": 5 + number}
            for row in (worked_rows() if rows is None else rows)
        ]
        write_stages(root / "RecFlow", day, moved)
        none = {5 + number: np.zeros((SEQUENCE_LENGTH, 10), np.int64)}
        write_sequences(root / "RecFlow", day, none)
    return root


def event(video: int, time: int) -> list[int]:
    return [video, 1, 2, 3, 4, 5, 6_000, time, 9_000, 77]


def test_a_request_worked_by_hand(tmp_path):
    rows, noon = worked_rows(), NOON[DAYS[0]]
    rows[0] |= {"duration": 0, "author_id": -1, "upload_timestamp": 0}
    rows[1] |= {"duration": 60_000, "upload_timestamp": noon // 1000 - DAY}
    write_worked(tmp_path, rows)
    # Views out of order, at the moment itself, and after it.
    views = [(10, noon - 1), (99, noon - 5000), (20, noon), (98, noon + 1)]
    write_sequences(tmp_path / "RecFlow", DAYS[0], {5: np.array([event(*view) for view in views])})
    row, without, *_ = rows_of(tmp_path).values()
    assert row["item"] == [10, 20, 30, 40, 50, 60, 70]
    p, s, r = "passed", "shown", "retrieved"
    assert row["stage"] == [p, p, r, r, s, s, p]
    assert row["position"] == [1, 4, None, None, 2, None, None]
    assert row["long_view"] == [None, None, None, None, 1, 0, None]
    assert row["like"] == [None, None, None, None, 1, 0, None]  # of 10, which was not shown, none
    assert row["effective_view"] == [None, None, None, None, 0, 1, None]
    assert (row["user"], row["time"], row["split"]) == (9, noon, "train")
    assert [row[name] for name in OF_REQUEST] == [3, None, 7]
    assert (row["author_id"][2], row["duration"][2], row["days_old"][2]) == (None, None, None)
    np.testing.assert_allclose([row["duration"][1], row["days_old"][1]], np.log([61, 2]), rtol=1e-6)
    # Noon in UTC, on a Friday.
    np.testing.assert_allclose([row["hour_sin"], row["hour_cos"]], [0, -1], atol=1e-6)
    assert (row["weekday"], row["history"]) == (4, [99, 10])
    np.testing.assert_allclose(row["views"], np.log(3) / np.log(51), rtol=1e-6)
    np.testing.assert_allclose(row["pause"], np.log1p(1e-3 / DAY), rtol=1e-6)
    # No view before.
    assert (without["pause"], without["views"], without["history"]) == (None, 0, [])


# All requests of random files, from the definitions, a row at a time.


def messy_request(generator: np.random.Generator, request_id: int, time: int) -> list[Row]:
    """Flags and indices in all combinations, and some videos with two rows."""
    rows = random_request(generator, request_id, time)
    for row in rows:
        row |= {name: int(generator.integers(2)) for name in (*RANKED, "realshow", "rank_pos")}
    rows += [row | {"realshow": 0, "rank_neg": 0} for row in rows[:3]]
    for row, index in zip(rows, generator.permutation(len(rows)), strict=True):
        row["rank_index"] = int(index) - 4
    return rows


def expected_row(rows: list[Row], sequence: np.ndarray) -> dict:
    time, first = rows[0]["request_timestamp"], rows[0]

    def stage(row):
        return 3 if row["realshow"] else 2 if any(row[name] for name in RANKED) else 1

    def worth(row):
        return stage(row), row["rank_index"] >= 0, -row["rank_index"]

    videos = {row["video_id"] for row in rows}
    kept = [max((r for r in rows if r["video_id"] == of), key=worth) for of in sorted(videos)]
    scored = [row for row in kept if stage(row) > 1 and row["rank_index"] >= 0]
    best = min([row["rank_index"] for row in scored if row["rank_pos"]], default=np.inf)
    events = [event for event in sequence.tolist() if 0 < event[7] < time]
    events.sort(key=lambda event: event[7])
    return {
        "user": first["user_id"],
        "time": time,
        **{name: first[name] for name in OF_REQUEST},
        "item": [row["video_id"] for row in kept],
        "stage": [("retrieved", "passed", "shown")[stage(row) - 1] for row in kept],
        "position": [
            row["rank_index"]
            if row in scored and (row["rank_pos"] or row["rank_index"] > best)
            else None
            for row in kept
        ],
        **{of: [row[of] if row["realshow"] else None for row in kept] for of in LABELS},
        **{name: [row[name] for row in kept] for name in OF_ITEM},
        "duration": [np.log1p(row["duration"] / 1000) for row in kept],
        "days_old": [np.log1p((time / 1000 - row["upload_timestamp"]) / DAY) for row in kept],
        "history": [event[0] for event in events],
        "history_age": [np.log1p((time - event[7]) / DAY / 1000) for event in events],
        "history_duration": [np.log1p(event[6] / 1000) for event in events],
        "history_watched": [min(event[8] / event[6], 2) for event in events],
        "views": np.log1p(len(events)) / np.log(51),
        "pause": np.log1p((time - events[-1][7]) / DAY / 1000) if events else None,
    }


@pytest.mark.parametrize("request_rows", [random_request, messy_request])
def test_every_row_of_the_log_follows_from_the_files(tmp_path, request_rows):
    written = write_random(tmp_path / "RecFlow", request_rows=request_rows)
    for day, (_, sequences) in written.items():
        without = min(sequences)
        kept = {key: of for key, of in sequences.items() if key != without}
        write_sequences(tmp_path / "RecFlow", day, kept)
        sequences[without] = np.zeros((1, 10), np.int64)
    found = rows_of(tmp_path)
    latest = (0, 0)
    for split, days in DAYS_OF.items():
        for rows, sequences in map(written.get, days):
            for request, sequence in sequences.items():
                row = found[request]
                own = [of for of in rows if of["request_id"] == request]
                assert row["split"] == split
                for name, expected in expected_row(own, sequence).items():
                    if name in FLOATS and expected is not None:
                        np.testing.assert_allclose(row[name], expected, rtol=1e-6)
                    else:
                        assert row[name] == expected, name
    assert len(found) == 12 * len(DAYS)
    for row in found.values():
        assert latest < (row["time"], row["request"])
        latest = row["time"], row["request"]


def test_floats_nulls_and_blanks_in_names_are_read(tmp_path):
    written = write_random(tmp_path / "RecFlow")
    plain = rows_of(tmp_path)
    for day, (rows, _) in written.items():
        index = np.array([row["rank_index"] for row in rows])
        two = np.array([row["category_level_two"] for row in rows])
        write_stages(
            tmp_path / "RecFlow", day, rows, 11, rank_index=np.where(index < 0, np.nan, index),
            category_level_two=None, like=[bool(row["like"]) for row in rows],
            rerank_pos=[row["rerank_pos"] or None for row in rows],
            **{" category_level_two": two.astype(np.int16)},
        )  # fmt: skip
    assert rows_of(tmp_path) == plain


def test_a_draw_takes_whole_requests(tmp_path):
    write_random(tmp_path / "RecFlow")
    everything = rows_of(tmp_path)
    drawn = rows_of(tmp_path, max_requests_per_day=5)
    assert [row["split"] for row in drawn.values()] == [
        split for split in SPLITS for _ in DAYS_OF[split] for _ in range(5)
    ]
    assert drawn == {request: everything[request] for request in drawn}
    assert rows_of(tmp_path, max_requests_per_day=5, seed=1).keys() != drawn.keys()


# Faults.


def fault_of(root: Path, **changes) -> str:
    config = config_of(root, **changes)
    with pytest.raises(UserError) as caught:
        SOURCES["recflow"].open_source(config.data, config.tasks, config.funnel)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "set data.path to the folder of all_stage and seq_effective_50_dict"),
        ({"train_days": ()}, "name at least one day, as 2024-02-18, in each of data.train_days, "),
        (
            {"train_days": ("17.2.2024",)},
            "all_stage/17.2.2024.feather does not exist; set data.path",
        ),
        ({"train_days": DAYS[:1] * 2}, "each day once, and the splits in this order"),
        ({"validation_days": DAYS[1:3]}, "each day once, and the splits in this order"),
        ({"test_days": DAYS[:1]}, "each day once, and the splits in this order"),
    ],
)
def test_each_fault_of_a_config_is_one_line(tmp_path, changes, message):
    assert message in fault_of(tmp_path, **changes)


def test_faults_of_files_are_named(tmp_path):
    root = write_worked(tmp_path)
    folder, rows = root / "RecFlow", worked_rows()
    write_stages(folder, DAYS[0], rows, rank_index=None)
    assert re.search("all_stage cannot be read: .*rank_index", fault_of(root))
    write_stages(folder, DAYS[0], rows, like=["yes"] * len(rows))
    assert "Could not convert string 'yes' to DOUBLE" in fault_of(root)
    path = write_stages(folder, DAYS[0], [])
    assert f"{path} has no row with realshow = 1 or" in fault_of(root)
    path.write_text("no feather")
    assert re.search("cannot be read: .*Could not open IPC input source", fault_of(root))
    path.unlink()
    assert f"{path} does not exist; set data.path" in fault_of(root)


# The protocol of LCRON: some of each stage, by the flags alone.


def grades_by_hand(rows: list[Row]) -> dict[str, list[Row]]:
    """The first ten rows of each flag, of videos that have no row of a flag above."""
    taken, grades = set(), {}
    for flag in ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg"):
        of_flag = [row for row in rows if row[flag] and row["video_id"] not in taken]
        of_flag.sort(key=lambda row: row["rank_index" if flag == "rank_pos" else "video_id"])
        taken |= {row["video_id"] for row in of_flag}
        grades[flag] = of_flag[:10]
    return grades


def test_a_request_has_ten_of_each_stage_by_the_flags_alone(tmp_path):
    written = write_random(tmp_path / "RecFlow", 8, chunk=50, request_rows=graded_request)
    config = config_of(tmp_path, "lcron")
    source = SOURCES["recflow"].open_source(config.data, config.tasks, config.funnel)
    with contextlib.closing(source):
        requests = list(source.requests("test"))
    assert len(requests) == 8
    for request in requests:
        grades = grades_by_hand(
            [of for of in written[DAYS[3]][0] if of["request_id"] == request.request_id]
        )
        assert [len(of_flag) for of_flag in grades.values()][:3] == [10, 10, 10]
        assert len(request.item_id) == sum(map(len, grades.values()))
        assert request.num_passed == 20
        # Those at the top are what a student is to find. Labels are of what users have seen of it.
        top = grades["rank_pos"]
        assert request.user_label[:, 0].tolist() == [row["effective_view"] for row in top]
        assert request.label_weight.tolist() == [row["realshow"] for row in top]
        expected = [*1 / (2 + np.arange(10)), *[np.nan] * 10]
        np.testing.assert_allclose(request.teacher_probability[:, 0], expected, rtol=1e-6)


def test_a_request_without_any_of_the_flags_is_none(tmp_path):
    flags = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
    rows = [row | dict.fromkeys(flags, 0) for row in worked_rows()]
    write_worked(tmp_path)
    folder = tmp_path / "RecFlow"
    write_stages(folder, DAYS[0], rows + [row | {"request_id": 4} for row in worked_rows()])
    write_sequences(folder, DAYS[0], {4: np.zeros((SEQUENCE_LENGTH, 10), np.int64)})
    found = rows_of(tmp_path, of_each_stage=2)
    assert list(found) == [4, 6, 7, 8]
    assert found[4]["item"] == [10, 20, 30, 40, 50, 70]
    p, s, r = "passed", "shown", "retrieved"
    assert found[4]["stage"] == [s, p, r, r, s, p]
    assert rows_of(tmp_path, of_each_stage=1)[4]["item"] == [10, 20, 30, 40]
    write_stages(folder, DAYS[0], rows)
    assert "has no row with rank_pos = 1 or" in fault_of(tmp_path, of_each_stage=2)
