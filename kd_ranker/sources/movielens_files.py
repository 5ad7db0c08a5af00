"""The files of MovieLens 100K, 1M and 32M as arrays, each read in its own published layout.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from kd_ranker.errors import UserError
from kd_ranker.sources.download import Archive
from kd_ranker.sources.tables import Engine, fetch_columns, numbered, open_tables
from kd_ranker.sources.texts import Field, Text, check_known, check_once, read_text, refuse

WHOLE_STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
HALF_STARS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)

_ENCODING_BEFORE_32M = "iso-8859-1"
_OCCUPATIONS_OF_1M = 21  # numbered from 0
_NO_GENRES = "(no genres listed)"

_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
# Redistributions that take the year from the title write `01-Jan-V` for one that ends in `(V)`, a
# film for video; the year is unknown there.
_RELEASE_DATE = rf"^[0-9]{{1,2}}-({_MONTHS})-([0-9]{{4}}|V)$"
_YEAR_OF_TITLE = r"\(([0-9]{4})\)\s*$"

# Any number of 31 bits but 0.
_ID = Field("whole", 1, 2**31 - 1)
_AGE = Field("whole", 0, 150)
_GENDER = Field(among=("F", "M"))
_FLAG = Field(among=("0", "1"))
_TIME = Field("whole", 0, 2**32 - 1)


@dataclasses.dataclass(frozen=True)
class MovieLens:
    """The files as arrays; `n` is the number of ratings, which stand in the order of time.

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


class _Set(NamedTuple):
    """The files of a set, read and checked line by line.

    Attributes:
      ratings: `user`, `movie`, `rating` and `time`.
      movies: `movie`.
      details: of each movie by `movie`: `year`, 0 where unknown, and the names of its `genres`.
      genres: names, in the order of the columns; () for those that occur, in the order of names.
      users: `user`, and where they are known `age`, `gender` and `job`, which counts from 0.
      num_occupations: 0 where nothing is known of users.
    """

    ratings: Text
    movies: Text
    details: ir.Table
    genres: tuple[str, ...]
    users: Text | None
    num_occupations: int


class Published(NamedTuple):
    """One published set.

    Attributes:
      archive: on GroupLens' site.
      files: the names of those of its files that are read.
      stars: values that a rating can have.
      read: the function that reads them from their directory.
    """

    archive: Archive
    files: tuple[str, ...]
    stars: tuple[float, ...]
    read: Callable[[Engine, Path], _Set]


def read_movielens(name: str, path: str | Path) -> MovieLens:
    """Reads the set that `PUBLISHED` calls `name` from the directory `path`.

    A movie without a rating is one of the catalogue. Users are those of the file of users, or where
    a set has none, those who rated.

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
    with open_tables() as engine:
        return _arrays(engine, published.read(engine, Path(path)), published.stars)


def _arrays(engine: Engine, files: _Set, stars: tuple[float, ...]) -> MovieLens:
    """Checks ids against each other, and replaces them by their places."""
    ratings, movies, users = files.ratings, files.movies, files.users
    check_once(engine, movies, ["movie"], "movie {movie}")
    if users is not None:
        check_once(engine, users, ["user"], "user {user}")
        check_known(engine, ratings, "user", users, "user {user}")
    check_known(engine, ratings, "movie", movies, "movie {movie}")
    check_once(engine, ratings, ["user", "movie"], "a rating of movie {movie} by user {user}")
    known = engine.keep("users", numbered((users or ratings).rows.distinct(on="user"), "user"))
    titles = engine.keep("movies", numbered(files.details, "movie"))
    placed = ratings.rows.join(known.select("user", user_id="id"), "user")
    placed = placed.join(titles.select("movie", item_id="id"), "movie").order_by("time", "line")
    user, item, rating, time = fetch_columns(
        engine, placed.select("user_id", "item_id", "rating", "time")
    )
    year, names = engine.fetch(titles.order_by("id").select("year", "genres")).columns
    names = names.to_pylist()
    genres = files.genres or tuple(sorted({name for of in names for name in of}))
    of_users: dict[str, np.ndarray | None] = dict.fromkeys(("age", "is_female", "occupation"))
    if users is not None:
        found = engine.fetch(known.order_by("id"))
        of_users = {
            "age": found["age"].to_numpy(),
            "is_female": np.array(found["gender"]) == "F",
            "occupation": found["job"].to_numpy(),
        }
    return MovieLens(
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=rating.astype(np.float32),
        time=time,
        stars=stars,
        num_users=engine.count(known),
        num_occupations=files.num_occupations,
        genres=np.array([[genre in of for genre in genres] for of in map(set, names)], bool),
        release_year=year.to_numpy(),
        **of_users,
    )


def _read_100k(engine: Engine, directory: Path) -> _Set:
    """Reads u.data, u.item, u.user, u.genre and u.occupation."""

    def read(name: str, fields: dict[str, Field], separator: str = "|", rest: int = 0) -> Text:
        names = [*fields, *(f"unused {number}" for number in range(rest))]
        wanted = {of: field for of, field in fields.items() if not of.startswith("unused")}
        return read_text(
            engine, directory / name, wanted, names=names, separator=separator,
            encoding=_ENCODING_BEFORE_32M,
        )  # fmt: skip

    listed = read("u.genre", {"genre": Field(), "number": Field("whole")})
    refuse(
        engine, listed, "number <> line - 1", "genre number {number} does not count from 0 by lines"
    )
    genres = engine.fetch(listed.rows.order_by("line"))["genre"].to_pylist()
    text = Field(optional=True)
    movies = read(
        "u.item",
        {"movie": _ID, "unused": text, "date": text, "unused too": text, "unused as well": text}
        | {f"flag of genre {genre}": _FLAG for genre in genres},
    )
    rows = movies.rows
    problem = "release date {date!r} is not like 01-Jan-1995 or empty"
    refuse(engine, movies, f"NOT regexp_matches(date, '{_RELEASE_DATE}')", problem)
    flags = [
        ibis.ifelse(rows[f"flag of genre {genre}"] == "1", genre, ibis.null("string"))
        for genre in genres
    ]
    jobs = read("u.occupation", {"occupation": Field()})
    check_once(engine, jobs, ["occupation"], "occupation {occupation!r}")
    users = read(
        "u.user", {"user": _ID, "age": _AGE, "gender": _GENDER, "occupation": Field()}, rest=1
    )
    check_known(engine, users, "occupation", jobs, "occupation {occupation!r}")
    job = jobs.rows.select("occupation", job=jobs.rows.line - 1)
    return _Set(
        read(
            "u.data",
            {"user": _ID, "movie": _ID, "rating": Field("whole", 1, 5), "time": _TIME},
            "\t",
        ),
        movies,
        rows.select(
            "movie",
            year=ibis.coalesce(rows.date.split("-")[2].try_cast("int64"), 0),
            genres=ibis.array(flags).filter(lambda name: name.notnull()),
        ),
        tuple(genres),
        Text(users.path, users.rows.join(job, "occupation")),
        engine.count(jobs.rows),
    )


def _read_1m(engine: Engine, directory: Path) -> _Set:
    """Reads ratings.dat, users.dat and movies.dat."""

    def read(name: str, fields: dict[str, Field], unused: Sequence[str] = ()) -> Text:
        return read_text(
            engine, directory / name, fields, names=[*fields, *unused], separator="::",
            encoding=_ENCODING_BEFORE_32M,
        )  # fmt: skip

    movies = read("movies.dat", _MOVIE)
    job = Field("whole", 0, _OCCUPATIONS_OF_1M - 1)
    users = {"user": _ID, "gender": _GENDER, "age": _AGE, "occupation": job}
    answers = read("users.dat", users, ["postcode"])
    return _Set(
        read("ratings.dat", _rating(WHOLE_STARS)),
        movies,
        _details(engine, movies),
        (),
        Text(answers.path, answers.rows.rename(job="occupation")),
        _OCCUPATIONS_OF_1M,
    )


_MOVIE = {"movie": _ID, "title": Field(optional=True), "genres": Field()}


def _rating(stars: tuple[float, ...]) -> dict[str, Field]:
    return {"user": _ID, "movie": _ID, "rating": Field("number", among=stars), "time": _TIME}


def _read_32m(engine: Engine, directory: Path) -> _Set:
    """Reads ratings.csv and movies.csv."""
    new = {"userId": "user", "movieId": "movie", "timestamp": "time"}
    old = {name: of for of, name in new.items()}

    def read(name: str, fields: dict[str, Field]) -> Text:
        text = read_text(
            engine, directory / name, {old.get(of, of): field for of, field in fields.items()}
        )
        return Text(text.path, text.rows.rename({k: v for k, v in old.items() if k in fields}))

    movies = read("movies.csv", _MOVIE)
    ratings = read("ratings.csv", _rating(HALF_STARS))
    return _Set(ratings, movies, _details(engine, movies), (), None, 0)


def _details(engine: Engine, movies: Text) -> ir.Table:
    """`movie`, `year` and `genres` of movies whose year ends the title."""
    rows = movies.rows
    names = rows.genres.split("|").filter(lambda name: name != _NO_GENRES)
    nameless = "list_contains(string_split(genres, '|'), '')"
    refuse(engine, movies, nameless, "genres {genres!r} holds an empty name")
    year = ibis.coalesce(rows.title, "").re_extract(_YEAR_OF_TITLE, 1)
    year = ibis.coalesce(year.try_cast("int64"), 0)
    return rows.select("movie", year=year, genres=names)


_SITE = "https://files.grouplens.org/datasets/movielens"

# Checksums of 100K and 1M are those that TFDS knows; several projects that fetched 32M agree on the
# third.
PUBLISHED: dict[str, Published] = {
    "movielens_100k": Published(
        Archive(
            url=f"{_SITE}/ml-100k.zip",
            sha256="50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
            folder="ml-100k",
        ),
        ("u.genre", "u.data", "u.item", "u.user", "u.occupation"),
        WHOLE_STARS,
        _read_100k,
    ),
    "movielens_1m": Published(
        Archive(
            url=f"{_SITE}/ml-1m.zip",
            sha256="a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
            folder="ml-1m",
        ),
        ("ratings.dat", "users.dat", "movies.dat"),
        WHOLE_STARS,
        _read_1m,
    ),
    "movielens_32m": Published(
        Archive(
            url=f"{_SITE}/ml-32m.zip",
            sha256="e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee",
            folder="ml-32m",
        ),
        ("ratings.csv", "movies.csv"),
        HALF_STARS,
        _read_32m,
    ),
}
