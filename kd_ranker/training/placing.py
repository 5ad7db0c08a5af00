"""The places of arrays: on which devices they lie, in which layout, and by which of their rows."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from kd_ranker.batch import WHOLE, Deal
from kd_ranker.embedding.deal import dealt, length_of_share

AXIS, MEMBERS = "requests", "members"
"""The axes of a mesh: devices that share the requests of a batch, and those with own members."""

_TABLES = "tables"  # the field of `Parameters` that holds them
# The fields with a row for each id, which comes first but for the members of tables.
_ROWS = {_TABLES, "owners", "items"}


def first_devices(number: int) -> list[jax.Device]:
    """So many of the devices that JAX sees, the first ones; 0 takes all.

    Those of a process lie beside each other, as a pod of TPUs need not number them.
    """
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return devices[: number or None]


def is_of_tables(path: jax.tree_util.KeyPath) -> bool:
    """Tests if a leaf of a pytree is an embedding table."""
    return _TABLES in _names(path)


def _names(path: jax.tree_util.KeyPath) -> set[str | None]:
    return {getattr(part, "name", None) for part in path}


def _filler(path: jax.tree_util.KeyPath) -> int:
    """The value of rows that are of no id: -1 for categories, of which there is none."""
    return -1 if "category" in _names(path) else 0


def _axis_of_rows(path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
    """The axis of the rows that may be dealt to devices."""
    if not _names(path) & _ROWS:
        return None
    return leaf.ndim - 2 if is_of_tables(path) else 0


def places(tree: Any, sharding: Sharding | None = None, shardings: Any = None) -> Any:
    """The place and the layout of each array of a pytree: on a TPU, tables lie row by row.

    Left alone, XLA would lay them out column by column there, and copy them whole in each program
    that reads or writes rows.

    Args:
      tree: arrays, there or abstract.
      sharding: that of all of them; or
      shardings: one each.
    """

    def place(path: jax.tree_util.KeyPath, leaf: Any, sharding: Sharding) -> Sharding | Format:
        devices: set[Any] = sharding.device_set
        if next(iter(devices)).platform != "tpu" or not is_of_tables(path):
            return sharding
        return Format(Layout(tuple(range(leaf.ndim))), sharding)

    if shardings is None:
        shardings = jax.tree.map(lambda _: sharding, tree)
    return jax.tree_util.tree_map_with_path(place, tree, shardings)


def own_devices(number: int) -> list[jax.Device]:
    """The devices of this process among `first_devices`."""
    return [
        device for device in first_devices(number) if device.process_index == jax.process_index()
    ]


def put_on(tree: Any, of_places: Any) -> Any:
    """A pytree of the host, the same in all processes, on the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, of_places)

    # JAX itself would have the processes compare all that they put there.
    def on_devices(leaf: Any, place: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, place, host.__getitem__)

    return jax.tree.map(on_devices, tree, of_places)


def fetch(array: jax.Array) -> Any:
    """An array that devices hold in parts, those of other processes included."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def put(tree: Any, device: jax.Device | None = None) -> Any:
    """A pytree on one device, by default the first, for programs of that device only."""
    device = device or jax.local_devices()[0]
    if device.platform != "tpu":
        return jax.device_put(tree, device)
    return jax.device_put(tree, places(tree, SingleDeviceSharding(device)))


def put_by_rows(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A pytree of the host on several devices: a range of all rows each, and all else the same.

    It is for programs that XLA itself splits over the devices, which see the arrays as whole ones.
    There may be empty rows behind the others.
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
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return put_on(evenly, places(evenly, shardings=shardings))


def abstract(tree: Any, of_places: Any) -> Any:
    """The arrays of a pytree, there or abstract, by shape, type and place alone."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        of_places,
    )


def specs_of(members: int, deal: Deal, tree: Any, has_members: Any = False) -> Any:
    """The way in which each array is split: its members, if it has them, and its dealt rows."""

    def spec(path: jax.tree_util.KeyPath, leaf: Any, has: bool) -> PartitionSpec:
        axes: list[str | None] = [MEMBERS] if has and members > 1 else []
        rows = _axis_of_rows(path, leaf)
        if deal != WHOLE and rows is not None:
            axes += [None] * (rows - len(axes)) + [AXIS]
        return PartitionSpec(*axes)

    has_members = jax.tree.map(lambda _: False, tree) if has_members is False else has_members
    return jax.tree_util.tree_map_with_path(spec, tree, has_members)


def dealt_rows(tree: Any, deal: Deal) -> Any:
    """Arrays of the host with their rows in the order of the devices."""

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        axis = _axis_of_rows(path, leaf)
        if deal == WHOLE or axis is None:
            return leaf
        return dealt(leaf, axis, deal.devices, _filler(path))

    return jax.tree_util.tree_map_with_path(of, tree)


def dealt_shapes(tree: Any, deal: Deal) -> Any:
    """The shapes of what `dealt_rows` would make."""

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
        shape, axis = list(leaf.shape), _axis_of_rows(path, leaf)
        if axis is not None:
            shape[axis] = deal.devices * length_of_share(shape[axis], deal.devices)
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(of, tree)
