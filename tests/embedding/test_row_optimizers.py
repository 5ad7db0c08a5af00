import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_ranker.embedding.row_optimizers import (
    ADAGRAD_EPSILON,
    ADAM,
    ROW_OPTIMIZERS,
    find_occurrences,
    one_minus_power,
    update_tables,
)

ROWS, WIDTH = 6, 3


def new_table(optimizer, embeddings):
    """A table with these embeddings and slots of zero."""
    return np.pad(embeddings, [(0, 0), (0, 1 + optimizer.slots(WIDTH))]).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def update_many(optimizer, tables, rows, mask, gradients, rates, decays, may_change):
    """`update_tables` of runs that share the ids."""
    # Whatever the owners hold must not matter.
    owner = jnp.full(tables.shape[1], 3, jnp.int32)
    occurrences, _ = find_occurrences(rows, mask, owner)
    return update_tables(optimizer, tables, occurrences, gradients, rates, decays, may_change)


def update_one(optimizer, table, rows, gradients, rate, decay, mask=None):
    """`update_tables` of one run."""
    mask = np.ones(len(rows), bool) if mask is None else mask
    table, rows = jnp.asarray(table), jnp.asarray(rows)
    numbers = (jnp.full(1, rate), jnp.full(1, decay), jnp.ones(1, bool))
    return update_many(optimizer, table[None], rows, mask, gradients[None], *numbers)[0]


def dense_update(name, table, gradient, touched, rate, decay):
    """A dense restatement, one row at a time: rows that are not touched keep everything."""
    table = table.copy()
    for row in touched:
        embedding, slots = table[row, :WIDTH], table[row, WIDTH + 1 :]
        table[row, WIDTH] += 1
        count = table[row, WIDTH]
        if name == "sgd":
            step = gradient[row]
        elif name == "adagrad":
            slots[0] += np.mean(gradient[row] ** 2)
            step = gradient[row] / np.sqrt(slots[0] + ADAGRAD_EPSILON)
        else:
            mean, square = slots[:WIDTH], slots[WIDTH:]
            mean[:] = ADAM.b1 * mean + (1 - ADAM.b1) * gradient[row]
            square[:] = ADAM.b2 * square + (1 - ADAM.b2) * gradient[row] ** 2
            step = (mean / (1 - ADAM.b1**count)) / (
                np.sqrt(square / (1 - ADAM.b2**count)) + ADAM.eps
            )
        embedding[:] -= rate * (step + decay * embedding)
    return table


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_sparse_updates_are_dense_ones_on_touched_rows_alone(name, data):
    generator = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    optimizer = ROW_OPTIMIZERS[name]
    expected = new_table(optimizer, generator.normal(size=(ROWS, WIDTH)))
    actual = expected
    # Several updates, so that slots matter; rows repeat, and a gradient of zero touches nothing.
    for _ in range(3):
        rows = generator.integers(0, ROWS, 9).astype(np.int32)
        mask = generator.random(9) < data.draw(st.sampled_from([0.2, 0.8, 1.0]))
        gradients = generator.normal(size=(9, WIDTH)).astype(np.float32)
        gradients[generator.random(9) < 0.3] = 0
        dense = np.zeros((ROWS, WIDTH))
        np.add.at(dense, rows[mask], gradients[mask])
        touched = np.flatnonzero(dense.any(axis=1))
        before = actual
        expected = dense_update(name, expected, dense, touched, 0.1, 0.2)
        actual = np.asarray(update_one(optimizer, actual, rows, gradients, 0.1, 0.2, mask))
        untouched = np.delete(np.arange(ROWS), touched)
        np.testing.assert_array_equal(actual[untouched], before[untouched])
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_lazy_adam_is_optax_adam_for_a_row_in_every_batch():
    generator = np.random.default_rng(0)
    optimizer = ROW_OPTIMIZERS["adam"]
    dense_optimizer = optax.adam(0.01)
    dense = jnp.asarray(generator.normal(size=(ROWS, WIDTH)), jnp.float32)
    state = dense_optimizer.init(dense)
    table = new_table(optimizer, dense)
    for _ in range(10):
        gradient = jnp.asarray(generator.normal(size=(ROWS, WIDTH)), jnp.float32)
        step, state = dense_optimizer.update(gradient, state)
        dense = optax.apply_updates(dense, step)
        table = update_one(optimizer, table, np.arange(ROWS), gradient, 0.01, 0.0)
    np.testing.assert_allclose(table[:, :WIDTH], dense, atol=1e-6)
    assert (table[:, WIDTH] == 10).all()


@pytest.mark.parametrize("name", ROW_OPTIMIZERS)
def test_runs_are_updated_as_each_by_itself(name):
    generator = np.random.default_rng(1)
    optimizer, runs = ROW_OPTIMIZERS[name], 3
    rows, mask = generator.integers(0, ROWS, 8), generator.random(8) < 0.8
    tables = np.stack(
        [new_table(optimizer, generator.normal(size=(ROWS, WIDTH))) for _ in range(runs)]
    )
    gradients = generator.normal(size=(runs, 8, WIDTH)).astype(np.float32)
    # What touches a row of one run need not touch it of another.
    gradients[1, :4] = 0
    rates, decays = np.float32([0.1, 0.2, 0.3]), np.float32([0.0, 0.1, 0.2])
    may_change = np.array([True, True, False])
    new = update_many(
        optimizer, jnp.asarray(tables), jnp.asarray(rows), mask, gradients, rates, decays,
        may_change,
    )  # fmt: skip
    for run in range(runs):
        expected = tables[run]
        if may_change[run]:
            expected = update_one(
                optimizer, expected, rows, gradients[run], rates[run], decays[run], mask
            )
        np.testing.assert_array_equal(new[run], expected)


@pytest.mark.parametrize("base", [ADAM.b1, ADAM.b2])
def test_the_correction_of_the_bias_loses_no_digits(base):
    counts = np.concatenate([np.arange(1, 2000), [5000, 10**6]])
    corrections = one_minus_power(base, jnp.asarray(counts[:, None], jnp.float32))
    expected = -np.expm1(counts[:, None] * np.log(base))
    np.testing.assert_allclose(corrections, expected, rtol=3e-7)
