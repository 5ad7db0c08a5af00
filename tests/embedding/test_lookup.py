import jax
import jax.numpy as jnp
import numpy as np

from kd_ranker.embedding.lookup import (
    gather,
    gradients_of_table,
    ids_of_table,
    init_tables,
)
from kd_ranker.models.teacher import FinalRanker
from tests.batches import SPEC, random_batch

WIDTH = 4


def test_gradients_of_gathered_rows_add_up_to_the_table_gradient():
    """The path that the step takes, against differentiating with respect to the whole table."""
    batch = random_batch(0)
    lookups = FinalRanker.lookups
    tables = init_tables(
        {"user": SPEC.num_users, "item": SPEC.num_items}, WIDTH, 1.0, jax.random.key(0)
    )
    mask = {"user": None, "item": batch.candidate_mask, "history": batch.history_mask}

    def loss_of_rows(rows):
        return sum(
            jnp.sum(jnp.sin(row) * (1.0 if mask[name] is None else mask[name][..., None]))
            for name, row in rows.items()
        )

    row_gradients = jax.grad(loss_of_rows)(gather(tables, lookups, batch))
    dense = jax.grad(lambda tables: loss_of_rows(gather(tables, lookups, batch)))(tables)
    for name, table in tables.items():
        ids = ids_of_table(lookups, batch, name, len(table))
        (gradients,) = gradients_of_table(
            jax.tree.map(lambda leaf: leaf[None], row_gradients), lookups, name
        )
        total = np.zeros((len(table) + 1, WIDTH), np.float32)
        np.add.at(total, np.asarray(ids), np.asarray(gradients))
        np.testing.assert_allclose(total[:-1], dense[name], atol=1e-5)


def test_padding_is_not_touched():
    batch = random_batch(1)
    ids = ids_of_table(FinalRanker.lookups, batch, "item", SPEC.num_items)
    expected = np.concatenate(
        [batch.item_id[np.asarray(batch.candidate_mask)], batch.history_id[batch.history_mask]]
    )
    ids = np.asarray(ids)
    np.testing.assert_array_equal(np.sort(ids[ids < SPEC.num_items]), np.sort(expected))
    # Masked ids become one past the end, which an update drops.
    assert ids.max() == SPEC.num_items
