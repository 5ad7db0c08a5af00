"""Lookups: the rows of the tables that a batch needs, and the reading of them.

A model never holds a table. It names its lookups; the step gathers the rows and hands them over as
arrays, so gradients are taken with respect to the gathered rows and never to a whole table.

A table is one array [rows, W]. A row of it holds side by side all that training keeps of an id:

    embedding (D) | number of its updates (1) | slots of the optimiser (W - D - 1)

so that it is fetched from memory once a step and written back once. The row behind those of the ids
is reserved for ids that have none of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kd_ranker.batch import WHOLE, CandidateBatch, Deal, Items
from kd_ranker.embedding.deal import length_of_share, read

Tables = dict[str, Float[Array, "rows W"]]
Rows = dict[str, Float[Array, "... W"]]

# A TPU lays rows out so many at a time. Where they fill that up, the tables of several members side
# by side are one long table, without a copy.
_ROWS_TOGETHER = 8
# The rows that are drawn at a time, so that a large table needs no memory beside its own.
_BLOCK = 1 << 16


class Lookup(NamedTuple):
    """One use of a table. Two may share one: candidates and history both read the item table.

    Attributes:
      table: its name.
      ids: (batch, items) -> ids of any shape.
      mask: (batch, items) -> bool of the same shape, False where an id only fills up space.
    """

    table: str
    ids: Callable[[CandidateBatch, Items], Int[Array, "..."]]
    mask: Callable[[CandidateBatch, Items], Bool[Array, "..."]]


class TableSpec(NamedTuple):
    """The way from ids to their rows.

    Attributes:
      size: the number of rows beside the reserved one.
      hashed: False gives each id in [0, size) a row of its own, and every other id the reserved
        one; True spreads all ids over the rows, where some will share one.
    """

    size: int
    hashed: bool

    @property
    def rows(self) -> int:
        """The length of the table; nothing uses what is behind the reserved row."""
        return -(-(self.size + 1) // _ROWS_TOGETHER) * _ROWS_TOGETHER


class EmbeddingSpec(NamedTuple):
    """The fixed part of a model's embeddings.

    Attributes:
      width: D.
      tables: by name.
      lookups: by name.
      deal: the way in which the rows of the tables are dealt to devices.
    """

    width: int
    tables: Mapping[str, TableSpec]
    lookups: Mapping[str, Lookup]
    deal: Deal = WHOLE


def init_table(
    table: TableSpec, width: int, slots: int, scale: float, key: PRNGKeyArray, deal: Deal = WHOLE
) -> Float[Array, "rows W"]:
    """A table of normal embeddings that were never updated; that of the reserved row is 0.

    Args:
      table: its rows.
      width: D, the length of an embedding.
      slots: the number of values that the optimiser keeps beside it, all 0 at first.
      scale: standard deviation of the entries.
      key: all randomness comes from it.
      deal: the way in which the rows are dealt; several devices each make their own, of the same
        bits, within a function that is mapped over them.

    Returns:
      float32 [rows, D + 1 + slots], the rows of this device.
    """
    block, length = min(_BLOCK, table.size), length_of_share(table.rows, deal.devices)

    def draw(index: Int[Array, ""], rows: Float[Array, "rows W"]) -> Float[Array, "rows W"]:
        drawn = scale * jax.random.normal(jax.random.fold_in(key, index), (block, width))
        # The last block reaches back over the one before it.
        start = jnp.minimum(index * block, table.size - block)
        if deal.devices == 1:
            return jax.lax.dynamic_update_slice(rows, drawn, (start, 0))
        row = start + jnp.arange(block)
        mine = row % deal.devices == jax.lax.axis_index(deal.axis)
        place = jnp.where(mine, row // deal.devices, length)
        return rows.at[place, :width].set(drawn, mode="drop", unique_indices=True)

    rows = jnp.zeros((length, width + 1 + slots))
    return jax.lax.fori_loop(0, -(-table.size // block), draw, rows)


def rows_of_ids(table: TableSpec, ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """The row of each id.

    The hash is the finaliser of MurmurHash3 (Appleby, 2011), of which every input bit changes every
    output bit with a probability of about one half.

    >>> rows_of_ids(TableSpec(size=5, hashed=False), jnp.array([0, 4, 5, -1])).tolist()
    [0, 4, 5, 5]
    """
    if not table.hashed:
        return jnp.where(is_known(table, ids), ids, table.size)
    bits = ids.astype(jnp.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits, size = bits ^ (bits >> 16), jnp.uint32(table.size)
    # bits % size, of the operations that ONNX's converter knows.
    return (bits - jax.lax.div(bits, size) * size).astype(ids.dtype)


def is_known(table: TableSpec, ids: Int[Array, "..."]) -> Bool[Array, "..."]:
    """False for an id that has to share the reserved row."""
    return jnp.full(ids.shape, True) if table.hashed else (ids >= 0) & (ids < table.size)


def gather_rows(
    spec: EmbeddingSpec,
    tables: Tables,
    batch: CandidateBatch,
    items: Items,
    *,
    whole_rows: bool,
    member: Int[Array, ""] | None = None,
) -> Rows:
    """The rows that a batch needs.

    Args:
      spec: the lookups.
      tables: of one model; or with `member`, of all members of a group.
      batch: what is looked up.
      items: what is known of the items.
      whole_rows: whether to keep what training keeps beside the embeddings.
      member: whose rows to read. A `vmap` over the tables would ask a TPU for another layout.

    Returns:
      Lookup name -> float32 [*shape of the ids, W], or [*shape of the ids, D] of the embeddings
      alone if not `whole_rows`.
    """
    gathered = {}
    for name, lookup in spec.lookups.items():
        table, row = tables[lookup.table], _rows(spec, lookup, batch, items)
        first: Any = 0
        if member is not None:
            first = member * table.shape[1]
            table = table.reshape(-1, table.shape[2])
        columns = slice(None if whole_rows else spec.width)
        gathered[name] = read(spec.deal, table, row, columns, first)
    return gathered


def embeddings(spec: EmbeddingSpec, rows: Rows) -> Rows:
    """The embeddings of gathered rows: lookup name -> [*shape of the ids, D]."""
    return {name: row[..., : spec.width] for name, row in rows.items()}


def gather_to_serve(
    spec: EmbeddingSpec, tables: Tables, batch: CandidateBatch, items: Items
) -> Rows:
    """The embeddings that a trained model serves with, the reserved one for an id never trained.

    The own row of such an id was drawn at random and says nothing of it.

    Returns:
      Lookup name -> float32 [*shape of the ids, D].
    """
    served = {}
    trained = was_trained(spec, tables, batch, items)
    for name, lookup in spec.lookups.items():
        reserved = spec.tables[lookup.table].size
        row = jnp.where(trained[name], _rows(spec, lookup, batch, items), reserved)
        served[name] = read(spec.deal, tables[lookup.table], row, slice(spec.width))
    return served


def without_slots(spec: EmbeddingSpec, tables: Tables, lanes: int = 1) -> Tables:
    """The tables as far as serving needs them, [rows, D + 1].

    Where a device lays out whole `lanes` of numbers, slots stay in what it would only pad.
    """
    columns = -(-(spec.width + 1) // lanes) * lanes
    return {name: table[:, :columns] for name, table in tables.items()}


def was_trained(
    spec: EmbeddingSpec, tables: Tables, batch: CandidateBatch, items: Items
) -> dict[str, Bool[Array, "..."]]:
    """By lookup name, True for each id that has a row of its own which training has updated."""
    trained = {}
    for name, lookup in spec.lookups.items():
        row = _rows(spec, lookup, batch, items)
        count = slice(spec.width, spec.width + 1)
        updates = read(spec.deal, tables[lookup.table], row, count)[..., 0]
        known = is_known(spec.tables[lookup.table], lookup.ids(batch, items))
        trained[name] = known & (updates > 0)
    return trained


def _rows(
    spec: EmbeddingSpec, lookup: Lookup, batch: CandidateBatch, items: Items
) -> Int[Array, "..."]:
    return rows_of_ids(spec.tables[lookup.table], lookup.ids(batch, items))


def ids_of_table(
    spec: EmbeddingSpec, batch: CandidateBatch, items: Items, name: str
) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
    """All ids that a batch looks up in one table, in the order of the lookups, and their mask.

    Returns:
      int32 [M], duplicates included, where M counts the ids of all lookups of the table, and bool
      [M], False where an id only fills up space.
    """
    ids, masks = [], []
    for lookup in spec.lookups.values():
        if lookup.table == name:
            ids.append(lookup.ids(batch, items).reshape(-1))
            masks.append(lookup.mask(batch, items).reshape(-1))
    return jnp.concatenate(ids), jnp.concatenate(masks)


def rows_of_table(spec: EmbeddingSpec, rows: Rows, name: str) -> Float[Array, "members M W"]:
    """Each member's rows, or their gradients, of each id of `ids_of_table`, in the same order.

    `rows` holds, by lookup name, [members, *shape of ids, W].
    """
    return jnp.concatenate(
        [
            rows[lookup_name].reshape(rows[lookup_name].shape[0], -1, rows[lookup_name].shape[-1])
            for lookup_name, lookup in spec.lookups.items()
            if lookup.table == name
        ],
        axis=1,
    )
