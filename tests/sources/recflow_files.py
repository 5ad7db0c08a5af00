"""Writes a small RecFlow in the published layout."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import feather

COLUMNS = (
    *("request_id", "request_timestamp", "user_id", "device_id", "age", "gender", "province"),
    *("video_id", "author_id", "category_level_one", "category_level_two", "upload_type"),
    *("upload_timestamp", "duration", "realshow", "rerank_pos", "rerank_neg", "rank_pos"),
    *("rank_neg", "coarse_neg", "prerank_neg", "rank_index", "rerank_index", "playing_time"),
    *("effective_view", "long_view", "like", "follow", "forward", "comment"),
)
SEQUENCE_LENGTH = 50
NOON = {  # of each day, in milliseconds
    "2024-02-16": 1_708_084_800_000,
    "2024-02-17": 1_708_171_200_000,
    "2024-02-18": 1_708_257_600_000,
    "2024-02-19": 1_708_344_000_000,
}
DAYS = tuple(NOON)

Row = dict[str, int]


def write_stages(root: Path, day: str, rows: list[Row], chunk: int = 7, **columns) -> Path:
    """A day of `all_stage`; `columns` replaces some, None leaves one out."""
    table = {name: np.array([row[name] for row in rows], np.int64) for name in COLUMNS}
    table |= columns
    path = root / "all_stage" / f"{day}.feather"
    path.parent.mkdir(parents=True, exist_ok=True)
    feather.write_feather(
        pa.table({name: column for name, column in table.items() if column is not None}),
        str(path),
        compression="lz4",
        chunksize=chunk,
    )
    return path


def write_sequences(root: Path, day: str, sequences: object) -> Path:
    """A day of `seq_effective_50_dict`, as Python 3.7 and NumPy 1.19 write it."""
    path = root / "seq_effective_50_dict" / f"{day}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = pickle.dumps(sequences, protocol=3)
    path.write_bytes(text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return path


def random_row(generator: np.random.Generator, video: int) -> Row:
    """What is the same of a video in every row, and columns of zeros."""
    of_video = np.random.default_rng(video)
    row = dict.fromkeys(COLUMNS, 0)
    row |= {
        "video_id": video,
        "author_id": int(of_video.integers(33_000_000)),
        "category_level_one": int(of_video.integers(141)),
        "category_level_two": int(of_video.integers(785)),
        "upload_type": int(of_video.integers(41)),
        "upload_timestamp": int(of_video.integers(1_600_000_000, 1_705_000_000)),
        "duration": int(of_video.integers(5_000, 300_000)),
    }
    return row | {"rank_index": -1, "rerank_index": -1}


def random_request(
    generator: np.random.Generator, request_id: int, time: int, videos: int = 60
) -> list[Row]:
    """The rows of a request: `rank_pos` and the like, and then what was left out before."""
    user = int(generator.integers(100, 108))
    retrieved, ranked = int(generator.integers(8, 21)), int(generator.integers(4, 8))
    rows = [
        random_row(generator, 1000 + 7 * int(video))
        for video in generator.choice(videos, retrieved, replace=False)
    ]
    for place, row in enumerate(rows):
        row |= {"request_id": request_id, "request_timestamp": time, "user_id": user}
        row |= {"device_id": user + 1, "age": user % 8, "gender": user % 3, "province": user % 80}
        if place < ranked:
            top = place < 3
            row |= {"rank_pos": int(top), "rank_neg": int(not top), "rank_index": 1 + 2 * place}
            row |= {"rerank_pos": int(place < 2), "rerank_neg": int(place == 2)}
        else:
            stage = "coarse_neg" if place % 2 else "prerank_neg"
            row[stage] = 1
        # A shown one need not have come through the rank stage.
        if place < 2 or place == ranked:
            labels = ("effective_view", "long_view", "like", "follow", "forward", "comment")
            row |= {name: int(generator.integers(2)) for name in labels}
            row |= {"realshow": 1, "playing_time": int(generator.integers(1, 400_000))}
    return rows


def random_sequence(generator: np.random.Generator, time: int, videos: int = 80) -> np.ndarray:
    """Effective views before `time`, padded at the front as the published ones are."""
    sequence = np.zeros((SEQUENCE_LENGTH, 10), np.int64)
    sequence[:, 3] = 2
    events = int(generator.integers(0, 7))
    times = np.sort(time - generator.integers(1, 10**9, events))
    for place, at in zip(range(SEQUENCE_LENGTH - events, SEQUENCE_LENGTH), times, strict=True):
        row = random_row(generator, 1000 + 7 * int(generator.integers(videos)))
        sequence[place] = [
            *(row["video_id"], row["author_id"], row["category_level_two"]),
            *(row["category_level_one"], row["upload_type"], row["upload_timestamp"]),
            *(row["duration"], at, generator.integers(1, 400_000), generator.integers(10**6)),
        ]
    return sequence


def write_random(
    root: Path,
    requests: int = 12,
    seed: int = 0,
    days: tuple[str, ...] = DAYS,
    chunk: int = 7,
    request_rows: Callable[[np.random.Generator, int, int], list[Row]] = random_request,
) -> dict[str, tuple[list[Row], dict[int, np.ndarray]]]:
    """Some days of random requests, whose rows lie in no order; day -> rows and sequences."""
    written = {}
    for number, day in enumerate(days):
        generator = np.random.default_rng([seed, number])
        rows: list[Row] = []
        sequences = {}
        for request in range(requests):
            request_id = int(1000 * number + 7 * request + generator.integers(7))
            # Some at the same moment.
            time = NOON[day] + 1000 * int(generator.integers(requests // 2)) + 250
            rows += request_rows(generator, request_id, time)
            sequences[request_id] = random_sequence(generator, time)
        rows = [rows[place] for place in generator.permutation(len(rows))]
        write_stages(root, day, rows, chunk)
        write_sequences(root, day, sequences)
        written[day] = rows, sequences
    return written
