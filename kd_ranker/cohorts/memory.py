"""The memory that runs take, and the number of runs that fit one program."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import psutil
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec, abstract_batch
from kd_ranker.errors import UserError
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS, DeviceMap, members_axis, own_devices
from kd_ranker.training.recipes import Group, shared_part

# Free memory per member, over the bytes of its state and of a batch. It covers two copies of the
# state for checkpoints, gathered rows, activations, gradients and the evaluation.
_MARGIN = 7
_REMEDY = "lower sweep.group_size, batch.requests, batch.candidates or the widths of the model"


def spread(
    parallel: ConfigDict, devices: Sequence[jax.Device], sizes: Sequence[int], requests: int
) -> DeviceMap:
    """Spread groups with these numbers of members, and the requests of a batch, over devices.

    `parallel` is that section of a config.
    """
    sharded = parallel.tables == "sharded"
    # Spreading members would leave fewer devices to share the rows of tables.
    if parallel.mapping == "pmap" or (sharded and not parallel.members):
        members = 1
    elif parallel.members and sum(sizes) > 1:
        members = parallel.members
    else:
        members = members_axis(len(devices), sizes, requests)
    return MAPPINGS[parallel.mapping](devices, members, parallel.deterministic, sharded)


def cohort_size(
    config: ConfigDict,
    members: Iterable[ConfigDict],
    spec: FeatureSpec,
    devices: Sequence[jax.Device],
) -> int:
    """Return `sweep.group_size`, or the number of members that fit free memory with a margin."""
    if config.sweep.group_size:
        return config.sweep.group_size
    # As for a cohort with one member per device.
    over = spread(config.parallel, devices, [len(devices)], config.batch.requests)
    one_per_group = {shared_part(member): member for member in members}
    sizes = (
        _bytes(recipes.student_groups({"": member}, spec), member.batch, spec)
        for member in one_per_group.values()
    )
    largest = max(states / over.deal.devices + of_batch for states, of_batch in sizes)
    return max(1, int(free_memory(over) / (_MARGIN * largest))) * over.members


def check_memory(
    groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec, devices: DeviceMap
) -> None:
    """Raise UserError unless a device has room for its part of the states of groups and of a batch.

    `batch` is `config.batch` or `config.teacher.batch`.
    """
    free = free_memory(devices)
    try:
        states, of_batch = _bytes(groups, batch, spec)
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"no model can have this size: {error}; {_REMEDY}") from error
    needed = states / (devices.members * devices.deal.devices) + of_batch / devices.mesh.size
    if needed > free:
        raise UserError(
            f"training needs at least {needed / 1e9:,.1f} GB per device, but {free / 1e9:,.1f} GB "
            f"are free; {_REMEDY}"
        )


@contextlib.contextmanager
def exhaustion_reported() -> Iterator[None]:
    """Raise UserError where XLA finds too little memory on a device, when it compiles or runs."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        first, *_ = str(error).splitlines()
        raise UserError(f"a device has too little memory: {first}; {_REMEDY}") from error


def _bytes(groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec) -> tuple[int, int]:
    """The bytes of the states of groups, and of a batch."""
    trees = (
        [jax.eval_shape(group.init) for group in groups],
        abstract_batch(spec, batch.requests, batch.candidates),
    )
    leaves = map(jax.tree.leaves, trees)
    states, of_batch = (sum(leaf.size * leaf.dtype.itemsize for leaf in of) for of in leaves)
    return states, of_batch


def free_memory(devices: DeviceMap) -> int:
    """Return the free bytes of a device; host devices share those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // len(own_devices(devices.mesh.devices.flat))
