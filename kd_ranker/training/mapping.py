"""Devices: where arrays are placed, and the same step on one device or many.

A step is mapped over one mesh of devices, which has two axes. Along `AXIS`, devices share the
requests of a batch and exchange sums over them. Along `RUNS`, devices train different runs, and
exchange nothing but the logits of a live teacher. `jax.pmap` maps over the first axis alone, and
`jax.shard_map` over both; see `device_map`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Int

from kd_ranker.batch import WHOLE, RowSharding
from kd_ranker.batches.training import Devices, Share
from kd_ranker.embedding.row_sharding import from_shards, rows_per_device, to_shards
from kd_ranker.errors import UserError
from kd_ranker.training.state import RUNS_FIRST, Constants, States

AXIS = "requests"
"""The axis of a mesh along which devices share the requests of a batch, for the same runs."""

RUNS = "runs"
"""The axis along which devices train different runs on the same requests."""

_TABLES = "tables"  # the field of `Parameters` that holds them
# Fields with one row per id. Rows are the first axis, after the runs of tables.
_ROWS = {_TABLES, "owners", "items"}


def first_devices(number: int) -> list[jax.Device]:
    """Return the first `number` devices that JAX sees, or all for 0, grouped by process.

    A pod of TPUs may number its chips in another order.
    """
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    return devices[: number or None]


def own_devices(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """Return the devices of this process among those of all processes."""
    process = jax.process_index()
    return [device for device in devices if device.process_index == process]


def names_of(path: jax.tree_util.KeyPath) -> set[str | None]:
    """Return the names of the fields that lead to a leaf of a pytree."""
    return {getattr(part, "name", None) for part in path}


def is_of_tables(path: jax.tree_util.KeyPath) -> bool:
    """Test if a leaf of a pytree is an embedding table."""
    return _TABLES in names_of(path)


def _filler(path: jax.tree_util.KeyPath) -> int:
    """Fill value for padding rows: -1 in category columns, 0 elsewhere."""
    return -1 if "category" in names_of(path) else 0


def _axis_of_rows(row_sharding: RowSharding, path: jax.tree_util.KeyPath, leaf: Any) -> int | None:
    """Return the axis of the rows that are sharded over devices; None without such rows."""
    if row_sharding == WHOLE or not names_of(path) & _ROWS:
        return None
    return leaf.ndim - 2 if is_of_tables(path) else 0


def _spec(
    runs: int, row_sharding: RowSharding, path: jax.tree_util.KeyPath, leaf: Any
) -> PartitionSpec:
    """The partition of an array by its field: runs over `RUNS`, sharded rows over `AXIS`."""
    has_runs = runs > 1 and names_of(path) & RUNS_FIRST
    axes: list[str | None] = [RUNS] if has_runs else []
    rows = _axis_of_rows(row_sharding, path, leaf)
    if rows is not None:
        axes += [None] * (rows - len(axes)) + [AXIS]
    return PartitionSpec(*axes)


def _specs(runs: int, row_sharding: RowSharding, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(functools.partial(_spec, runs, row_sharding), tree)


def _by_row(path: jax.tree_util.KeyPath, leaf: Any, sharding: Sharding) -> Sharding | Format:
    """The placement of an array; on a TPU, tables are stored row by row.

    By default XLA stores them column by column there. Each program that reads or writes rows would
    then copy whole tables.
    """
    devices: set[Any] = sharding.device_set
    if next(iter(devices)).platform != "tpu" or not is_of_tables(path):
        return sharding
    return Format(Layout(tuple(range(leaf.ndim))), sharding)


def _put_at(place: Sharding | Format, leaf: Any) -> Any:
    """Put an array of the host, the same in all processes."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, place)
    # With `device_put`, JAX would compare the values of all processes.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, place, host.__getitem__)


def put(tree: Any, device: jax.Device | None = None) -> Any:
    """Put a pytree on one device, by default the first, for programs of that device only."""
    place = functools.partial(
        _by_row, sharding=SingleDeviceSharding(device or jax.local_devices()[0])
    )
    return jax.device_put(tree, jax.tree_util.tree_map_with_path(place, tree))


def put_by_rows(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Put a pytree of the host on devices: a range of all rows on each, and all else on all.

    XLA itself splits programs on such arrays over the devices. Rows of padding may follow.
    """
    spread = DeviceMap(Mesh(np.array(devices), (AXIS,)), RowSharding(len(devices), AXIS))

    def put(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        axis = _axis_of_rows(spread.row_sharding, path, leaf)
        if axis is not None:
            widths = [(0, 0)] * leaf.ndim
            widths[axis] = (0, -leaf.shape[axis] % len(devices))
            leaf = np.pad(np.asarray(leaf), widths, constant_values=_filler(path))
        return _put_at(spread.place_of(path, leaf), leaf)

    return jax.tree_util.tree_map_with_path(put, tree)


def join_over_devices(arrays: Any, axis: int) -> Any:
    """Concatenate the arrays of all devices along an axis, within a mapped function."""
    # XLA would copy those of a single device.
    if jax.lax.axis_size(AXIS) == 1:
        return arrays
    return jax.lax.all_gather(arrays, AXIS, axis=axis, tiled=True)


def in_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """Compute a function of requests in parts, on the `parts` devices along `RUNS`.

    They hold the same batch. If they cannot share its requests evenly, each computes all of it.
    """
    requests = jax.tree.leaves(batch)[0].shape[0]
    if parts == 1 or requests % parts:
        return function(batch)
    size = requests // parts
    start = jax.lax.axis_index(RUNS) * size
    part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), batch)
    return jax.lax.all_gather(function(part), RUNS, axis=0, tiled=True)


def shared_evenly(number: int, parts: int) -> Int[np.ndarray, "filled"]:
    """Return the indices of `number` runs, the last one repeated up to a multiple of `parts`.

    >>> shared_evenly(number=5, parts=4).tolist()
    [0, 1, 2, 3, 4, 4, 4, 4]
    """
    return np.minimum(np.arange(-(-number // parts) * parts), number - 1)


def runs_axis(devices: int, sizes: Sequence[int], requests: int) -> int:
    """Return the number of devices to spread runs over, if the config does not set it.

    It is the smallest one that minimizes runs per device: those need no traffic and no smaller
    batches. A device holds equally many runs of each stack; `sizes` has their numbers. The
    remaining factor of devices shares the `requests` of a batch, which it has to divide.

    >>> runs_axis(devices=8, sizes=[16], requests=32)
    8
    >>> runs_axis(devices=8, sizes=[1, 4, 4], requests=32)
    4
    >>> runs_axis(devices=7, sizes=[3], requests=24)
    7
    """
    axes = [axis for axis in range(1, devices + 1) if devices % axis == 0]
    axes = [axis for axis in axes if requests % (devices // axis) == 0]
    return min(axes, key=lambda axis: sum(-(-size // axis) for size in sizes))


def share_of(process_of: Int[np.ndarray, "runs sharing"], process: int) -> Share:
    """Return the part of a batch that the devices of a process hold, given that of each device.

    Raises:
      UserError: in every process, if the parts of any are not one aligned range.

    >>> share_of(np.array([[0, 0, 1, 1]]), process=1)
    Share(part=1, parts=2)
    """
    num_parts = process_of.shape[1]
    share_by_process: dict[int, Share] = {}
    for other in np.unique(process_of).tolist():
        parts = np.flatnonzero(np.any(process_of == other, axis=0))
        start = int(parts[0])
        length = len(parts)
        if parts[-1] - start + 1 != length or start % length or num_parts % length:
            raise UserError(
                f"process {other} has devices for the parts {', '.join(map(str, parts))} of the "
                f"{num_parts} of each batch, which are not one aligned range; use another "
                "parallel.runs, or as many devices for each process"
            )
        share_by_process[other] = Share(start // length, num_parts // length)
    return share_by_process[process]


@dataclasses.dataclass(frozen=True)
class DeviceMap(Devices):
    """A mesh of devices, and how a step, its states and its batches are spread over it.

    Its methods that place arrays also take abstract ones and return those with their placement.
    """

    mesh: Mesh  # with the axis `AXIS` and, except under `pmap`, `RUNS` before it
    row_sharding: RowSharding = WHOLE  # of the rows of tables and items to the devices along `AXIS`
    options: dict[str, Any] | None = None  # for XLA's compiler, of a step
    by_pmap: bool = False  # map by `jax.pmap`: batches have a leading axis of devices

    @property
    def runs(self) -> int:
        """The number of devices that runs are spread over.

        A step takes a multiple of it of the runs of each stack, see `shared_evenly`.
        """
        return self.mesh.shape.get(RUNS, 1)

    @functools.cached_property
    def share(self) -> Share:
        """The part of each batch that this process makes, for its devices."""
        process_of = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        return share_of(np.atleast_2d(process_of), jax.process_index())

    def place(self, tree: Any) -> Any:
        """Copy a pytree from the host or one device to the devices.

        Each gets its own runs, filled by `shared_evenly`, its sharded rows, and all else.
        """
        sharing = self.row_sharding.devices

        def put(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
            place = self.place_of(path, leaf)
            axis = _axis_of_rows(self.row_sharding, path, leaf)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                shape = list(leaf.shape)
                if axis is not None:
                    shape[axis] = sharing * rows_per_device(shape[axis], sharing)
                return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
            if names_of(path) & RUNS_FIRST and len(leaf) % self.runs:
                # On the host, as the runs may not fit one device.
                leaf = np.asarray(leaf)[shared_evenly(len(leaf), self.runs)]
            # A step donates its states, so they must not share memory with arrays of the caller.
            if axis is None:
                return _put_at(place, leaf.copy())
            return _put_at(place, to_shards(leaf, axis, sharing, _filler(path)))

        return jax.tree_util.tree_map_with_path(put, tree)

    def place_of(self, path: jax.tree_util.KeyPath, leaf: Any) -> Sharding | Format:
        """Return the placement of a leaf of a pytree, by its field, on these devices."""
        sharding = NamedSharding(self.mesh, _spec(self.runs, self.row_sharding, path, leaf))
        # `pmap` takes no layouts.
        return sharding if self.by_pmap else _by_row(path, leaf, sharding)

    def create(self, make: Callable[[RowSharding], Any]) -> Any:
        """Compute states on their devices only, by a function of a sharding, see `Stack.init`."""
        shapes = jax.eval_shape(lambda: make(WHOLE))
        make_rows: Callable[[], Any] = functools.partial(make, self.row_sharding)
        if self.row_sharding != WHOLE:
            # Each device makes its own rows; XLA splits the runs.
            specs = _specs(1, self.row_sharding, shapes)
            make_rows = self._over_mesh(make_rows, (), specs, axis_names={AXIS})
        places = jax.tree_util.tree_map_with_path(self.place_of, shapes)
        # It runs once. LLVM would take three times as long for a program that is no faster.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 1} if on_cpu else None
        return jax.jit(make_rows, out_shardings=places, compiler_options=options)()

    def shard(self, batch: Any) -> Any:
        """Put this process's part of a batch, [requests, ...], on its devices.

        The result is the whole batch, with its requests split over the devices.
        """
        split = NamedSharding(self.mesh, PartitionSpec(AXIS))
        parts = self.share.parts

        def whole_of(part: Any) -> Any:
            if isinstance(part, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=split)
            if self.by_pmap:
                number = self.mesh.size
                part = part.reshape(number, len(part) // number, *part.shape[1:])
            shape = (len(part) * parts, *part.shape[1:])
            return jax.make_array_from_process_local_data(split, part, shape)

        return jax.tree.map(whole_of, batch)

    def whole_batch(self, batch: Any) -> Any:
        """Invert `shard`: return the requests of all devices on the host of each process."""

        def whole_of(array: Any) -> np.ndarray:
            if array.is_fully_addressable:
                host = np.asarray(array)
            else:
                host = process_allgather(array, tiled=True)
            return host.reshape(-1, *host.shape[2:]) if self.by_pmap else host

        return jax.tree.map(whole_of, batch)

    def map_batches(self, function: Callable) -> Callable:
        """Compile function(data, batch), mapped: data replicated; batch and result sharded."""
        if self.by_pmap:
            return self._pmap(function, in_axes=(None, 0))
        whole = PartitionSpec()
        split = PartitionSpec(AXIS)
        return jax.jit(self._over_mesh(function, (whole, split), split))

    def map_step(self, step: Callable, states: States | None = None) -> Callable:
        """Compile the step of one device, see `step.make_step`; it donates its states.

        Without abstract `states`, XLA chooses the layout of the states returned.
        """
        if self.by_pmap:
            axes: Any = (None, 0, None, None)
            return self._pmap(step, in_axes=axes, out_axes=None, donate_argnums=0)
        places = None
        if states is not None:
            places = jax.tree_util.tree_map_with_path(self.place_of, states)
        runs_spec = PartitionSpec(RUNS) if self.runs > 1 else PartitionSpec()

        @functools.wraps(step)
        def mapped(states: States, batch: Any, numbers: Any, constants: Constants) -> Any:
            # Scalars are numbers of the whole step, not of runs.
            number_specs = jax.tree.map(
                lambda array: runs_spec if jnp.ndim(array) else PartitionSpec(), numbers
            )
            state_specs = _specs(self.runs, self.row_sharding, states)
            constant_specs = _specs(self.runs, self.row_sharding, constants)
            in_specs = (state_specs, PartitionSpec(AXIS), number_specs, constant_specs)
            on_mesh = self._over_mesh(step, in_specs, (state_specs, runs_spec))
            return on_mesh(states, batch, numbers, constants)

        return jax.jit(
            mapped,
            donate_argnums=0,
            out_shardings=(places, NamedSharding(self.mesh, runs_spec)),
            compiler_options=self.options,
        )

    def unreplicate(self, tree: Any) -> Any:
        """Invert `place`: return a pytree on one device, or on the host.

        It is the host where devices hold different runs or rows. Repeated runs and rows of
        padding follow the others.
        """

        def on_one(array: Any) -> Any:
            if array.is_fully_replicated:
                return array.addressable_data(0)
            if array.is_fully_addressable:
                host = np.asarray(array)
            else:
                host = process_allgather(array, tiled=True)
            axes = tuple(array.sharding.spec)
            if AXIS not in axes:
                return host
            return from_shards(host, axes.index(AXIS), self.row_sharding.devices)

        return jax.tree.map(on_one, tree)

    def _over_mesh(self, function: Callable, in_specs: Any, out_specs: Any, **how: Any) -> Callable:
        # A step sums over the axis itself; the replication check would add more sums.
        how |= {"mesh": self.mesh, "in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(function, check_vma=False, **how)

    def _pmap(self, function: Callable, **how: Any) -> Callable:
        # JAX turns it into a `shard_map` that replicates an axis of None.
        return jax.pmap(function, axis_name=AXIS, devices=self.mesh.devices.tolist(), **how)


def device_map(
    mapping: str,
    devices: Sequence[jax.Device],
    runs: int = 1,
    deterministic: bool = False,
    sharded: bool = False,
) -> DeviceMap:
    """Build a mapping over devices.

    Args:
      mapping: "shard_map"; "pmap", which has only the axis `AXIS`, no layouts and no options; or
        "auto", which is "pmap" where that suffices. On TPUs it does not.
      devices: those to use.
      runs: the number of devices to spread runs over, a divisor of their number.
      deterministic: on GPUs, whether a step gives the same bits each time: a fixed order of sums.
      sharded: whether the devices that share requests also share the rows of tables and items.

    Raises:
      ValueError: `pmap` does not support the other arguments.
    """
    platform = devices[0].platform
    sharing = len(devices) // runs
    fixes_order = deterministic and platform == "gpu"
    needs_mesh = runs > 1 or sharded or fixes_order or jax.process_count() > 1
    if mapping == "auto":
        mapping = "shard_map" if needs_mesh or platform == "tpu" else "pmap"
    if mapping == "pmap":
        if needs_mesh:
            raise ValueError("pmap has no axis of runs, sharded tables or compiler options")
        return DeviceMap(Mesh(np.array(devices), (AXIS,)), by_pmap=True)
    return DeviceMap(
        Mesh(np.array(devices).reshape(runs, sharing), (RUNS, AXIS)),
        RowSharding(sharing, AXIS) if sharded and sharing > 1 else WHOLE,
        {"xla_gpu_deterministic_ops": True} if fixes_order else None,
    )


TABLES = ("replicated", "sharded")
"""The ways in which devices may hold tables and items, by `config.parallel.tables`."""

MAPPINGS: dict[str, Callable[..., DeviceMap]] = {
    name: functools.partial(device_map, name) for name in ("auto", "pmap", "shard_map")
}
"""`device_map` by `config.parallel.mapping`."""
