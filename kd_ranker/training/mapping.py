"""The same step on one device or many: by `pmap` or by `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
_TABLES = "tables"  # the field of `Parameters` that holds them


def join_over_devices(arrays: Any, axis: int) -> Any:
    """The arrays of all devices joined along an axis, within a mapped function."""
    # XLA would copy those of a single device.
    if jax.lax.axis_size(AXIS) == 1:
        return arrays
    return jax.lax.all_gather(arrays, AXIS, axis=axis, tiled=True)


class DeviceMap(NamedTuple):
    """A way to spread a step, its states and its batches over devices.

    Attributes:
      replicate: a pytree on the host or one device -> the same on all devices.
      create: a pure function without arguments -> the pytree that it returns, made on all devices
        and nowhere else, so that a large one is held once.
      shard: a host batch [requests, ...] -> the same, its requests split over the devices.
      map_batches: function(data, batch) -> its compiled, mapped version, where the data is
        replicated, and batch and result are [requests, ...], split over the devices.
      map_step: step(states, batch, hyperparameters, frozen), and the states by their shapes -> its
        compiled, mapped version; the buffers of the states are donated. Without their shapes, the
        states come back as XLA likes to lay them out.
      unreplicate: the inverse of `replicate`: the same pytree on one device.
    """

    replicate: Callable[[Any], Any]
    create: Callable[[Callable[[], Any]], Any]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable], Callable]
    map_step: Callable[..., Callable]
    unreplicate: Callable[[Any], Any]


def pmap(devices: Sequence[jax.Device]) -> DeviceMap:
    """Maps by `jax.pmap`: every array carries a leading axis of devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def put(tree: Any) -> Any:
        # A step donates its state, which must not share memory with arrays of the caller.
        return jax.device_put(tree, sharding, may_alias=False)

    def replicate(tree: Any) -> Any:
        return put(
            jax.tree.map(lambda array: np.broadcast_to(array, (len(devices), *array.shape)), tree)
        )

    def create(make: Callable[[], Any]) -> Any:
        def made_for_each() -> Any:
            return jax.tree.map(
                lambda array: jnp.broadcast_to(array, (len(devices), *array.shape)), make()
            )

        return jax.jit(made_for_each, out_shardings=sharding)()

    def shard(batch: Any) -> Any:
        def split(array: Any) -> Any:
            return array.reshape(len(devices), array.shape[0] // len(devices), *array.shape[1:])

        return put(jax.tree.map(split, batch))

    return DeviceMap(
        replicate=replicate,
        create=create,
        shard=shard,
        map_batches=lambda function: jax.pmap(function, axis_name=AXIS, devices=devices),
        map_step=lambda step, states=None: jax.pmap(
            step, axis_name=AXIS, in_axes=(0, 0, None, 0), donate_argnums=0, devices=devices
        ),
        unreplicate=lambda tree: jax.tree.map(lambda array: array.addressable_data(0)[0], tree),
    )


def shard_map(devices: Sequence[jax.Device]) -> DeviceMap:
    """Maps by `jax.shard_map` over a mesh of one axis: arrays keep their global shapes.

    On a TPU it lays tables out row by row. Left alone, XLA would lay them out column by column
    there, and copy them whole in each step, to read rows and to write them.
    """
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    whole = NamedSharding(mesh, everywhere)
    by_rows = devices[0].platform == "tpu"

    def places(tree: Any) -> Any:
        """The place and the layout of each array that all devices have."""

        def place(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding | Format:
            of_tables = any(getattr(part, "name", None) == _TABLES for part in path)
            if not (by_rows and of_tables):
                return whole
            return Format(Layout(tuple(range(leaf.ndim))), whole)

        return jax.tree_util.tree_map_with_path(place, tree)

    def map_batches(function: Callable) -> Callable:
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(everywhere, split), out_specs=split)
        )

    def map_step(step: Callable, states: Any = None) -> Callable:
        # The step sums over the axis itself; the replication checker would add sums of its own.
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, split, everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=0, out_shardings=(places(states), whole))

    def create(make: Callable[[], Any]) -> Any:
        return jax.jit(make, out_shardings=places(jax.eval_shape(make)))()

    return DeviceMap(
        # A step donates its state, which must not share memory with arrays of the caller.
        replicate=lambda tree: jax.device_put(jax.tree.map(jnp.copy, tree), places(tree)),
        create=create,
        shard=lambda batch: jax.device_put(batch, NamedSharding(mesh, split)),
        map_batches=map_batches,
        map_step=map_step,
        unreplicate=lambda tree: jax.tree.map(lambda array: array.addressable_data(0), tree),
    )


def auto(devices: Sequence[jax.Device]) -> DeviceMap:
    """`shard_map` on TPUs, for how it lays tables out there, and `pmap` elsewhere."""
    return shard_map(devices) if devices[0].platform == "tpu" else pmap(devices)


MAPPINGS: dict[str, Callable[[Sequence[jax.Device]], DeviceMap]] = {
    "auto": auto,
    "pmap": pmap,
    "shard_map": shard_map,
}
