"""Which rows of which table a batch needs, and the gathering of them.

A model never holds a table. It names its lookups; the step gathers the rows and hands them over as
arrays, so gradients are taken with respect to the gathered rows and never to a whole table.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kd_ranker.batch import CandidateBatch

Tables = dict[str, Float[Array, "rows D"]]
Rows = dict[str, Float[Array, "... D"]]


class Lookup(NamedTuple):
    """One use of a table: the rows of `table` at the ids in the batch's field `ids`.

    `mask` names the batch's attribute that is False where an id only fills up space; "" if every id
    counts. Two lookups may share a table: candidates and history both read the item table.
    """

    table: str
    ids: str
    mask: str


def init_tables(sizes: Mapping[str, int], width: int, scale: float, key: PRNGKeyArray) -> Tables:
    """Tables of normal entries.

    Args:
      sizes: table name -> number of rows.
      width: D, the length of a row.
      scale: standard deviation of the entries.
      key: a key; each table draws from a key of its own, in the order of `sizes`.

    Returns:
      Table name -> float32 [rows, D].
    """
    keys = jax.random.split(key, len(sizes))
    return {
        name: scale * jax.random.normal(table_key, (rows, width))
        for (name, rows), table_key in zip(sizes.items(), keys, strict=True)
    }


def gather(tables: Tables, lookups: Mapping[str, Lookup], batch: CandidateBatch) -> Rows:
    """The rows that a batch needs: lookup name -> float32 [*shape of the ids, D]."""
    return {
        name: tables[lookup.table][getattr(batch, lookup.ids)] for name, lookup in lookups.items()
    }


def ids_of_table(
    lookups: Mapping[str, Lookup], batch: CandidateBatch, table: str, rows: int
) -> Int[Array, "M"]:
    """All ids that a batch looks up in one table, in the order of the lookups.

    Args:
      lookups: the model's lookups.
      batch: the batch.
      table: the table's name.
      rows: its number of rows; an id that is masked out becomes this, one past the end.

    Returns:
      int32 [M], duplicates included, where M counts the ids of all lookups of the table.
    """
    ids = []
    for lookup in lookups.values():
        if lookup.table == table:
            found = getattr(batch, lookup.ids)
            if lookup.mask:
                found = jnp.where(getattr(batch, lookup.mask), found, rows)
            ids.append(found.reshape(-1))
    return jnp.concatenate(ids)


def gradients_of_table(
    gradients: Rows, lookups: Mapping[str, Lookup], table: str
) -> Float[Array, "members M D"]:
    """Each member's gradient of each id of `ids_of_table`, in the same order.

    `gradients` holds, by lookup name, the gradients of gathered rows: [members, *shape of ids, D].
    """
    return jnp.concatenate(
        [
            gradients[name].reshape(gradients[name].shape[0], -1, gradients[name].shape[-1])
            for name, lookup in lookups.items()
            if lookup.table == table
        ],
        axis=1,
    )
