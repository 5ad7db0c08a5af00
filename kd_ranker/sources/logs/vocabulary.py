"""Writes the id that each user, item and value of the log got."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from kd_ranker.sources.logs.encode import Encoding
from kd_ranker.sources.searching import look_up

VOCABULARIES_FOLDER = "vocabularies"


def write_vocabularies(
    encoding: Encoding, texts: Iterable[Mapping[str, str]], folder: Path
) -> None:
    """Writes `user.parquet`, `item.parquet` and `feature-<name>.parquet`.

    Each has the columns `value`, as in the log, and `id`: in [0, num_users) and [0, num_items);
    that of a feature is its category id. Hashed features have no file, nor is there an entry for
    the values that share a feature's first category id: rare, unheard-of and missing ones.

    Args:
      encoding: the ids.
      texts: files with the texts of columns, see `partition.Partitioned`.
      folder: to write to.
    """
    folder.mkdir()
    files = list(texts)
    starts = {
        f"feature:{category.name}": start
        for category, start in zip(
            encoding.spec.categories, encoding.spec.category_starts, strict=True
        )
    }
    for name, vocabulary in encoding.vocabularies.items():
        paths = [of_part[name] for of_part in files if name in of_part]
        key, number = np.asarray(vocabulary.key), np.asarray(vocabulary.number)
        value = _texts(key, paths) if paths else pa.array(key)
        order = pa.array(np.argsort(number))
        table = pa.table({"value": value, "id": number + np.int32(starts.get(name, 0))})
        file = "".join(c if c.isalnum() or c in "_.-" else "-" for c in name)
        pq.write_table(table.take(order), folder / f"{file}.parquet")


def _texts(key: Int64[np.ndarray, "known"], paths: Iterable[str]) -> pa.Array:
    """The text of each key, gathered from files that hold all of them."""
    place = np.full(len(key), -1)
    parts: list[pa.Array] = []
    held = 0
    for path in paths:
        with pa.OSFile(path) as file:
            table = pa.ipc.open_file(file).read_all()
        index, known = look_up(key, table["key"].to_numpy())
        fresh = np.flatnonzero(known & (place[index] < 0))
        place[index[fresh]] = held + np.arange(len(fresh))
        held += len(fresh)
        parts += table["text"].take(pa.array(fresh)).chunks
    return pa.chunked_array(parts).take(pa.array(place))
