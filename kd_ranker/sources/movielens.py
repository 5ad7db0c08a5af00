"""MovieLens 100K, 1M and 32M as a log: blocks of a user's ratings, with nothing from the future.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015. `docs/datasets.md` describes requests and columns.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from kd_ranker.sources import converted
from kd_ranker.sources.logs.layout import literal

LOWEST_RATING = {"watch": 0.5, "like": 4, "share": 5}  # in stars, that counts as the action
STARS = {"100k": np.arange(1, 5.5), "1m": np.arange(1, 5.5), "32m": np.arange(0.5, 5.5, 0.5)}
PRIOR_RATING, PRIOR_COUNT = 3.5, 5  # a mean starts as if that many ratings had this value
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
# Size -> its files of ratings, films and users, with their separators; the fields of a line.
_FILES = {
    "100k": {"u.data": "\t", "u.item": "|", "u.user": "|"},
    "1m": {"ratings.dat": "::", "movies.dat": "::", "users.dat": "::"},
    "32m": {"ratings.csv": ",", "movies.csv": ","},
}
_FIELDS = ("user movie rating time", "movie title genres", "user gender age occupation zip")
_FIELDS_100K = {"u.user": "user age gender occupation zip"}
_FIELDS_100K |= {"u.item": "movie title date video url" + "".join(f" g{n}" for n in range(19))}
_TYPES = {"user": "INT", "movie": "INT", "rating": "FLOAT", "time": "BIGINT", "age": "INT"}


def find_files(data: ConfigDict) -> list[Path]:
    """The files of a set, fetched if `data.path` is empty."""
    size = data.name.removeprefix("movielens_")
    url = f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip"
    folder = "" if data.path else str(converted.fetch(url, SIZES[size], data.dir) / f"ml-{size}")
    return converted.find_raw(data, _FILES[size], f"the contents of {url}", folder)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    size = data.name.removeprefix("movielens_")
    year, genres = r"regexp_extract(title, '\((\d{4})\)\s*$', 1)", "string_split(genres, '|')"
    if size == "100k":
        flagged = [f"if(g{n} = '1', '{of}', NULL)" for n, of in enumerate(GENRES[:-1])]
        year, genres = "split_part(date, '-', 3)", f"[{', '.join(flagged)}]"
    quotes = "header = true" if size == "32m" else "quote = '', encoding = 'latin-1'"
    with converted.connect(data, folder) as con:
        con.execute("CREATE TABLE users (user INT, age INT, gender VARCHAR, occupation VARCHAR)")
        for name, file, fields in zip(("ratings", "movies", "users"), files, _FIELDS, strict=False):
            fields = _FIELDS_100K.get(file.name, fields)
            columns = {field: _TYPES.get(field, "VARCHAR") for field in fields.split()}
            con.execute(f"""CREATE OR REPLACE TABLE {name} AS FROM read_csv({literal(str(file))},
                columns = {columns}, delim = '{_FILES[size][file.name]}', escape = '', {quotes},
                auto_detect = false)""")
        con.execute(f"""
            CREATE TABLE films AS SELECT row_number() OVER (ORDER BY movie) - 1 AS film, movie,
                (try_cast({year} AS FLOAT) - 1990) / 10 AS decade,
                coalesce([replace(of, '''s', '') for of in {genres} if of[1] <> '('], []) AS genres
                FROM movies;
            CREATE TABLE rated AS SELECT ratings.*, age, gender, occupation,
                if(rating IN {tuple(STARS[size].tolist())} AND user + film + time IS NOT NULL
                AND {len(files) == 2 or "age IS NOT NULL"}, film,
                error('unknown user, film, stars or time of a rating: '
                || concat_ws(', ', user, movie, rating, time))) AS film
                FROM ratings LEFT JOIN films USING (movie) LEFT JOIN users USING (user)""")
        converted.write_rows(folder / "log.parquet", _rows(con, data))


def _rows(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> Iterator[dict[str, Any]]:
    """The requests as rows of the log."""
    films = con.sql("FROM films ORDER BY film").to_arrow_table()
    movie, decade = films["movie"].to_numpy(), films["decade"].to_numpy()  # NaN where unknown
    genres_of = films["genres"].combine_chunks()
    flags = np.array([[of in row for of in GENRES] for row in genres_of.to_pylist()], np.float32)
    # The order within a second depends on nothing but the seed, the user and the film.
    ordered = con.sql(f"""
        FROM rated SEMI JOIN (SELECT user FROM rated GROUP BY user
            {converted.draw(data.seed, "user", data.get("max_users", 0))}) AS kept USING (user)
        ORDER BY user, time, md5(concat_ws(' ', {data.seed}, user, movie))""").to_arrow_table()
    starts = np.flatnonzero(np.diff(ordered["user"].to_numpy(), prepend=-1))
    facts = ordered.select(["user", "age", "gender", "occupation"]).take(starts).to_pylist()
    films_of, ratings_of, times_of = (
        np.split(ordered[name].to_numpy(), starts)[1:] for name in ("film", "rating", "time")
    )
    requests = sorted(
        (time[first], place, block, split, first, end)
        for place, time in enumerate(times_of)
        for block, split, first, end in converted.blocks_of(time, data)
    )
    everyone = con.sql("FROM rated SELECT film, rating, time ORDER BY time").fetchnumpy()
    scale = STARS[data.name.removeprefix("movielens_")]
    count, total, seen = np.zeros(len(movie)), np.zeros(len(movie)), 0
    for number, (now, place, block, split, first, end) in enumerate(requests):
        film, rating, time = films_of[place], ratings_of[place], times_of[place]
        # What was known strictly before the request.
        before = int(np.searchsorted(everyone["time"], now))
        new = slice(seen, before)
        np.add.at(count, everyone["film"][new], 1.0)
        np.add.at(total, everyone["film"][new], everyone["rating"][new] - PRIOR_RATING)
        seen = before
        absent = np.setdiff1d(np.arange(len(movie)), film[:end])
        most = int(data.get("negatives", 0)) or len(absent)
        generator = np.random.default_rng((int(data.seed), facts[place]["user"], block))
        others = np.sort(generator.choice(absent, min(most, len(absent)), replace=False))
        inverse_rate = len(absent) / max(len(others), 1)
        listed = np.concatenate([film[first:end], others])
        stars = np.concatenate([rating[first:end], np.zeros(len(others), np.float32)])
        past, liked = flags[film[:first]], rating[:first] >= LOWEST_RATING["like"]
        rows, events = first + PRIOR_COUNT, slice(max(first - HISTORY, 0), first)
        angle = 2 * np.pi * (now % DAY) / DAY
        yield {
            "request": number, "time": now, **facts[place], "split": split,
            "rated": np.log1p(first) / 3,
            "mean_rating": float((rating[:first] - PRIOR_RATING).sum()) / rows,
            "genres_rated": past.sum(axis=0) / np.float32(rows),
            "genres_liked": past[liked].sum(axis=0) / np.float32(rows),
            "hour_sin": np.sin(angle), "hour_cos": np.cos(angle), "weekday": (now // DAY + 3) % 7,
            "pause": np.log1p((now - time[first - 1]) / DAY) if first else np.nan,
            "requests_before": np.log1p(block) / 2,
            "history": movie[film[events]],
            "history_stars": (rating[events, None] == scale).astype(np.float32),
            "history_age": np.log1p((now - time[events]) / DAY), "item": movie[listed],
            "position": np.where(stars > 0, np.arange(len(listed)), np.nan).astype(np.float32),
            "label_weight": np.where(stars > 0, 1, inverse_rate).astype(np.float32),
            **{task: (stars >= lowest).astype(np.int8) for task, lowest in LOWEST_RATING.items()},
            "genres": genres_of.take(pa.array(listed)), "decade": decade[listed],
            "ratings_before": (np.log1p(count[listed]) / 3).astype(np.float32),
            "mean_before": (total[listed] / (count[listed] + PRIOR_COUNT)).astype(np.float32),
        }  # fmt: skip


CONVERTER = converted.Converter(
    ("negatives", "max_users", *converted.BLOCK_KEYS), find_files, write
)
