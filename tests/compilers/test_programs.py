"""The compilers' word on every program, for TPUs and H100s that are not here.

`./scripts/test_compilers.sh` installs the compilers and runs these; elsewhere they are skipped.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from kd_ranker.ahead import hlo, programs, topologies
from kd_ranker.training import recipes
from kd_ranker.training.loop import abstract_states
from scripts.benchmarks import compilers
from scripts.benchmarks.compilers import CASES, Case

pytestmark = pytest.mark.slow


def opened(topology: str) -> topologies.Topology:
    """The topology; the test is skipped without its compiler."""
    if missing := topologies.missing_packages(topology):
        pytest.skip(f"{missing} not installed; ./scripts/test_compilers.sh does it")
    return topologies.open_topology(topology)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_program_moves_nothing_of_a_tables_size(case):
    topology = opened(case.topology)
    config, sample = compilers.config_of(case), compilers.sample_of(case)
    found = programs.compile_program(case.program, config, sample, topology)
    assert found.fits, programs.findings_table([found])
    assert not found.compiled.copies
    assert not found.compiled.loops
    if case.large:
        # What a batch needs does not shrink with the share of the tables.
        tables = found.tables * (found.devices if case.tables == "sharded" else 1)
        assert found.compiled.temporary < 0.05 * tables
    strangers = [
        collective
        for collective in found.compiled.collectives
        if not is_expected(case, config, sample, collective)
    ]
    assert not strangers
    assert bool(found.compiled.collectives) == (found.devices > 1)


def is_expected(case, config, sample, array) -> bool:
    """Whether an array is one of ids, their mask, row gradients, dense gradients or losses."""
    assert case.program == "train", "the others here run on one device"
    devices = topologies.open_topology(case.topology).devices
    requests, candidates = config.batch.requests, config.batch.candidates
    (state,) = abstract_states(recipes.student_groups({"": config}, sample.spec))
    # Gradients of dense parameters may travel as one, with the losses and the transform.
    dense = sum(leaf.size for leaf in jax.tree.leaves(state.parameters.dense))
    few = 4 * len(sample.spec.tasks)
    widths = [1] if array.dtype in ("s32", "pred", "u32") else [config.student.width]
    if case.tables == "sharded":  # rows of items, as the student and the teacher read them
        widths += [1, sample.spec.cheap_item_features, sample.spec.item_features]
    of_rows = [
        array.size % (requests // len(devices) * width) == 0
        and array.size <= requests * candidates * width
        for width in widths
    ]
    return any(of_rows) or array.size <= dense + few


def compile_there(topology, function, *shapes):
    """A function of float32 tables and int32 ids, compiled for one device of a topology."""
    there = SingleDeviceSharding(topology.devices[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=there)
        for shape, dtype in zip(shapes, (jnp.float32, jnp.int32, jnp.float32), strict=False)
    ]
    made = jax.jit(function, donate_argnums=0).lower(*arguments)
    return hlo.read(made.compile(dict(topology.options)), {math.prod(shapes[0])})


def test_what_is_looked_for_is_found_where_it_is():
    """The two faults that a TPU's programs had: a loop over rows, and a table copied to be read."""
    topology = opened("v5e:1x1")

    def partly(table, ids):
        return table[ids, :64]

    def written(table, ids, rows):
        return table.at[ids].set(rows)

    shape, number = (1_000_001, 193), 4096
    assert compile_there(topology, partly, shape, (number,)).loops
    assert compile_there(topology, written, shape, (number,), (number, 193)).copies


def test_every_topology_can_be_opened():
    for name in topologies.names():
        if not topologies.missing_packages(name):
            topology = opened(name)
            assert len(topology.devices) == math.prod(
                int(size) for size in name.partition(":")[2].split("x")
            )


def test_a_config_that_does_not_fit_says_so():
    topology = opened("v5e:1x1")
    case = Case("v5e:1x1", source="live")
    config, sample = compilers.config_of(case), compilers.sample_of(case)
    found = programs.compile_program("train", config, sample, topology)
    assert not found.fits
    assert "HBM" in found.refused
    assert " NO " in programs.findings_table([found])
