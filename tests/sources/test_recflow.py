"""RecFlow as a log, against its definitions restated a row at a time; and files at fault."""

import collections
import datetime
import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from kd_ranker.configs import recflow as config_file
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.recflow import (
    ITEM_FEATURES,
    LABELS,
    REQUEST_FEATURES,
    find_files,
    read_events,
    write,
)
from kd_ranker.sources.registry import SOURCES

DAYS = ("2024-02-16", "2024-02-17", "2024-02-18", "2024-02-19")
DAYS_OF = {"train": DAYS[:2], "validation": DAYS[2:3], "test": DAYS[3:]}
DAY = 24 * 3600
NOON = 1_708_084_800  # of the first day, in seconds
RANKED = ("rank_pos", "rank_neg", "rerank_pos", "rerank_neg")
GRADES = ("rank_pos", "rank_neg", "coarse_neg", "prerank_neg")
FLOATS = ("hour_sin", "hour_cos", "duration", "days_old", "views", "pause")
FLAGS = ("realshow", *RANKED, "coarse_neg", "prerank_neg", *LABELS)


def make_request(generator, request: int, time: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows with flags in all combinations, some videos twice, -1 where missing; and views."""
    video = 1000 + 7 * generator.choice(60, generator.integers(8, 21), replace=False)
    rows = pd.DataFrame({"video_id": np.append(video, video[:3])})
    video, user = rows["video_id"], int(generator.integers(100, 108))
    rows[list(FLAGS)] = generator.integers(0, 2, (len(rows), len(FLAGS)))
    if request % 7 == 3:
        rows[list(FLAGS)] = 0
    rows = rows.assign(
        request_id=request, request_timestamp=time, user_id=user, age=user % 8 - 1,
        gender=user % 3, province=user % 80, author_id=video % 997 - 1, duration=video % 4 * 1000,
        category_level_one=video % 5 - 1, category_level_two=video % 11, upload_type=video % 3,
        upload_timestamp=(NOON - video * 100) * (video % 3 > 0),
        rank_index=generator.permutation(len(rows)) - 4,
    )  # fmt: skip
    views = generator.integers(1, 10_000, (12, 10))
    views[:3] = 0
    views[3, 0] = -1
    # Some at the moment of the request and after it.
    views[3:, 7] = time - generator.choice([-1, 0, *generator.integers(1, 10**9, 12)], 9)
    return rows, views


def write_day(root: Path, day: str, rows: pd.DataFrame, views: object) -> Path:
    """Write the files of a day; the pickle is as Python 3.7 and NumPy 1 write it."""
    for name in ("all_stage", "seq_effective_50_dict"):
        (root / name).mkdir(parents=True, exist_ok=True)
    path = root / "all_stage" / f"{day}.feather"
    feather.write_feather(pa.Table.from_pandas(rows), str(path), compression="lz4", chunksize=7)
    written = pickle.dumps(views, 3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (root / "seq_effective_50_dict" / f"{day}.pkl").write_bytes(written)
    return path


def write_random(root: Path, untidy: bool = False) -> dict[str, tuple[pd.DataFrame, dict]]:
    """Some days of random requests, whose rows lie in no order; day -> rows and views."""
    written = {}
    for number, day in enumerate(DAYS):
        generator = np.random.default_rng(number)
        requests, views = [], {}
        for place in range(12):
            time = 1000 * (NOON + number * DAY + int(generator.integers(6))) + 250
            request = 1000 * number + 7 * place + int(generator.integers(7))
            rows, views[request] = make_request(generator, request, time)
            requests.append(rows)
        rows = pd.concat(requests).sample(frac=1, random_state=number)
        without = min(views)
        written[day] = rows, views | {without: np.zeros((1, 10), int)}
        if untidy:  # floats, truths, missing values, a blank in a name
            rows = rows.assign(
                rank_index=rows["rank_index"].where(rows["rank_index"] >= 0),
                like=rows["like"] == 1,
                rerank_pos=rows["rerank_pos"].where(rows["rerank_pos"] == 1),
            ).rename(columns={"category_level_two": " category_level_two"})
        known_views = {request: events for request, events in views.items() if request != without}
        write_day(root, day, rows, known_views)
    return written


def config_of(root: Path, **changes):
    config = config_file()
    days = {f"{split}_days": of_split for split, of_split in DAYS_OF.items()}
    config.data.update(path=str(root), dir=str(root.parent / "data"), allow=ALLOWABLE, **days)
    config.data.update(changes)
    return config


def rows_of(root: Path, **changes) -> dict[int, dict]:
    """The rows of the log by request, in the order of days and rows."""
    data = config_of(root, **changes).data
    folder = root / "log"
    folder.mkdir(exist_ok=True)
    write(data, find_files(data), folder)
    files = (folder / f"{day}.parquet" for day in DAYS)
    return {row["request"]: row for file in files for row in pq.read_table(file).to_pylist()}


def expected_row(rows: list[dict], views: np.ndarray, of_each: int) -> dict | None:
    """The row of a request, by the definitions of the docs; None if none of its rows counts."""
    time = rows[0]["request_timestamp"]
    for row in rows:
        row["grade"] = 0 if row["realshow"] else 1 if any(row[name] for name in RANKED) else 2
        if of_each:
            row["grade"] = next((place for place, flag in enumerate(GRADES) if row[flag]), None)
        row["position"] = row["rank_index"] if row["rank_index"] >= 0 else np.inf

    def worth(row):
        ties = (-row[name] for name in ("realshow", *LABELS, "rank_pos"))
        return row["grade"], row["position"], *ties

    kept: dict[int, dict] = {}
    for row in sorted((row for row in rows if row["grade"] is not None), key=worth):
        kept.setdefault(row["video_id"], row)
    ranked = [row for row in kept.values() if row["rank_pos"] and row["grade"] < 2]
    best = min((row["position"] for row in ranked), default=np.inf)
    for row in kept.values():
        if row["grade"] > 1 or not (row["rank_pos"] or row["position"] > best):
            row["position"] = np.inf
    numbers = collections.Counter[int]()
    listed = []
    for row in sorted(kept.values(), key=lambda row: (row["position"], row["video_id"])):
        numbers[row["grade"]] += 1
        if not of_each or numbers[row["grade"]] <= of_each:
            listed.append(row)
    listed.sort(key=lambda row: row["video_id"])
    past_events = [event for event in views.tolist() if 0 < event[7] < time and event[0] >= 0]
    events = sorted(past_events, key=lambda event: event[7])
    if not listed:
        return None

    def known(value):
        return None if value == -1 or value == np.inf else value

    def log(numbers, unit=1.0):
        return [None if number is None else np.log1p(number / unit) for number in numbers]

    moment = datetime.datetime.fromtimestamp(time // 1000, datetime.UTC)
    angle = 2 * np.pi * (moment.hour * 3600 + moment.minute * 60 + moment.second) / DAY
    ages = [time / 1000 - row["upload_timestamp"] for row in listed]
    return {
        "user": rows[0]["user_id"], "time": time, "weekday": moment.weekday(),
        "hour_sin": [np.sin(angle)], "hour_cos": [np.cos(angle)],
        **{name: known(rows[0][name]) for name in REQUEST_FEATURES},
        "item": [row["video_id"] for row in listed],
        "stage": [("shown", "passed", "retrieved", "retrieved")[row["grade"]] for row in listed],
        **{
            name: [row[name] if row["realshow"] and not row["grade"] else None for row in listed]
            for name in LABELS
        },
        **{name: [known(row[name]) for row in listed] for name in ("position", *ITEM_FEATURES)},
        "duration": log([row["duration"] or None for row in listed], 1000),
        "days_old": log([age if age < time / 1000 else None for age in ages], DAY),
        "history": [event[0] for event in events],
        "history_age": log([time - event[7] for event in events], 1000 * DAY),
        "history_duration": log([event[6] for event in events], 1000),
        "history_watched": [min(event[8] / event[6], 2) for event in events],
        "views": [np.log1p(len(events)) / np.log(51)],
        "pause": log([time - events[-1][7] if events else None], 1000 * DAY),
    }  # fmt: skip


@pytest.mark.parametrize(("untidy", "of_each"), [(False, 0), (True, 0), (True, 2)])
def test_every_row_of_the_log_follows_from_the_files(tmp_path, untidy, of_each):
    written = write_random(tmp_path, untidy)
    found = rows_of(tmp_path, of_each_stage=of_each)
    times = [(row["time"], row["request"]) for row in found.values()]
    assert times == sorted(times)
    compared = 0
    for split, days in DAYS_OF.items():
        for rows, views in map(written.get, days):
            for request, of_request in rows.groupby("request_id"):
                records = of_request.to_dict("records")
                expected = expected_row(records, views[request], of_each)
                if expected is None:
                    assert request not in found
                    continue
                row = found[request]
                compared += 1
                assert row["split"] == split
                for name, values in expected.items():
                    one = isinstance(values, list) and not isinstance(row[name], list)
                    if name.startswith("history_") or name in FLOATS:
                        given = np.array([row[name]] if one else row[name], float)
                        np.testing.assert_allclose(given, np.array(values, float), 1e-6, 1e-6)
                    else:
                        assert row[name] == values, name
    assert compared == len(found) >= 40


def test_a_draw_takes_whole_requests(tmp_path):
    write_random(tmp_path)
    everything = rows_of(tmp_path)
    drawn = rows_of(tmp_path, max_requests_per_day=5)
    expected = [split for split in SPLITS for _ in DAYS_OF[split] for _ in range(5)]
    assert [row["split"] for row in drawn.values()] == expected
    assert drawn == {request: everything[request] for request in drawn}
    assert rows_of(tmp_path, max_requests_per_day=5, seed=1).keys() != drawn.keys()


ORDER = "each day once, and the splits in this order"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "set data.path to the folder of all_stage and seq_effective_50_dict"),
        ({"train_days": ()}, "name days, as 2024-02-18, in each of data.train_days"),
        ({"train_days": ("17.2.2024",)}, "17.2.2024.feather does not exist; set data.path"),
        ({"train_days": DAYS[:1] * 2}, ORDER),
        ({"validation_days": DAYS[1:3]}, ORDER),
        ({"test_days": DAYS[:1]}, ORDER),
        ({"rank_index": None}, "cannot be read: .*rank_index"),
        ({"like": "yes"}, "Could not convert string 'yes' to DOUBLE"),
        ({}, "cannot be read: .*Could not open IPC input source"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(tmp_path, changes, message):
    columns = {name: changes.pop(name) for name in ("rank_index", "like") if name in changes}
    rows, views = make_request(np.random.default_rng(0), 5, 1000 * NOON)
    rows = rows.assign(**columns).dropna(axis=1)
    paths = [write_day(tmp_path / "raw", day, rows, {5: views}) for day in DAYS]
    if not columns and not changes:
        paths[0].write_text("no feather")
    config = config_of(tmp_path / "raw", **changes)
    with pytest.raises(UserError, match=message) as caught:
        SOURCES["recflow"].open_source(config.data, config.tasks, config.funnel)
    assert "\n" not in str(caught.value)


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ARRAY = np.arange(30).reshape(3, 10)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("kind", [dict, functools.partial(collections.defaultdict, tuple)])
def test_arrays_come_back(tmp_path, protocol, kind):
    path = tmp_path / "day.pkl"
    path.write_bytes(pickle.dumps(kind({np.int64(8): ARRAY, 9: ARRAY}), protocol))
    read = read_events(path, [7, 8])
    assert read["request_id"].tolist() == [8] * 3
    assert read["video_id"].tolist() == ARRAY[:, 0].tolist()
    assert read["viewed"].tolist() == ARRAY[:, 7].tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Runs(os.mkdir, "made"), "it names posix.mkdir, which is not allowed"),
        (Runs(eval, "__import__('os').mkdir('made')"), "it names builtins.eval, which is not"),
        (Runs(np.fromfile, "made"), "it names numpy.*fromfile, which is not allowed"),
        (b"", "Ran out of input"),
        (pickle.dumps({8: np.arange(99)})[:-9], ""),
        ([1], "need at least one array"),
        ({9: ARRAY}, "need at least one array"),
        ({8: ARRAY / 2}, "Cannot cast array data from .*float64"),
        ({8: np.full((2, 10), None)}, "Cannot cast array data from .*O"),
        ({8: ARRAY[:, :9]}, "Shape of passed values"),
    ],
)
def test_other_contents_are_one_line_and_run_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "day.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    expected = r"day.pkl must be a pickle of request id -> whole numbers \[views, 10\]: "
    with pytest.raises(UserError, match=expected + message) as caught:
        read_events(path, [7, 8])
    assert "\n" not in str(caught.value)
    assert [*tmp_path.iterdir()] == [path]
