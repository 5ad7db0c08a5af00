"""The same step on one device or many: by `pmap` or by `shard_map`.

Devices are a mesh of two axes. Along `MEMBERS` each has members of its own, which need nothing of
each other; along `AXIS` they share the requests of a batch, and exchange what is summed over them.
A step knows the second axis alone. A mapping knows both.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from kd_ranker.training.state import HAS_MEMBERS, States

AXIS, MEMBERS = "requests", "members"
_TABLES = "tables"  # the field of `Parameters` that holds them


def first_devices(number: int) -> list[jax.Device]:
    """So many of the devices that JAX sees, the first ones; 0 takes all."""
    return jax.devices()[: number or None]


def join_over_devices(arrays: Any, axis: int) -> Any:
    """The arrays of all devices joined along an axis, within a mapped function."""
    # XLA would copy those of a single device.
    if jax.lax.axis_size(AXIS) == 1:
        return arrays
    return jax.lax.all_gather(arrays, AXIS, axis=axis, tiled=True)


def is_of_tables(path: jax.tree_util.KeyPath) -> bool:
    """Tests if a leaf of a pytree is an embedding table."""
    return any(getattr(part, "name", None) == _TABLES for part in path)


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


def put(tree: Any) -> Any:
    """A pytree on the default device, for programs of that one alone."""
    (device, *_) = jax.local_devices()
    if device.platform != "tpu":
        return jax.device_put(tree)
    return jax.device_put(tree, places(tree, SingleDeviceSharding(device)))


def abstract(tree: Any, of_places: Any) -> Any:
    """The arrays of a pytree, there or abstract, by shape, type and place alone."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        of_places,
    )


def in_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """`function(batch)`, of which each of the devices that hold the same batch does a part.

    Args:
      function: from [requests, ...] to [requests, ...], each request by itself.
      batch: the same on the `parts` devices along `MEMBERS`. If they cannot share its requests
        evenly, each does all of it.
      parts: the size of that axis; with 1, there need not be one.
    """
    requests = jax.tree.leaves(batch)[0].shape[0]
    if parts == 1 or requests % parts:
        return function(batch)
    size = requests // parts
    start = jax.lax.axis_index(MEMBERS) * size
    part = jax.tree.map(lambda of: jax.lax.dynamic_slice_in_dim(of, start, size), batch)
    return jax.lax.all_gather(function(part), MEMBERS, axis=0, tiled=True)


def shared_evenly(number: int, parts: int) -> Int[np.ndarray, "filled"]:
    """The places of so many members, the last one again until the parts have equally many.

    >>> shared_evenly(number=5, parts=4).tolist()
    [0, 1, 2, 3, 4, 4, 4, 4]
    """
    return np.minimum(np.arange(-(-number // parts) * parts), number - 1)


def members_axis(devices: int, sizes: Sequence[int], requests: int) -> int:
    """The number of devices to spread members over, where the config does not say.

    It is the least one with which a device holds as few members as it can: those save most, as
    they need no traffic and no smaller batches. The devices that are left share the requests.

    Args:
      devices: their number.
      sizes: the number of members of each group. A device holds as many of each as any other does.
      requests: of a batch; one that the devices left over cannot share leaves fewer of them over.

    >>> members_axis(devices=8, sizes=[16], requests=32)
    8
    >>> members_axis(devices=8, sizes=[1, 4, 4], requests=32)
    4
    """

    def held(axis: int) -> int:
        return sum(-(-size // axis) for size in sizes)

    return next(axis for axis in shares(devices, requests) if held(axis) == held(devices))


def shares(devices: int, requests: int) -> list[int]:
    """The sizes of `MEMBERS` with which the devices can share a batch of so many requests.

    >>> shares(devices=8, requests=6)
    [4, 8]
    """
    axes = [axis for axis in range(1, devices + 1) if devices % axis == 0]
    return [axis for axis in axes if requests % (devices // axis) == 0]


class DeviceMap(NamedTuple):
    """A way to spread a step, its states and its batches over devices.

    Attributes:
      members: the number of devices that members are spread over; of the others each has the same.
        The numbers of members that a step is given are multiples of it.
      replicate: a pytree on the host or one device -> the same on all devices.
      place: states on the host, or one device -> the same on the devices; where their members are
        not a multiple of `members`, the last one again, see `shared_evenly`.
      create: a pure function without arguments -> the states that it returns, made on all devices
        and nowhere else, so that a large one is held once.
      shard: a host batch [requests, ...] -> the same, its requests split over the devices.
      map_batches: function(data, batch) -> its compiled, mapped version, where the data is
        replicated, and batch and result are [requests, ...], split over the devices.
      map_step: step(states, batch, hyperparameters, frozen), and the states by their shapes -> its
        compiled, mapped version; the buffers of the states are donated. Without their shapes, the
        states come back as XLA likes to lay them out.
      unreplicate: the inverse of `replicate` and `place`: the same pytree on one device, or on the
        host where members are spread over several. With a number, so many members, the first ones.
      abstract_replicate: a pytree by its shapes -> what `replicate` would make of it, by shapes and
        places.
      abstract_place: the same of states that `create` would make.
      abstract_shard: the same of `shard`.
    """

    members: int
    replicate: Callable[[Any], Any]
    place: Callable[[States], States]
    create: Callable[[Callable[[], States]], States]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable], Callable]
    map_step: Callable[..., Callable]
    unreplicate: Callable[..., Any]
    abstract_replicate: Callable[[Any], Any]
    abstract_place: Callable[[States], States]
    abstract_shard: Callable[[Any], Any]


def pmap(devices: Sequence[jax.Device], members: int = 1, deterministic: bool = False) -> DeviceMap:
    """Maps by `jax.pmap`: every array carries a leading axis of devices, which share requests."""
    if members != 1:
        raise ValueError(f"pmap has one axis, of requests, and none for {members} parts of members")
    if deterministic and _on_gpu(devices):
        raise ValueError("pmap takes no options for the compiler, such as for deterministic sums")
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def put_all(tree: Any) -> Any:
        # A step donates its state, which must not share memory with arrays of the caller.
        return jax.device_put(tree, sharding, may_alias=False)

    def replicate(tree: Any) -> Any:
        return put_all(
            jax.tree.map(lambda array: np.broadcast_to(array, (len(devices), *array.shape)), tree)
        )

    def create(make: Callable[[], States]) -> States:
        return jax.jit(lambda: jax.tree.map(stack, make()), out_shardings=sharding)()

    def stack(array: Any) -> Any:
        return jnp.broadcast_to(array, (len(devices), *array.shape))

    def split(array: Any) -> Any:
        return array.reshape(len(devices), array.shape[0] // len(devices), *array.shape[1:])

    def shapes(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return functools.partial(jax.eval_shape, functools.partial(jax.tree.map, function))

    return DeviceMap(
        members=1,
        replicate=replicate,
        place=replicate,
        create=create,
        shard=lambda batch: put_all(jax.tree.map(split, batch)),
        map_batches=lambda function: jax.pmap(function, axis_name=AXIS, devices=devices),
        map_step=lambda step, states=None: jax.pmap(
            step, axis_name=AXIS, in_axes=(0, 0, None, 0), donate_argnums=0, devices=devices
        ),
        unreplicate=lambda tree, number=None: jax.tree.map(
            lambda array: array.addressable_data(0)[0], tree
        ),
        abstract_replicate=shapes(stack),
        abstract_place=shapes(stack),
        abstract_shard=shapes(split),
    )


def shard_map(
    devices: Sequence[jax.Device], members: int = 1, deterministic: bool = False
) -> DeviceMap:
    """Maps by `jax.shard_map` over a mesh of both axes: arrays keep their global shapes.

    On a TPU it lays tables out row by row, see `places`.

    Args:
      devices: those to use.
      members: the number of them to spread members over, a divisor of theirs.
      deterministic: on GPUs, whether a step gives the same bits each time. Its sums over equal ids,
        which threads add to as they come, are then made in an order of their own, with sorts.
    """
    mesh = Mesh(np.array(devices).reshape(members, -1), (MEMBERS, AXIS))
    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    of_members = PartitionSpec(MEMBERS) if members > 1 else everywhere
    whole, in_parts = NamedSharding(mesh, everywhere), NamedSharding(mesh, split)
    options = {"xla_gpu_deterministic_ops": True} if deterministic and _on_gpu(devices) else None

    def places_of(states: States) -> Any:
        """The place and the layout of each array of the states."""
        split_so = jax.tree.map(functools.partial(NamedSharding, mesh), _specs(states, of_members))
        return places(states, shardings=split_so)

    def replicate(tree: Any) -> Any:
        # A step donates its state, which must not share memory with arrays of the caller.
        copied = jax.tree.map(jnp.copy, tree)
        return jax.device_put(copied, places(tree, whole))

    def place(states: States) -> States:
        if members == 1:
            return replicate(states)

        # On the host, as no device need hold them all.
        def filled(leaf: Any, spec: PartitionSpec) -> np.ndarray:
            of = np.asarray(leaf)
            return of[shared_evenly(len(of), members)] if spec == of_members else of.copy()

        evenly = jax.tree.map(filled, states, _specs(states, of_members))
        return jax.device_put(evenly, places_of(evenly))

    def create(make: Callable[[], States]) -> States:
        shapes = jax.eval_shape(make)
        return jax.jit(make, out_shardings=places_of(shapes))()

    def map_batches(function: Callable) -> Callable:
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=(everywhere, split), out_specs=split)
        )

    def map_step(step: Callable, states: States | None = None) -> Callable:
        laid_out = None if states is None else places_of(states)
        of_losses = NamedSharding(mesh, of_members)
        return jax.jit(
            _over_mesh(step, mesh, of_members),
            donate_argnums=0,
            out_shardings=(laid_out, of_losses),
            compiler_options=options,
        )

    return DeviceMap(
        members=members,
        replicate=replicate,
        place=place,
        create=create,
        shard=lambda batch: jax.device_put(batch, in_parts),
        map_batches=map_batches,
        map_step=map_step,
        unreplicate=_first_of_all,
        abstract_replicate=lambda tree: abstract(tree, places(tree, whole)),
        abstract_place=lambda states: abstract(states, places_of(states)),
        abstract_shard=lambda batch: abstract(batch, places(batch, in_parts)),
    )


def _specs(states: States, of_members: PartitionSpec) -> Any:
    """The way in which each array of the states is split."""
    each = tuple(jax.tree.broadcast(HAS_MEMBERS, state) for state in states)
    return jax.tree.map(lambda has: of_members if has else PartitionSpec(), each)


def _over_mesh(step: Callable, mesh: Mesh, of_members: PartitionSpec) -> Callable:
    """The step on all devices, each with its members and its requests."""

    @functools.wraps(step)
    def mapped(states: States, batch: Any, numbers: Any, frozen: Any) -> Any:
        of_states = _specs(states, of_members)
        # Beside those of members there may be numbers that concern the whole step.
        of_numbers = jax.tree.map(
            lambda array: of_members if jnp.ndim(array) else PartitionSpec(), numbers
        )
        # The step sums over the axis itself; the replication checker would add sums of its own.
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(of_states, PartitionSpec(AXIS), of_numbers, PartitionSpec()),
            out_specs=(of_states, of_members),
            check_vma=False,
        )(states, batch, numbers, frozen)

    return mapped


def _first_of_all(tree: Any, number: int | None = None) -> Any:
    """A pytree on one device; on the host, of the first members, where devices have their own."""

    def on_one(array: jax.Array) -> Any:
        return (
            array.addressable_data(0) if array.is_fully_replicated else np.asarray(array)[:number]
        )

    return jax.tree.map(on_one, tree)


def auto(devices: Sequence[jax.Device], members: int = 1, deterministic: bool = False) -> DeviceMap:
    """`shard_map` on TPUs, for how it lays tables out, and for what `pmap` cannot do; or that."""
    needs_mesh = members > 1 or (deterministic and _on_gpu(devices))
    if needs_mesh or devices[0].platform == "tpu":
        return shard_map(devices, members, deterministic)
    return pmap(devices)


def _on_gpu(devices: Sequence[jax.Device]) -> bool:
    return devices[0].platform == "gpu"


MAPPINGS: dict[str, Callable[..., DeviceMap]] = {
    "auto": auto,
    "pmap": pmap,
    "shard_map": shard_map,
}
