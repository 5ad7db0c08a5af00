"""The files of MovieLens 100K, 1M and 32M as arrays, each read in its own published layout.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.csv
from jaxtyping import Bool, Float32, Int, Int64

from kd_ranker.errors import UserError
from kd_ranker.sources.download import Archive
from kd_ranker.sources.searching import look_up

WHOLE_STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
HALF_STARS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)

_ENCODING_BEFORE_32M = "iso-8859-1"
_OCCUPATIONS_OF_1M = 21  # numbered from 0
_NO_GENRES = "(no genres listed)"
_LATEST_TIME = 2**32 - 1

_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_RELEASE_DATE = re.compile(rf"\d{{1,2}}-(?:{_MONTHS})-(?:(\d{{4}})|V)", re.ASCII)
_YEAR_OF_TITLE = re.compile(r"\((\d{4})\)\s*$", re.ASCII)

_RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")
_MOVIE_COLUMNS = ("movieId", "title", "genres")
# Four bytes an id: the largest set has 32 million ratings.
_RATING_TYPES = (pyarrow.int32(), pyarrow.int32(), pyarrow.float32(), pyarrow.int64())
_BLOCK_BYTES = 16 * 2**20
_CONVERSION_ERROR = re.compile(r"column #(\d+): Row #(\d+): .* to (\w+): invalid value '(.*)'")


@dataclasses.dataclass(frozen=True)
class MovieLens:
    """The files as arrays; `n` is the number of ratings.

    Ids count from 0 in the order of the files' own, which may have gaps. A set without attributes
    of users has None for them.
    """

    user: Int[np.ndarray, "n"]
    item: Int[np.ndarray, "n"]
    rating: Float32[np.ndarray, "n"]  # stars
    time: Int64[np.ndarray, "n"]  # seconds since 1970, UTC
    stars: tuple[float, ...]  # values that a rating can have
    num_users: int
    age: Int64[np.ndarray, "users"] | None  # years; in 1M the least of a bracket, 1 below 18
    is_female: Bool[np.ndarray, "users"] | None
    occupation: Int64[np.ndarray, "users"] | None
    num_occupations: int
    genres: Bool[np.ndarray, "items genres"]
    release_year: Int64[np.ndarray, "items"]  # 0 where the file gives none


class Published(NamedTuple):
    """One published set.

    Attributes:
      archive: on GroupLens' site.
      files: the names of those of its files that are read.
      read: the function that reads them from their directory.
    """

    archive: Archive
    files: tuple[str, ...]
    read: Callable[[Path], MovieLens]


def read_movielens(name: str, path: str | Path) -> MovieLens:
    """Reads the set that `PUBLISHED` calls `name` from the directory `path`.

    Raises:
      UserError: where a file is missing or a line is malformed; names the file and the line.
    """
    published = PUBLISHED[name]
    for file in published.files:
        if not (Path(path) / file).is_file():
            *others, last = published.files
            raise UserError(
                f"{Path(path) / file} does not exist; unpack {published.archive.url} and set "
                f"data.path to the directory that holds {', '.join(others)} and {last}"
            )
    return published.read(Path(path))


def read_100k(directory: Path) -> MovieLens:
    """Reads u.data, u.item, u.user, u.genre and u.occupation; see `read_movielens`."""
    genres = _read_genres(directory / "u.genre")
    flags, release_year = _read_items(directory / "u.item", genres)
    occupations = _read_occupations(directory / "u.occupation")
    age, is_female, occupation = _read_users(directory / "u.user", occupations)
    user, item, rating, time = _read_ratings(directory / "u.data", len(age), len(flags)).T
    return MovieLens(
        user=user,
        item=item,
        rating=rating.astype(np.float32),
        time=time,
        stars=WHOLE_STARS,
        num_users=len(age),
        age=age,
        is_female=is_female,
        occupation=occupation,
        num_occupations=len(occupations),
        genres=flags,
        release_year=release_year,
    )


def read_1m(directory: Path) -> MovieLens:
    """Reads ratings.dat, users.dat and movies.dat; see `read_movielens`.

    Genres stand in the order of their names. A movie without a rating is one of the catalogue.
    """
    movies = _read_movies(
        directory / "movies.dat",
        ((place, *fields) for place, fields in _lines(directory / "movies.dat", "::", 3)),
    )
    users = _read_numbered_users(directory / "users.dat")
    path = directory / "ratings.dat"
    # pyarrow splits at one character.
    table = _read_rating_table(
        path, io.BytesIO(path.read_bytes().replace(b"::", b"\t")), "\t", "::", lines_before=0
    )
    user, item = _check_ratings(
        table, WHOLE_STARS, ("users.dat", users.number), ("movies.dat", movies.number)
    )
    return MovieLens(
        user=user,
        item=item,
        rating=table.rating,
        time=table.time,
        stars=WHOLE_STARS,
        num_users=len(users.number),
        age=users.age,
        is_female=users.is_female,
        occupation=users.occupation,
        num_occupations=_OCCUPATIONS_OF_1M,
        genres=movies.genres,
        release_year=movies.release_year,
    )


def read_32m(directory: Path) -> MovieLens:
    """Reads ratings.csv and movies.csv; see `read_movielens`.

    Users are those who rated. Genres stand in the order of their names. A movie without a rating is
    one of the catalogue.
    """
    path = directory / "movies.csv"
    movies = _read_movies(path, ((place, *row) for place, row in _csv_rows(path, _MOVIE_COLUMNS)))
    path = directory / "ratings.csv"
    _check_header(path, _RATING_COLUMNS)
    with path.open("rb") as file:
        table = _read_rating_table(path, file, ",", ",", lines_before=1)
    users = np.unique(table.user)
    user, item = _check_ratings(
        table, HALF_STARS, ("ratings.csv", users), ("movies.csv", movies.number)
    )
    return MovieLens(
        user=user,
        item=item,
        rating=table.rating,
        time=table.time,
        stars=HALF_STARS,
        num_users=len(users),
        age=None,
        is_female=None,
        occupation=None,
        num_occupations=0,
        genres=movies.genres,
        release_year=movies.release_year,
    )


# Checksums of 100K and 1M are those that TFDS knows; several projects that fetched 32M agree on the
# third.
PUBLISHED: dict[str, Published] = {
    "movielens_100k": Published(
        Archive(
            url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
            sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
            folder="ml-100k",
        ),
        ("u.genre", "u.data", "u.item", "u.user", "u.occupation"),
        read_100k,
    ),
    "movielens_1m": Published(
        Archive(
            url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
            sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
            folder="ml-1m",
        ),
        ("ratings.dat", "users.dat", "movies.dat"),
        read_1m,
    ),
    "movielens_32m": Published(
        Archive(
            url="https://files.grouplens.org/datasets/movielens/ml-32m.zip",
            sha256="e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee",
            folder="ml-32m",
        ),
        ("ratings.csv", "movies.csv"),
        read_32m,
    ),
}


class _Movies(NamedTuple):
    """Contents of a file of movies, in the order of the movies' ids."""

    number: Int64[np.ndarray, "items"]  # the file's ids, ascending
    genres: Bool[np.ndarray, "items genres"]
    release_year: Int64[np.ndarray, "items"]


class _Users(NamedTuple):
    """Contents of users.dat, in the order of the users' ids."""

    number: Int64[np.ndarray, "users"]  # the file's ids, ascending
    age: Int64[np.ndarray, "users"]
    is_female: Bool[np.ndarray, "users"]
    occupation: Int64[np.ndarray, "users"]


@dataclasses.dataclass(frozen=True)
class _RatingTable:
    """A file of ratings line by line, with the file's own ids."""

    path: Path
    lines_before: int  # before the first rating
    user: Int[np.ndarray, "n"]
    item: Int[np.ndarray, "n"]
    rating: Float32[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]

    def refuse(self, wrong: Bool[np.ndarray, "n"], problem: Callable[[int], str]) -> None:
        """Raises UserError for the first line that is `wrong`, if there is one."""
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(f"{self.place(row)}: {problem(row)}")

    def place(self, row: int) -> str:
        """The file and the line of a rating, for messages."""
        return f"{self.path}, line {row + 1 + self.lines_before}"


def _lines(path: Path, separator: str, num_fields: int) -> Iterator[tuple[str, list[str]]]:
    """Yields (place for messages, fields) for each line; empty lines at the end are no lines."""
    # Not splitlines(): in this encoding it would break lines at characters of a title.
    lines = path.read_text(_ENCODING_BEFORE_32M).rstrip("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{path} is empty")
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        fields = line.split(separator)
        _check_fields(place, separator, len(fields), num_fields)
        yield place, fields


def _check_fields(place: str, separator: str, found: int, expected: int) -> None:
    if found != expected:
        raise UserError(f"{place}: {found} fields separated by {separator!r}, expected {expected}")


def _integer(place: str, name: str, text: str, lowest: int, highest: int) -> int:
    # int() alone would accept '1_0', ' 1' and other scripts' digits.
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{place}: {name} {text!r} is not a whole number")
    value = int(text)
    if not lowest <= value <= highest:
        raise UserError(f"{place}: {name} {value} is outside {lowest} to {highest}")
    return value


def _once(place: str, what: str, key: object, place_of: dict[object, str]) -> None:
    """Raises UserError if `place_of` has the key already; adds the key and its place."""
    if key in place_of:
        raise UserError(f"{place}: {what} was given before, in {place_of[key]}")
    place_of[key] = place


def _number(place: str, what: str, text: str, place_of: dict[object, str]) -> int:
    """An id that may be any number of 31 bits but 0, and occurs once."""
    number = _integer(place, f"{what} id", text, 1, 2**31 - 1)
    _once(place, f"{what} {number}", number, place_of)
    return number


def _is_female(place: str, gender: str) -> bool:
    if gender not in ("F", "M"):
        raise UserError(f"{place}: gender {gender!r} is not F or M")
    return gender == "F"


def _read_genres(path: Path) -> list[str]:
    """Genre names, in the order of their numbers, which count from 0 line by line."""
    names = []
    for number, (place, (name, text)) in enumerate(_lines(path, "|", 2)):
        _integer(place, "genre number", text, number, number)
        names.append(name)
    return names


def _read_occupations(path: Path) -> dict[str, int]:
    """Occupation -> its place in the file."""
    place_of: dict[object, str] = {}
    places = {}
    for number, (place, (name,)) in enumerate(_lines(path, "|", 1)):
        _once(place, f"occupation {name!r}", name, place_of)
        places[name] = number
    return places


def _read_items(
    path: Path, genres: Sequence[str]
) -> tuple[Bool[np.ndarray, "items genres"], Int64[np.ndarray, "items"]]:
    """Genre flags and release years; ids must be 1 to the number of lines, in any order."""
    lines = list(_lines(path, "|", 5 + len(genres)))
    flags = np.zeros((len(lines), len(genres)), bool)
    release_year = np.zeros(len(lines), np.int64)
    place_of: dict[object, str] = {}
    for place, (id_text, _, date, _, _, *flag_texts) in lines:
        item = _integer(place, "item id", id_text, 1, len(lines)) - 1
        _once(place, f"item {item + 1}", item, place_of)
        if date:
            match = _RELEASE_DATE.fullmatch(date)
            if match is None:
                raise UserError(f"{place}: release date {date!r} is not like 01-Jan-1995 or empty")
            # Redistributions that take the year from the title write `01-Jan-V` for one that ends
            # in `(V)`, a film for video; the year is unknown there.
            release_year[item] = int(match[1] or 0)
        for genre, text in enumerate(flag_texts):
            if text not in ("0", "1"):
                raise UserError(f"{place}: flag {text!r} of genre {genres[genre]!r} is not 0 or 1")
            flags[item, genre] = text == "1"
    return flags, release_year


def _read_users(
    path: Path, occupations: dict[str, int]
) -> tuple[Int64[np.ndarray, "users"], Bool[np.ndarray, "users"], Int64[np.ndarray, "users"]]:
    """Age, whether female, and occupation; ids must be 1 to the number of lines, in any order."""
    lines = list(_lines(path, "|", 5))
    age, occupation = np.zeros((2, len(lines)), np.int64)
    is_female = np.zeros(len(lines), bool)
    place_of: dict[object, str] = {}
    for place, (id_text, age_text, gender, occupation_text, _) in lines:
        user = _integer(place, "user id", id_text, 1, len(lines)) - 1
        _once(place, f"user {user + 1}", user, place_of)
        age[user] = _integer(place, "age", age_text, 0, 150)
        is_female[user] = _is_female(place, gender)
        if occupation_text not in occupations:
            raise UserError(f"{place}: occupation {occupation_text!r} is not in u.occupation")
        occupation[user] = occupations[occupation_text]
    return age, is_female, occupation


def _read_ratings(path: Path, num_users: int, num_items: int) -> Int64[np.ndarray, "n 4"]:
    """[user, item, rating, time] of each line, ids counted from 0."""
    place_of: dict[object, str] = {}
    rows = []
    for place, (user_text, item_text, rating_text, time_text) in _lines(path, "\t", 4):
        user = _integer(place, "user id", user_text, 1, num_users) - 1
        item = _integer(place, "item id", item_text, 1, num_items) - 1
        _once(place, f"a rating of item {item + 1} by user {user + 1}", (user, item), place_of)
        rating = _integer(place, "rating", rating_text, 1, 5)
        rows.append((user, item, rating, _integer(place, "time", time_text, 0, _LATEST_TIME)))
    return np.array(rows, np.int64)


def _read_movies(path: Path, rows: Iterable[tuple[str, ...]]) -> _Movies:
    """Collects rows of (place, id, title, genres), whose ids come in any order, with gaps."""
    place_of: dict[object, str] = {}
    numbers, years, names_of = [], [], []
    for place, id_text, title, genres in rows:
        numbers.append(_number(place, "movie", id_text, place_of))
        match = _YEAR_OF_TITLE.search(title)
        years.append(int(match[1]) if match else 0)
        names = [] if genres == _NO_GENRES else genres.split("|")
        if "" in names:
            raise UserError(f"{place}: genres {genres!r} holds an empty name")
        names_of.append(names)
    if not numbers:
        raise UserError(f"{path} holds no movies")
    vocabulary = sorted({name for names in names_of for name in names})
    column = {name: place for place, name in enumerate(vocabulary)}
    flags = np.zeros((len(numbers), len(vocabulary)), bool)
    for row, names in enumerate(names_of):
        flags[row, [column[name] for name in names]] = True
    order = np.argsort(numbers)
    return _Movies(np.array(numbers)[order], flags[order], np.array(years)[order])


def _read_numbered_users(path: Path) -> _Users:
    """users.dat: UserID::Gender::Age::Occupation::Zip-code; ids in any order, with gaps."""
    place_of: dict[object, str] = {}
    rows = [
        (
            _number(place, "user", id_text, place_of),
            _integer(place, "age", age, 0, 150),
            _is_female(place, gender),
            _integer(place, "occupation", occupation, 0, _OCCUPATIONS_OF_1M - 1),
        )
        for place, (id_text, gender, age, occupation, _) in _lines(path, "::", 5)
    ]
    number, age, is_female, occupation = np.array(sorted(rows), np.int64).T
    return _Users(number, age, is_female.astype(bool), occupation)


def _check_header(path: Path, columns: Sequence[str]) -> None:
    """Raises UserError unless the first line names these columns."""
    with path.open("rb") as file:
        # Enough for a message, of a file that may have no line ends.
        found = file.readline(200).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not found:
        raise UserError(f"{path} is empty, or its first line is")
    if found != ",".join(columns):
        raise UserError(f"{path}, line 1: found {found!r}, expected {','.join(columns)!r}")


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields (place for messages, fields) for each row of a CSV file after its header."""
    _check_header(path, columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            next(reader)
            for fields in reader:
                place = f"{path}, line {reader.line_num}"
                _check_fields(place, ",", len(fields), len(columns))
                yield place, fields
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not in UTF-8, after line {reader.line_num}") from error


def _read_rating_table(
    path: Path, file: BinaryIO, separator: str, separator_of_file: str, lines_before: int
) -> _RatingTable:
    """Parses lines of user id, movie id, rating and time, block by block.

    Args:
      path: of the file, for messages.
      file: the lines, separated by `separator`.
      separator: one character.
      separator_of_file: the separator in the file itself.
      lines_before: how many lines to skip.
    """
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    malformed: list[pyarrow.csv.InvalidRow] = []
    blocks: list[list[np.ndarray]] = [[] for _ in _RATING_COLUMNS]
    try:
        with _open_ratings(file, separator, lines_before, malformed) as reader:
            for batch in reader:
                for column, array in zip(blocks, batch.columns, strict=True):
                    column.append(array.to_numpy())
    except pyarrow.ArrowInvalid as error:
        if malformed:
            row = malformed[0]
            place = f"{path}, line {row.number}"
            _check_fields(place, separator_of_file, row.actual_columns, row.expected_columns)
        if match := _CONVERSION_ERROR.search(str(error)):
            name = _RATING_COLUMNS[int(match[1])]
            raise UserError(
                f"{path}, line {match[2]}: {name} {match[4]!r} cannot be read as {match[3]}"
            ) from error
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not blocks[0]:
        raise UserError(f"{path} holds no ratings")
    user, item, rating, time = map(np.concatenate, blocks)
    return _RatingTable(path, lines_before, user, item, rating, time)


def _open_ratings(
    file: BinaryIO,
    separator: str,
    lines_before: int,
    malformed: list[pyarrow.csv.InvalidRow],
) -> pyarrow.csv.CSVStreamingReader:
    """Opens lines of ratings as a stream; adds a row with other fields to `malformed`."""

    def keep(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(row)
        return "error"

    return pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(
            # With several threads, errors would not know the line.
            use_threads=False,
            block_size=_BLOCK_BYTES,
            skip_rows=lines_before,
            column_names=_RATING_COLUMNS,
        ),
        pyarrow.csv.ParseOptions(
            delimiter=separator,
            quote_char=False,
            # Skipped lines would not be counted.
            ignore_empty_lines=False,
            invalid_row_handler=keep,
        ),
        pyarrow.csv.ConvertOptions(
            column_types=dict(zip(_RATING_COLUMNS, _RATING_TYPES, strict=True)), null_values=[]
        ),
    )


def _places(
    table: _RatingTable,
    what: str,
    ids: Int[np.ndarray, "n"],
    file: str,
    numbers: Int[np.ndarray, "ids"],
) -> Int[np.ndarray, "n"]:
    """The place of each id among `numbers`, which `file` lists; int32.

    Raises:
      UserError: one is not there.
    """
    places, known = look_up(numbers, ids)
    table.refuse(~known, lambda row: f"{what} {ids[row]} is not in {file}")
    return places.astype(np.int32)


def _check_ratings(
    table: _RatingTable,
    stars: Sequence[float],
    users: tuple[str, Int[np.ndarray, "users"]],
    movies: tuple[str, Int[np.ndarray, "items"]],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Ids counted from 0, of a table without faults.

    Args:
      table: the ratings.
      stars: values that a rating may have.
      users: the file that lists users, and their ids, ascending.
      movies: likewise of movies.

    Returns:
      User and item of each rating, int32: their places among the ids.
    """
    user = _places(table, "user", table.user, *users)
    item = _places(table, "movie", table.item, *movies)
    table.refuse(
        ~np.isin(table.rating, np.array(stars, np.float32)),
        lambda row: f"rating {table.rating[row]:g} is none of {', '.join(f'{s:g}' for s in stars)}",
    )
    table.refuse(
        (table.time < 0) | (table.time > _LATEST_TIME),
        lambda row: f"timestamp {table.time[row]} is outside 0 to {_LATEST_TIME}",
    )
    pair = user.astype(np.int64) * len(movies[1]) + item
    by_pair = np.sort(pair)
    if len(twice := by_pair[1:][by_pair[1:] == by_pair[:-1]]):
        first, second = np.flatnonzero(pair == twice[0])[:2]
        raise UserError(
            f"{table.place(second)}: a rating of movie {table.item[second]} by user "
            f"{table.user[second]} was given before, in {table.place(first)}"
        )
    return user, item
