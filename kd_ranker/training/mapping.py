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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from kd_ranker.batch import WHOLE, Deal
from kd_ranker.batches.training import ALONE, Share
from kd_ranker.embedding.deal import gathered
from kd_ranker.errors import UserError
from kd_ranker.training.placing import (
    AXIS,
    MEMBERS,
    abstract,
    dealt_rows,
    dealt_shapes,
    fetch,
    places,
    put_on,
    specs_of,
)
from kd_ranker.training.state import HAS_MEMBERS, Frozen, States


def join_over_devices(arrays: Any, axis: int) -> Any:
    """The arrays of all devices joined along an axis, within a mapped function."""
    # XLA would copy those of a single device.
    if jax.lax.axis_size(AXIS) == 1:
        return arrays
    return jax.lax.all_gather(arrays, AXIS, axis=axis, tiled=True)


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


class _Spread(NamedTuple):
    """A mesh, and how arrays lie on it.

    Attributes:
      mesh: of the axes `MEMBERS` and `AXIS`.
      members: the size of the first.
      deal: the way in which rows are dealt along the second.
      share: the part of each batch that this process makes.
    """

    mesh: Mesh
    members: int
    deal: Deal
    share: Share

    def sharding(self, *axes: str) -> NamedSharding:
        """The sharding of an array whose first axes are split so."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def specs(self, tree: Any, has_members: Any = False) -> Any:
        """The way in which each array is split."""
        return specs_of(self.members, self.deal, tree, has_members)

    def places(self, tree: Any, has_members: Any = False) -> Any:
        """The place and the layout of each array."""
        shardings = functools.partial(NamedSharding, self.mesh)
        return places(tree, shardings=jax.tree.map(shardings, self.specs(tree, has_members)))

    def places_of(self, states: States) -> Any:
        """The same of states."""
        return self.places(states, having_members(states))


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
    sharing = len(devices) // members
    deal = Deal(sharing, AXIS) if sharded and sharing > 1 else WHOLE
    spread = _Spread(mesh, members, deal, _own_share(mesh))
    options = {"xla_gpu_deterministic_ops": True} if deterministic and _on_gpu(devices) else None

    def on_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, spread)

    return DeviceMap(
        members=members,
        deal=deal,
        share=spread.share,
        replicate=on_mesh(_replicate),
        place=on_mesh(_place),
        hold=on_mesh(_hold),
        create=on_mesh(_create),
        shard=on_mesh(_shard),
        map_batches=on_mesh(_map_batches),
        map_step=functools.partial(on_mesh(_map_step), options),
        unreplicate=on_mesh(_unreplicate),
        abstract_hold=on_mesh(_abstract_hold),
        abstract_place=on_mesh(_abstract_place),
        abstract_shard=lambda batch: abstract(batch, places(batch, spread.sharding(AXIS))),
    )


def _own_share(mesh: Mesh) -> Share:
    """The part of a batch whose requests the devices of this process hold."""
    process_of = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return share_of(process_of, jax.process_index())


def share_of(process_of: Int[np.ndarray, "members sharing"], process: int) -> Share:
    """The part of a batch whose requests the devices of a process hold.

    Args:
      process_of: the process of each device of a mesh.
      process: the number of one.

    Raises:
      UserError: the devices of any process hold no run of parts that begins at a multiple of its
        length.

    >>> share_of(np.array([[0, 0, 1, 1]]), process=1)
    Share(part=1, parts=2)
    """
    return {int(one): _run_of(process_of, int(one)) for one in np.unique(process_of)}[process]


def _run_of(process_of: Int[np.ndarray, "members sharing"], process: int) -> Share:
    held, parts = np.flatnonzero(np.any(process_of == process, axis=0)), process_of.shape[1]
    start, length = int(held[0]), len(held)
    if held[-1] - start + 1 != length or start % length or parts % length:
        raise UserError(
            f"process {process} has devices for the parts {', '.join(map(str, held))} of the "
            f"{parts} of each batch, which are no run of its own; take another "
            "parallel.members, or as many devices for each process"
        )
    return Share(start // length, parts // length)


def _replicate(spread: _Spread, tree: Any) -> Any:
    # A step donates its state, which must not share memory with arrays of the caller.
    copied = jax.tree.map(jnp.copy, tree)
    return put_on(copied, places(tree, spread.sharding()))


def _hold(spread: _Spread, frozen: Frozen) -> Frozen:
    if spread.deal == WHOLE:
        return _replicate(spread, frozen)
    held = _marked(dealt_rows(frozen, spread.deal), spread.deal)
    return put_on(held, spread.places(held))


def _place(spread: _Spread, states: States) -> States:
    members = spread.members
    if members == 1 and spread.deal == WHOLE:
        return _replicate(spread, states)

    # On the host, as no device need hold them all.
    def filled(leaf: Any, has: bool) -> np.ndarray:
        of = np.asarray(leaf)
        return of[shared_evenly(len(of), members)] if has and members > 1 else of.copy()

    evenly = dealt_rows(jax.tree.map(filled, states, having_members(states)), spread.deal)
    return put_on(evenly, spread.places_of(evenly))


def _create(spread: _Spread, make: Callable[[Deal], States]) -> States:
    shapes = jax.eval_shape(lambda: make(WHOLE))
    own = functools.partial(make, spread.deal)
    if spread.deal != WHOLE:
        # Each device makes its own rows; its members are left to XLA.
        own = jax.shard_map(
            own,
            mesh=spread.mesh,
            in_specs=(),
            out_specs=specs_of(1, spread.deal, shapes),
            axis_names={AXIS},
            check_vma=False,
        )
    return jax.jit(own, out_shardings=spread.places_of(shapes))()


def _shard(spread: _Spread, batch: Any) -> Any:
    split, parts = spread.sharding(AXIS), spread.share.parts
    if parts == 1:
        return put_on(batch, jax.tree.map(lambda _: split, batch))

    def whole_of(part: Any) -> jax.Array:
        shape = (len(part) * parts, *part.shape[1:])
        return jax.make_array_from_process_local_data(split, np.asarray(part), shape)

    return jax.tree.map(whole_of, batch)


def _map_batches(spread: _Spread, function: Callable) -> Callable:
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(function, mesh=spread.mesh, in_specs=(whole, split), out_specs=split)
    return jax.jit(mapped)


def _map_step(
    spread: _Spread,
    options: dict[str, Any] | None,
    step: Callable,
    states: States | None = None,
) -> Callable:
    laid_out = None if states is None else spread.places_of(states)
    of_members = PartitionSpec(MEMBERS) if spread.members > 1 else PartitionSpec()

    @functools.wraps(step)
    def mapped(states: States, batch: Any, numbers: Any, frozen: Frozen) -> Any:
        of_states = spread.specs(states, having_members(states))
        # Beside those of members there may be numbers that concern the whole step.
        of_numbers = jax.tree.map(
            lambda array: of_members if jnp.ndim(array) else PartitionSpec(), numbers
        )
        # The step sums over the axis itself; the replication checker would add sums of its own.
        return jax.shard_map(
            step,
            mesh=spread.mesh,
            in_specs=(of_states, PartitionSpec(AXIS), of_numbers, spread.specs(frozen)),
            out_specs=(of_states, of_members),
            check_vma=False,
        )(states, batch, numbers, frozen)

    return jax.jit(
        mapped,
        donate_argnums=0,
        out_shardings=(laid_out, NamedSharding(spread.mesh, of_members)),
        compiler_options=options,
    )


def _unreplicate(spread: _Spread, tree: Any, number: int | None = None) -> Any:
    def on_one(array: Any) -> Any:
        if array.is_fully_replicated:
            return array.addressable_data(0)
        host, axes = fetch(array), tuple(array.sharding.spec)
        host = gathered(host, axes.index(AXIS), spread.deal.devices) if AXIS in axes else host
        return host[:number] if MEMBERS in axes else host

    return jax.tree.map(on_one, tree)


def _abstract_hold(spread: _Spread, frozen: Frozen) -> Frozen:
    held = _marked(dealt_shapes(frozen, spread.deal), spread.deal)
    return abstract(held, spread.places(held))


def _abstract_place(spread: _Spread, states: States) -> States:
    placed = dealt_shapes(states, spread.deal)
    return abstract(placed, spread.places_of(placed))


def having_members(states: States) -> Any:
    """True for each array of the states that has an axis of members."""
    return tuple(jax.tree.broadcast(HAS_MEMBERS, state) for state in states)


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
