"""Row sharding: the rows of a table spread over n devices, row r on device r mod n.

So each device has an equal share of any range of rows, which spreads hot rows with adjacent
numbers. A device reads and changes only its own rows. Ids travel to all devices; rows travel only
to the device that needs them.

    row r is at place r // n of device r mod n, and place p of device d has row p · n + d

A device expects to own about M / n of M ids, and has room for twice that number. If it owns more,
it processes all M, which takes longer and gives the same result.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from kd_ranker.batch import RowSharding

_State = TypeVar("_State")

RARELY = "more_ids_than_room"
"""The named scope of the operations that run only in this rare case."""

# As many rows as a TPU lays out together, see `lookup.TableSpec.rows`.
_ROWS_TOGETHER = 8
# The ratio of a device's room for ids that it owns to their expected number.
_ROOM = 2


def rows_per_device(rows: int, devices: int) -> int:
    """Return the number of places per device for `rows` rows; those after the last are empty.

    >>> rows_per_device(100, devices=4), rows_per_device(100, devices=1)
    (32, 100)
    """
    if devices == 1:
        return rows
    return -(-rows // (devices * _ROWS_TOGETHER)) * _ROWS_TOGETHER


def to_shards(array: Any, axis: int, devices: int, filler: Any = 0) -> np.ndarray:
    """Order all rows of a host's array by device, and pad each share with `filler`.

    >>> to_shards(np.arange(10), 0, devices=2).tolist()
    [0, 2, 4, 6, 8, 0, 0, 0, 1, 3, 5, 7, 9, 0, 0, 0]
    """
    host = np.asarray(array)
    length = rows_per_device(host.shape[axis], devices)
    padding = [(0, 0)] * host.ndim
    padding[axis] = (0, devices * length - host.shape[axis])
    padded = np.pad(host, padding, constant_values=filler)
    by_place = padded.reshape(*host.shape[:axis], length, devices, *host.shape[axis + 1 :])
    return np.ascontiguousarray(by_place.swapaxes(axis, axis + 1)).reshape(padded.shape)


def from_shards(array: Any, axis: int, devices: int) -> np.ndarray:
    """Invert `to_shards`, except that the padding rows remain, after the others."""
    host = np.asarray(array)
    # Not -1, as an array without columns has no size to infer it from.
    length = host.shape[axis] // devices
    by_device = host.reshape(*host.shape[:axis], devices, length, *host.shape[axis + 1 :])
    return np.ascontiguousarray(by_device.swapaxes(axis, axis + 1)).reshape(host.shape)


def read(
    row_sharding: RowSharding,
    places: Num[Array, "places W"],
    row: Int[Array, "..."],
    columns: slice,
    first: Any = 0,
) -> Num[Array, "... columns"]:
    """Return columns of the rows that this device requests; only these columns travel.

    Several devices call this in a mapped function. `places` are the rows that this device holds, of
    the tables of several runs; those of the table to read begin at `first`. Row numbers are in
    range. Rows are read whole and then sliced: a TPU reads parts of rows one by one, in a loop.
    """
    if row_sharding.devices == 1:
        return _take(places, row + first)[..., columns]
    requested = jax.lax.all_gather(row.reshape(-1), row_sharding.axis, tiled=True)

    # `update_own_rows` finds the requested rows that lie here; the state that it updates is the
    # array of the rows to send.
    def fill(rows: Array, place: Array, mask: Array, _: None, index: Array | None) -> Array:
        taken = _take(places, place + first)[:, columns]
        if index is None:
            return jnp.where(mask[:, None], taken, rows)
        return rows.at[index].set(taken, mode="drop", unique_indices=True)

    num_columns = len(range(*columns.indices(places.shape[1])))
    empty = jnp.zeros((requested.shape[0], num_columns), places.dtype)
    mask = jnp.full(requested.shape, True)
    rows = update_own_rows(row_sharding, fill, empty, requested, mask, None)
    # One device has the row, and the others add 0.
    received = jax.lax.psum_scatter(rows, row_sharding.axis, scatter_dimension=0, tiled=True)
    return received.reshape(*row.shape, *received.shape[1:])


def update_own_rows(
    row_sharding: RowSharding,
    function: Callable[..., _State],
    state: _State,
    row: Int[Array, "M"],
    mask: Bool[Array, "M"],
    values: Num[Array, "k M W"] | None,
) -> _State:
    """Call `function(state, place, mask, values, index)` on the rows that this device owns.

    `place` are the places of rows on this device. The function is called in one of two forms:

    * on the device's own rows alone, in their order, with `index` their indices among the M; slots
      that are left have a mask of False and an index of M;
    * on all M, with `index` None and a mask that is True for the device's own rows.

    The function updates `state`, in place if possible, and must not depend on masked rows. Row
    numbers are in range, and the same on all devices, as are mask and values.
    """
    if row_sharding.devices == 1:
        return function(state, row, mask, values, None)
    number = row.shape[0]
    place = row // row_sharding.devices
    mask &= row % row_sharding.devices == jax.lax.axis_index(row_sharding.axis)
    room = _ROOM * -(-number // row_sharding.devices)

    def update_by_own(_: Any, state: _State) -> _State:
        (index,) = jnp.nonzero(mask, size=room, fill_value=number)
        own_place = place.at[index].get(mode="fill", fill_value=0)
        own_values = None
        if values is not None:
            own_values = values.at[:, index].get(mode="fill", fill_value=0)
        return function(state, own_place, index < number, own_values, index)

    def update_by_all(_: Any, state: _State) -> _State:
        return function(state, place, mask, values, None)

    if room >= number:
        return update_by_all(0, state)
    # Loops of one trip or none: XLA would copy the tables that a condition changes.
    fits = (jnp.sum(mask) <= room).astype(jnp.int32)
    state = jax.lax.fori_loop(0, fits, update_by_own, state)
    with jax.named_scope(RARELY):
        return jax.lax.fori_loop(0, 1 - fits, update_by_all, state)


def _take(rows: Num[Array, "rows W"], row: Int[Array, "..."]) -> Num[Array, "... W"]:
    return rows.at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)
