"""MovieLens 100K, 1M and 32M as a log: blocks of a user's ratings, with nothing from the future.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM Transactions on
Interactive Intelligent Systems 5(4), 2015. `docs/datasets.md` describes requests and columns.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from ml_collections import ConfigDict

from kd_ranker.sources.converted import Converter, connect, draw, fetch, find_raw, write_rows
from kd_ranker.sources.logs.layout import literal

LOWEST_RATING = {"watch": 0.5, "like": 4, "share": 5}  # in stars, that counts as the action
# Size -> the ratings that it has.
STARS = {"100k": np.arange(1, 5.5), "1m": np.arange(1, 5.5), "32m": np.arange(0.5, 5.5, 0.5)}
PRIOR_RATING, PRIOR_COUNT = 3.5, 5  # a mean starts as if that many ratings had this value
HISTORY = 100  # the latest ratings of a user
DAY = 24 * 3600  # seconds
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western", "IMAX"),
)
# Size -> SHA-256 of its archive: of 100K and 1M as TFDS knows it; on the third, projects that
# fetched 32M agree.
SIZES = {
    "100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "32m": "e4a68655d7386b8f95f2f2424b2ff975dfdd15ffd59e0d864a14dca43e99d6ee",
}
_URL = "https://files.grouplens.org/datasets/movielens/ml-{}.zip"
# Size -> its files of ratings, films and users, with their separators; the fields of a line.
_FILES = {
    "100k": {"u.data": "\t", "u.item": "|", "u.user": "|"},
    "1m": {"ratings.dat": "::", "movies.dat": "::", "users.dat": "::"},
    "32m": {"ratings.csv": ",", "movies.csv": ","},
}
_FIELDS = ("user movie rating time", "movie title genres", "user gender age occupation zip")
_FLAGS = {f"g{place}": of for place, of in enumerate(GENRES[:-1])}
_FIELDS_100K = {"u.item": " ".join(["movie title date video url", *_FLAGS])}
_FIELDS_100K |= {"u.user": "user age gender occupation zip"}
_TYPES = {"user": "INT", "movie": "INT", "rating": "FLOAT", "time": "BIGINT", "age": "INT"}


def find_files(data: ConfigDict) -> list[Path]:
    """The files of a set, fetched if `data.path` is empty."""
    size = data.name.removeprefix("movielens_")
    url = _URL.format(size)
    folder = "" if data.path else str(fetch(url, SIZES[size], data.dir) / f"ml-{size}")
    return find_raw(data, _FILES[size], f"the contents of {url}", folder)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    size = data.name.removeprefix("movielens_")
    year, genres = r"regexp_extract(title, '\((\d{4})\)\s*$', 1)", "string_split(genres, '|')"
    if size == "100k":
        flagged = [f"if({flag} = '1', '{of}', NULL)" for flag, of in _FLAGS.items()]
        year, genres = "split_part(date, '-', 3)", f"[{', '.join(flagged)}]"
    quotes = "header = true" if size == "32m" else "quote = '', encoding = 'latin-1'"
    with connect(data, folder) as con:
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
            CREATE TABLE rated AS SELECT ratings.*, if(rating IN {tuple(STARS[size].tolist())}
                AND film IS NOT NULL AND {len(files) == 2 or "age IS NOT NULL"}, film,
                error('unknown user, film or stars of a rating: '
                || concat_ws(', ', user, movie, rating, time))) AS film
                FROM ratings LEFT JOIN films USING (movie) LEFT JOIN users USING (user);
            CREATE TABLE kept AS SELECT user FROM ratings GROUP BY user
                {draw(data.seed, "user", data.get("max_users", 0))}""")
        write_rows(folder / "log.parquet", _rows(con, data))


def _rows(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> Iterator[dict[str, Any]]:
    """The requests as rows of the log."""
    films = con.sql("FROM films ORDER BY film").to_arrow_table()
    movie, decade = films["movie"].to_numpy(), films["decade"].to_numpy()  # NaN where unknown
    genres_of = films["genres"].combine_chunks()
    flags = np.array([[of in row for of in GENRES] for row in genres_of.to_pylist()], np.float32)
    facts = con.sql("SELECT user, age, gender, occupation FROM kept LEFT JOIN users USING (user)")
    facts_of = {line["user"]: line for line in facts.to_arrow_table().to_pylist()}
    everyone = con.sql("SELECT film, rating, time FROM rated ORDER BY time").fetchnumpy()
    # The order within a second depends on nothing but the seed, the user and the film.
    ordered = con.sql(f"""SELECT user, film, rating, time FROM rated SEMI JOIN kept USING (user)
        ORDER BY user, time, md5(concat_ws(' ', {data.seed}, user, movie))""").fetchnumpy()
    user, film, rating, time = ordered.values()
    starts = [*np.flatnonzero(np.diff(user, prepend=-1)).tolist(), len(user)]
    requests = sorted(
        (time[start + first], user[start], block, split, start, start + first, start + end)
        for start, stop in itertools.pairwise(starts)
        for block, split, first, end in blocks_of(time[start:stop], data)
    )
    scale = STARS[data.name.removeprefix("movielens_")]
    count, total, seen = np.zeros(len(movie)), np.zeros(len(movie)), 0
    for number, (now, owner, block, split, start, first, end) in enumerate(requests):
        # What was known strictly before the request.
        before = int(np.searchsorted(everyone["time"], now))
        np.add.at(count, everyone["film"][seen:before], 1.0)
        np.add.at(
            total, everyone["film"][seen:before], everyone["rating"][seen:before] - PRIOR_RATING
        )
        seen = before
        others = np.setdiff1d(np.arange(len(movie)), film[start:end])
        absent, most = len(others), int(data.get("negatives", 0))
        if 0 < most < absent:
            generator = np.random.default_rng((int(data.seed), owner, block))
            others = np.sort(generator.choice(others, most, replace=False))
        listed = np.concatenate([film[first:end], others])
        stars = np.concatenate([rating[first:end], np.zeros(len(others), np.float32)])
        past, liked = flags[film[start:first]], rating[start:first] >= LOWEST_RATING["like"]
        rows, events = len(past) + PRIOR_COUNT, slice(max(start, first - HISTORY), first)
        angle = 2 * np.pi * (now % DAY) / DAY
        yield {
            "request": number, "time": now, **facts_of[owner], "split": split,
            "rated": np.log1p(len(past)) / 3,
            "mean_rating": float((rating[start:first] - PRIOR_RATING).sum()) / rows,
            "genres_rated": past.sum(axis=0) / np.float32(rows),
            "genres_liked": past[liked].sum(axis=0) / np.float32(rows),
            "hour_sin": np.sin(angle), "hour_cos": np.cos(angle), "weekday": (now // DAY + 3) % 7,
            "pause": np.log1p((now - time[first - 1]) / DAY) if len(past) else np.nan,
            "requests_before": np.log1p(block) / 2,
            "history": movie[film[events]],
            "history_stars": (rating[events, None] == scale).astype(np.float32),
            "history_age": np.log1p((now - time[events]) / DAY), "item": movie[listed],
            "position": np.where(stars > 0, np.arange(len(listed)), np.nan).astype(np.float32),
            # The inverse of the rate at which films that are not rated were drawn.
            "label_weight": np.where(stars > 0, 1, absent / max(len(others), 1)).astype(np.float32),
            **{task: (stars >= lowest).astype(np.int8) for task, lowest in LOWEST_RATING.items()},
            "genres": genres_of.take(pa.array(listed)), "decade": decade[listed],
            "ratings_before": (np.log1p(count[listed]) / 3).astype(np.float32),
            "mean_before": (total[listed] / (count[listed] + PRIOR_COUNT)).astype(np.float32),
        }  # fmt: skip


def blocks_of(
    time: Int64[np.ndarray, "n"], data: ConfigDict
) -> Iterator[tuple[int, str, int, int]]:
    """The blocks of a user's ratings that become requests: number, split, first rating, end.

    A block takes `data.ratings_per_request` ratings, and then all that share the last one's
    second. A last block of less than half of that joins the one before it, if there is one. A
    split starts with the block, not the first, that starts nearest to its share. `time` ascends.
    """
    size, total, starts = int(data.ratings_per_request), len(time), [0]
    while starts[-1] + size <= total:
        starts.append(int(np.searchsorted(time, time[starts[-1] + size - 1], side="right")))
    if len(starts) > 1 and 2 * (total - starts[-1]) < size:
        starts.pop()
    ends, stop, later = [*starts[1:], total], len(starts), 0.0
    for split in ("test", "validation", "train"):
        cut = 0
        if split != "train":
            later += data[f"{split}_share"]
            distance = np.abs(np.array(starts[1:stop]) - (1 - later) * total)
            cut = 1 + int(distance.argmin()) if later and stop > 1 else stop
        for block in range(cut, stop)[: data.get(f"{split}_requests_per_user") or None]:
            yield block, split, starts[block], ends[block]
        stop = cut


_KEYS = (
    *("negatives", "max_users", "ratings_per_request", "validation_share", "test_share"),
    *("validation_requests_per_user", "test_requests_per_user"),
)
CONVERTER = Converter(_KEYS, find_files, write)
