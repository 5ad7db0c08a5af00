"""The files of KuaiRand as arrays.

C. Gao, S. Li, Y. Zhang, J. Chen, B. Li, W. Lei, P. Jiang and X. He, "KuaiRand: An Unbiased
Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022. There are three
variants: the whole (27K), what a thousand of its users saw (1K), and the part of the whole log that
speaks of the 7,583 videos that were shown at random (Pure). The parts of their names that tell them
apart are `VARIANTS`.

The engine reads and sorts the logs, and what does not fit in its memory lies on disk. Of them, 14
bytes an impression come into memory. Ids are replaced by consecutive ones of those that occur in
the logs.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int8, Int32, Int64, UInt8

from kd_ranker.errors import UserError
from kd_ranker.sources.hashing import hash_into
from kd_ranker.sources.tables import Engine, numbered, open_tables
from kd_ranker.sources.texts import Field, column_names, read_text

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

# A table over all ids is made to replace them; the largest published one is 32,038,724.
_ID = Field("whole", 0, (1 << 28) - 1)
_NUMBER, _TEXT = Field("number", optional=True), Field(optional=True)
# An empty cell says that nothing was done.
_DONE = Field("whole", 0, 1, optional=True)
_LOG = {
    "user_id": _ID,
    "video_id": _ID,
    # Milliseconds since 1970.
    "time_ms": Field("whole", 1000, 2**31 * 1000 - 1),
    **dict.fromkeys((*COLUMN_OF_TASK.values(), "is_rand"), _DONE),
    "tab": Field("whole", 0, 127, optional=True),
}
_USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
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
_USER = {
    "user_id": _ID,
    **dict.fromkeys((*_USER_NUMBERS, *_USER_FLAGS), _NUMBER),
    **dict.fromkeys(USER_CATEGORIES, _TEXT),
}
VIDEO_CATEGORIES = ("video_type", "upload_type", "music_type")
_VIDEO_NUMBERS = ("video_duration", "server_width", "server_height", "author_id", "music_id")
_VIDEO = {
    "video_id": _ID,
    # As floats, since whole numbers may be written as 4.0; they are exact up to 2⁵³.
    **dict.fromkeys(_VIDEO_NUMBERS, _NUMBER),
    **dict.fromkeys(("upload_dt", *VIDEO_CATEGORIES, "tag"), _TEXT),
}


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
    directory: str = "",
) -> KuaiRand:
    """Reads the logs, and the features of the users and videos that occur in them.

    Args:
      path: the folder with the files, or the one above its `data`.
      variant: one of `VARIANTS`.
      max_users: users to keep, drawn from `user_features`; 0 keeps all.
      seed: of that draw.
      author_rows: rows that authors are hashed into.
      music_rows: rows that music is hashed into.
      directory: see `open_tables`.

    Raises:
      UserError: a file is missing, lacks a column or any row, or holds text that cannot be read.
        Names of files, columns and the absence of rows are checked before anything is read.
    """
    files = find_variant_files(path, variant)
    with open_tables(directory) as engine:
        users = _rows(engine, files.users, _USER)
        log = _typed_log(_rows(engine, files.logs, _LOG))
        if max_users:
            ids = np.unique(engine.fetch(users.select("user_id"))["user_id"].to_numpy())
            size = min(max_users, len(ids))
            kept = np.random.default_rng(seed).choice(ids.astype(np.int64), size, replace=False)
            kept_users = engine.put("kept_users", pa.table({"user_id": kept}))
            log = log.semi_join(kept_users, "user_id")
        user_ids = engine.keep("user_ids", numbered(log.select("user_id").distinct(), "user_id"))
        video_ids = engine.keep(
            "video_ids", numbered(log.select("video_id").distinct(), "video_id")
        )
        return KuaiRand(
            _impressions(engine, log, user_ids, video_ids),
            _users(engine, users, user_ids),
            _videos(
                engine, _rows(engine, files.videos, _VIDEO), video_ids, author_rows, music_rows
            ),
        )


def find_variant_files(path: str | Path, variant: str) -> Files:
    """Finds the files of a variant, and checks that each has its columns and a row at least.

    Raises:
      UserError: see `read_kuairand`.
    """
    directory = _directory(Path(path), variant)
    parts = {stem: _parts(directory, stem, variant) for stem in _STEMS}
    logs = tuple(file for stem in (*_STANDARD, _RANDOM) for file in parts[stem])
    for files, fields in ((logs, _LOG), (parts[_USERS], _USER), (parts[_VIDEOS], _VIDEO)):
        for file in files:
            column_names(file, fields)
            with file.open("rb") as lines:
                lines.readline()
                if not lines.readline().strip():
                    raise UserError(f"{file} has no rows; unpack the archive of {ARCHIVE} again")
    return Files(logs, parts[_USERS], parts[_VIDEOS])


def _rows(engine: Engine, files: Sequence[Path], fields: Mapping[str, Field]) -> ir.Table:
    """The rows of some files, with `file` and `line`, where they stand."""
    tables = [read_text(engine, file, fields).rows for file in files]
    return ibis.union(*(table.mutate(file=number) for number, table in enumerate(tables)))


def _typed_log(rows: ir.Table) -> ir.Table:
    """The rows with `time`, `signals` and `tab`, as `Impressions` has them."""
    flags = (*COLUMN_OF_TASK.values(), "is_rand")
    done = [ibis.coalesce(rows[flag], 0).cast("int32") << bit for bit, flag in enumerate(flags)]
    return rows.select(
        *("user_id", "video_id", "file", "line"),
        time=(rows.time_ms // 1000).cast("int32"),
        signals=sum(done[1:], done[0]).cast("uint8"),
        tab=ibis.coalesce(rows.tab, -1).cast("int8"),
    )


def _impressions(
    engine: Engine, log: ir.Table, user_ids: ir.Table, video_ids: ir.Table
) -> Impressions:
    """The log with consecutive ids, in its order."""
    placed = log.join(user_ids.select("user_id", user=user_ids.id.cast("int32")), "user_id")
    placed = placed.join(video_ids.select("video_id", item=video_ids.id.cast("int32")), "video_id")
    placed = placed.order_by("user", "time", "file", "line")
    names = [field.name for field in dataclasses.fields(Impressions)]
    columns = engine.fetch(placed.select(*names))
    return Impressions(**{name: columns[name].to_numpy() for name in names})


def _users(engine: Engine, rows: ir.Table, user_ids: ir.Table) -> Users:
    """The users that occur; the last row of each counts."""
    table = engine.fetch(
        rows.left_join(user_ids.select("user_id", "id"), "user_id").order_by("file", "line")
    )
    numbers, flags = (np.stack([_floats(table, name) for name in names], axis=1)
                      for names in (_USER_NUMBERS, _USER_FLAGS))  # fmt: skip
    # A code other than 1, such as -124, is not a yes.
    features = np.concatenate([np.log1p(np.maximum(np.nan_to_num(numbers), 0)) / 5, flags == 1], 1)
    codes, sizes = zip(*(_codes(table[name]) for name in USER_CATEGORIES), strict=True)
    occurs, place = _occurring(table)
    users = Users(
        np.zeros((engine.count(user_ids), features.shape[1]), np.float32),
        np.full((engine.count(user_ids), len(codes)), NO_CATEGORY, np.int32),
        sizes,
    )
    users.features[place] = features[occurs]
    users.category[place] = np.stack(codes, axis=1)[occurs]
    return users


def _videos(
    engine: Engine, rows: ir.Table, video_ids: ir.Table, author_rows: int, music_rows: int
) -> Videos:
    """The videos that occur; the last row of each counts."""
    # When the day begins in Beijing; none for what is no date like 2022-04-10.
    uploaded = rows.upload_dt.try_cast("timestamp").epoch_seconds().cast("int64") - BEIJING
    uploaded = ibis.ifelse((uploaded > 0) & (uploaded < 2**31), uploaded, NO_TIME)
    rows = rows.mutate(uploaded=ibis.coalesce(uploaded, NO_TIME))
    table = engine.fetch(
        rows.join(video_ids.select("video_id", "id"), "video_id").order_by("file", "line")
    )
    _, place = _occurring(table)
    coded = [_codes(table[name]) for name in VIDEO_CATEGORIES]
    tags, number_of_tags = _bags(table["tag"])
    duration, width, height, author, music = (_floats(table, name) for name in _VIDEO_NUMBERS)
    items = engine.count(video_ids)
    videos = Videos(
        seconds=np.full(items, np.nan, np.float32),
        shape=np.full(items, np.nan, np.float32),
        upload_time=np.full(items, NO_TIME, np.int32),
        category=np.full((items, 2 + len(coded) + TAGS), NO_CATEGORY, np.int32),
        sizes=(
            max(author_rows, 1),
            max(music_rows, 1),
            *(size for _, size in coded),
            number_of_tags,
        ),
    )
    videos.seconds[place] = _positive(duration) / 1000
    videos.shape[place] = np.log(_positive(height) / _positive(width))
    videos.upload_time[place] = table["uploaded"].to_numpy()
    hashed = [hash_rows(author, author_rows), hash_rows(music, music_rows)]
    videos.category[place] = np.column_stack([*hashed, *(codes for codes, _ in coded), tags])
    return videos


def _occurring(table: pa.Table) -> tuple[Bool[np.ndarray, "rows"], Int64[np.ndarray, "known"]]:
    """True for each row whose `id` is known, and these ids."""
    ids = _floats(table, "id")
    return ~np.isnan(ids), ids[~np.isnan(ids)].astype(np.int64)


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


def _floats(table: pa.Table, column: str) -> Float64[np.ndarray, "n"]:
    """The column's numbers, NaN for an empty cell."""
    return table[column].cast(pa.float64()).fill_null(float("nan")).to_numpy()


def _positive(numbers: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    return np.where(numbers > 0, numbers, np.nan)


def _codes(texts: Any) -> tuple[Int32[np.ndarray, "n"], int]:
    """The place of each text among those that occur, in their order, and the number of these."""
    encoded = texts.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(NO_CATEGORY).to_numpy(zero_copy_only=False)
    return codes, max(len(encoded.dictionary), 1)


def _bags(texts: Any) -> tuple[Int32[np.ndarray, "n TAGS"], int]:
    """The places of the tags in each text, like `12,65`, and the number of tags.

    Those behind the last are NO_CATEGORY.
    """
    encoded = texts.combine_chunks().dictionary_encode()
    vocabulary: dict[str, int] = {}
    rows = []
    for text in encoded.dictionary.to_pylist():
        tags = list(dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip()))[:TAGS]
        codes = [vocabulary.setdefault(tag, len(vocabulary)) for tag in tags]
        rows.append(codes + [NO_CATEGORY] * (TAGS - len(codes)))
    # An empty text has the place behind the last.
    places = encoded.indices.fill_null(len(rows)).to_numpy(zero_copy_only=False)
    bags = np.array([*rows, [NO_CATEGORY] * TAGS], np.int32)[places]
    return bags, max(len(vocabulary), 1)
