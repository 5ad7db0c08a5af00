"""The memory that runs take, and the number of runs that fit one program."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import psutil
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec, abstract_batch
from kd_ranker.errors import UserError
from kd_ranker.training import specs
from kd_ranker.training.mapping import MAPPINGS, DeviceMap, own_devices, runs_axis
from kd_ranker.training.specs import Stack, shared_part

# Free memory per run, over the bytes of its state and of a batch. It covers two copies of the
# state for checkpoints, gathered rows, activations, gradients and the evaluation.
_MARGIN = 7
_REMEDY = (
    "use another --workdir with a lower sweep.cohort_size, or lower batch.requests, "
    "batch.candidates or the model's widths"
)


def spread(
    parallel: ConfigDict, devices: Sequence[jax.Device], sizes: Sequence[int], requests: int
) -> DeviceMap:
    """Spread stacks with these numbers of runs, and the requests of a batch, over devices.

    `parallel` is that section of a config.
    """
    sharded = parallel.tables == "sharded"
    # Spreading runs would leave fewer devices to share the rows of tables.
    if parallel.mapping == "pmap" or (sharded and not parallel.runs):
        runs = 1
    elif parallel.runs and sum(sizes) > 1:
        runs = parallel.runs
    else:
        runs = runs_axis(len(devices), sizes, requests)
    return MAPPINGS[parallel.mapping](devices, runs, parallel.deterministic, sharded)


def cohort_size(
    config: ConfigDict,
    runs: Iterable[ConfigDict],
    spec: FeatureSpec,
    devices: Sequence[jax.Device],
) -> int:
    """Return `sweep.cohort_size`, or the number of runs that fit free memory with a margin."""
    if config.sweep.cohort_size:
        return config.sweep.cohort_size
    # How many devices get runs of their own depends on the number of runs, which this decides. With
    # a run for each device, `spread` gives runs of their own to as many devices as it can,
    # `device_map.runs`. Each of these has room for `fitting` runs.
    device_map = spread(config.parallel, devices, [len(devices)], config.batch.requests)
    one_per_stack = {shared_part(run): run for run in runs}
    largest = 0.0
    for run in one_per_stack.values():
        state_bytes = _bytes_of_states(specs.student_stacks({"": run}, spec))
        batch_bytes = _bytes_of_batch(run.batch, spec)
        largest = max(largest, state_bytes / device_map.row_sharding.devices + batch_bytes)
    fitting = int(free_memory(device_map) / (_MARGIN * largest))
    return max(1, fitting) * device_map.runs


def check_memory(
    stacks: Sequence[Stack], batch: ConfigDict, spec: FeatureSpec, devices: DeviceMap
) -> None:
    """Raise UserError unless a device has room for its part of the states of stacks and of a batch.

    `batch` is `config.batch` or `config.teacher.batch`.
    """
    free = free_memory(devices)
    try:
        state_bytes = _bytes_of_states(stacks)
        batch_bytes = _bytes_of_batch(batch, spec)
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"no model can have this size: {error}; {_REMEDY}") from error
    needed = state_bytes / (devices.runs * devices.row_sharding.devices)
    needed += batch_bytes / devices.mesh.size
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


def _bytes_of_states(stacks: Sequence[Stack]) -> int:
    return _bytes_of_tree([jax.eval_shape(stack.init) for stack in stacks])


def _bytes_of_batch(batch: ConfigDict, spec: FeatureSpec) -> int:
    return _bytes_of_tree(abstract_batch(spec, batch.requests, batch.candidates))


def _bytes_of_tree(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_memory(devices: DeviceMap) -> int:
    """Return the free bytes of a device; host devices share those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // len(own_devices(devices.mesh.devices.flat))
