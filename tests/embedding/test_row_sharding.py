"""Rows that are spread over devices, against the same rows in one array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from kd_ranker.batch import RowSharding
from kd_ranker.embedding.row_sharding import (
    from_shards,
    read,
    rows_per_device,
    to_shards,
    update_own_rows,
)

ROWS, COLUMNS, IDS = 37, 3, 24
TABLE = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS) + 1
# The rows that devices ask for: of all, of one device alone, and one row.
ASKED = {
    "any": np.random.default_rng(0).integers(0, ROWS, IDS),
    "one device's": np.arange(IDS) % 4 * 4,
    "one row": np.full(IDS, ROWS - 1),
}


def mapped(devices, function, *specs):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
    return jax.jit(
        jax.shard_map(
            functools.partial(function, RowSharding(devices, "d")),
            mesh=mesh,
            in_specs=tuple(PartitionSpec("d") if spec else PartitionSpec() for spec in specs),
            out_specs=PartitionSpec("d"),
            check_vma=False,
        )
    )


@given(rows=st.integers(1, 100), devices=st.integers(1, 9), axis=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_sharded_rows_come_back_in_their_order(rows, devices, axis):
    array = np.arange(2 * rows).reshape((2, rows) if axis else (rows, 2))

    sharded = to_shards(array, axis, devices, filler=-1)

    assert sharded.shape[axis] == devices * rows_per_device(rows, devices)
    shards = np.split(sharded, devices, axis)
    for row in range(rows):
        held = np.take(shards[row % devices], row // devices, axis)
        np.testing.assert_array_equal(held, np.take(array, row, axis))
    back = from_shards(sharded, axis, devices)
    np.testing.assert_array_equal(np.take(back, range(rows), axis), array)
    assert (np.take(back, range(rows, back.shape[axis]), axis) == -1).all()


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_each_device_reads_the_rows_that_it_asks_for(devices):
    def function(row_sharding, places, row):
        return read(row_sharding, places, row, columns=slice(1, 3))

    each_reads = mapped(devices, function, True, True)
    for asked, row in ASKED.items():
        rows = row.reshape(IDS // 2, 2)[: IDS // 2 // devices * devices]
        found = each_reads(to_shards(TABLE, 0, devices), jnp.asarray(rows))
        np.testing.assert_array_equal(found, TABLE[rows][..., 1:], err_msg=asked)


def test_a_device_gets_no_more_than_its_own_rows():
    row = ASKED["any"]

    def function(row_sharding, row):
        def count(total, place, mask, values, index):
            return total + mask.sum()

        counted = update_own_rows(row_sharding, count, 0, row, jnp.full(row.shape, True), None)
        return counted[None]

    counted = mapped(3, function, False)(jnp.asarray(row))

    np.testing.assert_array_equal(counted, np.bincount(row % 3, minlength=3))


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_each_device_changes_its_own_rows_alone(devices):
    mask = np.arange(IDS) % 5 > 0
    values = np.random.default_rng(1).normal(size=(2, IDS, COLUMNS)).astype(np.float32)
    tables = np.stack([TABLE, -TABLE])

    def function(row_sharding, tables, row, mask, values):
        def add(tables, place, mask, values, _):
            return tables.at[:, place].add(jnp.where(mask[:, None], values, 0))

        return update_own_rows(row_sharding, add, tables[0], row, mask, values)[None]

    shares = np.stack(np.split(to_shards(tables, 1, devices), devices, 1))
    each_changes = mapped(devices, function, True, False, False, False)
    for asked, row in ASKED.items():
        changed = each_changes(shares, row, mask, values)
        changed = from_shards(np.concatenate(list(changed), axis=1), 1, devices)[:, :ROWS]
        expected = tables.copy()
        np.add.at(expected, (slice(None), row[mask]), values[:, mask])
        np.testing.assert_allclose(changed, expected, rtol=1e-6, err_msg=asked)
