"""The tables that an export's programs read: rows of ids, and one embedding per item.

Untrained ids are served with the reserved row. It is copied into their rows here, so that a program
only has to find the row of an id.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from kd_ranker.embedding.lookup import EmbeddingSpec
from kd_ranker.embedding.lookup import Tables as TrainedTables

Tables = dict[str, np.ndarray]

ITEM_EMBEDDING, ITEM_SCALE = "item_embedding", "item_scale"


def name_of(table: str) -> str:
    """Return the name of one of `EmbeddingSpec.tables` in an export."""
    return f"{table}_table"


def served(spec: EmbeddingSpec, trained: TrainedTables) -> Tables:
    """Return the rows that serve the ids of each table, float32 [size + 1, D].

    The last row is the reserved one.
    """
    tables = {}
    for name, table in spec.tables.items():
        rows = np.asarray(trained[name])[: table.size + 1]
        updates, reserved = rows[:, spec.width], rows[table.size, : spec.width]
        own = np.where(updates[:, None] > 0, rows[:, : spec.width], reserved)
        own[table.size] = reserved
        tables[name_of(name)] = own
    return tables


class ItemType(NamedTuple):
    """A storage format of item embeddings.

    Attributes:
      pack: float32 [rows, D] -> the stored arrays by name.
      unpack: (stored arrays, row numbers [R, N]) -> the embeddings, float32 [R, N, D].
    """

    pack: Callable[[Float32[np.ndarray, "rows D"]], Tables]
    unpack: Callable[[Mapping[str, Any], Int[Array, "R N"]], Float[Array, "R N D"]]


def _read(arrays: Mapping[str, Any], name: str, row: Int[Array, "R N"]) -> Any:
    read = jnp.asarray(arrays[name]).at[row].get(mode="promise_in_bounds")
    return read.astype(jnp.float32)


def _with_scales(embedding: Float32[np.ndarray, "rows D"]) -> Tables:
    """Quantize to integers in [-127, 127], with one factor per row that keeps its largest entry."""
    scale = np.abs(embedding).max(axis=1) / 127
    whole = np.round(embedding / np.where(scale > 0, scale, 1)[:, None])
    return {ITEM_EMBEDDING: whole.astype(np.int8), ITEM_SCALE: scale.astype(np.float32)}


def _plain(arrays: Mapping[str, Any], row: Int[Array, "R N"]) -> Float[Array, "R N D"]:
    return _read(arrays, ITEM_EMBEDDING, row)


ITEM_TYPES: dict[str, ItemType] = {
    "float32": ItemType(lambda embedding: {ITEM_EMBEDDING: embedding}, _plain),
    "bfloat16": ItemType(
        lambda embedding: {ITEM_EMBEDDING: embedding.astype(jnp.bfloat16)}, _plain
    ),
    "int8": ItemType(
        _with_scales,
        lambda arrays, row: _plain(arrays, row) * _read(arrays, ITEM_SCALE, row)[..., None],
    ),
}
"""The storage formats of item embeddings in an export."""
