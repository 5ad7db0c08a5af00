"""RecFlow as a log: its rows, from those of the files, and from there to a student's results."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker import api
from kd_ranker.configs import recflow as config_file
from kd_ranker.errors import UserError
from kd_ranker.pipeline import datasets
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.recflow import LABELS, OF_ITEM, OF_REQUEST, find_files, write
from kd_ranker.sources.registry import SOURCES
from tests.small import rows_on_test
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


def by_item(row: dict, name: str) -> dict:
    return dict(zip(row["item"], row[name], strict=True))


# One request, worked by hand.


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


def test_a_request_worked_by_hand(tmp_path):
    rows = worked_rows()
    rows[0] |= {"duration": 0, "author_id": -1, "upload_timestamp": 0}
    rows[1] |= {"duration": 60_000, "upload_timestamp": NOON[DAYS[0]] // 1000 - DAY}
    row = rows_of(write_worked(tmp_path, rows))[5]
    assert row["item"] == [10, 20, 30, 40, 50, 60, 70]
    p, s, r = "passed", "shown", "retrieved"
    assert row["stage"] == [p, p, r, r, s, s, p]
    assert row["position"] == [1, 4, None, None, 2, None, None]
    assert row["long_view"] == [None, None, None, None, 1, 0, None]
    assert row["like"] == [None, None, None, None, 1, 0, None]  # of 10, which was not shown, none
    assert row["effective_view"] == [None, None, None, None, 0, 1, None]
    assert (row["user"], row["time"], row["split"]) == (9, NOON[DAYS[0]], "train")
    assert [row[name] for name in OF_REQUEST] == [3, None, 7]
    assert (row["author_id"][2], row["duration"][2], row["days_old"][2]) == (None, None, None)
    np.testing.assert_allclose([row["duration"][1], row["days_old"][1]], np.log([61, 2]), rtol=1e-6)
    # Noon in UTC, on a Friday; no view before.
    np.testing.assert_allclose([row["hour_sin"], row["hour_cos"]], [0, -1], atol=1e-6)
    assert (row["weekday"], row["pause"], row["views"], row["history"]) == (4, None, 0, [])


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


# Histories, days and draws.


def event(video: int, time: int) -> list[int]:
    return [video, 1, 2, 3, 4, 5, 6_000, time, 9_000, 77]


def test_nothing_from_the_future_is_in_a_history(tmp_path):
    noon = NOON[DAYS[0]]
    # Out of order, at the moment itself, and after it.
    views = [(10, noon - 1), (99, noon - 5000), (20, noon), (98, noon + 1)]
    write_worked(tmp_path)
    sequence = np.array([event(*view) for view in views])
    write_sequences(tmp_path / "RecFlow", DAYS[0], {5: sequence})
    row = rows_of(tmp_path)[5]
    assert row["history"] == [99, 10]
    np.testing.assert_allclose(row["views"], np.log(3) / np.log(51), rtol=1e-6)
    np.testing.assert_allclose(row["pause"], np.log1p(1e-3 / DAY), rtol=1e-6)


def test_a_request_without_a_sequence_has_no_history(tmp_path):
    written = write_random(tmp_path / "RecFlow")
    first = {min(sequences) for _, sequences in written.values()}
    for day, (_, sequences) in written.items():
        kept = {key: of for key, of in sequences.items() if key in first}
        write_sequences(tmp_path / "RecFlow", day, kept)
    rows = rows_of(tmp_path)
    assert len(rows) == 12 * len(DAYS)
    assert not any(row["history"] for request, row in rows.items() if request not in first)


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


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The config `:lcron` on files of eight requests a day, and the rows of each request."""
    root = tmp_path_factory.mktemp("graded")
    written = write_random(root / "RecFlow", 8, chunk=50, request_rows=graded_request)
    config = config_of(root, "lcron")
    config.data.features.author.size = 50
    config.update_from_flattened_dict(
        {
            "batch.requests": 8, "student.width": 4, "student.hidden": (8,),
            "student.item_rows": 0, "train.steps": 3, "train.log_every": 1,
            "train.eval_every": 0, "parallel.devices": 1, "evaluation.requests": 8,
        }
    )  # fmt: skip
    api.prepare(config)
    rows = {
        key: [row for row in day if row["request_id"] == key]
        for day, sequences in written.values()
        for key in sequences
    }
    return root, config, rows


def grades_by_hand(rows: list[Row]) -> dict[str, list[Row]]:
    """The first ten rows of each flag, of videos that have no row of a flag above."""
    taken, grades = set(), {}
    for flag in ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg"):
        of_flag = [row for row in rows if row[flag] and row["video_id"] not in taken]
        of_flag.sort(key=lambda row: row["rank_index" if flag == "rank_pos" else "video_id"])
        taken |= {row["video_id"] for row in of_flag}
        grades[flag] = of_flag[:10]
    return grades


def test_a_request_has_ten_of_each_stage_by_the_flags_alone(graded):
    _, config, rows = graded
    dataset = datasets.dataset_of(config)
    for request in read_requests(dataset, "test"):
        grades = grades_by_hand(rows[request.request_id])
        assert [len(of_flag) for of_flag in grades.values()][:3] == [10, 10, 10]
        assert len(request.item_id) == sum(map(len, grades.values()))
        assert request.num_passed == 20
        # Those at the top are what a student is to find. Labels are of what users have seen of it.
        top = grades["rank_pos"]
        assert request.user_label[:, 0].tolist() == [row["effective_view"] for row in top]
        assert request.label_weight.tolist() == [row["realshow"] for row in top]
        assert request.teacher_weight.tolist() == [1] * 10 + [0] * 10
        probability = request.teacher_probability[:10, 0]
        np.testing.assert_allclose(probability, 1 / (2 + np.arange(10)), rtol=1e-6)


def test_a_request_without_any_of_the_flags_is_none(tmp_path):
    flags = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
    rows = [row | dict.fromkeys(flags, 0) for row in worked_rows()]
    write_worked(tmp_path)
    folder = tmp_path / "RecFlow"
    write_stages(folder, DAYS[0], rows + [row | {"request_id": 4} for row in worked_rows()])
    write_sequences(folder, DAYS[0], {4: np.zeros((SEQUENCE_LENGTH, 10), np.int64)})
    found = rows_of(tmp_path, of_each_stage=2)
    assert list(found) == [4, 6, 7, 8]
    assert by_item(found[4], "stage") == {
        **dict.fromkeys((10, 50), "shown"),
        **dict.fromkeys((20, 70), "passed"),
        **dict.fromkeys((30, 40), "retrieved"),
    }
    assert rows_of(tmp_path, of_each_stage=1)[4]["item"] == [10, 20, 30, 40]
    write_stages(folder, DAYS[0], rows)
    assert "has no row with rank_pos = 1 or" in fault_of(tmp_path, of_each_stage=2)


@pytest.mark.slow
def test_the_protocol_of_lcron_trains_on_stages_alone(graded):
    root, config, _ = graded
    (row,) = rows_on_test(api.train(config, root / "student"))
    assert 0 < row["survival@30"] <= 1
    assert row["distill_loss"] == "ranknet:stage"
    losses = [json.loads(line) for line in (root / "student" / "metrics.jsonl").open()]
    assert losses[-1]["distill_loss"] < losses[0]["distill_loss"]
    # What the log has of the final ranker are positions, and no probabilities.
    for name in ("teacher_bce/effective_view", "teacher_kl/effective_view", "alignment_ratio"):
        assert np.isnan(row[name])
    for name in ("value_captured@30", "shown_recall@30", "passed_for_99"):
        assert row[name] > 0
    assert np.isfinite(row["user_bce/effective_view"])
