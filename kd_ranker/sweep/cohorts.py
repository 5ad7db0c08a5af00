"""Which members of a sweep train together: a cohort is one program over one order of the data.

Members share their batches, so what decides these is the same in a cohort, and as many members as
fit the memory of a device share a program. A sweep is a list of cohorts, trained one after the
other. The list is decided once and kept in `cohorts.json`: a sweep that is resumed, on another
machine even, goes on with it, and one that is extended adds to it.
"""

import itertools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from ml_collections import ConfigDict

from kd_ranker.batch import FeatureSpec, Items, abstract_items, empty_batch
from kd_ranker.config import identity
from kd_ranker.config.schema import sweepable, value_of
from kd_ranker.distillation.losses import PAIRWISE, pairs_held
from kd_ranker.embedding.lookup import gather
from kd_ranker.errors import UserError
from kd_ranker.evaluation import results
from kd_ranker.training import recipes
from kd_ranker.training.identity import Identity
from kd_ranker.training.workdir import write_atomically

FILE, FOLDER = "cohorts.json", "cohorts"
MEASURED_FILE = "measured.json"  # beside the tables of results

Cohort = list[str]  # names of members

# What XLA was seen to keep of a member beside its state, in arrays of the size of its gathered
# rows: `tests/sweep/test_cohorts.py` holds the estimate against the compiled program.
_WORKING_ARRAYS = 6
# The same of the pairs that a pairwise loss holds at a time, in float32 arrays.
_PAIR_ARRAYS = 6
# Of what is free: the data, the teacher and the evaluation want room as well.
_SHARE_OF_MEMORY = 0.5


def read_cohorts(workdir: Path) -> list[Cohort]:
    """The cohorts of a sweep that was begun; empty if there are none yet.

    Raises:
      UserError: there are students, and nothing says who they are.
    """
    if (workdir / FILE).exists():
        return _read_plan(workdir)["cohorts"]
    if (folder := workdir / FOLDER).exists():
        raise UserError(
            f"{folder} holds students, and {FILE}, which says who they are, is gone; put that "
            f"back, use another --workdir, or remove {folder} to train anew"
        )
    return []


def _read_plan(workdir: Path) -> dict:
    path = workdir / FILE
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; use another --workdir") from error


def folder_of(workdir: Path, cohort: int) -> Path:
    """Where the checkpoints, metrics and results of a cohort lie."""
    return workdir / FOLDER / str(cohort)


def is_complete(
    workdir: Path, cohorts: Sequence[Cohort], members: Mapping[str, ConfigDict]
) -> bool:
    """Whether all members are trained and measured, and their results joined."""
    placed = set(itertools.chain.from_iterable(cohorts))
    return placed == members.keys() and is_measured(workdir, joined_identity(cohorts, members))


def joined_identity(cohorts: Sequence[Cohort], members: Mapping[str, ConfigDict]) -> Identity:
    """The identity of the results of all cohorts; dataset and teacher are in that of each."""
    return identity.of_members({name: members[name] for cohort in cohorts for name in cohort})


def mark_measured(folder: Path, whose: Identity) -> None:
    """Writes down whose the tables of results in a folder are, and their checksums."""
    write_atomically(folder / MEASURED_FILE, json.dumps(_mark(folder, whose), indent=2))


def is_measured(folder: Path, whose: Identity) -> bool:
    """Whether the tables of results in a folder are there, as they were written, and of `whose`."""
    try:
        return json.loads((folder / MEASURED_FILE).read_text()) == _mark(folder, whose)
    except (OSError, ValueError):  # missing, or cut short
        return False


def _mark(folder: Path, whose: Identity) -> dict[str, dict]:
    files = (results.FILE, results.CURVES_FILE, results.CALIBRATION_FILE)
    checksums = {file: zlib.crc32((folder / file).read_bytes()) for file in files}
    return {"identity": dict(whose), "files": checksums}


def check_kept(workdir: Path, cohorts: Sequence[Cohort], members: Mapping[str, ConfigDict]) -> None:
    """Raises UserError if a member that the sweep has is not among `members`."""
    missing = [name for name in itertools.chain.from_iterable(cohorts) if name not in members]
    if missing:
        raise UserError(
            f"{workdir} holds a sweep with {missing[0]}, which config.sweep does not name; "
            "sweep.extend adds members, so name those that are there as well"
        )


def check_teacher(workdir: Path, teacher_version: str) -> None:
    """Raises UserError if the sweep in `workdir` was begun with another teacher."""
    if not (workdir / FILE).exists():
        return
    begun_with = _read_plan(workdir)["teacher"]
    if begun_with != teacher_version:
        raise UserError(
            f"{workdir} holds a sweep under the teacher {begun_with or 'of the logs'}, and now it "
            f"is {teacher_version or 'that of the logs'}; use another --workdir"
        )


def write_cohorts(workdir: Path, cohorts: Sequence[Cohort], teacher_version: str) -> None:
    """Writes the cohorts of a sweep and the version of the teacher that they follow."""
    content = {"teacher": teacher_version, "cohorts": list(cohorts)}
    write_atomically(workdir / FILE, json.dumps(content, indent=2))


def add_members(
    cohorts: Sequence[Cohort], members: Mapping[str, ConfigDict], size: int
) -> list[Cohort]:
    """The cohorts, followed by new ones for the members that are in none of them.

    Args:
      cohorts: those that are there already, which stay as they are.
      members: all members of the sweep by name.
      size: how many members fit one cohort, at least 1.
    """
    placed = set(itertools.chain.from_iterable(cohorts))
    added = []
    new = [name for name in members if name not in placed]
    for _, of_batches in itertools.groupby(new, key=lambda name: _batches_of(members[name])):
        names = list(of_batches)
        # Of sizes as equal as can be, so that no cohort pays for a teacher pass alone.
        number = -(-len(names) // size)
        added += [names[index::number] for index in range(number)]
    return [*cohorts, *added]


def _batches_of(member: ConfigDict) -> list[object]:
    """The values of the keys that the members of a cohort have in common."""
    return [value_of(member, key.name) for key in sweepable() if key.sweep == "cohorts"]


def cohort_size(config: ConfigDict, members: Iterable[ConfigDict], spec: FeatureSpec) -> int:
    """How many of the members train together: `sweep.group_size`, or what memory allows."""
    if config.sweep.group_size:
        return config.sweep.group_size
    one_a_group = {(member.distill.mode, member.distill.loss): member for member in members}
    largest = max(member_bytes(member, spec) for member in one_a_group.values())
    return max(1, int(_SHARE_OF_MEMORY * free_memory(config) / largest))


def member_bytes(config: ConfigDict, spec: FeatureSpec) -> int:
    """An estimate of what a member takes on a device, in bytes.

    Its state, which is copied once for a checkpoint and once more while that is written, and the
    arrays of a step, which are as many rows as a batch gathers, some times over, and the pairs of a
    pairwise loss.
    """
    requests, candidates = config.batch.requests, config.batch.candidates
    is_pairwise = config.distill.loss in PAIRWISE
    pairs = pairs_held(requests, candidates, len(spec.tasks)) if is_pairwise else 0

    def state_and_rows(items: Items) -> Any:
        (group,) = recipes.student_groups({"": config}, spec)
        batch = jax.tree.map(jnp.asarray, empty_batch(spec, requests, candidates))
        state = group.init()
        tables = {name: table[0] for name, table in state.parameters.tables.items()}
        embedding = group.recipe.model.embedding
        return state, gather(embedding, tables, batch, items, whole_rows=False)

    state, rows = jax.eval_shape(state_and_rows, abstract_items(spec))
    return 3 * _bytes(state) + _WORKING_ARRAYS * _bytes(rows) + _PAIR_ARRAYS * 4 * pairs


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def free_memory(config: ConfigDict) -> int:
    """Bytes that a device has free; several host devices share those of the machine."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return psutil.virtual_memory().available // (config.parallel.devices or jax.device_count())
