import dataclasses

import jax
import numpy as np
import pytest

from kd_ranker.batch import empty_batch
from kd_ranker.configs import cascade
from kd_ranker.sweep import memory
from kd_ranker.training import recipes
from kd_ranker.training.mapping import MAPPINGS
from kd_ranker.training.state import Frozen
from kd_ranker.training.step import make_step
from tests.random_batches import CATEGORY_SPEC, SPEC, random_items


def test_the_config_says_how_many_train_together_or_else_the_memory_does(monkeypatch):
    config = cascade("small")
    config.sweep.group_size = 3
    assert memory.cohort_size(config, [config], SPEC) == (3, 1)
    config.sweep.group_size = 0
    config.parallel.devices = 1
    wide = config.copy_and_resolve_references()
    wide.distill.mode = "aux"
    one = memory.member_bytes(wide, SPEC)
    assert one > memory.member_bytes(config, SPEC)
    pairwise = wide.copy_and_resolve_references()
    pairwise.distill.loss = "ranknet"
    with_pairs = memory.member_bytes(pairwise, SPEC)
    assert with_pairs > one
    monkeypatch.setattr(memory, "free_memory", lambda _: 8 * with_pairs)
    assert memory.cohort_size(config, [pairwise, wide, config], SPEC) == (4, 1)
    for free, fit in ((0, 1), (one, 1), (20 * one, 10), (20.5 * one, 10)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: free)
        assert memory.cohort_size(config, [config, wide], SPEC) == (fit, 1)


@pytest.mark.parametrize(
    ("changes", "spread"),
    [
        ({}, 8),
        ({"devices": 2}, 2),
        ({"members": 4}, 4),
        ({"mapping": "shard_map"}, 8),
        ({"mapping": "pmap"}, 1),
    ],
    ids=str,
)
def test_a_cohort_has_as_many_members_as_fit_each_device_that_they_are_spread_over(
    monkeypatch, changes, spread
):
    config = cascade("small")
    one = memory.member_bytes(config, SPEC)
    monkeypatch.setattr(memory, "free_memory", lambda _: 6 * one)
    config.parallel.update(changes)
    assert memory.cohort_size(config, [config], SPEC) == (3, spread)


def test_a_device_holds_its_share_of_a_members_tables(monkeypatch):
    config = cascade("small")
    config.parallel.devices = 4
    spec = dataclasses.replace(SPEC, num_items=100_000)
    whole = memory.member_bytes(config, spec)
    config.parallel.tables = "sharded"
    assert memory.member_bytes(config, spec) == pytest.approx(whole / 4, rel=0.1)
    assert memory.cohort_size(config, [config], spec).members == 1


def test_free_memory_is_that_of_the_machine_on_a_cpu():
    config = cascade("small")
    config.parallel.devices = 1
    whole = memory.free_memory(config)
    assert 10**6 < whole < 10**13
    config.parallel.devices = 4
    assert memory.free_memory(config) < whole / 3


@pytest.mark.parametrize(
    ("mode", "loss", "spec"),
    [
        ("aux", "bce", SPEC),
        ("shared", "bce", SPEC),
        ("shared", "lambda", SPEC),
        ("shared", "bce", CATEGORY_SPEC),
    ],
    ids=["aux", "shared", "shared-lambda", "shared-categories"],
)
def test_the_estimate_of_a_members_memory_covers_the_compiled_program(mode, loss, spec):
    """Against XLA's own account, at sizes where the arrays matter and not the overhead."""
    config = cascade("small")
    config.distill.update({"mode": mode, "loss": loss})
    config.student.update({"width": 32, "interests": 4, "hidden": (64,)})
    config.batch.update({"requests": 32, "candidates": 128})

    def program_bytes(members):
        groups = recipes.student_groups({str(m): config for m in range(members)}, spec)
        batch = jax.tree.map(np.asarray, empty_batch(spec, 32, 128))
        step = MAPPINGS["shard_map"](jax.devices()[:1]).map_step(
            make_step([group.recipe for group in groups])
        )
        arguments = (
            jax.eval_shape(lambda: tuple(group.init() for group in groups)),
            batch,
            tuple(group.numbers for group in groups),
            Frozen(random_items(spec=spec), None),
        )
        account = step.lower(*arguments).compile().memory_analysis()
        return account.temp_size_in_bytes + account.argument_size_in_bytes

    a_member = (program_bytes(6) - program_bytes(2)) / 4
    estimate = memory.member_bytes(config, spec)
    assert a_member < estimate < 8 * a_member
