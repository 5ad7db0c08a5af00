"""MovieLens as a log: hand-worked files of each layout, and what no request may know."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_ranker.configs import movielens
from kd_ranker.errors import UserError
from kd_ranker.requests.request import SPLITS, requests_in
from kd_ranker.sources.converted import cut_blocks
from kd_ranker.sources.logs.layout import ALLOWABLE
from kd_ranker.sources.movielens import DAY, find_files, write
from kd_ranker.sources.registry import SOURCES

# Number, title, genres; number, gender, age, occupation.
MOVIES = [
    (12, "Émile: Part II (1995)", ("Drama",)),
    (2, "Heat (1980)", ("Action", "Children's")),
    (9, "Without a year", ("Drama",)),
    (5, "Late (2000)", ()),
]
USERS = [(7, "F", 25, 4), (3, "M", 35, 0)]
# User, film, stars, seconds: user 7 makes requests of films 12 and 2, and of 9.
RATINGS = [(7, 9, 5, 3 * DAY), (3, 12, 4, 500), (7, 12, 3, DAY), (7, 2, 4, DAY)]


def write_files(folder: Path, encoding: str, **files) -> Path:
    folder.mkdir()
    for name, lines in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return folder


def write_100k(folder: Path, ratings=RATINGS) -> Path:
    names = ["Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"]
    films = []
    for movie, title, genres in MOVIES:
        has_year = title[-1] == ")"
        date = f"01-Jan-{title[-5:-1]}" if has_year else ""
        flags = [str(int(name in genres)) for name in [*names, "Drama", *["-"] * 10]]
        films.append(f"{movie}|{title}|{date}|||0|" + "|".join(flags))
    users = [f"{user}|{age}|{gender}|{job}|48067" for user, gender, age, job in USERS]
    lines = ["\t".join(map(str, rating)) for rating in ratings]
    return write_files(folder, "iso-8859-1", u_data=lines, u_item=films, u_user=users)


def write_1m(folder: Path) -> Path:
    return write_files(
        folder, "iso-8859-1",
        ratings_dat=[f"{u}::{m}::{stars:g}::{time}" for u, m, stars, time in RATINGS],
        users_dat=[f"{u}::{gender}::{age}::{job}::48067" for u, gender, age, job in USERS],
        movies_dat=[f"{m}::{title}::{'|'.join(genres)}" for m, title, genres in MOVIES],
    )  # fmt: skip


def write_32m(folder: Path, ratings=RATINGS, movies=MOVIES) -> Path:
    lines = [f"{u},{m},{float(stars)},{time}" for u, m, stars, time in ratings]
    films = [
        f'{movie},"{title}",{"|".join(genres) or "(no genres listed)"}'
        for movie, title, genres in movies
    ]
    return write_files(
        folder, "utf-8",
        ratings_csv=["userId,movieId,rating,timestamp", *lines],
        movies_csv=["movieId,title,genres", *films],
    )  # fmt: skip


def config_of(variant, folder, **changes):
    config = movielens(variant)
    config.data.path, config.data.dir = str(folder), str(folder.parent / "data")
    config.data.update({"ratings_per_request": 1, "test_share": 0.3, "allow": ALLOWABLE, **changes})
    return config


def rows_of(variant, folder, **changes):
    """The log's rows by user and time."""
    data = config_of(variant, folder, **changes).data
    write(data, find_files(data), folder)
    rows = pq.read_table(folder / "log.parquet").to_pylist()
    return {(row["user"], row["time"]): row for row in rows}


@pytest.mark.parametrize(
    ("variant", "write_files"), [("", write_100k), ("1m", write_1m), ("32m", write_32m)]
)
def test_hand_worked_files_of_each_layout_become_rows(variant, write_files, tmp_path):
    rows = rows_of(variant, write_files(tmp_path / "raw"), **{"negatives": 0} if variant else {})
    assert list(rows) == [(3, 500), (7, DAY), (7, 3 * DAY)]
    assert [row["split"] for row in rows.values()] == ["train", "train", "test"]
    first, last = rows[7, DAY], rows[7, 3 * DAY]
    assert {*first["item"][:2]} == {12, 2}
    assert first["item"][2:] == [5, 9]
    assert last["item"] == [9, 5]
    assert {*last["history"]} == {12, 2}
    steps_per_star = 2 if variant == "32m" else 1  # half stars or whole ones
    steps = [stars.index(1) + 1 for stars in last["history_stars"]]
    expected_stars = [{12: 3, 2: 4}[film] for film in last["history"]]
    assert [step / steps_per_star for step in steps] == expected_stars
    np.testing.assert_allclose(last["history_age"], np.log([3, 3]))
    for task in ("watch", "like", "share"):
        assert last[task] == [1, 0]
    assert last["label_weight"] == [1, 1]
    film = first["item"].index(12)
    assert first["watch"][film] == 1
    assert first["like"][film] == 0
    assert first["genres"][film] == ["Drama"]
    assert first["decade"][film] == 0.5
    assert first["genres"][1 - film] == ["Action", "Children"]
    assert np.isnan(last["decade"][0])
    assert np.isnan(last["position"][1])
    # One rating of 4 before, with five of 3.5: 3.5 + 0.5 / 6.
    np.testing.assert_allclose(first["mean_before"][film], 0.5 / 6, rtol=1e-6)
    np.testing.assert_allclose(first["ratings_before"][film], np.log(2) / 3, rtol=1e-6)
    np.testing.assert_allclose(last["pause"], np.log(3))
    assert np.isnan(first["pause"])
    assert (last["hour_cos"], last["weekday"]) == (1, 6)  # 4 January 1970
    np.testing.assert_allclose([last["rated"], last["mean_rating"]], [np.log(3) / 3, 0])
    np.testing.assert_allclose([last["genres_rated"][8], last["genres_liked"][8]], [1 / 7, 0])
    known = (35, "M") if variant != "32m" else (None, None)
    assert (rows[3, 500]["age"], rows[3, 500]["gender"]) == known


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ([(7, 9, 3.5, 1)], "unknown user, film, stars or time of a rating: 7, 9, 3.5, 1"),
        ([(7, 8, 5, 1)], "unknown user, film, stars or time of a rating: 7, 8"),
        ([(4, 9, 5, 1)], "unknown user, film, stars or time of a rating: 4, 9"),
        ([(7, 9, 5, "")], "unknown user, film, stars or time of a rating: 7, 9, 5.0; mend or"),
        ([*RATINGS, (7, 9, 3, 1, 5)], "Expected Number of Columns: 4 Found: 5"),
        ([(7, 9, "x", 1)], 'cannot be read: .*"x"'),
    ],
)
def test_a_fault_of_the_files_is_one_line(ratings, message, tmp_path):
    config = config_of("", write_100k(tmp_path / "raw", ratings))
    with pytest.raises(UserError, match=message) as caught:
        SOURCES["movielens_100k"].open_source(config.data, config.tasks, config.funnel)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data" / "logs").glob("*movielens*"))
    (tmp_path / "raw" / "u.user").unlink()
    with pytest.raises(UserError, match=r"u.user does not exist; .*https.*ml-100k.zip"):
        find_files(config.data)


def random_files(folder, keep=lambda rating: True):
    """300 ratings of films 1, 4, 7, … by 12 users, many of a user in the same second."""
    generator = np.random.default_rng(3)
    user, film = 3 * np.array(np.divmod(generator.choice(12 * 40, 300, replace=False), 40)) + 1
    stars = generator.choice((1.0, 4.0, 5.0), 300)
    time = generator.integers(1_000_000, 1_000_300, 300) // 3
    ratings = zip(user.tolist(), film.tolist(), stars.tolist(), time.tolist(), strict=True)
    genres = (("Action",), ("Action", "Drama"), ("Western",))
    movies = []
    for number in range(40):
        title = f"Film {number} ({1950 + number})"
        movies.append((3 * number + 1, title, genres[number % 3]))
    return write_32m(folder, filter(keep, ratings), movies)


def test_no_row_knows_what_comes_later(tmp_path):
    changes = {"negatives": 10, "ratings_per_request": 4}
    rows = rows_of("32m", random_files(tmp_path / "all"), **changes)
    times = sorted(time for _, time in rows)
    middle = times[len(times) // 2]
    # Without all that is not before this moment.
    early = rows_of("32m", random_files(tmp_path / "early", lambda r: r[3] < middle), **changes)
    next_time = {user: max(t for u, t in early if u == user) for user, _ in early}
    compared = [key for key in early if key[1] < next_time[key[0]]]
    assert len(compared) > 10
    for key in compared:
        for name in set(rows[key]) - {"request", "split"}:
            np.testing.assert_equal(early[key][name], rows[key][name], name)


def test_drawn_films_stand_for_all_that_are_not_rated(tmp_path):
    folder = random_files(tmp_path / "raw")
    rows = rows_of("32m", folder, negatives=10, ratings_per_request=4)
    rated: dict[int, int] = {}
    draws = set()
    for (user, _), row in rows.items():
        shown = sum(row["watch"])
        rated[user] = rated.get(user, 0) + shown
        others, weights = row["item"][shown:], row["label_weight"][shown:]
        assert len({*others}) == 10
        assert others == sorted(others)
        assert row["label_weight"][:shown] == [1] * shown
        if row["split"] == "train":  # later ones may leave requests out
            np.testing.assert_allclose(sum(weights), 40 - rated[user], rtol=1e-6)
        draws.add(tuple(others))
    assert len(draws) == len(rows)
    few = rows_of("32m", folder, negatives=10, ratings_per_request=4, max_users=5)
    assert len({user for user, _ in few}) == 5
    for key, row in few.items():
        np.testing.assert_equal(row | {"request": 0}, rows[key] | {"request": 0})


@pytest.mark.parametrize("ratings", [1, 3, 10, 500])
def test_blocks_split_no_second_and_splits_have_their_shares(ratings):
    time = np.sort(np.random.default_rng(1).integers(0, 60, 200))
    config = config_of("32m", Path("raw"), ratings_per_request=ratings)
    config.data.update(validation_requests_per_user=0, test_requests_per_user=0)
    blocks = sorted(cut_blocks(time, config.data))
    splits = [block.split for block in blocks]
    starts = np.array([block.start for block in blocks])
    ends = np.array([block.end for block in blocks])
    assert [*starts, 200] == [0, *ends]
    assert (time[starts[1:]] > time[starts[1:] - 1]).all()
    sizes = ends - starts
    assert (sizes[:-1] >= ratings).all()
    assert list(splits) == sorted(splits, key=SPLITS.index)
    tested = sizes[np.array(splits) == "test"].sum()
    if len(blocks) > 1:
        assert sizes[-1] >= ratings / 2
        assert abs(tested - 0.3 * 200) <= sizes.max()


def test_the_log_is_made_once_and_opened_as_any_other(tmp_path):
    folder = random_files(tmp_path / "raw")
    config = config_of("32m", folder, negatives=10, ratings_per_request=4)
    rows = rows_of("32m", folder, negatives=10, ratings_per_request=4)
    entry = SOURCES["movielens_32m"]
    source = entry.open_source(config.data, ("like", "watch"), config.funnel)
    (tmp_path / "beside").mkdir()
    source.write_side_files(tmp_path / "beside")
    by_id = {row["request"]: row for row in rows.values()}
    for split in SPLITS:
        for request in requests_in(source.blocks(split)):
            row = by_id.pop(request.request_id)
            assert (row["split"], row["time"]) == (split, request.time)
            assert request.num_passed == len(row["item"])
            assert request.user_label.T.tolist() == [row["like"], row["watch"]]
            assert request.label_weight.tolist() == row["label_weight"]
            means = request.candidate_features[:, 0].tolist()
            np.testing.assert_allclose(means, row["mean_before"], atol=1e-6)
    assert not by_id
    assert source.spec.dataset == "movielens_32m"
    source.close()
    (log,) = (tmp_path / "data" / "logs").glob("movielens*")
    made = (log / "log.parquet").stat().st_mtime_ns
    config.data.split = "request"  # what is set counts
    other = entry.open_source(config.data, ("watch",), config.funnel)
    assert other.num_requests != source.num_requests
    other.close()
    assert (log / "log.parquet").stat().st_mtime_ns == made
    entry.check_unchanged(config.data, tmp_path / "beside")
    os.utime(folder / "ratings.csv", (1, 1))  # as of a copy
    entry.check_unchanged(config.data, tmp_path / "beside")
    (folder / "ratings.csv").write_text((folder / "ratings.csv").read_text() + "1,1,5,9999999\n")
    with pytest.raises(UserError, match="have changed since"):
        entry.check_unchanged(config.data, tmp_path / "beside")
