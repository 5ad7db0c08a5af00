import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.batch import RowSharding
from kd_ranker.embedding.lookup import (
    TableSpec,
    gather_rows,
    gather_rows_of_runs,
    gather_to_serve,
    ids_of_table,
    init_table,
    is_known,
    rows_of_ids,
    rows_of_table,
    was_trained,
    without_slots,
)
from kd_ranker.embedding.row_sharding import from_shards
from kd_ranker.models.model import build_model
from kd_ranker.models.teacher import FinalRanker
from tests.random_batches import CATEGORY_SPEC, SPEC, TEACHER, random_batch, random_items

# All lookups that there are.
EMBEDDING = build_model(FinalRanker, CATEGORY_SPEC, 1, TEACHER)[0].embedding
WIDTH = EMBEDDING.width
ITEMS = random_items(spec=CATEGORY_SPEC)


def make_batch(seed):
    return random_batch(seed, spec=CATEGORY_SPEC)


def ids_and_masks(batch):
    """By lookup name, what it is to find in a batch."""
    candidates = batch.stage > 0
    events = batch.history_mask
    own = batch.candidate_category
    of_candidates = ITEMS.category[batch.item_id]
    of_events = ITEMS.category[batch.history_id]
    return {
        "user": (batch.user_id, np.full(batch.user_id.shape, True)),
        "item": (batch.item_id, candidates),
        "request_category": (batch.request_category, batch.request_category >= 0),
        "candidate_category": (own, (own >= 0) & candidates[..., None]),
        "item_category": (of_candidates, (of_candidates >= 0) & candidates[..., None]),
        "history": (batch.history_id, events),
        "history_category": (of_events, (of_events >= 0) & events[..., None]),
    }


LOOKUPS_OF_TABLE = {
    "user": ["user"],
    "item": ["item", "history"],
    "category": ["request_category", "candidate_category", "item_category", "history_category"],
}


@functools.cache
def make_tables(slots=0):
    def tables():
        return {
            name: init_table(table, WIDTH, slots, 1.0, jax.random.key(index))
            for index, (name, table) in enumerate(EMBEDDING.tables.items())
        }

    return jax.jit(tables)()  # in one program, not one an array


def test_rows_of_runs_are_those_of_each_run():
    batch, tables = make_batch(0), make_tables()
    of_runs = {name: jnp.stack([table, 2 * table]) for name, table in tables.items()}
    gathered = jax.jit(functools.partial(gather_rows_of_runs, EMBEDDING))(of_runs, batch, ITEMS)
    for name, rows in gather_rows(EMBEDDING, tables, batch, ITEMS).items():
        np.testing.assert_array_equal(gathered[name], jnp.stack([rows, 2 * rows]))


def test_gradients_of_gathered_rows_sum_to_the_tables():
    """The path that the step takes, against differentiating with respect to the whole table."""
    batch, tables = make_batch(0), make_tables()
    masks = {name: mask for name, (_, mask) in ids_and_masks(batch).items()}

    def gathered(tables):
        return gather_rows(EMBEDDING, tables, batch, ITEMS)

    def loss_of_rows(rows):
        return sum(jnp.sum(jnp.sin(row) * masks[name][..., None]) for name, row in rows.items())

    row_gradients = jax.jit(jax.grad(loss_of_rows))(gathered(tables))
    dense = jax.jit(jax.grad(lambda tables: loss_of_rows(gathered(tables))))(tables)
    for name, table in tables.items():
        ids, _ = ids_of_table(EMBEDDING, batch, ITEMS, name)
        (gradients,) = rows_of_table(
            EMBEDDING, jax.tree.map(lambda leaf: leaf[None], row_gradients), name
        )
        total = np.zeros(table.shape, np.float32)  # 0 for slots
        np.add.at(total[:, :WIDTH], np.asarray(ids), np.asarray(gradients))
        np.testing.assert_allclose(total, dense[name], atol=1e-5)


@pytest.mark.parametrize("table", LOOKUPS_OF_TABLE)
def test_padding_is_masked_in_the_order_of_the_ids(table):
    batch = make_batch(1)
    ids, mask = map(np.asarray, ids_of_table(EMBEDDING, batch, ITEMS, table))
    expected = [ids_and_masks(batch)[name] for name in LOOKUPS_OF_TABLE[table]]
    np.testing.assert_array_equal(ids, np.concatenate([ids.ravel() for ids, _ in expected]))
    np.testing.assert_array_equal(mask, np.concatenate([mask.ravel() for _, mask in expected]))
    assert (table == "user") == mask.all()


def test_an_unknown_id_gets_the_reserved_row_and_is_counted():
    table = TableSpec(size=5, hashed=False)
    ids = jnp.array([0, 4, 5, 6, -1, 2**31 - 1, -(2**31)])
    np.testing.assert_array_equal(rows_of_ids(table, ids), [0, 4, 5, 5, 5, 5, 5])
    np.testing.assert_array_equal(is_known(table, ids), [1, 1, 0, 0, 0, 0, 0])


def murmur_finaliser(number):
    number &= 0xFFFFFFFF
    number ^= number >> 16
    number = number * 0x85EBCA6B % 2**32
    number ^= number >> 13
    number = number * 0xC2B2AE35 % 2**32
    return number ^ number >> 16


def test_hashed_ids_take_the_row_of_their_hash():
    table = TableSpec(size=64, hashed=True)
    ids = np.concatenate([np.arange(640), [-1, -7, 2**31 - 1]])
    rows = np.asarray(rows_of_ids(table, jnp.asarray(ids)))
    np.testing.assert_array_equal(rows, [murmur_finaliser(int(i)) % 64 for i in ids])
    assert is_known(table, jnp.asarray(ids)).all()


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_fresh_table_is_normal_but_for_its_reserved_row(monkeypatch, size):
    # Several blocks, the last of which reaches back.
    monkeypatch.setattr("kd_ranker.embedding.lookup._BLOCK", 7)
    table = np.asarray(init_table(TableSpec(size, False), 50, 3, 0.5, jax.random.key(0)))
    # Rows are a multiple of 8, behind those of the ids and the reserved one.
    assert table.shape == ({1: 8, 5: 8, 100: 104}[size], 54)
    assert (table[:, 50:] == 0).all()
    assert (table[size:] == 0).all()
    drawn = table[:size, :50]
    assert len(np.unique(drawn, axis=0)) == size
    np.testing.assert_allclose(drawn.std(), 0.5, rtol=4 / np.sqrt(2 * drawn.size))
    np.testing.assert_allclose(drawn.mean(), 0, atol=4 * 0.5 / np.sqrt(drawn.size))


@pytest.mark.parametrize("size", [5, 100])
def test_devices_that_share_a_fresh_table_hold_the_same_rows(monkeypatch, size):
    monkeypatch.setattr("kd_ranker.embedding.lookup._BLOCK", 7)
    table, key = TableSpec(size, False), jax.random.key(0)
    whole = np.asarray(init_table(table, 4, 1, 0.5, key))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("d",))
    shards = jax.shard_map(
        lambda key: init_table(table, 4, 1, 0.5, key, RowSharding(3, "d")),
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec("d"),
        check_vma=False,
    )(key)

    rows = np.asarray(from_shards(np.asarray(shards), 0, 3))
    np.testing.assert_array_equal(rows[: len(whole)], whole)


def test_ids_not_met_in_training_are_served_the_reserved_row():
    batch = make_batch(0)
    tables = dict(make_tables(slots=2))
    trained = {
        "user": np.arange(5),
        "item": np.arange(0, SPEC.num_items, 2),
        "category": np.arange(0, CATEGORY_SPEC.num_categories, 3),
    }
    for name, table in tables.items():
        reserved = EMBEDDING.tables[name].size
        with_counts = table.at[trained[name], WIDTH].set(3.0)
        tables[name] = with_counts.at[reserved, :WIDTH].set(9.0)
    # One that is far out of range.
    batch.request_category[0, 0] = 10**6
    rows = gather_rows(EMBEDDING, tables, batch, ITEMS)
    served = gather_to_serve(EMBEDDING, tables, batch, ITEMS)
    for name, (ids, _) in ids_and_masks(batch).items():
        met = np.isin(ids, trained[EMBEDDING.lookups[name].table])
        np.testing.assert_array_equal(was_trained(EMBEDDING, tables, batch, ITEMS)[name], met)
        np.testing.assert_array_equal(served[name][met], rows[name][met])
        assert (np.asarray(served[name])[~met] == 9).all()
    slim = without_slots(EMBEDDING, tables)
    assert {table.shape[1] for table in slim.values()} == {WIDTH + 1}
    wider = without_slots(EMBEDDING, tables, lanes=WIDTH + 2)
    assert {table.shape[1] for table in wider.values()} == {WIDTH + 2}
    jax.tree.map(
        np.testing.assert_array_equal, gather_to_serve(EMBEDDING, slim, batch, ITEMS), served
    )
