"""RecFlow as a source, on files in the published layout; and from there to a student's results."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batch import Stage
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.configs import recflow as config_file
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.evaluation.evaluate import Plan, Ranker, Served, evaluate
from kd_ranker.pipeline import datasets, measure
from kd_ranker.pipeline.job import Job, Opened
from kd_ranker.requests.records import read_requests
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.sources import recflow, recflow_files
from kd_ranker.sources.tables import open_tables, put
from tests.small import rows_on_test
from tests.sources.recflow_files import (
    DAYS,
    NOON,
    SEQUENCE_LENGTH,
    Row,
    graded_request,
    random_row,
    write_random,
    write_sequences,
    write_stages,
)

TASKS = recflow.TASKS
DAYS_OF = {"train": DAYS[:2], "validation": DAYS[2:3], "test": DAYS[3:]}
SMALL = {f"{split}_days": days for split, days in DAYS_OF.items()}


def make_data(root: Path, **changes) -> ConfigDict:
    data = {
        "name": "recflow", "dir": "", "path": str(root), "seed": 0, "history_length": 4,
        "max_requests_per_day": 0, "of_each_stage": 0, "authors": 97, **SMALL,
    }  # fmt: skip
    return ConfigDict(data | changes)


def open_small(root: Path, tasks=TASKS, retrieved: int = 600, **changes) -> Source:
    return recflow.open_source(
        make_data(root, **changes), tasks, ConfigDict({"retrieved": retrieved})
    )


def assert_same(left: Request, right: Request) -> None:
    for field in dataclasses.fields(Request):
        one, other = getattr(left, field.name), getattr(right, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=field.name)
        else:
            assert one == other, field.name


# One request, worked by hand.


def worked_rows() -> list[Row]:
    flags = {
        # video: the flags that are set, and its index in the rank stage
        30: (("coarse_neg",), 0),
        20: (("rank_neg",), 4),
        50: (("realshow", "rank_pos", "rerank_pos", "long_view", "like"), 2),
        10: (("rank_pos", "rerank_neg"), 1),
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


def write_worked(root: Path, rows=None, sequences=None, days=DAYS) -> Path:
    for number, day in enumerate(days):
        moved = [
            row | {"request_timestamp": NOON[day], "request_id": 5 + number}
            for row in (worked_rows() if rows is None else rows)
        ]
        write_stages(root, day, moved)
        none = {5 + number: np.zeros((SEQUENCE_LENGTH, 10), np.int64)}
        write_sequences(root, day, none if sequences is None else sequences)
    return root


def test_a_request_worked_by_hand(tmp_path):
    source = open_small(write_worked(tmp_path), tasks=("watch", "like", "effective_view"))
    assert source.num_requests == {"train": 2, "validation": 1, "test": 1}
    assert source.spec.teacher_signal == "rank"
    request = next(source.requests("train"))
    videos = [10, 20, 30, 40, 50, 60, 70]
    # Shown: 50 by its position, then 60; passed: 10 and 20 by position, then 70; then the others.
    assert [videos[item] for item in request.item_id] == [50, 60, 10, 20, 70, 30, 40]
    assert request.num_passed == 5
    assert request.user_label.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert request.label_weight.tolist() == [1, 1]
    # Among 1, 2 and 4, the indices 2, 1 and 4 are the positions 1, 0 and 2.
    assert request.teacher_weight.tolist() == [1, 0, 1, 1, 0]
    expected = [1 / 3, np.nan, 1 / 2, 1 / 4, np.nan]
    for task in range(3):
        np.testing.assert_allclose(request.teacher_probability[:, task], expected)
    assert request.teacher_version == source.spec.teacher_version == "recflow"
    assert request.time == NOON[DAYS[0]] // 1000
    assert request.true_probability.shape == (0, 3)
    # Gender 3 of places 0 to 4; a province below 0 is unknown; age 7.
    assert request.request_category.tolist() == [0 + 4, 5 + 0, 5 + 81 + 8]
    assert len(request.history_id) == 0
    # Noon in UTC, on a Friday; no view before.
    np.testing.assert_allclose(request.context, [0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 1], atol=1e-6)
    assert request.user_features.tolist() == [0]


def test_categories_of_items_have_their_own_ranges(tmp_path):
    rows = worked_rows()
    rows[0] |= {"author_id": -1, "category_level_one": 140, "category_level_two": -1}
    rows[0] |= {"upload_type": 41, "duration": 0}
    rows[1] |= {"duration": 60_000}
    source = open_small(write_worked(tmp_path, rows))
    spec = source.spec
    assert spec.category_starts == (0, 5, 86, 96, 193, 335, 1121)
    assert source.item_category.shape == (7, 4)
    assert source.item_category[2].tolist() == [-1, 193 + 141, 335, 1121]
    for column, start in enumerate(spec.category_starts[3:]):
        ids = source.item_category[:, column]
        known = ids[ids >= 0]
        assert ((known >= start) & (known < start + spec.categories[3 + column].size)).all()
    np.testing.assert_allclose(source.item_features[1:3], [[np.log(61), 0], [0, 1]], rtol=1e-6)


# All fields of random requests, from the definitions, a row at a time.


def places(values, columns, sizes):
    return [
        value + 1 if 0 <= value < size - 1 else 0
        for value, size in ((values[name], size) for name, size in zip(columns, sizes, strict=True))
    ]


def brute_force(rows: list[Row], sequence: np.ndarray, users, videos, history_length) -> Request:
    time, first = rows[0]["request_timestamp"], rows[0]

    def ranked(row):
        return any(row[name] for name in ("rank_pos", "rank_neg", "rerank_pos", "rerank_neg"))

    def stage(row):
        return 3 if row["realshow"] else 2 if ranked(row) else 1

    best = min([row["rank_index"] for row in rows if row["rank_pos"]], default=None)
    indices = {
        row["video_id"]: row["rank_index"]
        for row in rows
        if stage(row) > 1
        and row["rank_index"] >= 0
        and best is not None
        and (row["rank_pos"] or row["rank_index"] > best)
    }
    order = sorted(set(indices.values()))
    position = {video: order.index(index) for video, index in indices.items()}
    rows = sorted(
        rows,
        key=lambda row: (-stage(row), position.get(row["video_id"], 10**9), row["video_id"]),
    )
    shown = [row for row in rows if stage(row) == 3]
    passed = [row for row in rows if stage(row) >= 2]
    events = sorted(
        (
            dict(zip(recflow_files.SEQUENCE_COLUMNS, map(int, event), strict=True))
            for event in sequence
        ),
        key=lambda event: event["request_timestamp"],
    )
    events = [event for event in events if 0 < event["request_timestamp"] < time]
    day = 24 * 3600
    pause = (time - events[-1]["request_timestamp"]) / 1000 / day if events else 0
    angle = 2 * np.pi * (time // 1000 % day) / day
    weekdays = [(time // 1000 // day + 3) % 7 == number for number in range(7)]
    recent = events[-history_length:]
    category = places(first, ("gender", "province", "age"), (5, 81, 10))

    def floats(values, width):
        return np.array(values, np.float32).reshape(-1, width)

    return Request(
        request_id=first["request_id"],
        time=time // 1000,
        user_id=users.index(first["user_id"]),
        user_features=np.array([np.log(1 + len(events)) / np.log(51)], np.float32),
        context=np.array(
            [np.sin(angle), np.cos(angle), *weekdays, np.log1p(pause), not events], np.float32
        ),
        history_id=np.array([videos.index(event["video_id"]) for event in recent], np.int32),
        history_features=floats(
            [
                [
                    np.log1p((time - event["request_timestamp"]) / 1000 / day),
                    np.log1p(event["duration"] / 1000),
                    min(event["playing_time"] / event["duration"], 2),
                ]
                for event in recent
            ],
            3,
        ),
        item_id=np.array([videos.index(row["video_id"]) for row in rows], np.int32),
        candidate_features=floats(
            [[np.log1p((time / 1000 - row["upload_timestamp"]) / day), 0] for row in rows], 2
        ),
        num_passed=len(passed),
        user_label=np.array(
            [[row[recflow.LABELS[task]] for task in TASKS] for row in shown], np.uint8
        ),
        label_weight=np.ones(len(shown), np.float32),
        teacher_probability=floats(
            [[1 / (2 + position.get(row["video_id"], np.nan))] * len(TASKS) for row in passed],
            len(TASKS),
        ),
        teacher_weight=np.array([row["video_id"] in position for row in passed], np.float32),
        teacher_version="recflow",
        true_probability=np.zeros((0, len(TASKS)), np.float32),
        request_category=np.array([category[0], 5 + category[1], 86 + category[2]], np.int32),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("recflow")
    return root, write_random(root)


@pytest.fixture(scope="module")
def small(written):
    """The source of those files as most tests open it."""
    source = open_small(written[0])
    yield source
    source.close()


@pytest.mark.parametrize("rows_at_once", [1, 40, 10**6])
def test_every_field_of_every_request_follows_from_its_rows(
    written, small, monkeypatch, rows_at_once
):
    _, days = written
    monkeypatch.setattr(recflow, "ROWS_AT_ONCE", rows_at_once)
    source = small
    users = sorted({row["user_id"] for rows, _ in days.values() for row in rows})
    seen = {row["video_id"] for rows, _ in days.values() for row in rows}
    events = [np.stack([*sequences.values()]).reshape(-1, 10) for _, sequences in days.values()]
    seen |= {int(event[0]) for event in np.concatenate(events) if event[7] > 0}
    videos = sorted(seen)
    assert (source.spec.num_users, source.spec.num_items) == (len(users), len(videos))
    latest = 0
    for split, names in DAYS_OF.items():
        found = list(source.requests(split))
        assert len(found) == source.num_requests[split] == 12 * len(names)
        expected = []
        for name in names:
            rows, sequences = days[name]
            of_request = {key: [r for r in rows if r["request_id"] == key] for key in sequences}
            requests = [
                brute_force(of_request[key], sequences[key], users, videos, 4) for key in sequences
            ]
            expected += sorted(requests, key=lambda request: (request.time, request.request_id))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        times = [request.time for request in found]
        assert times == sorted(times)
        # A request of a later day comes later, whatever split it is of.
        assert latest < times[0]
        latest = times[-1]
    for item, video in enumerate(videos):
        row = random_row(np.random.default_rng(0), video)
        np.testing.assert_allclose(
            source.item_features[item], [np.log1p(row["duration"] / 1000), 0], rtol=1e-6
        )
        expected = places(
            row, ("category_level_one", "category_level_two", "upload_type"), (142, 786, 42)
        )
        assert source.item_category[item, 1:].tolist() == [
            start + place for start, place in zip((193, 335, 1121), expected, strict=True)
        ]


def test_authors_are_hashed_alike(written, small):
    again = open_small(written[0])
    np.testing.assert_array_equal(small.item_category, again.item_category)


# Positions.


@pytest.fixture(scope="module")
def engine():
    with open_tables() as opened:
        yield opened


def positions_of(engine, request, index, is_ranked, is_top):
    """The position of each candidate, -1 for none."""
    number = len(request)
    columns = {
        "request": request,
        "rank_index": index,
        "stage": np.where(is_ranked, Stage.PASSED, Stage.RETRIEVED),
        "rank_pos": np.asarray(is_top, int),
        "number": np.arange(number),
    }
    rows = put(engine, "candidates", pa.table(columns))
    found = engine.fetch(recflow.with_positions(rows).order_by("number"))["position"]
    return found.fill_null(-1).to_numpy()


@st.composite
def ranked_candidates(draw):
    number = draw(st.integers(0, 12))
    integers = st.lists(st.integers(-1, 6), min_size=number, max_size=number)
    booleans = st.lists(st.booleans(), min_size=number, max_size=number)
    requests = st.lists(st.integers(0, 2), min_size=number, max_size=number)
    return tuple(
        np.array(draw(values), dtype)
        for values, dtype in (
            *((requests, np.int64), (integers, np.int64), (booleans, bool), (booleans, bool)),
        )
    )


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(ranked_candidates())
def test_positions_match_brute_force(engine, candidates):
    request, index, is_ranked, is_top = candidates
    found = positions_of(engine, *candidates)
    for place in range(len(request)):
        here = [other for other in range(len(request)) if request[other] == request[place]]
        tops = [index[o] for o in here if is_ranked[o] and is_top[o] and index[o] >= 0]
        known = [
            other
            for other in here
            if tops
            and is_ranked[other]
            and index[other] >= 0
            and (is_top[other] or index[other] > min(tops))
        ]
        ascending = sorted({int(index[other]) for other in known})
        expected = ascending.index(int(index[place])) if place in known else -1
        assert found[place] == expected


def test_where_the_files_begin_to_count_makes_no_difference(engine):
    generator = np.random.default_rng(0)
    request = np.repeat(np.arange(5), 10)
    index = generator.permuted(np.tile(np.arange(10), (5, 1)), axis=1).ravel()
    top = index < 3
    from_zero = positions_of(engine, request, index, np.ones(50, bool), top)
    np.testing.assert_array_equal(from_zero, index)
    np.testing.assert_array_equal(
        positions_of(engine, request, index + 1, np.ones(50, bool), top), from_zero
    )


@pytest.mark.parametrize("nothing", [0, -1])
@pytest.mark.parametrize("base", [0, 1])
def test_what_stands_where_no_position_was_logged_is_none(engine, nothing, base):
    top = np.arange(20) < 10
    index = np.where(top, np.arange(20) + base, nothing)
    found = positions_of(engine, np.zeros(20, int), index, np.ones(20, bool), top)
    np.testing.assert_array_equal(found, np.where(top, np.arange(20), -1))


# Rows.


def test_a_video_with_several_rows_in_a_request_keeps_the_furthest(tmp_path):
    rows = worked_rows()
    again = next(row for row in rows if row["video_id"] == 50)
    rows.insert(0, again | {"realshow": 0, "rank_pos": 0, "rerank_pos": 0, "like": 0})
    source = open_small(write_worked(tmp_path / "twice", rows), tasks=("like",))
    once = open_small(write_worked(tmp_path / "once"), tasks=("like",))
    for one, other in zip(source.requests("train"), once.requests("train"), strict=True):
        assert_same(one, other)


def test_labels_of_what_was_not_shown_are_not_there(tmp_path):
    rows = [row | {"like": 1, "long_view": 1} for row in worked_rows()]
    request = next(open_small(write_worked(tmp_path, rows), tasks=("like",)).requests("test"))
    assert request.user_label.shape == (2, 1)


def test_floats_nulls_and_blanks_in_names_are_read(written, small, tmp_path):
    _, days = written
    for day, (rows, sequences) in days.items():
        index = np.array([row["rank_index"] for row in rows])
        two = np.array([row["category_level_two"] for row in rows])
        write_stages(
            tmp_path, day, rows, 11, rank_index=np.where(index < 0, np.nan, index),
            category_level_two=None, like=[bool(row["like"]) for row in rows],
            rerank_pos=[row["rerank_pos"] or None for row in rows],
            **{" category_level_two": two.astype(np.int16)},
        )  # fmt: skip
        write_sequences(tmp_path, day, sequences)
    left, right = small, open_small(tmp_path)
    for split in SPLITS:
        for one, other in zip(left.requests(split), right.requests(split), strict=True):
            assert_same(one, other)
    np.testing.assert_array_equal(left.item_category, right.item_category)


# Histories.


def event(video: int, time: int) -> list[int]:
    row = random_row(np.random.default_rng(0), video)
    return [
        video, row["author_id"], row["category_level_two"], row["category_level_one"],
        row["upload_type"], row["upload_timestamp"], row["duration"], time, 9_000, 77,
    ]  # fmt: skip


def test_nothing_from_the_future_is_in_a_history(tmp_path):
    write_worked(tmp_path)
    noon = NOON[DAYS[0]]
    sequence = np.zeros((4, 10), np.int64)
    # Out of order, at the moment itself, and after it; the last one's video occurs nowhere else.
    sequence[:] = [
        event(10, noon - 1),
        event(99, noon - 5000),
        event(20, noon),
        event(98, noon + 1),
    ]
    write_sequences(tmp_path, DAYS[0], {5: sequence})
    source = open_small(tmp_path)
    request = next(source.requests("train"))
    videos = [10, 20, 30, 40, 50, 60, 70, 99]
    assert source.spec.num_items == len(videos)
    assert [videos[item] for item in request.history_id] == [99, 10]
    np.testing.assert_allclose(request.user_features, [np.log(3) / np.log(51)], rtol=1e-6)
    np.testing.assert_allclose(request.context[-2:], [np.log1p(1e-3 / 86400), 0], atol=1e-9)


def test_of_a_long_history_the_latest_events_are_kept(tmp_path):
    write_worked(tmp_path)
    noon = NOON[DAYS[0]]
    sequence = np.array([event(video, noon - 1000 * (9 - video)) for video in range(1, 9)])
    write_sequences(tmp_path, DAYS[0], {5: sequence})
    source = open_small(tmp_path, history_length=3)
    assert next(source.requests("train")).history_id.tolist() == [5, 6, 7]


def test_a_request_without_a_sequence_has_no_history(written, tmp_path):
    _, days = written
    for day, (rows, sequences) in days.items():
        write_stages(tmp_path, day, rows)
        first = min(sequences)
        write_sequences(tmp_path, day, {first: sequences[first]})
    for request in open_small(tmp_path).requests("train"):
        assert request.request_id in (min(s) for _, s in days.values()) or (
            len(request.history_id) == 0
        )


class Evil:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_sequences_that_would_run_code_are_refused(tmp_path):
    write_worked(tmp_path)
    path = write_sequences(tmp_path, DAYS[1], {6: Evil(tmp_path / "trace")})
    with pytest.raises(UserError, match=f"{path} was not read: it asks for posix.system"):
        open_small(tmp_path)
    assert not (tmp_path / "trace").exists()


# Days and draws.


def test_a_draw_takes_whole_requests_and_keeps_their_order(written, small):
    root, _ = written
    everything = {r.request_id: r for s in SPLITS for r in small.requests(s)}
    source = open_small(root, max_requests_per_day=5)
    assert source.num_requests == {"train": 10, "validation": 5, "test": 5}
    drawn = list(source.requests("train"))
    assert [r.request_id for r in drawn] == [r.request_id for r in source.requests("train")]
    assert [r.time for r in drawn] == sorted(r.time for r in drawn)
    assert source.spec.num_items < small.spec.num_items
    for request in drawn:
        same = everything[request.request_id]
        np.testing.assert_array_equal(request.user_label, same.user_label)
        np.testing.assert_allclose(request.candidate_features, same.candidate_features)
        assert len(request.item_id) == len(same.item_id)
    again = open_small(root, max_requests_per_day=5, seed=1).requests("train")
    assert {r.request_id for r in drawn} != {r.request_id for r in again}


def test_a_split_reads_its_own_days_alone(written):
    root, days = written
    source = open_small(root, train_days=DAYS[1:2])
    assert {r.request_id for r in source.requests("train")} == set(days[DAYS[1]][1])
    assert {r.request_id for r in source.requests("test")} == set(days[DAYS[3]][1])
    assert {r.request_id for r in source.requests("validation")} == set(days[DAYS[2]][1])
    # The days between two splits are in none.
    source = open_small(root, train_days=DAYS[:1])
    assert source.num_requests == {"train": 12, "validation": 12, "test": 12}


# Faults.


def fault_of(root: Path, **changes) -> str:
    def read():
        list(open_small(root, **changes).requests("train"))

    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "/nowhere"}, "/nowhere/all_stage does not exist; set data.path"),
        ({"train_days": ()}, "data.train_days is empty"),
        ({"train_days": ("17.2.2024",)}, "data.train_days holds '17.2.2024'; give days like"),
        ({"train_days": ("20240217",)}, "data.train_days holds '20240217'"),
        ({"train_days": (DAYS[0], DAYS[0])}, "may name no day twice"),
        ({"validation_days": ()}, "data.validation_days is empty; name at least one day"),
        ({"validation_days": ("17.2.",)}, "data.validation_days holds '17.2.'; give days like"),
        (
            {"train_days": (DAYS[2],)},
            "data.train_days reaches to 2024-02-18 and data.validation_da",
        ),
        ({"validation_days": (DAYS[3],)}, "data.validation_days reaches to 2024-02-19 and data.te"),
        ({"validation_days": DAYS[1:3]}, "neither training nor validation may look ahead"),
        ({"validation_days": (DAYS[0],)}, "neither training nor validation may look ahead"),
        ({"test_days": ("2024-02-20",)}, "data.test_days names 2024-02-20, and "),
        ({"validation_days": DAYS[2:3] * 2}, "data.validation_days may name no day twice"),
        ({"tasks": ("watch", "buy")}, "tasks='buy' does not exist"),
        ({"tasks": ("watch", "watch")}, "none of them twice"),
        ({"retrieved": 5}, "set it to"),
    ],
)
def test_each_fault_of_a_config_is_one_line(written, changes, message):
    assert message in fault_of(written[0], **changes)


def test_missing_files_and_columns_are_named(tmp_path):
    root = write_worked(tmp_path)
    rows = worked_rows()
    path = write_stages(root, DAYS[0], rows, rank_index=None, like=None)
    message = fault_of(root)
    assert f"{path} has no column rank_index, like; it has: request_id," in message
    path = write_stages(root, DAYS[0], rows, like=["yes"] * len(rows))
    assert f"{path}: column like holds string, expected whole numbers" in fault_of(root)
    write_stages(root, DAYS[0], [])
    assert f"{path} has no rows" in fault_of(root)
    path.write_text("no feather")
    assert f"{path} is no Feather file" in fault_of(root)
    path.unlink()
    assert (
        f"data.train_days names {DAYS[0]}, and {path} does not exist; days with all files: "
        f"{', '.join(DAYS[1:])}" in fault_of(root)
    )
    (root / "seq_effective_50_dict").rename(root / "elsewhere")
    assert "seq_effective_50_dict does not exist" in fault_of(root)


def test_folders_without_a_common_day_are_refused(tmp_path):
    write_stages(tmp_path, DAYS[0], worked_rows())
    write_sequences(tmp_path, DAYS[1], {})
    message = fault_of(tmp_path)
    assert "no day has a file in both" in message
    assert f"({DAYS[0]})" in message
    assert f"({DAYS[1]})" in message


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([1], "holds a list, expected a dict"),
        ({5: np.zeros((50, 9), int)}, "the sequence of request 5 is no array"),
        ({5: np.zeros((50, 10))}, "the sequence of request 5 is no array of whole numbers"),
        ({5: [[0] * 10]}, "the sequence of request 5 is no array"),
        ({"5": np.zeros((50, 10), int)}, "its keys must be request ids"),
    ],
)
def test_sequences_of_another_form_are_refused(tmp_path, sequences, message):
    write_worked(tmp_path)
    path = write_sequences(tmp_path, DAYS[0], sequences)
    fault = fault_of(tmp_path)
    assert str(path) in fault
    assert message in fault


# From the files to a student's results.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("end_to_end")
    write_random(root / "RecFlow", requests=16)

    def config(**changes):
        config = config_file("small")
        config.update_from_flattened_dict(
            {
                "data.path": str(root / "RecFlow"), "data.dir": str(root / "datasets"),
                **{f"data.{key}": days for key, days in SMALL.items()}, "data.authors": 50,
                "funnel.retrieved": 24, "funnel.passed": 10, "funnel.shown": 3,
                "funnel.report_at": (5, 10), "batch.requests": 8, "batch.candidates": 8,
                "student.width": 4, "student.hidden": (8,), "train.steps": 4,
                "train.log_every": 2, "train.checkpoint_every": 4, "train.eval_every": 0,
                "parallel.devices": 1, "evaluation.requests": 8,
                # The config's own loss may not be there yet, and mode none has no use for any.
                "distill.mode": "none", "distill.loss": "bce",
            }
            | {key.replace("__", "."): value for key, value in changes.items()}
        )  # fmt: skip
        return config

    api.prepare(config())
    return root, config


def test_a_student_is_trained_and_measured_under_the_logged_positions(prepared):
    root, config = prepared
    (row,) = rows_on_test(api.train(config(), root / "none"))
    assert row["split"] == "test"
    for name in ("teacher_bce/effective_view", "teacher_kl/effective_view", "alignment_ratio"):
        assert np.isnan(row[name])
    for name in ("survival@5", "value_captured@5", "shown_recall@5", "passed_for_99"):
        assert row[name] > 0
    assert np.isfinite(row["user_bce/effective_view"])
    assert row["shown_recall@5"] < row["shown_recall@10"] <= 1
    assert (root / "none" / results.CALIBRATION_FILE).read_text().count("\n") > 1


def test_of_logged_positions_the_teachers_row_has_what_follows_from_the_order(prepared):
    _, config = prepared
    job = Job(config(), {}, Opened(config()))
    measured = measure.measure(job, "test", limit=16, costs=False)
    (row,) = measured.rows
    assert row["role"] == "teacher"
    assert not measured.calibration
    for name in ("user_bce", "user_calibration", "teacher_bce", "teacher_kl"):
        assert np.isnan(row[f"{name}/effective_view"])
    assert row["survival@5"] == 1
    assert row["passed_for_99"] == 3
    # Of what was shown it has two of three among its first two.
    shown = [len(request.user_label) for request in read_requests(job.dataset, "test")]
    assert row["shown_recall@5"] == pytest.approx(2 * len(shown) / sum(shown))


def test_a_loss_that_needs_probabilities_is_refused_before_training(prepared, tmp_path):
    _, config = prepared
    workdir = tmp_path / "refused"
    with pytest.raises(UserError, match="the log of recflow holds its positions"):
        api.train(config(distill__mode="aux"), workdir)
    with pytest.raises(UserError, match="the log of recflow holds its positions"):
        api.sweep(config(sweep__modes=("none", "shared")), workdir)
    assert not workdir.exists()


def requests_of(dataset):
    return read_requests(dataset, "train")


def test_training_batches_hold_stages_and_positions_in_the_order_of_time(prepared):
    _, config = prepared
    dataset = datasets.dataset_of(config())
    config_of_batch = BatchConfig(8, 8, 0.5, 1.0, seed=0, order="time")
    made = training_batches(dataset, config_of_batch, resident=False)
    batch = unpack(*next(iter(made)))
    stage = np.asarray(batch.stage)
    assert set(np.unique(stage)) <= {s.value for s in Stage}
    assert (stage == Stage.SHOWN).any()
    weight = np.asarray(batch.teacher_weight)[..., 0]
    assert not weight[stage < Stage.PASSED].any()
    assert np.asarray(batch.teacher_probability)[..., 0][weight > 0].max() == 0.5
    first = [request.user_id for request in itertools.islice(requests_of(dataset), 8)]
    assert np.asarray(batch.user_id).tolist() == first


# The protocol of LCRON: some of each stage, by the flags alone.


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The config `:lcron` on files of eight requests a day, and the rows of each request."""
    root = tmp_path_factory.mktemp("graded")
    written = write_random(root / "RecFlow", 8, chunk=50, request_rows=graded_request)
    config = config_file("lcron")
    config.update_from_flattened_dict(
        {
            "data.path": str(root / "RecFlow"), "data.dir": str(root / "datasets"),
            **{f"data.{key}": days for key, days in SMALL.items()}, "data.authors": 50,
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
    source = recflow.open_source(config.data, config.tasks, config.funnel)
    duration = source.item_features[:, 0]
    for request in source.requests("test"):
        grades = grades_by_hand(rows[request.request_id])
        expected = [row for of_flag in grades.values() for row in of_flag]
        assert [len(of_flag) for of_flag in grades.values()][:3] == [10, 10, 10]
        np.testing.assert_allclose(
            duration[request.item_id], [np.log1p(row["duration"] / 1000) for row in expected]
        )
        assert request.num_passed == 20
        # Those at the top are what a student is to find. Labels are of what users have seen of it.
        top = grades["rank_pos"]
        assert request.user_label[:, 0].tolist() == [row["effective_view"] for row in top]
        assert request.label_weight.tolist() == [row["realshow"] for row in top]
        assert request.teacher_weight.tolist() == [1] * 10 + [0] * 10
        probability = request.teacher_probability[:10, 0]
        np.testing.assert_allclose(probability, 1 / (2 + np.arange(10)), rtol=1e-6)


def test_survival_at_thirty_is_the_recall_of_the_final_rankers_ten(graded):
    """Of a student that sorts by what means nothing, against the rows of the files."""
    _, config, rows = graded
    dataset = datasets.dataset_of(config)
    sizes = {"requests": 8, "candidates": 40}

    def serve(middle, batch, items):
        away = jnp.abs(items.features[batch.item_id, 0] - middle)
        return Served({"user": 1 / (1 + away[..., None])}, met={})

    student = Ranker(serve, jnp.full(1, 4.0))
    batches = evaluation_batches(dataset, "test", **sizes)
    plan = Plan((1.0,), config.funnel.shown)
    _, ((summed,),) = evaluate(None, [student], batches, dataset.items, plan)
    recalls = []
    for request in read_requests(dataset, "test"):
        grades = grades_by_hand(rows[request.request_id])
        every = [row for of_flag in grades.values() for row in of_flag]
        every.sort(key=lambda row: abs(np.log1p(row["duration"] / 1000) - 4))
        recalls.append(sum(row in grades["rank_pos"] for row in every[:30]) / 10)
    assert 0 < np.mean(recalls) < 1
    sums = summed["user"].sums
    survival = sums["survival"][29] / sums["funnel_requests"]
    assert survival == pytest.approx(np.mean(recalls))
    assert sums["shown_kept"][29] / 80 == pytest.approx(np.mean(recalls))


def test_a_request_without_any_of_the_flags_is_none(tmp_path):
    rows = [row | dict.fromkeys(recflow.GRADES, 0) for row in worked_rows()]
    write_worked(tmp_path)
    write_stages(tmp_path, DAYS[0], rows + [row | {"request_id": 4} for row in worked_rows()])
    write_sequences(tmp_path, DAYS[0], {4: np.zeros((SEQUENCE_LENGTH, 10), np.int64)})
    source = open_small(tmp_path, of_each_stage=2, retrieved=8)
    assert [request.request_id for request in source.requests("train")] == [4, 6]
    write_stages(tmp_path, DAYS[0], rows)
    fault = fault_of(tmp_path, of_each_stage=2)
    assert fault.endswith("has no rows of rank_pos, rank_neg, coarse_neg, prerank_neg")


@pytest.mark.parametrize(("of_each", "most"), [(1, 4), (2, 6)])
def test_a_funnel_must_hold_so_many_of_each_stage(tmp_path, of_each, most):
    write_worked(tmp_path)
    open_small(tmp_path, of_each_stage=of_each, retrieved=most)
    message = f"retrieved={most - 1} is less than the {most} candidates"
    assert message in fault_of(tmp_path, of_each_stage=of_each, retrieved=most - 1)


@pytest.mark.slow
def test_the_protocol_of_lcron_trains_on_stages_alone(graded):
    root, config, _ = graded
    (row,) = rows_on_test(api.train(config, root / "student"))
    assert 0 < row["survival@30"] <= 1
    assert row["distill_loss"] == "ranknet:stage"
    losses = [json.loads(line) for line in (root / "student" / "metrics.jsonl").open()]
    assert losses[-1]["distill_loss"] < losses[0]["distill_loss"]
