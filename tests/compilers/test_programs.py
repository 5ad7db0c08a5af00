"""The compilers' word on every program, for TPUs and H100s that are not here.

`./scripts/test_compilers.sh` installs the compilers and runs these; elsewhere they are skipped.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from scripts.aot import compiled, programs, topologies
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
    # Ids, row gradients and dense gradients, but nothing of a table's size.
    assert found.compiled.exchanged < 0.05 * found.tables * found.devices
    assert bool(found.compiled.exchanged) == (found.devices > 1)


def compile_there(topology, function, *shapes):
    """A function of float32 tables and int32 ids, compiled for one device of a topology."""
    there = SingleDeviceSharding(topology.devices[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=there)
        for shape, dtype in zip(shapes, (jnp.float32, jnp.int32, jnp.float32), strict=False)
    ]
    made = jax.jit(function, donate_argnums=0).lower(*arguments)
    return compiled.read_compiled(made.compile(dict(topology.options)), {math.prod(shapes[0])})


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
    for name in topologies.topology_names():
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
