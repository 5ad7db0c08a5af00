"""MovieLens 100K, 1M and 32M as a log: blocks of a user's ratings, with nothing from the future.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015. `docs/datasets.md` describes requests and columns.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32, Int, Int64
from ml_collections import ConfigDict

from kd_ranker.sources import converted
from kd_ranker.sources.logs.sql import literal

LOWEST_RATING = {"watch": 0.5, "like": 4, "share": 5}  # in stars, that counts as the action
STARS = {"100k": np.arange(1, 5.5), "1m": np.arange(1, 5.5), "32m": np.arange(0.5, 5.5, 0.5)}
# A mean starts as if `PRIOR_COUNT` ratings had the value `PRIOR_RATING`.
PRIOR_RATING = 3.5
PRIOR_COUNT = 5
HISTORY = 100  # the latest ratings of a user
DAY = 24 * 3600  # seconds
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western", "IMAX"),
)
# Size -> SHA-256 of its archive: those of TFDS; for 32M, projects that fetched it agree.
SIZES = {
    "100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "32m": "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee",
}


class _RawFile(NamedTuple):
    """A file of a set, and the table that it becomes."""

    table: str
    name: str
    separator: str
    fields: str  # of a line


_GENRE_FLAGS = " ".join(f"g{number}" for number in range(19))
_FILES = {
    "100k": (
        _RawFile("ratings", "u.data", "\t", "user movie rating time"),
        _RawFile("movies", "u.item", "|", f"movie title date video url {_GENRE_FLAGS}"),
        _RawFile("users", "u.user", "|", "user age gender occupation zip"),
    ),
    "1m": (
        _RawFile("ratings", "ratings.dat", "::", "user movie rating time"),
        _RawFile("movies", "movies.dat", "::", "movie title genres"),
        _RawFile("users", "users.dat", "::", "user gender age occupation zip"),
    ),
    "32m": (
        _RawFile("ratings", "ratings.csv", ",", "user movie rating time"),
        _RawFile("movies", "movies.csv", ",", "movie title genres"),
    ),
}
_TYPES = {"user": "INT", "movie": "INT", "rating": "FLOAT", "time": "BIGINT", "age": "INT"}


def find_files(data: ConfigDict) -> list[Path]:
    """Find the files of a set, or fetch them if `data.path` is empty."""
    size = data.name.removeprefix("movielens_")
    url = f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip"
    folder = "" if data.path else str(converted.fetch(url, SIZES[size], data.dir) / f"ml-{size}")
    names = [file.name for file in _FILES[size]]
    return converted.find_raw(data, names, f"the contents of {url}", folder)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    size = data.name.removeprefix("movielens_")
    with converted.connect(data, folder) as con:
        _read_tables(con, size, files)
        converted.write_rows(folder / "log.parquet", _rows(con, data))


def _read_tables(con: duckdb.DuckDBPyConnection, size: str, files: Sequence[Path]) -> None:
    """Make the table `films`, numbered from 0, and `rated`: ratings with the facts of the user."""
    text = "header = true" if size == "32m" else "quote = '', encoding = 'latin-1'"
    # Stays empty in a set without users.
    con.execute("CREATE TABLE users (user INT, age INT, gender VARCHAR, occupation VARCHAR)")
    for raw, path in zip(_FILES[size], files, strict=True):
        columns = {field: _TYPES.get(field, "VARCHAR") for field in raw.fields.split()}
        con.execute(f"""
            CREATE OR REPLACE TABLE {raw.table} AS FROM read_csv({literal(str(path))},
                columns = {columns}, delim = '{raw.separator}', escape = '', {text},
                auto_detect = false)""")
    if size == "100k":
        flagged = [
            f"if(g{number} = '1', '{genre}', NULL)" for number, genre in enumerate(GENRES[:-1])
        ]
        genres = f"[{', '.join(flagged)}]"
        year = "split_part(date, '-', 3)"
    else:
        genres = "string_split(genres, '|')"
        year = r"regexp_extract(title, '\((\d{4})\)\s*$', 1)"
    con.execute(f"""
        CREATE TABLE films AS SELECT row_number() OVER (ORDER BY movie) - 1 AS film, movie,
            (try_cast({year} AS FLOAT) - 1990) / 10 AS decade,
            coalesce([replace(genre, '''s', '') for genre in {genres} if genre[1] <> '('], [])
                AS genres
            FROM movies""")
    has_users = any(raw.table == "users" for raw in _FILES[size])
    is_known_user = "age IS NOT NULL" if has_users else "true"
    con.execute(f"""
        CREATE TABLE rated AS SELECT ratings.*, age, gender, occupation,
            if(rating IN {tuple(STARS[size].tolist())} AND user + film + time IS NOT NULL
            AND {is_known_user}, film,
            error('unknown user, film, stars or time of a rating: '
            || concat_ws(', ', user, movie, rating, time))) AS film
            FROM ratings LEFT JOIN films USING (movie) LEFT JOIN users USING (user)""")


class _Films(NamedTuple):
    """The films, in the order of their numbers."""

    movie: Int[np.ndarray, "films"]  # the id in the raw files
    decade: Float[np.ndarray, "films"]  # counted from 1990; NaN where unknown
    genres: pa.ListArray
    has_genre: Float32[np.ndarray, "films genres"]  # in the order of `GENRES`


class _User(NamedTuple):
    """A user's ratings in the order of time."""

    facts: dict[str, Any]  # id, age, gender and occupation
    film: Int[np.ndarray, "n"]
    rating: Float32[np.ndarray, "n"]
    time: Int64[np.ndarray, "n"]


class _RatingsBefore:
    """The ratings that films got strictly before a moment, which only moves forward."""

    def __init__(self, con: duckdb.DuckDBPyConnection, num_films: int) -> None:
        self._ratings = con.sql("FROM rated SELECT film, rating, time ORDER BY time").fetchnumpy()
        self._num_seen = 0
        self.count = np.zeros(num_films)
        self.total = np.zeros(num_films)  # of the differences from `PRIOR_RATING`

    def move_to(self, moment: int) -> None:
        """Add the ratings up to a moment."""
        end = int(np.searchsorted(self._ratings["time"], moment))
        film = self._ratings["film"][self._num_seen : end]
        rating = self._ratings["rating"][self._num_seen : end]
        np.add.at(self.count, film, 1.0)
        np.add.at(self.total, film, rating - PRIOR_RATING)
        self._num_seen = end


def _rows(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> Iterator[dict[str, Any]]:
    """Yield the requests as rows of the log, in the order of time."""
    films = _read_films(con)
    users = _read_users(con, data)
    requests = [
        (user.time[block.start], place, block)
        for place, user in enumerate(users)
        for block in converted.cut_blocks(user.time, data)
    ]
    before = _RatingsBefore(con, len(films.movie))
    for number, (now, place, block) in enumerate(sorted(requests)):
        before.move_to(now)
        user = users[place]
        yield {
            "request": number,
            "time": now,
            **user.facts,
            "split": block.split,
            **_past(user, block.start, films),
            "hour_sin": np.sin(2 * np.pi * (now % DAY) / DAY),
            "hour_cos": np.cos(2 * np.pi * (now % DAY) / DAY),
            "weekday": (now // DAY + 3) % 7,
            "pause": _pause(user, block.start),
            "requests_before": np.log1p(block.number) / 2,
            **_history(user, block.start, films, STARS[data.name.removeprefix("movielens_")]),
            **_candidates(user, block, films, before, data),
        }


def _read_films(con: duckdb.DuckDBPyConnection) -> _Films:
    films = con.sql("FROM films ORDER BY film").to_arrow_table()
    genres = films["genres"].combine_chunks()
    has_genre = np.zeros((len(films), len(GENRES)), np.float32)
    for film, names in enumerate(genres.to_pylist()):
        has_genre[film] = [genre in names for genre in GENRES]
    return _Films(films["movie"].to_numpy(), films["decade"].to_numpy(), genres, has_genre)


def _read_users(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> list[_User]:
    """Read the drawn users, by their ids."""
    # The order within a second depends on nothing but the seed, the user and the film.
    ratings = con.sql(f"""
        FROM rated SEMI JOIN (SELECT user FROM rated GROUP BY user
            {converted.draw(data.seed, "user", data.get("max_users", 0))}) AS drawn USING (user)
        ORDER BY user, time, md5(concat_ws(' ', {data.seed}, user, movie))""").to_arrow_table()
    starts = np.flatnonzero(np.diff(ratings["user"].to_numpy(), prepend=-1))
    facts = ratings.select(["user", "age", "gender", "occupation"]).take(starts).to_pylist()
    film, rating, time = (
        np.split(ratings[name].to_numpy(), starts)[1:] for name in ("film", "rating", "time")
    )
    return [_User(*columns) for columns in zip(facts, film, rating, time, strict=True)]


def _past(user: _User, start: int, films: _Films) -> dict[str, Any]:
    """Return what a user's ratings before the one at `start` say of the user."""
    rating = user.rating[:start]
    has_genre = films.has_genre[user.film[:start]]
    is_liked = rating >= LOWEST_RATING["like"]
    number = start + PRIOR_COUNT
    return {
        "rated": np.log1p(start) / 3,
        "mean_rating": float((rating - PRIOR_RATING).sum()) / number,
        "genres_rated": has_genre.sum(axis=0) / np.float32(number),
        "genres_liked": has_genre[is_liked].sum(axis=0) / np.float32(number),
    }


def _pause(user: _User, start: int) -> float:
    """Return the logarithm of 1 + days since the rating before; NaN for the first one."""
    if start == 0:
        return np.nan
    return float(np.log1p((user.time[start] - user.time[start - 1]) / DAY))


def _history(
    user: _User, start: int, films: _Films, scale: Float[np.ndarray, "stars"]
) -> dict[str, Any]:
    """Return the latest ratings before the one at `start`; stars are one-hot."""
    events = slice(max(start - HISTORY, 0), start)
    stars = user.rating[events, None] == scale
    return {
        "history": films.movie[user.film[events]],
        "history_stars": stars.astype(np.float32),
        "history_age": np.log1p((user.time[start] - user.time[events]) / DAY),
    }


def _candidates(
    user: _User, block: converted.Block, films: _Films, before: _RatingsBefore, data: ConfigDict
) -> dict[str, Any]:
    """Return the films that a user rates in a block, then some that the user has not rated yet."""
    absent = np.setdiff1d(np.arange(len(films.movie)), user.film[: block.end])
    most = int(data.get("negatives", 0)) or len(absent)
    generator = np.random.default_rng((int(data.seed), user.facts["user"], block.number))
    negatives = np.sort(generator.choice(absent, min(most, len(absent)), replace=False))
    inverse_rate = len(absent) / max(len(negatives), 1)

    rated = slice(block.start, block.end)
    film = np.concatenate([user.film[rated], negatives])
    stars = np.concatenate([user.rating[rated], np.zeros(len(negatives), np.float32)])
    is_rated = stars > 0
    mean_before = before.total[film] / (before.count[film] + PRIOR_COUNT)
    return {
        "item": films.movie[film],
        "position": np.where(is_rated, np.arange(len(film)), np.nan).astype(np.float32),
        "label_weight": np.where(is_rated, 1, inverse_rate).astype(np.float32),
        **{task: (stars >= lowest).astype(np.int8) for task, lowest in LOWEST_RATING.items()},
        "genres": films.genres.take(pa.array(film)),
        "decade": films.decade[film],
        "ratings_before": (np.log1p(before.count[film]) / 3).astype(np.float32),
        "mean_before": mean_before.astype(np.float32),
    }


CONVERTER = converted.Converter(
    ("negatives", "max_users", *converted.BLOCK_KEYS), find_files, write
)
