import functools

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.embedding.row_optimizers import (
    ADAGRAD_EPSILON,
    ADAM_B1,
    ADAM_B2,
    ADAM_EPSILON,
    ROW_OPTIMIZERS,
    find_occurrences,
    update_tables,
)

ROWS, WIDTH = 6, 3


@functools.partial(jax.jit, static_argnums=0)
def update_one(optimizer, table, slots, ids, gradients, rate, decay):
    """`update_tables` of one member."""
    table, slots = update_tables(
        optimizer,
        table[None],
        jax.tree.map(lambda slot: slot[None], slots),
        find_occurrences(ids, table.shape[0]),
        gradients[None],
        jnp.full(1, rate),
        jnp.full(1, decay),
        jnp.ones(1, bool),
    )
    return table[0], jax.tree.map(lambda slot: slot[0], slots)


@given(ids=arrays.arrays(np.int32, st.integers(1, 12), elements=st.integers(0, ROWS)))
@settings(max_examples=50, deadline=None)
def test_occurrences_are_those_that_numpy_finds(ids):
    order, segment, distinct = map(np.asarray, find_occurrences(jnp.asarray(ids), ROWS))
    expected, inverse = np.unique(ids, return_inverse=True)
    np.testing.assert_array_equal(distinct[: len(expected)], expected)
    np.testing.assert_array_equal(distinct[len(expected) :], ROWS)
    np.testing.assert_array_equal(np.sort(order), np.arange(len(ids)))
    np.testing.assert_array_equal(segment, inverse[order])


def dense_update(name, table, slots, gradient, touched, rate, decay):
    """A dense restatement, one row at a time: rows that are not touched keep everything."""
    table, slots = table.copy(), {key: slot.copy() for key, slot in slots.items()}
    for row in touched:
        if name == "sgd":
            step = gradient[row]
        elif name == "adagrad":
            slots["square_sum"][row] += np.mean(gradient[row] ** 2)
            step = gradient[row] / np.sqrt(slots["square_sum"][row] + ADAGRAD_EPSILON)
        else:
            slots["count"][row] += 1
            mean = slots["mean"][row] = ADAM_B1 * slots["mean"][row] + (1 - ADAM_B1) * gradient[row]
            square = slots["square"][row] = (
                ADAM_B2 * slots["square"][row] + (1 - ADAM_B2) * gradient[row] ** 2
            )
            mean = mean / (1 - ADAM_B1 ** slots["count"][row])
            square = square / (1 - ADAM_B2 ** slots["count"][row])
            step = mean / (np.sqrt(square) + ADAM_EPSILON)
        table[row] -= rate * (step + decay * table[row])
    return table, slots


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_sparse_updates_are_the_dense_ones_on_touched_rows(name, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    optimizer = ROW_OPTIMIZERS[name]
    table = generator.normal(size=(ROWS, WIDTH)).astype(np.float32)
    slots = optimizer.init(jnp.asarray(table))
    expected, expected_slots = table.copy(), jax.tree.map(np.array, slots)
    actual = jnp.asarray(table)
    # Several updates, so that slots matter; ids may repeat, and `ROWS` is to be ignored.
    for _ in range(3):
        ids = generator.integers(0, ROWS + 1, 9).astype(np.int32)
        ids[data.draw(st.integers(1, 9)) :] = ROWS
        gradients = generator.normal(size=(len(ids), WIDTH)).astype(np.float32)
        dense = np.zeros((ROWS + 1, WIDTH))
        np.add.at(dense, ids, gradients)
        touched = np.setdiff1d(ids, [ROWS])
        expected, expected_slots = dense_update(
            name, expected, expected_slots, dense, touched, 0.1, 0.2
        )
        actual, slots = update_one(
            optimizer, actual, slots, jnp.asarray(ids), jnp.asarray(gradients), 0.1, 0.2
        )
    np.testing.assert_allclose(actual, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), slots, expected_slots)


def test_lazy_adam_is_optax_adam_for_a_row_in_every_batch():
    generator = np.random.default_rng(0)
    optimizer, dense_optimizer = ROW_OPTIMIZERS["adam"], optax.adam(0.01)
    table = jnp.asarray(generator.normal(size=(ROWS, WIDTH)), jnp.float32)
    dense, state, slots = table, dense_optimizer.init(table), optimizer.init(table)
    ids = jnp.arange(ROWS)
    for _ in range(10):
        gradient = jnp.asarray(generator.normal(size=(ROWS, WIDTH)), jnp.float32)
        step, state = dense_optimizer.update(gradient, state)
        dense = optax.apply_updates(dense, step)
        table, slots = update_one(optimizer, table, slots, ids, gradient, 0.01, 0.0)
    np.testing.assert_allclose(table, dense, atol=1e-6)


def test_a_row_that_is_not_touched_keeps_its_bits():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.float32)
    for optimizer in ROW_OPTIMIZERS.values():
        new, _ = update_one(
            optimizer,
            table,
            optimizer.init(table),
            jnp.array([2, 2]),
            jnp.ones((2, WIDTH)),
            0.1,
            0.1,
        )
        changed = np.flatnonzero(np.any(np.asarray(new) != np.asarray(table), axis=1))
        np.testing.assert_array_equal(changed, [2])


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_members_side_by_side_are_updated_as_each_alone(name):
    generator = np.random.default_rng(1)
    optimizer, members = ROW_OPTIMIZERS[name], 3
    ids = jnp.asarray(generator.integers(0, ROWS + 1, 8), jnp.int32)
    tables = jnp.asarray(generator.normal(size=(members, ROWS, WIDTH)), jnp.float32)
    slots = jax.vmap(optimizer.init)(tables)
    gradients = generator.normal(size=(members, 8, WIDTH)).astype(np.float32)
    # What touches a row of one member need not touch it of another.
    gradients[1, :4] = 0
    rates, decays = jnp.array([0.1, 0.2, 0.3]), jnp.array([0.0, 0.1, 0.2])
    may_change = jnp.array([True, True, False])
    new, new_slots = update_tables(
        optimizer, tables, slots, find_occurrences(ids, ROWS), jnp.asarray(gradients),
        rates, decays, may_change,
    )  # fmt: skip
    for member in range(members):
        own, own_slots = tables[member], jax.tree.map(lambda slot, m=member: slot[m], slots)
        if may_change[member]:
            own, own_slots = update_one(
                optimizer, own, own_slots, ids, jnp.asarray(gradients[member]),
                rates[member], decays[member],
            )  # fmt: skip
        np.testing.assert_array_equal(new[member], own)
        jax.tree.map(
            lambda slot, alone, m=member: np.testing.assert_array_equal(slot[m], alone),
            new_slots, own_slots,
        )  # fmt: skip


def test_a_gradient_of_zero_touches_nothing():
    table = jnp.ones((ROWS, WIDTH))
    gradients = jnp.zeros((3, WIDTH)).at[2].set(1.0)
    ids = jnp.array([1, 4, 4])
    for optimizer in ROW_OPTIMIZERS.values():
        new, _ = update_one(optimizer, table, optimizer.init(table), ids, gradients, 0.1, 0.1)
        changed = np.flatnonzero(np.any(np.asarray(new) != np.asarray(table), axis=1))
        np.testing.assert_array_equal(changed, [4])
