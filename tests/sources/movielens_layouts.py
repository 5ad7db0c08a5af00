"""Writes MovieLens' files in the layouts of 1M and 32M, as the tests of the readers need them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

Rating = tuple[int, int, float, int]  # user id, movie id, stars, seconds


class Movie(NamedTuple):
    number: int
    title: str
    genres: tuple[str, ...]


class User(NamedTuple):
    number: int
    gender: str
    age: int
    occupation: int


def write_1m(
    directory: Path, ratings: Iterable[Rating], users: Iterable[User], movies: Iterable[Movie]
) -> Path:
    """ratings.dat, users.dat and movies.dat, ISO-8859-1, fields separated by two colons."""
    directory.mkdir(exist_ok=True)
    files = {
        "ratings.dat": [f"{u}::{m}::{stars:g}::{time}" for u, m, stars, time in ratings],
        "users.dat": [f"{u}::{gender}::{age}::{job}::48067" for u, gender, age, job in users],
        "movies.dat": [f"{m}::{title}::{'|'.join(genres)}" for m, title, genres in movies],
    }
    for name, lines in files.items():
        (directory / name).write_bytes("".join(f"{line}\n" for line in lines).encode("iso-8859-1"))
    return directory


def write_32m(directory: Path, ratings: Iterable[Rating], movies: Iterable[Movie]) -> Path:
    """ratings.csv and movies.csv, UTF-8, quoted where a title needs it."""
    directory.mkdir(exist_ok=True)
    lines = ["userId,movieId,rating,timestamp"]
    lines += [f"{u},{m},{float(stars)},{time}" for u, m, stars, time in ratings]
    (directory / "ratings.csv").write_text("".join(f"{line}\n" for line in lines))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["movieId", "title", "genres"])
    for number, title, genres in movies:
        writer.writerow([number, title, "|".join(genres) or "(no genres listed)"])
    (directory / "movies.csv").write_bytes(text.getvalue().encode())
    return directory


def random_ratings(
    seed: int, users: int, items: int, ratings: int, stars: tuple[float, ...]
) -> list[Rating]:
    """Ratings of ids 1, 4, 7, …, in no order; no pair twice, many in the same second."""
    generator = np.random.default_rng(seed)
    pairs = generator.choice(users * items, ratings, replace=False)
    user, item = np.divmod(pairs, items)
    given = generator.choice(stars, ratings)
    time = generator.integers(1_000_000, 1_000_000 + ratings, ratings)
    return list(
        zip(
            (3 * user + 1).tolist(),
            (3 * item + 1).tolist(),
            given.tolist(),
            time.tolist(),
            strict=True,
        )
    )


def plain_movies(items: int) -> list[Movie]:
    """Movies 1, 4, 7, … of one or two genres each."""
    genres = (("Action",), ("Action", "Drama"), ("Western",))
    return [
        Movie(3 * item + 1, f"Film {item} ({1950 + item % 70})", genres[item % 3])
        for item in range(items)
    ]
