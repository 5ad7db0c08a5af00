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
from jaxtyping import Float64, Int64
from ml_collections import ConfigDict

from kd_ranker.errors import UserError
from kd_ranker.sources.converted import Converter, connect, draw, fetch, find_raw, write_rows

LOWEST_RATING = {"watch": 0.5, "like": 4, "share": 5}  # in stars, that counts as the action
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
# Size -> its files of ratings, films and users -> the separator, and the fields of a line.
_RATING, _FILM = "user movie rating time", "movie title genres"
_FLAGS = [f"g{place}" for place in range(len(GENRES) - 1)]
_FILES = {
    "100k": {
        "u.data": ("\t", _RATING),
        "u.item": ("|", " ".join(["movie title date video url", *_FLAGS])),
        "u.user": ("|", "user age gender occupation zip"),
    },
    "1m": {
        "ratings.dat": ("::", _RATING),
        "movies.dat": ("::", _FILM),
        "users.dat": ("::", "user gender age occupation zip"),
    },
    "32m": {"ratings.csv": (",", _RATING), "movies.csv": (",", _FILM)},
}
_TYPES = {"user": "INT", "movie": "INT", "rating": "FLOAT", "time": "BIGINT", "age": "INT"}


def stars_of(name: str) -> Float64[np.ndarray, "stars"]:
    """The ratings that a set has: whole stars, in 32M also half ones."""
    step = 0.5 if name == "movielens_32m" else 1.0
    return np.arange(step, 5.5, step)


def find_files(data: ConfigDict) -> list[Path]:
    """The files of a set, fetched if `data.path` is empty."""
    size = data.name.removeprefix("movielens_")
    url, folder = _URL.format(size), ""
    if not data.path:
        folder = str(fetch(url, SIZES[size], data.dir) / f"ml-{size}")
    return find_raw(data, _FILES[size], f"the contents of {url}", folder)


def write(data: ConfigDict, files: Sequence[Path], folder: Path) -> None:
    """Write one row per request, in the order of time."""
    with connect(data, folder) as con:
        con.execute("CREATE TABLE users (user INT, age INT, gender VARCHAR, occupation VARCHAR)")
        for name, file in zip(("ratings", "movies", "users"), files, strict=False):
            delimiter, fields = _FILES[data.name.removeprefix("movielens_")][file.name]
            columns = {field: _TYPES.get(field, "VARCHAR") for field in fields.split()}
            kind = "header = true" if delimiter == "," else "quote = '', encoding = 'latin-1'"
            sql = f"""CREATE OR REPLACE TABLE {name} AS FROM read_csv($file, columns = {columns},
                delim = '{delimiter}', auto_detect = false, escape = '', {kind})"""
            con.execute(sql, {"file": str(file)})
        if len(files) == 2:
            con.execute("INSERT INTO users (user) SELECT DISTINCT user FROM ratings")
        fault = con.execute(f"""FROM ratings WHERE (rating IN {tuple(stars_of(data.name).tolist())}
            AND movie IN (SELECT movie FROM movies) AND user IN (SELECT user FROM users))
            IS NOT TRUE""").fetchone()
        if fault:
            line = ", ".join(map(str, fault))
            raise UserError(f"{files[0].parent}: unknown user, film or stars of a rating: {line}")
        write_rows(folder / "log.parquet", _rows(con, data))


def _rows(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> Iterator[dict[str, Any]]:
    """The requests as rows of the log."""
    year, genres = r"regexp_extract(title, '\((\d{4})\)\s*$', 1)", "string_split(genres, '|')"
    if data.name == "movielens_100k":
        flagged = zip(_FLAGS, GENRES, strict=False)
        year = "split_part(date, '-', 3)"
        genres = f"[{', '.join(f'''if({flag} = '1', '{of}', NULL)''' for flag, of in flagged)}]"
    films = con.sql(f"""
        SELECT DISTINCT ON (movie) movie, (try_cast({year} AS FLOAT) - 1990) / 10 AS decade,
            coalesce([replace(of, '''s', '') for of in {genres} if of[1] <> '('], []) AS genres
        FROM movies ORDER BY movie""").to_arrow_table()
    movie, genres_of = films["movie"].to_numpy(), films["genres"].combine_chunks()
    decade = films["decade"].to_numpy()  # NaN where unknown
    flags = np.array([[of in row for of in GENRES] for row in genres_of.to_pylist()], np.float32)
    everyone = con.sql("FROM ratings ORDER BY time").fetchnumpy()
    rated = np.searchsorted(movie, everyone["movie"])
    count, total, seen = np.zeros(len(movie)), np.zeros(len(movie)), 0
    scale = stars_of(data.name)
    for number, (time, user, block, split, first, end, line) in enumerate(_requests(con, data)):
        # What was known strictly before the request.
        before = int(np.searchsorted(everyone["time"], time))
        np.add.at(count, rated[seen:before], 1.0)
        np.add.at(total, rated[seen:before], everyone["rating"][seen:before])
        seen = before
        item, rating = np.searchsorted(movie, line["movie"][:end]), line["rating"][:end]
        others = np.setdiff1d(np.arange(len(movie)), item)
        absent, most = len(others), int(data.get("negatives", 0))
        if 0 < most < absent:
            generator = np.random.default_rng((int(data.seed), user, block))
            others = np.sort(generator.choice(others, most, replace=False))
        listed = np.concatenate([item[first:], others])
        stars = np.concatenate([rating[first:], np.zeros(len(others), np.float32)])
        past, liked = flags[item[:first]], rating[:first] >= LOWEST_RATING["like"]
        events = slice(max(0, first - HISTORY), first)
        angle = 2 * np.pi * (time % DAY) / DAY
        yield {
            "request": number, "time": time, "user": user, "split": split,
            **{name: line[name] for name in ("age", "gender", "occupation")},
            "rated": np.log1p(first) / 3, "mean_rating": _mean(float(rating[:first].sum()), first),
            "genres_rated": past.sum(axis=0) / np.float32(first + PRIOR_COUNT),
            "genres_liked": past[liked].sum(axis=0) / np.float32(first + PRIOR_COUNT),
            "hour_sin": np.sin(angle), "hour_cos": np.cos(angle), "weekday": (time // DAY + 3) % 7,
            "pause": np.log1p((time - line["time"][first - 1]) / DAY) if first else np.nan,
            "requests_before": np.log1p(block) / 2,
            "history": line["movie"][events],
            "history_stars": (rating[events, None] == scale).astype(np.float32),
            "history_age": np.log1p((time - line["time"][events]) / DAY), "item": movie[listed],
            "position": np.where(stars > 0, np.arange(len(listed)), np.nan).astype(np.float32),
            # The inverse of the rate at which films that are not rated were drawn.
            "label_weight": np.where(stars > 0, 1, absent / max(len(others), 1)).astype(np.float32),
            **{task: (stars >= lowest).astype(np.int8) for task, lowest in LOWEST_RATING.items()},
            "genres": genres_of.take(pa.array(listed)), "decade": decade[listed],
            "ratings_before": (np.log1p(count[listed]) / 3).astype(np.float32),
            "mean_before": _mean(total[listed], count[listed]).astype(np.float32),
        }  # fmt: skip


def _mean(total: Any, count: Any) -> Any:
    """The mean of `count` ratings with the prior, less `PRIOR_RATING`."""
    return (total - PRIOR_RATING * count) / (count + PRIOR_COUNT)


def _requests(con: duckdb.DuckDBPyConnection, data: ConfigDict) -> list[tuple[Any, ...]]:
    """The time and user of each request, its block (see `blocks_of`), and the user's ratings."""
    types = {"movie": np.int32, "rating": np.float32, "time": np.int64}
    # The order within a second depends on nothing but the seed, the user and the film.
    lines = con.sql(f"""
        WITH kept AS (SELECT DISTINCT ON (user) user, age, gender, occupation
            FROM users SEMI JOIN ratings USING (user)
            {draw(data.seed, "user", data.get("max_users", 0))}),
        rated AS (SELECT *, (time, md5(concat_ws(' ', {data.seed}, user, movie))) AS luck
            FROM ratings)
        SELECT kept.*, {", ".join(f"list({of} ORDER BY luck) AS {of}" for of in types)}
        FROM rated JOIN kept USING (user) GROUP BY ALL""").to_arrow_table()
    found = []
    for line in lines.to_pylist():
        line |= {name: np.array(line[name], type_) for name, type_ in types.items()}
        for block, split, first, end in blocks_of(line["time"], data):
            found.append((int(line["time"][first]), line["user"], block, split, first, end, line))
    return sorted(found, key=lambda request: request[:3])


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
