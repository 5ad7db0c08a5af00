"""The members that share a program: as many as fit the memory of the devices."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import psutil
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec, abstract_batch
from kd_ranker.errors import UserError
from kd_ranker.training import recipes
from kd_ranker.training.mapping import first_devices, own_devices
from kd_ranker.training.recipes import Group

# Free memory per member, over the bytes of its state and of a batch. It covers two copies of the
# state for checkpoints, gathered rows, activations, gradients and the evaluation.
_MARGIN = 7
_REMEDY = "lower sweep.group_size, batch.requests, batch.candidates or the widths of the model"


class CohortSize(NamedTuple):
    """The most blocks of a cohort, and the most members of a block.

    The members of a block are of one group, one member per device.
    """

    blocks: int
    members: int = 1


def cohort_size(config: ConfigDict, members: Iterable[ConfigDict], spec: FeatureSpec) -> CohortSize:
    """Return `sweep.group_size`, or the number of members that fit free memory with a margin."""
    if config.sweep.group_size:
        return CohortSize(config.sweep.group_size)
    across, sharing = _spread(config)
    one_per_group = {recipes.shared_part(member): member for member in members}
    largest = max(
        _bytes_of_states(recipes.student_groups({"": member}, spec)) / sharing
        + _bytes(abstract_batch(spec, member.batch.requests, member.batch.candidates))
        for member in one_per_group.values()
    )
    return CohortSize(max(1, int(free_memory(config) / (_MARGIN * largest))), across)


def check_memory(
    config: ConfigDict, groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec
) -> None:
    """Check that a device has room for its part of the states of groups and of a batch.

    `batch` is `config.batch` or `config.teacher.batch`.

    Raises:
      UserError: the memory is too small, or no array can have such a size.
    """
    across, sharing = _spread(config)
    try:
        states = _bytes_of_states(groups)
    except (OverflowError, ValueError, TypeError) as error:
        raise UserError(f"no model can have this size: {error}; {_REMEDY}") from error
    of_batch = _bytes(abstract_batch(spec, batch.requests, batch.candidates))
    needed = states / (across * sharing) + of_batch / len(first_devices(config.parallel.devices))
    if needed > (free := free_memory(config)):
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


def _bytes_of_states(groups: Sequence[Group]) -> int:
    return _bytes([jax.eval_shape(group.init) for group in groups])


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _spread(config: ConfigDict) -> tuple[int, int]:
    """The numbers of devices that members, and the rows of a member's tables, are spread over."""
    parallel, devices = config.parallel, len(first_devices(config.parallel.devices))
    if parallel.tables == "sharded":
        return parallel.members or 1, devices // (parallel.members or 1)
    return parallel.members or (1 if parallel.mapping == "pmap" else devices), 1


def free_memory(config: ConfigDict) -> int:
    """Return the free bytes of a device; host devices share those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // len(own_devices(config.parallel.devices))
