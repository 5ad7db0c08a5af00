"""The functions in C++, against those of XLA and NumPy; skipped without a C++ compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_ranker.embedding import cpu_rows
from kd_ranker.embedding.row_optimizers import adam, find_occurrences, update_tables

needs_compiler = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not cpu_rows.are_available(),
    reason="there is no C++ compiler, or JAX computes on another device",
)
RUNS, ROWS, IDS, WIDTH = 3, 500, 2000, 5


def random_update(seed, may_change=(True, True, True)):
    """Tables that were updated before, and the arguments of an update of many equal ids."""
    generator = np.random.default_rng(seed)
    tables = generator.normal(size=(RUNS, ROWS, 3 * WIDTH + 1)).astype(np.float32)
    tables[..., WIDTH] = generator.integers(0, 2000, (RUNS, ROWS))
    tables[..., 2 * WIDTH + 1 :] **= 2
    gradients = generator.normal(size=(RUNS, IDS, WIDTH)).astype(np.float32)
    gradients[:, generator.random(IDS) < 0.5] = 0
    row = generator.integers(0, ROWS, IDS).astype(np.int32)
    occurrences, _ = find_occurrences(
        row, jnp.asarray(generator.random(IDS) < 0.7), jnp.zeros(ROWS, jnp.int32)
    )
    rates = generator.random((2, RUNS)).astype(np.float32)
    return jnp.asarray(tables), (occurrences, gradients, *rates, np.array(may_change))


def updated(tables, arguments):
    return np.asarray(jax.jit(functools.partial(update_tables, adam))(tables, *arguments))


@needs_compiler
@pytest.mark.parametrize("may_change", [(True, True, True), (True, False, True)])
def test_an_update_is_that_of_xla(may_change, monkeypatch):
    tables, arguments = random_update(0, may_change)
    in_one_pass = updated(tables, arguments)
    monkeypatch.setattr(cpu_rows, "are_available", lambda: False)
    by_xla = updated(tables, arguments)

    np.testing.assert_allclose(in_one_pass, by_xla, rtol=2e-6, atol=2e-6)
    changed = (by_xla != tables).any(axis=2)
    np.testing.assert_array_equal((in_one_pass != tables).any(axis=2), changed)
    assert 0 < changed.sum() < changed.size


@needs_compiler
def test_an_update_gives_the_same_bits_each_time():
    tables, arguments = random_update(1)
    np.testing.assert_array_equal(updated(tables, arguments), updated(tables, arguments))


@needs_compiler
def test_a_gradient_that_is_not_finite_reaches_its_own_row_alone():
    tables, (occurrences, gradients, *numbers) = random_update(2)
    gradients[1, 7] = np.nan
    new = updated(tables, (occurrences._replace(represents=occurrences.represents.at[:].set(True)),
                           gradients, *numbers))  # fmt: skip
    assert {tuple(place) for place in np.argwhere(np.isnan(new).any(axis=2))} == {
        (1, int(occurrences.row[7]))
    }


@needs_compiler
def test_gathered_rows_are_those_of_numpy():
    generator = np.random.default_rng(3)
    tables = generator.normal(size=(RUNS, ROWS, 3 * WIDTH + 1)).astype(np.float32)
    row = generator.integers(0, ROWS, IDS).astype(np.int32)
    gathered = jax.jit(functools.partial(cpu_rows.gather, width=WIDTH))(tables, row)
    np.testing.assert_array_equal(gathered, tables[:, row, :WIDTH])


@needs_compiler
def test_an_update_is_in_place_where_the_tables_are_donated():
    tables, arguments = random_update(4)
    update = jax.jit(functools.partial(update_tables, adam), donate_argnums=0)
    memory = update.lower(tables, *arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == tables.nbytes
    assert memory.temp_size_in_bytes < tables.nbytes / 4
