import jax
import pytest

from kd_ranker.batch import empty_batch
from kd_ranker.cohorts import memory
from kd_ranker.configs import cascade
from kd_ranker.training import specs
from kd_ranker.training.mapping import MAPPINGS, first_devices
from tests.faults import fault_of
from tests.random_batches import SPEC


def bytes_of(config, spec=SPEC):
    """The bytes of a run's state and of a batch, counted on arrays."""
    (stack,) = specs.student_stacks({"": config}, spec)
    arrays = stack.init(), empty_batch(spec, config.batch.requests, config.batch.candidates)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))


def cohort_size(*runs):
    """The size of a cohort of the first of them."""
    devices = first_devices(runs[0].parallel.devices)
    return memory.cohort_size(runs[0], runs, SPEC, devices)


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free on each device."""
    return lambda number: monkeypatch.setattr(memory, "free_memory", lambda _: number)


@pytest.mark.parametrize(
    ("parallel", "across"),
    [
        ({}, 8),
        ({"devices": 2}, 2),
        ({"runs": 4}, 4),
        ({"mapping": "shard_map"}, 8),
        ({"mapping": "pmap"}, 1),
    ],
    ids=str,
)
def test_a_cohort_has_the_runs_that_fit_with_the_margin(free, parallel, across):
    config = cascade("small")
    config.parallel.update(parallel)
    wide = config.copy_and_resolve_references()
    wide.student.width *= 2
    one = memory._MARGIN * bytes_of(wide)
    for number, fit in ((0, 1), (one, 1), (10 * one, 10), (10.9 * one, 10)):
        free(number)
        assert cohort_size(config, wide) == fit * across
    config.sweep.cohort_size = 3
    assert cohort_size(config, wide) == 3


def test_a_device_holds_its_part_of_states_and_batch(free):
    config = cascade("small")
    stacks = specs.student_stacks({"": config}, SPEC)
    for devices, tables in ((1, "replicated"), (2, "sharded")):
        config.parallel.update({"devices": devices, "tables": tables})
        over = memory.spread(config.parallel, first_devices(devices), [1], config.batch.requests)
        checked = stacks, config.batch, SPEC, over
        needed = bytes_of(config) / devices
        free(needed + 1)
        memory.check_memory(*checked)
        free(needed - 1)
        fault = fault_of(memory.check_memory, *checked)
        assert fault.startswith("training needs at least")
    free(3.5 * memory._MARGIN * bytes_of(config))
    # Of a device's share of the tables there is room for more.
    assert cohort_size(config) > 3


def test_a_device_that_is_full_is_reported_in_one_line():
    def fail(text):
        with memory.exhaustion_reported():
            raise jax.errors.JaxRuntimeError(text)

    fault = fault_of(fail, "RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nAllocator")
    assert fault.startswith("a device has too little memory: RESOURCE_EXHAUSTED: Out")
    assert "lower sweep.cohort_size, or lower batch.requests" in fault
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: another fault")


def test_free_memory_is_that_of_the_machine_on_a_cpu():
    one, four = (MAPPINGS["auto"](first_devices(number)) for number in (1, 4))
    whole = memory.free_memory(one)
    assert 10**6 < whole < 10**13
    assert memory.free_memory(four) < whole / 3
