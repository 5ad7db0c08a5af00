"""Tests of KuaiRand as a source, on files in the published layout whose rows are made up."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.configs import kuairand as config_of_kuairand
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.sources import kuairand, kuairand_files
from kd_ranker.sources.kuairand_files import (
    COLUMN_OF_TASK,
    RANDOM_BIT,
    USER_CATEGORIES,
    Impressions,
)
from kd_ranker.sources.registry import SOURCES
from tests import small
from tests.sources import kuairand_files as layout
from tests.sources.kuairand_files import APRIL_8, APRIL_22, BEIJING, RANDOM, STANDARD_1, STANDARD_2
from tests.sources.kuairand_files import impression as row_of
from tests.sources.remembered import remembered

TASKS = kuairand.TASKS


@pytest.fixture(autouse=True, scope="module")
def files_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kuairand_files, "read_kuairand", remembered(kuairand_files.read_kuairand))
        yield


DAY = 86400
APRIL_29 = APRIL_22 + 7 * DAY
FUNNEL = ConfigDict({"retrieved": 1000})


def make_data(path: Path, /, **changes: object) -> ConfigDict:
    data = {
        "name": "kuairand_pure",
        "path": str(path),
        "seed": 0,
        "history_length": 4,
        "session_minutes": 5,
        "random_session_minutes": 600,
        "impressions_per_request": 3,
        "negatives": 10,
        "test": "random",
        "validation_from": "2022-04-22",
        "test_from": "2022-04-29",
        "train_requests": 0,
        "validation_requests": 0,
        "test_requests": 0,
        "max_users": 0,
        "author_rows": 50,
        "music_rows": 60,
    }
    return ConfigDict(data | changes)


def open_small(path: Path, tasks: tuple[str, ...] = TASKS, /, **changes: object) -> Source:
    return kuairand.open_source(make_data(path, **changes), tasks, FUNNEL)


def assert_same(left: Request, right: Request, but: tuple[str, ...] = ()) -> None:
    for field in dataclasses.fields(Request):
        if field.name not in but:
            np.testing.assert_array_equal(
                getattr(left, field.name), getattr(right, field.name), err_msg=field.name
            )


def everything(source: Source) -> list[Request]:
    return [request for split in SPLITS for request in source.requests(split)]


def test_worked_example(tmp_path: Path) -> None:
    """User 3 watches four videos on 20 April; on 29 April two are put into the feed at random."""
    at = APRIL_8 + 12 * DAY + 10 * 3600  # ten in the morning, a Wednesday
    later = APRIL_29 + 3600
    path = layout.write(
        tmp_path,
        {
            STANDARD_1: [
                row_of(3, 10, at, "cw"),
                row_of(3, 20, at + 60, ""),
                row_of(3, 10, at + 90, "l"),  # the same video again, in the same request
                row_of(3, 30, at + 91, "cws"),
                row_of(3, 40, at + 600, "", tab=0),  # another tab
                row_of(4, 20, at - DAY, "cw"),
            ],
            STANDARD_2: [row_of(3, 50, later - 1, "w"), row_of(4, 50, later + 5, "")],
            RANDOM: [
                row_of(4, 30, later - DAY, "r"),
                row_of(3, 40, later, "wr"),
                row_of(3, 60, later + 7200, "lr"),
            ],
            "user_features": [layout.user(3), layout.user(4)],
            "video_features_basic": [layout.video(number) for number in (10, 20, 30, 40, 50)],
        },
    )
    source = open_small(path, impressions_per_request=4, session_minutes=10)
    assert source.num_requests == {"train": 3, "validation": 1, "test": 1}
    other, first, in_tab_0 = source.requests("train")
    (validation,) = source.requests("validation")
    (test,) = source.requests("test")
    assert [request.time for request in (other, first, in_tab_0)] == [at - DAY, at, at + 600]
    assert [request.user_id for request in (other, first, in_tab_0)] == [1, 0, 0]

    # Videos 10 to 60 are items 0 to 5. Of what was not shown, only 20 had been shown before.
    assert other.item_id.tolist() == [1]
    assert other.history_id.shape == (0,)
    assert other.history_features.shape == (0, 7)
    assert first.item_id.tolist() == [0, 1, 2]
    assert first.num_passed == 3
    # watch, like, share, follow, comment, click; both impressions of video 10 count.
    assert first.user_label.tolist() == [[1, 1, 0, 0, 0, 1], [0] * 6, [1, 0, 1, 0, 0, 1]]
    assert first.history_id.shape == (0,)
    assert in_tab_0.item_id[0] == 3
    assert set(in_tab_0.item_id[1:]) == {0, 1, 2}
    assert in_tab_0.user_label.shape == (1, 6)
    # What he did something with, oldest first; 20 he only saw.
    assert in_tab_0.history_id.tolist() == [0, 0, 2]
    ages = np.log1p(np.array([600, 510, 509]) / 3600) / 5
    np.testing.assert_allclose(
        in_tab_0.history_features,
        [
            [1, 0, 0, 0, 0, 1, ages[0]],
            [0, 1, 0, 0, 0, 0, ages[1]],
            [1, 0, 1, 0, 0, 1, ages[2]],
        ],
        rtol=1e-6,
    )

    assert (validation.user_id, validation.time) == (1, later - DAY)
    assert validation.item_id.tolist() == [2, 0, 1, 3]
    assert (test.user_id, test.time) == (0, later)
    assert test.item_id[:2].tolist() == [3, 5]
    assert test.user_label.tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert test.item_id[2:].tolist() == [0, 1, 2, 4]
    # At most four events, of which the standard log of the same day is the last.
    assert test.history_id.tolist() == [0, 0, 2, 4]
    # Video 10: shown twice before, watched once, liked once; uploaded on 1 April.
    prior = np.array([0.3, 0.02, 0.001])
    lift = np.log((np.array([1, 1, 0]) + 20 * prior) / (22 * prior))
    age = np.log1p((later - (APRIL_8 - 7 * DAY)) / DAY) / 3
    np.testing.assert_allclose(
        test.candidate_features[2], [np.log(3) / 5, *lift, age, 0], rtol=1e-6
    )
    # Video 60 is in no feature file and had not been shown.
    np.testing.assert_allclose(test.candidate_features[1], [0, 0, 0, 0, 0, 1], atol=1e-7)
    # Six impressions of the user so far, two of them watched and clicked, one liked, one shared.
    prior = np.array([0.3, 0.02, 0.001, 0.001, 0.002, 0.4])
    lift = np.log((np.array([3, 1, 1, 0, 0, 2]) + 20 * prior) / (26 * prior))
    np.testing.assert_allclose(test.user_features[7:], [np.log(7) / 5, *lift], rtol=1e-6)
    # Saturday's one o'clock would be wrong: 22 April 2022 was a Friday.
    angle = 2 * np.pi / 24
    friday = [0, 0, 0, 0, 1, 0, 0]
    np.testing.assert_allclose(
        test.context,
        [np.sin(angle), np.cos(angle), *friday, np.log1p(1 / 3600) / 3, 0],
        rtol=1e-6,
        atol=1e-7,
    )
    np.testing.assert_allclose(first.context[2:], [0, 0, 1, 0, 0, 0, 0, 0, 1])


def test_item_features(tmp_path: Path) -> None:
    rows = layout.random_rows(0) | {
        "video_features_basic": [
            layout.video(1, upload_dt="2022-05-08"),
            layout.video(4, video_duration="", upload_dt=""),
            layout.video(7, server_height="", upload_dt="2022-06-01"),
        ]
    }
    features = open_small(layout.write(tmp_path, rows)).item_features
    seconds, shape = np.log(18.2) - 4, np.log(1280 / 720)
    expected = [
        [seconds, shape, np.log(2) / 3, 0, 0, 0],
        [0, shape, 0, 1, 0, 1],
        [seconds, 0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    np.testing.assert_allclose(features[:4], expected, rtol=1e-6)


class Impression(NamedTuple):
    """A row of a log, read without the code under test; ids as the source numbers them."""

    user: int
    item: int
    time: int
    done: tuple[int, ...]
    is_random: bool
    tab: int


def read_impressions(path: Path) -> list[Impression]:
    """In the order of the files."""
    lines = []
    for stem in (STANDARD_1, STANDARD_2, RANDOM):
        with (path / "data" / f"{stem}_pure.csv").open() as file:
            lines += list(csv.DictReader(file))
    users = sorted({int(line["user_id"]) for line in lines})
    videos = sorted({int(line["video_id"]) for line in lines})
    return [
        Impression(
            user=users.index(int(line["user_id"])),
            item=videos.index(int(line["video_id"])),
            time=int(line["time_ms"]) // 1000,
            done=tuple(int(line[column]) for column in COLUMN_OF_TASK.values()),
            is_random=line["is_rand"] == "1",
            tab=int(line["tab"]),
        )
        for line in lines
    ]


def naive_blocks(impressions: list[Impression], pause: int, most: int) -> list[list[Impression]]:
    """The same as `cut_blocks`, one impression after the other."""
    blocks: list[list[Impression]] = []
    for new in sorted(impressions, key=lambda row: (row.user, row.tab, row.time)):
        last = blocks[-1][-1] if blocks else None
        goes_on = last and (last.user, last.tab) == (new.user, new.tab)
        if goes_on and last and new.time - last.time < pause and len(blocks[-1]) < most:
            blocks[-1].append(new)
        else:
            blocks.append([new])
    return blocks


def counts(rows: list[Impression]) -> np.ndarray:
    """[impressions, of how many each task was done]."""
    return np.array([len(rows), *np.sum([row.done for row in rows] or [(0,) * 6], axis=0)])


def lifts(count: np.ndarray) -> np.ndarray:
    return np.array(
        [
            np.log((done + 20 * prior) / ((count[0] + 20) * prior))
            for done, prior in zip(count[1:], (0.3, 0.02, 0.001, 0.001, 0.002, 0.4), strict=True)
        ]
    )


def split_of(row: Impression, test: str, validation_time: int, test_time: int) -> str:
    """The split that has an impression, "" if none has it."""
    if row.time < validation_time:
        return "" if row.is_random else "train"
    if row.is_random != (test == "random"):
        return ""
    return "validation" if row.time < test_time else "test"


@pytest.mark.parametrize(("seed", "test"), [(0, "random"), (1, "standard"), (2, "random")])
def test_against_brute_force(tmp_path: Path, seed: int, test: str) -> None:
    path = layout.write(tmp_path, layout.random_rows(seed))
    source = open_small(path, test=test, validation_from="2022-04-25", test_from="2022-05-02")
    impressions = read_impressions(path)
    pause = {"train": 300, "validation": 36000 if test == "random" else 300}
    pause["test"] = pause["validation"]
    seen = {"with a history": 0, "with negatives": 0, "with a repeat": 0, "cut": 0}
    for split in SPLITS:
        chosen = [
            row
            for row in impressions
            if split_of(row, test, APRIL_22 + 3 * DAY, APRIL_22 + 10 * DAY) == split
        ]
        blocks = naive_blocks(chosen, pause[split], 3)
        requests = list(source.requests(split))
        assert len(requests) == len(blocks) == source.num_requests[split]
        assert [request.time for request in requests] == sorted(block[0].time for block in blocks)
        assert [request.request_id for request in requests] == list(range(len(requests)))
        # Requests of the same second may stand in any order.
        key = {(block[0].time, block[0].user, block[0].tab, i): block for i, block in
               enumerate(blocks)}  # fmt: skip
        left = sorted(key)
        starts = source.spec.category_starts
        tab_start = starts[[category.name for category in source.spec.categories].index("tab")]
        for request in requests:
            tab = int(request.request_category[-1]) - tab_start
            match = next(
                k
                for k in left
                if k[:3] == (request.time, request.user_id, tab)
                and list(dict.fromkeys(row.item for row in key[k]))
                == request.item_id[: request.num_passed].tolist()
            )
            left.remove(match)
            block = key[match]
            shown = list(dict.fromkeys(row.item for row in block))
            labels = [
                np.max([row.done for row in block if row.item == item], axis=0) for item in shown
            ]
            np.testing.assert_array_equal(request.user_label, labels)
            np.testing.assert_array_equal(request.label_weight, 1)

            earlier = [row for row in impressions if row.time < request.time]
            of_user = [row for row in earlier if row.user == request.user_id]
            of_user.sort(key=lambda row: row.time)
            count = counts(of_user)
            np.testing.assert_allclose(
                request.user_features[7:], [np.log1p(count[0]) / 5, *lifts(count)], rtol=1e-5
            )
            pause_hours = (request.time - of_user[-1].time) / 3600 if of_user else 0.0
            np.testing.assert_allclose(
                request.context[-2:], [np.log1p(pause_hours) / 3, not of_user], rtol=1e-5
            )
            events = [row for row in of_user if any(row.done)][-4:]
            assert request.history_id.tolist() == [row.item for row in events]
            np.testing.assert_allclose(
                request.history_features,
                np.array(
                    [[*row.done, np.log1p((request.time - row.time) / 3600) / 5] for row in events]
                ).reshape(-1, 7),
                rtol=1e-5,
            )
            negatives = request.item_id[len(shown) :].tolist()
            shown_before = {row.item for row in earlier if not row.is_random}
            assert negatives == sorted(set(negatives))
            assert set(negatives) <= shown_before - set(shown)
            assert len(negatives) <= 10
            for item, features in zip(request.item_id, request.candidate_features, strict=True):
                count = counts([row for row in earlier if row.item == item])
                np.testing.assert_allclose(
                    features[:4], [np.log1p(count[0]) / 5, *lifts(count)[:3]], rtol=1e-5, atol=1e-6
                )
            seen["with a history"] += len(events) > 1
            seen["with negatives"] += len(negatives) == 10
            seen["with a repeat"] += len(shown) < len(block)
            seen["cut"] += len(block) == 3
        assert not left
    assert all(number > 5 for number in seen.values()), seen


def test_what_happens_later_changes_labels_alone(tmp_path: Path) -> None:
    rows = layout.random_rows(3, standard=600)
    now = APRIL_22 + 10 * DAY

    def is_later(row: str) -> bool:
        return int(row.split(",")[4]) >= 1000 * now

    def changed(row: str) -> str:
        cells = row.split(",")
        flags = ["1" if cell == "0" else "0" for cell in cells[5:12]]
        return ",".join([*cells[:1], "4", *cells[2:5], *flags, *cells[12:]])

    logs = (STANDARD_1, STANDARD_2, RANDOM)
    other = rows | {
        stem: [changed(row) if is_later(row) else row for row in rows[stem]] for stem in logs
    }
    gone = rows | {stem: [row for row in rows[stem] if not is_later(row)] for stem in logs}
    versions = [
        open_small(
            layout.write(tmp_path / name, of),
            test="standard",
            validation_from="2022-04-18",
            test_from="2022-04-20",
        )
        for name, of in (("first", rows), ("other", other), ("gone", gone))
    ]
    # Ids are of what occurs anywhere; here all of it does before.
    assert len({(source.spec.num_users, source.spec.num_items) for source in versions}) == 1
    of_test = [list(source.requests("test")) for source in versions]
    compared = 0
    for first, second, third in zip(*of_test, strict=False):
        if first.time + 3 * 300 < now:
            assert_same(first, second)
            assert_same(first, third)
            compared += 1
    assert compared > 50
    assert of_test[0][-1].time > now


@pytest.mark.parametrize("test", ["random", "standard"])
@pytest.mark.parametrize(
    "first_days",
    [("2022-04-15", "2022-04-29"), ("2022-04-22", "2022-04-29"), ("2022-04-30", "2022-05-05")],
)
def test_every_impression_is_in_one_request_at_most_and_the_splits_follow_each_other(
    tmp_path: Path, test: str, first_days: tuple[str, str]
) -> None:
    path = layout.write(tmp_path, layout.random_rows(4))
    source = open_small(
        path,
        test=test,
        validation_from=first_days[0],
        test_from=first_days[1],
        impressions_per_request=1,
    )
    validation_time, test_time = (
        int(APRIL_8 + (np.datetime64(day) - np.datetime64("2022-04-08")).astype(int) * DAY)
        for day in first_days
    )

    def impressions_of(split: str) -> list[tuple[int, int, int, tuple[int, ...]]]:
        # With one impression a request, the request says all of it.
        return [
            (r.user_id, r.time, int(r.item_id[0]), tuple(r.user_label[0].tolist()))
            for r in source.requests(split)
        ]

    expected = {
        split: sorted(
            (row.user, row.time, row.item, row.done)
            for row in read_impressions(path)
            if split_of(row, test, validation_time, test_time) == split
        )
        for split in SPLITS
    }
    found = {split: impressions_of(split) for split in SPLITS}
    assert {split: sorted(found[split]) for split in SPLITS} == expected
    times = {split: [time for _, time, *_ in found[split]] for split in SPLITS}
    assert max(times["train"]) < validation_time <= min(times["validation"])
    assert max(times["validation"]) < test_time <= min(times["test"])


def test_a_session_that_spans_the_end_of_a_split_is_cut_there(tmp_path: Path) -> None:
    rows = layout.random_rows(5) | {
        STANDARD_1: [row_of(5, 1, APRIL_22 - 2), row_of(5, 4, APRIL_22 - 1)],
        STANDARD_2: [
            *(row_of(5, 7 + 3 * after, APRIL_22 + after) for after in range(3)),
            row_of(5, 1, APRIL_22 + DAY - 1),
            *(row_of(5, 4 + 3 * after, APRIL_22 + DAY + after) for after in range(4)),
        ],
    }
    source = open_small(
        layout.write(tmp_path, rows),
        test="standard",
        test_from="2022-04-23",
        impressions_per_request=9,
    )
    cut = {
        split: [(r.time - APRIL_22, r.num_passed) for r in source.requests(split)]
        for split in SPLITS
    }
    assert cut == {"train": [(-2, 2)], "validation": [(0, 3), (DAY - 1, 1)], "test": [(DAY, 4)]}


impressions = st.lists(
    st.tuples(st.integers(0, 2), st.integers(-1, 2), st.integers(0, 40)), min_size=1, max_size=40
)


def log_of(rows: list[tuple[int, int, int]]) -> Impressions:
    user, tab, time = np.array(sorted(rows, key=lambda row: (row[0], row[2])), np.int32).T
    zeros = np.zeros(len(user), np.int32)
    return Impressions(user, zeros, time, zeros.astype(np.uint8), tab.astype(np.int8))


@given(impressions, st.integers(1, 9), st.integers(1, 5))
def test_blocks_are_those_of_a_walk_over_the_impressions(
    rows: list[tuple[int, int, int]], pause: int, most: int
) -> None:
    log = log_of(rows)
    naive = naive_blocks(
        [
            Impression(int(log.user[i]), 0, int(log.time[i]), (i,), False, int(log.tab[i]))
            for i in range(len(rows))
        ],
        pause,
        most,
    )
    ordered, start = kuairand.cut_blocks(log, np.arange(len(rows)), pause, most)
    blocks = [part.tolist() for part in np.split(ordered, start[1:-1])]
    assert blocks == [[row.done[0] for row in block] for block in naive]
    assert start[0] == 0
    assert start[-1] == len(rows)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 63)), min_size=1, max_size=12))
def test_merged_keeps_all_that_was_done_on_each_video(shown: list[tuple[int, int]]) -> None:
    done: dict[int, int] = {}
    for item, signals in shown:
        done[item] = done.get(item, 0) | signals
    item, signals = np.array(shown).T
    items, merged = kuairand.merged(item.astype(np.int32), signals.astype(np.uint8))
    assert dict(zip(items.tolist(), merged.tolist(), strict=True)) == done
    assert list(items) == list(done), "where each was shown first"
    assert (items.dtype, merged.dtype) == (np.int32, np.uint8)


def pool(items: list[int], random: list[int] = ()) -> Impressions:  # type: ignore[assignment]
    item = np.array([*items, *random], np.int32)
    signals = np.repeat([0, 1 << RANDOM_BIT], [len(items), len(random)]).astype(np.uint8)
    return Impressions(
        np.zeros_like(item), item, np.arange(len(item)), signals, np.zeros_like(item)
    )


def draw(log: Impressions, number: int, shown: list[int], seed: int) -> list[int]:
    places = np.arange(len(log.item))
    generator = np.random.default_rng(seed)
    return kuairand.draw_negatives(
        log, places, np.array(shown, np.int32), number, generator
    ).tolist()


def test_negatives_come_as_often_as_their_videos_were_shown() -> None:
    # Video 0 was shown 60 times, 1 thirty times, 2 ten times; 3 at random alone, 4 in this request.
    log = pool([0] * 60 + [1] * 30 + [2] * 10 + [4] * 50, random=[3] * 50)
    drawn = np.array([draw(log, 1, [4], seed) for seed in range(4000)]).ravel()
    share = np.bincount(drawn, minlength=5) / 4000
    expected = np.array([0.6, 0.3, 0.1, 0, 0])
    assert np.all(np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_negatives_without_replacement_follow_the_draws_one_after_the_other() -> None:
    log = pool([0] * 60 + [1] * 30 + [2] * 10)
    drawn = [tuple(draw(log, 2, [], seed)) for seed in range(4000)]
    # P(0 then 1) + P(1 then 0), and so on.
    expected = {
        (0, 1): 0.6 * 0.3 / 0.4 + 0.3 * 0.6 / 0.7,
        (0, 2): 0.6 * 0.1 / 0.4 + 0.1 * 0.6 / 0.9,
        (1, 2): 0.3 * 0.1 / 0.7 + 0.1 * 0.3 / 0.9,
    }
    for pair, chance in expected.items():
        share = np.mean([found == pair for found in drawn])
        assert abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / 4000)


def test_as_many_negatives_as_there_are(tmp_path: Path) -> None:
    log = pool([0, 1, 2], random=[3])
    assert draw(log, 10, [1], 0) == [0, 2]
    assert draw(log, 0, [1], 0) == []
    assert draw(pool([]), 10, [1], 0) == []
    path = layout.write(tmp_path, layout.random_rows(6))
    for request in everything(open_small(path, negatives=0)):
        assert len(request.item_id) == request.num_passed


def test_shapes_dtypes_and_ids_follow_the_spec(tmp_path: Path) -> None:
    source = open_small(layout.write(tmp_path, layout.random_rows(7)))
    spec = source.spec
    assert (spec.dataset, spec.num_users, spec.num_items) == ("kuairand_pure", 6, 40)
    assert spec.teacher_version == ""
    assert source.item_features.shape == (40, spec.item_features)
    assert source.item_features.dtype == np.float32
    assert source.item_category is not None
    assert source.item_category.shape == (40, spec.category_width("item"))
    assert source.item_category.dtype == np.int32
    assert spec.category_width("candidate") == 0
    for request in everything(source):
        events, candidates, shown = (
            len(request.history_id), len(request.item_id), request.num_passed
        )  # fmt: skip
        expected = {
            "user_features": (np.float32, (spec.user_features,)),
            "context": (np.float32, (spec.context_features,)),
            "history_id": (np.int32, (events,)),
            "history_features": (np.float32, (events, spec.history_features)),
            "item_id": (np.int32, (candidates,)),
            "candidate_features": (np.float32, (candidates, spec.candidate_features)),
            "user_label": (np.uint8, (shown, 6)),
            "label_weight": (np.float32, (shown,)),
            "teacher_probability": (np.float32, (0, 6)),
            "teacher_weight": (np.float32, (0,)),
            "true_probability": (np.float32, (0, 6)),
            "request_category": (np.int32, (spec.category_width("request"),)),
        }
        for name, (dtype, shape) in expected.items():
            value = getattr(request, name)
            assert (value.dtype, value.shape) == (dtype, shape), name
            assert np.isfinite(value).all(), name
        assert request.candidate_category is None
        assert request.teacher_version == ""
        for value in (request.request_id, request.time, request.user_id):
            assert type(value) is int
        assert len(set(request.item_id)) == candidates
        assert 1 <= shown <= 3
        assert events <= spec.history_length == 4


def test_categories_name_the_cells_of_the_files(tmp_path: Path) -> None:
    rows = layout.random_rows(8)
    path = layout.write(tmp_path, rows)
    source = open_small(path)
    spec = source.spec
    names = [category.name for category in spec.categories]
    assert names[: len(USER_CATEGORIES) + 1] == [*USER_CATEGORIES, "tab"]
    start = dict(zip(names, spec.category_starts, strict=True))
    size = {category.name: category.size for category in spec.categories}

    def check(ids: list[int], cells: list[str], name: str) -> None:
        """The same cell has the same id, another one another, in the feature's own range."""
        pairs = {(cell, category) for cell, category in zip(cells, ids, strict=True)}
        assert len(pairs) == len({cell for cell, _ in pairs})
        assert all((category == -1) == (cell == "") for cell, category in pairs)
        inside = {category for _, category in pairs} - {-1}
        if name not in ("author_id", "music_id"):
            assert len(inside) == len({cell for cell, _ in pairs if cell})
        assert all(start[name] <= category < start[name] + size[name] for category in inside)

    known = {int(line["user_id"]): line for line in csv.DictReader(
        [layout.USER_HEADER, *rows["user_features"]])}  # fmt: skip
    user_of = {request.user_id: request.request_category for request in everything(source)}
    users = [5, 7, 9, 11, 13, 15]
    for index, name in enumerate(USER_CATEGORIES):
        cells = [known[user][name] if user in known else "" for user in users]
        check([int(user_of[row][index]) for row in range(6)], cells, name)

    videos = {int(line["video_id"]): line for line in csv.DictReader(
        [layout.VIDEO_HEADER, *rows["video_features_basic"]])}  # fmt: skip
    cells_of = [videos.get(3 * item + 1, {}) for item in range(40)]
    assert source.item_category is not None
    for index, name in enumerate(names[len(USER_CATEGORIES) + 1 : -1]):
        cells = [cell.get(name, "") for cell in cells_of]
        check(source.item_category[:, index].tolist(), cells, name)
    tags = [(cell.get("tag") or ",").split(",") for cell in cells_of]
    bags = source.item_category[:, -4:]
    for place in (0, 1):
        # A tag that comes twice is in the bag once.
        cells = ["" if place and tag[0] == tag[1] else tag[place] for tag in tags]
        check(bags[:, place].tolist(), cells, "tag")
    assert (bags[:, 2:] == -1).all()

    impressions_of = read_impressions(path)
    for request in source.requests("train"):
        tab = request.request_category[-1] - start["tab"]
        assert any(
            (row.user, row.time, row.tab) == (request.user_id, request.time, tab)
            for row in impressions_of
        )


def test_a_tab_that_was_not_published_has_no_category(tmp_path: Path) -> None:
    rows = layout.random_rows(9)
    rows[STANDARD_1] = [row_of(5, 1, APRIL_8 + 1, tab=15), row_of(5, 1, APRIL_8 + 2, tab=14)]
    first, second = open_small(layout.write(tmp_path, rows)).requests("train")
    assert first.request_category is not None
    assert second.request_category is not None
    assert first.request_category[-1] == -1
    assert second.request_category[-1] > 0


def test_asked_tasks_are_columns(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(10))
    one, other = open_small(path, ("click", "like")), open_small(path)
    for part, full in zip(everything(one), everything(other), strict=True):
        np.testing.assert_array_equal(part.user_label, full.user_label[:, [5, 1]])
        assert part.teacher_probability.shape == part.true_probability.shape == (0, 2)
        np.testing.assert_array_equal(part.item_id, full.item_id)


def test_the_same_requests_come_at_every_call(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(11))
    few = {"train_requests": 20, "validation_requests": 5, "test_requests": 10, "negatives": 5}
    source = open_small(path, **few)
    again = open_small(path, **few)
    for split in reversed(SPLITS):
        calls = [list(of.requests(split)) for of in (source, source, again)]
        for left, middle, right in zip(*calls, strict=True):
            assert_same(left, middle)
            assert_same(left, right)
    other = open_small(path, **few, seed=1)
    pairs = list(zip(everything(source), everything(other), strict=True))
    assert any(left.time != right.time for left, right in pairs)


def test_kept_requests_are_some_of_all_with_nothing_else_changed(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(12))
    whole = open_small(path)
    samples = set()
    for seed in range(4):
        few = {"train": 25, "validation": 5, "test": 7}
        some = open_small(path, seed=seed, **{f"{split}_requests": n for split, n in few.items()})
        assert some.num_requests == few
        for split in SPLITS:
            by_key: dict[tuple[int, int], list[Request]] = {}
            for request in whole.requests(split):
                by_key.setdefault((request.time, request.user_id), []).append(request)
            kept = list(some.requests(split))
            assert [r.time for r in kept] == sorted(r.time for r in kept)
            for request in kept:
                same = [
                    r
                    for r in by_key[request.time, request.user_id]
                    if r.item_id[0] == request.item_id[0] and r.num_passed == request.num_passed
                ]
                assert same
                np.testing.assert_array_equal(request.user_features, same[0].user_features)
                if seed == 0:
                    assert_same(request, same[0], but=("request_id",))
            samples.add(tuple(r.time for r in kept))
    assert len(samples) == 12


def test_every_seed_draws_other_negatives_for_the_same_request(tmp_path: Path) -> None:
    path = layout.write(tmp_path, layout.random_rows(13))
    one, other = (list(open_small(path, seed=seed).requests("test")) for seed in (0, 1))
    different = 0
    for left, right in zip(one, other, strict=True):
        assert_same(left, right, but=("item_id", "candidate_features"))
        different += set(left.item_id) != set(right.item_id)
    assert different > len(one) / 2


def test_random_impressions_before_the_validation_are_history_and_nothing_else(
    tmp_path: Path,
) -> None:
    rows = layout.random_rows(14) | {
        STANDARD_1: [row_of(5, 1, APRIL_8)],
        STANDARD_2: [row_of(5, 4, APRIL_22 + DAY)],
        RANDOM: [
            row_of(5, 7, APRIL_22 + 60, "wr"),
            row_of(5, 13, APRIL_22 + 3 * DAY, "lr"),
            row_of(5, 10, APRIL_22 + 5 * DAY, "r"),
        ],
    }
    path = layout.write(tmp_path, rows)
    source = open_small(path, validation_from="2022-04-24", test_from="2022-04-26")
    _, train = source.requests("train")
    (validation,) = source.requests("validation")
    (test,) = source.requests("test")
    # Videos 1, 4, 7, 10, 13 are items 0 to 4. A video of the random log is no negative.
    assert train.history_id.tolist() == [2]
    assert train.item_id.tolist() == [1, 0]
    assert validation.item_id.tolist() == [4, 0, 1]
    assert validation.history_id.tolist() == [2]
    assert test.item_id.tolist() == [3, 0, 1]
    # What the user did in the validation has happened by then.
    assert test.history_id.tolist() == [2, 4]


@pytest.mark.parametrize("variant", ["1k", "27k"])
def test_the_variants_are_read_alike(tmp_path: Path, variant: str) -> None:
    rows = layout.random_rows(15)
    pure = open_small(layout.write(tmp_path / "pure", rows))
    # The same rows, in the files of the other variant.
    path = layout.write(tmp_path / variant, rows, variant)
    other = open_small(path, name=f"kuairand_{variant}")
    assert other.spec == dataclasses.replace(pure.spec, dataset=f"kuairand_{variant}")
    for left, right in zip(everything(pure), everything(other), strict=True):
        assert_same(left, right)


def test_the_sources_are_named() -> None:
    for name in ("kuairand_pure", "kuairand_1k", "kuairand_27k"):
        assert SOURCES[name].tasks == ("watch", "like", "share", "follow", "comment", "click")


SETTINGS = [
    ({"test_from": "22 April"}, "data.test_from='22 April' is not a date like 2022-04-22"),
    ({"test_from": "2022-04-31"}, "data.test_from='2022-04-31' is not a date"),
    ({"validation_from": "May"}, "data.validation_from='May' is not a date like 2022-04-22"),
    (
        {"validation_from": "2022-04-29"},
        "validation requests are those from data.validation_from=2022-04-29 until "
        "data.test_from=2022-04-29, which leaves no day",
    ),
    (
        {"path": "/absent", "validation_from": "2022-04-15", "test_from": "2022-04-22"},
        "validation requests are those from data.validation_from=2022-04-15 until "
        "data.test_from=2022-04-22, and the random log runs from 2022-04-22 to 2022-05-08",
    ),
    (
        {"path": "/absent", "validation_from": "2022-05-09", "test_from": "2022-05-10"},
        "validation requests are those from data.validation_from=2022-05-09 until",
    ),
    (
        {"validation_from": "2022-04-07", "test_from": "2022-04-08", "test": "standard"},
        "validation requests are those from data.validation_from=2022-04-07 until "
        "data.test_from=2022-04-08, and the standard log runs from 2022-04-08 to 2022-05-08",
    ),
    ({"name": "kuairand_2k"}, "data.name='kuairand_2k'"),
    ({"path": ""}, "data.path is empty; unpack the archive of https://zenodo.org/records/10439422"),
    ({"path": "/absent"}, "neither /absent nor its folder data holds"),
    ({"negatives": 998}, "funnel.retrieved=1000 is less than the 1001 candidates"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), SETTINGS)
def test_impossible_settings_are_named(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    path = layout.write(tmp_path, layout.random_rows(0))
    with pytest.raises(UserError) as error:
        open_small(path, **changes)
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"validation_from": "2022-04-08"},
            "no impression of the standard log before data.validation_from=2022-04-08",
        ),
        (
            {"test_from": "2022-05-09"},
            "no impression of the random log at or after data.test_from=2022-05-09",
        ),
        (
            {"test_from": "2022-05-09", "test": "standard"},
            "no impression of the standard log at or after data.test_from=2022-05-09",
        ),
    ],
)
def test_an_empty_split_is_named(tmp_path: Path, changes: dict[str, str], fault: str) -> None:
    path = layout.write(tmp_path, layout.random_rows(0))
    with pytest.raises(UserError, match=fault):
        open_small(path, **changes)


@pytest.mark.parametrize("test", ["random", "standard"])
def test_days_of_which_the_log_has_nothing_leave_no_validation(tmp_path: Path, test: str) -> None:
    rows = layout.random_rows(0)
    for stem in (STANDARD_2, RANDOM):
        rows[stem] = [row for row in rows[stem] if int(row.split(",")[4]) >= 1000 * APRIL_29]
    fault = (
        f"no impression of the {test} log from data.validation_from=2022-04-22 until "
        "data.test_from=2022-04-29, so the split 'validation' would be empty"
    )
    with pytest.raises(UserError, match=fault):
        open_small(layout.write(tmp_path, rows), test=test)


@pytest.mark.parametrize("tasks", [("watch", "hate"), (), ("like", "like")])
def test_unknown_tasks_are_refused(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="tasks") as error:
        open_small(layout.write(tmp_path, layout.random_rows(0)), tasks)
    if "hate" in tasks:
        assert all(task in str(error.value) for task in TASKS)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split"):
        list(open_small(layout.write(tmp_path, layout.random_rows(0))).requests("valid"))


def test_the_hours_are_those_of_beijing() -> None:
    midnight = APRIL_8
    assert (midnight + BEIJING) % DAY == 0
    context = kuairand.context_features(midnight, None)
    # 8 April 2022 was a Friday.
    np.testing.assert_allclose(context, [0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1], atol=1e-7)


def small_config(path: Path, root: Path, variant: str = "", **changes: object) -> ConfigDict:
    config = config_of_kuairand(variant)
    few = {"steps": 3, "log_every": 1, "checkpoint_every": 3, "eval_every": 0}
    small = {"width": 4, "item_rows": 0}
    config.update(
        {
            "data": {"path": str(path), "dir": str(root / "datasets"), "negatives": 10},
            "funnel": {"retrieved": 20, "passed": 5, "shown": 3, "report_at": (5, 10)},
            "batch": {"requests": 4, "candidates": 8},
            "teacher": {
                "batch": {"requests": 4}, "train": few, "experts": 2, "expert_hidden": 4,
                "attention_hidden": 4, **small,
            },
            "student": {"hidden": (4,), **small},
            "train": few,
            "parallel": {"devices": 1},
        }
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_from_the_files_to_the_results_of_a_distilled_student(tmp_path: Path) -> None:
    path = layout.write(tmp_path / "KuaiRand-Pure", layout.random_rows(16))
    config = small_config(path, tmp_path)
    api.prepare(config)
    (teacher,) = small.rows_on_test(api.train_teacher(config, tmp_path / "teacher"), "teacher")
    config.teacher.workdir = str(tmp_path / "teacher")
    (student,) = small.rows_on_test(api.train(config, tmp_path / "student"))
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    for row in (teacher, student):
        assert row["dataset"] == "kuairand_pure"
        assert row["step"] == 3
        for task in ("watch", "like", "share"):
            assert np.isfinite(row[f"user_bce/{task}"])
            assert 0 <= row[f"user_auc/{task}"] <= 1
        assert 0 < row["value_captured@5"] <= 1
        assert row["unseen_items"] < 1
    assert np.isfinite(student["teacher_bce/watch"])


@pytest.mark.parametrize("variant", ["", "pure", "1k", "27k"])
def test_a_dataset_of_every_variant_is_built(tmp_path: Path, variant: str) -> None:
    path = layout.write(tmp_path / "files", layout.random_rows(17), variant or "pure")
    config = small_config(path, tmp_path, variant)
    directory = api.prepare(config).directory
    assert directory.parent.name.startswith(f"kuairand_{variant or 'pure'}-")
    assert len(np.load(directory / "item_category.npy")) == 40


def test_the_configs_variants_are_named() -> None:
    with pytest.raises(UserError, match="the variants are: :pure, :1k, :27k"):
        config_of_kuairand("2k")
