"""RecFlow as a log: its rows, from those of the files, and from there to a student's results."""

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
    """Flags and indices in all combinations or no flag at all, and some videos with two rows."""
    rows = random_request(generator, request_id, time)
    for row in rows:
        row |= {name: int(generator.integers(2)) for name in (*RANKED, "realshow", "rank_pos")}
    rows += [row | {"realshow": 0, "rank_neg": 0} for row in rows[:3]]
    for row, index in zip(rows, generator.permutation(len(rows)), strict=True):
        row["rank_index"] = int(index) - 4
        if request_id % 7 == 3:
            row |= dict.fromkeys((*RANKED, "realshow", "coarse_neg", "prerank_neg"), 0)
    return rows


def grade_of(row: Row, of_each: int) -> int | None:
    """The place of a row's stage, the furthest first; None for one that is left out."""
    if of_each:
        flags = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
        return next((place for place, flag in enumerate(flags) if row[flag]), None)
    return 0 if row["realshow"] else 1 if any(row[name] for name in RANKED) else 2


def expected_row(rows: list[Row], sequence: np.ndarray, of_each: int) -> dict:
    time, first = rows[0]["request_timestamp"], rows[0]
    graded = [row | {"grade": grade_of(row, of_each)} for row in rows]
    stages = ("shown", "passed", "retrieved", "retrieved")

    def worth(row):
        return row["grade"], row["rank_index"] % 99, -row["realshow"]  # -1 comes last

    kept: dict[int, Row] = {}
    for row in sorted((of for of in graded if of["grade"] is not None), key=worth):
        kept.setdefault(row["video_id"], row)
    scored = [row for row in kept.values() if row["grade"] < 2 and row["rank_index"] >= 0]
    best = min([row["rank_index"] for row in scored if row["rank_pos"]], default=np.inf)
    for row in kept.values():
        has_position = row in scored and (row["rank_pos"] or row["rank_index"] > best)
        row["position"] = row["rank_index"] if has_position else None
    if of_each:
        for grade in range(4):
            of_grade = [row for row in kept.values() if row["grade"] == grade]
            of_grade.sort(
                key=lambda row: (row["position"] is None, row["position"], row["video_id"])
            )
            for row in of_grade[of_each:]:
                del kept[row["video_id"]]
    rows = [kept[video] for video in sorted(kept)]
    known = [row["realshow"] and row["grade"] == 0 for row in rows]
    events = [event for event in sequence.tolist() if 0 < event[7] < time]
    events.sort(key=lambda event: event[7])
    return {
        "user": first["user_id"],
        "time": time,
        **{name: first[name] for name in OF_REQUEST},
        "item": [row["video_id"] for row in rows],
        "stage": [stages[row["grade"]] for row in rows],
        "position": [row["position"] for row in rows],
        **{
            name: [row[name] if label else None for row, label in zip(rows, known, strict=True)]
            for name in LABELS
        },
        **{name: [row[name] for row in rows] for name in OF_ITEM},
        "duration": [np.log1p(row["duration"] / 1000) for row in rows],
        "days_old": [np.log1p((time / 1000 - row["upload_timestamp"]) / DAY) for row in rows],
        "history": [event[0] for event in events],
        "history_age": [np.log1p((time - event[7]) / DAY / 1000) for event in events],
        "history_duration": [np.log1p(event[6] / 1000) for event in events],
        "history_watched": [min(event[8] / event[6], 2) for event in events],
        "views": np.log1p(len(events)) / np.log(51),
        "pause": np.log1p((time - events[-1][7]) / DAY / 1000) if events else None,
    }


@pytest.mark.parametrize(
    ("request_rows", "of_each"), [(random_request, 0), (messy_request, 0), (messy_request, 2)]
)
def test_every_row_of_the_log_follows_from_the_files(tmp_path, request_rows, of_each):
    written = write_random(tmp_path / "RecFlow", request_rows=request_rows)
    for day, (rows, sequences) in written.items():
        without = min(sequences)
        kept = {key: of for key, of in sequences.items() if key != without}
        write_sequences(tmp_path / "RecFlow", day, kept)
        sequences[without] = np.zeros((1, 10), np.int64)
        if request_rows == messy_request:  # floats, truths, missing values, a blank in a name
            index = np.array([row["rank_index"] for row in rows])
            two = np.array([row["category_level_two"] for row in rows])
            write_stages(
                tmp_path / "RecFlow", day, rows, 11, category_level_two=None,
                rank_index=np.where(index < 0, np.nan, index),
                like=[bool(row["like"]) for row in rows],
                rerank_pos=[row["rerank_pos"] or None for row in rows],
                **{" category_level_two": two.astype(np.int16)},
            )  # fmt: skip
    found = rows_of(tmp_path, of_each_stage=of_each)
    times = [(row["time"], row["request"]) for row in found.values()]
    assert times == sorted(times)
    for split, days in DAYS_OF.items():
        for rows, sequences in map(written.get, days):
            for request, sequence in sequences.items():
                own = [of for of in rows if of["request_id"] == request]
                if all(grade_of(row, of_each) is None for row in own):
                    continue
                row = found.pop(request)
                assert row["split"] == split
                for name, expected in expected_row(own, sequence, of_each).items():
                    if name in FLOATS and expected is not None:
                        np.testing.assert_allclose(row[name], expected, rtol=1e-6)
                    else:
                        assert row[name] == expected, name
    assert not found


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
    without = [row | dict.fromkeys(RANKED, 0) for row in rows if not row["rank_pos"]]
    path = write_stages(
        folder, DAYS[0], [of | {"coarse_neg": 0, "prerank_neg": 0} for of in without]
    )
    assert f"{path} has no row with rank_pos = 1 or" in fault_of(root, of_each_stage=2)
    write_stages(folder, DAYS[0], [])
    assert f"{path} has no row with realshow = 1 or" in fault_of(root)
    path.write_text("no feather")
    assert re.search("cannot be read: .*Could not open IPC input source", fault_of(root))
    path.unlink()
    assert f"{path} does not exist; set data.path" in fault_of(root)
