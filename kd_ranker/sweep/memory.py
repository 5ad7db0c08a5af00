"""The number of members that share a program: as many as fit the memory of the devices."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import psutil
from ml_collections import ConfigDict

from kd_ranker.batch import CandidateBatch, FeatureSpec, Items, abstract_batch, abstract_items
from kd_ranker.distillation.losses import LOSSES, pairs_held
from kd_ranker.embedding.lookup import gather_rows
from kd_ranker.errors import UserError
from kd_ranker.training import recipes
from kd_ranker.training.placing import first_devices, own_devices
from kd_ranker.training.recipes import Group

# What XLA was seen to keep of a member beside its state, in arrays of the size of its gathered
# rows: `tests/sweep/test_memory.py` holds the estimate against the compiled program.
_WORKING_ARRAYS = 6
# The same of the pairs that a pairwise loss holds at a time, in float32 arrays.
_PAIR_ARRAYS = 6
# Of what is free: the data, the teacher and the evaluation want room as well.
_SHARE_OF_MEMORY = 0.5


class CohortSize(NamedTuple):
    """The size of a cohort, in blocks of members of one group, of which each device holds one.

    Attributes:
      blocks: the most blocks of a cohort.
      members: the most members of a block: the number of devices that they are spread over.
    """

    blocks: int
    members: int = 1


def cohort_size(config: ConfigDict, members: Iterable[ConfigDict], spec: FeatureSpec) -> CohortSize:
    """The number of members that train together: `sweep.group_size`, or what memory allows."""
    if config.sweep.group_size:
        return CohortSize(config.sweep.group_size)
    one_a_group = {recipes.shared_part(member): member for member in members}
    largest = max(member_bytes(member, spec) for member in one_a_group.values())
    fit = max(1, int(_SHARE_OF_MEMORY * free_memory(config) / largest))
    return CohortSize(fit, _devices_of_members(config))


def _devices_of_members(config: ConfigDict) -> int:
    """The number of devices that members may be spread over."""
    parallel = config.parallel
    # Where devices share all members, be it by `pmap` or because they share the tables' rows.
    share_members = parallel.mapping == "pmap" or parallel.tables == "sharded"
    return parallel.members or (1 if share_members else len(first_devices(parallel.devices)))


def member_bytes(config: ConfigDict, spec: FeatureSpec) -> int:
    """An estimate of what a member takes on a device, in bytes.

    Its state, which is copied once for a checkpoint and once more while that is written, and the
    arrays of a step, which are as many rows as a batch gathers, some times over, and the pairs of a
    pairwise loss.
    """
    requests, candidates = config.batch.requests, config.batch.candidates
    pairwise = sum(LOSSES[term.loss].pairwise for term in recipes.terms_of(config))
    pairs = pairwise * pairs_held(requests, candidates, len(spec.tasks))
    (group,) = recipes.student_groups({"": config}, spec)
    held, rows = _state_and_rows(config, group, config.batch, spec)
    return int(3 * held) + _WORKING_ARRAYS * rows + _PAIR_ARRAYS * 4 * pairs


def check_memory(
    config: ConfigDict, groups: Sequence[Group], batch: ConfigDict, spec: FeatureSpec
) -> None:
    """Checks that a device has the memory that training needs at the least.

    That is the state of the members that it trains, and the rows that one of a group gathers for
    its share of a batch.

    Args:
      config: the config.
      groups: the members that train together.
      batch: `config.batch` or `config.teacher.batch`.
      spec: of the dataset.

    Raises:
      UserError: it has not, or there is no array of such a size.
    """
    remedy = "lower the widths of the model or batch.requests, or train fewer members at once"
    devices = len(first_devices(config.parallel.devices))
    try:
        found = [_state_and_rows(config, group, batch, spec) for group in groups]
    except (OverflowError, ValueError, TypeError) as error:
        fault = f"a model or a batch has a size that cannot be had: {error}"
        raise UserError(f"{fault}; {remedy}") from error
    states, rows = (sum(of) for of in zip(*found, strict=True))
    needed = int(states / _devices_of_members(config) + rows / devices)
    if needed > (free := free_memory(config)):
        raise UserError(
            f"training needs {needed / 1e9:,.1f} GB of a device at the least, and "
            f"{free / 1e9:,.1f} GB are free; {remedy}"
        )


def _state_and_rows(
    config: ConfigDict, group: Group, batch: ConfigDict, spec: FeatureSpec
) -> tuple[float, int]:
    """Bytes of the state of a group on a device, and of what a member gathers for a batch."""

    def made(batch: CandidateBatch, items: Items) -> Any:
        state = group.init()
        tables = {name: table[0] for name, table in state.parameters.tables.items()}
        embedding = group.recipe.model.embedding
        return state, gather_rows(embedding, tables, batch, items, whole_rows=False)

    abstract = abstract_batch(spec, batch.requests, batch.candidates)
    state, rows = jax.eval_shape(made, abstract, abstract_items(spec))
    shared = _bytes((state.parameters.tables, state.owners))
    return _bytes(state) - (1 - 1 / _devices_of_rows(config)) * shared, _bytes(rows)


def _devices_of_rows(config: ConfigDict) -> int:
    """The number of devices that share the rows of a table."""
    if config.parallel.tables != "sharded":
        return 1
    return len(first_devices(config.parallel.devices)) // (config.parallel.members or 1)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_memory(config: ConfigDict) -> int:
    """Bytes that a device has free; several host devices share those of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // len(own_devices(config.parallel.devices))
