"""The same step on one device or many: by `pmap` or by `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"


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
      map_step: step(state, batch, hyperparameters, frozen) -> its compiled, mapped version; the
        state's buffers are donated.
      unreplicate: the inverse of `replicate`: the same pytree on one device.
    """

    replicate: Callable[[Any], Any]
    create: Callable[[Callable[[], Any]], Any]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable], Callable]
    map_step: Callable[[Callable], Callable]
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
        map_step=lambda step: jax.pmap(
            step, axis_name=AXIS, in_axes=(0, 0, None, 0), donate_argnums=0, devices=devices
        ),
        unreplicate=lambda tree: jax.tree.map(lambda array: array.addressable_data(0)[0], tree),
    )


def shard_map(devices: Sequence[jax.Device]) -> DeviceMap:
    """Maps by `jax.shard_map` over a mesh of one axis: arrays keep their global shapes."""
    mesh = Mesh(np.array(devices), (AXIS,))
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)

    def map_batches(function: Callable) -> Callable:
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(everywhere, split), out_specs=split)
        )

    def map_step(step: Callable) -> Callable:
        # The step sums over the axis itself; the replication checker would add sums of its own.
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, split, everywhere, everywhere),
            out_specs=everywhere,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=0)

    def put(tree: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(tree, NamedSharding(mesh, spec))

    return DeviceMap(
        # A step donates its state, which must not share memory with arrays of the caller.
        replicate=lambda tree: put(jax.tree.map(jnp.copy, tree), everywhere),
        create=lambda make: jax.jit(make, out_shardings=NamedSharding(mesh, everywhere))(),
        shard=lambda batch: put(batch, split),
        map_batches=map_batches,
        map_step=map_step,
        unreplicate=lambda tree: jax.tree.map(lambda array: array.addressable_data(0), tree),
    )


MAPPINGS: dict[str, Callable[[Sequence[jax.Device]], DeviceMap]] = {
    "pmap": pmap,
    "shard_map": shard_map,
}
