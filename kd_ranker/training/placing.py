"""Placement of arrays: their devices, their layout, and the rows that each device holds."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kd_ranker.batch import WHOLE, Deal
from kd_ranker.embedding.deal import dealt, length_of_share
from kd_ranker.training.state import MEMBERS_FIRST

AXIS, MEMBERS = "requests", "members"
"""The axes of a mesh: devices that share the requests of a batch, and those with other members."""

_TABLES = "tables"  # the field of `Parameters` that holds them
# Fields with one row per id. Rows are the first axis, after the members of tables.
_ROWS = {_TABLES, "owners", "items"}


def first_devices(number: int) -> list[jax.Device]:
    """Return the first `number` devices that JAX sees, or all for 0, grouped by process.

    A pod of TPUs may number its chips in another order.
    """
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return devices[: number or None]


def own_devices(number: int) -> list[jax.Device]:
    """Return the devices of this process among `first_devices`."""
    own = jax.process_index()
    return [device for device in first_devices(number) if device.process_index == own]


def is_of_tables(path: jax.tree_util.KeyPath) -> bool:
    """Test if a leaf of a pytree is an embedding table."""
    return _TABLES in names_of(path)


def has_members(path: jax.tree_util.KeyPath) -> bool:
    """Test if a leaf of a pytree is an array of a state that has a leading axis of members."""
    return bool(names_of(path) & MEMBERS_FIRST)


def names_of(path: jax.tree_util.KeyPath) -> set[str | None]:
    """Return the names of the fields that lead to a leaf of a pytree."""
    return {getattr(part, "name", None) for part in path}


def _filler(path: jax.tree_util.KeyPath) -> int:
    """Fill value for padding rows: -1 in category columns, 0 elsewhere."""
    return -1 if "category" in names_of(path) else 0


def _axis_of_rows(path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
    """Return the axis of the rows that may be dealt to devices; None for a leaf without them."""
    if not names_of(path) & _ROWS:
        return None
    return leaf.ndim - 2 if is_of_tables(path) else 0


def specs_of(members: int, deal: Deal, tree: Any) -> Any:
    """Return the partition of each array: its members, if it has them, and its dealt rows.

    Both follow from the names of the fields that hold it.

    Args:
      members: the size of the axis `MEMBERS`.
      deal: how rows are dealt along `AXIS`.
      tree: arrays, concrete or abstract.
    """

    def spec(path: jax.tree_util.KeyPath, leaf: Any) -> PartitionSpec:
        axes: list[str | None] = [MEMBERS] if members > 1 and has_members(path) else []
        rows = _axis_of_rows(path, leaf)
        if deal != WHOLE and rows is not None:
            axes += [None] * (rows - len(axes)) + [AXIS]
        return PartitionSpec(*axes)

    return jax.tree_util.tree_map_with_path(spec, tree)


def dealt_rows(tree: Any, deal: Deal) -> Any:
    """Copy arrays, with their rows in the order of the devices; see `embedding.deal`.

    Of abstract arrays, the result is abstract.
    """

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        axis = None if deal == WHOLE else _axis_of_rows(path, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            shape = list(leaf.shape)
            if axis is not None:
                shape[axis] = deal.devices * length_of_share(shape[axis], deal.devices)
            return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
        return leaf.copy() if axis is None else dealt(leaf, axis, deal.devices, _filler(path))

    return jax.tree_util.tree_map_with_path(of, tree)


def places(tree: Any, shardings: Any) -> Any:
    """Return the device placement of each array; on a TPU, tables are stored row by row.

    By default XLA stores them column by column there. Each program that reads or writes rows would
    then copy whole tables.

    Args:
      tree: arrays, concrete or abstract.
      shardings: one `Sharding` for all, or a pytree with one for each.
    """

    def place(path: jax.tree_util.KeyPath, leaf: Any, sharding: Sharding) -> Sharding | Format:
        devices: set[Any] = sharding.device_set
        if next(iter(devices)).platform != "tpu" or not is_of_tables(path):
            return sharding
        return Format(Layout(tuple(range(leaf.ndim))), sharding)

    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree_util.tree_map_with_path(place, tree, shardings)


def put_on(tree: Any, of_places: Any) -> Any:
    """Put a pytree of the host, the same in all processes, on the devices of all.

    Abstract arrays stay abstract and get their placement.
    """
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            tree,
            of_places,
        )
    if jax.process_count() == 1:
        return jax.device_put(tree, of_places)

    # With `device_put`, JAX would compare the values of all processes.
    def on_devices(leaf: Any, place: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, place, host.__getitem__)

    return jax.tree.map(on_devices, tree, of_places)


def put(tree: Any, device: jax.Device | None = None) -> Any:
    """Put a pytree on one device, by default the first, for programs of that device only."""
    device = device or jax.local_devices()[0]
    return jax.device_put(tree, places(tree, SingleDeviceSharding(device)))


def put_by_rows(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put a pytree of the host on devices: a range of all rows on each, and all else on all.

    XLA itself splits programs on such arrays over the devices. Rows of padding may follow the
    others.
    """
    mesh = Mesh(np.array(devices), (AXIS,))

    def filled(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        axis = _axis_of_rows(path, leaf)
        if axis is None:
            return leaf
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, -leaf.shape[axis] % len(devices))
        return np.pad(np.asarray(leaf), widths, constant_values=_filler(path))

    evenly = jax.tree_util.tree_map_with_path(filled, tree)
    specs = specs_of(1, Deal(len(devices), AXIS), evenly)
    return put_on(
        evenly, places(evenly, jax.tree.map(functools.partial(NamedSharding, mesh), specs))
    )
