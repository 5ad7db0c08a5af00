"""The files of KuaiRand as arrays, read as a stream.

C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang and X. He, "KuaiRand: An Unbiased
Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022. There are three
variants: the whole (27K), what a thousand of its users saw (1K), and the part of the whole log that
speaks of the 7,583 videos that were shown at random (Pure). The parts of their names that tell them
apart are `VARIANTS`.

A file is read block by block, and of a block only the columns that are used stay, in narrow types:
14 bytes an impression. Ids are replaced by consecutive ones of those that occur in the logs.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from jaxtyping import Bool, Float32, Float64, Int8, Int32, Int64, UInt8
from tqdm import tqdm

from kd_ranker.errors import UserError
from kd_ranker.sources.hashing import hash_into

VARIANTS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
ARCHIVE = "https://zenodo.org/records/10439422"

# The column that holds each task's label. The order is that of the bits of `Impressions.signals`.
COLUMN_OF_TASK = {
    "watch": "long_view",
    "like": "is_like",
    "share": "is_forward",
    "follow": "is_follow",
    "comment": "is_comment",
    "click": "is_click",
}
RANDOM_BIT = len(COLUMN_OF_TASK)

BEIJING = 8 * 3600  # the log's dates are of this time zone, UTC+8 without daylight saving

NO_CATEGORY = -1
NO_TIME = np.iinfo(np.int32).min
TAGS = 4  # of a video; further ones are left out

_STANDARD = ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08")
_RANDOM = "log_random_4_22_to_5_08"
_USERS, _VIDEOS = "user_features", "video_features_basic"
_STEMS = (*_STANDARD, _RANDOM, _USERS, _VIDEOS)
# The number of parts of the files that the publishers have split.
_PARTS = {(stem, "27k"): 2 for stem in _STANDARD}

_LOG_TYPES = {
    "user_id": pa.int32(),
    "video_id": pa.int32(),
    "time_ms": pa.int64(),
    **{column: pa.int8() for column in COLUMN_OF_TASK.values()},
    "is_rand": pa.int8(),
    "tab": pa.int8(),
}
_USER_NUMBERS = (
    "follow_user_num",
    "fans_user_num",
    "friend_user_num",
    "register_days",
)
_USER_FLAGS = ("is_lowactive_period", "is_live_streamer", "is_video_author")
USER_CATEGORIES = (
    "user_active_degree",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)
# Codes are read as text, since some columns write 4 and others 4.0.
_USER_TYPES = {
    "user_id": pa.int32(),
    **{column: pa.float64() for column in (*_USER_NUMBERS, *_USER_FLAGS)},
    **{column: pa.string() for column in USER_CATEGORIES},
}
VIDEO_CATEGORIES = ("video_type", "upload_type", "music_type")
_VIDEO_TYPES = {
    "video_id": pa.int32(),
    "upload_dt": pa.string(),
    **{column: pa.float64() for column in ("video_duration", "server_width", "server_height")},
    # As floats, since whole numbers may be written as 4.0; they are exact up to 2⁵³.
    **{column: pa.float64() for column in ("author_id", "music_id")},
    **{column: pa.string() for column in (*VIDEO_CATEGORIES, "tag")},
}

_BLOCK_BYTES = 1 << 24
# A table over all ids is made to replace them; the largest published one is 32,038,724.
_MOST_IDS = 1 << 28


class Files(NamedTuple):
    """Paths of the files; parts of a file in their order."""

    logs: tuple[Path, ...]
    users: tuple[Path, ...]
    videos: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Impressions:
    """All n impressions, in the order of users, then of time, then of the files.

    Attributes:
      user: in [0, users).
      item: in [0, items).
      time: seconds since 1970, UTC.
      signals: bit i says whether the user did the i-th of `COLUMN_OF_TASK`, bit `RANDOM_BIT`
        whether the video was shown at random.
      tab: the scenario in the app, from 0; -1 where the file gives none.
    """

    user: Int32[np.ndarray, "n"]
    item: Int32[np.ndarray, "n"]
    time: Int32[np.ndarray, "n"]
    signals: UInt8[np.ndarray, "n"]
    tab: Int8[np.ndarray, "n"]

    @property
    def is_random(self) -> Bool[np.ndarray, "n"]:
        """True for each video that was shown at random."""
        return self.signals >> RANDOM_BIT == 1


@dataclasses.dataclass(frozen=True)
class Users:
    """Contents of `user_features`; a user that it lacks has empty cells throughout.

    Attributes:
      features: log(1 + x) / 5 of follows, fans, friends and days since registration, then whether
        in a period of low activity, a live streamer, an author of videos. An empty cell is 0.
      category: codes of `USER_CATEGORIES`, NO_CATEGORY for an empty cell.
      sizes: the number of values of each of these.
    """

    features: Float32[np.ndarray, "users 7"]
    category: Int32[np.ndarray, "users categories"]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Videos:
    """Contents of `video_features_basic`; NaN, NO_TIME, NO_CATEGORY for empty cells.

    Attributes:
      seconds: its duration.
      shape: log(height / width) of the picture.
      upload_time: the midnight in Beijing at which the day of the upload begins.
      category: the author and the music, hashed into rows; `VIDEO_CATEGORIES`; up to TAGS tags.
      sizes: the number of values of each of these six; tags count once.
    """

    seconds: Float32[np.ndarray, "items"]
    shape: Float32[np.ndarray, "items"]
    upload_time: Int32[np.ndarray, "items"]
    category: Int32[np.ndarray, "items categories"]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KuaiRand:
    """The files as arrays."""

    log: Impressions
    users: Users
    videos: Videos


def read_kuairand(
    path: str | Path,
    variant: str,
    *,
    max_users: int = 0,
    seed: int = 0,
    author_rows: int,
    music_rows: int,
) -> KuaiRand:
    """Reads the logs, and the features of the users and videos that occur in them.

    Args:
      path: the folder with the files, or the one above its `data`.
      variant: one of `VARIANTS`.
      max_users: users to keep, drawn from `user_features`; 0 keeps all.
      seed: of that draw.
      author_rows: rows that authors are hashed into.
      music_rows: rows that music is hashed into.

    Raises:
      UserError: a file is missing, lacks a column or any row, or holds text that cannot be read.
        Names of files, columns and the absence of rows are checked before anything is read.
    """
    files = find_variant_files(path, variant)
    table = pa.Table.from_batches([b for file in files.users for b in _blocks(file, _USER_TYPES)])
    kept = _sample(_ids(files.users[0], table, "user_id"), max_users, seed) if max_users else None
    log, user_ids, video_ids = read_log(files.logs, kept)
    return KuaiRand(
        log,
        _users_of(files.users[0], table, user_ids),
        read_videos(files.videos, video_ids, author_rows, music_rows),
    )


def find_variant_files(path: str | Path, variant: str) -> Files:
    """Finds the files of a variant, and checks that each has its columns and a row at least.

    Raises:
      UserError: see `read_kuairand`.
    """
    directory = _directory(Path(path), variant)
    parts = {stem: _parts(directory, stem, variant) for stem in _STEMS}
    logs = tuple(file for stem in (*_STANDARD, _RANDOM) for file in parts[stem])
    for files, types in ((logs, _LOG_TYPES), (parts[_USERS], _USER_TYPES)):
        _check_columns(files, types)
    _check_columns(parts[_VIDEOS], _VIDEO_TYPES)
    return Files(logs, parts[_USERS], parts[_VIDEOS])


def read_log(
    files: Sequence[Path], kept: Int64[np.ndarray, "k"] | None
) -> tuple[Impressions, Int64[np.ndarray, "users"], Int64[np.ndarray, "items"]]:
    """The impressions of some files in one log.

    Args:
      files: the standard log's and the random log's.
      kept: the ids of the users to keep; None keeps all.

    Returns:
      The log, and the files' ids of its users and items, ascending.
    """
    is_kept = np.zeros(0, bool)
    if kept is not None:
        is_kept = np.zeros(int(kept.max(initial=0)) + 1, bool)
        is_kept[kept] = True
    chunks: dict[str, list[Any]] = {field.name: [] for field in dataclasses.fields(Impressions)}
    for file in files:
        for block in _blocks(file, _LOG_TYPES):
            columns = _impressions(file, block)
            if kept is not None:
                user = columns["user"]
                inside = user < len(is_kept)
                inside[inside] = is_kept[user[inside]]
                columns = {name: column[inside] for name, column in columns.items()}
            for name, column in columns.items():
                chunks[name].append(column)
    # One column after the other, so that little is held twice.
    columns = {name: np.concatenate(chunks.pop(name)) for name in list(chunks)}
    columns["user"], user_ids = _consecutive(columns["user"])
    columns["item"], video_ids = _consecutive(columns["item"])
    order = np.lexsort([columns["time"], columns["user"]])
    return (
        Impressions(**{name: columns.pop(name)[order] for name in list(columns)}),
        user_ids,
        video_ids,
    )


def read_videos(
    files: Sequence[Path], video_ids: Int64[np.ndarray, "items"], author_rows: int, music_rows: int
) -> Videos:
    """Reads the videos `video_ids`, which ascend, from some files; the last row counts."""
    items = len(video_ids)
    place = np.full(int(video_ids.max(initial=-1)) + 1, -1, np.int32)
    place[video_ids] = np.arange(items, dtype=np.int32)
    seconds, shape = np.full((2, items), np.nan, np.float32)
    upload_time = np.full(items, NO_TIME, np.int32)
    category = np.full((items, 2 + len(VIDEO_CATEGORIES) + TAGS), NO_CATEGORY, np.int32)
    vocabularies: dict[str, dict[str, int]] = {name: {} for name in (*VIDEO_CATEGORIES, "tag")}
    for file in files:
        for whole in _blocks(file, _VIDEO_TYPES):
            ids = _ids(file, whole, "video_id")
            known = ids < len(place)
            known[known] = place[ids[known]] >= 0
            block = whole.filter(pa.array(known))
            at = place[ids[known]]
            seconds[at] = _positive(_numbers(block, "video_duration")) / 1000
            height = _positive(_numbers(block, "server_height"))
            shape[at] = np.log(height / _positive(_numbers(block, "server_width")))
            upload_time[at] = _midnights(block["upload_dt"])
            category[at, 0] = hash_rows(_numbers(block, "author_id"), author_rows)
            category[at, 1] = hash_rows(_numbers(block, "music_id"), music_rows)
            for index, name in enumerate(VIDEO_CATEGORIES, start=2):
                category[at, index] = _codes(block[name], vocabularies[name])
            category[at, -TAGS:] = _bags(block["tag"], vocabularies["tag"])
    sizes = [author_rows, music_rows, *map(len, vocabularies.values())]
    return Videos(seconds, shape, upload_time, category, tuple(max(size, 1) for size in sizes))


def hash_rows(ids: Float64[np.ndarray, "n"], rows: int) -> Int32[np.ndarray, "n"]:
    """The row in [0, rows) of each id, a whole number, by `hash_into`; NO_CATEGORY where it is NaN.

    >>> hash_rows(np.array([7.0, 8.0, 7.0, np.nan]), 1000).tolist()
    [789, 783, 789, -1]
    """
    known = ~np.isnan(ids)
    hashed = hash_into(np.where(known, ids, 0).astype(np.int64), rows)
    return np.where(known, hashed.astype(np.int32), NO_CATEGORY)


def _directory(path: Path, variant: str) -> Path:
    """The folder that holds the variant's files: `path`, or `data` in it."""
    places = (path, path / "data")
    held = {
        place: {
            name for name in VARIANTS for stem in _STEMS if any(place.glob(f"{stem}_{name}[._]*"))
        }
        for place in places
    }
    for place in places:
        if variant in held[place]:
            return place
    for place in places:
        if held[place]:
            other = sorted(held[place])[0]
            raise UserError(
                f"{place} holds {VARIANTS[other]}, not {VARIANTS[variant]}; set "
                f"data.name=kuairand_{other}, or data.path to the other files"
            )
    raise UserError(
        f"neither {path} nor its folder data holds a file of {VARIANTS[variant]}, such as "
        f"{_USERS}_{variant}.csv; unpack the archive of {ARCHIVE} and set data.path to its folder"
    )


def _parts(directory: Path, stem: str, variant: str) -> tuple[Path, ...]:
    """The parts of a file in their order, or the one file."""
    whole = directory / f"{stem}_{variant}.csv"
    numbers = {
        int(match[1]): file
        for file in directory.glob(f"{stem}_{variant}_part*.csv")
        if (match := re.fullmatch(r".*_part(\d+)\.csv", file.name))
    }
    if whole.is_file():
        if numbers:
            raise UserError(
                f"{directory} holds both {whole.name} and parts of it; take one of the two away"
            )
        return (whole,)
    published = _PARTS.get((stem, variant), 1)
    if not numbers and published == 1:
        raise UserError(f"{whole} does not exist; unpack the whole archive of {ARCHIVE}")
    for number in range(1, max(published, *numbers, 1) + 1):
        if number not in numbers:
            missing = directory / f"{stem}_{variant}_part{number}.csv"
            raise UserError(f"{missing} does not exist; unpack the whole archive of {ARCHIVE}")
    return tuple(numbers[number] for number in sorted(numbers))


def _check_columns(files: Sequence[Path], types: Mapping[str, Any]) -> None:
    for file in files:
        # A byte order mark is not part of the first name.
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            columns = lines.readline().strip().split(",")
            has_row = bool(lines.readline().strip())
        if missing := [column for column in types if column not in columns]:
            raise UserError(
                f"{file} lacks the column {', '.join(missing)}; it has: {', '.join(columns)}"
            )
        if not has_row:
            raise UserError(f"{file} has no rows; unpack the archive of {ARCHIVE} again")


def _blocks(file: Path, types: Mapping[str, Any]) -> Iterator[Any]:
    """The columns that `types` names, block by block."""
    try:
        blocks = pyarrow.csv.open_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=list(types), strings_can_be_null=True
            ),
        )
        yield from tqdm(blocks, desc=f"reading {file.name}", unit="block", disable=None)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from error


def _impressions(file: Path, block: Any) -> dict[str, Any]:
    """The fields of `Impressions` of one block, with the file's ids."""
    if block["time_ms"].null_count:
        raise UserError(f"{file}: time_ms is empty in some row")
    time = block["time_ms"].to_numpy() // 1000
    if len(time) and not (time.min() > 0 and time.max() < 2**31):
        raise UserError(f"{file}: time_ms must be milliseconds since 1970, found {time.min()}000")
    signals = np.zeros(len(time), np.uint8)
    for bit, column in enumerate((*COLUMN_OF_TASK.values(), "is_rand")):
        # An empty cell says that nothing was done.
        done = block[column].fill_null(0).to_numpy()
        if not np.isin(done, (0, 1)).all():
            raise UserError(f"{file}: {column} must be 0 or 1, found {done.min()} to {done.max()}")
        signals |= done.astype(np.uint8) << np.uint8(bit)
    tab = block["tab"].fill_null(-1).to_numpy()
    if tab.min(initial=0) < -1:
        raise UserError(f"{file}: tab must not be negative, found {tab.min()}")
    return {
        "user": _ids(file, block, "user_id"),
        "item": _ids(file, block, "video_id"),
        "time": time.astype(np.int32),
        "signals": signals,
        "tab": tab,
    }


def _ids(file: Path, block: Any, column: str) -> Int32[np.ndarray, "n"]:
    if block[column].null_count:
        raise UserError(f"{file}: {column} is empty in some row")
    ids = block[column].to_numpy()
    if len(ids) and not (ids.min() >= 0 and ids.max() < _MOST_IDS):
        raise UserError(
            f"{file}: {column} must lie in [0, {_MOST_IDS}), found {ids.min()} to {ids.max()}"
        )
    return ids


def _consecutive(
    ids: Int32[np.ndarray, "n"],
) -> tuple[Int32[np.ndarray, "n"], Int64[np.ndarray, "different"]]:
    """Ids replaced by their places among those that occur, and these, ascending."""
    occurs = np.zeros(int(ids.max(initial=-1)) + 1, bool)
    occurs[ids] = True
    # Counted, not sorted: there are far fewer ids than rows.
    place = np.cumsum(occurs, dtype=np.int32) - 1
    return place[ids], np.flatnonzero(occurs)


def _sample(ids: Int32[np.ndarray, "n"], number: int, seed: int) -> Int64[np.ndarray, "k"]:
    """`number` of the ids, or all if there are fewer; their order in the file does not count."""
    different = np.unique(ids).astype(np.int64)
    size = min(number, len(different))
    return np.random.default_rng(seed).choice(different, size, replace=False)


def _users_of(file: Path, table: Any, user_ids: Int64[np.ndarray, "users"]) -> Users:
    """Looks the users `user_ids` up in a table; the last row counts."""
    ids = _ids(file, table, "user_id")
    row = np.full(max(int(ids.max(initial=-1)), int(user_ids.max(initial=-1))) + 1, -1)
    row[ids] = np.arange(len(ids))
    rows = row[user_ids]
    known = (rows >= 0)[:, None]
    numbers = np.stack([_numbers(table, column) for column in _USER_NUMBERS], axis=1)
    flags = np.stack([_numbers(table, column) for column in _USER_FLAGS], axis=1)
    # A code other than 1, such as -124, is not a yes.
    features = np.concatenate([np.log1p(np.maximum(np.nan_to_num(numbers), 0)) / 5, flags == 1], 1)
    vocabularies: list[dict[str, int]] = [{} for _ in USER_CATEGORIES]
    category = np.stack(
        [
            _codes(pa.concat_arrays(table[column].chunks), vocabulary)
            for column, vocabulary in zip(USER_CATEGORIES, vocabularies, strict=True)
        ],
        axis=1,
    )
    return Users(
        np.where(known, features[rows], 0).astype(np.float32),
        np.where(known, category[rows], NO_CATEGORY),
        tuple(max(len(vocabulary), 1) for vocabulary in vocabularies),
    )


def _numbers(block: Any, column: str) -> Float64[np.ndarray, "n"]:
    """The column's numbers, NaN for an empty cell."""
    return pc.fill_null(block[column], float("nan")).to_numpy()


def _positive(numbers: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return np.where(numbers > 0, numbers, np.nan)


def _midnights(dates: Any) -> Int32[np.ndarray, "n"]:
    """When each date, like 2022-04-10, begins in Beijing; NO_TIME for what is no date."""
    parsed = pc.strptime(dates, format="%Y-%m-%d", unit="s", error_is_null=True)
    seconds = parsed.cast(pa.int64()).fill_null(-1).to_numpy()
    known = (seconds > BEIJING) & (seconds < 2**31)
    return np.where(known, seconds - BEIJING, NO_TIME).astype(np.int32)


def _codes(texts: Any, vocabulary: dict[str, int]) -> Int32[np.ndarray, "n"]:
    """The place of each text in the vocabulary, which grows by those that are new to it."""
    encoded = texts.dictionary_encode()
    code = [vocabulary.setdefault(text, len(vocabulary)) for text in encoded.dictionary.to_pylist()]
    # An empty text has the place behind the last.
    places = encoded.indices.fill_null(len(code)).to_numpy()
    return np.array([*code, NO_CATEGORY], np.int32)[places]


def _bags(texts: Any, vocabulary: dict[str, int]) -> Int32[np.ndarray, "n TAGS"]:
    """The places of the tags in each text, like `12,65`; those behind the last are NO_CATEGORY."""
    encoded = texts.dictionary_encode()
    rows = []
    for text in encoded.dictionary.to_pylist():
        tags = list(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))[:TAGS]
        codes = [vocabulary.setdefault(tag, len(vocabulary)) for tag in tags]
        rows.append(codes + [NO_CATEGORY] * (TAGS - len(codes)))
    places = encoded.indices.fill_null(len(rows)).to_numpy()
    return np.array([*rows, [NO_CATEGORY] * TAGS], np.int32)[places]
