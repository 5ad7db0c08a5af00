"""The same step on one device or many: by `pmap` or by `shard_map`.

Devices are a mesh of two axes. Along `MEMBERS` each has members of its own, which need nothing of
each other; along `AXIS` they share the requests of a batch, and exchange what is summed over them.
A step knows the second axis alone. A mapping knows both.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from kd_ranker.batches.training import ALONE, Share
from kd_ranker.deal import WHOLE, Deal, dealt, gathered, length_of_share
from kd_ranker.training.state import HAS_MEMBERS, Frozen, States

AXIS, MEMBERS = "requests", "members"
_TABLES = "tables"  # the field of `Parameters` that holds them
# The fields with a row for each id, which comes first but for the members of tables.
_ROWS = {_TABLES, "owners", "items"}


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


def _on_devices(tree: Any, of_places: Any) -> Any:
    """A pytree of the host, the same in all processes, on the devices of all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, of_places)

    # JAX itself would have the processes compare all that they put there.
    def on_devices(leaf: Any, place: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, place, host.__getitem__)

    return jax.tree.map(on_devices, tree, of_places)


def _on_this_host(array: jax.Array) -> Any:
    """An array that devices hold in parts, those of other processes included."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _own_share(mesh: Mesh) -> Share:
    """The part of a batch whose requests the devices of this process hold."""
    own = [[device.process_index == jax.process_index() for device in row] for row in mesh.devices]
    held, all_parts = np.flatnonzero(np.any(own, axis=0)), len(own[0])
    return Share(int(held[0]) // held.size, all_parts // held.size)


def put(tree: Any) -> Any:
    """A pytree on the default device, for programs of that one alone."""
    (device, *_) = jax.local_devices()
    if device.platform != "tpu":
        return jax.device_put(tree)
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
    specs = _specs(1, Deal(len(devices), AXIS), evenly)
    shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    return _on_devices(evenly, places(evenly, shardings=shardings))


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
      deal: the way in which the rows of tables and items are dealt to those that share requests.
      share: the part of each batch that this process makes, for its devices.
      replicate: a pytree on the host or one device -> the same on all devices.
      place: states on the host, or one device -> the same on the devices; where their members are
        not a multiple of `members`, the last one again, see `shared_evenly`.
      hold: what a step only reads, on the host -> the same on the devices.
      create: a pure function of a deal -> the states that it returns, made on all devices and
        nowhere else, so that a large one is held once. See `Group.init` for the deal.
      shard: this process's part of a batch, [requests, ...] -> the batch, its requests split over
        the devices.
      map_batches: function(data, batch) -> its compiled, mapped version, where the data is
        replicated, and batch and result are [requests, ...], split over the devices.
      map_step: step(states, batch, hyperparameters, frozen), and the states by their shapes -> its
        compiled, mapped version; the buffers of the states are donated. Without their shapes, the
        states come back as XLA likes to lay them out.
      unreplicate: the inverse of `replicate` and `place`: the same pytree on one device, or on the
        host where devices have members or rows of their own; rows that were added stay behind the
        others. With a number, so many members, the first ones.
      abstract_hold: the same by its shapes -> what `hold` would make of it, by shapes and places.
      abstract_place: the same of states that `create` would make.
      abstract_shard: the same of `shard`.
    """

    members: int
    deal: Deal
    share: Share
    replicate: Callable[[Any], Any]
    place: Callable[[States], States]
    hold: Callable[[Frozen], Frozen]
    create: Callable[[Callable[[Deal], States]], States]
    shard: Callable[[Any], Any]
    map_batches: Callable[[Callable], Callable]
    map_step: Callable[..., Callable]
    unreplicate: Callable[..., Any]
    abstract_hold: Callable[[Frozen], Frozen]
    abstract_place: Callable[[States], States]
    abstract_shard: Callable[[Any], Any]


def pmap(
    devices: Sequence[jax.Device],
    members: int = 1,
    deterministic: bool = False,
    sharded: bool = False,
) -> DeviceMap:
    """Maps by `jax.pmap`: every array carries a leading axis of devices, which share requests."""
    if members != 1:
        raise ValueError(f"pmap has one axis, of requests, and none for {members} parts of members")
    if sharded:
        raise ValueError("pmap has the same tables on all devices")
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

    def create(make: Callable[[Deal], States]) -> States:
        return jax.jit(lambda: jax.tree.map(stack, make(WHOLE)), out_shardings=sharding)()

    def stack(array: Any) -> Any:
        return jnp.broadcast_to(array, (len(devices), *array.shape))

    def split(array: Any) -> Any:
        return array.reshape(len(devices), array.shape[0] // len(devices), *array.shape[1:])

    def shapes(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return functools.partial(jax.eval_shape, functools.partial(jax.tree.map, function))

    return DeviceMap(
        members=1,
        deal=WHOLE,
        share=ALONE,
        replicate=replicate,
        place=replicate,
        hold=replicate,
        create=create,
        shard=lambda batch: put_all(jax.tree.map(split, batch)),
        map_batches=lambda function: jax.pmap(function, axis_name=AXIS, devices=devices),
        map_step=lambda step, states=None: jax.pmap(
            step, axis_name=AXIS, in_axes=(0, 0, None, 0), donate_argnums=0, devices=devices
        ),
        unreplicate=lambda tree, number=None: jax.tree.map(
            lambda array: array.addressable_data(0)[0], tree
        ),
        abstract_hold=shapes(stack),
        abstract_place=shapes(stack),
        abstract_shard=shapes(split),
    )


def shard_map(
    devices: Sequence[jax.Device],
    members: int = 1,
    deterministic: bool = False,
    sharded: bool = False,
) -> DeviceMap:
    """Maps by `jax.shard_map` over a mesh of both axes: arrays keep their global shapes.

    On a TPU it lays tables out row by row, see `places`.

    Args:
      devices: those to use.
      members: the number of them to spread members over, a divisor of theirs.
      deterministic: on GPUs, whether a step gives the same bits each time. Its sums over equal ids,
        which threads add to as they come, are then made in an order of their own, with sorts.
      sharded: whether to deal the rows of tables and items to the devices that share requests.
    """
    mesh = Mesh(np.array(devices).reshape(members, -1), (MEMBERS, AXIS))
    sharing, share = len(devices) // members, _own_share(mesh)
    deal = Deal(sharing, AXIS) if sharded and sharing > 1 else WHOLE
    whole, in_parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (AXIS,)))
    options = {"xla_gpu_deterministic_ops": True} if deterministic and _on_gpu(devices) else None
    specs = functools.partial(_specs, members, deal)

    def shardings(tree: Any, has_members: Any = False) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, mesh), specs(tree, has_members))

    def places_of(states: States) -> Any:
        """The place and the layout of each array of the states."""
        return places(states, shardings=shardings(states, _has_members(states)))

    def replicate(tree: Any) -> Any:
        # A step donates its state, which must not share memory with arrays of the caller.
        copied = jax.tree.map(jnp.copy, tree)
        return _on_devices(copied, places(tree, whole))

    def hold(frozen: Frozen) -> Frozen:
        if deal == WHOLE:
            return replicate(frozen)
        held = _marked(_dealt(frozen, deal), deal)
        return _on_devices(held, places(held, shardings=shardings(held)))

    def place(states: States) -> States:
        if members == 1 and deal == WHOLE:
            return replicate(states)

        # On the host, as no device need hold them all.
        def filled(leaf: Any, has: bool) -> np.ndarray:
            of = np.asarray(leaf)
            return of[shared_evenly(len(of), members)] if has and members > 1 else of.copy()

        evenly = _dealt(jax.tree.map(filled, states, _has_members(states)), deal)
        return _on_devices(evenly, places_of(evenly))

    def create(make: Callable[[Deal], States]) -> States:
        shapes = jax.eval_shape(lambda: make(WHOLE))
        if deal != WHOLE:
            # Each device makes its own rows; its members are left to XLA.
            make = jax.shard_map(
                functools.partial(make, deal),
                mesh=mesh,
                in_specs=(),
                out_specs=_specs(1, deal, shapes, False),
                axis_names={AXIS},
                check_vma=False,
            )
            return jax.jit(make, out_shardings=places_of(shapes))()
        return jax.jit(lambda: make(WHOLE), out_shardings=places_of(shapes))()

    def shard(batch: Any) -> Any:
        if share == ALONE:
            return _on_devices(batch, jax.tree.map(lambda _: in_parts, batch))

        def whole_of(part: Any) -> jax.Array:
            shape = (len(part) * share.parts, *part.shape[1:])
            return jax.make_array_from_process_local_data(in_parts, np.asarray(part), shape)

        return jax.tree.map(whole_of, batch)

    def map_batches(function: Callable) -> Callable:
        in_specs = PartitionSpec(), PartitionSpec(AXIS)
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(AXIS))
        )

    def map_step(step: Callable, states: States | None = None) -> Callable:
        laid_out = None if states is None else places_of(states)
        of_members = PartitionSpec(MEMBERS) if members > 1 else PartitionSpec()

        @functools.wraps(step)
        def mapped(states: States, batch: Any, numbers: Any, frozen: Frozen) -> Any:
            of_states = specs(states, _has_members(states))
            # Beside those of members there may be numbers that concern the whole step.
            of_numbers = jax.tree.map(
                lambda array: of_members if jnp.ndim(array) else PartitionSpec(), numbers
            )
            # The step sums over the axis itself; the replication checker would add sums of its own.
            return jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(of_states, PartitionSpec(AXIS), of_numbers, specs(frozen)),
                out_specs=(of_states, of_members),
                check_vma=False,
            )(states, batch, numbers, frozen)

        return jax.jit(
            mapped,
            donate_argnums=0,
            out_shardings=(laid_out, NamedSharding(mesh, of_members)),
            compiler_options=options,
        )

    def unreplicate(tree: Any, number: int | None = None) -> Any:
        def on_one(array: Any) -> Any:
            if array.is_fully_replicated:
                return array.addressable_data(0)
            host, axes = _on_this_host(array), tuple(array.sharding.spec)
            host = gathered(host, axes.index(AXIS), deal.devices) if AXIS in axes else host
            return host[:number] if MEMBERS in axes else host

        return jax.tree.map(on_one, tree)

    def abstract_hold(frozen: Frozen) -> Frozen:
        held = _marked(_dealt_shapes(frozen, deal), deal)
        return abstract(held, places(held, shardings=shardings(held)))

    def abstract_place(states: States) -> States:
        placed = _dealt_shapes(states, deal)
        return abstract(placed, places_of(placed))

    return DeviceMap(
        members=members,
        deal=deal,
        share=share,
        replicate=replicate,
        place=place,
        hold=hold,
        create=create,
        shard=shard,
        map_batches=map_batches,
        map_step=map_step,
        unreplicate=unreplicate,
        abstract_hold=abstract_hold,
        abstract_place=abstract_place,
        abstract_shard=lambda batch: abstract(batch, places(batch, in_parts)),
    )


def _has_members(states: States) -> Any:
    """True for each array of the states that has an axis of members."""
    return tuple(jax.tree.broadcast(HAS_MEMBERS, state) for state in states)


def _specs(members: int, deal: Deal, tree: Any, has_members: Any = False) -> Any:
    """The way in which each array is split: its members, if it has them, and its dealt rows."""

    def spec(path: jax.tree_util.KeyPath, leaf: Any, has: bool) -> PartitionSpec:
        axes: list[str | None] = [MEMBERS] if has and members > 1 else []
        rows = _axis_of_rows(path, leaf)
        if deal != WHOLE and rows is not None:
            axes += [None] * (rows - len(axes)) + [AXIS]
        return PartitionSpec(*axes)

    has_members = jax.tree.map(lambda _: False, tree) if has_members is False else has_members
    return jax.tree_util.tree_map_with_path(spec, tree, has_members)


def _dealt(tree: Any, deal: Deal) -> Any:
    """Arrays of the host with their rows in the order of the devices."""

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        axis = _axis_of_rows(path, leaf)
        if deal == WHOLE or axis is None:
            return leaf
        return dealt(leaf, axis, deal.devices, _filler(path))

    return jax.tree_util.tree_map_with_path(of, tree)


def _dealt_shapes(tree: Any, deal: Deal) -> Any:
    """The shapes of what `_dealt` would make."""

    def of(path: jax.tree_util.KeyPath, leaf: Any) -> jax.ShapeDtypeStruct:
        shape, axis = list(leaf.shape), _axis_of_rows(path, leaf)
        if axis is not None:
            shape[axis] = deal.devices * length_of_share(shape[axis], deal.devices)
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(of, tree)


def _marked(frozen: Frozen, deal: Deal) -> Frozen:
    """The same, whose items tell how they are dealt."""
    return dataclasses.replace(frozen, items=dataclasses.replace(frozen.items, deal=deal))


def auto(
    devices: Sequence[jax.Device],
    members: int = 1,
    deterministic: bool = False,
    sharded: bool = False,
) -> DeviceMap:
    """`shard_map` on TPUs, for how it lays tables out, and for what `pmap` cannot do; or that."""
    needs_mesh = (
        members > 1 or sharded or jax.process_count() > 1 or (deterministic and _on_gpu(devices))
    )
    if needs_mesh or devices[0].platform == "tpu":
        return shard_map(devices, members, deterministic, sharded)
    return pmap(devices)


def _on_gpu(devices: Sequence[jax.Device]) -> bool:
    return devices[0].platform == "gpu"


TABLES = ("replicated", "sharded")
"""The ways in which devices may hold tables and items, by `config.parallel.tables`."""

MAPPINGS: dict[str, Callable[..., DeviceMap]] = {
    "auto": auto,
    "pmap": pmap,
    "shard_map": shard_map,
}
