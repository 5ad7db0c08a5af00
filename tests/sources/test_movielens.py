"""Tests of MovieLens as a source, on small files and, where at hand, on the real ones of 100K."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from kd_ranker import api
from kd_ranker.batches.cutting import unpack
from kd_ranker.batches.evaluation import evaluation_batches
from kd_ranker.batches.training import BatchConfig, training_batches
from kd_ranker.configs import movielens_1m, movielens_32m
from kd_ranker.errors import UserError
from kd_ranker.pipeline import datasets
from kd_ranker.requests.request import SPLITS, Request, Source
from kd_ranker.sources import movielens, movielens_files
from kd_ranker.sources.movielens_files import HALF_STARS, WHOLE_STARS
from tests.sources import movielens_layouts
from tests.sources.movielens_layouts import Movie, User
from tests.sources.remembered import remembered

TASKS = movielens.TASKS
REAL_FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "ml-100k"
needs_real_files = pytest.mark.skipif(
    not (REAL_FILES / "u.data").is_file(), reason=f"MovieLens 100K is not in {REAL_FILES}"
)

NUM_ITEMS = 9


@pytest.fixture(autouse=True, scope="module")
def files_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movielens, "read_movielens", remembered(movielens.read_movielens))
        yield


FILES = {
    "u.genre": "unknown|0\nAction|1\nDrama|2\n\n",
    "u.occupation": "artist\nwriter\n",
    "u.user": "1|47|F|writer|85711\n2|23|M|artist|T8H1N\n3|35|M|artist|00000\n",
    "u.item": (
        "1|Émile (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?%C9mile|0|1|0\n"
        "2|Heat (1980)|4-Feb-1980|02-Mar-1982||0|1|1\n"
        "3|unknown||||1|0|0\n"
        "4|For video (1995) (V)|01-Jan-V|||0|0|1\n"
        + "".join(f"{number}|Title {number}|31-Dec-1990|||0|0|1\n" for number in range(5, 10))
    ),
    # Users 1 and 2 rate; user 3 never does. The lines are in no order.
    "u.data": (
        "1\t5\t5\t300\n"
        "1\t1\t5\t100\n"
        "2\t4\t2\t150\n"
        "1\t3\t4\t100\n"
        "1\t4\t4\t200\n"
        "1\t2\t3\t100\n"
        "1\t6\t2\t400\n"
        "2\t1\t1\t200\n"
    ),
}


def write_files(directory: Path, **changes: str) -> Path:
    for name, text in (FILES | {f"u.{key}": value for key, value in changes.items()}).items():
        (directory / name).write_bytes(text.encode("iso-8859-1"))
    return directory


def make_data(directory: Path, **changes: float | str) -> ConfigDict:
    data = {
        "name": "movielens_100k",
        "dir": "",
        "path": str(directory),
        "history_length": 2,
        "ratings_per_request": 2,
        "validation_share": 0.0,
        "validation_requests_per_user": 0,
        "test_share": 0.4,
        "test_requests_per_user": 0,
        "seed": 0,
    }
    return ConfigDict(data | changes)


def open_small(directory: Path, **changes: float | str) -> Source:
    return movielens.open_source(
        make_data(directory, **changes), TASKS, ConfigDict({"retrieved": 1682})
    )


def assert_same(left: Request, right: Request) -> None:
    for field in dataclasses.fields(Request):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def test_worked_example(tmp_path: Path) -> None:
    source = open_small(write_files(tmp_path), history_length=5)
    # User 1: ids 0, 1, 2 share second 100 and so one block; then 3, 4; then 5. 40 % of 6 ratings
    # are 2.4, and of the blocks' starts, 3 and 5, the first is nearer to 3.6.
    # User 2: one block, which is for training.
    assert source.num_requests == {"train": 2, "validation": 0, "test": 2}
    train, test = list(source.requests("train")), list(source.requests("test"))
    assert [(request.user_id, request.time) for request in train] == [(0, 100), (1, 150)]
    assert [(request.user_id, request.time) for request in test] == [(0, 200), (0, 400)]
    assert [request.request_id for request in train] == [0, 1]

    first = train[0]
    assert first.history_id.shape == (0,)
    assert first.history_features.shape == (0, 6)
    assert set(first.item_id[:3]) == {0, 1, 2}
    assert list(first.item_id[3:]) == [3, 4, 5, 6, 7, 8]
    labels = dict(zip(first.item_id.tolist(), first.user_label.tolist(), strict=True))
    assert labels[0] == [1, 1, 1]
    assert labels[1] == [1, 0, 0]
    assert labels[2] == [1, 1, 0]
    assert labels[3] == [0, 0, 0], "rated only later"

    second = test[0]
    assert set(second.history_id) == {0, 1, 2}
    # Id 5 is rated only later: it is a candidate without a label.
    assert list(second.item_id) == [3, 4, 5, 6, 7, 8]
    assert second.user_label.tolist() == [[1, 1, 0], [1, 1, 1]] + [[0, 0, 0]] * 4
    assert second.label_weight.tolist() == [1.0] * 6
    assert second.num_passed == 6
    ratings = {0: 5, 1: 3, 2: 4}
    for event, features in zip(second.history_id.tolist(), second.history_features, strict=True):
        expected = [float(ratings[event] == value) for value in range(1, 6)]
        np.testing.assert_allclose(features, [*expected, np.log1p(100 / 86400)], rtol=1e-6)
    # User 2 rated id 3 with 2 at 150, before; nobody rated the others.
    np.testing.assert_allclose(
        second.candidate_features[0], [np.log(2) / 3, (2 + 5 * 3.5) / 6 - 3.5], rtol=1e-6
    )
    np.testing.assert_array_equal(second.candidate_features[1:], 0)

    # User 2's request at 150: ids 0, 1, 2 were rated at 100 with 5, 3, 4. Its rating of id 0, at
    # 200, is a label; user 1's rating of id 3, at 200, is not known yet.
    other = train[1]
    assert other.item_id[:2].tolist() == [3, 0]
    assert other.user_label[:2].tolist() == [[1, 0, 0], [1, 0, 0]]
    statistics = dict(zip(other.item_id.tolist(), other.candidate_features, strict=True))
    np.testing.assert_allclose(statistics[0], [np.log(2) / 3, 1.5 / 6], rtol=1e-6)
    np.testing.assert_array_equal(statistics[3], 0)


def test_user_and_context_features_of_the_worked_example(tmp_path: Path) -> None:
    source = open_small(write_files(tmp_path))
    request = next(source.requests("test"))
    # 47 years, female, writer; three ratings: 5 of Action, 3 of Action and Drama, 4 of unknown.
    expected = [1, 1, 0, 1, np.log(4) / 3, 1.5 / 8, 1 / 8, 2 / 8, 1 / 8, 1 / 8, 1 / 8, 0]
    np.testing.assert_allclose(request.user_features, expected, rtol=1e-6)
    angle = 2 * np.pi * 200 / 86400
    thursday = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(
        request.context,
        [np.sin(angle), np.cos(angle), *thursday, np.log1p(100 / 86400), 0, np.log(2) / 2],
        rtol=1e-6,
    )
    first = next(source.requests("train"))
    np.testing.assert_array_equal(first.user_features[4:], 0)
    np.testing.assert_array_equal(first.context[-3:], [0, 1, 0])


def test_item_features(tmp_path: Path) -> None:
    source = open_small(write_files(tmp_path))
    expected = np.array(
        [[0, 1, 0, 0.5, 0], [0, 1, 1, -1, 0], [1, 0, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    )
    np.testing.assert_allclose(source.item_features[:5], expected)


def test_shapes_and_dtypes_follow_the_spec(tmp_path: Path) -> None:
    source = open_small(write_files(tmp_path))
    spec = source.spec
    assert (spec.num_users, spec.num_items, spec.teacher_version) == (3, NUM_ITEMS, "")
    assert spec.dataset == "movielens_100k"
    assert source.item_features.shape == (NUM_ITEMS, spec.item_features)
    assert source.item_features.dtype == np.float32
    for request in all_requests(source):
        events, candidates = len(request.history_id), len(request.item_id)
        assert events <= spec.history_length == 2
        expected = {
            "user_features": (np.float32, (spec.user_features,)),
            "context": (np.float32, (spec.context_features,)),
            "history_id": (np.int32, (events,)),
            "history_features": (np.float32, (events, spec.history_features)),
            "item_id": (np.int32, (candidates,)),
            "candidate_features": (np.float32, (candidates, spec.candidate_features)),
            "user_label": (np.uint8, (candidates, 3)),
            "label_weight": (np.float32, (candidates,)),
            "teacher_probability": (np.float32, (0, 3)),
            "teacher_weight": (np.float32, (0,)),
            "true_probability": (np.float32, (0, 3)),
        }
        for name, (dtype, shape) in expected.items():
            value = getattr(request, name)
            assert (value.dtype, value.shape) == (dtype, shape), name
        assert request.teacher_version == ""
        assert request.num_passed == candidates
        for value in (request.request_id, request.time, request.user_id):
            assert type(value) is int
        assert len(set(request.item_id)) == candidates


def test_asked_tasks_are_columns(tmp_path: Path) -> None:
    data = make_data(write_files(tmp_path))
    source = movielens.open_source(data, ("share", "watch"), ConfigDict({"retrieved": 1682}))
    for part, full in zip(
        source.requests("test"), open_small(tmp_path).requests("test"), strict=True
    ):
        np.testing.assert_array_equal(part.user_label, full.user_label[:, [2, 0]])
        assert part.teacher_probability.shape == part.true_probability.shape == (0, 2)


@pytest.mark.parametrize(
    ("times", "size", "expected"),
    [
        ([5], 8, [0]),
        ([1, 2, 3, 4], 2, [0, 2]),
        ([1, 2, 3, 4], 1, [0, 1, 2, 3]),
        ([1, 1, 1, 1], 2, [0]),
        ([1, 2, 2, 2, 3, 4], 2, [0, 4]),
        ([1, 2, 3, 4, 5], 4, [0]),  # one left over is less than half of four: it joins
        ([1, 2, 3, 4, 5, 6], 4, [0, 4]),  # two are not
        ([1, 2, 3], 4, [0]),
    ],
)
def test_blocks(times: list[int], size: int, expected: list[int]) -> None:
    assert movielens.block_starts(np.array(times), size).tolist() == expected


@pytest.mark.parametrize(
    ("starts", "total", "validation_share", "test_share", "expected"),
    [
        ([0], 10, 0.0, 0.5, (1, 1)),
        ([0, 8], 16, 0.0, 0.0, (2, 2)),
        ([0, 8], 16, 0.0, 0.01, (1, 1)),
        ([0, 8], 16, 0.0, 0.99, (1, 1)),
        ([0, 2, 4, 6, 8], 10, 0.0, 0.2, (4, 4)),
        ([0, 2, 4, 6, 8], 10, 0.0, 0.4, (3, 3)),
        ([0, 5, 9], 10, 0.0, 0.2, (2, 2)),
        ([0], 10, 0.1, 0.5, (1, 1)),
        ([0, 8], 16, 0.1, 0.2, (1, 1)),  # the first is for training, the last for the test
        ([0, 8, 16], 24, 0.01, 0.01, (1, 2)),
        ([0, 2, 4, 6, 8], 10, 0.2, 0.2, (3, 4)),
        ([0, 2, 4, 6, 8], 10, 0.4, 0.2, (2, 4)),
        ([0, 2, 4, 6, 8], 10, 0.01, 0.2, (3, 4)),
        ([0, 2, 4, 6, 8], 10, 0.2, 0.0, (4, 5)),
        ([0, 1, 2], 10, 0.04, 0.95, (1, 1)),  # none is left between
    ],
)
def test_the_cuts_between_train_validation_and_test(
    starts: list[int],
    total: int,
    validation_share: float,
    test_share: float,
    expected: tuple[int, int],
) -> None:
    cuts = movielens.first_held_out_blocks(np.array(starts), total, validation_share, test_share)
    assert cuts == expected


def test_only_the_first_requests_that_are_held_out_are_kept(tmp_path: Path) -> None:
    write_files(tmp_path)
    kept = list(open_small(tmp_path, test_requests_per_user=1).requests("test"))
    assert [request.time for request in kept] == [200]
    none = {"train": 4, "validation": 0, "test": 0}
    assert open_small(tmp_path, test_share=0.0).num_requests == none
    # Of user 1's requests, those at 200 and 400 are for the validation now.
    held_out = {"test_share": 0.0, "validation_share": 0.4}
    assert moments(open_small(tmp_path, **held_out)) == {
        "train": [(0, 100), (1, 150)],
        "validation": [(0, 200), (0, 400)],
        "test": [],
    }
    source = open_small(tmp_path, validation_requests_per_user=1, **held_out)
    assert moments(source)["validation"] == [(0, 200)]
    assert moments(open_small(tmp_path, validation_share=0.2, test_share=0.1)) == {
        "train": [(0, 100), (1, 150)],
        "validation": [(0, 200)],
        "test": [(0, 400)],
    }


def moments(source: Source) -> dict[str, list[tuple[int, int]]]:
    """Split -> user and time of each request."""
    return {
        split: [(request.user_id, request.time) for request in source.requests(split)]
        for split in SPLITS
    }


def test_shares_that_leave_no_validation_or_no_training_are_one_line(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(UserError, match=r"^data.validation_share=0.1 leaves no validation request"):
        open_small(tmp_path, validation_share=0.1, ratings_per_request=4)
    with pytest.raises(
        UserError, match=r"^data.validation_share=0.6 and data.test_share=0.4 leave"
    ):
        open_small(tmp_path / "absent", validation_share=0.6)


def test_the_order_within_a_second_is_random_but_repeatable(tmp_path: Path) -> None:
    def history(seed: int) -> tuple[int, ...]:
        request = next(open_small(tmp_path, history_length=5, seed=seed).requests("test"))
        return tuple(request.history_id.tolist())

    write_files(tmp_path)
    orders = {seed: history(seed) for seed in range(20)}
    assert len(set(orders.values())) > 3
    write_files(tmp_path, data="\n".join(reversed(FILES["u.data"].strip().split("\n"))))
    assert {seed: history(seed) for seed in range(20)} == orders


def test_the_same_requests_come_at_every_call(tmp_path: Path) -> None:
    source = open_small(write_files(tmp_path))
    for split in SPLITS:
        for left, right in zip(source.requests(split), source.requests(split), strict=True):
            assert_same(left, right)


BAD_LINES = [
    ("data", "1\t2\t3", "3 fields"),
    ("data", "1 2 3 4", "1 fields"),
    ("data", "", "is empty"),
    ("data", "x\t2\t3\t4", "user 'x' is not a whole number"),
    ("data", "1\t2\t3.5\t4", "rating '3.5' is not a whole number"),
    ("data", "1\t2\t3\t-4", "time '-4' is not a whole number"),
    (
        "data",
        "1\t7\t3\t881250949000",
        "time '881250949000' is not a whole number from 0 to 4294967295",
    ),
    ("data", "1\t7\t6\t4", "rating '6' is not a whole number from 1 to 5"),
    ("data", "1\t7\t0\t4", "rating '0' is not a whole number from 1 to 5"),
    ("data", "4\t7\t5\t4", "user 4 is not in u.user"),
    ("data", "0\t7\t5\t4", "user '0' is not a whole number from 1 to"),
    ("data", "1\t10\t5\t4", "movie 10 is not in u.item"),
    ("data", "1\t5\t4\t999", "a rating of movie 5 by user 1 was given before, in .*u.data, line 1"),
    ("user", "2|23|M|artist", "4 fields"),
    ("user", "1|23|M|artist|12345", "user 1 was given before"),
    ("user", "2|old|M|artist|12345", "age 'old' is not a whole number"),
    ("user", "2|151|M|artist|12345", "age '151' is not a whole number from 0 to 150"),
    ("user", "2|23|X|artist|12345", "gender 'X' is not one of F, M"),
    ("user", "2|23|M|pilot|12345", "occupation 'pilot' is not in u.occupation"),
    ("item", "2|Heat|01-Jan-1995|||0|1", "7 fields"),
    ("item", "two|Heat|01-Jan-1995|||0|1|0", "movie 'two' is not a whole number"),
    ("item", "1|Heat|01-Jan-1995|||0|1|0", "movie 1 was given before"),
    ("item", "2|Heat|1995-01-01|||0|1|0", "release date '1995-01-01' is not like"),
    ("item", "2|Heat|01-Mai-1995|||0|1|0", "release date '01-Mai-1995' is not like"),
    ("item", "2|Heat|01-Jan-1995|||0|2|0", "flag of genre Action '2' is not one of 0, 1"),
    ("genre", "Action|7", "genre number 7 does not count from 0 by lines"),
    ("genre", "Action", "1 fields"),
    ("occupation", "artist", "occupation 'artist' was given before"),
]


@pytest.mark.parametrize(("name", "line", "problem"), BAD_LINES)
def test_malformed_lines_are_named(tmp_path: Path, name: str, line: str, problem: str) -> None:
    lines = FILES[f"u.{name}"].rstrip("\n").split("\n")
    lines[1] = line
    write_files(tmp_path, **{name: "\n".join(lines) + "\n"})
    with pytest.raises(UserError, match=rf"u\.{name}, line 2: {problem}") as error:
        movielens_files.read_movielens("movielens_100k", tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_empty_files_are_named(tmp_path: Path, name: str) -> None:
    write_files(tmp_path)
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=rf"{name} is empty"):
        movielens_files.read_movielens("movielens_100k", tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} does not exist.*grouplens.*data\.path"):
        movielens_files.read_movielens("movielens_100k", tmp_path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*does not exist"):
        movielens_files.read_movielens("movielens_100k", tmp_path / "nowhere")


def test_line_ends_of_windows_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, data=FILES["u.data"].replace("\n", "\r\n"))
    assert len(movielens_files.read_movielens("movielens_100k", tmp_path).rating) == 8


def test_a_next_line_character_in_a_title_breaks_no_line(tmp_path: Path) -> None:
    write_files(tmp_path, item=FILES["u.item"].replace("Heat", "Heat \x85"))
    assert len(movielens_files.read_movielens("movielens_100k", tmp_path).genres) == NUM_ITEMS


@pytest.mark.parametrize("tasks", [("watch", "follow"), (), ("like", "like")])
def test_unknown_tasks_are_refused(tmp_path: Path, tasks: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="tasks") as error:
        movielens.open_source(
            make_data(write_files(tmp_path)), tasks, ConfigDict({"retrieved": 1682})
        )
    if "follow" in tasks:
        assert all(task in str(error.value) for task in TASKS)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split"):
        list(open_small(write_files(tmp_path)).requests("valid"))


REAL_SETTINGS = {
    "history_length": 20, "ratings_per_request": 8, "validation_share": 0.1, "test_share": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def raw_ratings() -> np.ndarray:
    """[user, item, rating, time] with ids from 0, read without the code under test."""
    return np.loadtxt(REAL_FILES / "u.data", dtype=np.int64) - [1, 1, 0, 0]


@pytest.fixture(scope="module")
def real_requests() -> dict[str, list[Request]]:
    """All requests; candidate features of every 50th only, to keep this small."""
    source = movielens.open_source(
        make_data(REAL_FILES, **REAL_SETTINGS), TASKS, ConfigDict({"retrieved": 1682})
    )
    requests: dict[str, list[Request]] = {}
    for split in SPLITS:
        requests[split] = [
            request
            if number % 50 == 0
            else dataclasses.replace(request, candidate_features=np.zeros((0, 2), np.float32))
            for number, request in enumerate(source.requests(split))
        ]
    return requests


@needs_real_files
def test_real_files_hold_what_is_published(real_requests: dict[str, list[Request]]) -> None:
    files = movielens_files.read_movielens("movielens_100k", REAL_FILES)
    assert files.genres.shape == (1682, 19)
    assert len(files.age) == 943
    assert len(files.rating) == 100_000
    assert files.num_occupations == 21
    assert files.release_year[0] == 1995
    assert files.release_year[266] == 0
    everything = [request for split in SPLITS for request in real_requests[split]]
    assert sum(int(request.user_label[:, 0].sum()) for request in everything) == 100_000
    for task, lowest in enumerate((1, 4, 5)):
        labels = sum(int(request.user_label[:, task].sum()) for request in everything)
        assert labels == np.sum(files.rating >= lowest)
    assert len({request.user_id for request in everything}) == 943


@needs_real_files
def test_each_users_real_train_requests_come_first_and_the_test_ones_last(
    real_requests: dict[str, list[Request]],
) -> None:
    latest: dict[int, int] = {}
    shares = {}
    for split in SPLITS:
        requests = real_requests[split]
        for request in requests:
            assert latest.get(request.user_id, -1) < request.time
        for request in requests:
            latest[request.user_id] = max(latest.get(request.user_id, -1), request.time)
        shares[split] = sum(int(r.user_label[:, 0].sum()) for r in requests) / 100_000
    assert 0.05 < shares["validation"] < 0.15 < shares["test"] < 0.25
    assert len({request.user_id for request in real_requests["validation"]}) > 850


def cut_by_hand(
    times: list[int], size: int, validation_share: float, test_share: float
) -> dict[str, tuple[int, int]]:
    """The places of a user's ratings, in the order of time, from which to which a split goes."""
    blocks, block = [], []
    for place, time in enumerate(times):
        if len(block) >= size and time != times[place - 1]:
            blocks.append(block)
            block = []
        block.append(place)
    if blocks and 2 * len(block) < size:
        blocks[-1] = blocks[-1] + block
    else:
        blocks.append(block)

    def nearest(before: int, share: float) -> int:
        wanted = (1 - share) * len(times)
        places = [of[0] for of in blocks[1:] if of[0] < before]
        return min(places, key=lambda start: (abs(start - wanted), start), default=before)

    test = nearest(len(times), test_share)
    validation = nearest(test, validation_share + test_share)
    return {"train": (0, validation), "validation": (validation, test), "test": (test, len(times))}


def assert_cut_by_hand(
    requests: dict[str, list[Request]], ratings: np.ndarray, settings: dict[str, float]
) -> None:
    """Checks what is labelled in which split against [user, item, rating, time] of the files."""
    labelled: dict[tuple[int, str], list[int]] = {}
    for split in SPLITS:
        for request in requests[split]:
            items = request.item_id[request.user_label[:, 0] == 1].tolist()
            labelled.setdefault((request.user_id, split), []).extend(items)
    for user in np.unique(ratings[:, 0]).tolist():
        own = ratings[ratings[:, 0] == user]
        own = own[own[:, 3].argsort(kind="stable")]
        places = cut_by_hand(
            own[:, 3].tolist(),
            int(settings["ratings_per_request"]),
            settings["validation_share"],
            settings["test_share"],
        )
        for split, (first, end) in places.items():
            found = labelled.pop((user, split), [])
            assert sorted(found) == sorted(own[first:end, 1].tolist()), (user, split)
    assert not labelled


@needs_real_files
def test_the_splits_of_the_real_ratings_are_those_cut_by_hand(
    real_requests: dict[str, list[Request]], raw_ratings: np.ndarray
) -> None:
    assert_cut_by_hand(real_requests, raw_ratings, REAL_SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratings_per_request": 1},
        {"validation_share": 0.4, "test_share": 0.4},
        {"validation_share": 0.01, "test_share": 0.01},
    ],
)
def test_the_splits_of_random_ratings_are_those_cut_by_hand(
    tmp_path: Path, changes: dict[str, float]
) -> None:
    settings = LARGER_SETTINGS | changes
    source = open_larger("movielens_32m", write_random_32m(tmp_path), **settings)
    ratings = np.array(movielens_layouts.random_ratings(0, 40, 300, 1500, HALF_STARS))
    # Ids count up in threes, from 1.
    ratings[:, :2] = (ratings[:, :2] - 1) / 3
    requests = {split: list(source.requests(split)) for split in SPLITS}
    assert_cut_by_hand(requests, ratings.astype(np.int64), settings)


def test_training_sees_no_label_that_is_held_out(tmp_path: Path) -> None:
    source = open_larger("movielens_32m", write_random_32m(tmp_path))
    held_out: dict[int, set[int]] = {}
    for split in ("test", "validation", "train"):
        for request in source.requests(split):
            later = held_out.get(request.user_id, set())
            rated = set(request.item_id[request.user_label[:, 0] == 1].tolist())
            # Not as a label, nor as an event of the history.
            assert not later & (rated | set(request.history_id.tolist()))
        for request in source.requests(split):
            rated = set(request.item_id[request.user_label[:, 0] == 1].tolist())
            held_out.setdefault(request.user_id, set()).update(rated)
    assert sum(map(len, held_out.values())) == 1500


def sample(requests: dict[str, list[Request]]) -> list[Request]:
    return [request for split in requests.values() for request in split[::50]]


@needs_real_files
def test_real_requests_against_brute_force(
    real_requests: dict[str, list[Request]], raw_ratings: np.ndarray
) -> None:
    flags = np.array(
        [
            line.split("|")[5:]
            for line in (REAL_FILES / "u.item").read_text("iso-8859-1").strip().split("\n")
        ],
        int,
    )
    user, item, rating, time = raw_ratings.T
    for request in sample(real_requests):
        own_before = (user == request.user_id) & (time < request.time)
        candidates = np.setdiff1d(np.arange(1682), item[own_before])
        np.testing.assert_array_equal(np.sort(request.item_id), candidates)

        before = time < request.time
        count = np.bincount(item[before], minlength=1682)[request.item_id]
        total = np.bincount(item[before], rating[before], minlength=1682)[request.item_id]
        mean = (total + 5 * 3.5) / (count + 5) - 3.5
        expected = np.stack([np.log(1 + count) / 3, mean], axis=1)
        np.testing.assert_allclose(request.candidate_features, expected, atol=1e-5)

        own = own_before.sum()
        genres = flags[item[own_before]]
        liked = genres[rating[own_before] >= 4]
        expected = np.concatenate(
            [
                [np.log(1 + own) / 3, (rating[own_before].sum() + 17.5) / (own + 5) - 3.5],
                genres.sum(axis=0) / (own + 5),
                liked.sum(axis=0) / (own + 5),
            ]
        )
        np.testing.assert_allclose(request.user_features[-40:], expected, atol=1e-5)

        known = {int(i): (int(r), int(t)) for i, r, t in raw_ratings[own_before][:, 1:]}
        events = [known[event] for event in request.history_id.tolist()]
        times = [event_time for _, event_time in events]
        assert len(events) == len(set(request.history_id)) == min(20, own)
        assert times == sorted(times)
        assert times == sorted(time[own_before].tolist())[-20:]
        np.testing.assert_array_equal(
            request.history_features[:, :5].argmax(axis=1) + 1, [given for given, _ in events]
        )
        if own:
            pause = (request.time - time[own_before].max()) / 86400
            np.testing.assert_allclose(request.context[9], np.log(1 + pause), atol=1e-5)

        later = raw_ratings[(user == request.user_id) & (time >= request.time)]
        rated = {int(i): (int(r), int(t)) for _, i, r, t in later}
        positives = request.item_id[request.user_label[:, 0] == 1].tolist()
        assert positives == request.item_id[: len(positives)].tolist()
        last = max(rated[positive][1] for positive in positives)
        assert set(positives) == {i for i, (_, t) in rated.items() if t <= last}
        for positive, label in zip(positives, request.user_label, strict=False):
            given = rated[positive][0]
            assert label.tolist() == [1, int(given >= 4), int(given == 5)]


@needs_real_files
@pytest.mark.parametrize("place", [0.02, 0.3, 0.7])
def test_nothing_in_a_real_request_stems_from_after_its_time(
    tmp_path: Path,
    real_requests: dict[str, list[Request]],
    raw_ratings: np.ndarray,
    place: float,
) -> None:
    requests = sample(real_requests)
    expected = requests[int(place * len(requests))]
    user, item, _, time = raw_ratings.T
    # The future is replaced: in the request's own second the user rates other items, all with 1,
    # and nothing happens after it.
    past = raw_ratings[time < expected.time]
    own = np.setdiff1d(np.arange(1682), item[(user == expected.user_id) & (time < expected.time)])
    future = [[expected.user_id, other, 1, expected.time] for other in own[-8:]]
    for name in ("u.item", "u.user", "u.genre", "u.occupation"):
        (tmp_path / name).symlink_to(REAL_FILES / name)
    rows = np.concatenate([past, future])
    rows[:, :2] += 1
    np.savetxt(tmp_path / "u.data", rows, "%d", delimiter="\t")
    source = movielens.open_source(
        make_data(tmp_path, **REAL_SETTINGS), TASKS, ConfigDict({"retrieved": 1682})
    )
    (seen,) = [
        request
        for split in SPLITS
        for request in source.requests(split)
        if (request.user_id, request.time) == (expected.user_id, expected.time)
    ]
    assert set(seen.item_id[seen.user_label[:, 0] == 1]) == set(own[-8:])
    for name in ("user_features", "context", "history_id", "history_features"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name))
    np.testing.assert_array_equal(
        seen.candidate_features[seen.item_id.argsort()],
        expected.candidate_features[expected.item_id.argsort()],
    )
    np.testing.assert_array_equal(np.sort(seen.item_id), np.sort(expected.item_id))


def test_a_funnel_that_does_not_hold_the_catalogue_is_refused(tmp_path: Path) -> None:
    data = make_data(write_files(tmp_path))
    with pytest.raises(UserError, match=r"funnel\.retrieved=1 is less than the \d+ films"):
        movielens.open_source(data, TASKS, ConfigDict({"retrieved": 1}))


LARGER_SETTINGS = {
    "history_length": 4, "ratings_per_request": 4, "validation_share": 0.2, "test_share": 0.3,
}  # fmt: skip


def open_larger(name: str, directory: Path, **changes: float | str) -> Source:
    data = make_data(directory, **({"name": name} | LARGER_SETTINGS | changes))
    return movielens.open_source(data, TASKS, ConfigDict({"retrieved": 5000}))


def write_random_32m(directory: Path, seed: int = 0, users: int = 40, items: int = 300) -> Path:
    ratings = movielens_layouts.random_ratings(seed, users, items, 1500, HALF_STARS)
    return movielens_layouts.write_32m(directory, ratings, movielens_layouts.plain_movies(items))


def all_requests(source: Source) -> list[Request]:
    return [request for split in SPLITS for request in source.requests(split)]


def by_moment(source: Source) -> dict[tuple[int, int], Request]:
    return {(request.user_id, request.time): request for request in all_requests(source)}


def test_half_stars_in_the_worked_example(tmp_path: Path) -> None:
    stars = {1: 0.5, 2: 3.5, 3: 4.0, 4: 4.5, 50: 5.0}
    movies = [Movie(number, f"Film {number} (2000)", ()) for number in (50, 4, 3, 2, 1, 6)]
    ratings = [(9, number, given, 100 + number) for number, given in stars.items()]
    movielens_layouts.write_32m(tmp_path, ratings, movies)
    source = open_larger(
        "movielens_32m", tmp_path, ratings_per_request=3, test_share=0.5, validation_share=0.0
    )
    train, test = all_requests(source)
    assert source.spec.dataset == "movielens_32m"
    assert (source.spec.num_users, source.spec.num_items) == (1, 6)
    # Ids 0, 1, 2 are movies 1, 2, 3; the block takes as many ratings as it needs at least.
    assert train.item_id.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.user_label[:3].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert not train.user_label[3:].any()
    assert test.user_label[:2].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert test.item_id.tolist() == [3, 5, 4] or test.item_id.tolist() == [3, 4, 5]
    expected = [[float(level == given) for level in HALF_STARS] for given in (0.5, 3.5, 4.0)]
    np.testing.assert_array_equal(test.history_features[:, :10], expected)
    # No attributes, no genres: the number of ratings and their mean alone.
    np.testing.assert_allclose(
        test.user_features, [np.log(4) / 3, (8.0 + 5 * 3.5) / 8 - 3.5], rtol=1e-6
    )
    assert source.spec.user_features == source.spec.item_features == 2


def test_1m_has_what_is_known_of_its_users(tmp_path: Path) -> None:
    users = [User(3, "F", 1, 20), User(1, "M", 56, 0)]
    ratings = [(3, 7, 5, 100), (1, 7, 2, 50)]
    movies = [Movie(7, "Heat (1990)", ("Action", "War")), Movie(70, "Émile (1995)", ("War",))]
    movielens_layouts.write_1m(tmp_path, ratings, users, movies)
    source = open_larger("movielens_1m", tmp_path, validation_share=0.0)
    first, second = source.requests("train")
    assert [first.user_id, second.user_id] == [0, 1]
    occupation = np.eye(21)
    np.testing.assert_allclose(first.user_features[:23], [(56 - 35) / 12, 0, *occupation[0]])
    np.testing.assert_allclose(second.user_features[:23], [(1 - 35) / 12, 1, *occupation[20]])
    np.testing.assert_allclose(source.item_features, [[1, 1, 0, 0], [0, 1, 0.5, 0]])
    np.testing.assert_allclose(
        second.candidate_features, [[np.log(2) / 3, -1.5 / 6], [0, 0]], rtol=1e-6
    )


@given(st.data())
def test_items_not_rated_are_those_of_a_set_difference(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 40))
    rated = np.array(data.draw(st.lists(st.integers(0, items - 1), unique=True)), np.int64)
    wanted = data.draw(st.integers(0, 45))
    others = np.setdiff1d(np.arange(items), rated)
    found, weight = movielens.not_rated(rated, items, wanted, (0, 1, data.draw(st.integers(0, 9))))
    if wanted == 0 or wanted >= len(others):
        np.testing.assert_array_equal(found, others)
        assert weight == (1.0 if len(others) else 0.0)
    else:
        assert len(found) == wanted
        assert set(found) <= set(others)
        assert (np.diff(found) > 0).all()
        assert weight == len(others) / wanted


def test_every_item_not_rated_is_as_likely_as_any_other() -> None:
    rated, drawn = np.array([5, 0, 19, 6]), np.zeros(20)
    draws, wanted = 4000, 4
    for block in range(draws):
        items, _ = movielens.not_rated(rated, 20, wanted, (3, 7, block))
        drawn[items] += 1
    assert not drawn[rated].any()
    # Of 16 items each comes 1,000 times; 5 standard deviations of a binomial are 137.
    others = np.delete(drawn, rated)
    assert np.abs(others - draws * wanted / 16).max() < 5 * np.sqrt(draws * 0.25 * 0.75)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_candidates_are_some_of_the_whole_catalogues(tmp_path: Path, seed: int) -> None:
    write_random_32m(tmp_path)
    whole = all_requests(open_larger("movielens_32m", tmp_path, seed=seed))
    sampled = all_requests(open_larger("movielens_32m", tmp_path, seed=seed, negatives=25))
    assert len(whole) == len(sampled) > 200
    for full, part in zip(whole, sampled, strict=True):
        positives = int(full.user_label[:, 0].sum())
        assert len(part.item_id) == positives + 25 == part.num_passed == len(part.user_label)
        place = {item: index for index, item in enumerate(full.item_id.tolist())}
        where = [place[item] for item in part.item_id.tolist()]
        assert where == sorted(where)
        assert where[:positives] == list(range(positives))
        np.testing.assert_array_equal(part.user_label, full.user_label[where])
        np.testing.assert_array_equal(part.candidate_features, full.candidate_features[where])
        np.testing.assert_array_equal(part.label_weight[:positives], 1)
        negatives = len(full.item_id) - positives
        np.testing.assert_allclose(part.label_weight[positives:], negatives / 25, rtol=1e-6)
        for name in ("request_id", "user_id", "time", "user_features", "context", "history_id"):
            np.testing.assert_array_equal(getattr(part, name), getattr(full, name))
    draws = {tuple(request.item_id[-25:]) for request in sampled}
    assert len(draws) == len(sampled), "each request has a draw of its own"


def test_weighted_sums_keep_their_expectation(tmp_path: Path) -> None:
    write_random_32m(tmp_path)
    whole = all_requests(open_larger("movielens_32m", tmp_path))
    score = np.random.default_rng(0).random(300)  # as it were, a ranker's loss of each item
    exact = np.array([request.label_weight @ score[request.item_id] for request in whole])
    errors = []
    for seed in range(6):
        # The order within a second moves with the seed, and what is rated does not.
        sampled = all_requests(open_larger("movielens_32m", tmp_path, negatives=25, seed=seed))
        estimate = [request.label_weight @ score[request.item_id] for request in sampled]
        errors.append(np.mean(estimate - exact))
    # The error of one request has about the standard deviation 290 · 0.29 / √25 = 17.
    assert abs(np.mean(errors)) < 4 * 17 / np.sqrt(6 * len(whole))


def test_more_negatives_than_there_are_take_the_whole_catalogue(tmp_path: Path) -> None:
    write_random_32m(tmp_path)
    for full, part in zip(
        all_requests(open_larger("movielens_32m", tmp_path)),
        all_requests(open_larger("movielens_32m", tmp_path, negatives=300)),
        strict=True,
    ):
        assert_same(full, part)


def test_negatives_are_the_same_at_every_call_and_differ_with_the_seed(tmp_path: Path) -> None:
    write_random_32m(tmp_path)
    source = open_larger("movielens_32m", tmp_path, negatives=9)
    for left, right in zip(source.requests("test"), source.requests("test"), strict=True):
        assert_same(left, right)
    other = open_larger("movielens_32m", tmp_path, negatives=9, seed=1)
    pairs = zip(source.requests("test"), other.requests("test"), strict=True)
    assert all(set(left.item_id[-9:]) != set(right.item_id[-9:]) for left, right in pairs)


def test_no_sampled_request_stems_from_after_its_block(tmp_path: Path) -> None:
    stars = HALF_STARS
    ratings = movielens_layouts.random_ratings(3, 40, 300, 1500, stars)
    movies = movielens_layouts.plain_movies(300)
    source = open_larger(
        "movielens_32m",
        movielens_layouts.write_32m(tmp_path / "all", ratings, movies),
        negatives=20,
    )
    cut = 1_000_900
    # All that came later is gone, but for a line a user: ids are places among those who rated.
    past = [rating for rating in ratings if rating[3] < cut]
    future = [(3 * user + 1, 1, 2.0, cut + 10_000) for user in range(40)]
    seen = {(user, movie) for user, movie, _, _ in past}
    past += [rating for rating in future if rating[:2] not in seen]
    known = by_moment(
        open_larger(
            "movielens_32m",
            movielens_layouts.write_32m(tmp_path / "past", past, movies),
            negatives=20,
        )
    )
    compared = 0
    for moment, request in by_moment(source).items():
        user, time = moment
        own = sorted(t for u, _, _, t in ratings if u == 3 * user + 1 and t >= time)
        # With fewer known, the block may reach into the future, or the future's line may join it.
        if len(own) <= 8 or own[8] >= cut:
            continue
        compared += 1
        same = known[moment]
        np.testing.assert_array_equal(request.item_id, same.item_id)
        for name in ("user_features", "context", "history_features", "candidate_features"):
            np.testing.assert_array_equal(getattr(request, name), getattr(same, name))
        np.testing.assert_array_equal(request.label_weight, same.label_weight)
    assert compared > 50


def test_what_is_known_of_sampled_candidates_against_brute_force(tmp_path: Path) -> None:
    ratings = np.array(movielens_layouts.random_ratings(0, 40, 300, 1500, HALF_STARS))
    write_random_32m(tmp_path)
    for request in all_requests(open_larger("movielens_32m", tmp_path, negatives=30))[::7]:
        before = ratings[ratings[:, 3] < request.time]
        for item, found in zip(request.item_id, request.candidate_features, strict=True):
            given_stars = before[before[:, 1] == 3 * item + 1, 2]
            mean = (given_stars.sum() + 5 * 3.5) / (len(given_stars) + 5) - 3.5
            np.testing.assert_allclose(found, [np.log(1 + len(given_stars)) / 3, mean], atol=1e-6)


def test_fewer_users_make_the_same_requests_as_among_all(tmp_path: Path) -> None:
    users = [User(3 * user + 1, "FM"[user % 2], user, user % 21) for user in range(40)]
    # One rating a second: the order within one is drawn by the users' numbers.
    ratings = [
        (*rating[:3], 1000 * place)
        for place, rating in enumerate(
            movielens_layouts.random_ratings(0, 40, 300, 1500, WHOLE_STARS)
        )
    ]
    movielens_layouts.write_1m(tmp_path, ratings, users, movielens_layouts.plain_movies(300))
    everyone = {
        request.time: request for request in all_requests(open_larger("movielens_1m", tmp_path))
    }
    source = open_larger("movielens_1m", tmp_path, max_users=7)
    assert source.spec.num_users == 7
    chosen: dict[int, set[int]] = {}
    for request in all_requests(source):
        same = everyone[request.time]
        chosen.setdefault(request.user_id, set()).add(same.user_id)
        for name in ("user_features", "history_features", "item_id", "candidate_features"):
            np.testing.assert_array_equal(getattr(request, name), getattr(same, name))
    assert set(chosen) == set(range(7))
    assert all(len(of_user) == 1 for of_user in chosen.values())
    numbers = [of_user.pop() for _, of_user in sorted(chosen.items())]
    assert numbers == sorted(set(numbers))
    requests = [request for request in everyone.values() if request.user_id in numbers]
    assert len(requests) == sum(source.num_requests.values())


def test_users_are_drawn_by_the_seed_among_those_who_rated(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert open_small(tmp_path, max_users=2).spec.num_users == 3, "user 3 never rates"
    drawn = {
        next(open_small(tmp_path, max_users=1, seed=seed).requests("train")).time
        for seed in range(12)
    }
    assert drawn == {100, 150}, "user 1's first rating, and user 2's"
    assert open_small(tmp_path, max_users=9).num_requests == open_small(tmp_path).num_requests


def test_a_funnel_that_does_not_hold_the_largest_request_is_refused(tmp_path: Path) -> None:
    data = make_data(write_files(tmp_path), negatives=4)
    # User 1 rated three films in one second.
    with pytest.raises(
        UserError, match=r"retrieved=6 is less than the 3 films .* and data\.negatives=4 together"
    ):
        movielens.open_source(data, TASKS, ConfigDict({"retrieved": 6}))
    movielens.open_source(data, TASKS, ConfigDict({"retrieved": 7}))


@pytest.mark.parametrize("name", ["movielens_100k", "movielens_1m", "movielens_32m"])
def test_without_a_path_the_sets_own_archive_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fetch(archive: movielens_files.Archive, data_dir: str) -> Path:
        raise UserError(f"{archive.url} to {data_dir}")

    monkeypatch.setattr(movielens, "fetch", fetch)
    file = f"ml-{name.removeprefix('movielens_')}.zip"
    with pytest.raises(UserError, match=rf"https://files\.grouplens\.org/.*/{file} to somewhere"):
        open_larger(name, tmp_path, path="", dir="somewhere")


@pytest.mark.parametrize("config", [movielens_1m(), movielens_32m()])
def test_the_configs_build_a_dataset_and_its_batches(tmp_path: Path, config: ConfigDict) -> None:
    users = [User(3 * user + 1, "F", 25, 3) for user in range(40)]
    movies = movielens_layouts.plain_movies(900)
    stars = WHOLE_STARS if config.data.name == "movielens_1m" else HALF_STARS
    ratings = movielens_layouts.random_ratings(0, 40, 900, 3000, stars)
    if config.data.name == "movielens_1m":
        movielens_layouts.write_1m(tmp_path / "files", ratings, users, movies)
    else:
        movielens_layouts.write_32m(tmp_path / "files", ratings, movies)
    config.data.path, config.data.dir = str(tmp_path / "files"), str(tmp_path)
    api.prepare(config)
    dataset = datasets.dataset_of(config)
    config_of_batch = BatchConfig(**config.batch)._replace(requests=4, seed=0)
    made = training_batches(dataset, config_of_batch, resident=False)
    batch = unpack(*jax.device_get(next(iter(made))))
    # A tenth of the 500, each of which stands for ten more.
    positive = batch.user_label.any(axis=2)
    negative = (batch.label_weight > 0) & ~positive
    assert (negative.sum(axis=1) == 50).all()
    assert (batch.label_weight[positive] == 1).all()
    weights = np.where(negative, batch.label_weight, 0).sum(axis=1)
    assert ((weights > 900 - 130) & (weights < 900)).all()
    evaluation = next(evaluation_batches(dataset, "test", requests=2, candidates=1000))
    assert (evaluation.batch.candidate_mask.sum(axis=1) > 500).all()


def converted(directory: Path, name: str) -> Path:
    """The real files of 100K in another set's layout, ids tripled."""
    items = [
        line.split("|") for line in (REAL_FILES / "u.item").read_text("iso-8859-1").splitlines()
    ]
    genres = [line.split("|")[0] for line in (REAL_FILES / "u.genre").read_text().split()]
    years = [date[-4:] if date[-4:].isdigit() else "" for _, _, date, *_ in items]
    # A year of the title's own would be read as the release's.
    movies = [
        Movie(
            3 * int(number),
            f"Film, The {number}" + (f" ({year})" if year else ""),
            tuple(genre for genre, flag in zip(genres, flags, strict=True) if flag == "1"),
        )
        for (number, _, _, _, _, *flags), year in zip(items, years, strict=True)
    ]
    ratings = [
        (3 * user, 3 * item, rating, time)
        for user, item, rating, time in np.loadtxt(REAL_FILES / "u.data", np.int64).tolist()
    ]
    if name == "movielens_32m":
        movies = [
            movie._replace(genres=tuple(genre for genre in movie.genres if genre != "unknown"))
            for movie in movies
        ]
        return movielens_layouts.write_32m(directory, ratings, movies)
    occupations = (REAL_FILES / "u.occupation").read_text().split()
    users = [
        User(3 * int(number), gender, int(age), occupations.index(occupation))
        for number, age, gender, occupation, _ in (
            line.split("|") for line in (REAL_FILES / "u.user").read_text().splitlines()
        )
    ]
    return movielens_layouts.write_1m(directory, ratings, users, movies)


@needs_real_files
@pytest.mark.parametrize("name", ["movielens_1m", "movielens_32m"])
def test_real_requests_are_the_same_in_every_layout(
    tmp_path: Path, real_requests: dict[str, list[Request]], name: str
) -> None:
    data = make_data(converted(tmp_path, name), **REAL_SETTINGS, name=name)
    source = movielens.open_source(data, TASKS, ConfigDict({"retrieved": 1682}))
    original = movielens.open_source(
        make_data(REAL_FILES, **REAL_SETTINGS), TASKS, ConfigDict({"retrieved": 1682})
    )
    # 100K has its genre "unknown" first, 1M by its name, which is last; 32M has none of it.
    genres = [*range(1, 19), 0] if name == "movielens_1m" else [*range(1, 19)]
    np.testing.assert_array_equal(
        source.item_features, original.item_features[:, [*genres, 19, 20]]
    )
    fixed = list(range(23)) if name == "movielens_1m" else []
    columns = [*fixed, 23, 24, *(25 + np.array(genres)), *(25 + 19 + np.array(genres))]
    levels = WHOLE_STARS if name == "movielens_1m" else HALF_STARS
    whole = [levels.index(value) for value in WHOLE_STARS]
    for split, expected_requests in real_requests.items():
        assert source.num_requests[split] == len(expected_requests)
        pairs = zip(source.requests(split), expected_requests, strict=True)
        for number, (request, expected) in enumerate(pairs):
            if number % 50:
                continue
            for field in (
                *("request_id", "time", "user_id", "context", "history_id", "item_id"),
                *("candidate_features", "num_passed", "user_label", "label_weight"),
            ):
                np.testing.assert_array_equal(getattr(request, field), getattr(expected, field))
            np.testing.assert_array_equal(request.user_features, expected.user_features[columns])
            np.testing.assert_array_equal(
                request.history_features[:, [*whole, -1]], expected.history_features
            )
            assert (request.history_features[:, :-1].sum(axis=1) == 1).all()
