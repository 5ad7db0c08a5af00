"""Tests of the readers of MovieLens 1M and 32M; those of 100K are in test_movielens.py."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kd_ranker.errors import UserError
from kd_ranker.sources import movielens_files
from kd_ranker.sources.movielens_files import HALF_STARS, WHOLE_STARS, MovieLens
from tests.sources import movielens_layouts
from tests.sources.movielens_layouts import Movie, User

# Ids in no order and with gaps. Nobody rated movie 9; user 7 never rated.
MOVIES_OF_1M = [
    Movie(12, "Émile: Part II (1995)", ("Drama",)),
    Movie(2, "Heat (1980)", ("Action", "Children's")),
    Movie(9, "Without a year", ("Drama",)),
]
USERS_OF_1M = [User(30, "F", 1, 20), User(7, "M", 56, 0), User(8, "M", 25, 12)]
RATINGS_OF_1M = [(30, 2, 5, 978300760), (8, 12, 1, 978302109), (8, 2, 4, 978301968)]

MOVIES_OF_32M = [
    Movie(1, "Toy Story (1995)", ("Adventure", "Animation")),
    Movie(292757, 'Émile, "The Boy" (1931) ', ("Drama", "IMAX")),
    Movie(40, "Without a year", ()),
    Movie(8, "Series, The (2006–2007)", ("Drama",)),
    Movie(9, "1984 (1956)", ("Sci-Fi",)),
]
RATINGS_OF_32M = [
    (5, 292757, 0.5, 789652009),
    (5, 1, 4.5, 789652009),
    (200948, 40, 4, 1697160000),
    (3, 1, 3.5, 1000000000),
]


def write_1m(directory: Path) -> Path:
    return movielens_layouts.write_1m(directory, RATINGS_OF_1M, USERS_OF_1M, MOVIES_OF_1M)


def write_32m(directory: Path) -> Path:
    return movielens_layouts.write_32m(directory, RATINGS_OF_32M, MOVIES_OF_32M)


WRITE = {"movielens_1m": write_1m, "movielens_32m": write_32m}
FILES = [
    ("movielens_1m", "ratings.dat"),
    ("movielens_1m", "users.dat"),
    ("movielens_1m", "movies.dat"),
    ("movielens_32m", "ratings.csv"),
    ("movielens_32m", "movies.csv"),
]


def check_1m(files: MovieLens) -> None:
    # Users 7, 8, 30 and movies 2, 9, 12 are 0, 1, 2.
    assert files.user.tolist() == [2, 1, 1]
    assert files.item.tolist() == [0, 0, 2]
    assert files.rating.tolist() == [5.0, 4.0, 1.0]
    assert files.time.tolist() == [978300760, 978301968, 978302109]
    assert files.stars == WHOLE_STARS
    assert files.num_users == 3
    assert files.age.tolist() == [56, 25, 1]
    assert files.is_female.tolist() == [False, False, True]
    assert files.occupation.tolist() == [0, 12, 20]
    assert files.num_occupations == 21
    # Action, Children's, Drama.
    assert files.genres.tolist() == [
        [True, True, False],
        [False, False, True],
        [False] * 2 + [True],
    ]
    assert files.release_year.tolist() == [1980, 0, 1995]


def check_32m(files: MovieLens) -> None:
    # Users 3, 5, 200948 are 0, 1, 2; movies 1, 8, 9, 40, 292757 are 0 to 4.
    # In the order of time, and then of lines.
    assert files.user.tolist() == [1, 1, 0, 2]
    assert files.item.tolist() == [4, 0, 0, 3]
    assert files.rating.tolist() == [0.5, 4.5, 3.5, 4.0]
    assert files.time.tolist() == [789652009, 789652009, 1000000000, 1697160000]
    assert files.stars == HALF_STARS
    assert files.num_users == 3
    assert files.age is files.is_female is files.occupation is None
    # Adventure, Animation, Drama, IMAX, Sci-Fi.
    expected = ["11000", "00100", "00001", "00000", "00110"]
    assert files.genres.tolist() == [[flag == "1" for flag in row] for row in expected]
    assert files.release_year.tolist() == [1995, 0, 1956, 0, 1931]


CHECK = {"movielens_1m": check_1m, "movielens_32m": check_32m}


@pytest.mark.parametrize("name", WRITE)
def test_worked_example(tmp_path: Path, name: str) -> None:
    CHECK[name](movielens_files.read_movielens(name, WRITE[name](tmp_path)))


@pytest.mark.parametrize("name", WRITE)
def test_line_ends_of_windows_are_read(tmp_path: Path, name: str) -> None:
    for file in WRITE[name](tmp_path).iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    CHECK[name](movielens_files.read_movielens(name, tmp_path))


@pytest.mark.parametrize("name", WRITE)
def test_a_last_line_without_an_end_is_read(tmp_path: Path, name: str) -> None:
    for file in WRITE[name](tmp_path).iterdir():
        file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    CHECK[name](movielens_files.read_movielens(name, tmp_path))


def test_a_byte_order_mark_is_no_part_of_a_header(tmp_path: Path) -> None:
    for file in write_32m(tmp_path).iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    check_32m(movielens_files.read_movielens("movielens_32m", tmp_path))


@pytest.mark.parametrize(
    ("title", "year"),
    [
        ("Heat (1995)", 1995),
        ("Heat (1995) ", 1995),
        ("2001 (A Space Odyssey) (1968)", 1968),
        ("Heat (1980) (V)", 0),
        ("Heat 1995", 0),
        ("Heat (95)", 0),
        ("(2019–)", 0),
        ("", 0),
    ],
)
def test_the_year_ends_a_title(tmp_path: Path, title: str, year: int) -> None:
    movielens_layouts.write_32m(tmp_path, [(1, 1, 1, 1)], [Movie(1, title, ("Drama",))])
    assert movielens_files.read_movielens("movielens_32m", tmp_path).release_year.tolist() == [year]


@pytest.mark.parametrize("name", WRITE)
def test_ratings_are_those_that_pandas_reads(tmp_path: Path, name: str) -> None:
    movies = movielens_layouts.plain_movies(40)
    stars = movielens_files.WHOLE_STARS if name == "movielens_1m" else movielens_files.HALF_STARS
    ratings = movielens_layouts.random_ratings(0, users=30, items=40, ratings=700, stars=stars)
    columns = ["user", "movie", "rating", "time"]
    if name == "movielens_1m":
        users = [User(3 * user + 1, "M", 25, 3) for user in range(30)]
        movielens_layouts.write_1m(tmp_path, ratings, users, movies)
        frame = pd.read_csv(tmp_path / "ratings.dat", sep="::", engine="python", names=columns)
    else:
        movielens_layouts.write_32m(tmp_path, ratings, movies)
        frame = pd.read_csv(tmp_path / "ratings.csv", names=columns, skiprows=1)
    frame = frame.sort_values("time", kind="stable")
    files = movielens_files.read_movielens(name, tmp_path)
    np.testing.assert_array_equal(3 * files.user + 1, frame.user)
    np.testing.assert_array_equal(3 * files.item + 1, frame.movie)
    np.testing.assert_array_equal(files.rating, frame.rating)
    np.testing.assert_array_equal(files.time, frame.time)


BAD_LINES = [
    ("ratings.dat", "30::2::5", r"3 fields separated by '::', expected 4"),
    ("ratings.dat", "30,2,5,978300760", r"1 fields separated by '::', expected 4"),
    ("ratings.dat", "", r"is empty"),
    ("ratings.dat", "30:2::5::978300760", r"3 fields"),
    ("ratings.dat", "30::2.5::5::978300760", r"movie '2.5' is not a whole number"),
    ("ratings.dat", "30::9::five::978300760", r"rating 'five' is not one of 1, 2, 3, 4, 5"),
    ("ratings.dat", "30::9::3.5::978300760", r"rating '3.5' is not one of 1, 2, 3, 4, 5"),
    ("ratings.dat", "30::9::0::978300760", r"rating '0' is not one of"),
    ("ratings.dat", "30::9::5::-1", r"time '-1' is not a whole number from 0 to 4294967295"),
    ("ratings.dat", "31::9::5::978300760", r"user 31 is not in users.dat"),
    ("ratings.dat", "1::9::5::978300760", r"user 1 is not in users.dat"),
    ("ratings.dat", "30::10::5::978300760", r"movie 10 is not in movies.dat"),
    ("ratings.dat", "30::2::4::5", r"a rating of movie 2 by user 30 .* in .*ratings.dat, line 1"),
    ("users.dat", "7::M::56::0", r"4 fields"),
    ("users.dat", "7::X::56::0::1", r"gender 'X' is not one of F, M"),
    ("users.dat", "7::M::old::0::1", r"age 'old' is not a whole number"),
    ("users.dat", "7::M::56::21::1", r"occupation '21' is not a whole number from 0 to 20"),
    ("users.dat", "30::M::56::0::1", r"user 30 was given before, in .*users.dat, line 1"),
    ("users.dat", "0::M::56::0::1", r"user '0' is not a whole number from 1"),
    ("movies.dat", "2::Heat (1980)", r"2 fields"),
    ("movies.dat", "two::Heat (1980)::Action", r"movie 'two' is not a whole number"),
    ("movies.dat", "12::Heat (1980)::Action", r"movie 12 was given before"),
    ("movies.dat", "2::Heat (1980)::", r"genres '' is not a text"),
    ("movies.dat", "2::Heat (1980)::Action||War", r"genres .* holds an empty name"),
    ("ratings.csv", "5,1,4.5", r"3 fields separated by ',', expected 4"),
    ("ratings.csv", "5::1::4.5::1", r"1 fields separated by ','"),
    ("ratings.csv", "", r"is empty"),
    ("ratings.csv", "5,one,4.5,789652009", r"movieId 'one' is not a whole number"),
    ("ratings.csv", "5,1,,789652009", r"rating '' is not one of"),
    ("ratings.csv", "5,1,4.5,1995-01-09", r"timestamp '1995-01-09' is not a whole number"),
    ("ratings.csv", "5,1,4.5,99999999999", r"timestamp '99999999999' is not a whole number from 0"),
    ("ratings.csv", "5,1,4.2,789652009", r"rating '4.2' is not one of 0.5, 1, 1.5, 2, 2.5"),
    ("ratings.csv", "5,1,nan,789652009", r"rating 'nan' is not one of"),
    ("ratings.csv", "5,1,5.5,789652009", r"rating '5.5' is not one of"),
    ("ratings.csv", "5,2,4.5,789652009", r"movie 2 is not in movies.csv"),
    ("ratings.csv", "5,999999999,4.5,789652009", r"movie 999999999 is not in movies.csv"),
    ("ratings.csv", "5,292757,2,9", r"a rating of movie 292757 by user 5 .*ratings.csv, line 2"),
    ("movies.csv", "40,Without", r"2 fields separated by ',', expected 3"),
    ("movies.csv", "40,Series, The,Drama", r"4 fields"),
    ("movies.csv", "x,Without a year,Drama", r"movieId 'x' is not a whole number"),
    ("movies.csv", "1,Without a year,Drama", r"movie 1 was given before, in .*movies.csv, line 2"),
    ("movies.csv", "40,Without a year,", r"genres '' is not a text"),
    ("movies.csv", '40,"Without" a year,Drama', r"Value with unterminated quote"),
]


def set_of(file: str) -> str:
    return "movielens_1m" if file.endswith(".dat") else "movielens_32m"


@pytest.mark.parametrize(("file", "line", "problem"), BAD_LINES)
def test_malformed_lines_are_named(tmp_path: Path, file: str, line: str, problem: str) -> None:
    name = set_of(file)
    path = WRITE[name](tmp_path) / file
    encoding = "iso-8859-1" if name == "movielens_1m" else "utf-8"
    lines = path.read_text(encoding).split("\n")
    # The second after the header.
    number = 2 if name == "movielens_1m" else 3
    lines[number - 1] = line
    path.write_text("\n".join(lines), encoding)
    with pytest.raises(UserError, match=rf"{file}, line {number}: {problem}") as error:
        movielens_files.read_movielens(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2", "2 fields"),
        ("1,x,3,4", "movieId 'x' is not a whole number"),
        ("", "is empty"),
        ("1,4,3.3,4", "rating '3.3' is not one of"),
    ],
)
def test_a_damaged_line_far_into_a_file_is_named(tmp_path: Path, line: str, problem: str) -> None:
    ratings = movielens_layouts.random_ratings(1, 30, 40, 700, HALF_STARS)
    movielens_layouts.write_32m(tmp_path, ratings, movielens_layouts.plain_movies(40))
    lines = (tmp_path / "ratings.csv").read_text().split("\n")
    lines[500] = line
    (tmp_path / "ratings.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"ratings.csv, line 501: {problem}"):
        movielens_files.read_movielens("movielens_32m", tmp_path)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_missing_and_empty_files_are_named(tmp_path: Path, name: str, file: str) -> None:
    (WRITE[name](tmp_path) / file).write_text("")
    with pytest.raises(UserError, match=rf"{file} is empty"):
        movielens_files.read_movielens(name, tmp_path)
    (tmp_path / file).unlink()
    archive = movielens_files.PUBLISHED[name].archive.url
    with pytest.raises(UserError, match=rf"{file} does not exist; unpack {archive} .*data\.path"):
        movielens_files.read_movielens(name, tmp_path)


@pytest.mark.parametrize("file", ["ratings.csv", "movies.csv"])
def test_a_file_without_rows_is_named(tmp_path: Path, file: str) -> None:
    path = write_32m(tmp_path) / file
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match=rf"{file} has no rows"):
        movielens_files.read_movielens("movielens_32m", tmp_path)


@pytest.mark.parametrize(
    ("file", "header"),
    [
        ("ratings.csv", "userId,movieId,rating"),
        ("ratings.csv", "userId,movieId,tag,timestamp"),
        ("ratings.csv", "1::1193::5::978300760"),
        ("movies.csv", "movieId,imdbId,tmdbId"),
    ],
)
def test_another_header_is_shown(tmp_path: Path, file: str, header: str) -> None:
    path = write_32m(tmp_path) / file
    lines = path.read_text().split("\n")
    path.write_text("\n".join([header, *lines[1:]]))
    with pytest.raises(
        UserError, match=rf"{file} lacks the column [a-zA-Z, ]*; it has: {header}$"
    ) as error:
        movielens_files.read_movielens("movielens_32m", tmp_path)
    assert "\n" not in str(error.value)


def test_titles_in_another_encoding_are_refused(tmp_path: Path) -> None:
    path = write_32m(tmp_path) / "movies.csv"
    path.write_bytes(path.read_text("utf-8").encode("iso-8859-1", "replace"))
    with pytest.raises(UserError, match=r"movies.csv, line 3: is not in UTF-8"):
        movielens_files.read_movielens("movielens_32m", tmp_path)


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    path = write_32m(tmp_path) / "movies.csv"
    path.write_text(path.read_text("utf-8").replace('Boy""', 'Boy"'), "utf-8")
    with pytest.raises(UserError, match=r"movies.csv, line 3: ") as error:
        movielens_files.read_movielens("movielens_32m", tmp_path)
    assert "\n" not in str(error.value)
