"""The kernel for TPUs, simulated on this device, against XLA's update and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kd_ranker.embedding import tpu_rows
from kd_ranker.embedding.row_optimizers import adam, find_occurrences, new_rows, update_tables

ROWS, WIDTH = 700, 4
COLUMNS = 3 * WIDTH + 1


def random_table(generator):
    """A table that was updated before."""
    table = generator.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    table[:, WIDTH] = generator.integers(0, 2000, ROWS)
    table[:, 2 * WIDTH + 1 :] **= 2
    return table


def simulated(table, place, is_changed, gradients, rate=0.1, decay=0.2, interpret=True):
    """The table after an update by Adam in the kernel."""
    change = functools.partial(new_rows, adam)
    rewrite = functools.partial(tpu_rows.rewrite, change, interpret=interpret)
    numbers = (jnp.float32(rate), jnp.float32(decay))
    return np.asarray(jax.jit(rewrite)(jnp.asarray(table), place, is_changed, gradients, *numbers))


# More ids than a block of 2048 rows holds, and fewer.
@pytest.mark.parametrize("ids", [3000, 2048, 5, 1])
def test_an_update_is_that_of_xla(ids):
    generator = np.random.default_rng(ids)
    table = random_table(generator)
    row = generator.integers(0, ROWS, ids).astype(np.int32)
    mask = generator.random(ids) < 0.7
    gradients = generator.normal(size=(ids, WIDTH)).astype(np.float32)
    occurrences, _ = find_occurrences(row, jnp.asarray(mask), jnp.zeros(ROWS, jnp.int32))
    summed = np.zeros_like(gradients)
    np.add.at(summed, np.asarray(occurrences.position), gradients)
    is_changed = np.asarray(occurrences.represents) & summed.any(axis=1)

    numbers = (jnp.full(1, 0.1), jnp.full(1, 0.2), jnp.ones(1, bool))
    arguments = (occurrences, gradients[None], *numbers)
    expected = np.asarray(update_tables(adam, jnp.asarray(table)[None], *arguments)[0])
    in_kernel = simulated(table, row, is_changed, summed)
    np.testing.assert_allclose(in_kernel, expected, rtol=2e-6, atol=2e-6)
    untouched = np.delete(np.arange(ROWS), row[is_changed])
    np.testing.assert_array_equal(in_kernel[untouched], table[untouched])


@pytest.mark.parametrize("moment", ["eager", "on_wait"])
def test_rows_may_be_copied_at_any_moment(moment):
    """The simulator of a TPU copies as soon as it may, or as late; new memory is not a number."""
    generator = np.random.default_rng(0)
    table, gradients = random_table(generator), np.ones((6, WIDTH), np.float32)
    place = np.array([0, ROWS - 1, 5, 3, 5, 7], np.int32)
    is_changed = np.array([True, True, True, False, False, True])
    simulator = pltpu.InterpretParams(dma_execution_mode=moment)
    np.testing.assert_allclose(
        simulated(table, place, is_changed, gradients, interpret=simulator),
        simulated(table, place, is_changed, gradients),
        rtol=2e-6,
    )


def test_a_skipped_row_with_a_gradient_that_is_not_finite_changes_nothing():
    table = random_table(np.random.default_rng(1))
    gradients = np.full((3, WIDTH), np.nan, np.float32)
    place = np.array([0, 1, 2], np.int32)
    np.testing.assert_array_equal(simulated(table, place, np.zeros(3, bool), gradients), table)


def test_numbers_reach_the_function_in_their_order():
    table = np.zeros((4, COLUMNS), np.float32)
    rewritten = tpu_rows.rewrite(
        lambda rows, gradients, first, second: rows + first + 10 * second,
        jnp.asarray(table),
        jnp.array([2], jnp.int32),
        jnp.array([True]),
        jnp.ones((1, WIDTH)),
        *(jnp.float32(1), jnp.float32(2)),
        interpret=True,
    )
    np.testing.assert_array_equal(rewritten[2], 21)
    np.testing.assert_array_equal(rewritten[3], 0)


@pytest.mark.parametrize("on_request", [True, False])
def test_a_step_for_a_tpu_has_the_kernel_on_request(on_request):
    """Lowered for a TPU, which needs neither a TPU nor its compiler."""
    ids = jnp.zeros(3, jnp.int32)
    occurrences, _ = find_occurrences(ids, jnp.ones(3, bool), jnp.zeros(ROWS, jnp.int32))
    numbers = (jnp.ones(2), jnp.ones(2), jnp.ones(2, bool))
    update = jax.jit(functools.partial(update_tables, adam, kernel_on_tpu=on_request))
    traced = update.trace(
        jnp.zeros((2, ROWS, COLUMNS)), occurrences, jnp.ones((2, 3, WIDTH)), *numbers
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == on_request
