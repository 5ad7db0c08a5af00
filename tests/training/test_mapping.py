import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from kd_ranker.errors import UserError
from kd_ranker.training import specs
from kd_ranker.training.mapping import MAPPINGS, first_devices, share_of
from kd_ranker.training.program import (
    abstract_states,
    initial_states,
    make_program,
    states_on_host,
    step_for,
)
from kd_ranker.training.state import TrainState
from kd_ranker.training.step import one_step
from tests.random_batches import SPEC, random_batch
from tests.training.steps import assert_close, config_of, world_of

long = pytest.mark.long

STEPS = 6
BATCHES = [random_batch(seed, requests=8, candidates=5) for seed in range(STEPS)]


def run(mode, seed):
    # Some runs end before the others.
    steps = {"train__steps": STEPS - seed % 2}
    return config_of(seed=seed, distill__mode=mode, distill__weight=1.0 + seed, **steps)


# Two stacks, of one run and of five: no number of devices here beyond one divides them.
RUNS = {"none": run("none", 0)} | {f"shared-{seed}": run("shared", seed) for seed in range(5)}


@functools.cache
def made(mapping, devices, runs, sharded=False):
    """A run of all runs, that takes its steps on batches by themselves."""
    teacher, constants = world_of(SPEC)
    devices = MAPPINGS[mapping](jax.devices()[:devices], runs, sharded=sharded)
    program = make_program(specs.student_stacks(RUNS, SPEC), teacher, None, constants, devices)
    step = one_step(step_for(program.stacks, teacher, program.devices))
    return program._replace(take=devices.map_step(step, abstract_states(program.filled)))


def trained(program, states, start, stop):
    """On the host, the states after these steps, and the losses of the last one."""
    for batch in BATCHES[start:stop]:
        states, losses = program.take(
            states, program.devices.shard(batch), program.hyperparameters, program.constants
        )
    losses = program.devices.unreplicate(losses)
    of_real_runs = []  # without those that fill up the devices
    for stack, stack_losses in zip(program.stacks, losses, strict=True):
        number = len(stack.names)
        of_real_runs.append({name: by_run[:number] for name, by_run in stack_losses.items()})
    return jax.tree.map(np.asarray, (states_on_host(program, states), of_real_runs))


def assert_same(trees, others, atol):
    """All fields except those that mean nothing between steps."""

    def is_state(node):
        return isinstance(node, TrainState)

    def without_owners(node):
        return node.replace(owners={}) if is_state(node) else node

    trees = jax.tree.map(without_owners, trees, is_leaf=is_state)
    others = jax.tree.map(without_owners, others, is_leaf=is_state)
    assert_close(trees, others, atol)


@functools.cache
def on_one_device():
    """The states of all runs after all steps, and the last one's losses."""
    program = made("auto", 1, 1)
    states, losses = trained(program, initial_states(program), 0, STEPS)
    # They learned, and not the same.
    start = program.stacks[1].init().parameters.tables["item"]
    table = states[1].parameters.tables["item"]
    assert (np.abs(table - start).max(axis=(1, 2)) > 1e-2).all()
    assert len({run.tobytes() for run in table}) == len(table)
    return states, losses


# Where the devices share no requests, a run does what it does on one device. But the compiler
# gives products of other numbers of runs, and of a part of the teacher's requests, other code,
# which adds up in another order.
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("shard_map", 8, 4), ("auto", 8, 2, True)),
        (("auto", 8, 8), ("auto", 1, 1)),
        pytest.param(("auto", 2, 2), ("shard_map", 2, 1), marks=long),
        pytest.param(("auto", 4, 1, True), ("auto", 2, 1, True), marks=long),
    ],
    ids=str,
)
def test_a_run_that_changes_its_mesh_ends_as_on_one_device(before, after):
    """What is saved, on the host, is the same on any mesh of runs, requests and dealt rows."""
    first = made(*before)
    second = made(*after)

    half, _ = trained(first, initial_states(first), 0, STEPS // 2)
    states = second.devices.place(half)
    assert_same(states_on_host(second, states), half, atol=0)
    states, losses = trained(second, states, STEPS // 2, STEPS)
    assert [len(state.non_finite_step) for state in states] == [1, 5]
    assert_same((states, losses), on_one_device(), atol=1e-5)


def test_devices_of_different_runs_exchange_nothing():
    program = made("auto", 8, 8)
    states = initial_states(program)
    for state in states:
        for name in (field.name for field in dataclasses.fields(state)):
            for leaf in jax.tree.leaves(getattr(state, name)):
                runs = () if name in ("step", "unknown_ids", "owners") else (1,)
                expected = runs + leaf.shape[len(runs) :]
                assert leaf.addressable_data(3).shape == expected
    arguments = (
        states,
        program.devices.shard(BATCHES[0]),
        program.hyperparameters,
        program.constants,
    )
    text = program.take.lower(*arguments).compile().as_text()
    # Those of a group of devices, and not of each with itself; releases of XLA write them so or so.
    together = re.compile(r"replica_groups=(\{\{0,1|mesh\[.*?\] \{'runs'\})")
    exchanges = [line for line in text.splitlines() if together.search(line)]
    # Only the teacher's probabilities: [requests, candidates, tasks].
    assert [line.split(" = ")[1].split("{")[0] for line in exchanges] == ["f32[8,5,3]"]


class Device:
    """As much of a device as the arithmetic of a mesh reads."""

    def __init__(self, number=0, process_index=0, platform="gpu"):
        self.number = number
        self.process_index = process_index
        self.platform = platform


def test_auto_is_pmap_where_that_suffices():
    cpu = [Device(platform="cpu")]
    gpu = [Device(platform="gpu")]
    tpu = [Device(platform="tpu")]
    auto = MAPPINGS["auto"]
    pmap = MAPPINGS["pmap"]
    assert auto(gpu).by_pmap
    assert auto(cpu, deterministic=True).by_pmap
    assert not auto(tpu).by_pmap
    assert auto(gpu, deterministic=True).options == {"xla_gpu_deterministic_ops": True}
    assert auto(cpu * 2, runs=2).runs == 2
    for needs in ({"runs": 2}, {"deterministic": True}, {"sharded": True}):
        assert not auto(gpu * 2, **needs).by_pmap
        with pytest.raises(ValueError, match="pmap has no axis of runs"):
            pmap(gpu * 2, **needs)


def test_a_process_makes_the_requests_of_its_own_devices():
    mesh = np.array([[0, 0, 1, 1], [2, 2, 3, 3]])

    shares = [share_of(mesh, process) for process in range(4)]

    assert shares == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert share_of(np.array([[0, 0], [0, 0], [1, 1]]), 1) == (0, 1)


@pytest.mark.parametrize(
    "mesh",
    [
        [[0, 0, 1, 1, 0, 0, 1, 1]],  # the order of chips in a pod of TPUs
        [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]],
        [[0, 1, 1, 1]],
    ],
)
def test_a_process_without_one_range_of_requests_is_an_error(mesh):
    for process in (0, 1):  # every process gets the error
        with pytest.raises(UserError, match="not one aligned range"):
            share_of(np.array(mesh), process)


def test_devices_are_in_the_order_of_their_processes(monkeypatch):
    chips = [Device(*chip) for chip in enumerate((0, 0, 1, 1, 0, 0, 1, 1))]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    assert [chip.number for chip in first_devices(0)] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert [chip.number for chip in first_devices(3)] == [0, 1, 4]
