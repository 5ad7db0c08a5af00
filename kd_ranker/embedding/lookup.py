"""Lookups: the table rows that a batch needs, and functions to read them.

A model never holds a table. It names its lookups. The step gathers the rows and passes them as
arrays, so gradients are taken with respect to the gathered rows and never to a whole table.

A table is one array [rows, W]. A row contains all values that training keeps for an id:

    embedding (D) | number of its updates (1) | slots of the optimizer (W - D - 1)

so that each step fetches it from memory once and writes it back once. The row after those of the
ids is reserved for ids without their own row.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from kd_ranker.batch import WHOLE, CandidateBatch, Items, RowSharding
from kd_ranker.embedding import cpu_rows
from kd_ranker.embedding.row_sharding import read, rows_per_device

Tables = dict[str, Float[Array, "rows W"]]
Rows = dict[str, Float[Array, "... W"]]

# The number of rows that a TPU lays out together. If it divides the length of a table, the adjacent
# tables of several runs form one long table, without a copy.
_ROWS_TOGETHER = 8
# The number of rows drawn at a time, so that a large table needs little additional memory.
_BLOCK = 1 << 16


class Lookup(NamedTuple):
    """One use of a table. Two may share one: candidates and history both read the item table."""

    table: str
    ids: Callable[[CandidateBatch, Items], Int[Array, "*shape"]]
    mask: Callable[[CandidateBatch, Items], Bool[Array, "*shape"]]  # False on padding


class TableSpec(NamedTuple):
    """The mapping from ids to rows.

    Each id in [0, size) has its own row, and every other id has the reserved row. If `hashed`, all
    ids are spread over the rows, so some ids share a row.
    """

    size: int  # the number of rows, without the reserved one
    hashed: bool

    @property
    def rows(self) -> int:
        """The length of the table; the rows after the reserved one are unused."""
        return -(-(self.size + 1) // _ROWS_TOGETHER) * _ROWS_TOGETHER


class EmbeddingSpec(NamedTuple):
    """The fixed part of a model's embeddings: their width D, their tables, and who reads them."""

    width: int
    tables: Mapping[str, TableSpec]
    lookups: Mapping[str, Lookup]
    row_sharding: RowSharding = WHOLE


def init_table(
    table: TableSpec,
    width: int,
    slots: int,
    scale: float,
    key: PRNGKeyArray,
    row_sharding: RowSharding = WHOLE,
) -> Float[Array, "rows W"]:
    """Return a table of normal embeddings without updates; that of the reserved row is 0.

    A row has `width` entries, of standard deviation `scale`, the number of its updates, and
    `slots` optimizer values, which are 0 as well. Several devices call this in a mapped function:
    each gets its rows by `row_sharding`, with the same bits for any of them.
    """
    block = min(_BLOCK, table.size)
    length = rows_per_device(table.rows, row_sharding.devices)

    def draw(index: Int[Array, ""], rows: Float[Array, "rows W"]) -> Float[Array, "rows W"]:
        drawn = scale * jax.random.normal(jax.random.fold_in(key, index), (block, width))
        # The last block reaches back over the one before it.
        start = jnp.minimum(index * block, table.size - block)
        if row_sharding.devices == 1:
            return jax.lax.dynamic_update_slice(rows, drawn, (start, 0))
        row = start + jnp.arange(block)
        is_on_device = row % row_sharding.devices == jax.lax.axis_index(row_sharding.axis)
        place = jnp.where(is_on_device, row // row_sharding.devices, length)
        return rows.at[place, :width].set(drawn, mode="drop", unique_indices=True)

    rows = jnp.zeros((length, width + 1 + slots))
    return jax.lax.fori_loop(0, -(-table.size // block), draw, rows)


def rows_of_ids(table: TableSpec, ids: Int[Array, "..."]) -> Int[Array, "..."]:
    """Return the row of each id.

    The hash is the finaliser of MurmurHash3 (Appleby, 2011): every input bit changes every output
    bit with a probability of about one half.

    >>> rows_of_ids(TableSpec(size=5, hashed=False), jnp.array([0, 4, 5, -1])).tolist()
    [0, 4, 5, 5]
    """
    if not table.hashed:
        return jnp.where(is_known(table, ids), ids, table.size)
    bits = ids.astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    size = jnp.uint32(table.size)
    # bits % size, with operations that ONNX's converter supports.
    return (bits - jax.lax.div(bits, size) * size).astype(ids.dtype)


def is_known(table: TableSpec, ids: Int[Array, "..."]) -> Bool[Array, "..."]:
    """Return False for an id that shares the reserved row."""
    if table.hashed:
        return jnp.full(ids.shape, True)
    return (ids >= 0) & (ids < table.size)


def gather_rows(spec: EmbeddingSpec, tables: Tables, batch: CandidateBatch, items: Items) -> Rows:
    """Return the embeddings that a batch needs: lookup name -> float32 [*shape of the ids, D]."""
    return {
        name: read(
            spec.row_sharding,
            tables[lookup.table],
            row_numbers(spec, lookup, batch, items),
            slice(spec.width),
        )
        for name, lookup in spec.lookups.items()
    }


def gather_rows_of_runs(
    spec: EmbeddingSpec,
    tables: dict[str, Float[Array, "runs rows W"]],
    batch: CandidateBatch,
    items: Items,
) -> Rows:
    """Return the embeddings of each run: lookup name -> float32 [runs, *shape of the ids, D]."""
    gathered = {}
    for name, lookup in spec.lookups.items():
        row = row_numbers(spec, lookup, batch, items)
        flat = gather_from_runs(spec, tables[lookup.table], row.reshape(-1))
        gathered[name] = flat.reshape(-1, *row.shape, spec.width)
    return gathered


def gather_from_runs(
    spec: EmbeddingSpec, tables: Float[Array, "runs rows W"], row: Int[Array, "M"]
) -> Float[Array, "runs M D"]:
    """Return the embeddings in these rows of each run's table."""
    runs, length, columns = tables.shape

    # One long table: on TPUs, a `vmap` over tables would need another layout.
    def by_xla(
        tables: Float[Array, "runs rows W"], row: Int[Array, "M"]
    ) -> Float[Array, "runs M D"]:
        flat = tables.reshape(-1, columns)
        starts = length * jnp.arange(runs)
        return jax.vmap(lambda start: read(spec.row_sharding, flat, row, slice(spec.width), start))(
            starts
        )

    if spec.row_sharding.devices > 1 or not cpu_rows.are_available():
        return by_xla(tables, row)
    on_cpu = functools.partial(cpu_rows.gather, width=spec.width)
    return jax.lax.platform_dependent(tables, row, cpu=on_cpu, default=by_xla)


def gather_to_serve(
    spec: EmbeddingSpec, tables: Tables, batch: CandidateBatch, items: Items
) -> Rows:
    """Return the embeddings to serve with: lookup name -> float32 [*shape of the ids, D].

    An id that was never trained gets the reserved row: its own was drawn at random.
    """
    served = {}
    trained = was_trained(spec, tables, batch, items)
    for name, lookup in spec.lookups.items():
        reserved = spec.tables[lookup.table].size
        row = jnp.where(trained[name], row_numbers(spec, lookup, batch, items), reserved)
        served[name] = read(spec.row_sharding, tables[lookup.table], row, slice(spec.width))
    return served


def without_slots(spec: EmbeddingSpec, tables: Tables, lanes: int = 1) -> Tables:
    """Return the columns of the tables that serving needs, [..., rows, D + 1].

    If a device lays out numbers in whole `lanes`, slots stay in columns that would be padding.
    """
    columns = -(-(spec.width + 1) // lanes) * lanes
    return {name: table[..., :columns] for name, table in tables.items()}


def was_trained(
    spec: EmbeddingSpec, tables: Tables, batch: CandidateBatch, items: Items
) -> dict[str, Bool[Array, "..."]]:
    """Return, by lookup name, True for each id with its own row that training has updated."""
    trained = {}
    for name, lookup in spec.lookups.items():
        row = row_numbers(spec, lookup, batch, items)
        count = slice(spec.width, spec.width + 1)
        updates = read(spec.row_sharding, tables[lookup.table], row, count)[..., 0]
        known = is_known(spec.tables[lookup.table], lookup.ids(batch, items))
        trained[name] = known & (updates > 0)
    return trained


def row_numbers(
    spec: EmbeddingSpec, lookup: Lookup, batch: CandidateBatch, items: Items
) -> Int[Array, "..."]:
    """Return the row of each id that a lookup reads, in the shape of the ids."""
    return rows_of_ids(spec.tables[lookup.table], lookup.ids(batch, items))


def ids_of_table(
    spec: EmbeddingSpec, batch: CandidateBatch, items: Items, name: str
) -> tuple[Int[Array, "M"], Bool[Array, "M"]]:
    """Return the M ids that all lookups of a table read; the mask is False on padding."""
    lookups = [lookup for lookup in spec.lookups.values() if lookup.table == name]
    ids = [lookup.ids(batch, items).reshape(-1) for lookup in lookups]
    masks = [lookup.mask(batch, items).reshape(-1) for lookup in lookups]
    return jnp.concatenate(ids), jnp.concatenate(masks)


def rows_of_table(spec: EmbeddingSpec, rows: Rows, name: str) -> Float[Array, "runs M W"]:
    """Return each run's rows, or gradients, for the ids of `ids_of_table`, in that order.

    `rows` contains, by lookup name, [runs, *shape of ids, W].
    """
    flat = []
    for lookup_name, lookup in spec.lookups.items():
        if lookup.table == name:
            values = rows[lookup_name]
            flat.append(values.reshape(values.shape[0], -1, values.shape[-1]))
    return jnp.concatenate(flat, axis=1)
