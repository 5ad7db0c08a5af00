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


def touched(
    gradients: Rows, lookups: Mapping[str, Lookup], batch: CandidateBatch, table: str, rows: int
) -> tuple[Int[Array, "M"], Float[Array, "M D"]]:
    """All ids of one table that a batch touched, with the gradient of each occurrence.

    Args:
      gradients: lookup name -> gradient with respect to the gathered rows.
      lookups: the model's lookups.
      batch: the batch that the rows were gathered for.
      table: the table's name.
      rows: its number of rows; an id that is masked out, or whose gradient is zero, becomes this,
        one past the end.

    Returns:
      ids int32 [M], duplicates included, and gradients float32 [M, D], where M counts the ids of
      all lookups of the table.
    """
    ids, row_gradients = [], []
    for name, lookup in lookups.items():
        if lookup.table != table:
            continue
        # A candidate that no label speaks of has no gradient, and must not move its row by decay or
        # by moments of old: else mode none would depend on how many such candidates fill a batch.
        spoken_of = jnp.any(gradients[name] != 0, axis=-1)
        if lookup.mask:
            spoken_of &= getattr(batch, lookup.mask)
        ids.append(jnp.where(spoken_of, getattr(batch, lookup.ids), rows).reshape(-1))
        row_gradients.append(gradients[name].reshape(-1, gradients[name].shape[-1]))
    return jnp.concatenate(ids), jnp.concatenate(row_gradients)
