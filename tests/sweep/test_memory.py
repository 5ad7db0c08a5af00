import dataclasses
import itertools
import math
import os
import re

import jax
import numpy as np
import psutil
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from kd_ranker.batch import empty_batch
from kd_ranker.config import checks, schema
from kd_ranker.config.key import Bound
from kd_ranker.configs import cascade
from kd_ranker.errors import UserError
from kd_ranker.sweep import memory
from kd_ranker.sweep.members import sweep_members
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


def sizes(key):
    """Values of a key of all sizes, most of them its type's."""
    named = [] if key.allowed is None or isinstance(key.allowed, Bound) else list(key.allowed)
    by_type = {
        bool: st.booleans(),
        int: st.sampled_from([8, 1000, 10**6, 2**31 - 1, 10**10, 10**13, 10**18, 1, 0, -1]),
        float: st.sampled_from([0.5, 1.0, 0.0, 1e-300, 1e300, math.inf, math.nan, -1.0]),
        str: st.sampled_from([*map(str, named)] * 5 + ["nonsense"]),
    }
    element = by_type.get(key.type, st.just(()))
    return st.lists(element, max_size=3) if isinstance(key.default, tuple) else element


_FOLDERS = ("data.name", "data.dir", "data.path", "teacher.workdir")
EDITED = [
    key
    for name, key in sorted(schema.keys_of("cascade").items())
    if key.type in (bool, int, float, str) and name not in _FOLDERS
]


@settings(max_examples=int(os.environ.get("EXAMPLES", "30")), deadline=None)
@given(st.data())
def test_a_config_of_any_sizes_can_be_trained_or_is_one_line(data):
    config = cascade("small")
    try:
        for key in data.draw(st.lists(st.sampled_from(EDITED), min_size=1, max_size=4)):
            schema.set_value(config, key.name, data.draw(sizes(key), key.name))
        checks.validate(config)
        spec = dataclasses.replace(
            SPEC,
            tasks=tuple(config.tasks),
            num_users=config.data.num_users,
            num_items=config.data.num_items,
            history_length=config.data.history_length,
        )
        members = itertools.islice(sweep_members(config).items(), 3)
        groups = recipes.student_groups(dict(members), spec)
        memory.check_memory(config, groups, config.batch, spec)
        teacher = [recipes.teacher_group(config, spec)]
        memory.check_memory(config, teacher, config.teacher.batch, spec)
    except UserError as error:
        event(re.sub(r"[^a-z ]", "", str(error))[:30])
        assert "\n" not in str(error)  # noqa: PT017
    else:
        state = jax.eval_shape(teacher[0].init)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert held <= psutil.virtual_memory().total
